"""Selection by magnitude: equal to sorting, bit for bit, on hostile weights and after any past."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swdlib import fast
from swdlib import fast as selection
from swdlib.fast import Lowest, Threshold, are_alike, lowest_on_gpu
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
    read = readings.read

    def counted(tensors: list[Tensor], low: float, high: float) -> object:
        reads.append((low, high))
        return read(tensors, low, high)

    monkeypatch.setattr(selection, "read", counted)
    threshold, numbers = Threshold(), []
    for tensors in trained(torch.float32):
        threshold.find(tensors, 35_000)
        numbers.append(len(reads))
        reads.clear()
    assert numbers == [1, 1, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("zeros", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_zeros(zeros: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "PIECE", 1000)
    monkeypatch.setattr(selection, "PIECE", 1000)
    weights = torch.randn(90_000).masked_fill(torch.rand(90_000) < zeros, 0.0).to(dtype)
    tensors = [part.reshape(300, -1) for part in weights.split(30_000)]
    for count in (1, 20_000, 45_000, 81_000, 90_000):
        # Beyond 2 ** 16 weights that tie, they are not ranked but counted by digits.
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


@pytest.mark.slow
def test_compiled_code_selects_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "LEAST", 1 << 10)
    threshold = Threshold()
    threshold.compiled = True
    total = sum(tensor.numel() for tensor in trained(torch.float32, 1e-6)[0])
    read, again = readings.read, []

    def counted(tensors: list[Tensor], low: float, high: float) -> object:
        again.append(sum(tensor.numel() for tensor in tensors))
        return read(tensors, low, high)

    monkeypatch.setattr(readings, "read", counted)
    monkeypatch.setattr(selection, "read", counted)
    for tensors in trained(torch.float32, 1e-6):
        count = round(0.9 * total)
        assert_as_sorted(masks_of(threshold.find(tensors, count), tensors), tensors, count)
    assert max(again) == total
    assert min(again) < total / 4  # the rest was counted by blocks
    tensors[0][3, 3] = math.nan
    assert threshold.find(tensors, count) is None
