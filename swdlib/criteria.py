"""Criteria: how much a weight matters.

A criterion maps a parameter to a score of the same shape; the higher score is kept. Any function of
one's own with that signature is a criterion.
"""

from collections.abc import Callable

from torch import Tensor

Criterion = Callable[[Tensor], Tensor]


def magnitude(parameter: Tensor) -> Tensor:
    """The absolute value of each weight (Han et al. 2015, arXiv 1506.02626)."""
    return parameter.detach().abs()


def saliency(parameter: Tensor) -> Tensor:
    """|weight * gradient|: to first order, how much the loss changes if the weight goes.

    Source: Molchanov et al. 2017, arXiv 1611.06440. Raises ValueError without a gradient.
    """
    if parameter.grad is None:
        raise ValueError("saliency needs gradients: call loss.backward() before it is used")
    return (parameter.detach() * parameter.grad).abs()
