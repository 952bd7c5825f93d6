"""Images that live on the device as uint8, and augmentation of a whole batch at once.

Nothing here keeps the state of a random generator: the order of an epoch is a function of (seed,
epoch), the augmentation of a batch one of (seed, epoch, batch). A run that is resumed, or shared
between processes, or moved to another device sees the same images as one that runs straight on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


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

    def __getitem__(self, index: Tensor) -> Split:
        return Split(self.images[index], self.labels[index])

    def to(self, device: str | torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images, and what is needed to make batches of them.

    `mean` and `std` are those of each channel, for pixel values in [0, 1]. `padding` is the number
    of black pixels put on each side before a random crop (0: no crop), `flip` says whether images
    are mirrored at random. `fingerprint` is the same whenever pixels and labels are; `source` says
    in what form they were found.
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
        """Return the dataset of these of the training images, some to train and some to test."""
        parts = self.train[train], self.train[test]
        return replace(self, train=parts[0], test=parts[1], fingerprint=fingerprint_of(*parts))

    def steps(self, batch_size: int, *, world: int = 1) -> int:
        """Return the number of training batches of an epoch, as `train_batches` makes them."""
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
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of an epoch from number `start` on: float32 images and labels.

        `batch_size` is that of all `world` processes together; process `rank` gets every
        `world`-th image of a batch. A last batch that would leave any process fewer than 2 images
        is left out, since batch normalisation cannot normalise one; every other image is seen once.
        """
        check_share(batch_size, rank, world, start, least=2)
        order = order_of(len(self.train), seed, epoch).to(self.device)
        return (
            self._train_batch(
                order[step * batch_size :][:batch_size], seed, epoch, step, rank, world
            )
            for step in range(start, self.steps(batch_size, world=world))
        )

    def _train_batch(
        self, order: Tensor, seed: int, epoch: int, step: int, rank: int, world: int
    ) -> tuple[Tensor, Tensor]:
        # Drawn for the batch of all processes, on the CPU whatever the device: all see the same.
        generator = generator_of(seed, epoch, step)
        offsets = torch.randint(2 * self.padding + 1, (len(order), 2), generator=generator)
        mirrored = torch.randint(2, (len(order),), generator=generator).bool()
        own = slice(rank, None, world)
        batch = self.train[order[own]]
        images = batch.images
        if self.padding:
            images = random_crop(images, offsets[own].to(images.device), self.padding)
        if self.flip:
            images = flip(images, mirrored[own].to(images.device))
        return normalise(images, self.mean, self.std), batch.labels

    def test_batches(
        self, batch_size: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the test images in batches, as they are: every image once, over all processes."""
        check_share(batch_size, rank, world)
        own = slice(rank, None, world)
        return (
            (normalise(images[own], self.mean, self.std), labels[own])
            for images, labels in zip(
                self.test.images.split(batch_size), self.test.labels.split(batch_size), strict=True
            )
            if len(labels) > rank
        )


def count_steps(count: int, batch_size: int, world: int = 1) -> int:
    """Return the number of batches of an epoch of `count` images; see `Dataset.train_batches`."""
    check_share(batch_size, 0, world, least=2)
    full, rest = divmod(count, batch_size)
    return full + (rest >= 2 * world)


def order_of(count: int, seed: int, epoch: int) -> Tensor:
    """Return the numbers of `count` images in the order of an epoch."""
    return torch.randperm(count, generator=generator_of(seed, epoch))


def random_crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Return windows of the images' own size (N, C, H, W), out of images padded with zeros.

    `offsets`, int64 of shape (N, 2), are the row and column of each window's first pixel, in
    [0, 2 `padding`]: (`padding`, `padding`) is the image itself.
    """
    count, _, height, width = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    each = torch.arange(count, device=images.device)
    return windows[each, :, offsets[:, 0], offsets[:, 1]]


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Return images (N, C, H, W), left and right exchanged where `mirrored` (N,) is true."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 images (N, C, H, W) as float32: scaled to [0, 1], less `mean`, over `std`."""
    # 255 as a tensor: a GPU multiplies by the inverse of a number, which rounds differently.
    values = (torch.tensor(value, device=images.device) for value in (255.0, mean, std))
    scale, centre, spread = (value.view(-1, 1, 1) for value in values)
    return images.float().div_(scale).sub_(centre).div_(spread)


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator that depends on all the numbers and on their order."""
    # A hash, since seeds that are close or added up would give streams that are alike or the same.
    digest = hashlib.sha256(",".join(str(int(number)) for number in numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fingerprint_of(train: Split, test: Split) -> str:
    digest = hashlib.sha256()
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()[:16]


def check_share(batch_size: int, rank: int, world: int, start: int = 0, least: int = 1) -> None:
    """Check how batches from `start` on are shared out, with `least` images for each process."""
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
