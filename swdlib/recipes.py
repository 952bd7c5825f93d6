"""Recipes: published methods as data, side by side.

A recipe returns a list of phases. Its parameters bear the names of `Config`'s fields, which is how
an experiment knows what to pass. `epochs` is the whole budget, fine-tuning included, so that
methods given the same number have cost the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch.optim import Optimizer

from swdlib.criteria import Criterion, magnitude
from swdlib.masks import check_sparsity
from swdlib.penalties import SelectiveWeightDecay, Update
from swdlib.schedules import Constant, Exponential, Schedule
from swdlib.structures import Structure


class Penalty(Protocol):
    """What a training phase can attach to its optimizer."""

    def attach(self, optimizer: Optimizer) -> None: ...
    def detach(self) -> None: ...
    def report(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Train:
    """Train for `epochs`, with the learning rate `lr` and, if given, a penalty.

    `penalty(model, steps=...)` is called when the phase starts; steps are those of the phase.
    """

    epochs: int
    lr: Schedule
    penalty: Callable[..., Penalty] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise ValueError(f"epochs must be a whole number of at least 1, not {self.epochs!r}")


@dataclass(frozen=True)
class Prune:
    """Cut to `sparsity`; what is cut stays zero in all later phases."""

    sparsity: float
    structure: Structure
    criterion: Criterion = magnitude

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
    weight_decay: float,
    a_min: float,
    a_max: float,
    update: Update,
) -> list[Phase]:
    """Selective weight decay, then a cut that changes nothing (Tessier et al. 2022)."""
    penalty = partial(
        SelectiveWeightDecay,
        sparsity=sparsity,
        structure=structure,
        weight_decay=weight_decay,
        strength=Exponential(a_min, a_max),
        update=update,
    )
    return [Train(epochs, lr, penalty), Prune(sparsity, structure)]


def han2015(
    epochs: int,
    lr: Schedule,
    sparsity: float,
    structure: Structure,
    finetune_epochs: int,
    iterations: int,
) -> list[Phase]:
    """Train, then `iterations` times: cut by magnitude, fine-tune at the last learning rate.

    One iteration is the one-shot form; with several, each cuts the same share of what is left. Of
    `epochs`, `finetune_epochs` are for fine-tuning, divided evenly (Han et al. 2015,
    arXiv 1506.02626).
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


def _check_finetuning(epochs: int, finetune_epochs: int, iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations!r}")
    if not iterations <= finetune_epochs < epochs:
        raise ValueError(
            f"finetune_epochs must be at least iterations ({iterations}) and less than epochs "
            f"({epochs}), of which they are a part, not {finetune_epochs!r}"
        )


RECIPES: dict[str, Recipe] = {"dense": dense, "swd": swd, "han2015": han2015}
