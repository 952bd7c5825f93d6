"""Readings of weights: by hand, and piece by piece (see also test_selection.py)."""

import math

import pytest
import torch

from swdlib import fast
from swdlib.fast import PIECE, flattened, pieces_of, read, sizes_of


def test_by_hand() -> None:
    tensors = [torch.tensor([[1.0, -2.0], [0.5, -0.0]]), torch.empty(0, 3), torch.tensor([-4.0])]
    below, between, largest = read(tensors, 0.5, 2.0)
    assert (below, sorted(between.tolist()), largest) == (1, [0.5, 1.0, 2.0], 4.0)
    assert read(tensors[1:2], 0.0, 1.0)[0] == 0
    assert math.isnan(read([*tensors, torch.tensor([math.nan])], 0.5, 2.0)[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_magnitudes_of_every_dtype_are_exact(dtype: torch.dtype) -> None:
    numbers = torch.tensor([-1.5, 0.25, -0.0, 3.0]).to(dtype)
    assert sizes_of([numbers, numbers[:1]]).tolist() == [1.5, 0.25, 0.0, 3.0, 1.5]


def test_elements_in_the_order_of_memory_are_no_copy() -> None:
    whole = torch.arange(48.0).reshape(2, 3, 2, 4)
    last = whole.contiguous(memory_format=torch.channels_last)
    for tensor in (whole, last, whole.mT):
        flat = flattened(tensor)
        assert flat.data_ptr() == tensor.data_ptr()
        assert flat.sort().values.tolist() == list(range(48))
    assert [len(piece) for piece in pieces_of(whole[..., ::2])] == [24]
    assert pieces_of(whole[:0]) == []


def test_a_band_that_is_too_full_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "PIECE", 1 << 13)
    weights = torch.zeros(18, 1 << 13)
    weights[9:] = 1.0
    below, between, largest = read([weights], 0.5, 2.0)
    assert (below, len(between), largest) == (9 << 13, 0, 1.0)


def test_small_tensors_are_read_together() -> None:
    sizes = (3, 0, PIECE, 2, PIECE + 1, 5)
    runs = readings._runs([torch.zeros(size) for size in sizes])
    lengths = [[len(piece) for piece in run] for run in runs]
    assert lengths == [[3], [PIECE], [2], [PIECE], [1, 5]]
