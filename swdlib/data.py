"""Datasets that live on the device as uint8, and augmentation of a whole batch at once.

Nothing here keeps the state of a random generator: the order of an epoch is a function of (seed,
epoch), the augmentation of a batch one of (seed, epoch, batch). A run that is resumed, or shared
between processes, or moved to another device sees the same images as one that runs straight on.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import pickle
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from swdlib.files import write_whole

HOLDOUT_SEED = 2020


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

    def to(self, device: str | torch.device) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def steps(self, batch_size: int, *, world: int = 1) -> int:
        """Return the number of training batches of an epoch, as `train_batches` makes them."""
        _check_share(batch_size, 0, world, least=2)
        full, rest = divmod(len(self.train), batch_size)
        return full + (rest >= 2 * world)

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
        _check_share(batch_size, rank, world, least=2)
        if start < 0:
            raise ValueError(f"start must be at least 0, not {start}")
        order = torch.randperm(len(self.train), generator=_generator(seed, epoch))
        order = order.to(self.train.images.device)
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
        generator = _generator(seed, epoch, step)
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
        _check_share(batch_size, rank, world)
        own = slice(rank, None, world)
        return (
            (normalise(images[own], self.mean, self.std), labels[own])
            for images, labels in zip(
                self.test.images.split(batch_size), self.test.labels.split(batch_size), strict=True
            )
            if len(labels) > rank
        )


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


def load_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    holdout: float = 0.0,
) -> Dataset:
    """Return the dataset `name`, a key of `DATASETS`, its images on `device`.

    `root` is the folder where the files are, or the published archive itself; None is `data` in the
    current folder. `holdout` is the fraction, in [0, 1), of the training images that takes the
    place of the test images, which are then not kept: a method is tuned without a look at them.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {name!r}")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be in [0, 1), not {holdout}")
    data = DATASETS[name](None if root is None else Path(root).expanduser())
    return (_hold_out(data, holdout) if holdout else data).to(device)


def _hold_out(data: Dataset, fraction: float) -> Dataset:
    count = round(fraction * len(data.train))
    if not 1 <= count <= len(data.train) - 2:
        left = f"{len(data.train) - count} of {len(data.train)} training images"
        raise ValueError(f"holdout must take 1 image and leave 2, not {fraction}: {left} remain")
    # One permutation for all fractions: a smaller holdout is a part of a larger one.
    order = torch.randperm(len(data.train), generator=_generator(HOLDOUT_SEED))
    train, test = data.train[order[count:]], data.train[order[:count]]
    return replace(data, train=train, test=test, fingerprint=_fingerprint(train, test))


def _generator(*numbers: int) -> torch.Generator:
    """Return a generator that depends on all the numbers and on their order."""
    # A hash, since seeds that are close or added up would give streams that are alike or the same.
    digest = hashlib.sha256(",".join(str(int(number)) for number in numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _fingerprint(train: Split, test: Split) -> str:
    digest = hashlib.sha256()
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _check_share(batch_size: int, rank: int, world: int, least: int = 1) -> None:
    """Check how batches are shared out, with `least` images for each process."""
    if world < 1:
        raise ValueError(f"world must be at least 1, not {world}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be at least 0 and less than world, {world}, not {rank}")
    if batch_size < least * world:
        raise ValueError(
            f"batch_size must be at least {least * world}, not {batch_size}: "
            f"each of {world} processes needs {least} of its images"
        )


# Digits ------------------------------------------------------------------------------------------


def _digits(root: Path | None) -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 1,437 to train and 360 to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images.astype(np.int64) * 255 // 16).to(torch.uint8)
    everything = Split(pixels[:, None], torch.from_numpy(found.target.astype(np.int64)))
    # The digits come writer by writer, hence shuffled; the seed is a constant of this dataset.
    order = torch.randperm(len(everything), generator=_generator(1797))
    train, test = everything[order[:1437]], everything[order[1437:]]
    return Dataset(
        name="digits",
        source="scikit-learn",
        train=train,
        test=test,
        classes=10,
        mean=(0.3039,),
        std=(0.3756,),
        padding=0,
        flip=False,
        fingerprint=_fingerprint(train, test),
    )


# CIFAR-10 ----------------------------------------------------------------------------------------

# In the order of the labels.
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CIFAR10_FILES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


@dataclass(frozen=True)
class _Source:
    """A form in which CIFAR-10 comes; `find` raises FileNotFoundError if a folder has it not."""

    name: str
    find: Callable[[Path], list[Path]]
    read: Callable[[Sequence[Path]], tuple[Split, Split]]
    slow: bool  # hence worth a cache


def _cifar10(root: Path | None) -> Dataset:
    """Return CIFAR-10 (Krizhevsky 2009) from the first source there is, else from a download."""
    root = Path("data") if root is None else root
    places = [root] if root.is_file() else [root, root / "cifar10"]
    tried = []
    for place in places:
        for source in _SOURCES:
            try:
                files = source.find(place)
            except FileNotFoundError as error:
                tried.append(f"{source.name}: {error}")
            else:
                return _decoded(source, place, files)
    for place in places:
        # A cache alone will do: what it was made of may have been deleted to save space.
        for path in sorted(place.glob("cifar10-*.safetensors")):
            if data := _load_cache(path):
                return data
        tried.append(f"decoded images: no {place}/cifar10-*.safetensors")
    return _decoded(_ARCHIVE, root, [_download(root, tried)])


def _cifar10_dataset(train: Split, test: Split, source: str) -> Dataset:
    for split in (train, test):
        if split.images.shape[1:] != (3, 32, 32):
            raise ValueError(f"images must be (3, 32, 32), not {tuple(split.images.shape[1:])}")
        if split.labels.unique().tolist() != list(range(10)):
            raise ValueError(f"labels must be 0 to 9, not {split.labels.unique().tolist()}")
    return Dataset(
        name="cifar10",
        source=source,
        train=train,
        test=test,
        classes=10,
        # Of all the pixels of a channel; 0.2023, 0.1994, 0.2010 are often seen, but are not that.
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        padding=4,
        flip=True,
        fingerprint=_fingerprint(train, test),
    )


def _find_files(folder: str, suffix: str, place: Path) -> list[Path]:
    files = [place / folder / f"{name}{suffix}" for name in CIFAR10_FILES]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no {file}")
    return files


def _read_files(files: Sequence[Path]) -> tuple[Split, Split]:
    return _decode({file.name: file.read_bytes() for file in files}, files[0].parent)


def _find_archive(name: str, place: Path) -> list[Path]:
    archive = place if place.is_file() else place / name
    if not archive.is_file():
        raise FileNotFoundError(f"no {archive}")
    return [archive]


def _read_archive(files: Sequence[Path]) -> tuple[Split, Split]:
    """Read the members that are wanted, by name; nothing is unpacked to disk."""
    contents = {}
    try:
        # Unpacked as a whole, since only the end has the checksum, and tarfile does not go there.
        whole = io.BytesIO(gzip.decompress(files[0].read_bytes()))
        with tarfile.open(fileobj=whole) as archive:
            for member in archive:
                name = Path(member.name).name
                wanted = name.removesuffix(".bin") in CIFAR10_FILES
                if wanted and (file := archive.extractfile(member)):
                    contents[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{files[0]} is damaged, fetch it again: {error}") from error
    return _decode(contents, files[0])


def _decode(contents: Mapping[str, bytes], where: Path) -> tuple[Split, Split]:
    binary = "test_batch.bin" in contents
    names = [f"{name}.bin" if binary else name for name in CIFAR10_FILES]
    if missing := [name for name in names if name not in contents]:
        raise ValueError(f"{where} is not CIFAR-10, or not all of it: no {', '.join(missing)}")
    decode = _decode_binary if binary else _decode_pickle
    try:
        *train, test = (decode(contents[name]) for name in names)
        images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
        return Split(images, labels), Split(*test)
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{where} cannot be read as CIFAR-10: {error!r}") from error


def _decode_binary(raw: bytes) -> tuple[Tensor, Tensor]:
    """Decode records of 3,073 bytes: a label, then the pixels."""
    records = torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, 3073).copy())
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


def _decode_pickle(raw: bytes) -> tuple[Tensor, Tensor]:
    batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    # The last of the parts that numpy saves of an array is its content.
    pixels = np.frombuffer(batch[b"data"].parts[-1], np.uint8).reshape(-1, 3, 32, 32)
    return torch.from_numpy(pixels.copy()), torch.tensor(batch[b"labels"], dtype=torch.int64)


class _Unpickler(pickle.Unpickler):
    """Reads a pickle without running any code of its choice.

    A pickle names functions that are then called, whatever they do. Here the names of numpy, all
    that the published files hold, give an object that does nothing; any other name is refused.
    """

    def find_class(self, module: str, name: str) -> type[_Parts]:
        if module.split(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a file of images")
        return _Parts


class _Parts:
    """Stands for an object of numpy and keeps the parts that were saved of it."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts


def _find_images(place: Path) -> list[Path]:
    folders = [place / part / name for part in ("train", "test") for name in CIFAR10_CLASSES]
    if not any(folder.is_dir() for folder in folders):
        raise FileNotFoundError(f"no {place}/train/<class>/*.jpg and {place}/test/<class>/*.jpg")
    files = []
    for folder in folders:
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        images = [n for n in names if n.lower().endswith((".jpg", ".jpeg", ".png"))]
        if not images:
            raise ValueError(f"{folder} must have images, as all classes of CIFAR-10: it has none")
        files += [folder / name for name in images]
    return files


def _read_images(files: Sequence[Path]) -> tuple[Split, Split]:
    # One thread: images are so small that threads wait for one another, and two are slower.
    from tqdm import tqdm

    images = torch.empty((len(files), 3, 32, 32), dtype=torch.uint8)
    for index, file in enumerate(tqdm(files, desc="decoding CIFAR-10", unit=" images")):
        images[index] = _read_image(file)
    labels = torch.tensor([CIFAR10_CLASSES.index(file.parent.name) for file in files])
    train = sum(file.parent.parent.name == "train" for file in files)
    return Split(images[:train], labels[:train]), Split(images[train:], labels[train:])


def _read_image(file: Path) -> Tensor:
    from PIL import Image

    try:
        with Image.open(file) as image:
            mode, size, pixels = image.mode, image.size, np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error
    if mode != "RGB" or size != (32, 32):
        raise ValueError(f"{file} must be an RGB image of 32 x 32 pixels, not {mode} of {size}")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _download(root: Path, tried: Sequence[str]) -> Path:
    """Fetch the published archive into `root`, whole or not at all; `tried` is for the error."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    archive = root / CIFAR10.filename
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            download_url(CIFAR10.url, folder, CIFAR10.filename, CIFAR10.tgz_md5)
            os.replace(Path(folder) / CIFAR10.filename, archive)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        ways = "".join(f"\n- {way}" for way in [*tried, f"download to {archive}: {error}"])
        raise FileNotFoundError(
            "CIFAR-10 was not found, nor downloaded. Put it where one of these looks, or give the "
            f"folder or the archive as root:{ways}"
        ) from error
    return archive


_ARCHIVE = _Source(
    "archive", partial(_find_archive, "cifar-10-python.tar.gz"), _read_archive, slow=True
)
_SOURCES = (
    _Source("files", partial(_find_files, "cifar-10-batches-py", ""), _read_files, slow=False),
    _Source("files", partial(_find_files, "cifar-10-batches-bin", ".bin"), _read_files, slow=False),
    _ARCHIVE,
    _Source("archive", partial(_find_archive, "cifar-10-binary.tar.gz"), _read_archive, slow=True),
    _Source("image folder", _find_images, _read_images, slow=True),
)


# The decoded cache -------------------------------------------------------------------------------


def _decoded(source: _Source, place: Path, files: Sequence[Path]) -> Dataset:
    """Return what `source` reads: from the cache if these same files were read before."""
    if not source.slow:
        return _cifar10_dataset(*source.read(files), source.name)
    folder = place.parent if place.is_file() else place
    name = f"cifar10-{source.name.replace(' ', '-')}-{_stamp(folder, files)}.safetensors"
    paths = [folder / name, _cache_folder() / name]
    for path in paths:
        if data := _load_cache(path):
            return data
    data = _cifar10_dataset(*source.read(files), source.name)
    _save_cache(data, paths)
    return data


def _stamp(folder: Path, files: Sequence[Path]) -> str:
    """Return a hash of the files' names in `folder`, their sizes and the times of their change."""
    digest = hashlib.sha256()
    for file in files:
        about = os.stat(file)
        name = str(file)[len(str(folder)) :]
        digest.update(f"{name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swdlib"


def _load_cache(path: Path) -> Dataset | None:
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata()
            parts = [
                file.get_tensor(key) for key in ("images", "labels", "test_images", "test_labels")
            ]
        data = _cifar10_dataset(Split(*parts[:2]), Split(*parts[2:]), about["source"])
        if data.fingerprint != about["fingerprint"]:
            raise ValueError("its content does not match its fingerprint")
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"the cache {path} is damaged and ignored: {error}", stacklevel=2)
        return None
    return data


def _save_cache(data: Dataset, paths: Sequence[Path]) -> None:
    """Write the cache to the first of `paths` that can be written."""
    tensors = {
        "images": data.train.images,
        "labels": data.train.labels,
        "test_images": data.test.images,
        "test_labels": data.test.labels,
    }
    about = {"source": data.source, "fingerprint": data.fingerprint}
    content = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, about)
    for path in paths:
        try:
            return write_whole(path, lambda file: file.write_bytes(content))
        except OSError as error:
            reason = error
    warnings.warn(f"the decoded images were not cached: {reason}", stacklevel=2)


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {"digits": _digits, "cifar10": _cifar10}
