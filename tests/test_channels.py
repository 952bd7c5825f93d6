"""Channels: each rule by hand, whole networks by hand, and what cannot be followed."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swdlib.channels import Follower, trace
from swdlib.comparing import plain, tensors_of
from swdlib.labels import FREE, PINNED, Joins, compressed
from swdlib.units import Found, Untraceable, removable, units
from tests.toys import TOYS, Net, build


def by_name(found: list[Found]) -> dict[str, tuple[str, int, set[tuple[str, int, str]]]]:
    return {f.name: (f.kind, f.count, {(p.name, p.dim, p.role) for p in f.parts}) for f in found}


def found_in(model: nn.Module, example: object) -> dict[str, int]:
    return {f.name: f.count for f in units(trace(model.eval(), [example])).found}


# Labels and joins ---------------------------------------------------------------------------------


def test_joined_labels_have_one_class_and_constants_join_nothing() -> None:
    joins = Joins()
    first = joins.add(4)
    joins.join(torch.tensor([first, first + 1, FREE]), torch.tensor([first + 1, first + 2, 1]))
    labels = torch.tensor([FREE, PINNED, first, first + 1, first + 2, first + 3])
    assert joins.find(labels).tolist() == [FREE, PINNED, 1, 1, 1, 4]
    one = joins.collapse(torch.tensor([[3, 4]]), [1])
    assert one.shape == (1, 1) and joins.find(torch.arange(1, 5)).tolist() == [1, 1, 1, 1]


def test_labels_are_kept_once_where_they_do_not_vary() -> None:
    assert compressed(torch.tensor([[1, 2], [1, 2]])).tolist() == [[1, 2]]
    assert compressed(torch.full((2, 3), 4)).tolist() == [[4]]


class Maker(nn.Module):
    """A layer of four outputs, labels 1 to 4, and a weight of its own."""

    def __init__(self, maps: bool) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Conv2d(2, 4, 1, bias=False) if maps else nn.Linear(2, 4, False)
        self.weight = nn.Parameter(torch.rand(4))


def labels_after(operation: Callable[..., Tensor], maps: bool = True) -> list[int]:
    """The class of each channel after an operation on four channels; labels 1 to 4, 0 pinned."""
    torch.manual_seed(0)
    model = Maker(maps)
    follower = Follower(model)
    x = torch.rand(2, 2, 4, 4) if maps else torch.rand(3, 2)
    follower.put(x, torch.full([1] * x.ndim, PINNED))
    with plain(follower):
        out = operation(model.layer(x), model.weight)
    labels = follower.of(out).expand(out.shape)
    first = follower.owners["layer.weight"].slices[0]
    each = labels.movedim(1, 0).flatten(1)[:, 0]
    return torch.where(each > 0, each - first + 1, each).tolist()


ONE_BY_ONE = [1, 2, 3, 4]
RULES_BY_HAND: dict[str, tuple[Callable[..., Tensor], list[int]]] = {
    "pointwise": (lambda x, w: (2 * x + 1).relu(), ONE_BY_ONE),
    "in place": (lambda x, w: x.relu_().add_(1), ONE_BY_ONE),
    "written to a part": (lambda x, w: torch.zeros_like(x).copy_(x), ONE_BY_ONE),
    "broadcast": (lambda x, w: x * x.mean((2, 3), keepdim=True).sigmoid(), ONE_BY_ONE),
    "joined with its reverse": (lambda x, w: x + x.flip(1), [1, 2, 2, 1]),
    "flip": (lambda x, w: x.flip(1), [4, 3, 2, 1]),
    "roll": (lambda x, w: x.roll(1, 1), [4, 1, 2, 3]),
    "repeat": (lambda x, w: x.repeat(1, 2, 1, 1), ONE_BY_ONE * 2),
    "repeat each": (lambda x, w: x.repeat_interleave(2, 1), [1, 1, 2, 2, 3, 3, 4, 4]),
    "index": (lambda x, w: x[:, [2, 0]], [PINNED, PINNED]),
    "slice": (lambda x, w: x[:, 1:3], [2, 3]),
    "shuffle": (lambda x, w: x.unflatten(1, (2, 2)).mT.flatten(1, 2)[:, :1], [1]),
    "pixel shuffle": (lambda x, w: F.pixel_shuffle(x, 2)[..., ::2, 1::2], [2]),
    "unfold": (lambda x, w: F.unfold(x, 1), ONE_BY_ONE),
    "concatenation": (lambda x, w: torch.cat([x, x], 1), ONE_BY_ONE * 2),
    "beside a constant": (
        lambda x, w: torch.cat([torch.zeros(2, 1, 4, 4), x], 1),
        [PINNED, *ONE_BY_ONE],
    ),
    "concatenation in places": (lambda x, w: torch.cat([x, x.flip(1)], 2), [1, 2, 2, 1]),
    "stack": (lambda x, w: torch.stack([x, x.flip(1)], -1), [1, 2, 2, 1]),
    "padded places": (lambda x, w: F.pad(x, (1, 1, 1, 1)), ONE_BY_ONE),
    "padded channels": (lambda x, w: F.pad(x, (0, 0, 0, 0, 1, 0)), [PINNED, *ONE_BY_ONE]),
    "sum of places": (lambda x, w: x.sum((2, 3)), ONE_BY_ONE),
    "softmax of places": (lambda x, w: x.softmax(-1), ONE_BY_ONE),
    "pool": (lambda x, w: F.max_pool2d(x, 2), ONE_BY_ONE),
    "resize": (lambda x, w: F.interpolate(x, scale_factor=2), ONE_BY_ONE),
    "softmax of channels": (lambda x, w: x.softmax(1), [PINNED] * 4),
    "mean of channels": (lambda x, w: x * x.mean(1, keepdim=True), [PINNED] * 4),
    "group norm": (lambda x, w: F.group_norm(x, 2), [1, 1, 3, 3]),
    "layer norm": (lambda x, w: F.layer_norm(x, x.shape[1:]), [PINNED] * 4),
    "batch norm": (lambda x, w: F.batch_norm(x, None, None, w, training=True), ONE_BY_ONE),
    "gated linear": (lambda x, w: F.glu(x, 1), [1, 2]),
    "scattered": (lambda x, w: x.index_add(0, torch.tensor([0]), x[:1]), ONE_BY_ONE),
    "product with itself": (lambda x, w: x.flatten(2).mT @ x.flatten(2), [PINNED] * 16),
    "not known": (lambda x, w: torch.linalg.matrix_exp(x), [PINNED] * 4),
}


@pytest.mark.parametrize("name", RULES_BY_HAND)
def test_rules_by_hand(name: str) -> None:
    operation, expected = RULES_BY_HAND[name]
    found = labels_after(operation)
    # Units that share a class have its least label; a class that is all of a tensor is pinned.
    assert found == expected


def test_a_matrix_product_reads_inputs_and_makes_outputs() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert by_name(units(trace(model, [torch.rand(2, 3)])).found) == {
        "0.weight": (
            "channel",
            4,
            {("0.weight", 0, "weight"), ("0.bias", 0, "shift"), ("2.weight", 1, "input")},
        )
    }


def test_units_of_a_small_network_by_hand() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(4 * 4, 6), nn.Linear(6, 2)),
    ).eval()
    first = {
        ("0.weight", 0, "weight"),
        ("0.bias", 0, "shift"),
        ("1.weight", 0, "scale"),
        ("1.bias", 0, "shift"),
        ("1.running_mean", 0, "buffer"),
        ("1.running_var", 0, "buffer"),
        ("4.weight", 1, "input"),
    }
    second = {("4.weight", 0, "weight"), ("4.bias", 0, "shift"), ("5.weight", 1, "input")}
    assert by_name(units(trace(model, [torch.zeros(1, 1, 4, 4)])).found) == {
        "0.weight": ("filter", 4, first),
        "4.weight": ("channel", 6, second),
    }


def test_a_flattened_map_is_read_by_as_many_inputs_as_it_has_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(3 * 4, 2))
    (layer,) = units(trace(model, [torch.zeros(1, 1, 2, 2)])).found
    (read,) = [part for part in layer.parts if part.role == "input"]
    assert read.units.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_grouped_convolution_loses_whole_groups() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 9, 1, groups=3), nn.Conv2d(9, 4, 1))
    layers = by_name(units(trace(model, [torch.zeros(1, 2, 2, 2)])).found)
    kind, count, parts = layers["0.weight"]
    assert (kind, count) == ("filter", 3)
    assert ("1.weight", 0, "weight") in parts and ("2.weight", 1, "input") in parts


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_hidden_units_of_recurrent_layers(kind: Any) -> None:
    model = Net(
        lambda net, x: net.out(net.rnn(x)[0]),
        rnn=kind(3, 4, num_layers=2, batch_first=True, bidirectional=True),
        out=nn.Linear(8, 2),
    )
    assert found_in(model, torch.rand(2, 5, 3)) == {"rnn.weight_ih_l0": 4}


def test_embeddings_and_tied_weights() -> None:
    model = Net(
        lambda net, x: F.linear(F.linear(net.a(x), net.b.weight), net.b.weight.t()),
        a=nn.Embedding(5, 6),
        b=nn.Linear(6, 4, bias=False),
    )
    (found,) = units(trace(model, [torch.tensor([[0, 1, 2]])])).found
    assert by_name([found]) == {"b.weight": ("channel", 4, {("b.weight", 0, "tied")})}


def test_heads_share_what_their_queries_share() -> None:
    def attend(net: Any, x: Tensor) -> Tensor:
        q = net.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (net.k, net.v))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    layers = {"q": nn.Linear(6, 16), "k": nn.Linear(6, 8), "v": nn.Linear(6, 8)}
    model = Net(attend, **layers, o=nn.Linear(16, 5))
    (found,) = removable(model, torch.rand(2, 7, 6)).found
    assert (found.kind, found.count) == ("head", 2)
    rows = {p.name: p.units.tolist() for p in found.parts if p.dim == 0}
    assert rows["q.weight"] == [0] * 8 + [1] * 8 and rows["v.weight"] == [0] * 4 + [1] * 4


def test_heads_of_torchs_attention_by_hand() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    heads = {f.name: f for f in removable(model, torch.rand(2, 3, 4)).found if f.kind == "head"}
    units_of = {part.name: part.units.tolist() for part in heads["self_attn"].parts}
    assert units_of == {
        "self_attn.in_proj_weight": [0, 0, 1, 1] * 3,
        "self_attn.in_proj_bias": [0, 0, 1, 1] * 3,
        "self_attn.out_proj.weight": [0, 0, 1, 1],
    }


@pytest.mark.parametrize("name", TOYS)
def test_units_of_toys_by_hand(name: str) -> None:
    model, example = build(name)
    found = removable(model, example).found
    assert {layer.name: layer.count for layer in found} == TOYS[name].units
    assert len(found) == len(TOYS[name].units)


@pytest.mark.parametrize("name", TOYS)
def test_units_are_disjoint_slices_of_parameters(name: str) -> None:
    model, example = build(name)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    seen: dict[tuple[str, int], Tensor] = {}
    for layer in units(trace(model, [example])).found:
        for part in layer.parts:
            assert part.parameter is tensors[part.name]
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
        (  # both heads read it, though only training runs the second
            "auxiliary head",
            {
                ("norm.weight", 0, "scale"),
                ("norm.bias", 0, "shift"),
                ("norm.running_mean", 0, "buffer"),
                ("norm.running_var", 0, "buffer"),
                ("b.weight", 1, "input"),
                ("aux.weight", 1, "input"),
            },
        ),
        ("concatenated with the input", {("b.weight", 1, "input")}),
    ],
)
def test_what_a_filter_takes_along(name: str, more: set[tuple[str, int, str]]) -> None:
    model, example = build(name)
    assert by_name(removable(model, example).found)["a.weight"][2] == FIRST | more


def test_channels_beside_the_input_are_read_after_it() -> None:
    model, example = build("concatenated with the input")
    first = next(f for f in removable(model, example).found if f.name == "a.weight")
    (read,) = [part for part in first.parts if part.role == "input"]
    assert read.units.tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5, 6, 7]


def test_outputs_of_the_network_stay() -> None:
    assert found_in(nn.Linear(3, 2), torch.zeros(1, 3)) == {}
    assert found_in(nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 2, 2)) == {}


def test_the_model_is_left_as_it_was() -> None:
    model, example = build("auxiliary head")
    model.train().get_submodule("norm").eval()
    model.get_submodule("a").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    removable(model, example)
    assert [module.training for module in model.modules()] == modes
    assert not model.get_parameter("a.weight").requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_that_does_not_run_is_refused_by_name() -> None:
    model, _ = build("maps")
    with pytest.raises(Untraceable, match=r"channels of Net cannot be followed.*weights"):
        removable(model, torch.zeros(1, 7, 2, 2))


# Trials -------------------------------------------------------------------------------------------


def test_a_number_in_the_code_holds_its_layer_and_names_the_line() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.c(F.relu(net.b(F.relu(net.a(x)).view(-1, 8 * 16))))

    model = Net(run, a=nn.Conv2d(3, 8, 1), b=nn.Linear(128, 6), c=nn.Linear(6, 2))
    result = removable(model, torch.rand(2, 3, 4, 4))
    assert {f.name: f.count for f in result.found} == {"b.weight": 6}
    (held,) = result.held
    assert held.names == ("a.weight",) and "test_channels.py" in str(held)
    assert "the code holds their number" in held.reason


def test_a_number_in_an_attribute_is_told() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 4
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            one, other = torch.split(self.a(x), [self.width, self.width], -1)
            return self.b(one) + self.c(other)

    result = removable(Split(), torch.rand(2, 3))
    assert sum(f.count for f in result.found) >= 4 and not result.held


def test_a_layer_that_the_example_does_not_run_holds_what_may_feed_it() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        h = F.relu(net.a(x))
        return net.d(F.relu(net.b(h)) if net.training else F.relu(net.c(h)))

    layers = {"a": nn.Linear(3, 8), "b": nn.Linear(8, 6), "c": nn.Linear(8, 6)}
    model = Net(run, **layers, d=nn.Linear(6, 2), never=nn.Linear(8, 7))
    result = removable(model, torch.rand(4, 3))
    assert {f.name: f.count for f in result.found} == {"b.weight": 6}
    assert "never.weight" in result.held[0].names and "does not run it" in result.held[0].reason


def test_tensors_of_nested_outputs() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert tensors_of({"x": [a, None], "y": (b, "text", 3)}) == [a, b]
    assert tensors_of(a) == [a] and tensors_of(None) == []


def test_units_are_found_once_until_a_module_or_shape_changes() -> None:
    model, example = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), torch.rand(4, 3)
    first = removable(model, example)
    assert removable(model, example) is first
    assert removable(model, torch.rand(4, 3)) is not first
    before = removable(model, example)
    model[0], model[2] = nn.Linear(3, 5), nn.Linear(5, 2)
    assert removable(model, example) is not before
    assert [f.count for f in removable(model, example).found] == [5]


def test_what_is_remembered_keeps_no_model_alive() -> None:
    def found() -> "weakref.ref[nn.Module]":
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
        assert removable(model, torch.rand(4, 3)).found
        return weakref.ref(model)

    gone = found()
    gc.collect()
    assert gone() is None
