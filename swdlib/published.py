"""The published system where it differs from the rest: the authors' structures and references.

All as in the authors' code beside arXiv 2011.10520 (HugoTessier-lab/SWD), its accidents included;
their networks are `models.tessier_resnet`. Of the references, `epochs` are those before the first
cut, and `finetune_epochs` those after each cut, so that a method with more cuts has more epochs;
targets are whole thousandths.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swdlib import recipes
from swdlib.baselines import BatchNormL1
from swdlib.criteria import Criterion, batch_norm_scale, magnitude, score_of
from swdlib.masks import check_sparsity
from swdlib.models import TessierBlock
from swdlib.recipes import Phase, Prune, Recipe, Train, on_scales
from swdlib.schedules import Constant, Schedule, Steps, check_count
from swdlib.structures import Group, Structure, parameters

# Of CIFAR-10's channels, as it is often copied; that of all pixels is (0.2470, 0.2435, 0.2616).
STD = {"cifar10": (0.2023, 0.1994, 0.2010)}


# Structures ---------------------------------------------------------------------------------------


def tessier_parameters(model: nn.Module) -> list[Group]:
    """`structures.parameters`, with the batch norms of shortcuts ranked as well.

    The authors leave out parameters whose names hold "bn", which these do not: surely an accident.
    """
    shortcuts = [block.shortcut for block in _blocks_of(model)]
    return parameters(model, also=[norm for s in shortcuts for norm in s.children()])


def tessier_scales(model: nn.Module) -> list[Group]:
    """The structured form: free scales of batch norms, each cut with its shift.

    They are those of the stem, inside each block and after its addition, not the last one before
    the addition or the shortcut's. No scale is tied to another, and the filters stay as they are.
    """
    return _scales(model, with_filters=False)


def tessier_filters(model: nn.Module) -> list[Group]:
    """`tessier_scales`, and with each scale the filters before it and their inputs after it.

    The later mode of the authors' code, "structuredF". The linear layer keeps all its inputs.
    """
    return _scales(model, with_filters=True)


STRUCTURES: dict[str, Callable[[Any], Structure]] = {
    "tessier_parameters": lambda example: tessier_parameters,
    "tessier_scales": lambda example: tessier_scales,
    "tessier_filters": lambda example: tessier_filters,
}


@dataclass(frozen=True)
class Scales(Group):
    """The scales of one batch norm; unit i is scale i, and slice i of each of the `parts`.

    A part is the name of a parameter, the parameter, and the dimension that is sliced. `count`
    turns the number of scales kept in each group into parameters of the network.
    """

    parts: tuple[tuple[str, nn.Parameter, int], ...] = ()
    count: Callable[[Sequence[int]], int] = sum

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are penalised and cut, by name."""
        return {name: parameter for name, parameter, _ in self.parts}

    def scores(self, criterion: Criterion) -> Tensor:
        """The criterion's scores of the scales, shape (units,)."""
        return score_of(criterion, self.name, self.parameter)

    def removed(self, units: Tensor) -> dict[str, Tensor]:
        """The slices of `units`: name -> bool tensor that broadcasts to the parameter's shape."""
        return {
            name: units.reshape([-1 if d == dim else 1 for d in range(parameter.ndim)])
            for name, parameter, dim in self.parts
        }

    @staticmethod
    def rule(groups: Sequence["Scales"], ranks: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        """The scales below a threshold that leaves about (1 - sparsity) of the network.

        It is found by bisection over the sorted scales, in which only scales above the threshold
        count although those equal to it stay; if no threshold fits, the last one tried is used.
        """
        sizes = [np.sort(rank.detach().cpu().numpy()) for rank in ranks]
        candidates, count = np.sort(np.concatenate(sizes)), groups[0].count
        goal = int(count([len(size) for size in sizes]) * (1 - sparsity))
        low, high = 0, len(candidates)
        while True:
            middle = (low + high) // 2
            threshold = candidates[middle]
            above = [len(size) - int(size.searchsorted(threshold, "right")) for size in sizes]
            left = count(above)
            if left < goal:
                high = middle
            elif left > goal:
                low = middle
            if left == goal or high - low <= 1:
                return [rank < float(threshold) for rank in ranks]


@dataclass(frozen=True)
class _Site:
    """A prunable batch norm, the convolutions whose maps it scales, and the layers that read it.

    Modules are `Any` here, since the type of a submodule is not known.
    """

    norm: Any
    writers: list[Any]
    readers: list[Any]


def _sites(model: nn.Module) -> Iterator[_Site]:
    """The prunable batch norms: the stem's, then for each block those inside and the last."""
    blocks = _blocks_of(model)
    stem, *_, linear = model.children()
    conv, norm, *_ = stem.children()
    readers = [*([block.convs[0], *_projection(block)] for block in blocks), [linear]]
    yield _Site(norm, [conv], readers[0])
    for block, after in zip(blocks, readers[1:], strict=True):
        for norm, writer, reader in zip(block.norms, block.convs, block.convs[1:], strict=False):
            yield _Site(norm, [writer], [reader])
        yield _Site(block.last, [block.convs[-1], *_projection(block)], after)


def _projection(block: TessierBlock) -> list[Any]:
    """The convolution of the shortcut, if it has one."""
    return list(block.shortcut.children())[:1]


def _blocks_of(model: nn.Module) -> list[TessierBlock]:
    blocks = [module for module in model.modules() if isinstance(module, TessierBlock)]
    if not blocks:
        raise ValueError(
            "the structures tessier_... are for the networks of that name, such as "
            f"tessier_resnet20, and the model is a {type(model).__name__}: use another, such as "
            "structures.parameters or structures.filters"
        )
    return blocks


def _scales(model: nn.Module, with_filters: bool) -> list[Group]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[Group] = []
    for site in _sites(model):
        cut = [(site.norm.weight, 0), (site.norm.bias, 0)]
        if with_filters:
            cut += [(writer.weight, 0) for writer in site.writers]
            cut += [(r.weight, 1) for r in site.readers if isinstance(r, nn.Conv2d)]
        parts = tuple((names[id(parameter)], parameter, dim) for parameter, dim in cut)
        count = partial(published_count, model)
        groups.append(Scales(parts[0][0], site.norm.weight, parts=parts, count=count))
    return groups


def published_count(model: nn.Module, kept: Sequence[int]) -> int:
    """The parameters of one of the authors' networks of which `kept` scales are left.

    `kept` is a number for each prunable batch norm, in the order of `tessier_scales`. Each block is
    taken to have outputs of its own, which identity shortcuts do not allow; so it is an estimate.
    """
    first, last = next(model.parameters()), list(model.parameters())[-1]
    left = iter(kept)
    inputs = next(left)
    total = inputs * (first[0].numel() + 2)
    for block in _blocks_of(model):
        maps = [inputs, *(next(left) for _ in block.convs)]
        convs: list[Any] = list(block.convs)
        for conv, before, after in zip(convs, maps, maps[1:], strict=False):
            total += before * after * conv.weight[0, 0].numel() + 2 * after
        total += 2 * maps[-1]
        if _projection(block):
            total += inputs * maps[-1] + 2 * maps[-1]
        inputs = maps[-1]
    return total + (inputs + 1) * len(last)


@torch.no_grad()
def zero_unread_(model: nn.Module) -> None:
    """Zero the weights that read maps whose scale and shift are zero, which changes no output.

    `deploy.shrink` then sees which maps can go.
    """
    for site in _sites(model):
        silent = (site.norm.weight == 0) & (site.norm.bias == 0)
        for reader in site.readers:
            reader.weight[:, silent] = 0.0


# References ---------------------------------------------------------------------------------------


class SmoothL1(BatchNormL1):
    """The authors' penalty for network slimming: `l1` times s**2 up to |s| = 1, and s beyond.

    Below 1 this is an L2 penalty, which makes no scale exactly zero. It is on the scales that the
    structure ranks or, where it has no `Scales`, on all. Arguments are those of `BatchNormL1`.
    """

    def __init__(self, model: nn.Module, *, l1: float = 1e-4, structure: Structure) -> None:
        super().__init__(model, l1=l1, structure=structure)
        ranked = [group.parameter for group in self.groups if isinstance(group, Scales)]
        self.scales = ranked or self.scales

    def slope(self, scale: Tensor) -> Tensor:
        """The derivative of the penalty, without `l1`."""
        return torch.where(scale.abs() <= 1, 2 * scale, 1.0)


def han2015(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    iterations: int = 1,
) -> list[Phase]:
    """Train; then cut and fine-tune at the last rate, the sparsity rising linearly with the cuts.

    The optimizer's momentum is kept from phase to phase.
    """
    whole = _in_whole_epochs(lr, epochs)
    return [Train(epochs, whole), *_cuts(lr, sparsity, structure, finetune_epochs, iterations)]


def renda2020(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    iterations: int = 1,
    l1: float = 1e-4,
) -> list[Phase]:
    """`han2015` with the rates replayed, and a new optimizer, after the first cut.

    Where batch-norm scales are ranked, `SmoothL1` of strength `l1` acts until the last cut.
    """
    by_scale = structure in (tessier_scales, tessier_filters)
    penalty = on_scales(SmoothL1, l1, structure) if by_scale else None
    cuts = _cuts(lr, sparsity, structure, finetune_epochs, iterations, penalty)
    cuts[1] = replace(cuts[1], lr=_in_whole_epochs(lr, finetune_epochs), keep_momentum=False)
    return [Train(epochs, _in_whole_epochs(lr, epochs), penalty), *cuts]


def liu2017(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    iterations: int = 1,
    l1: float = 1e-4,
) -> list[Phase]:
    """`han2015` by batch-norm scale, with `SmoothL1` of strength `l1` until the last cut."""
    penalty = on_scales(SmoothL1, l1, structure)
    cuts = _cuts(lr, sparsity, structure, finetune_epochs, iterations, penalty, batch_norm_scale)
    return [Train(epochs, _in_whole_epochs(lr, epochs), penalty), *cuts]


def soft(epochs: int, lr: Schedule, sparsity: float, structure: Structure) -> list[Phase]:
    """The lowest become zero at the start of each epoch, and may return; then a cut."""

    first = Prune(sparsity, structure, held=False)
    return [first, *recipes.soft(epochs, _in_whole_epochs(lr, epochs), sparsity, structure)]


REFERENCES: dict[str, Recipe] = {
    recipe.__name__: recipe for recipe in (han2015, renda2020, liu2017, soft)
}


def _cuts(
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    epochs: int,
    iterations: int,
    penalty: Callable[..., BatchNormL1] | None = None,
    criterion: Criterion = magnitude,
) -> list[Any]:
    """Cuts to evenly spaced targets, each with its fine-tuning; the last has no penalty."""
    check_count("iterations", iterations)
    thousandths = round(1000 * check_sparsity(sparsity), 9)
    if thousandths % 1:
        raise ValueError(
            f"sparsity must be in whole thousandths with budget='published', not {sparsity!r}"
        )
    targets = [int((i + 1) * thousandths / iterations) / 1000 for i in range(iterations)]
    tune = Train(epochs, Constant(lr(1.0)), penalty, keep_momentum=True)
    phases = [p for target in targets for p in (Prune(target, structure, criterion), tune)]
    return [*phases[:-1], replace(tune, penalty=None)]


def _in_whole_epochs(lr: Schedule, epochs: int) -> Schedule:
    """The schedule with its steps at the start of an epoch, as a third of 50 epochs is 16."""
    if not isinstance(lr, Steps):
        return lr
    starts = [int(milestone * epochs) for milestone in lr.milestones]
    if 0 in starts:
        raise ValueError(f"the steps of the rates need 3 epochs or more, not {epochs!r}")
    return replace(lr, milestones=tuple(start / epochs for start in starts))
