"""Images in memory, and what every dataset shares: the order of an epoch, batches and processes.

No random generator keeps a state. The order of an epoch is a function of (seed, epoch), and the
augmentation of a batch one of (seed, epoch, batch), so a run sees the same images whether it is
interrupted and resumed, shared between processes or moved to another device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL import Image

    Batches = Iterator[tuple[Tensor, Tensor]]

SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, eq=False)
class Split:
    """Images, uint8 of shape (N, C, H, W), and their labels, int64 of shape (N,)."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            found = f"{self.images.dtype} of shape {tuple(self.images.shape)}"
            raise ValueError(f"images must be uint8 of shape (N, C, H, W), not {found}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            found = f"{self.labels.dtype} of shape {tuple(self.labels.shape)}"
            raise ValueError(
                f"labels must be int64, one for each of {len(self)} images, not {found}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> Split:
        return Split(self.images[index], self.labels[index])

    def to(self, device: str | torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


class Batched:
    """What datasets share: the order of an epoch, and batches divided between processes."""

    train: Any
    test: Any
    # Loads batches of `train` or `test`: takes that split, (step, numbers of all images) per batch,
    # this process's slice of these numbers and, if images are to be augmented, seed and epoch.
    _load: Callable[..., Batches]

    def steps(self, batch_size: int, *, world: int = 1) -> int:
        """Return the number of training batches in an epoch, as `train_batches` makes them."""
        return count_steps(len(self.train), batch_size, world)

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Batches:
        """Return the batches of an epoch from number `start` on: float32 images and labels.

        `batch_size` is the total over `world` processes; process `rank` gets every `world`-th image
        of a batch. Every image is seen once, except that a last batch with fewer than 2 images for
        any process is left out, since batch normalisation cannot normalise a single one.
        """
        check_share(batch_size, rank, world, start, least=2)
        order = torch.randperm(len(self.train), generator=generator_of(seed, epoch))
        steps = range(start, self.steps(batch_size, world=world))
        batches = ((step, order[step * batch_size :][:batch_size]) for step in steps)
        return self._load(self.train, batches, slice(rank, None, world), seed, epoch)

    def test_batches(self, batch_size: int, *, rank: int = 0, world: int = 1) -> Batches:
        """Return the test images in order, unaugmented; each goes to one of `world` processes."""
        check_share(batch_size, rank, world)
        batches = enumerate(torch.arange(len(self.test)).split(batch_size))
        shared = (batch for batch in batches if len(batch[1]) > rank)
        return self._load(self.test, shared, slice(rank, None, world))


@dataclass(frozen=True, eq=False)
class Dataset(Batched):
    """Training and test images in memory, and how batches are made of them.

    `mean` and `std` are per channel, for pixel values in [0, 1]. `padding` is the number of black
    pixels added to each side before a random crop (0: no crop); `flip` is whether images are
    mirrored at random. `fingerprint` identifies pixels and labels; `source` is where they are from.
    """

    name: str
    source: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    fingerprint: str

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        return self.train.images.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    def to(self, device: str | torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def take(self, train: Tensor, test: Tensor) -> Dataset:
        """Return a dataset of training images alone: numbers `train` to train, `test` to test."""
        parts = self.train[train], self.train[test]
        return replace(self, train=parts[0], test=parts[1], fingerprint=fingerprint_of(*parts))

    def _load(
        self, split: Split, batches: Iterable[tuple[int, Tensor]], own: slice, *seeds: int
    ) -> Batches:
        for step, numbers in batches:
            batch = split[numbers[own].to(self.device)]
            images = batch.images
            if seeds:
                # Drawn for the whole batch, on the CPU: the same on every process and device.
                generator, count = generator_of(*seeds, step), len(numbers)
                offsets = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
                mirrored = torch.randint(2, (count,), generator=generator).bool()
                if self.padding:
                    images = random_crop(images, offsets[own].to(self.device), self.padding)
                if self.flip:
                    images = flip(images, mirrored[own].to(self.device))
            yield normalise(images, self.mean, self.std), batch.labels


def count_steps(count: int, batch_size: int, world: int = 1) -> int:
    """Return the number of batches in an epoch of `count` images; see `Batched.train_batches`."""
    check_share(batch_size, 0, world, least=2)
    full, rest = divmod(count, batch_size)
    return full + (rest >= 2 * world)


def check_share(batch_size: int, rank: int, world: int, start: int = 0, least: int = 1) -> None:
    """Check the division of batches from `start` on: `least` images for each process."""
    if start < 0:
        raise ValueError(f"start must be at least 0, not {start}")
    if world < 1:
        raise ValueError(f"world must be at least 1, not {world}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be at least 0 and less than world, {world}, not {rank}")
    if batch_size < least * world:
        raise ValueError(
            f"batch_size must be at least {least * world}, not {batch_size}: "
            f"each of {world} processes needs {least} of its images"
        )


def random_crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Return windows of the images' own size (N, C, H, W), from images padded with zeros.

    `offsets`, int64 of shape (N, 2), are the row and column of each window's first pixel, in
    [0, 2 `padding`]: (`padding`, `padding`) is the image itself.
    """
    count, _, height, width = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    each = torch.arange(count, device=images.device)
    return windows[each, :, offsets[:, 0], offsets[:, 1]]


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Return images (N, C, H, W), flipped left to right where `mirrored`, bool (N,), is true."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 images (N, C, H, W) as float32: scaled to [0, 1], minus `mean`, over `std`."""
    # 255 as a tensor: a GPU multiplies by the inverse of a number, which rounds differently.
    values = (torch.tensor(value, device=images.device) for value in (255.0, mean, std))
    scale, centre, spread = (value.view(-1, 1, 1) for value in values)
    return images.float().div_(scale).sub_(centre).div_(spread)


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator seeded by all the numbers and their order."""
    # Hashed, since neighbouring or summed seeds would give similar or equal random numbers.
    digest = hashlib.sha256(",".join(str(int(number)) for number in numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fingerprint_of(train: Split, test: Split) -> str:
    """Return 16 hexadecimal digits that identify shapes, pixels and labels."""
    digest = hashlib.sha256()
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()[:16]


def read_image(file: Path, view: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Return the pixels of `view` of the image in a file, uint8 of shape (3, height, width).

    ValueError that names the file if it cannot be decoded or `view` refuses it.
    """
    from PIL import Image

    try:
        # Of other formats, some are handed to other programs: PostScript to Ghostscript.
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            pixels = np.array(view(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
