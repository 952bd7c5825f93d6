"""Readings: one pass over the weights of many tensors, at nearly the speed of memory.

Large tensors are read in pieces and small ones together, so that what is made of them stays small.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 18  # weights that are worked on at a time: what is made of them stays in the cache
LEAST = 1 << 14  # weights from which on a call of compiled code pays
BLOCK = 256  # weights of which compiled code says whether some lie in the band


def precision_of(tensor: Tensor) -> torch.dtype:
    """In what magnitudes are compared: NumPy has no bfloat16 and is slow at float16."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def flattened(tensor: Tensor) -> Tensor:
    """The elements in a row, in the order of memory; a copy only if there are gaps between them."""
    tensor = tensor.detach()
    return (tensor if tensor.is_contiguous() else tensor.permute(order(tensor))).flatten()


def order(tensor: Tensor) -> list[int]:
    """The dimensions in the order in which they lie in memory."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def pieces_of(tensor: Tensor) -> Sequence[Tensor]:
    """The elements in the order of memory, in parts of at most PIECE."""
    flat = flattened(tensor)
    return flat.split(PIECE) if len(flat) > PIECE else [flat][: len(flat)]


def _runs(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """All weights in runs of at most PIECE: large tensors in pieces, small ones put together."""
    runs: list[list[Tensor]] = []
    room = 0
    for piece in (piece for tensor in tensors for piece in pieces_of(tensor)):
        if len(piece) > room:
            runs.append([])
            room = PIECE
        runs[-1].append(piece)
        room -= len(piece)
    return runs


def sizes_of(run: Sequence[Tensor]) -> np.ndarray:
    """The magnitudes of some parts, one after the other."""
    # By NumPy: torch would divide each of these small tasks between threads, and wait for them.
    parts = [piece.to(precision_of(piece)).numpy() for piece in run]
    return np.abs(parts[0] if len(parts) == 1 else np.concatenate(parts))


def read(tensors: Sequence[Tensor], low: float, high: float) -> tuple[int, np.ndarray, float]:
    """How many magnitudes lie below `low`, those from `low` to `high`, and the largest, or NaN.

    Of a band that holds so many that they would take much memory, none are returned.
    """
    numbers = [tensor.numel() for tensor in tensors]
    room = max(1 << 16, max(numbers) // 4, sum(numbers) // 64)
    bounds = torch.tensor([low, high], dtype=precision_of(tensors[0])).numpy()
    below, between, largest = 0, [bounds[:0]], [0.0]
    for sizes in map(sizes_of, _runs(tensors)):
        under, inside = sizes < bounds[0], sizes <= bounds[1]
        found = np.flatnonzero(np.not_equal(under, inside, out=inside))
        below, room = below + int(np.count_nonzero(under)), room - len(found)
        between.append(sizes[found] if room >= 0 else bounds[:0])
        largest.append(sizes.max())
    return below, np.concatenate(between if room >= 0 else between[:1]), float(np.max(largest))


def read_compiled(
    tensors: Sequence[Tensor], low: float, high: float
) -> tuple[int, np.ndarray, float]:
    """As `read`: compiled code counts by blocks; the few that reach the band are read again.

    Nothing is found if so many do that reading all of them at once is faster.
    """
    flats = [flattened(tensor) for tensor in tensors]
    whole = [len(f) // BLOCK * BLOCK if len(f) >= LEAST else 0 for f in flats]
    large = [f[:n].view(-1, BLOCK) for f, n in zip(flats, whole, strict=True) if n]
    if not large or large[0].dtype != torch.float32:
        return read(tensors, low, high)
    bounds = torch.tensor([low, high])
    counts = compiled(_count)(large, bounds)
    under, inside, largest = (torch.cat(parts) for parts in zip(*counts, strict=True))
    hit = inside > under
    if hit.count_nonzero() > len(hit) // 8:
        return 0, np.empty(0), 0.0
    rest = [f[n:] for f, n in zip(flats, whole, strict=True)]
    rest += [blocks[h] for blocks, h in zip(large, hit.split([*map(len, large)]), strict=True)]
    below, between, top = read([torch.cat([r.flatten() for r in rest])], low, high)
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
