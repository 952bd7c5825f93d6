"""Criteria: how much a weight matters.

A criterion is a function from a parameter to scores of the same shape; weights of the highest
scores are kept. Write your own, with that signature, and pass it.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Criterion = Callable[[Tensor], Tensor]


def magnitude(parameter: Tensor) -> Tensor:
    """The absolute value of each weight (Han et al. 2015, arXiv 1506.02626)."""
    return parameter.detach().abs()


def saliency(parameter: Tensor) -> Tensor:
    """|weight * gradient|: to first order, how much the loss changes if the weight goes.

    Source: Molchanov et al. 2019, arXiv 1906.10771. Raises ValueError without a gradient. After a
    step with SWD's gradient update, the gradient includes the penalty.
    """
    if parameter.grad is None:
        raise ValueError("saliency needs gradients: call loss.backward() before it is used")
    return (parameter.detach() * parameter.grad).abs()


def batch_norm_scale(parameter: Tensor) -> Tensor:
    """The absolute value of each scale of a batch norm (Liu et al. 2017, arXiv 1708.06519).

    For structures whose units have scales; ValueError for weights.
    """
    if parameter.ndim != 1:
        raise ValueError(
            "batch_norm_scale ranks units by their batch-norm scale, and a parameter of shape "
            f"{tuple(parameter.shape)} holds none: use a structure whose units have scales"
        )
    return parameter.detach().abs()


batch_norm_scale.role = "scale"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Random:
    """Random scores, as a control for any criterion.

    They depend on the seed and the parameter's name alone, so that what one cut removed is removed
    by the next. They follow a Cauchy distribution, which the mean of several follows too, so that
    units of all sizes have equal chances.
    """

    seed: int = 0

    def __call__(self, parameter: Tensor, name: str = "") -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        uniform = torch.rand(parameter.shape, generator=generator)  # on the CPU: equal everywhere
        return torch.tan(math.pi * (uniform - 0.5)).to(parameter.device)


def score_of(criterion: Criterion, name: str, parameter: Tensor) -> Tensor:
    """The criterion's scores of the parameter called `name`; ValueError unless of its shape."""
    scores = criterion(parameter, name) if isinstance(criterion, Random) else criterion(parameter)
    if scores.shape != parameter.shape:
        raise ValueError(
            f"a criterion must return one score a weight: {name} has shape "
            f"{tuple(parameter.shape)}, its scores have {tuple(scores.shape)}"
        )
    return scores


# By name, for the command line and for notebooks. Not saliency, which needs gradients: a training
# script has them at hand when it prunes, a recipe's cut has not.
CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "batch_norm_scale": batch_norm_scale}
