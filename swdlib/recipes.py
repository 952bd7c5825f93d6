"""Recipes: published methods as lists of phases, side by side.

The parameters of a recipe are named as the fields of `Config`, which is how a run knows what to
pass, and its defaults are those of `Config`. `epochs` is the whole budget, fine-tuning included, so
that methods with the same number cost the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from swdlib.baselines import BatchNormL1, DenseFeedback, GradualPruning
from swdlib.criteria import Criterion, Random, batch_norm_scale, magnitude
from swdlib.hooks import Method
from swdlib.masks import Allocation, check_sparsity, together
from swdlib.schedules import (
    Alternating,
    Constant,
    Cubic,
    Exponential,
    Growth,
    Linear,
    Schedule,
    check_count,
    growing,
)
from swdlib.structures import Structure
from swdlib.swd import SelectiveWeightDecay, Update

ONCE = 10**12  # steps from one choice to the next: more than any training has


@dataclass(frozen=True)
class Train:
    """Train for `epochs`, with the learning-rate schedule `lr` and, if given, a method's hooks.

    With `keep_momentum` the optimizer of the training before goes on; otherwise there is a new one.
    `penalty(model, steps=...)` returns the method when the phase starts; `steps` are those of the
    phase. One that ranks weights also takes `criterion` and `allocation` (see `ranked`).
    """

    epochs: int
    lr: Schedule
    penalty: Callable[..., Method] | None = None
    keep_momentum: bool = False

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        if not callable(self.lr):
            raise TypeError(f"lr must be a schedule, such as Constant(0.1), not {self.lr!r}")


@dataclass(frozen=True)
class Prune:
    """Cut to `sparsity`; what is cut stays zero in all later phases, if it is `held`.

    With `rewind`, everything that stays returns to where it was before the first phase.
    """

    sparsity: float
    structure: Structure
    criterion: Criterion = magnitude
    allocation: Allocation = together
    held: bool = True
    rewind: bool = False

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)


Phase = Train | Prune
Recipe = Callable[..., list[Phase]]


def dense(epochs: int, lr: Schedule) -> list[Phase]:
    """Training without pruning."""
    return [Train(epochs, lr)]


def swd(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    weight_decay: float = 5e-4,
    a_min: float = 0.1,
    a_max: float = 1e5,
    update: Update = "gradient",
    growth: Growth = "exponential",
    growth_end: float = 1.0,
) -> list[Phase]:
    """Selective weight decay, then a cut of what is nearly zero (Tessier et al. 2022).

    The strength grows from `a_min` to `a_max` by the share `growth_end` of training, in the way
    that `growth` names (see `growing`). Source: arXiv 2011.10520.
    """
    strength = growing(growth, a_min, a_max, growth_end, lr)
    return _with_swd(epochs, lr, sparsity, structure, strength, weight_decay, update)


def swd_constant(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    weight_decay: float = 5e-4,
    a: float = 100.0,
    update: Update = "gradient",
) -> list[Phase]:
    """SWD of constant strength `a`: an ablation of its growth.

    The default is the strength of the published growth half-way through.
    """
    return _with_swd(epochs, lr, sparsity, structure, Constant(a), weight_decay, update)


def swd_rising(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    weight_decay: float = 5e-4,
    a_min: float = 10.0,
    a_max: float = 5e4,
    ramp_begin: float = 0.1,
    ramp_end: float = 0.7,
    update: Update = "gradient",
    growth: Growth = "exponential",
    growth_end: float = 1.0,
) -> list[Phase]:
    """SWD whose target rises as in `zhu2017` while its strength grows: a variant of this book."""
    target = _rising(sparsity, ramp_begin, ramp_end)
    strength = growing(growth, a_min, a_max, growth_end, lr)
    return _with_swd(epochs, lr, sparsity, structure, strength, weight_decay, update, target)


def swd_every(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    weight_decay: float = 5e-4,
    a_min: float = 0.1,
    a_max: float = 1e5,
    every: int = 100,
    update: Update = "gradient",
) -> list[Phase]:
    """SWD that selects w* only every `every` steps: an ablation of selecting at each one."""
    strength = Exponential(a_min, a_max)
    return _with_swd(epochs, lr, sparsity, structure, strength, weight_decay, update, every=every)


def swd_finetune(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    weight_decay: float = 5e-4,
    a_min: float = 0.1,
    a_max: float = 1e5,
    update: Update = "gradient",
) -> list[Phase]:
    """SWD, a cut, then fine-tuning at the last learning rate: an ablation, as SWD needs none."""
    _check_finetuning(epochs, finetune_epochs)
    before = epochs - finetune_epochs
    train, cut = swd(before, lr, sparsity, structure, weight_decay, a_min, a_max, update)
    return [train, cut, Train(finetune_epochs, Constant(lr(1.0)))]


def one_shot(epochs: int, lr: Schedule, sparsity: float, structure: Structure) -> list[Phase]:
    """Train, then cut by magnitude, without fine-tuning: what a cut alone does."""
    return [Train(epochs, lr), Prune(sparsity, structure)]


def random_pruning(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    iterations: int = 1,
    seed: int = 0,
) -> list[Phase]:
    """`han2015` with random cuts: the control that every criterion has to beat."""
    phases = han2015(epochs, lr, sparsity, structure, finetune_epochs, iterations)
    return ranked(phases, Random(seed), None)


def han2015(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    iterations: int = 1,
) -> list[Phase]:
    """Train, then `iterations` times: cut by magnitude, fine-tune at the last learning rate.

    With several iterations, each cuts the same share of the weights that are left. Of `epochs`,
    `finetune_epochs` are for fine-tuning, divided evenly (Han et al. 2015, arXiv 1506.02626).
    """
    check_sparsity(sparsity)
    _check_finetuning(epochs, finetune_epochs, iterations)
    phases: list[Phase] = [Train(epochs - finetune_epochs, lr)]
    for i in range(iterations):
        last = i == iterations - 1
        target = sparsity if last else 1 - (1 - sparsity) ** ((i + 1) / iterations)
        share = finetune_epochs * (i + 1) // iterations - finetune_epochs * i // iterations
        phases += [Prune(target, structure), Train(share, Constant(lr(1.0)))]
    return phases


def renda2020(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    iterations: int = 1,
) -> list[Phase]:
    """`han2015` with learning-rate rewinding: after each cut the schedule `lr` is replayed.

    Source: Renda et al. 2020, arXiv 2003.02389. They retrain for as long as they trained after
    every cut; here the schedule is replayed over the cut's share of `finetune_epochs`.
    """
    phases = han2015(epochs, lr, sparsity, structure, finetune_epochs, iterations)
    return [replace(phase, lr=lr) if isinstance(phase, Train) else phase for phase in phases]


def frankle2019(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    iterations: int = 1,
) -> list[Phase]:
    """A lottery ticket: `renda2020`, but after each cut the weights start again where they began.

    Source: Frankle & Carbin 2019, arXiv 1803.03635. They train in full after each cut; here the
    schedule is replayed over the cut's share of `finetune_epochs`.
    """
    phases = renda2020(epochs, lr, sparsity, structure, finetune_epochs, iterations)
    return [replace(phase, rewind=True) if isinstance(phase, Prune) else phase for phase in phases]


def zhu2017(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    ramp_begin: float = 0.2,
    ramp_end: float = 0.7,
    every: int = 100,
) -> list[Phase]:
    """Gradual pruning: the sparsity rises while the network trains (Zhu & Gupta 2017).

    It follows a cubic from 0 to `sparsity` between the shares `ramp_begin` and `ramp_end` of
    training, with new masks every `every` steps (arXiv 1710.01878, equation 1). The cut at the end
    changes nothing.
    """
    target = _rising(sparsity, ramp_begin, ramp_end)
    penalty = partial(GradualPruning, sparsity=target, structure=structure, every=every)
    return [Train(epochs, lr, penalty), Prune(sparsity, structure)]


def lin2020(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    ramp_begin: float = 0.0,
    ramp_end: float = 0.5,
    every: int = 16,
) -> list[Phase]:
    """Dynamic pruning with feedback: the pruned network's gradients train dense weights.

    The sparsity rises as in `zhu2017`, over the first half of training, and masks are chosen again
    every 16 steps (Lin et al. 2020, arXiv 2006.07253). The cut at the end changes nothing.
    """
    target = _rising(sparsity, ramp_begin, ramp_end)
    penalty = partial(DenseFeedback, sparsity=target, structure=structure, every=every)
    return [Train(epochs, lr, penalty), Prune(sparsity, structure)]


def peste2021(epochs: int, lr: Schedule, sparsity: float, structure: Structure) -> list[Phase]:
    """AC/DC: the network is pruned and dense in turns (Peste et al. 2021, arXiv 2106.12379).

    It is dense for the first tenth of training, then pruned and dense in turns of a twentieth, and
    pruned from 0.85 on: the shares of the published 100 epochs on ImageNet.
    """
    target = Alternating(check_sparsity(sparsity), 0.05, 0.1, 0.85)

    # Within a turn the same weights are the lowest, so that choosing more often changes nothing.
    penalty = partial(_choosing, times=100, sparsity=target, structure=structure)
    return [Train(epochs, lr, penalty), Prune(sparsity, structure)]


def wang2021(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    weight_decay: float = 5e-4,
    a_max: float = 2000.0,
    update: Update = "gradient",
) -> list[Phase]:
    """GReg-1: a decay that grows on weights chosen once, a cut, fine-tuning (Wang et al. 2021).

    Half of the epochs before the cut train the network. At their end the lowest weights are chosen
    for good, and over the other half their decay grows linearly to `a_max * weight_decay`, which by
    default is the published 1 (arXiv 2012.09243, algorithm 1). The schedule `lr` is played in each
    half; fine-tuning is at the last rate. Here SWD differs in choosing at every step.
    """
    _check_finetuning(epochs, finetune_epochs)
    before = epochs - finetune_epochs
    if before < 2:
        raise ValueError(
            f"epochs must be at least finetune_epochs + 2, an epoch before the choice and one "
            f"after it, not {epochs} with finetune_epochs {finetune_epochs}"
        )

    strength = Linear(0.0, a_max)
    half = before // 2
    grow = _with_swd(half, lr, sparsity, structure, strength, weight_decay, update, every=ONCE)
    return [Train(before - half, lr), *grow, Train(finetune_epochs, Constant(lr(1.0)))]


def liu2017(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    l1: float = 1e-4,
) -> list[Phase]:
    """Network slimming: L1 on batch-norm scales, a cut by them, fine-tuning (Liu et al. 2017).

    Source: arXiv 1708.06519, which fine-tunes with the learning rates of the training; so the
    schedule is replayed. `l1` is published as 1e-4 for VGG-19 and 1e-5 for ResNet-164. `structure`
    must be one whose units have scales.
    """
    _check_finetuning(epochs, finetune_epochs)
    return [
        Train(epochs - finetune_epochs, lr, on_scales(BatchNormL1, l1, structure)),
        Prune(sparsity, structure, batch_norm_scale),
        Train(finetune_epochs, lr),
    ]


def on_scales(
    kind: type[BatchNormL1], l1: float, structure: Structure
) -> Callable[..., BatchNormL1]:
    """What makes a penalty on batch-norm scales when a phase starts, of whatever steps."""

    def penalty(model: nn.Module, *, steps: int, **ranking: Any) -> BatchNormL1:
        return kind(model, l1=l1, structure=structure)

    return penalty


def soft(epochs: int, lr: Schedule, sparsity: float, structure: Structure) -> list[Phase]:
    """Soft pruning: after every epoch the lowest become zero, but may return; then a cut.

    Source: He et al. 2018, arXiv 1808.06866.
    """

    penalty = partial(_choosing, times=epochs, sparsity=sparsity, structure=structure, soft=True)
    return [Train(epochs, lr, penalty), Prune(sparsity, structure)]


def _choosing(model: nn.Module, *, steps: int, times: int, **arguments: Any) -> GradualPruning:
    """`GradualPruning` that chooses so many times in a phase, of whatever steps."""
    every = max(1, steps // times)  # a dry run may have fewer steps
    return GradualPruning(model, steps=steps, every=every, **arguments)


def ranked(
    phases: list[Phase], criterion: Criterion | None, allocation: Allocation | None
) -> list[Phase]:
    """The phases of a recipe with another criterion than magnitude, another allocation, or both.

    ValueError if the recipe is one that has a criterion of its own.
    """
    own = [p.criterion for p in phases if isinstance(p, Prune) and p.criterion is not magnitude]
    if criterion and own:
        name = getattr(own[0], "__name__", own[0])
        raise ValueError(f"this recipe ranks by {name}: criterion must be left out")
    given: dict[str, Any] = {"criterion": criterion, "allocation": allocation}
    given = {name: value for name, value in given.items() if value is not None}

    def changed(phase: Phase) -> Phase:
        if isinstance(phase, Prune):
            return replace(phase, **given)
        return replace(phase, penalty=partial(phase.penalty, **given)) if phase.penalty else phase

    return [changed(phase) for phase in phases] if given else phases


def _with_swd(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    strength: Schedule,
    weight_decay: float,
    update: Update,
    target: Schedule | None = None,
    every: int = 1,
) -> list[Phase]:
    """Train with SWD towards `target`, by default `sparsity` throughout, then cut."""
    penalty = partial(
        SelectiveWeightDecay,
        sparsity=target or sparsity,
        structure=structure,
        strength=strength,
        weight_decay=weight_decay,
        update=update,
        every=every,
    )
    return [Train(epochs, lr, penalty), Prune(sparsity, structure)]


def _rising(sparsity: float, ramp_begin: float, ramp_end: float) -> Cubic:
    if not 0 <= ramp_begin < ramp_end <= 1:
        raise ValueError(
            "ramp_begin and ramp_end are shares of training with 0 <= ramp_begin < ramp_end <= 1, "
            f"not {ramp_begin!r} and {ramp_end!r}"
        )
    return Cubic(0.0, check_sparsity(sparsity), ramp_begin, ramp_end)


def _check_finetuning(epochs: int, finetune_epochs: int, iterations: int = 1) -> None:
    check_count("iterations", iterations)
    if not iterations <= finetune_epochs < epochs:
        raise ValueError(
            f"finetune_epochs must be at least iterations ({iterations}) and less than epochs "
            f"({epochs}), of which they are a part, not {finetune_epochs!r}"
        )


RECIPES: dict[str, Recipe] = {
    recipe.__name__: recipe
    for recipe in (
        *(dense, swd, swd_constant, swd_rising, swd_every, swd_finetune),
        *(one_shot, random_pruning, han2015, renda2020, frankle2019, zhu2017, lin2020),
        *(peste2021, wang2021, liu2017, soft),
    )
}
