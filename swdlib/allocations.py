"""Allocations: how a network's sparsity is divided among its layers.

An allocation turns the scores of each group into ranks that can be compared across groups; what
ranks lowest is removed first. So each allocation is exact at any sparsity, for every structure.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swdlib.structures import Group

Allocation = Callable[[Sequence[Group], Sequence[Tensor]], list[Tensor]]


def together(groups: Sequence[Group], scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores are compared as they are: a layer of small weights loses more (global pruning)."""
    return list(scores)


def uniform(groups: Sequence[Group], scores: Sequence[Tensor]) -> list[Tensor]:
    """Each group loses the same share of its units."""
    return [_better(s) for s in scores]


def erk(groups: Sequence[Group], scores: Sequence[Tensor]) -> list[Tensor]:
    """Each keeps a share proportional to (sum of its dimensions) / (their product), at most all.

    Small layers stay denser: the Erdos-Renyi kernel (Evci et al. 2020, arXiv 1911.11134).
    """
    # A unit with a share b of its group above it stays while b < density; all densities grow alike.
    return [
        (_better(s) - 1.0) / (sum(g.parameter.shape) / g.parameter.numel())
        for g, s in zip(groups, scores, strict=True)
    ]


def _better(scores: Tensor) -> Tensor:
    """The share of the group's units that rank lower, in (0, 1)."""
    rank = torch.empty_like(scores, dtype=torch.float64)
    places = torch.arange(len(scores), dtype=torch.float64, device=scores.device)
    rank[scores.argsort(stable=True)] = (places + 0.5) / len(scores)
    return rank


ALLOCATIONS: dict[str, Allocation] = {"global": together, "uniform": uniform, "erk": erk}
