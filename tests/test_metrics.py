import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swdlib.comparing import in_eval
from swdlib.metrics import (
    bytes_on_disk,
    count_correct,
    count_macs,
    latencies,
    latency,
    parameters,
)
from swdlib.runs.records import HISTOGRAM_BINS, HISTOGRAM_RANGE
from swdlib.runs.training import weight_histogram

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


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()
    with pytest.raises(RuntimeError, match="inside"), in_eval(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == [True, True, False, True]


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_by_hand(batch: int) -> None:
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        norm,
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 10),
    )
    an_image = 3 * 4 * 9 * 8 * 8 + (4 // 2) * 6 * 9 * 4 * 4 + 6 * 4 * 4 * 10
    assert count_macs(model, torch.randn(batch, 3, 8, 8)) == batch * an_image
    assert model.training and norm.state_dict()["running_mean"].tolist() == [0.0] * 4


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_the_macs_of_attention_are_counted() -> None:
    # Each of 5 tokens against 5, in 8 dimensions: once for the scores, once for the mean.
    products = 2 * 5 * 5 * 8
    assert count_macs(Attention(), torch.randn(2, 1, 5, 8)) == 2 * products
    layer = nn.TransformerEncoderLayer(8, nhead=1, dim_feedforward=16, batch_first=True)
    fused = torch.backends.mha.get_fastpath_enabled()
    linear = 5 * (4 * 8 * 8 + 2 * 8 * 16)
    assert count_macs(layer, torch.randn(1, 5, 8)) == products + linear
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_latency_is_the_median_of_rounds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that only the calls move: warm-up 9, then 1, 5 and 2 seconds.
    now = 0.0
    called: list[str] = []

    def takes(name: str, durations: list[float]) -> Any:
        step = count()

        def call() -> None:
            nonlocal now
            called.append(name)
            now += durations[next(step)]

        return call

    monkeypatch.setattr("time.perf_counter", lambda: now)
    functions = {"a": takes("a", [9, 1, 5, 2]), "b": takes("b", [9, 0.5, 0.25, 0.125])}
    assert latencies(functions, rounds=3, seconds=0.1) == {"a": 2.0, "b": 0.25}
    assert "".join(called) == "ab" * 4
    assert latency(takes("c", [9] + [0.25] * 4 + [0.5] * 2), rounds=2, seconds=1.0) == 0.375


def test_rounds_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="rounds must be a whole number of at least 1, not 0"):
        latency(lambda: None, rounds=0)


def test_bytes_on_disk_are_those_of_the_file() -> None:
    seen: list[Path] = []

    def write(path: Path) -> None:
        seen.append(path)
        path.write_bytes(b"12345")

    assert bytes_on_disk(write) == 5
    assert not seen[0].parent.exists()
