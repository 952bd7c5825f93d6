"""Updates: what a penalty does to the weights that it chose, without a mask where none is needed.

`chosen` tells which they are: a bool tensor of the weight's shape, or a number, if they are those
of a magnitude below it.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from swdlib.readings import LEAST, PIECE, compiled, order


def add_(gradient: Tensor, weight: Tensor, chosen: Tensor | float, scale: float) -> None:
    """Add `scale` times the chosen weights to the gradient, in place."""
    for w, g, c in _pieces(weight, gradient, chosen):
        g.add_(_part(w, c), alpha=scale)


def add_compiled_(updates: Sequence[tuple[Tensor, Tensor, Tensor | float]], scale: float) -> None:
    """As `add_`, of many (gradient, weight, chosen) at once; what is large by compiled code."""
    gradients, weights, bounds = [], [], []
    for gradient, weight, chosen in updates:
        pair = _in_a_row(weight, gradient) if _fits(weight, gradient) else None
        if pair:
            weights.append(pair[0])
            gradients.append(pair[1])
            # None of a weight that has a mask, so that what is compiled does not depend on ties.
            bounds.append(0.0 if isinstance(chosen, Tensor) else chosen)
        if not pair or isinstance(chosen, Tensor):
            add_(gradient, weight, chosen, scale)
    if weights:
        numbers = torch.tensor([scale, *bounds], dtype=torch.float32)
        compiled(_add)(gradients, weights, numbers)


def _fits(weight: Tensor, gradient: Tensor) -> bool:
    return weight.numel() >= LEAST and weight.dtype == gradient.dtype == torch.float32


def _add(gradients: Sequence[Tensor], weights: Sequence[Tensor], numbers: Tensor) -> None:
    for i, (gradient, weight) in enumerate(zip(gradients, weights, strict=True), start=1):
        gradient.add_(torch.where(weight.abs() < numbers[i], weight, 0.0) * numbers[0])


def divide_(weight: Tensor, chosen: Tensor | float, factor: float) -> None:
    """Divide the chosen weights by `factor`, in place."""
    for w, _, c in _pieces(weight, weight, chosen):
        part = _part(w, c)
        w.sub_(part).add_(part.div_(factor))  # zero where they were, so that this is exact


def _part(weight: Tensor, chosen: Tensor | float) -> Tensor:
    """The chosen weights, and zero in the place of all others."""
    if isinstance(chosen, Tensor):
        # By numbers, of which one is enough where a mask repeats: torch is slow at bool tensors.
        one = tuple(slice(None if stride else 1) for stride in chosen.stride())
        return weight * chosen[one].view(torch.uint8)
    # In a single pass: the second argument where the first lies between the others, zero elsewhere.
    return torch.ops.aten.hardtanh_backward(weight, weight, -chosen, chosen)


def _pieces(
    weight: Tensor, other: Tensor, chosen: Tensor | float
) -> Iterable[tuple[Tensor, Tensor, Tensor | float]]:
    """Views of all, of about PIECE weights, since what is made of them then stays in the cache."""
    if weight.numel() <= PIECE:
        return [(weight, other, chosen)]
    if isinstance(chosen, Tensor):
        rows = max(1, PIECE * len(weight) // weight.numel())
        return zip(*(tensor.split(rows) for tensor in (weight, other, chosen)), strict=True)
    pair = _in_a_row(weight, other)
    if pair is None:
        return [(weight, other, chosen)]
    return ((w, o, chosen) for w, o in zip(*(flat.split(PIECE) for flat in pair), strict=True))


def _in_a_row(weight: Tensor, other: Tensor) -> tuple[Tensor, Tensor] | None:
    """Flat views of both in the order of the weight's memory; None if there are gaps."""
    if not (weight.is_contiguous() and other.is_contiguous()):
        dims = order(weight)
        weight, other = weight.permute(dims), other.permute(dims)
    if not (weight.is_contiguous() and other.is_contiguous()):
        return None
    return weight.view(-1), other.view(-1)
