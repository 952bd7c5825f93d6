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

from swdlib.data.images import check_share, count_steps, generator_of, normalise, order_of

if TYPE_CHECKING:
    from PIL import Image

    View = Callable[[int, Image.Image], Image.Image]
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

CLASSES = 1000
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, eq=False)
class Files:
    """Images in the folder `root`: their names there, sizes in bytes, and labels.

    All are arrays: processes share their memory, which a list of a million names would not allow.
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
    """Return the images in `root`/train and `root`/val, or all there are: one folder of images.

    This is torchvision's layout once it has unpacked the archives. If there is but one of the two,
    or <wnid>/* in `root` itself, the list has one element. Looked for as well is `root`/imagenet.
    FileNotFoundError if there is none of this, ValueError if a folder is not ImageNet's.
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
        f"ImageNet was not found: put its images where {root}/train/<wnid>/* and "
        f"{root}/val/<wnid>/* find them (torchvision.datasets.ImageNet unpacks the archives)"
    )


def _wnids(place: Path) -> list[str]:
    return sorted(folder.name for folder in place.iterdir() if folder.is_dir())


def find_files(place: Path) -> Files:
    """Return the images in a folder as <wnid>/*; a label is the place of its wnid among them.

    FileNotFoundError if there are no images, ValueError if there are not 1,000 classes.
    """
    wnids = _wnids(place)
    if len(wnids) != CLASSES:
        raise ValueError(
            f"{place} must have a folder for each of ImageNet's {CLASSES} classes, or labels would "
            f"be wrong; it has {len(wnids)}"
        )
    found = [(name, size, n) for n, wnid in enumerate(wnids) for name, size in _list(place / wnid)]
    if not found:
        raise FileNotFoundError(f"the folders in {place} hold no JPEG or PNG")
    names, sizes, labels = zip(*found, strict=True)
    return Files(place, np.array(names), np.array(sizes, np.int64), torch.tensor(labels))


def _list(folder: Path) -> list[tuple[bytes, int]]:
    """Return the images in a folder, by name: <its name>/<theirs>, and their sizes in bytes."""
    with os.scandir(folder) as entries:
        images = [e for e in entries if e.name.lower().endswith(SUFFIXES)]
        return sorted((os.fsencode(f"{folder.name}/{e.name}"), e.stat().st_size) for e in images)


def fingerprint_of_files(*splits: Files) -> str:
    """Return 16 digits that stand for names, sizes and labels; what is in the files is not read."""
    digest = hashlib.sha256()
    for files in splits:
        digest.update(f"{len(files)}\n".encode() + b"\n".join(files.names.tolist()))
        digest.update(files.sizes.tobytes() + files.labels.numpy().tobytes())
    return digest.hexdigest()[:16]


def read_image(file: Path, view: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Return what `view` makes of the image in a file, as uint8 of shape (3, height, width).

    ValueError that names the file if it is damaged.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = np.array(view(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


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
