"""Allocations: by hand, and exact at any sparsity."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from swdlib.masks import (
    ALLOCATIONS,
    Allocation,
    erk,
    lamp,
    prunable,
    select,
    sparsity_of,
    together,
    uniform,
)
from swdlib.structures import Group


def group(name: str, values: Tensor) -> Group:
    return Group(name, nn.Parameter(values))


def kept(groups: list[Group], sparsity: float, allocation: str) -> dict[str, int]:
    masks = select(groups, sparsity, allocation=ALLOCATIONS[allocation])
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_a_layer_of_small_weights_loses_more_only_if_all_rank_together() -> None:
    small = group("small", torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    large = group("large", torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert kept([small, large], 0.5, "global") == {"small": 0, "large": 4}
    assert kept([small, large], 0.5, "uniform") == {"small": 2, "large": 2}
    masks = select([small, large], 0.5, allocation=uniform)
    assert masks["small"].tolist() == [[False, False, True, True]]


def test_erk_by_hand() -> None:
    # (10 + 10) / 100 = 0.2 and (20 + 20) / 400 = 0.1: the first is to be twice as dense.
    first, second = group("first", torch.rand(10, 10)), group("second", torch.rand(20, 20))
    assert kept([first, second], 0.88, "erk") == {"first": 20, "second": 40}
    # At 0.4 the first would have to be 1.0 dense; beyond, it stays whole and the second fills up.
    assert kept([first, second], 0.4, "erk") == {"first": 100, "second": 200}
    assert kept([first, second], 0.2, "erk") == {"first": 100, "second": 300}


def test_lamp_by_hand() -> None:
    # 1 / (1 + 4 + 4), 4 / (4 + 4) and 4 / 4; in the other layer 1e-4 / (1e-4 + 9e-4) and 1.
    first = group("first", torch.tensor([[2.0, -1.0, 2.0]]))
    second = group("second", torch.tensor([[0.01, 0.03]]))
    found = lamp([first, second], [g.parameter.detach().abs().flatten() for g in (first, second)])
    assert found[0].tolist() == pytest.approx([1 / 2, 1 / 9, 1])
    assert found[1].tolist() == pytest.approx([0.1, 1])
    masks = select([first, second], 0.4, allocation=lamp)
    assert masks["first"].tolist() == [[True, False, True]]
    assert masks["second"].tolist() == [[False, True]]
    nothing = lamp([first], [torch.zeros(3)])
    assert nothing[0].tolist() == [0, 0, 0]


def test_lamp_refuses_scores_below_zero() -> None:
    one = group("one", torch.tensor([[1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"lamp .* must be 0 or more, and in one the lowest is -2"):
        select([one], 0.5, lambda parameter: -parameter.detach(), lamp)


@given(
    st.sampled_from(sorted(ALLOCATIONS)),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    st.floats(0.0, 0.999),
)
def test_every_allocation_is_exact(
    name: str, shapes: list[tuple[int, int]], sparsity: float
) -> None:
    torch.manual_seed(0)
    groups = [group(str(i), torch.randn(shape)) for i, shape in enumerate(shapes)]
    total = prunable(groups)
    masks = select(groups, sparsity, allocation=ALLOCATIONS[name])
    assert sparsity_of(masks) == pytest.approx(round(sparsity * total) / total, abs=1e-12)
    for g in groups:  # within a layer the largest stay
        mask, sizes = masks[g.name], g.parameter.detach().abs()
        if mask.any() and not mask.all():
            assert sizes[~mask].max() <= sizes[mask].min()


@example([2, 2, 2, 2, 6], 0.875)  # 2 of the 6 stay; their equal share is 6/7
@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), st.floats(0.0, 0.999))
def test_uniform_differs_by_rounding_alone_from_an_equal_share(
    sizes: list[int], sparsity: float
) -> None:
    torch.manual_seed(0)
    groups = [group(str(i), torch.randn(1, size)) for i, size in enumerate(sizes)]
    left = kept(groups, sparsity, "uniform")
    total = sum(sizes)
    exact = 1 - round(sparsity * total) / total
    # Each layer rounds at one threshold, by a half at most; so does the threshold, for all of them.
    for i, size in enumerate(sizes):
        assert abs(left[str(i)] - exact * size) <= (1 + len(sizes) * size / total) / 2 + 1e-9


@pytest.mark.parametrize("allocation", [together, uniform, erk])
def test_what_scores_minus_infinity_goes_first(allocation: Allocation) -> None:
    def logarithm(parameter: Tensor) -> Tensor:
        return parameter.abs().log()

    values = torch.tensor([[0.0, 3.0, 0.0, 2.0]])
    masks = select([group("one", values)], 0.5, logarithm, allocation)
    assert masks["one"].tolist() == [[False, True, False, True]]
