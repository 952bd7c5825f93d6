"""Updates: what a penalty does to the weights that it chose, without a mask where none is needed.

`chosen` tells which they are: a bool tensor of the weight's shape, or a number, if they are those
of a magnitude below it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from swdlib.selection import LEAST, PIECE, compiled, order


def add_(gradient: Tensor, weight: Tensor, chosen: Tensor | float, scale: float) -> None:
    """Add `scale` times the chosen weights to the gradient, in place."""
    for w, g in _pieces(weight, gradient, chosen, PIECE):
        g.add_(_part(w, chosen), alpha=scale)


def add_compiled_(updates: Sequence[tuple[Tensor, Tensor, Tensor | float]], scale: float) -> None:
    """As `add_`, of many (gradient, weight, chosen) at once; what is large by compiled code."""
    gradients: list[Tensor] = []
    weights: list[Tensor] = []
    bounds: list[float] = []
    for gradient, weight, chosen in updates:
        # None of a weight that has a mask, so that what is compiled does not depend on ties.
        bound = 0.0 if isinstance(chosen, Tensor) else chosen
        [(w, g), *_] = _pieces(weight, gradient, bound, 1 << 62)
        fits = w.ndim == 1 and len(w) >= LEAST and w.dtype == g.dtype == torch.float32
        if fits:
            gradients, weights, bounds = [*gradients, g], [*weights, w], [*bounds, bound]
        if not fits or isinstance(chosen, Tensor):
            add_(gradient, weight, chosen, scale)
    if weights:
        numbers = torch.tensor([scale, *bounds], dtype=torch.float32)
        compiled(_add)(gradients, weights, numbers)


def _add(gradients: Sequence[Tensor], weights: Sequence[Tensor], numbers: Tensor) -> None:
    for i, (gradient, weight) in enumerate(zip(gradients, weights, strict=True), start=1):
        gradient.add_(torch.where(weight.abs() < numbers[i], weight, 0.0) * numbers[0])


def divide_(weight: Tensor, chosen: Tensor | float, factor: float) -> None:
    """Divide the chosen weights by `factor`, in place."""
    for w, _ in _pieces(weight, weight, chosen, PIECE):
        part = _part(w, chosen)
        w.sub_(part).add_(part.div_(factor))  # zero where they were, so that this is exact


def _part(weight: Tensor, chosen: Tensor | float) -> Tensor:
    """The chosen weights, and zero in the place of all others."""
    if isinstance(chosen, Tensor):
        return weight.masked_fill(~chosen, 0.0)
    # In a single pass: the second argument where the first lies between the others, zero elsewhere.
    return torch.ops.aten.hardtanh_backward(weight, weight, -chosen, chosen)


def _pieces(
    weight: Tensor, other: Tensor, chosen: Tensor | float, size: int
) -> Sequence[tuple[Tensor, Tensor]]:
    """Views of both, of at most `size` weights; the whole if there are gaps or a mask."""
    if isinstance(chosen, Tensor):
        return [(weight, other)]
    pair = [tensor.permute(order(weight)) for tensor in (weight, other)]
    if not all(tensor.is_contiguous() for tensor in pair):
        return [(weight, other)]
    first, second = (tensor.view(-1).split(size) for tensor in pair)
    return list(zip(first, second, strict=True))
