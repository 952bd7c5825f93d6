"""Image files in ImageNet's folders: found, and read one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

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
