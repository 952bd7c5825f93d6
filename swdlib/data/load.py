"""Datasets by name: `load_data`, the digits of scikit-learn, and images held out for tuning."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch

from swdlib.data.imagenet import ImageFolders, load_image_folders
from swdlib.data.images import Dataset, Split, fingerprint_of, generator_of

# Channels, size and classes of the images, and how many there are to train and to test.
SHAPES = {"cifar10": (3, 32, 10, 50_000, 10_000), "imagenet": (3, 224, 1000, 1_281_167, 50_000)}
HOLDOUT_SEED = 2020

AnyDataset = Dataset | ImageFolders
InMemory = Literal["digits", "cifar10"]
Root = str | os.PathLike[str] | None
Device = str | torch.device


@overload
def load_data(
    name: InMemory, root: Root = None, *, device: Device = "cpu", holdout: float = 0.0
) -> Dataset: ...
@overload
def load_data(
    name: Literal["imagenet"], root: Root = None, *, device: Device = "cpu", holdout: float = 0.0
) -> ImageFolders: ...
@overload
def load_data(
    name: str, root: Root = None, *, device: Device = "cpu", holdout: float = 0.0
) -> AnyDataset: ...


def load_data(
    name: str, root: Root = None, *, device: Device = "cpu", holdout: float = 0.0
) -> AnyDataset:
    """Return the dataset `name`, a key of `DATASETS`, with its images on `device`.

    `root` is the folder with the files, or the published archive; None is `data` in the current
    folder. `holdout` is the fraction, in [0, 1), of the training images that replaces the test
    images, so that a method can be tuned without a look at those. ImageNet stays in its files,
    which are decoded when needed; if there is only one folder of images, such as a sample,
    `holdout` must be above 0, or none would be left to test on.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {name!r}")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be in [0, 1), not {holdout}")
    data = DATASETS[name](None if root is None else Path(root).expanduser())
    if not holdout:
        if not len(data.test):
            raise ValueError(
                f"holdout must be above 0, not {holdout}: of {name}, only {data.source} was found, "
                "which leaves none to test on"
            )
        return data.to(device)
    whole = len(data.train)
    count = round(holdout * whole)
    if not 1 <= count <= whole - 2:
        raise ValueError(
            f"holdout must hold out at least 1 image and leave 2, not {holdout}: "
            f"{whole - count} of {whole} training images remain"
        )
    # One permutation for every fraction: a smaller holdout is part of a larger one.
    order = torch.randperm(whole, generator=generator_of(HOLDOUT_SEED))
    return data.take(order[count:], order[:count]).to(device)


def _cifar10(root: Path | None) -> Dataset:
    from swdlib.data.cifar10 import load_cifar10  # here, as torchvision takes long to import

    return load_cifar10(root)


def _digits(root: Path | None) -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 1,437 to train and 360 to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images.astype(np.int64) * 255 // 16).to(torch.uint8)
    everything = Split(pixels[:, None], torch.from_numpy(found.target.astype(np.int64)))
    # Shuffled, since the digits are sorted by writer; the seed is part of this dataset.
    order = torch.randperm(len(everything), generator=generator_of(1797))
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
        fingerprint=fingerprint_of(train, test),
    )


DATASETS: dict[str, Callable[[Path | None], AnyDataset]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "imagenet": load_image_folders,
}
