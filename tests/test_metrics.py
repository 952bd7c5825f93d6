import math

import pytest
import torch
from torch import nn

from swdlib.metrics import count_correct, parameters, weight_histogram
from swdlib.records import HISTOGRAM_BINS, HISTOGRAM_RANGE

LOGITS = torch.tensor([[3.0, 1.0, 2.0], [0.0, -1.0, -2.0], [5.0, 6.0, 7.0], [1.0, 0.5, 0.0]])
LABELS = torch.tensor([0, 1, 0, 2])


@pytest.mark.parametrize(("k", "correct"), [(1, 1), (2, 2), (3, 4), (5, 4)])
def test_correct_predictions_by_hand(k: int, correct: int) -> None:
    count = count_correct(LOGITS, LABELS, k)
    assert count.shape == () and count.item() == correct


def test_an_empty_batch_has_nothing_correct() -> None:
    assert count_correct(LOGITS[:0], LABELS[:0]).item() == 0


def test_parameters_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False))
    assert parameters(model) == 6 + 2 + 4 + 4
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert parameters(model, {"0.weight": mask}) == 16 - 3
    assert parameters(model, {}) == parameters(model, None) == 16


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert parameters(model) == 9


def bin_of(size: float) -> int:
    low, high = HISTOGRAM_RANGE
    return math.floor((math.log10(size) - low) / (high - low) * HISTOGRAM_BINS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_histogram_by_hand(dtype: torch.dtype) -> None:
    histogram = weight_histogram(
        [
            torch.tensor([[0.0, -0.0], [0.0123, -0.0123]], dtype=dtype),
            torch.tensor([3.0, 1.3e-11, 0.0], dtype=dtype).requires_grad_(),
            torch.empty(0, dtype=dtype),
        ]
    )
    expected = [0] * HISTOGRAM_BINS
    for size in (0.0123, 0.0123, 3.0, 1.3e-11):
        expected[bin_of(size)] += 1
    assert histogram == {"zeros": 3, "counts": expected}


def test_values_beyond_the_range_are_in_the_bins_at_its_ends() -> None:
    single = torch.tensor([1e-30, 1e-13, 11.0, -1e30, math.inf])
    histogram = weight_histogram([single, torch.tensor([1e-300], dtype=torch.float64)])
    assert histogram["zeros"] == 0
    assert isinstance(counts := histogram["counts"], list)
    assert counts[0] == 2 + 1 and counts[-1] == 3
    assert sum(counts) == 6


def test_every_weight_is_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20).bfloat16())
    histogram = weight_histogram(model.parameters())
    assert isinstance(counts := histogram["counts"], list)
    assert len(counts) == HISTOGRAM_BINS and histogram["zeros"] == 0
    assert sum(counts) == parameters(model)
