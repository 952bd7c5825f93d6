"""Metrics: what is measured of a network."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

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
    flat = torch.cat([t.detach().flatten().cpu() for t in tensors])
    sizes = flat[flat != 0].abs().to(torch.promote_types(flat.dtype, torch.float32))
    share = ((sizes.log10() - low) / (high - low)).clamp(0.0, 1.0)
    bins = (share * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
    counts = torch.bincount(bins, minlength=HISTOGRAM_BINS)
    return {"zeros": int((flat == 0).sum()), "counts": counts.tolist()}
