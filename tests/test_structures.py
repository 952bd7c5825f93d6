import pytest
import torch
from torch import nn

from swdlib.criteria import batch_norm_scale, magnitude
from swdlib.masks import Unreachable, find_groups, select, sparsity_of
from swdlib.structures import (
    STRUCTURES,
    Coupled,
    Group,
    blocks,
    channels,
    filters,
    kernels,
    n_of_m,
    parameters,
    weights,
)


class Tied(nn.Module):
    """Two layers that share a weight, a frozen one and an odd parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(3))
        self.cube = nn.Parameter(torch.ones(2, 3, 2, 2))


def sizes(groups: list[Group]) -> dict[str, tuple[int, int]]:
    return {group.name: (group.units, group.size) for group in groups}


def test_weights_by_hand() -> None:
    model = Tied()
    assert sizes(weights(model)) == {"cube": (24, 1), "first.weight": (9, 1)}
    assert weights(model)[0].parameter is model.cube


def test_kernels_by_hand() -> None:
    assert sizes(kernels(Tied())) == {}  # a parameter of three dimensions or more is no kernel yet
    model = nn.Sequential(nn.Conv1d(2, 3, 5), nn.Conv3d(2, 1, 2), nn.Conv2d(4, 4, 3, groups=4))
    assert sizes(kernels(model)) == {"0.weight": (6, 5), "1.weight": (2, 8), "2.weight": (4, 9)}


def test_norms_and_biases_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm(2))
    assert [group.name for group in weights(model)] == ["0.weight"]
    assert weights(nn.BatchNorm2d(2)) == kernels(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3)])
def test_empty_kernels_are_no_units(shape: tuple[int, ...]) -> None:
    model = nn.Conv2d(1, 1, 1)
    model.weight = nn.Parameter(torch.empty(shape))
    assert kernels(model) == []


@pytest.mark.parametrize("name", STRUCTURES)
def test_contract_of_structures(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()),
        *(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)),
    )
    names = dict(model.named_parameters())
    groups = STRUCTURES[name](torch.zeros(1, 4, 5, 5))(model)
    assert groups
    for group in groups:
        assert group.parameter is names[group.name]
        assert group.parameters.items() <= names.items()
        scores, sizes = group.scores(magnitude), group.sizes()
        assert scores.shape == sizes.shape == (group.units,)
        for unit in range(group.units):
            gone = group.removed(torch.arange(group.units) == unit)
            weights = {n: slices.expand(names[n].shape) for n, slices in gone.items()}
            assert sum(int(w.sum()) for w in weights.values()) == sizes[unit]
            own = names[group.name][weights[group.name]]
            torch.testing.assert_close(scores[unit], own.detach().abs().mean())
        nothing = group.removed(torch.zeros(group.units, dtype=torch.bool))
        assert not any(slices.any() for slices in nothing.values())


def test_order_of_units_is_the_logical_one_whatever_the_layout() -> None:
    data = torch.arange(48.0).reshape(2, 6, 2, 2)
    for layout in (data, data.to(memory_format=torch.channels_last)):
        whole = Group("w", nn.Parameter(layout))
        assert whole.scores(magnitude).tolist() == list(range(48))
        assert torch.equal(whole.removed(torch.arange(48) < 7)["w"], data < 7)
        kernel = Group("w", nn.Parameter(layout), size=4)
        assert kernel.scores(magnitude).tolist() == [4 * i + 1.5 for i in range(12)]


def test_a_criterion_of_the_wrong_shape_is_refused() -> None:
    group = weights(nn.Linear(3, 2))[0]
    with pytest.raises(ValueError, match=r"weight has shape \(2, 3\), its scores have \(2,\)"):
        group.scores(lambda parameter: parameter.abs().sum(1))


def matrix(rows: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer


def test_blocks_by_hand() -> None:
    layer = matrix([[1, 3, 8], [5, 7, 10], [2, 2, 6]])
    group = blocks(2, 2)(layer)[0]
    # Two whole rows of blocks and columns would be 4 x 4: those at the edge are smaller.
    assert group.scores(magnitude).tolist() == [4.0, 9.0, 2.0, 6.0]
    assert group.sizes().tolist() == [4, 2, 2, 1]
    gone = group.removed(torch.tensor([False, True, True, False]))["weight"]
    assert gone.tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_blocks_of_a_convolution_see_an_output_a_row() -> None:
    convolution = nn.Conv2d(2, 4, 3)
    group = blocks(4, 9)(convolution)[0]
    assert group.units == 2
    gone = group.removed(torch.tensor([True, False]))["weight"]
    assert gone[:, 0].all() and not gone[:, 1].any()


@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
def test_blocks_of_no_size_are_refused(size: object) -> None:
    with pytest.raises(ValueError, match="height must be a whole number of at least 1"):
        blocks(size, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width must be a whole number of at least 1"):
        blocks(1, size)  # type: ignore[arg-type]


def test_two_of_four_by_hand() -> None:
    layer = matrix([[1, 2, 3, 4, 8, 7, 6, 5], [1, 1, 1, 1, 0, 0, 9, 9]])
    masks = select(n_of_m(2, 4)(layer), 0.5)
    assert masks["weight"].int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]]
    some = select(n_of_m(2, 4)(layer), 0.25)["weight"].int()  # of the ones the first go first
    assert some.tolist() == [[0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 1, 1]]


def test_two_of_four_runs_along_the_inputs_of_a_convolution() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 4, 3)
    mask = select(n_of_m(2, 4)(convolution), 0.5)["weight"]
    fours = mask.movedim(1, -1).reshape(-1, 4)
    assert (fours.sum(1) == 2).all()


def test_two_of_four_reaches_a_half_and_says_so() -> None:
    layer = nn.Linear(8, 4)
    with pytest.raises(Unreachable, match=r"sparsity 0\.6 .*weight.* at most 0\.5 of the weights"):
        select(n_of_m(2, 4)(layer), 0.6)


def test_parameters_that_four_does_not_divide_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    assert [group.name for group in n_of_m(2, 4)(model)] == ["1.weight"]


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (2.0, 4)])
def test_n_of_m_that_makes_no_sense_is_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="n and m must be whole numbers with 1 <= n < m"):
        n_of_m(n, m)


class Residual(nn.Module):
    """Two convolutions whose sum a third reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.norm(self.first(x))
        return self.last((maps + self.second(maps)).relu()).mean((2, 3))


def test_a_filter_takes_along_what_is_tied_to_it() -> None:
    model = Residual()
    (group,) = filters(torch.zeros(1, 2, 4, 4))(model)
    assert isinstance(group, Coupled) and group.units == 3
    parts = {(part.name, part.dim, part.role) for part in group.parts}
    assert parts == {
        ("first.weight", 0, "weight"),
        ("norm.weight", 0, "scale"),
        ("norm.bias", 0, "shift"),
        ("second.weight", 0, "weight"),
        ("second.weight", 1, "input"),
        ("second.bias", 0, "shift"),
        ("last.weight", 1, "input"),
    }
    # 2 + 1 + 1 of the first and its norm, 3 + 3 - and 1 counted twice - + 1, and 5 of the last
    masks = select([group], 0.3)
    total = sum(p.numel() for p in model.parameters())
    assert sparsity_of(masks) == pytest.approx((2 + 1 + 1 + 5 + 1 + 5) / total)
    assert masks.keys() == dict(model.named_parameters()).keys()


def test_the_slices_that_a_unit_owns() -> None:
    convolution, linear = nn.Conv2d(1, 3, 1), nn.Linear(12, 2)
    (group,) = filters(torch.zeros(1, 1, 2, 2))(nn.Sequential(convolution, nn.Flatten(), linear))
    assert isinstance(group, Coupled)
    assert group.slices == {("0.weight", 0): 1, ("0.bias", 0): 1, ("2.weight", 1): 4}
    assert group.sizes().tolist() == [1 + 1 + 8] * 3


def test_scores_follow_the_weights() -> None:
    model = Residual()
    (group,) = filters(torch.zeros(1, 2, 4, 4))(model)
    before = group.scores(magnitude)
    with torch.no_grad():
        model.first.weight *= 2
        model.second.weight *= 2
    torch.testing.assert_close(group.scores(magnitude), 2 * before)


def test_batch_norm_scales_rank_filters() -> None:
    model = Residual()
    model.norm.weight.data = torch.tensor([0.5, -0.1, 0.3])
    groups = filters(torch.zeros(1, 2, 4, 4))(model)
    masks = select(groups, 0.3, batch_norm_scale)
    assert masks["norm.weight"].tolist() == [True, False, True]
    bare = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1), nn.Flatten())
    with pytest.raises(ValueError, match=r"0\.weight has no scale that the criterion could rank"):
        select(filters(torch.zeros(1, 2, 1, 1))(bare), 0.3, batch_norm_scale)


def test_a_layer_is_never_emptied_and_the_error_names_it() -> None:
    model = Residual()
    groups = filters(torch.zeros(1, 2, 4, 4))(model)
    with pytest.raises(Unreachable, match=r"sparsity 0\.99 would empty first\.weight"):
        select(groups, 0.99)
    most = sum(p.numel() for p in model.parameters()) - (2 + 2 + 1 + 1 + 5 + 5)
    reached = most / sum(p.numel() for p in model.parameters())
    with pytest.raises(Unreachable, match=r"at most 0\.636363 of the weights"):
        select(groups, 0.99)
    assert sparsity_of(select(groups, reached - 1e-3)) == pytest.approx(reached)


def test_frozen_layers_are_left_alone() -> None:
    model = Residual()
    model.last.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing that structure 'filters' can prune"):
        find_groups(model, filters(torch.zeros(1, 2, 4, 4)))


def test_channels_of_linear_layers_and_heads() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    groups = channels(torch.zeros(1, 3, 8))(layer)
    assert sorted((g.name, g.units) for g in groups) == [("linear1.weight", 12), ("self_attn", 2)]


def test_weights_that_are_computed_from_others() -> None:
    """Where zeros are kept they are prunable, where a row of them is 0 / 0 they are left out."""
    parametrizations = nn.utils.parametrizations
    spectral = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    names = [group.name for group in weights(spectral)]
    assert names == ["0.parametrizations.weight.original", "1.weight"]
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert [group.name for group in weights(normed)] == ["1.weight"]
    counted = [group.name for group in parameters(normed)]
    assert counted == ["0.bias", "1.weight", "1.bias"]
    turned = nn.Sequential(nn.Linear(4, 4), parametrizations.orthogonal(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"the weight of 1 is computed .*remove_parametrizations"):
        weights(turned)


def test_what_keeps_units_from_leaving_is_said() -> None:
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0 of 3 layers.* to a computed weight"):
        find_groups(normed, channels(torch.zeros(1, 4)))
