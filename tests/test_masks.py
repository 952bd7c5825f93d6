import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swdlib.criteria import magnitude
from swdlib.deploy.shrinking import shrink
from swdlib.masks import (
    NotFinite,
    Unreachable,
    apply_,
    check_mask,
    check_sparsity,
    emptied,
    find_groups,
    lowest,
    lowest_by_sort,
    prunable,
    removed_weights,
    select,
    select_units,
    sparsity_of,
)
from swdlib.structures import STRUCTURES, Group, filters, kernels, weights

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Ties, zeros of both signs, denormals of each dtype, and values that differ by one rounding.
HOSTILE = (0.0, -0.0, 5e-324, 1e-310, 1e-45, 1e-40, 6e-8, 1.0, 1.0 + 1e-7, 1.0 + 1e-15, 6e4, 3e38)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@st.composite
def scores_and_count(draw: st.DrawFn) -> tuple[list[Tensor], int]:
    values = st.sampled_from(HOSTILE) | st.floats(-2.0, 2.0, width=16)
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        numbers = draw(st.lists(values, max_size=12))
        groups.append(torch.tensor(numbers, dtype=draw(st.sampled_from(DTYPES))))
    groups = [g.clamp(-6e4, 6e4) if g.dtype == torch.float16 else g for g in groups]
    return groups, draw(st.integers(0, sum(len(g) for g in groups)))


def in_plain_python(scores: list[Tensor], count: int) -> list[list[bool]]:
    numbers = [float(value) for group in scores for value in group.double()]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)  # stable: first index first
    flags = iter([i in set(order[:count]) for i in range(len(numbers))])
    return [[next(flags) for _ in group] for group in scores]


@settings(max_examples=150, deadline=None)
@given(scores_and_count())
def test_selection_equals_sorting_on_hostile_scores(case: tuple[list[Tensor], int]) -> None:
    scores, count = case
    fast = lowest(scores, count)
    slow = lowest_by_sort(scores, [1] * len(scores), count)
    assert [f.tolist() for f in fast] == [s.tolist() for s in slow]
    assert [f.tolist() for f in fast] == in_plain_python(scores, count)
    assert all(
        f.shape == s.shape and f.dtype == torch.bool for f, s in zip(fast, scores, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["normal", "sorted", "mostly zero", "all equal", "periodic"])
def test_selection_equals_sorting_where_a_sample_is_used(
    kind: str, device: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(50_000, generator=generator).abs()
    every = math.ceil(50_000 ** (1 / 3))
    flat = {
        "normal": normal,
        "sorted": normal.sort().values,
        "mostly zero": normal * (normal > 1.5),
        "all equal": torch.ones_like(normal),
        # What the sample sees says nothing of the rest.
        "periodic": torch.where(torch.arange(50_000) % every == 0, 9.0 + normal, normal),
    }[kind]
    scores = list(flat.to(device, dtype).split([1, 0, 20_000, 29_999]))
    for count in (0, 1, 2, 25_000, 47_500, 49_999, 50_000):
        fast = lowest(scores, count)
        assert sum(int(f.sum()) for f in fast) == count
        assert all(map(torch.equal, fast, lowest_by_sort(scores, [1] * 4, count)))


def test_of_equal_scores_the_first_go_first() -> None:
    scores = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, -0.0, 0.0])]
    assert [g.tolist() for g in lowest(scores, 2)] == [[False, True], [True, False, False]]
    assert [g.tolist() for g in lowest(scores, 4)] == [[False, True], [True, True, True]]


def test_mixed_dtypes_are_compared_exactly() -> None:
    close = torch.tensor([1.0 + 2**-40, 1.0 - 2**-40], dtype=torch.float64)
    one = torch.ones(1)
    half = torch.tensor([1.0 + 2**-10], dtype=torch.float16)
    brain = torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16)
    order = [lowest([close, one, half, brain], k) for k in range(6)]
    sums = [[g.tolist() for g in step] for step in order]
    assert sums[1] == [[False, True], [False], [False], [False]]
    assert sums[2] == [[False, True], [True], [False], [False]]
    assert sums[3] == [[True, True], [True], [False], [False]]
    assert sums[4] == [[True, True], [True], [True], [False]]
    assert lowest([half, brain], 1)[0].item()


def test_units_of_several_weights_by_hand() -> None:
    scores = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.0, 0.5])]

    def taken(count: int) -> list[list[bool]]:
        return [g.tolist() for g in lowest_by_sort(scores, [4, 1], count)]

    assert taken(0) == [[False, False], [False, False, False]]
    assert taken(1) == [[False, False], [False, False, True]]
    # The next is a unit of four: one weight more takes all of it.
    assert taken(2) == taken(5) == [[False, True], [False, False, True]]
    assert taken(6) == [[False, True], [False, True, True]]
    assert taken(8) == taken(11) == [[True, True], [True, True, True]]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    numbers=st.integers(1, 12),
    sparsity=st.floats(0.0, 0.999),
    seed=st.integers(0, 99),
)
def test_units_removed_are_the_fewest_lowest_that_reach_the_target(
    sizes: list[int], numbers: int, sparsity: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = [
        Group(str(i), nn.Parameter(torch.randint(0, 4, (numbers, n), generator=generator) * 1.0), n)
        for i, n in enumerate(sizes)
    ]
    chosen = select_units(groups, sparsity, magnitude)
    scores = torch.cat([group.scores(magnitude) for group in groups]).detach()
    taken = torch.cat(chosen)
    cost = torch.tensor(sizes).repeat_interleave(numbers)
    target = round(sparsity * prunable(groups))
    removed = int(cost[taken].sum())
    assert removed >= target
    if target:
        last = int(cost[taken & (scores == scores[taken].max())].max())
        assert removed - target < last
    else:
        assert removed == 0
    if taken.any() and not taken.all():
        assert scores[taken].max() <= scores[~taken].min()


structures = pytest.mark.parametrize("name", STRUCTURES)
# The most that these can remove of the network below: something has to stay of each layer, or of
# each four weights.
MOST = {"filters": 0.7, "channels": 0.3, "filters_and_channels": 0.9, "2_of_4": 0.5}


def small_groups(name: str) -> tuple[nn.Module, list[Group]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten()),
        *(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)),
    )
    return model, find_groups(model, STRUCTURES[name](torch.zeros(1, 4, 5, 5)))


@structures
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_contract_of_selection(name: str, sparsity: float) -> None:
    if sparsity > MOST.get(name, 1.0):
        with pytest.raises(Unreachable, match="can remove at most"):
            select(small_groups(name)[1], sparsity)
        return
    model, groups = small_groups(name)
    masks = select(groups, sparsity)
    for parameter, mask in masks.items():
        check_mask(parameter, mask, dict(model.named_parameters()))
    rounded = int if name == "parameters" else round
    surplus = sparsity_of(masks) * prunable(groups) - rounded(sparsity * prunable(groups))
    assert -1e-6 < surplus < max(int(group.sizes().max()) for group in groups)


@pytest.mark.parametrize("name", ["weights", "kernels", "blocks"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_no_unit_that_stays_ranks_below_one_that_goes(name: str, sparsity: float) -> None:
    groups = small_groups(name)[1]
    gone = torch.cat(select_units(groups, sparsity, magnitude))
    scores = torch.cat([group.scores(magnitude) for group in groups])
    kept, cut = scores[~gone].tolist(), scores[gone].tolist()
    assert max(cut, default=0.0) <= min(kept, default=math.inf)


@structures
def test_masks_of_a_rising_sparsity_are_nested(name: str) -> None:
    groups = small_groups(name)[1]
    shares = (0.0, 0.2, 0.21, 0.5, 0.9, 0.98)
    rising = [select(groups, share * MOST.get(name, 1.0)) for share in shares]
    for denser, sparser in pairwise(rising):
        assert all((sparser[parameter] <= denser[parameter]).all() for parameter in denser)
        assert sparsity_of(sparser) >= sparsity_of(denser)
    assert sparsity_of(rising[-1]) > sparsity_of(rising[1]) > 0


class Chain(nn.Module):
    """Convolutions one after the other, each of a kind and a width."""

    def __init__(self, blocks: list[tuple[str, int]]) -> None:
        super().__init__()
        self.kinds = ["plain", *(kind for kind, _ in blocks)]
        self.layers = nn.ModuleList([nn.Conv2d(2, 3, 1)])
        width = 3
        for kind, number in blocks:
            outputs = number if kind in ("plain", "concatenated") else width
            groups = width if kind == "depthwise" else 1
            self.layers.append(nn.Conv2d(width, outputs, 1, groups=groups))
            width = width + outputs if kind == "concatenated" else outputs
        self.last = nn.Linear(4 * width, 2)
        for parameter in self.parameters():  # of few values, so that many units rank alike
            parameter.data = torch.randint(1, 3, parameter.shape) * 1.0

    def forward(self, x: Tensor) -> Tensor:
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            more = layer(x)
            if kind == "residual":
                more = x + more
            x = torch.cat([x, more], 1) if kind == "concatenated" else more
        return self.last(x.flatten(1))


def one_by_one(model: nn.Module, groups: list[Group], allowed: int) -> list[Tensor] | None:
    """Remove the lowest units one by one until the shrunk network has as few weights as allowed."""
    ranks = [group.protect(group.scores(magnitude)) for group in groups]
    units = [(float(r), i, j) for i, rank in enumerate(ranks) for j, r in enumerate(rank)]
    chosen = [torch.zeros(group.units, dtype=torch.bool) for group in groups]
    for rank, i, j in [(-1.0, 0, 0), *sorted(units, key=lambda unit: unit[0])]:
        if rank == math.inf:
            return None
        if rank >= 0:
            chosen[i][j] = True
        masks = {name: ~gone for name, gone in removed_weights(groups, chosen).items()}
        small = shrink(model, masks, torch.randn(2, 2, 2, 2))
        if sum(p.numel() for p in small.parameters()) <= allowed:
            return chosen
    return None


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(
        st.tuples(
            st.sampled_from(["plain", "residual", "concatenated", "depthwise"]), st.integers(1, 3)
        ),
        max_size=3,
    ),
    sparsity=st.floats(0.0, 0.95),
    seed=st.integers(0, 99),
)
def test_coupled_units_are_taken_one_by_one_until_the_shrunk_network_is_small_enough(
    blocks: list[tuple[str, int]], sparsity: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Chain(blocks)
    groups = find_groups(model, filters(torch.zeros(1, 2, 2, 2)))
    total = sum(p.numel() for p in model.parameters())
    expected = one_by_one(model, groups, total - round(sparsity * total))
    if expected is None:
        with pytest.raises(Unreachable, match="can remove at most") as error:
            select(groups, sparsity)
        most = float(str(error.value).split("at most ")[1].split()[0])
        assert most <= sparsity_of(select(groups, most)) <= sparsity
    else:
        chosen = select_units(groups, sparsity, magnitude)
        assert [units.tolist() for units in chosen] == [units.tolist() for units in expected]


def test_select_by_hand() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[0.1, -0.4], [-0.2, 0.3]])
    masks = select(weights(model), 0.5)
    assert masks["weight"].tolist() == [[False, True], [False, True]]
    # round(0.3 * 4) is 1.
    assert select(weights(model), 0.3)["weight"].tolist() == [[False, True], [True, True]]
    descending = select(weights(model), 0.5, lambda parameter: -parameter.abs())
    assert descending["weight"].tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    last = nn.Linear(2, 2)
    last.weight.data[1, 0] = bad
    model = nn.Sequential(nn.Linear(2, 2), last)
    with pytest.raises(NotFinite, match=r"^1\.weight holds NaN or infinite"):
        select(weights(model), 0.5)
    assert issubclass(NotFinite, ValueError)


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.0, 1.5, math.inf, "0.9", None, [0.5]])
def test_bad_sparsity_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity .* must be in \[0, 1\), not ") as error:
        check_sparsity(bad)
    assert repr(bad) in str(error.value)
    with pytest.raises(ValueError, match="sparsity"):
        select(weights(nn.Linear(2, 2)), bad)


@pytest.mark.parametrize("number", [np.float16(0.9), np.float32(0.9), torch.tensor(0.9)])
def test_sparsity_of_any_kind_of_number_is_counted_with_exactly(number: Any) -> None:
    groups = weights(nn.Linear(100, 500))
    sparsity = float(number)
    assert type(check_sparsity(number)) is float and check_sparsity(number) == sparsity
    [mask] = select(groups, number).values()
    assert int((~mask).sum()) == round(sparsity * 50_000)


class Scaled(nn.Module):
    """Two convolutions and a parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.second(self.first(x).relu())


def test_a_parameter_of_no_dimension_is_kept() -> None:
    model, example = Scaled(), torch.randn(2, 1, 7, 7)
    masks = select(find_groups(model, filters(example)), 0.5)
    assert masks["scale"].shape == () and masks["scale"]
    apply_(model, masks)
    small = shrink(model, masks, example)
    assert sum(p.numel() for p in small.parameters()) == sum(int(m.sum()) for m in masks.values())


def test_sparsity_is_returned() -> None:
    assert [check_sparsity(s) for s in (0, 0.5, math.nextafter(1.0, 0.0))][:2] == [0, 0.5]


def test_nothing_to_prune_is_an_error() -> None:
    with pytest.raises(ValueError, match="BatchNorm1d has nothing that structure 'weights'"):
        find_groups(nn.BatchNorm1d(3), weights)
    with pytest.raises(ValueError, match="Linear has nothing that structure 'kernels'"):
        find_groups(nn.Linear(3, 3), kernels)
    with pytest.raises(ValueError, match="requires_grad"):
        find_groups(nn.Linear(3, 3).requires_grad_(False), weights)
    with pytest.raises(ValueError, match="nothing"):
        find_groups(nn.Embedding(0, 3), weights)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not 'resnet20'"):
        find_groups("resnet20", weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["filters", filters, None])
def test_what_is_no_structure_is_named(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"such as structures.weights or structures.filters\(exam"):
        find_groups(nn.Conv2d(3, 3, 3), wrong)


def test_empty_parameters_are_left_out() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Embedding(0, 3)])
    assert [group.name for group in find_groups(model, weights)] == ["0.weight"]


def test_apply_by_hand() -> None:
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[-1.0, 2.0], [math.inf, math.nan]])
    bias = model.bias.detach().clone()
    apply_(model, {"weight": torch.tensor([[False, True], [False, False]])})
    assert model.weight.tolist() == [[0.0, 2.0], [0.0, 0.0]]
    assert not model.weight.detach().signbit().any()
    assert torch.equal(model.bias, bias)


def test_apply_is_done_whole_or_not() -> None:
    first = nn.Linear(2, 2)
    model = nn.Sequential(first, nn.Linear(2, 2))
    before = first.weight.detach().clone()
    good = torch.zeros(2, 2, dtype=torch.bool)
    for name, mask in [("9.weight", good), ("1.weight", good[0]), ("1.weight", good.int())]:
        with pytest.raises(ValueError, match="mask"):
            apply_(model, {"0.weight": good, name: mask})
        assert torch.equal(first.weight, before)


def test_a_mask_that_does_not_fit_is_named() -> None:
    names = dict(nn.Linear(2, 3).named_parameters())
    check_mask("weight", torch.ones(3, 2, dtype=torch.bool), names)
    with pytest.raises(ValueError, match=r"'wait' fits no parameter; .*\['bias', 'weight'\]"):
        check_mask("wait", torch.ones(3, 2, dtype=torch.bool), names)
    with pytest.raises(
        ValueError, match=r"bool of shape \(3, 2\), not torch.bool of shape \(2, 3\)"
    ):
        check_mask("weight", torch.ones(2, 3, dtype=torch.bool), names)
    with pytest.raises(ValueError, match=r"not torch.float32"):
        check_mask("weight", torch.ones(3, 2), names)


def test_sparsity_by_hand() -> None:
    assert sparsity_of({}) == 0.0
    assert sparsity_of({"a": torch.ones(0, 3, dtype=torch.bool)}) == 0.0
    one_of_ten = torch.arange(10) > 0
    assert sparsity_of({"a": one_of_ten}) == 0.1
    assert sparsity_of({"a": one_of_ten, "b": torch.zeros(2, 5, dtype=torch.bool)}) == 11 / 20
    assert sparsity_of({"a": torch.zeros(3, dtype=torch.bool)}) == 1.0


def test_emptied_names_parameters_of_which_nothing_stays() -> None:
    some, none = torch.tensor([True, False]), torch.tensor([False, False])
    assert emptied({"a": some, "b": none, "c": torch.ones(0, dtype=torch.bool)}) == ["b"]


@pytest.mark.parametrize("groups", ["", "none", [], [0.5], torch.ones(3), None])
def test_what_is_no_list_of_groups_is_refused(groups: Any) -> None:
    with pytest.raises(TypeError, match="groups must be a list of Group, such as structures"):
        select(groups, 0.5)


@pytest.mark.parametrize("sparsity", [torch.ones(3), np.ones(2), "0.5x", 1j, [0.5]])
def test_what_is_no_single_sparsity_is_refused(sparsity: Any) -> None:
    with pytest.raises(ValueError, match=r"sparsity is the fraction .* in \[0, 1\), not "):
        check_sparsity(sparsity)
