"""Datasets by name: `load_data`, digits that a package ships, and data held out for tuning."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch

from swdlib.data.cifar10 import load_cifar10
from swdlib.data.imagenet import ImageFolders, load_image_folders
from swdlib.data.images import Dataset, Split, fingerprint_of, generator_of

HOLDOUT_SEED = 2020

AnyDataset = Dataset | ImageFolders
Root = str | os.PathLike[str] | None
Device = str | torch.device


@overload
def load_data(
    name: Literal["digits", "cifar10"],
    root: Root = None,
    *,
    device: Device = "cpu",
    holdout: float = 0.0,
) -> Dataset: ...
@overload
def load_data(
    name: Literal["imagenet"],
    root: Root = None,
    *,
    device: Device = "cpu",
    holdout: float = 0.0,
) -> ImageFolders: ...
@overload
def load_data(
    name: str, root: Root = None, *, device: Device = "cpu", holdout: float = 0.0
) -> AnyDataset: ...


def load_data(
    name: str, root: Root = None, *, device: Device = "cpu", holdout: float = 0.0
) -> AnyDataset:
    """Return the dataset `name`, a key of `DATASETS`, its images on `device`.

    `root` is the folder where the files are, or the published archive itself; None is `data` in the
    current folder. `holdout` is the fraction, in [0, 1), of the training images that takes the
    place of the test images, which are then not kept: a method is tuned without a look at them.
    ImageNet stays in its files, which are decoded as they are needed; of one folder of images, such
    as a sample, some must be held out, or none would be left to test on.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {name!r}")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be in [0, 1), not {holdout}")
    data = DATASETS[name](None if root is None else Path(root).expanduser())
    if not holdout and not len(data.test):
        raise ValueError(
            f"holdout must be above 0, not {holdout}: of {name}, {data.source} was found and no "
            "other, which would leave none to test on"
        )
    return (_hold_out(data, holdout) if holdout else data).to(device)


def _hold_out(data: AnyDataset, fraction: float) -> AnyDataset:
    count = round(fraction * len(data.train))
    if not 1 <= count <= len(data.train) - 2:
        left = f"{len(data.train) - count} of {len(data.train)} training images"
        raise ValueError(f"holdout must take 1 image and leave 2, not {fraction}: {left} remain")
    # One permutation for all fractions: a smaller holdout is a part of a larger one.
    order = torch.randperm(len(data.train), generator=generator_of(HOLDOUT_SEED))
    return data.take(order[count:], order[:count])


def _digits(root: Path | None) -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, 1,437 to train and 360 to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images.astype(np.int64) * 255 // 16).to(torch.uint8)
    everything = Split(pixels[:, None], torch.from_numpy(found.target.astype(np.int64)))
    # The digits come writer by writer, hence shuffled; the seed is a constant of this dataset.
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
    "cifar10": load_cifar10,
    "imagenet": load_image_folders,
}


# Channels, size and classes of the images, and how many there are to train and to test.
SHAPES = {"cifar10": (3, 32, 10, 50_000, 10_000), "imagenet": (3, 224, 1000, 1_281_167, 50_000)}
