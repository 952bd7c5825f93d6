"""The graph: units by hand, and networks that cannot be followed."""

import time

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from swdlib import channels as tracing
from swdlib.channels import Found, Untraceable, find_attentions, trace_units
from tests.toys import TOYS, build


def by_name(found: list[Found]) -> dict[str, tuple[str, int, set[tuple[str, int, str]]]]:
    return {f.name: (f.kind, f.count, {(p.name, p.dim, p.role) for p in f.parts}) for f in found}


def test_units_of_a_small_network_by_hand() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(4 * 4, 6), nn.Linear(6, 2)),
    )
    assert by_name(trace_units(model, torch.zeros(1, 1, 4, 4))) == {
        "0.weight": (
            "filter",
            4,
            {
                ("0.weight", 0, "weight"),
                ("0.bias", 0, "shift"),
                ("1.weight", 0, "scale"),
                ("1.bias", 0, "shift"),
                ("4.weight", 1, "input"),
            },
        ),
        "4.weight": (
            "channel",
            6,
            {("4.weight", 0, "weight"), ("4.bias", 0, "shift"), ("5.weight", 1, "input")},
        ),
    }


def test_a_flattened_map_is_read_by_as_many_inputs_as_it_has_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(3 * 4, 2))
    (layer,) = trace_units(model, torch.zeros(1, 1, 2, 2))
    (read,) = [part for part in layer.parts if part.role == "input"]
    assert read.units.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_grouped_convolution_loses_whole_groups() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 9, 1, groups=3), nn.Conv2d(9, 4, 1))
    layers = by_name(trace_units(model, torch.zeros(1, 2, 2, 2)))
    kind, count, parts = layers["0.weight"]
    assert (kind, count) == ("filter", 3)
    assert ("1.weight", 0, "weight") in parts and ("2.weight", 1, "input") in parts


@pytest.mark.parametrize("name", TOYS)
def test_units_of_toys_by_hand(name: str) -> None:
    model, example = build(name)
    found = [*trace_units(model, example), *find_attentions(model)]
    assert {layer.name: layer.count for layer in found} == TOYS[name].units
    assert len(found) == len(TOYS[name].units)


@pytest.mark.parametrize("name", TOYS)
def test_units_are_disjoint_slices_of_parameters(name: str) -> None:
    model, example = build(name)
    parameters = dict(model.named_parameters())
    seen: dict[tuple[str, int], Tensor] = {}
    for layer in [*trace_units(model, example), *find_attentions(model)]:
        for part in layer.parts:
            assert part.parameter is parameters[part.name]
            assert part.units.shape == (part.parameter.shape[part.dim],)
            each = part.units[part.units >= 0].bincount(minlength=layer.count)
            assert len(each) == layer.count and each.min() == each.max() > 0
            mine = (part.units >= 0).int()
            seen[part.name, part.dim] = seen.get((part.name, part.dim), 0) + mine
    assert all(int(owners.max()) == 1 for owners in seen.values())


FIRST = {("a.weight", 0, "weight"), ("a.bias", 0, "shift")}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("maps", {("b.weight", 1, "input")}),
        (
            "depthwise",
            {("d.weight", 0, "weight"), ("d.bias", 0, "shift"), ("b.weight", 1, "input")},
        ),
        ("transposed", {("d.weight", 0, "input")}),
        ("prelu of every channel", {("act.weight", 0, "shift"), ("b.weight", 1, "input")}),
        ("prelu of all channels", {("b.weight", 1, "input")}),
        (
            "instance norm",
            {("norm.weight", 0, "scale"), ("norm.bias", 0, "shift"), ("b.weight", 1, "input")},
        ),
        ("instance norm without parameters", {("b.weight", 1, "input")}),
        ("auxiliary head", {("norm.weight", 0, "scale"), ("norm.bias", 0, "shift")}),
        ("concatenated with the input", {("b.weight", 1, "input")}),
    ],
)
def test_what_a_filter_takes_along(name: str, more: set[tuple[str, int, str]]) -> None:
    model, example = build(name)
    parts = by_name(trace_units(model, example))["a.weight"][2]
    if name == "auxiliary head":  # both heads read it, though only training runs the second
        more = more | {("b.weight", 1, "input"), ("aux.weight", 1, "input")}
    assert parts == FIRST | more


def test_channels_beside_the_input_are_read_after_it() -> None:
    model, example = build("concatenated with the input")
    first = next(f for f in trace_units(model, example) if f.name == "a.weight")
    (read,) = [part for part in first.parts if part.role == "input"]
    assert read.units.tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5, 6, 7]


def test_attention_that_is_not_torchs_own_has_no_heads() -> None:
    class Own(nn.MultiheadAttention):
        pass

    assert find_attentions(Own(8, 2)) == []
    computed = nn.MultiheadAttention(8, 2)
    nn.utils.parametrizations.weight_norm(computed.out_proj)
    assert find_attentions(computed) == []


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 3, 1)
        self.norm, self.last = nn.BatchNorm2d(5), nn.Conv2d(5, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.cat([self.left(x), self.right(x)], 1)))


def test_what_is_concatenated_stays_apart() -> None:
    found = {f.name: f for f in trace_units(Concatenation(), torch.zeros(1, 1, 2, 2))}
    units = {
        name: {
            p.name: p.units.tolist() for p in f.parts if p.name in ("norm.weight", "last.weight")
        }
        for name, f in found.items()
    }
    assert units == {
        "left.weight": {"norm.weight": [0, 1, -1, -1, -1], "last.weight": [0, 1, -1, -1, -1]},
        "right.weight": {"norm.weight": [-1, -1, 0, 1, 2], "last.weight": [-1, -1, 0, 1, 2]},
    }


class Averaged(nn.Module):
    """A layer normalisation between two layers, as a module or as a function."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm = nn.LayerNorm(4, elementwise_affine=False) if module else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(self.norm(hidden) if self.norm else F.layer_norm(hidden, (4,)))


@pytest.mark.parametrize("module", [True, False])
def test_what_is_averaged_over_cannot_be_removed(module: bool) -> None:
    assert trace_units(Averaged(module), torch.zeros(2, 3)) == []


def test_outputs_of_the_network_stay() -> None:
    assert trace_units(nn.Linear(3, 2), torch.zeros(1, 3)) == []
    assert trace_units(nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 2, 2)) == []


def test_heads_by_hand() -> None:
    (found,) = find_attentions(nn.TransformerEncoderLayer(4, 2, 8))
    assert (found.name, found.kind, found.count) == ("self_attn", "head", 2)
    units = {part.name: part.units.tolist() for part in found.parts}
    assert units == {
        "self_attn.in_proj_weight": [0, 0, 1, 1] * 3,
        "self_attn.in_proj_bias": [0, 0, 1, 1] * 3,
        "self_attn.out_proj.weight": [0, 0, 1, 1],
    }
    assert find_attentions(nn.MultiheadAttention(4, 2, add_bias_kv=True)) == []
    assert find_attentions(nn.MultiheadAttention(4, 2, kdim=3)) == []


def test_the_model_is_left_as_it_was() -> None:
    model = Concatenation().train()
    model.norm.eval()
    model.left.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace_units(model, torch.randn(2, 1, 3, 3))
    assert model.training and not model.norm.training and model.right.training
    assert not model.left.weight.requires_grad and model.right.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_that_does_not_run_is_refused_by_name() -> None:
    with pytest.raises(
        Untraceable, match=r"channels of Concatenation cannot be followed .*weights"
    ):
        trace_units(Concatenation(), torch.zeros(1, 7, 2, 2))


def test_a_search_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "SECONDS", 0.0)
    started = time.monotonic()
    with pytest.raises(Untraceable, match="no end after 0 seconds"):
        trace_units(torchvision.models.resnet18(weights=None), torch.zeros(1, 3, 64, 64))
    assert time.monotonic() - started < 30


def test_a_search_that_multiplies_places_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST", 7)
    with pytest.raises(Untraceable, match="a channel seems to lead to 8 others"):
        trace_units(*build("maps"))
