"""ImageNet, too large for memory: other processes decode it while a network trains.

As in `images`, no random generator is kept: how an image is cropped is a function of (seed, epoch,
image), whoever decodes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Indexed

from swdlib.folders import CLASSES, Files, find_splits, fingerprint_of_files, read_image
from swdlib.images import check_share, count_steps, generator_of, normalise, order_of

if TYPE_CHECKING:
    from PIL import Image

    View = Callable[[int, Image.Image], Image.Image]

SIZE, RESIZED = 224, 256  # what is seen of an image, and its shorter side before that in tests
TEST_BATCH = 250  # 1,000 images of this size would take gigabytes in each layer of a network
MOST_WORKERS = 32  # each holds two batches that are ready, of 256 images 77 MB
CPU = torch.device("cpu")


def count_workers() -> int:
    """Return how many processes decode: the processors that one that trains has to itself."""
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    share = processors // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(1, share), MOST_WORKERS)


def load_image_folders(root: Path | None) -> ImageFolders:
    """Return ImageNet (arXiv 1409.0575) as `find_splits` finds it; None is `data`.

    All images are to train, and none to test, if there is one folder of them.
    """
    train, *rest = find_splits(Path("data") if root is None else root)
    test = rest[0] if rest else train[torch.arange(0)]
    source = "folders train and val" if rest else "one folder of images"
    return ImageFolders("imagenet", source, train, test)


@dataclass(frozen=True, eq=False)
class ImageFolders:
    """ImageNet's images in files, with the methods of `images.Dataset`.

    In training, a rectangle of 8 to 100 % of the image and of ratio 3:4 to 4:3 is scaled to 224 x
    224 pixels and mirrored at random; in tests, the shorter side is scaled to 256 pixels and the
    centre of 224 x 224 seen. `mean` and `std` are those of each channel, for pixel values in
    [0, 1]. `workers` processes decode; 0: the one that trains.
    """

    name: str
    source: str
    train: Files
    test: Files
    workers: int = field(default_factory=count_workers)
    device: torch.device = CPU
    classes: int = CLASSES
    channels: int = 3
    size: int = SIZE
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def fingerprint(self) -> str:
        """The same whenever the files' names, sizes and labels are; their content is not read."""
        return fingerprint_of_files(self.train, self.test)

    def to(self, device: str | torch.device) -> ImageFolders:
        return replace(self, device=torch.device(device))

    def take(self, train: Tensor, test: Tensor) -> ImageFolders:
        """Return the dataset of these of the training images, some to train and some to test."""
        return replace(self, train=self.train[train], test=self.train[test])

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
        """Return the batches of an epoch from number `start` on, as `images.Dataset` does."""
        check_share(batch_size, rank, world, start, least=2)
        order = order_of(len(self.train), seed, epoch)
        own = (
            order[step * batch_size :][:batch_size][rank::world]
            for step in range(start, self.steps(batch_size, world=world))
        )
        return self._batches(self.train, own, partial(_cropped, _random_crop(), seed, epoch))

    def test_batches(
        self, batch_size: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the test images in batches of at most 250, as `images.Dataset` does."""
        check_share(batch_size, rank, world)
        every = torch.arange(len(self.test)).split(min(batch_size, max(TEST_BATCH, world)))
        own = (images[rank::world] for images in every if len(images) > rank)
        return self._batches(self.test, own, partial(_seen, _central_crop()))

    def _batches(
        self, files: Files, chosen: Iterable[Tensor], view: View
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for found in DataLoader(
            _Decoder(files, view),
            sampler=chosen,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one
        ):
            if isinstance(found, ValueError):
                raise found
            images, labels = (part.to(self.device, non_blocking=True) for part in found)
            yield normalise(images, self.mean, self.std), labels


class _Decoder(Indexed[Any]):
    """From the numbers of a batch's files to its images, uint8, and labels."""

    def __init__(self, files: Files, view: View) -> None:
        self.files, self.view = files, view

    def __getitem__(self, numbers: Tensor) -> tuple[Tensor, Tensor] | ValueError:
        images = torch.empty((len(numbers), 3, SIZE, SIZE), dtype=torch.uint8)
        try:
            for image, number in zip(images, numbers.tolist(), strict=True):
                image[:] = read_image(self.files.path(number), partial(self.view, number))
        except ValueError as error:
            return error  # raised in another process, it would come with a traceback for a message
        return images, self.files.labels[numbers]


def _random_crop() -> Any:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()])


def _central_crop() -> Any:
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(RESIZED), v2.CenterCrop(SIZE)])


def _cropped(crop: Any, seed: int, epoch: int, number: int, image: Image.Image) -> Image.Image:
    # torchvision's crops draw from the global generator of the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator_of(seed, epoch, number).initial_seed())
        cropped: Image.Image = crop(image)
    return cropped


def _seen(crop: Any, number: int, image: Image.Image) -> Image.Image:
    cropped: Image.Image = crop(image)
    return cropped
