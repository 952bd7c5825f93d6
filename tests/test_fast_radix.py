"""Radix select: by hand, and equal to sorting where much is equal (see also test_selection.py)."""

import pytest
import torch

from swdlib import fast as radix
from swdlib.fast import lowest_on_gpu, rank_by_digits
from swdlib.masks import lowest_by_sort

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_by_digits(dtype: torch.dtype) -> None:
    numbers = torch.tensor([3.0, -1.0, 0.0, 1.0, -0.0, -2.0]).to(dtype)
    found = [rank_by_digits([numbers[:4], numbers[4:]], count) for count in range(1, 7)]
    assert [(float(value), int(taken)) for value, taken in found] == [
        *((0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2), (2.0, 1), (3.0, 1))
    ]
    assert {value.dtype for value, _ in found} == {dtype}


@pytest.mark.parametrize("digit", [1, 4, 7, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_digits_of_any_size_find_the_same(
    dtype: torch.dtype, digit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(radix, "DIGIT", digit)
    torch.manual_seed(0)
    tensors = [(torch.randint(-9, 9, shape) * 1.1).to(dtype) for shape in ((20, 20), (0,), (99,))]
    scores = [tensor.abs().flatten() for tensor in tensors]
    for count in (1, 100, 499):
        masks = lowest_on_gpu(tensors, count)
        expected = lowest_by_sort(scores, [1] * 3, count)
        assert [m.flatten().tolist() for m in masks] == [m.tolist() for m in expected]
