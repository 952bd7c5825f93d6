"""CIFAR-10: published files, image folders or a download, with a cache of decoded images."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, ImageFolder, utils
from tqdm import tqdm

from swdlib.data.images import SUFFIXES, Dataset, Split, fingerprint_of, read_image
from swdlib.files import write_whole

# In the order of the labels.
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CACHED = ("images", "labels", "test_images", "test_labels")


def load_cifar10(root: Path | None) -> Dataset:
    """Return CIFAR-10 (Krizhevsky 2009) from the first source found, or else from a download.

    `root` is the published archive or a folder (None: `data`). The folder and then its subfolder
    cifar10 are searched for the published files, the archive and image folders, in this order.
    ValueError if a file is damaged; FileNotFoundError if nothing is found and the download fails.
    """
    root = Path("data") if root is None else root
    if root.is_file():
        return _load_archive(root)
    tried = []
    folders = (root, root / "cifar10")
    for folder in folders:
        files = [folder / CIFAR10.base_folder / name for name, _ in _published_files()]
        missing = [file for file in files if not file.is_file()]
        if not missing:
            return _dataset("files", *_read_files(folder))
        archive = folder / CIFAR10.filename
        if archive.is_file():
            return _load_archive(archive)
        train, test = folder / "train", folder / "test"
        if any((part / name).is_dir() for part in (train, test) for name in CLASSES):
            return _load_images(folder)
        tried += [
            f"files: no {missing[0]}",
            f"archive: no {archive}",
            f"image folder: no {train}/<class>/*.jpg and {test}/<class>/*.jpg",
        ]
    for folder in folders:
        # A cache is enough: the images themselves may have been deleted to save space.
        for path in sorted(folder.glob("cifar10-*.safetensors")):
            if data := _load_cache(path):
                return data
        tried.append(f"decoded images: no {folder}/cifar10-*.safetensors")
    return _load_archive(_download(root, tried))


def _dataset(source: str, train: Split, test: Split) -> Dataset:
    return Dataset(
        name="cifar10",
        source=source,
        train=train,
        test=test,
        classes=10,
        # Of all pixels of a channel; the often copied std (0.2023, 0.1994, 0.2010) is not that.
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        padding=4,
        flip=True,
        fingerprint=fingerprint_of(train, test),
    )


def _published_files() -> list[tuple[str, str]]:
    """Return the names of the published files that are read, with their MD5 sums."""
    files = [*CIFAR10.train_list, *CIFAR10.test_list]
    return [*files, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]


def _check_md5(file: Path, md5: str) -> None:
    if not utils.check_integrity(file, md5):
        raise ValueError(
            f"{file} is damaged or not CIFAR-10's: its MD5 sum must be {md5}; "
            f"fetch it again from {CIFAR10.url}"
        )


def _read_files(folder: Path) -> list[Split]:
    # A pickle can run any code. torchvision checks the sums too, but its error names no file.
    for name, md5 in _published_files():
        _check_md5(folder / CIFAR10.base_folder / name, md5)
    return [
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
        for part in (CIFAR10(folder, train=True), CIFAR10(folder, train=False))
    ]


def _load_archive(archive: Path) -> Dataset:
    def read() -> list[Split]:
        _check_md5(archive, CIFAR10.tgz_md5)
        with tempfile.TemporaryDirectory() as folder:
            # The first releases of Python 3.10 and 3.11 have no filters; the archive is known.
            safe: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            shutil.unpack_archive(archive, folder, "gztar", **safe)
            return _read_files(Path(folder))

    return _cached("archive", archive.parent, [str(archive)], read)


def _load_images(folder: Path) -> Dataset:
    labels = {name: label for label, name in enumerate(CLASSES)}
    samples: dict[str, list[tuple[str, int]]] = {}
    for part in ("train", "test"):
        try:
            samples[part] = ImageFolder.make_dataset(folder / part, labels, extensions=SUFFIXES)
        except FileNotFoundError as error:
            raise ValueError(f"{folder / part} must have images of all classes: {error}") from error
    count, everything = len(samples["train"]), samples["train"] + samples["test"]

    def decode() -> list[Split]:
        images = torch.empty((len(everything), 3, 32, 32), dtype=torch.uint8)
        # On one thread: with images so small, two threads mostly wait for each other.
        progress = tqdm(everything, desc="decoding CIFAR-10", unit=" images", disable=None)
        for index, (file, _) in enumerate(progress):
            images[index] = read_image(Path(file), _check_image)
        whole = Split(images, torch.tensor([label for _, label in everything]))
        return [whole[:count], whole[count:]]

    return _cached("image folder", folder, [file for file, _ in everything], decode)


def _check_image(image: Image.Image) -> Image.Image:
    if image.mode != "RGB" or image.size != (32, 32):
        raise ValueError(f"it must be RGB of 32 x 32 pixels, not {image.mode} of {image.size}")
    return image


def _download(root: Path, tried: Sequence[str]) -> Path:
    """Download the published archive into `root`, whole or not at all; `tried` is for the error."""

    def download(file: Path) -> None:
        utils.download_url(CIFAR10.url, file.parent, file.name, CIFAR10.tgz_md5)

    archive = root / CIFAR10.filename
    try:
        write_whole(archive, download)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        ways = "".join(f"\n- {way}" for way in [*tried, f"download to {archive}: {error}"])
        raise FileNotFoundError(
            "CIFAR-10 was not found, nor could it be downloaded. Put it in one of these places, or "
            f"pass its folder or archive as root:{ways}"
        ) from error
    return archive


# The cache of decoded images ----------------------------------------------------------------------


def _cached(
    source: str, folder: Path, files: Sequence[str], read: Callable[[], list[Split]]
) -> Dataset:
    """Return what `read` decodes, or its cache if the names, sizes and times of `files` match."""
    digest = hashlib.sha256()
    for file in files:
        about = os.stat(file)
        name = file[len(str(folder)) :]
        digest.update(f"{name} {about.st_size} {about.st_mtime_ns}\n".encode())
    name = f"cifar10-{source.replace(' ', '-')}-{digest.hexdigest()[:16]}.safetensors"
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    paths = [folder / name, user_cache / "swdlib" / name]  # the second if `folder` is read-only
    for path in paths:
        if data := _load_cache(path):
            return data
    data = _dataset(source, *read())
    tensors = (data.train.images, data.train.labels, data.test.images, data.test.labels)
    metadata = {"source": source, "fingerprint": data.fingerprint}
    content = safetensors.torch.save(dict(zip(CACHED, tensors, strict=True)), metadata)
    for path in paths:
        try:
            write_whole(path, lambda file: file.write_bytes(content))
            return data
        except OSError as error:
            reason = error
    warnings.warn(f"the decoded images were not cached: {reason}", stacklevel=2)
    return data


def _load_cache(path: Path) -> Dataset | None:
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            parts = [file.get_tensor(name) for name in CACHED]
        data = _dataset(metadata["source"], Split(*parts[:2]), Split(*parts[2:]))
        if data.fingerprint != metadata["fingerprint"]:
            raise ValueError("its content does not match its fingerprint")
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"the cache {path} is damaged and ignored: {error}", stacklevel=2)
        return None
    return data
