"""Masks: scores, compared across layers, decide which weights stay, exact to the last weight.

`Masks` maps names of `named_parameters()` to bool tensors of the parameter's shape; True is kept.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from swdlib.criteria import Criterion, magnitude
from swdlib.schedules import as_number
from swdlib.structures import Coupled, Group, NofM, Structure, either, is_prunable

Masks = dict[str, Tensor]

# Turns the scores of each group into ranks that compare across groups; the lowest go first. So each
# allocation is exact at any sparsity, for every structure.
Allocation = Callable[[Sequence[Group], Sequence[Tensor]], list[Tensor]]

DIVERGED = "training has diverged; lower the learning rate or the penalty, or clip gradients"


class NotFinite(ValueError):
    """A weight, score or loss is NaN or infinite: training has diverged."""


class Unreachable(ValueError):
    """A sparsity that a structure cannot reach without emptying a layer."""


# Allocations: how layers share the sparsity -------------------------------------------------------


def together(groups: Sequence[Group], scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores compare as they are: a layer of small weights loses more (global pruning)."""
    return list(scores)


def uniform(groups: Sequence[Group], scores: Sequence[Tensor]) -> list[Tensor]:
    """Each group loses the same share of its units."""
    return [_quantile(s) for s in scores]


def erk(groups: Sequence[Group], scores: Sequence[Tensor]) -> list[Tensor]:
    """Each keeps a share proportional to (sum of its dimensions) / (their product), at most all.

    Small layers stay denser: the Erdos-Renyi kernel (Evci et al. 2020, arXiv 1911.11134).
    """
    # A unit at quantile q of its group stays while 1 - q < density, and all densities grow alike.
    return [
        (_quantile(s) - 1.0) / (sum(g.parameter.shape) / g.parameter.numel())
        for g, s in zip(groups, scores, strict=True)
    ]


def lamp(groups: Sequence[Group], scores: Sequence[Tensor]) -> list[Tensor]:
    """The square of a score, divided by the sum of squares of those in its group that are no lower.

    So the last units of a layer outrank all others, and no layer is emptied. Scores must be 0 or
    more, as magnitudes are; ValueError otherwise (Lee et al. 2021, arXiv 2010.07611).
    """
    return [_share_of_survivors(g.name, s) for g, s in zip(groups, scores, strict=True)]


def _share_of_survivors(name: str, scores: Tensor) -> Tensor:
    if not bool((scores >= 0).all()):
        raise ValueError(
            f"allocation lamp compares squares of scores, which must be 0 or more, and in {name} "
            f"the lowest is {float(scores.min()):g}: use a criterion such as magnitude"
        )
    order = scores.argsort(stable=True)
    squares = scores.double()[order].square()
    survivors = squares.flip(0).cumsum(0).flip(0)
    # Without a square above 0 nothing in the group matters, and all of it may go first.
    shares = torch.empty_like(squares)
    shares[order] = (squares / survivors).nan_to_num(0.0)
    return shares


def _quantile(scores: Tensor) -> Tensor:
    """The share of the group's units that rank lower, in (0, 1)."""
    quantiles = torch.empty_like(scores, dtype=torch.float64)
    order = torch.arange(len(scores), dtype=torch.float64, device=scores.device)
    quantiles[scores.argsort(stable=True)] = (order + 0.5) / len(scores)
    return quantiles


ALLOCATIONS: dict[str, Allocation] = {
    **{"global": together, "uniform": uniform, "erk": erk, "lamp": lamp}
}


# From a model to masks ----------------------------------------------------------------------------


def find_groups(model: nn.Module, structure: Structure) -> list[Group]:
    """The structure's groups that hold weights; ValueError if there is none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    name = getattr(structure, "__name__", repr(structure))
    found = structure(model) if callable(structure) else None
    if found is None or callable(found):  # given `filters` in place of `filters(example)`
        raise TypeError(
            "structure must be a function from a model to its groups, such as structures.weights "
            f"or structures.filters(example), not {name!r}"
        )
    groups = [group for group in found if group.units]
    if not groups:
        reason = (
            "it needs trainable parameters (requires_grad) of two or more dimensions, in layers of "
            "its kind"
        )
        if report := getattr(found, "report", None):
            reason = (
                f"{report} What is tied to an output, to a mean over channels or to a computed "
                "weight (as by weight norm) has to stay; structures.weights prunes single weights"
            )
        raise ValueError(
            f"{type(model).__name__} has nothing that structure {name!r} can prune: {reason}"
        )
    return found if len(groups) == len(found) else groups  # with its report


@torch.no_grad()
def select(
    groups: Sequence[Group],
    sparsity: float,
    criterion: Criterion = magnitude,
    allocation: Allocation = together,
) -> Masks:
    """Masks that keep the highest scores over all groups and remove the fraction `sparsity`.

    TypeError if `groups` is no list of groups, such as `structures.weights(model)`.
    """
    if not (isinstance(groups, Sequence) and groups and all(isinstance(g, Group) for g in groups)):
        raise TypeError(
            f"groups must be a list of Group, such as structures.weights(model), not {groups!r:.80}"
        )
    chosen = select_units(groups, sparsity, criterion, allocation)
    return {name: ~gone for name, gone in removed_weights(groups, chosen).items()}


def select_units(
    groups: Sequence[Group],
    sparsity: float,
    criterion: Criterion,
    allocation: Allocation = together,
) -> list[Tensor]:
    """The units to remove: a bool tensor of shape (units,) for each group, True where removed.

    `round(sparsity * weights)` weights are removed, or what the structure's own rule says; where
    units hold several, the fewest units that reach this number. Each layer keeps the best of units
    that span several layers. Scores of -inf are removed first. NotFinite, a ValueError, if a score
    is NaN or +inf; Unreachable if the structure cannot reach the sparsity.
    """
    scores = [group.scores(criterion) for group in groups]
    for group, score in zip(groups, scores, strict=True):
        if not float(score.max()) < math.inf:  # NaN fails the comparison as well
            raise NotFinite(
                f"{group.name} holds NaN or infinite weights (or scores), so nothing can be "
                f"ranked: {DIVERGED}"
            )
    ranks = allocation(groups, scores)
    ranks = [group.protect(rank) for group, rank in zip(groups, ranks, strict=True)]
    count = round(check_sparsity(sparsity) * prunable(groups))
    coupled = [group for group in groups if isinstance(group, Coupled)]
    if groups[0].rule:
        chosen = groups[0].rule(groups, ranks, sparsity)
    elif coupled:
        chosen = lowest_coupled(coupled, ranks, count)
    elif all(group.units == group.parameter.numel() for group in groups):  # single weights
        chosen = lowest(ranks, count)
    else:
        chosen = lowest_by_sort(ranks, [group.sizes() for group in groups], count)
    if any(isinstance(group, NofM | Coupled) for group in groups):
        _require_reached(groups, ranks, chosen, sparsity)
    return chosen


def removed_weights(groups: Sequence[Group], chosen: Sequence[Tensor]) -> Masks:
    """The weights that leave with the units `chosen`: True where removed, for all that is counted.

    A mask may be expanded from a smaller tensor, so do not write to it.
    """
    gone: Masks = {}
    for group, units in zip(groups, chosen, strict=True):
        for name, slices in group.removed(units).items():
            gone[name] = either(gone[name], slices) if name in gone else slices
    counted = parameters_of(groups)
    nothing = {n: torch.zeros((), dtype=torch.bool, device=p.device) for n, p in counted.items()}
    return {n: gone.get(n, nothing[n]).expand(p.shape) for n, p in counted.items()}


@torch.no_grad()
def apply_(model: nn.Module, masks: Masks) -> None:
    """Set the weights that `masks` removes to zero, in place; ValueError if a mask does not fit."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():  # all before the first is applied: it is done whole or not
        check_mask(name, mask, parameters)
    for name, mask in masks.items():
        # Not a product: that would leave -0.0, and NaN where the weight was infinite.
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)


def sparsity_of(masks: Masks) -> float:
    """The fraction of the masked parameters' weights that is removed, in [0, 1]."""
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    return (total - kept) / total if total else 0.0


@torch.no_grad()
def kept(model: nn.Module, masks: Masks | None = None) -> dict[str, int]:
    """What is not zero once `masks` are applied: counts of weights, and of all parameters.

    `kept_weights` are those of parameters of two or more dimensions that are trained.
    """
    counts = {"kept_weights": 0, "kept_parameters": 0}
    for name, parameter in model.named_parameters():
        stays = parameter != 0
        if masks and name in masks:
            stays = stays & masks[name]
        count = int(stays.sum())
        counts["kept_parameters"] += count
        counts["kept_weights"] += count if is_prunable(parameter) else 0
    return counts


def emptied(masks: Masks) -> list[str]:
    """The names of the parameters that `masks` remove whole, so that the layer passes nothing on.

    Pruning single weights may do that, and beside a residual connection it does no harm.
    """
    return [name for name, mask in masks.items() if mask.numel() and not mask.any()]


# What groups count --------------------------------------------------------------------------------


def parameters_of(groups: Sequence[Group]) -> dict[str, nn.Parameter]:
    """The parameters that the groups count, by name."""
    return {name: p for group in groups for name, p in group.parameters.items()}


def prunable(groups: Sequence[Group]) -> int:
    """The number of weights that the groups count."""
    return sum(parameter.numel() for parameter in parameters_of(groups).values())


def are_single(groups: Sequence[Group]) -> bool:
    """Whether each unit is a single weight that can be removed whatever happens to the others."""
    return all(type(group) is Group and group.size == 1 for group in groups)


# The lowest ranks. Of ties the first are selected -------------------------------------------------


def lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """The `count` lowest of all scores: a bool tensor for each of `scores`, True at the lowest."""
    flat = torch.cat([s.to(scores[0].device) for s in scores])
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    if count:
        threshold = flat.kthvalue(count).values
        chosen = flat < threshold
        ties = (flat == threshold).nonzero().squeeze(1)
        chosen[ties[: count - int(chosen.count_nonzero())]] = True
    return _split(chosen, scores)


def lowest_by_sort(
    scores: Sequence[Tensor], sizes: Sequence[Tensor | int], count: int
) -> list[Tensor]:
    """As `lowest`, of units that hold several weights: the fewest that hold `count` in all.

    Unit j of `scores[i]` holds `sizes[i][j]` weights.
    """
    flat = torch.cat([s.to(scores[0].device) for s in scores])
    held = [torch.as_tensor(n).expand(len(s)) for s, n in zip(scores, sizes, strict=True)]
    order = flat.argsort(stable=True)
    reached = torch.cat(held).to(flat.device)[order].cumsum(0)
    fewest = int(torch.searchsorted(reached, count)) + 1 if count else 0
    return _first(order, fewest, scores)


def lowest_coupled(groups: Sequence[Coupled], scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """As `lowest`, of coupled units: the fewest that make the network `count` parameters smaller.

    Two units may share a slice of a parameter, so their sizes do not add up; hence the bisection.
    """
    flat = torch.cat([s.to(scores[0].device) for s in scores])
    order = flat.argsort(stable=True)
    owner = np.repeat(np.arange(len(groups)), [len(s) for s in scores])[order.cpu().numpy()]
    parameters_left = _size_of_network(groups)
    goal = parameters_left(np.zeros(len(groups), dtype=np.int64)) - count
    fewest, most = 0, len(order)
    while fewest < most:
        middle = (fewest + most) // 2
        if parameters_left(np.bincount(owner[:middle], minlength=len(groups))) > goal:
            fewest = middle + 1
        else:
            most = middle
    return _first(order, fewest, scores)


def _size_of_network(groups: Sequence[Coupled]) -> Callable[[np.ndarray], int]:
    """A function from the number of units removed of each group to the parameters that remain."""
    network = groups[0].parameters
    number = {name: i for i, name in enumerate(network)}
    rows = {key: i for i, key in enumerate({key: None for g in groups for key in g.slices})}
    # A row for each cut dimension of a parameter, a column for each group: slices a unit owns.
    owned = np.zeros((len(rows), len(groups)), dtype=np.int64)
    for column, group in enumerate(groups):
        for key, slices in group.slices.items():
            owned[rows[key], column] = slices
    lengths = np.array([network[name].shape[dim] for name, dim in rows])
    parameter = np.array([number[name] for name, _ in rows])
    uncut = np.array([p.numel() for p in network.values()])  # product of the other dimensions
    np.floor_divide.at(uncut, parameter, lengths)

    def parameters_left(removed: np.ndarray) -> int:
        sizes = uncut.copy()
        np.multiply.at(sizes, parameter, lengths - owned @ removed)
        return int(sizes.sum())

    return parameters_left


def _first(order: Tensor, count: int, scores: Sequence[Tensor]) -> list[Tensor]:
    chosen = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    chosen[order[:count]] = True
    return _split(chosen, scores)


def _split(chosen: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = chosen.split([s.numel() for s in like])
    return [part.to(s.device) for part, s in zip(parts, like, strict=True)]


# Checks -------------------------------------------------------------------------------------------


def check_sparsity(sparsity: float) -> float:
    """The sparsity as a float, if it lies in [0, 1); ValueError otherwise."""
    value = as_number(sparsity)  # in double precision: counts must be exact
    if not 0.0 <= value < 1.0:  # NaN fails the comparison as well
        raise ValueError(
            f"sparsity is the fraction of weights removed and must be in [0, 1), not {sparsity!r}"
        )
    return value


def check_reachable(groups: Sequence[Group], sparsity: float, allocation: Allocation) -> None:
    """Unreachable, as `select_units` would raise: what can be reached depends on no score."""
    if not are_single(groups):
        select_units(groups, sparsity, magnitude, allocation)


def _require_reached(
    groups: Sequence[Group], ranks: Sequence[Tensor], chosen: Sequence[Tensor], sparsity: float
) -> None:
    """Unreachable if a unit was chosen that has to stay."""
    device = ranks[0].device
    every, taken = (torch.cat([part.to(device) for part in parts]) for parts in (ranks, chosen))
    if not every.masked_fill(~taken, 0.0).max().isposinf():  # all layers at once: it is fast
        return
    names = [
        group.name
        for group, rank, units in zip(groups, ranks, chosen, strict=True)
        if rank[units].isposinf().any()
    ]
    removed = removed_weights(groups, [~rank.isposinf() for rank in ranks])
    most = sum(int(gone.sum()) for gone in removed.values()) / prunable(groups)
    harm = "empty" if isinstance(groups[0], Coupled) else "break the pattern of"
    raise Unreachable(
        f"sparsity {sparsity:g} would {harm} {', '.join(names[:3])}"
        f"{' and others' if len(names) > 3 else ''}: this structure can remove at most "
        f"{math.floor(1e6 * most) / 1e6:g} of the weights here"
    )


def check_mask(name: str, mask: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    """ValueError unless `mask` is a bool tensor that fits the parameter `name`."""
    if name not in parameters:
        raise ValueError(f"mask {name!r} fits no parameter; the model has {sorted(parameters)}")
    if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
        raise ValueError(
            f"the mask of {name!r} must be bool of shape {tuple(parameters[name].shape)}, "
            f"not {mask.dtype} of shape {tuple(mask.shape)}"
        )


def fitted(masks: Masks, parameters: dict[str, nn.Parameter]) -> Masks:
    """Copies of masks on their parameters' devices; ValueError if one does not fit."""
    for name, mask in masks.items():
        check_mask(name, mask, parameters)
    return {name: mask.to(parameters[name].device, copy=True) for name, mask in masks.items()}
