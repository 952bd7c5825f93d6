"""The selection and the update of SWD for single weights, at nearly the speed of memory.

Skip this file at first: `masks.lowest` selects the same weights in a few lines.

Training moves the threshold, the magnitude below which the selected weights lie, very little from
one step to the next. So on a CPU `Threshold` reads all weights once: it counts those below a narrow
band around the expected threshold and ranks only those inside the band. If the band misses, the
weights are read again; the result is exact either way. On a GPU, where the CPU must not wait for a
number, a radix select (`lowest_on_gpu`) does the same in a fixed number of passes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 18  # weights processed at a time, so that intermediate results stay in the cache

# The selected weights of a tensor: a bool mask of its shape, or a bound, which selects every weight
# whose magnitude is below it. A bound needs no memory, and ties alone need a mask.
Selected = Tensor | float


@dataclass(frozen=True)
class Lowest:
    """The lowest magnitudes of some tensors: all below `threshold`, and the first of the ties.

    The tensors are in order. Every tie in the tensors before number `split` is selected, the first
    `ties` of them in that tensor, and none in the tensors after it.
    """

    threshold: float
    split: int
    ties: int = 0

    def selected(self, i: int, tensor: Tensor) -> Selected:
        """The selected weights of `tensor`, which is number i."""
        if i == self.split:
            return self._mask(tensor)
        if i > self.split:
            return self.threshold
        return _next_above(self.threshold, _precision(tensor))

    def _mask(self, tensor: Tensor) -> Tensor:
        flat, left = tensor.detach().flatten(), self.ties
        mask = torch.empty(len(flat), dtype=torch.bool)
        for chunk, part in zip(flat.split(CHUNK), mask.split(CHUNK), strict=True):
            sizes = _magnitudes([chunk])
            tied = np.flatnonzero(sizes == self.threshold)[:left]
            part.copy_(torch.from_numpy(sizes < self.threshold))
            part[tied] = True
            left -= len(tied)
        return mask.reshape(tensor.shape)


class Threshold:
    """Finds the lowest magnitudes of the same tensors again and again, while training changes them.

    What it remembers from earlier calls changes its speed, never its result.
    """

    def __init__(self) -> None:
        self._last = self._move = math.nan
        self._width = 1e-3  # of the band on each side, relative to the threshold

    def find(self, tensors: Sequence[Tensor], count: int) -> Lowest | None:
        """The `count` lowest magnitudes, at least 1, of CPU tensors of one dtype.

        None if a weight is NaN or infinite. Of equal magnitudes the first are selected.
        """
        for low, high in self._bands(tensors, count):
            below, inside, largest = count_below(tensors, low, high)
            if not math.isfinite(largest):
                return None
            if below < count <= below + len(inside):
                found = _rank(tensors, inside, count - below)
                break
        else:
            chunks = [chunk for tensor in tensors for chunk in _chunks(tensor)]
            value, ties = radix_select(chunks, count)
            found = _split_ties(tensors, float(value), int(ties))
        self._learn(found.threshold)
        return found

    def _bands(self, tensors: Sequence[Tensor], count: int) -> Iterator[tuple[float, float]]:
        """Where the threshold is looked for, in turn."""
        if not math.isnan(self._last):
            yield self._band()
        yield _sample(tensors, count)

    def _band(self) -> tuple[float, float]:
        expected = self._last + self._move
        return expected * (1 - self._width), expected * (1 + self._width)

    def _learn(self, value: float) -> None:
        """Expect the same move again, in a band four times as wide as the last error."""
        low, high = self._band()
        if low <= value <= high:
            error = abs(value / (self._last + self._move) - 1) if value else 0.0
            self._width = max(4 * error, self._width / 2, 1e-6)
            self._move = value - self._last
        else:
            self._width = 1e-3 if math.isnan(self._last) else min(4 * self._width, 0.02)
            self._move = 0.0
        self._last = value


def are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all are floats of one common dtype, on the CPU or on one GPU."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    [dtype, device], *more = kinds
    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return not more and dtype in usual and device.type in ("cpu", "cuda")


def count_below(
    tensors: Sequence[Tensor], low: float, high: float
) -> tuple[int, np.ndarray, float]:
    """How many magnitudes are below `low`, those from `low` to `high`, and the largest (or NaN).

    An empty array if more lie in the band than would be cheap to keep.
    """
    numbers = [tensor.numel() for tensor in tensors]
    room = max(1 << 16, max(numbers) // 4, sum(numbers) // 64)
    bounds = torch.tensor([low, high], dtype=_precision(tensors[0])).numpy()
    below, inside, largest = 0, [bounds[:0]], [0.0]
    for sizes in map(_magnitudes, _batches(tensors)):
        under, up_to = sizes < bounds[0], sizes <= bounds[1]
        found = np.flatnonzero(np.not_equal(under, up_to, out=up_to))
        below, room = below + int(np.count_nonzero(under)), room - len(found)
        inside.append(sizes[found] if room >= 0 else bounds[:0])
        largest.append(sizes.max())
    return below, np.concatenate(inside if room >= 0 else inside[:1]), float(np.max(largest))


def _sample(tensors: Sequence[Tensor], count: int) -> tuple[float, float]:
    """Two magnitudes with the `count`-th lowest almost surely between them (Floyd & Rivest 1975).

    They lie four standard deviations to each side of its place in an evenly spaced sample.
    """
    total = sum(tensor.numel() for tensor in tensors)
    stride, seen, parts = math.ceil(total ** (1 / 3)), 0, []
    for tensor in tensors:
        parts.append(_flat(tensor)[-seen % stride :: stride])
        seen += tensor.numel()
    sample = np.sort(torch.cat(parts).abs().to(_precision(parts[0])).numpy())
    last, share = len(sample) - 1, count / total
    margin = 4 * math.sqrt(len(sample) * share * (1 - share)) + 1
    low, high = (min(max(round(share * last + m), 0), last) for m in (-margin, margin))
    return float(sample[low]), float(sample[high])


def _rank(tensors: Sequence[Tensor], inside: np.ndarray, count: int) -> Lowest:
    value = np.partition(inside, count - 1)[count - 1]
    ties = count - int(np.count_nonzero(inside < value))
    if ties == np.count_nonzero(inside == value):
        return Lowest(float(value), len(tensors))
    return _split_ties(tensors, float(value), ties)


def _split_ties(tensors: Sequence[Tensor], value: float, ties: int) -> Lowest:
    """`Lowest` with the first `ties` of the weights of magnitude `value`."""
    for i, tensor in enumerate(tensors):
        here = sum(int(np.count_nonzero(_magnitudes([c]) == value)) for c in _chunks(tensor))
        if ties <= here:
            return Lowest(value, i, ties)
        ties -= here
    raise AssertionError("fewer weights equal the threshold than were counted")


# Reading weights in the order of memory -----------------------------------------------------------


def _precision(tensor: Tensor) -> torch.dtype:
    """The dtype in which magnitudes are compared: NumPy lacks bfloat16 and is slow at float16."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _next_above(value: float, precision: torch.dtype) -> float:
    number = np.float64(value) if precision == torch.float64 else np.float32(value)
    return float(np.nextafter(number, number.dtype.type(math.inf)))


def _by_stride(tensor: Tensor) -> list[int]:
    """The dimensions in the order in which they lie in memory."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _flat(tensor: Tensor) -> Tensor:
    """The elements in the order of memory; a copy only if there are gaps between them."""
    tensor = tensor.detach()
    return (tensor if tensor.is_contiguous() else tensor.permute(_by_stride(tensor))).flatten()


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    flat = _flat(tensor)
    return flat.split(CHUNK) if len(flat) > CHUNK else [flat][: len(flat)]


def _batches(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """All weights in batches of at most CHUNK: large tensors in chunks, small ones together."""
    batches: list[list[Tensor]] = []
    room = 0
    for chunk in (chunk for tensor in tensors for chunk in _chunks(tensor)):
        if len(chunk) > room:
            batches.append([])
            room = CHUNK
        batches[-1].append(chunk)
        room -= len(chunk)
    return batches


def _magnitudes(batch: Sequence[Tensor]) -> np.ndarray:
    # In NumPy: torch would share each of these small tasks among threads and wait for them.
    parts = [chunk.to(_precision(chunk)).numpy() for chunk in batch]
    return np.abs(parts[0] if len(parts) == 1 else np.concatenate(parts))


# Radix select: for GPUs, and where ties or an unlucky sample leave no narrow band -----------------

DIGIT = 11  # bits per pass
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


def radix_select(chunks: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The `count`-th lowest magnitude, and how many of its ties are among the lowest: 0-d tensors.

    The bits of non-negative floats order as the floats do, so each pass fixes the next 11 bits of
    the answer by a histogram. The passes, two to six, depend on the dtype alone, and the CPU never
    waits for the GPU.
    """
    integer, size = INTEGERS[chunks[0].element_size()], 1 << DIGIT
    prefix = torch.zeros((), dtype=torch.int64, device=chunks[0].device)
    rank = prefix + count
    for shift in reversed(range(0, 8 * chunks[0].element_size() - 1, DIGIT)):
        histogram = torch.zeros(2 * size, dtype=torch.int64, device=prefix.device)
        for chunk in chunks:
            key = chunk.abs().view(integer).long() >> shift
            # Weights whose higher bits differ from the prefix are counted in the upper half.
            digit = (key & (size - 1)) + size * (key >> DIGIT != prefix)
            histogram.scatter_add_(0, digit, torch.ones_like(digit))
        reached = histogram[:size].cumsum(0)
        digit = (reached < rank).sum()
        rank = rank - (reached - histogram[:size]).take(digit)
        prefix = (prefix << DIGIT) | digit
    return prefix.to(integer).view(chunks[0].dtype), rank


def lowest_on_gpu(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Bool masks of the `count` lowest magnitudes, in the tensors' shapes.

    The CPU does not wait for the GPU, and so cannot notice NaN or infinity.
    """
    flat = torch.cat([tensor.detach().abs().flatten() for tensor in tensors])
    value, ties = radix_select([flat], count)
    tied = flat == value
    mask = (flat < value) | (tied & (tied.cumsum(0) <= ties))
    parts = mask.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


# The update of the selected weights ---------------------------------------------------------------


def add_(gradient: Tensor, weight: Tensor, selected: Selected, scale: float) -> None:
    """Add `scale` times the selected weights to the gradient, in place."""
    for w, g, s in _views(weight, gradient, selected):
        g.add_(_masked(w, s), alpha=scale)


def divide_(weight: Tensor, selected: Selected, factor: float) -> None:
    """Divide the selected weights by `factor`, in place."""
    for w, _, s in _views(weight, weight, selected):
        part = _masked(w, s)
        w.sub_(part).add_(part.div_(factor))  # exact: the selected are zero in between


def _masked(weight: Tensor, selected: Selected) -> Tensor:
    """The selected weights, with zeros in place of all others."""
    if isinstance(selected, Tensor):
        # As integers, since torch is slow at bool tensors; once where an expanded mask repeats.
        one = tuple(slice(None if stride else 1) for stride in selected.stride())
        return weight * selected[one].view(torch.uint8)
    # hardtanh passes a gradient only where -bound < w < bound: a masked copy in a single pass.
    return torch.ops.aten.hardtanh_backward(weight, weight, -selected, selected)


def _views(
    weight: Tensor, other: Tensor, selected: Selected
) -> Iterable[tuple[Tensor, Tensor, Selected]]:
    """Views that together cover both tensors, of about CHUNK weights each."""
    if weight.numel() <= CHUNK:
        return [(weight, other, selected)]
    if isinstance(selected, Tensor):
        rows = max(1, CHUNK * len(weight) // weight.numel())
        return zip(*(tensor.split(rows) for tensor in (weight, other, selected)), strict=True)
    flats = [weight, other]
    if not all(tensor.is_contiguous() for tensor in flats):
        dims = _by_stride(weight)
        flats = [tensor.permute(dims) for tensor in flats]
    if not all(tensor.is_contiguous() for tensor in flats):
        return [(weight, other, selected)]
    pairs = zip(*(tensor.view(-1).split(CHUNK) for tensor in flats), strict=True)
    return ((w, o, selected) for w, o in pairs)
