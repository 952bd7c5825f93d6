"""ImageNet, too large for memory: worker processes decode it while a network trains.

As in `images`, no random generator keeps a state: how an image is cropped is a function of (seed,
epoch, image), whichever worker decodes it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Indexed

from swdlib.data.images import SUFFIXES, Batched, generator_of, normalise, read_image

if TYPE_CHECKING:
    from PIL import Image

CLASSES = 1000
SIZE = 224  # of the images that a network sees, in pixels a side
# Test images are evaluated as torchvision's ResNets are: the shorter side is scaled to 256 pixels,
# then the centre is cut out. `lab.pretrained` cuts first and scales once, as its network expects.
SHORTER_SIDE = 256
TEST_BATCH = 250  # 1,000 images of this size would take gigabytes in each layer of a network
MOST_WORKERS = 32  # each holds two batches ready, 77 MB for batches of 256 images
CPU = torch.device("cpu")


# The files ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Files:
    """Images in the folder `root`: their names in it, sizes in bytes, and labels.

    All are arrays, since processes can share an array's memory but not that of a million strings.
    """

    root: Path
    names: np.ndarray
    sizes: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Tensor) -> Files:
        chosen = index.numpy()
        return Files(self.root, self.names[chosen], self.sizes[chosen], self.labels[index])

    def path(self, number: int) -> Path:
        return self.root / os.fsdecode(self.names[number])


def find_splits(root: Path) -> list[Files]:
    """Return the images in `root`/train and `root`/val, or in `root`/imagenet/train and /val.

    This is the layout in which torchvision unpacks the archives. The list has one element if only
    one of the two folders is there, or if `root` itself holds <wnid>/*. FileNotFoundError if
    nothing is found, ValueError if a folder is not ImageNet's.
    """
    for place in (root, root / "imagenet"):
        found = [place / name for name in ("train", "val") if (place / name).is_dir()]
        if not found and any(place.glob("n[0-9]*")):
            found = [place]
        if len({tuple(_wnids(split)) for split in found}) > 1:
            raise ValueError(f"{place}/train and {place}/val must have the same classes")
        if found:
            return [find_files(split) for split in found]
    raise FileNotFoundError(
        f"ImageNet was not found: put its images in {root}/train/<wnid>/ and {root}/val/<wnid>/ "
        "(torchvision.datasets.ImageNet unpacks the archives like this)"
    )


def find_files(place: Path) -> Files:
    """Return the images <wnid>/* in a folder; a label is the index of its wnid in sorted order.

    FileNotFoundError if there are no images, ValueError if there are not 1,000 classes.
    """
    wnids = _wnids(place)
    if len(wnids) != CLASSES:
        raise ValueError(
            f"{place} must have a folder for each of ImageNet's {CLASSES} classes, or labels would "
            f"be wrong; it has {len(wnids)}"
        )
    found: list[tuple[bytes, int, int]] = []
    for label, wnid in enumerate(wnids):
        with os.scandir(place / wnid) as entries:
            found += sorted(
                (os.fsencode(f"{wnid}/{entry.name}"), entry.stat().st_size, label)
                for entry in entries
                if entry.name.lower().endswith(SUFFIXES)
            )
    if not found:
        raise FileNotFoundError(f"the folders in {place} hold no JPEG or PNG")
    names, sizes, labels = zip(*found, strict=True)
    return Files(place, np.array(names), np.array(sizes, np.int64), torch.tensor(labels))


def _wnids(place: Path) -> list[str]:
    return sorted(folder.name for folder in place.iterdir() if folder.is_dir())


def fingerprint_of_files(*splits: Files) -> str:
    """Return 16 hexadecimal digits that identify names, sizes and labels; no image is read."""
    digest = hashlib.sha256()
    for files in splits:
        digest.update(f"{len(files)}\n".encode() + b"\n".join(files.names.tolist()))
        digest.update(files.sizes.tobytes() + files.labels.numpy().tobytes())
    return digest.hexdigest()[:16]


# The dataset --------------------------------------------------------------------------------------


def count_workers() -> int:
    """Return the number of processes that decode: this training process's share of the CPUs."""
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    share = processors // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(1, share), MOST_WORKERS)


def load_image_folders(root: Path | None) -> ImageFolders:
    """Return ImageNet (arXiv 1409.0575) as `find_splits` finds it in `root` (None: `data`).

    If only one folder of images is found, all are to train on and none to test.
    """
    train, *rest = find_splits(Path("data") if root is None else root)
    test = rest[0] if rest else train[torch.arange(0)]
    source = "folders train and val" if rest else "one folder of images"
    return ImageFolders("imagenet", source, train, test)


@dataclass(frozen=True, eq=False)
class ImageFolders(Batched):
    """ImageNet's images in files, with the methods of `images.Dataset`.

    For training, a random rectangle with 8 to 100 % of the image's area and an aspect ratio of 3:4
    to 4:3 is scaled to 224 x 224 pixels and mirrored at random; for tests, the shorter side is
    scaled to 256 pixels and the central 224 x 224 are cut out. `mean` and `std` are per channel,
    for pixel values in [0, 1]. `workers` processes decode; 0: the one that trains does.
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
        """Identifies the files' names, sizes and labels; their content is not read."""
        return fingerprint_of_files(self.train, self.test)

    def to(self, device: str | torch.device) -> ImageFolders:
        return replace(self, device=torch.device(device))

    def take(self, train: Tensor, test: Tensor) -> ImageFolders:
        """Return a dataset of training images alone: numbers `train` to train, `test` to test."""
        return replace(self, train=self.train[train], test=self.train[test])

    def test_batches(
        self, batch_size: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the test images as `images.Dataset` does, but at most 250 in a batch."""
        size = min(batch_size, max(TEST_BATCH, world))
        return super().test_batches(size, rank=rank, world=world)

    def _load(
        self, split: Files, batches: Iterable[tuple[int, Tensor]], own: slice, *seeds: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        from torchvision.transforms import v2

        random = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()]
        central = [v2.Resize(SHORTER_SIDE), v2.CenterCrop(SIZE)]
        for found in DataLoader(
            _Decoder(split, v2.Compose(random if seeds else central), seeds),
            sampler=(numbers[own] for _, numbers in batches),
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
    """The images, uint8, and labels of a batch, given the numbers of its files."""

    def __init__(self, files: Files, crop: Any, seeds: tuple[int, ...]) -> None:
        self.files, self.crop, self.seeds = files, crop, seeds

    def __getitem__(self, numbers: Tensor) -> tuple[Tensor, Tensor] | ValueError:
        images = torch.empty((len(numbers), 3, SIZE, SIZE), dtype=torch.uint8)
        try:
            for image, number in zip(images, numbers.tolist(), strict=True):
                image[:] = read_image(self.files.path(number), partial(self._view, number))
        except ValueError as error:
            return error  # raised in a worker, it would reach the user as a traceback in a string
        return images, self.files.labels[numbers]

    def _view(self, number: int, image: Image.Image) -> Image.Image:
        # torchvision's random crops draw from the CPU's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator_of(*self.seeds, number).initial_seed())
            cropped: Image.Image = self.crop(image.convert("RGB"))
        return cropped
