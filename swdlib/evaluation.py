"""Evaluation: loss and accuracy over all test images."""

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from swdlib.metrics import count_correct, in_eval

# Images evaluated at a time: a CPU is half as fast once the maps of a layer outgrow its caches.
BATCH = 128

# Batches of training images that batch norm's statistics are measured on.
STATISTICS = 100


class Data(Protocol):
    """What the loop needs of a dataset; batches are the same however often they are drawn."""

    @property
    def device(self) -> torch.device: ...
    def steps(self, batch_size: int, *, world: int = 1) -> int: ...
    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]: ...
    def test_batches(
        self, batch_size: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]: ...


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


@torch.no_grad()
def renewed(
    model: nn.Module, data: Data, *, batches: int = STATISTICS, batch_size: int = BATCH
) -> nn.Module | None:
    """A copy of the model with batch-norm statistics of the weights as they are; None without any.

    Running averages lag behind weights that move. Where a unit's input is constant, as behind units
    that were pruned away, batch norm divides that lag by the root of its epsilon, and a network
    that is sound in training computes nonsense in evaluation. Mean and variance are measured on
    `batches` batches of training images; no weight changes.
    """
    copied = copy.deepcopy(model).eval()
    norms = [m for m in copied.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
        norm.train()
    if not norms:
        return None
    for images, _ in islice(data.train_batches(batch_size, seed=0, epoch=0), batches):
        copied(images)
    if not norms[0].num_batches_tracked:
        raise ValueError("statistics are measured on training images, and the data have none")
    return copied.eval()
