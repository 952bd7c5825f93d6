"""Datasets by name: digits, and images held out of the training images."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from swdlib.data.images import Split
from swdlib.data.load import load_data
from tests.data.test_imagenet_files import write_imagenet


def test_unknown_dataset_lists_the_choices() -> None:
    with pytest.raises(
        ValueError, match="dataset must be one of digits, cifar10, imagenet, not 'mnist'"
    ):
        load_data("mnist")


def test_holdout_takes_training_images_and_drops_the_test() -> None:
    whole, held = load_data("digits"), load_data("digits", holdout=0.1)
    assert (len(held.train), len(held.test)) == (1437 - 144, 144)
    assert rows(held.train, held.test) == rows(whole.train)
    assert not set(rows(held.test)) <= set(rows(whole.test))
    again = load_data("digits", holdout=0.1)
    assert again.fingerprint == held.fingerprint != whole.fingerprint
    larger = load_data("digits", holdout=0.2)
    assert torch.equal(larger.test.images[:144], held.test.images)


def test_of_one_folder_of_images_some_must_be_held_out(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path, 0, 10) / "val"
    with pytest.raises(
        ValueError, match=r"holdout must be above 0, not 0\.0: of imagenet, only one"
    ):
        load_data("imagenet", root)
    held = load_data("imagenet", root, holdout=0.3)
    assert (len(held.train), len(held.test)) == (7, 3)
    assert sorted([*held.train.labels.tolist(), *held.test.labels.tolist()]) == list(range(10))
    larger = load_data("imagenet", root, holdout=0.5)
    assert larger.test.labels[:3].tolist() == held.test.labels.tolist()
    assert larger.fingerprint != held.fingerprint


def test_images_held_out_of_imagenet_are_training_images(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path, 10, 4)
    whole, held = load_data("imagenet", root), load_data("imagenet", root, holdout=0.2)
    assert (len(whole.train), len(whole.test), whole.source) == (10, 4, "folders train and val")
    assert (len(held.train), len(held.test)) == (8, 2)
    assert held.test.root == root / "train"


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan"), 1e-9, 0.9999])
def test_bad_holdout(holdout: float) -> None:
    with pytest.raises(ValueError, match="holdout must"):
        load_data("digits", holdout=holdout)


def rows(*splits: Split) -> list[tuple[int, ...]]:
    """Return label and pixels of each image, sorted."""
    parts = [torch.cat([s.labels[:, None], s.images.flatten(1).long()], dim=1) for s in splits]
    return sorted(tuple(row) for row in torch.cat(parts).tolist())


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    dataset, found = load_data("digits"), load_digits()
    assert (len(dataset.train), len(dataset.test), dataset.size) == (1437, 360, 8)
    pixels = torch.from_numpy((found.data * 255 // 16).astype(np.uint8)).view(-1, 1, 8, 8)
    assert rows(dataset.train, dataset.test) == rows(Split(pixels, torch.from_numpy(found.target)))
    assert (pixels.min(), pixels.max()) == (0, 255)
    # A changed split would make results before and after it incomparable.
    assert dataset.fingerprint == "993ac88bd2d994bc"
    scaled = dataset.train.images / 255
    assert dataset.mean[0] == pytest.approx(float(scaled.mean()), abs=5e-5)
    assert dataset.std[0] == pytest.approx(float(scaled.std()), abs=5e-5)


def test_import_does_not_load_slow_libraries() -> None:
    code = (
        "import swdlib.data.load, sys; print(*{'torchvision', 'sklearn', 'PIL'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
