"""Radix select: the lowest magnitudes by the bits of the floats, in passes that nothing decides.

It is the way of a GPU, where the host must not wait to see a number, and of a CPU where so many
weights are equal, or so unlike any sample, that no thin band holds the threshold.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

DIGIT = 11  # bits that one round settles
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def rank_by_digits(pieces: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The `count`-th lowest magnitude, and how many that equal it are among the lowest.

    A radix select on the bits of the floats, which order as the magnitudes do. It reads them two to
    six times whatever they are, keeps none, and on a GPU the host waits for nothing.
    """
    integer, size = INTEGERS[pieces[0].element_size()], 1 << DIGIT
    prefix = torch.zeros((), dtype=torch.int64, device=pieces[0].device)
    rank = prefix + count
    for shift in reversed(range(0, 8 * pieces[0].element_size() - 1, DIGIT)):
        histogram = torch.zeros(2 * size, dtype=torch.int64, device=prefix.device)
        for piece in pieces:
            key = piece.abs().view(integer).long() >> shift
            # What another digit ruled out is counted in the upper half.
            digit = (key & (size - 1)) + size * (key >> DIGIT != prefix)
            histogram.scatter_add_(0, digit, torch.ones_like(digit))
        reached = histogram[:size].cumsum(0)
        digit = (reached < rank).sum()
        rank = rank - (reached - histogram[:size]).take(digit)
        prefix = (prefix << DIGIT) | digit
    return prefix.to(integer).view(pieces[0].dtype), rank


def masks_without_waiting(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Where the `count` lowest magnitudes are, bool tensors of the same shapes; for a GPU.

    All shapes are fixed and the host waits for nothing, so that NaN and infinity go unseen.
    """
    flat = torch.cat([tensor.detach().abs().flatten() for tensor in tensors])
    value, taken = rank_by_digits([flat], count)
    tied = flat == value
    chosen = (flat < value) | (tied & (tied.cumsum(0) <= taken))
    parts = chosen.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
