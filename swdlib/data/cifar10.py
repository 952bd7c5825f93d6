"""CIFAR-10, from whichever of its published forms is at hand, and a cache of what was decoded."""

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from swdlib.data.images import Dataset, Split, fingerprint_of
from swdlib.files import write_whole

# In the order of the labels.
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_FILES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


@dataclass(frozen=True)
class _Source:
    """A form in which CIFAR-10 comes; `find` raises FileNotFoundError if a folder has it not."""

    name: str
    find: Callable[[Path], list[Path]]
    read: Callable[[Sequence[Path]], tuple[Split, Split]]
    slow: bool  # hence worth a cache


def load_cifar10(root: Path | None) -> Dataset:
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


def _dataset(train: Split, test: Split, source: str) -> Dataset:
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
        fingerprint=fingerprint_of(train, test),
    )


def _find_files(folder: str, suffix: str, place: Path) -> list[Path]:
    files = [place / folder / f"{name}{suffix}" for name in _FILES]
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
                wanted = name.removesuffix(".bin") in _FILES
                if wanted and (file := archive.extractfile(member)):
                    contents[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{files[0]} is damaged, fetch it again: {error}") from error
    return _decode(contents, files[0])


def _decode(contents: Mapping[str, bytes], where: Path) -> tuple[Split, Split]:
    binary = "test_batch.bin" in contents
    names = [f"{name}.bin" if binary else name for name in _FILES]
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
    folders = [place / part / name for part in ("train", "test") for name in CLASSES]
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
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
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


# The decoded cache ------------------------------------------------------------------------------


def _decoded(source: _Source, place: Path, files: Sequence[Path]) -> Dataset:
    """Return what `source` reads: from the cache if these same files were read before."""
    if not source.slow:
        return _dataset(*source.read(files), source.name)
    folder = place.parent if place.is_file() else place
    name = f"cifar10-{source.name.replace(' ', '-')}-{_stamp(folder, files)}.safetensors"
    paths = [folder / name, _cache_folder() / name]
    for path in paths:
        if data := _load_cache(path):
            return data
    data = _dataset(*source.read(files), source.name)
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
        data = _dataset(Split(*parts[:2]), Split(*parts[2:]), about["source"])
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
