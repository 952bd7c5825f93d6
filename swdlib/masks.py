"""Masks: which weights stay. Selection is exact to the last weight, ties included.

`Masks` maps names of `named_parameters()` to bool tensors of the parameter's shape; True is kept.
"""

import math
from collections.abc import Sequence
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from swdlib.criteria import Criterion, magnitude
from swdlib.structures import Group, Structure

Masks = dict[str, Tensor]


class NotFinite(ValueError):
    """A weight, score or loss is NaN or infinite: training has diverged."""


def check_sparsity(sparsity: float) -> float:
    """The sparsity as given, if it lies in [0, 1); ValueError otherwise."""
    # NaN fails the comparison as well.
    if not (isinstance(sparsity, SupportsFloat) and 0.0 <= sparsity < 1.0):
        raise ValueError(
            f"sparsity is the fraction of weights removed and must be in [0, 1), not {sparsity!r}"
        )
    return sparsity


def find_groups(model: nn.Module, structure: Structure) -> list[Group]:
    """The structure's groups that hold weights; ValueError if there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    groups = [group for group in structure(model) if group.units]
    if not groups:
        name = getattr(structure, "__name__", repr(structure))
        raise ValueError(
            f"{type(model).__name__} has nothing that structure {name!r} can prune: "
            "it needs trainable parameters (requires_grad) of two or more dimensions"
        )
    return groups


def prunable(groups: Sequence[Group]) -> int:
    """The number of weights that the groups hold."""
    return sum(group.parameter.numel() for group in groups)


def lowest_by_sort(scores: Sequence[Tensor], sizes: Sequence[int], count: int) -> list[Tensor]:
    """The lowest-scored units that together hold at least `count` weights, by a stable sort.

    Every unit of `scores[i]` holds `sizes[i]` weights. Returns a bool tensor a group, True where a
    unit is among the lowest. Of equal scores the first come first.
    """
    flat = torch.cat([s.to(scores[0].device) for s in scores])
    units = torch.tensor([s.numel() for s in scores])
    cost = torch.tensor(sizes).repeat_interleave(units).to(flat.device)
    order = flat.argsort(stable=True)
    held = cost[order].cumsum(0)
    taken = int(torch.searchsorted(held, count)) + 1 if count else 0
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[order[:taken]] = True
    return _split(chosen, scores)


def lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """The `count` lowest scores; equals `lowest_by_sort` for units of one weight, and is faster.

    A sample brackets the threshold, so that only the few scores between need to be ranked (after
    Floyd & Rivest 1975). A sample that misleads costs time, never exactness.
    """
    if not count:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    flat = torch.cat([s.to(scores[0].device) for s in scores])
    low, high = _bracket(flat, count)
    chosen = flat < low
    missing = count - int(chosen.count_nonzero())
    between = ((flat <= high) ^ chosen).nonzero().squeeze(1)
    if not 1 <= missing <= len(between):
        chosen, missing, between = chosen.zero_(), count, torch.arange(len(flat)).to(between)
    values = flat[between]
    threshold = values.kthvalue(missing).values
    chosen[between[values < threshold]] = True
    tied = between[values == threshold]
    chosen[tied[: count - int(chosen.count_nonzero())]] = True
    return _split(chosen, scores)


def _bracket(flat: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two scores between which the `count`-th lowest lies, almost surely: four deviations off."""
    sample = flat[:: math.ceil(len(flat) ** (1 / 3))].sort().values
    last = len(sample) - 1
    share = count / len(flat)
    margin = 4 * math.sqrt(len(sample) * share * (1 - share)) + 1
    low, high = (min(max(round(share * last + m), 0), last) for m in (-margin, margin))
    return sample[low], sample[high]


def _split(chosen: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = chosen.split([s.numel() for s in like])
    return [part.to(s.device) for part, s in zip(parts, like, strict=True)]


def select_units(groups: Sequence[Group], sparsity: float, criterion: Criterion) -> list[Tensor]:
    """The units to remove, a bool tensor of shape (units,) a group, True where one goes.

    `round(sparsity * weights)` weights go; where units hold several, the fewest that reach it.
    NotFinite, a ValueError, if a score is NaN or infinite.
    """
    scores = [group.scores(criterion) for group in groups]
    _require_finite(groups, scores)
    count = round(check_sparsity(sparsity) * prunable(groups))
    if all(group.size == 1 for group in groups):
        return lowest(scores, count)
    return lowest_by_sort(scores, [group.size for group in groups], count)


def _require_finite(groups: Sequence[Group], scores: Sequence[Tensor]) -> None:
    # The maximum is NaN or infinite if any score is: one pass that allocates nothing.
    for group, score in zip(groups, scores, strict=True):
        if not math.isfinite(score.max()):
            raise NotFinite(
                f"{group.name} holds NaN or infinite weights (or scores), so nothing can be "
                "ranked: training has diverged; lower the learning rate or the penalty, or clip "
                "gradients"
            )


@torch.no_grad()
def select(groups: Sequence[Group], sparsity: float, criterion: Criterion = magnitude) -> Masks:
    """Masks that keep the highest scores over all groups and remove the fraction `sparsity`."""
    chosen = select_units(groups, sparsity, criterion)
    return {group.name: group.spread(~units) for group, units in zip(groups, chosen, strict=True)}


@torch.no_grad()
def apply_(model: nn.Module, masks: Masks) -> None:
    """Set the weights that `masks` removes to zero, in place; the rest is not touched."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():  # all before the first is applied: it is done whole or not
        check_mask(name, mask, parameters)
    for name, mask in masks.items():
        # Not a product: that would leave -0.0, and NaN where the weight was infinite.
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)


def check_mask(name: str, mask: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    """ValueError unless `mask` is a bool tensor that fits the parameter `name`."""
    if name not in parameters:
        raise ValueError(f"mask {name!r} fits no parameter; the model has {sorted(parameters)}")
    if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
        raise ValueError(
            f"the mask of {name!r} must be bool of shape {tuple(parameters[name].shape)}, "
            f"not {mask.dtype} of shape {tuple(mask.shape)}"
        )


def sparsity_of(masks: Masks) -> float:
    """The fraction of the masked parameters' weights that is removed, in [0, 1]."""
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    return (total - kept) / total if total else 0.0
