"""ImageNet's folders: what is found in them, and their fingerprint."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from swdlib.data.imagenet import find_files, find_splits, fingerprint_of_files
from swdlib.data.images import read_image


def write_imagenet(root: Path, train: int = 1000, val: int = 1000) -> Path:
    """Write folders of 1,000 classes; so many of them have a small image in each of two splits."""
    for split, images in (("train", train), ("val", val)):
        for label in range(1000):
            (root / split / f"n{label:08}").mkdir(parents=True)
        for label in range(images):
            save(root / split, label, (label % 256, label // 256, len(split)))
    return root


def save(place: Path, label: int, colour: tuple[int, int, int], name: str = "a.png") -> Path:
    path = place / f"n{label:08}" / name
    Image.new("RGB", (8, 8), colour).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with 4 images to train and 2 to test."""
    return write_imagenet(tmp_path / "root", 4, 2)


def test_files_come_by_class_and_name_with_size_and_label(root: Path) -> None:
    later = save(root / "train", 1, (9, 9, 9), "b.JPEG")
    (root / "train" / "n00000001" / "notes.txt").write_text("no image")
    (root / "train" / "ILSVRC.txt").write_text("no class")
    files = find_files(root / "train")
    names = [f"n0000000{label}/a.png" for label in range(4)]
    names.insert(2, "n00000001/b.JPEG")
    assert [files.path(n) for n in range(len(files))] == [root / "train" / name for name in names]
    assert files.labels.tolist() == [0, 1, 1, 2, 3]
    assert files.sizes.tolist() == [files.path(n).stat().st_size for n in range(5)]
    some = files[torch.tensor([2, 0])]
    assert (some.path(0), some.labels.tolist(), len(some)) == (later, [1, 0], 2)
    assert some.sizes.tolist() == [later.stat().st_size, files.sizes[0]]


def test_a_name_that_is_no_text_is_a_name(root: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(root / "train" / "n00000009") + b"/\xff\xe9.png"))
    shutil.copy(root / "train" / "n00000000" / "a.png", path)
    assert find_files(root / "train").path(4) == path


@pytest.mark.parametrize(
    ("place", "splits"),
    [("", ["train", "val"]), ("..", ["train", "val"]), ("train", [""]), ("val", [""])],
)
def test_the_layouts(place: str, splits: list[str], root: Path) -> None:
    root = root.rename(root.with_name("imagenet"))  # which is looked for in a folder of datasets
    found = [files.root.resolve() for files in find_splits(root / place)]
    assert found == [(root if place == ".." else root / place) / name for name in splits]


@pytest.mark.parametrize("only", ["train", "val"])
def test_one_folder_of_the_two_will_do(only: str, root: Path) -> None:
    shutil.rmtree(root / ("val" if only == "train" else "train"))
    assert [files.root for files in find_splits(root)] == [root / only]


def test_what_is_not_imagenet_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not found: put its images in .*/x/train/"):
        find_splits(tmp_path / "x")
    (root / "val" / "n00000999").rename(root / "val" / "n00001000")
    with pytest.raises(ValueError, match=r"train and .*val must have the same classes"):
        find_splits(root)
    (root / "val" / "n00001000").rmdir()
    with pytest.raises(ValueError, match=r"1000 classes, or labels would be wrong; it has 999"):
        find_files(root / "val")


def _rename(root: Path) -> None:
    (root / "train" / "n00000001" / "a.png").rename(root / "train" / "n00000001" / "b.png")


def _relabel(root: Path) -> None:
    (root / "train" / "n00000001" / "a.png").rename(root / "train" / "n00000007" / "a.png")


def _lengthen(root: Path) -> None:
    with (root / "train" / "n00000001" / "a.png").open("ab") as file:
        file.write(b"1")


def _move(root: Path) -> None:
    (root / "train" / "n00000003" / "a.png").rename(root / "val" / "n00000003" / "a.png")


@pytest.mark.parametrize("change", [_rename, _relabel, _lengthen, _move])
def test_the_fingerprint_sees_every_name_size_and_label(
    change: Callable[[Path], None], root: Path
) -> None:
    before = fingerprint_of_files(*find_splits(root))
    assert len(before) == 16
    elsewhere = shutil.copytree(root, root.with_name("copy"))
    assert fingerprint_of_files(*find_splits(elsewhere)) == before
    change(root)
    assert fingerprint_of_files(*find_splits(root)) != before


def test_the_fingerprint_of_some_images_is_that_of_a_folder_of_them(root: Path) -> None:
    save(root / "val", 900, (0, 0, 0), "a rather long name.png")
    some = find_files(root / "val")[torch.tensor([0, 1])]
    assert fingerprint_of_files(some) != fingerprint_of_files(find_files(root / "val"))
    (root / "val" / "n00000900" / "a rather long name.png").unlink()
    assert fingerprint_of_files(some) == fingerprint_of_files(find_files(root / "val"))


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_file_that_is_no_image_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image"):
        read_image(path, lambda image: image)


def test_pixels_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    image.putpixel((2, 0), (7, 8, 9))
    image.save(path)
    pixels = read_image(path, lambda image: image)
    assert pixels.shape == (3, 2, 3)
    assert pixels[:, 0, 2].tolist() == [7, 8, 9]
    assert pixels[:, 1, 0].tolist() == [1, 2, 3]
