"""Metrics: what is measured of a network."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

from swdlib.comparing import in_eval, unfused
from swdlib.masks import Masks
from swdlib.schedules import check_count

# Images evaluated at a time: a CPU is half as fast once the maps of a layer outgrow its caches.
BATCH = 128

# Batches of training images that recalibrate batch norm.
STATISTICS = 100


class Data(Protocol):
    """What training needs of a dataset: the methods of `data.images.Dataset`.

    Batches are the same however often they are drawn.
    """

    @property
    def device(self) -> torch.device: ...
    @property
    def steps(self) -> Callable[..., int]: ...
    @property
    def train_batches(self) -> Callable[..., Iterator[tuple[Tensor, Tensor]]]: ...
    @property
    def test_batches(self) -> Callable[..., Iterator[tuple[Tensor, Tensor]]]: ...


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    loss: Callable[..., Tensor] = cross_entropy,
    batch_size: int = BATCH,
) -> dict[str, float]:
    """Mean loss, and Top-1 and Top-5 accuracy in percent, over all test images of `data`."""
    model.to(data.device)
    return means(sums_over_test(model, data, loss, batch_size))


@torch.no_grad()
def sums_over_test(
    model: nn.Module, data: Data, loss: Callable[..., Tensor], batch_size: int, **share: int
) -> Tensor:
    """Loss, correct at 1, correct at 5 and images, summed over this process' test images."""
    sums = []
    with in_eval(model):
        for images, labels in data.test_batches(batch_size, **share):
            logits = model(images)
            of_batch = loss(logits, labels, reduction="sum")
            correct = [count_correct(logits, labels, k) for k in (1, 5)]
            count = torch.tensor(len(labels), device=labels.device)
            sums.append(torch.stack([of_batch.float(), *(n.float() for n in [*correct, count])]))
    return torch.stack(sums).sum(0)


def means(sums: Tensor) -> dict[str, float]:
    loss, top1, top5, images = sums.tolist()
    return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}


def recalibrated(
    model: nn.Module, data: Data, *, batches: int = STATISTICS, batch_size: int = BATCH
) -> nn.Module | None:
    """A copy of the model, in evaluation mode, with recalibrated batch norm; None without any.

    Running averages lag behind weights that move. Where the input of a unit is constant, as behind
    units that were pruned away, batch norm divides that lag by the square root of its epsilon, and
    a network that is sound in training computes nonsense in evaluation. Recalibration measures mean
    and variance again on `batches` batches of training images, by `torch.optim.swa_utils.update_bn`
    (hence with dropout as in training); no weight changes. ValueError without training images.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return None
    if not data.steps(batch_size):
        raise ValueError("batch norm is recalibrated on training images, and the data have none")
    copied = copy.deepcopy(model)
    training = data.train_batches(batch_size, seed=0, epoch=0)
    update_bn((images for images, _ in islice(training, batches)), copied)
    return copied.eval()


def count_correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """How many rows of `logits` (N, classes) have the label among their k largest: a 0-d tensor."""
    k = min(k, logits.shape[1])
    return (logits.topk(k, dim=1).indices == labels.unsqueeze(1)).sum()


def parameters(model: nn.Module, masks: Masks | None = None) -> int:
    """The number of parameters, less those that `masks` removes."""
    removed = sum(int((~mask).sum()) for mask in (masks or {}).values())
    return sum(p.numel() for p in model.parameters()) - removed


@torch.no_grad()
def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one pass of `example`, in evaluation mode.

    Counted are convolutions and matrix products, those of attention among them, which is half of
    the floating-point operations that torch counts; a zero weight counts like any other.
    """
    # What a fused kernel computes would be hidden from the counter.
    with in_eval(model), unfused(), FlopCounterMode(display=False) as count:
        model(example)
    return count.get_total_flops() // 2


def latencies(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 5, seconds: float = 0.02
) -> dict[str, float]:
    """Seconds that a call of each function takes: the median of `rounds` rounds.

    A round calls each function in turn, for `seconds` or once if that takes longer, so that a
    moment in which the machine is slow does not meet one function alone. Each is called once
    before, uncounted. A GPU is waited for.
    """
    check_count("rounds", rounds)
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
