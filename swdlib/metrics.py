"""Metrics: what is measured of a network."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swdlib.masks import Masks
from swdlib.records import HISTOGRAM_BINS, HISTOGRAM_RANGE


def count_correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """How many rows of `logits` (N, classes) have the label among their k largest: a 0-d tensor."""
    k = min(k, logits.shape[1])
    return (logits.topk(k, dim=1).indices == labels.unsqueeze(1)).sum()


def parameters(model: nn.Module, masks: Masks | None = None) -> int:
    """The number of parameters, less those that `masks` removes."""
    removed = sum(int((~mask).sum()) for mask in (masks or {}).values())
    return sum(p.numel() for p in model.parameters()) - removed


@torch.no_grad()
def weight_histogram(tensors: Iterable[Tensor]) -> dict[str, list[int] | int]:
    """Counts of log10 |w| in equal bins over HISTOGRAM_RANGE, and of zeros beside them.

    Values beyond the range are counted in the bin at its end.
    """
    low, high = HISTOGRAM_RANGE
    flat = torch.cat([torch.zeros(0), *(t.detach().flatten().cpu() for t in tensors)])
    sizes = flat[flat != 0].abs().to(torch.promote_types(flat.dtype, torch.float32))
    share = ((sizes.log10() - low) / (high - low)).clamp(0.0, 1.0)
    bins = (share * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
    counts = torch.bincount(bins, minlength=HISTOGRAM_BINS)
    return {"zeros": int((flat == 0).sum()), "counts": counts.tolist()}


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """A context with the model in evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one pass of `example`, in evaluation mode.

    Counted are convolutions and matrix products, those of attention among them, which is half of
    the floating-point operations that torch counts; a zero weight counts like any other.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    # What a fused kernel computes is hidden from the counter.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with in_eval(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return count.get_total_flops() // 2


def latencies(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 5, seconds: float = 0.02
) -> dict[str, float]:
    """Seconds that a call of each function takes: the median of `rounds` rounds.

    A round calls each function in turn, for `seconds` or once if that takes longer, so that a
    moment in which the machine is slow does not meet one function alone. Each is called once
    before, uncounted. A GPU is waited for.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    for function in functions.values():
        _seconds_a_call(function, 0.0)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            taken[name].append(_seconds_a_call(function, seconds))
    return {name: statistics.median(times) for name, times in taken.items()}


def latency(function: Callable[[], object], *, rounds: int = 5, seconds: float = 0.02) -> float:
    """Seconds that a call takes: `latencies` of one function."""
    return latencies({"": function}, rounds=rounds, seconds=seconds)[""]


def _seconds_a_call(function: Callable[[], object], seconds: float) -> float:
    calls, elapsed, start = 0, 0.0, time.perf_counter()
    while not calls or elapsed < seconds:
        function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        calls, elapsed = calls + 1, time.perf_counter() - start
    return elapsed / calls


def bytes_on_disk(write: Callable[[Path], object]) -> int:
    """The size of the file that `write` leaves at the path it is given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        write(path)
        return path.stat().st_size
