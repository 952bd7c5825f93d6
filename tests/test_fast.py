"""The fast selection equals sorting, bit for bit, on hostile weights; the fast update, a mask's."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swdlib import fast
from swdlib.fast import (
    CHUNK,
    Lowest,
    Threshold,
    add_,
    are_alike,
    count_below,
    divide_,
    lowest_on_gpu,
    radix_select,
)
from swdlib.masks import lowest_by_sort

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Ties, zeros of both signs, denormals of each dtype, and values that differ by one rounding.
HOSTILE = (0.0, -0.0, 5e-324, 1e-310, 1e-45, 1e-40, 6e-8, 1.0, -1.0, 1.0 + 1e-7, 1e-15, 6e4, 3e38)
SHAPES = ((4,), (0,), (2, 3), (0, 3), (2, 3, 2, 2), (1, 1), (3, 1, 2, 1))
LAYOUTS = ("contiguous", "channels last", "transposed", "with gaps")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same tensor, otherwise in memory."""
    if layout == "channels last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.mT.contiguous().mT
    if layout == "with gaps":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    return tensor


@st.composite
def steps(draw: st.DrawFn) -> list[list[Tensor]]:
    """The weights of some tensors, at some steps."""
    dtype = draw(st.sampled_from(DTYPES))
    limit = min(torch.finfo(dtype).max, 3e38)
    kind = st.tuples(st.sampled_from(SHAPES), st.sampled_from(LAYOUTS))
    kinds = draw(st.lists(kind, min_size=1, max_size=4))
    values = draw(
        st.lists(st.sampled_from(HOSTILE) | st.floats(-2.0, 2.0, width=16), min_size=1, max_size=9)
    )
    dice = random.Random(draw(st.integers(0, 999)))

    def tensor(shape: tuple[int, ...], layout: str) -> Tensor:
        numbers = dice.choices(values, k=math.prod(shape))
        flat = torch.tensor(numbers, dtype=torch.float64).clamp(-limit, limit)
        return laid_out(flat.to(dtype).reshape(shape), layout)

    return [[tensor(*kind) for kind in kinds] for _ in range(draw(st.integers(1, 3)))]


def masks_of(found: Lowest | None, tensors: list[Tensor]) -> list[Tensor]:
    assert found is not None
    chosen = [found.selected(i, tensor) for i, tensor in enumerate(tensors)]
    return [
        c if isinstance(c, Tensor) else t.abs().double() < c
        for c, t in zip(chosen, tensors, strict=True)
    ]


def assert_as_sorted(masks: list[Tensor], tensors: list[Tensor], count: int) -> None:
    scores = [tensor.abs().flatten() for tensor in tensors]
    for mask, expected in zip(masks, lowest_by_sort(scores, [1] * len(scores), count), strict=True):
        assert mask.dtype == torch.bool
        assert torch.equal(mask.flatten(), expected)
    assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(1, 99))
def test_selection_equals_sorting_at_every_step(case: list[list[Tensor]], any_count: int) -> None:
    threshold = Threshold()
    total = sum(tensor.numel() for tensor in case[0])
    for tensors in case:
        for count in {1, total // 2, any_count, total} & set(range(1, total + 1)):
            assert_as_sorted(masks_of(threshold.find(tensors, count), tensors), tensors, count)
            assert_as_sorted(lowest_on_gpu(tensors, count), tensors, count)


def trained(dtype: torch.dtype, calm: float = 1e-3) -> list[list[Tensor]]:
    """Weights at eight steps; before the fourth they jump."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((150, 200), (40, 30, 3, 3), (0, 3), (7,))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    found = []
    for step in range(8):
        move = 3.0 if step == 3 else calm
        tensors = [t + move * torch.randn(t.shape, generator=generator) for t in tensors]
        found.append([laid_out(t, "channels last").to(dtype) for t in tensors])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_equals_sorting_while_weights_move_and_jump(dtype: torch.dtype) -> None:
    threshold = Threshold()
    for tensors in trained(dtype):
        count = round(0.9 * sum(tensor.numel() for tensor in tensors))
        assert_as_sorted(masks_of(threshold.find(tensors, count), tensors), tensors, count)


def test_a_usual_step_reads_once_and_a_jump_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[float, float]] = []

    def counted(tensors: list[Tensor], low: float, high: float) -> object:
        reads.append((low, high))
        return count_below(tensors, low, high)

    monkeypatch.setattr(fast, "count_below", counted)
    threshold, numbers = Threshold(), []
    for tensors in trained(torch.float32):
        threshold.find(tensors, 35_000)
        numbers.append(len(reads))
        reads.clear()
    assert numbers == [1, 1, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("zeros", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_zeros(zeros: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "CHUNK", 1000)
    weights = torch.randn(90_000).masked_fill(torch.rand(90_000) < zeros, 0.0).to(dtype)
    tensors = [part.reshape(300, -1) for part in weights.split(30_000)]
    for count in (1, 20_000, 45_000, 81_000, 90_000):
        # More than 2 ** 16 ties are not ranked, but found by the radix select.
        assert_as_sorted(masks_of(Threshold().find(tensors, count), tensors), tensors, count)


@pytest.mark.parametrize("band", [(0.0, 0.0), (3.0, 3.0), (1.0, 1.0), (2.0, 1.0), (-1.0, 9.0)])
def test_a_sample_that_misleads_costs_no_exactness(
    band: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "_sample", lambda tensors, count: band)
    tensors = [torch.tensor([3.0, -1.0, 2.0]), torch.tensor([1.0, 0.0])]
    for count in range(1, 6):
        assert_as_sorted(masks_of(Threshold().find(tensors, count), tensors), tensors, count)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_found(bad: float, dtype: torch.dtype) -> None:
    good = [torch.rand(5, 5).to(dtype), torch.rand(4).to(dtype)]
    threshold = Threshold()
    assert threshold.find(good, 3) is not None
    for spoilt in ([good[0], torch.full_like(good[1], bad)], [good[0] + bad, good[1]]):
        assert threshold.find(spoilt, 3) is None
        assert Threshold().find(spoilt, 29) is None


def test_of_equal_magnitudes_the_first_go_first_by_hand() -> None:
    tensors = [torch.tensor([[2.0, 1.0]]), torch.tensor([-1.0, 1.0, 5.0]), torch.tensor([1.0])]
    found = Threshold().find(tensors, 2)
    assert [mask.tolist() for mask in masks_of(found, tensors)] == [
        *([[False, True]], [True, False, False], [False])
    ]


def test_what_is_alike() -> None:
    one = torch.ones(2)
    assert are_alike([one, one])
    assert not are_alike([one, one.double()])
    assert not are_alike([one, torch.ones(2, device="meta")])
    assert not are_alike([one.to(torch.complex64)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_radix_select_by_hand(dtype: torch.dtype) -> None:
    numbers = torch.tensor([3.0, -1.0, 0.0, 1.0, -0.0, -2.0]).to(dtype)
    found = [radix_select([numbers[:4], numbers[4:]], count) for count in range(1, 7)]
    assert [(float(value), int(ties)) for value, ties in found] == [
        *((0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2), (2.0, 1), (3.0, 1))
    ]
    assert {value.dtype for value, _ in found} == {dtype}


@pytest.mark.parametrize("digit", [1, 4, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_digits_of_any_size_find_the_same(
    dtype: torch.dtype, digit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "DIGIT", digit)
    torch.manual_seed(0)
    tensors = [(torch.randint(-9, 9, shape) * 1.1).to(dtype) for shape in ((20, 20), (0,), (99,))]
    scores = [tensor.abs().flatten() for tensor in tensors]
    for count in (1, 100, 499):
        masks = lowest_on_gpu(tensors, count)
        expected = lowest_by_sort(scores, [1] * 3, count)
        assert [m.flatten().tolist() for m in masks] == [m.tolist() for m in expected]


def test_count_below_by_hand() -> None:
    tensors = [torch.tensor([[1.0, -2.0], [0.5, -0.0]]), torch.empty(0, 3), torch.tensor([-4.0])]
    below, between, largest = count_below(tensors, 0.5, 2.0)
    assert (below, sorted(between.tolist()), largest) == (1, [0.5, 1.0, 2.0], 4.0)
    assert count_below(tensors[1:2], 0.0, 1.0)[0] == 0
    assert math.isnan(count_below([*tensors, torch.tensor([math.nan])], 0.5, 2.0)[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_magnitudes_of_every_dtype_are_exact(dtype: torch.dtype) -> None:
    numbers = torch.tensor([-1.5, 0.25, -0.0, 3.0]).to(dtype)
    assert fast._magnitudes([numbers, numbers[:1]]).tolist() == [1.5, 0.25, 0.0, 3.0, 1.5]


def test_elements_in_the_order_of_memory_are_no_copy() -> None:
    whole = torch.arange(48.0).reshape(2, 3, 2, 4)
    last = whole.contiguous(memory_format=torch.channels_last)
    for tensor in (whole, last, whole.mT):
        flat = fast._flat(tensor)
        assert flat.data_ptr() == tensor.data_ptr()
        assert flat.sort().values.tolist() == list(range(48))
    assert [len(chunk) for chunk in fast._chunks(whole[..., ::2])] == [24]
    assert fast._chunks(whole[:0]) == []


def test_a_band_that_is_too_full_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "CHUNK", 1 << 13)
    weights = torch.zeros(18, 1 << 13)
    weights[9:] = 1.0
    below, between, largest = count_below([weights], 0.5, 2.0)
    assert (below, len(between), largest) == (9 << 13, 0, 1.0)


def test_small_tensors_are_read_together() -> None:
    sizes = (3, 0, CHUNK, 2, CHUNK + 1, 5)
    batches = fast._batches([torch.zeros(size) for size in sizes])
    lengths = [[len(chunk) for chunk in batch] for batch in batches]
    assert lengths == [[3], [CHUNK], [2], [CHUNK], [1, 5]]


def in_layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    """One tensor in several layouts."""
    whole = torch.linspace(-1.0, 1.0, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)
    return {
        "contiguous": whole.clone(),
        "channels last": whole.contiguous(memory_format=torch.channels_last),
        "with gaps": whole.repeat_interleave(2, -1)[..., ::2],
        "empty": whole[:0].clone(),
        "scalar": whole[0, 0, 0, 0].clone(),
    }


def test_updates_by_hand() -> None:
    weight, gradient = torch.tensor([1.0, -2.0, 3.0, -0.0]), torch.ones(4)
    add_(gradient, weight, 2.0, 0.5)
    assert gradient.tolist() == [1.5, 1.0, 1.0, 1.0]
    add_(gradient, weight, torch.tensor([False, True, False, False]), 0.5)
    assert gradient.tolist() == [1.5, 0.0, 1.0, 1.0]
    divide_(weight, math.nextafter(2.0, 3.0) + 1e-6, 4.0)
    assert weight.tolist() == [0.25, -0.5, 3.0, 0.0]
    divide_(weight, torch.tensor([False, False, True, False]), 2.0)
    assert weight.tolist() == [0.25, -0.5, 1.5, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", in_layouts(torch.float32))
@pytest.mark.parametrize("gradient_layout", ["the weight's", "contiguous"])
def test_a_bound_does_what_its_mask_does(
    layout: str, gradient_layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "CHUNK", 16)
    weight = in_layouts(dtype)[layout]
    for bound in (0.0, 0.25, float(weight.abs().max()) if weight.numel() else 1.0, 2.0):
        mask = weight.abs().double() < bound
        first = torch.full_like(weight, 0.5)
        if gradient_layout == "contiguous":
            first = first.contiguous()
        second = first.clone()
        add_(first, weight, bound, 0.125)
        add_(second, weight, mask, 0.125)
        torch.testing.assert_close(first, second, rtol=torch.finfo(dtype).eps, atol=0)
        assert torch.equal(first == 0.5, second == 0.5)
        shrunk = weight.clone()
        divide_(shrunk, bound, 3.0)
        assert torch.equal(shrunk, torch.where(mask, weight / 3.0, weight))
        masked = weight.clone()
        divide_(masked, mask, 3.0)
        assert torch.equal(masked, shrunk)
