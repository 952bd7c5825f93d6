"""Structures: what lives or dies together.

A structure maps a model to a list of groups of units. That one list decides what is ranked,
penalised, masked and counted, so that these four can never disagree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from swdlib.criteria import Criterion


@dataclass(frozen=True)
class Group:
    """The prunable units of one parameter; unit i is row i of the parameter seen as rows of `size`.

    `name` is the parameter's key in `named_parameters()`.
    """

    name: str
    parameter: nn.Parameter
    size: int = 1

    @property
    def units(self) -> int:
        """The number of units."""
        return self.parameter.numel() // self.size

    def scores(self, criterion: Criterion) -> Tensor:
        """One score a unit, shape (units,): the mean over its weights."""
        scores = criterion(self.parameter)
        if scores.shape != self.parameter.shape:
            raise ValueError(
                f"a criterion must return one score a weight: {self.name} has shape "
                f"{tuple(self.parameter.shape)}, its scores have {tuple(scores.shape)}"
            )
        return scores.flatten() if self.size == 1 else scores.reshape(self.units, -1).mean(1)

    def spread(self, units: Tensor) -> Tensor:
        """A value a unit, shape (units,), given to each of its weights: the parameter's shape."""
        rows = units.unsqueeze(1).expand(self.units, self.size)
        return rows.reshape(self.parameter.shape)


Structure = Callable[[nn.Module], list[Group]]


def _prunable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    # named_parameters() yields a shared parameter once, under its first name.
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.ndim >= 2]


def weights(model: nn.Module) -> list[Group]:
    """Every weight for itself: all trainable parameters of two or more dimensions.

    Biases and normalisation parameters are few and are not pruned; frozen parameters are left
    alone; a parameter that several modules share is one group.
    """
    return [Group(name, parameter) for name, parameter in _prunable(model)]


def kernels(model: nn.Module) -> list[Group]:
    """Each kernel of a convolution as one unit: the weights between an input and an output map."""
    return [
        Group(name, parameter, size=math.prod(parameter.shape[2:]))
        for name, parameter in _prunable(model)
        if parameter.ndim > 2 and parameter.numel()
    ]


STRUCTURES: dict[str, Structure] = {"weights": weights, "kernels": kernels}
