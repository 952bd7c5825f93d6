"""Selection: the lowest magnitudes of many tensors, exactly, at nearly the speed of memory.

`Threshold` finds the magnitude below which a given number of weights lie. It moves little from one
step of training to the next, so that one reading of all weights is enough: those below a thin band
around its expected place are counted, and only those within the band are ranked. A band that misses
costs a second reading, never exactness.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swdlib.radix import rank_by_digits

PIECE = 1 << 18  # weights that are worked on at a time: what is made of them stays in the cache
LEAST = 1 << 14  # weights from which on a call of compiled code pays
BLOCK = 256  # weights of which compiled code says whether some lie in the band


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
        value = torch.tensor(self.value, dtype=_precision(tensor))
        return float(torch.nextafter(value, torch.full_like(value, math.inf)))

    def _divided(self, tensor: Tensor) -> Tensor:
        sizes = tensor.detach().abs().flatten().to(_precision(tensor))
        chosen = sizes < self.value
        chosen[(sizes == self.value).nonzero().squeeze(1)[: self.taken]] = True
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
            read = _read_compiled if self.compiled and foreseen else _read
            below, between, largest = read(tensors, low, high)
            if not math.isfinite(largest):
                return None
            if below < count <= below + len(between):
                found = _rank(tensors, between, count - below)
                break
        else:
            pieces = [piece for tensor in tensors for piece in _pieces(tensor)]
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


def _precision(tensor: Tensor) -> torch.dtype:
    """In what magnitudes are compared: NumPy has no bfloat16 and is slow at float16."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _flat(tensor: Tensor) -> Tensor:
    """The elements in a row, in the order of memory; a copy only if there are gaps between them."""
    return tensor.detach().permute(order(tensor)).flatten()


def order(tensor: Tensor) -> list[int]:
    """The dimensions in the order in which they lie in memory."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return _flat(tensor).split(PIECE) if tensor.numel() else ()


def _sizes(tensor: Tensor) -> Iterator[np.ndarray]:
    for piece in _pieces(tensor):
        yield piece.abs().to(_precision(piece)).numpy()


def _read(tensors: Sequence[Tensor], low: float, high: float) -> tuple[int, np.ndarray, float]:
    """How many magnitudes lie below `low`, those from `low` to `high`, and the largest, or NaN.

    Of a band that holds so many that they would take much memory, none are returned.
    """
    numbers = [tensor.numel() for tensor in tensors]
    room = max(1 << 16, max(numbers) // 4, sum(numbers) // 64)
    bounds = torch.tensor([low, high], dtype=_precision(tensors[0])).numpy()
    below, between, largest = 0, [bounds[:0]], [0.0]
    for sizes in (sizes for tensor in tensors for sizes in _sizes(tensor)):
        under, inside = sizes < bounds[0], sizes <= bounds[1]
        found = np.flatnonzero(np.not_equal(under, inside, out=inside))
        below, room = below + int(np.count_nonzero(under)), room - len(found)
        between.append(sizes[found] if room >= 0 else bounds[:0])
        largest.append(sizes.max())
    return below, np.concatenate(between if room >= 0 else between[:1]), float(np.max(largest))


def _read_compiled(
    tensors: Sequence[Tensor], low: float, high: float
) -> tuple[int, np.ndarray, float]:
    """As `_read`: compiled code counts by blocks; the few that reach the band are read again.

    Nothing is found if so many do that reading all of them at once is faster.
    """
    flats = [_flat(tensor) for tensor in tensors]
    whole = [len(f) // BLOCK * BLOCK if len(f) >= LEAST else 0 for f in flats]
    large = [f[:n].view(-1, BLOCK) for f, n in zip(flats, whole, strict=True) if n]
    if not large or large[0].dtype != torch.float32:
        return _read(tensors, low, high)
    bounds = torch.tensor([low, high])
    counts = compiled(_count)(large, bounds)
    under, inside, largest = (torch.cat(parts) for parts in zip(*counts, strict=True))
    hit = inside > under
    if hit.count_nonzero() > len(hit) // 8:
        return 0, np.empty(0), 0.0
    rest = [f[n:] for f, n in zip(flats, whole, strict=True)]
    rest += [blocks[h] for blocks, h in zip(large, hit.split([*map(len, large)]), strict=True)]
    below, between, top = _read([torch.cat([r.flatten() for r in rest])], low, high)
    below += int(under.masked_fill(hit, 0).sum(dtype=torch.float64))
    return below, between, float(torch.tensor([top, largest.max()]).max())


def _count(tensors: Sequence[Tensor], bounds: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each block, a row: how many lie below the first bound, up to the second; the largest."""
    counts = []
    for blocks in tensors:
        sizes = blocks.abs()
        # As floats, which are added faster than integers and are exact for so few.
        under, inside = (sizes < bounds[0]).float(), (sizes <= bounds[1]).float()
        counts.append((under.sum(1), inside.sum(1), sizes.amax(1)))
    return counts


@cache  # at the first use, since torch takes long to import what compiles
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled once for each network: for the sizes of its tensors."""
    return torch.compile(function, dynamic=False)


def _bracket(tensors: Sequence[Tensor], count: int) -> tuple[float, float]:
    """Two magnitudes between which the `count`-th lowest lies, almost surely, by a sample.

    After Floyd & Rivest 1975.
    """
    total = sum(tensor.numel() for tensor in tensors)
    stride, seen, parts = math.ceil(total ** (1 / 3)), 0, []
    for tensor in tensors:
        parts.append(_flat(tensor)[-seen % stride :: stride])
        seen += tensor.numel()
    sample = np.sort(torch.cat(parts).abs().to(_precision(parts[0])).numpy())
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
        here = sum(int(np.count_nonzero(sizes == value)) for sizes in _sizes(tensor))
        if tied <= here:
            return Lowest(value, i, tied)
        tied -= here
    raise AssertionError("fewer are equal to the threshold than were counted")
