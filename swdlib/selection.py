"""Selection: the lowest magnitudes of many tensors, exactly, at nearly the speed of memory.

`Threshold` finds the magnitude below which a given number of weights lie. It moves little from one
step of training to the next, so that one reading of all weights is enough: those below a thin band
around its expected place are counted, and only those within the band are ranked. A band that misses
costs a second reading, never exactness.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swdlib.radix import rank_by_digits
from swdlib.readings import (
    PIECE,
    flattened,
    pieces_of,
    precision_of,
    read,
    read_compiled,
    sizes_of,
)


@dataclass(frozen=True)
class Lowest:
    """The lowest magnitudes of some tensors: all below `value`, and the first of those equal to it.

    Of those, all are taken of the tensors before number `divided`, `taken` of that one, and none of
    those after it.
    """

    value: float
    divided: int
    taken: int = 0

    def chosen(self, i: int, tensor: Tensor) -> Tensor | float:
        """Which weights of `tensor`, number i, they are: those of a magnitude below a number.

        A bool tensor of its shape where that cannot tell those that are equal apart.
        """
        if i == self.divided:
            return self._divided(tensor)
        if i > self.divided:
            return self.value
        return _next(self.value, precision_of(tensor))

    def _divided(self, tensor: Tensor) -> Tensor:
        flat, left = tensor.detach().flatten(), self.taken
        chosen = torch.empty(len(flat), dtype=torch.bool)
        for piece, part in zip(flat.split(PIECE), chosen.split(PIECE), strict=True):
            sizes = sizes_of([piece])
            tied = np.flatnonzero(sizes == self.value)[:left]
            part.copy_(torch.from_numpy(sizes < self.value))
            part[tied] = True
            left -= len(tied)
        return chosen.reshape(tensor.shape)


class Threshold:
    """Finds the lowest magnitudes of the same tensors again and again while they change.

    What it remembers decides how long that takes, never what it finds.
    """

    def __init__(self) -> None:
        self.compiled = False  # whether compiled code reads the weights
        self._last = self._move = math.nan
        self._width = 1e-3  # of the band to each side, as a share of the threshold

    def find(self, tensors: Sequence[Tensor], count: int) -> Lowest | None:
        """The `count` lowest magnitudes, at least 1, of CPU tensors of one dtype.

        None if one is NaN or infinite. Of equal magnitudes the first come first.
        """
        for foreseen in (False,) if math.isnan(self._last) else (True, False):
            low, high = self._band() if foreseen else _bracket(tensors, count)
            reading = read_compiled if self.compiled and foreseen else read
            below, between, largest = reading(tensors, low, high)
            if not math.isfinite(largest):
                return None
            if below < count <= below + len(between):
                found = _rank(tensors, between, count - below)
                break
        else:
            pieces = [piece for tensor in tensors for piece in pieces_of(tensor)]
            value, tied = rank_by_digits(pieces, count)
            found = _divide(tensors, float(value), int(tied))
        self._learn(found.value)
        return found

    def _band(self) -> tuple[float, float]:
        expected = self._last + self._move
        return expected * (1 - self._width), expected * (1 + self._width)

    def _learn(self, value: float) -> None:
        """Expect the threshold to move as it just did, within four times the last surprise."""
        low, high = self._band()
        if low <= value <= high:  # foreseen, even if so much else was that it was of no use
            surprise = abs(value / (self._last + self._move) - 1) if value else 0.0
            self._width = max(4 * surprise, self._width / 2, 1e-6)
            self._move = value - self._last
        else:
            self._width = 1e-3 if math.isnan(self._last) else min(4 * self._width, 0.02)
            self._move = 0.0
        self._last = value


def are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all are floats of one of the usual sizes, of one dtype and on one CPU or GPU."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    [dtype, device], *more = kinds
    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return not more and dtype in usual and device.type in ("cpu", "cuda")


def _next(value: float, precision: torch.dtype) -> float:
    """The lowest number of this precision above `value`."""
    number = np.float64(value) if precision == torch.float64 else np.float32(value)
    return float(np.nextafter(number, number.dtype.type(math.inf)))


def _bracket(tensors: Sequence[Tensor], count: int) -> tuple[float, float]:
    """Two magnitudes between which the `count`-th lowest lies, almost surely, by a sample.

    After Floyd & Rivest 1975.
    """
    total = sum(tensor.numel() for tensor in tensors)
    stride, seen, parts = math.ceil(total ** (1 / 3)), 0, []
    for tensor in tensors:
        parts.append(flattened(tensor)[-seen % stride :: stride])
        seen += tensor.numel()
    sample = np.sort(torch.cat(parts).abs().to(precision_of(parts[0])).numpy())
    low, high = places_around(count / total, len(sample))
    return float(sample[low]), float(sample[high])


def places_around(share: float, size: int) -> tuple[int, int]:
    """Two places in a sorted sample of `size`, almost surely around what has `share` below it.

    They are four deviations off.
    """
    margin = 4 * math.sqrt(size * share * (1 - share)) + 1
    low, high = (min(max(round(share * (size - 1) + m), 0), size - 1) for m in (-margin, margin))
    return low, high


def _rank(tensors: Sequence[Tensor], between: np.ndarray, count: int) -> Lowest:
    value = np.partition(between, count - 1)[count - 1]
    tied = count - int(np.count_nonzero(between < value))
    if tied == np.count_nonzero(between == value):
        return Lowest(float(value), len(tensors))
    return _divide(tensors, float(value), tied)


def _divide(tensors: Sequence[Tensor], value: float, tied: int) -> Lowest:
    """The lowest, of which the first `tied` of those equal to `value` are."""
    for i, tensor in enumerate(tensors):
        here = sum(int(np.count_nonzero(sizes_of([p]) == value)) for p in pieces_of(tensor))
        if tied <= here:
            return Lowest(value, i, tied)
        tied -= here
    raise AssertionError("fewer are equal to the threshold than were counted")
