"""CIFAR-10: every form gives the same images, and no damaged or hostile file gives any."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from swdlib.data import cifar10
from swdlib.data.images import Split, fingerprint_of
from swdlib.data.load import DATASETS, load_data
from tests.data.test_imagenet_files import write_imagenet
from tests.data.test_images import noise

# CIFAR-10: the same 30 images in each form, sorted by class as in a folder of images

TRAIN = Split(noise(20, 3, 32, 32), torch.arange(20) // 2)
TEST = Split(noise(10, 3, 32, 32, seed=1), torch.arange(10))
BATCHES = {f"data_batch_{n + 1}": TRAIN[torch.arange(4 * n, 4 * n + 4)] for n in range(5)}
FINGERPRINT = fingerprint_of(TRAIN, TEST)


def pickled(split: Split) -> bytes:
    """Return a batch as published: a pickle of protocol 2, made by Python 2."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    pixels = split.images.flatten(1).numpy().tobytes()
    shape = struct.pack("<BBBH", ord("K"), len(split), ord("M"), 3072)
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01" + shape + b"\x86" + dtype
    array += b"\x89T" + struct.pack("<i", len(pixels)) + pixels + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in split.labels.tolist()) + b"e"
    content = text(b"batch_label") + text(b"batch 1 of 5") + text(b"data") + array
    return b"\x80\x02}(" + content + text(b"labels") + labels + b"u."


def packed(contents: dict[str, bytes]) -> bytes:
    """Return an archive of the files in the published folder."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in {"readme.html": b"<p>", **contents}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


CONTENTS = {
    **{name: pickled(split) for name, split in {**BATCHES, "test_batch": TEST}.items()},
    "batches.meta": pickle.dumps({"label_names": cifar10.CLASSES}, 2),
}
ARCHIVE = packed(CONTENTS)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder; the user's cache is elsewhere, the network cut off.

    What torchvision takes for the published files are the tiny ones above.
    """

    def offline(*arguments: object) -> None:
        raise urllib.error.URLError("offline")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(ARCHIVE))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(CONTENTS[name])] for name in BATCHES])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(CONTENTS["test_batch"])]])
    meta = {**CIFAR10.meta, "md5": md5(CONTENTS["batches.meta"])}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    root = tmp_path / "root"
    root.mkdir()
    return root


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_files(root: Path, contents: dict[str, bytes]) -> Path:
    (root / "cifar-10-batches-py").mkdir(parents=True)
    for name, content in contents.items():
        write(root / "cifar-10-batches-py" / name, content)
    return root


def write_images(root: Path) -> Path:
    for part, split in (("train", TRAIN), ("test", TEST)):
        for index, label in enumerate(split.labels.tolist()):
            folder = root / part / cifar10.CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = split.images[index].permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(folder / f"{index:04}.png")
    return root


FORMS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "files": ("files", lambda root: write_files(root, CONTENTS)),
    "archive": ("archive", lambda root: write(root / "cifar-10-python.tar.gz", ARCHIVE).parent),
    "archive as root": ("archive", lambda root: write(root / "any name", ARCHIVE)),
    "image folder": ("image folder", write_images),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_cifar10_gives_the_same_images(form: str, tiny: Path) -> None:
    source, write = FORMS[form]
    root = write(tiny)
    before = {path.name for path in tiny.iterdir()}
    for _ in range(2):  # the second time from the cache, where there is one
        dataset = load_data("cifar10", root)
        assert (dataset.source, dataset.fingerprint) == (source, FINGERPRINT)
        assert torch.equal(dataset.train.images, TRAIN.images)
        assert torch.equal(dataset.test.labels, TEST.labels)
    caches = {path.name for path in tiny.glob("*.safetensors")}
    assert len(caches) == (source != "files")
    assert {path.name for path in tiny.iterdir()} == before | caches


@pytest.mark.parametrize("folder", ["data", "data/cifar10"])
def test_default_root(folder: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    write_images(tiny / folder)
    assert load_data("cifar10").fingerprint == FINGERPRINT


@pytest.mark.parametrize("missing", ["data_batch_4", "test_batch", "batches.meta"])
def test_an_unfinished_folder_gives_way_to_the_archive(missing: str, tiny: Path) -> None:
    unfinished = {name: content for name, content in CONTENTS.items() if name != missing}
    write_files(tiny, {**unfinished, "data_batch_1": b"half"})
    write(tiny / "cifar-10-python.tar.gz", ARCHIVE)
    assert load_data("cifar10", tiny).source == "archive"


def test_originals_come_before_images(tiny: Path) -> None:
    write_images(tiny)
    assert load_data("cifar10", tiny).source == "image folder"
    write(tiny / "cifar-10-python.tar.gz", ARCHIVE)
    assert load_data("cifar10", tiny).source == "archive"
    write_files(tiny, CONTENTS)
    assert load_data("cifar10", tiny).source == "files"


class Hostile:
    """When unpickled, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_hostile_pickle_is_never_unpickled(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = pickle.dumps(Hostile(tmp_path / "made"), 2)
    pickle.loads(hostile)
    (tmp_path / "made").rmdir()  # it is hostile indeed
    contents = {**CONTENTS, name: hostile}
    archive = write(tiny / "cifar-10-python.tar.gz", packed(contents))
    with pytest.raises(ValueError, match=rf"{archive} is damaged or not CIFAR-10's"):
        load_data("cifar10", tiny)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive.read_bytes()))
    with pytest.raises(ValueError, match=rf"/cifar-10-batches-py/{name} is damaged"):
        load_data("cifar10", tiny)
    write_files(tiny, contents)
    with pytest.raises(ValueError, match=rf"{tiny}/cifar-10-batches-py/{name} is damaged"):
        load_data("cifar10", tiny)
    assert not (tmp_path / "made").exists()
    assert {path.name for path in tiny.iterdir()} == {archive.name, "cifar-10-batches-py"}


def damaged(whole: bytes) -> list[bytes]:
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    return [whole[:middle], whole[:-1], whole + b"\0", flipped, b"something else", b""]


def test_damaged_files_are_errors_that_name_them(tiny: Path) -> None:
    write_files(tiny, CONTENTS)
    for name, whole in CONTENTS.items():
        file = tiny / "cifar-10-batches-py" / name
        sum_of_whole = f"MD5 sum must be {md5(whole)}; fetch it again from https://"
        for content in damaged(whole):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=rf"{file} is damaged .* {sum_of_whole}"):
                load_data("cifar10", tiny)
            assert file.read_bytes() == content
        file.write_bytes(whole)
    assert load_data("cifar10", tiny).source == "files"


@pytest.mark.parametrize("as_root", [False, True])
def test_damaged_archives_are_errors_that_name_them(as_root: bool, tiny: Path) -> None:
    archive = tiny / "cifar-10-python.tar.gz"
    for content in damaged(ARCHIVE):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{archive} is damaged .* fetch it again from https"):
            load_data("cifar10", archive if as_root else tiny)
        assert archive.read_bytes() == content
    assert [path.name for path in tiny.iterdir()] == [archive.name]


def test_the_sums_are_those_of_torchvision(tmp_path: Path) -> None:
    write_files(tmp_path, CONTENTS)
    with pytest.raises(ValueError, match=r"data_batch_1 .* c99cafc152244af753f735de768cd75f"):
        load_data("cifar10", tmp_path)


def grey(path: Path) -> None:
    Image.new("L", (32, 32)).save(path)


def large(path: Path) -> None:
    Image.new("RGB", (32, 33)).save(path)


def foreign(path: Path) -> None:
    path.write_bytes(b"not an image")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize("spoil", [grey, large, foreign, cut])
def test_bad_images_are_errors_that_name_them(spoil: Callable[[Path], None], tiny: Path) -> None:
    write_images(tiny)
    spoil(tiny / "test" / "dog" / "0005.png")
    reason = "it must be RGB of 32 x 32 pixels, not" if spoil in (grey, large) else ""
    with pytest.raises(ValueError, match=rf"test/dog/0005\.png cannot be read as an .*{reason}"):
        load_data("cifar10", tiny)
    assert not list(tiny.glob("*.safetensors"))


@pytest.mark.parametrize("gone", ["images", "class", "part"])
def test_a_class_without_images_is_an_error(gone: str, tiny: Path) -> None:
    write_images(tiny)
    folder = tiny / "train" / "cat"
    (folder / "notes.txt").write_text("other files are ignored")
    (tiny / "train" / "aardvark").mkdir()  # and so are other folders
    assert load_data("cifar10", tiny).fingerprint == FINGERPRINT
    if gone == "part":
        (tiny / "train").rename(tiny / "training")
    elif gone == "class":
        folder.rename(folder.with_name("cats"))
    else:
        for image in folder.glob("*.png"):
            image.unlink()
    with pytest.raises(ValueError, match=rf"{tiny}/train must have images of all classes: .* cat"):
        load_data("cifar10", tiny)


# The cache of decoded images


@pytest.fixture
def cached(tiny: Path) -> Path:
    """Return the cache of a folder of images."""
    load_data("cifar10", write_images(tiny))
    (cache,) = tiny.glob("*.safetensors")
    return cache


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it an error to decode an image."""

    def decode(file: Path, view: object) -> None:
        pytest.fail(f"{file} was decoded")

    monkeypatch.setattr(cifar10, "read_image", decode)


def test_the_cache_stands_for_the_images(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blind(monkeypatch)
    assert load_data("cifar10", cached.parent).source == "image folder"
    for part in ("train", "test"):
        (cached.parent / part).rename(cached.parent / f"{part} that is gone")
    dataset = load_data("cifar10", cached.parent)
    assert (dataset.source, dataset.fingerprint) == ("image folder", FINGERPRINT)


def test_changed_images_are_decoded_again(cached: Path) -> None:
    image = cached.parent / "train" / "ship" / "0016.png"
    size = image.stat().st_size
    Image.new("RGB", (32, 32)).save(image)
    image.write_bytes(image.read_bytes().ljust(size, b"\0"))  # of the same name and size
    assert load_data("cifar10", cached.parent).fingerprint != FINGERPRINT
    image.unlink()
    assert len(load_data("cifar10", cached.parent).train) == 19


@pytest.mark.parametrize("damage", ["pixel", "cut", "empty", "foreign"])
def test_a_damaged_cache_is_made_again(
    damage: str, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cached.read_bytes()
    content = {
        "pixel": whole[:-5000] + bytes([whole[-5000] ^ 1]) + whole[-4999:],
        "cut": whole[:-1],
        "empty": b"",
        "foreign": struct.pack("<Q", 2) + b"{}",
    }[damage]
    cached.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"cache .*{cached.name} is damaged and ignored"):
        dataset = load_data("cifar10", cached.parent)
    assert dataset.fingerprint == FINGERPRINT
    blind(monkeypatch)
    assert load_data("cifar10", cached.parent).fingerprint == FINGERPRINT


def refuse(monkeypatch: pytest.MonkeyPatch, *folders: Path, error: type = PermissionError) -> None:
    """Let no file be put into the folders."""
    replace = os.replace

    def guarded(source: Path, target: Path) -> None:
        if target.parent in folders:
            raise error("read-only")
        replace(source, target)

    monkeypatch.setattr("os.replace", guarded)


def test_a_folder_that_is_read_only(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, tiny)
    load_data("cifar10", write_images(tiny))
    assert {path.name for path in tiny.iterdir()} == {"train", "test"}
    (cache,) = (tiny.parent / "cache" / "swdlib").iterdir()
    blind(monkeypatch)
    assert load_data("cifar10", tiny).fingerprint == FINGERPRINT
    assert cache.is_file()


def test_no_place_for_a_cache_is_a_warning(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, tiny, tiny.parent / "cache" / "swdlib")
    with pytest.warns(UserWarning, match="decoded images were not cached: read-only"):
        assert load_data("cifar10", write_images(tiny)).fingerprint == FINGERPRINT


def test_interruption_leaves_no_cache(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, tiny, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        load_data("cifar10", write_images(tiny))
    assert {path.name for path in tiny.iterdir()} == {"train", "test"}


# The download


def test_download_is_the_last_resort(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, folder: str, name: str, md5: str) -> None:
        assert (url, md5) == (CIFAR10.url, CIFAR10.tgz_md5)
        write(Path(folder) / name, ARCHIVE)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    dataset = load_data("cifar10", tiny / "new")
    assert (dataset.source, dataset.fingerprint) == ("archive", FINGERPRINT)
    kept = {path.name.split("-archive-")[0] for path in (tiny / "new").iterdir()}
    assert kept == {"cifar-10-python.tar.gz", "cifar10"}
    assert load_data("cifar10", tiny / "new").source == "archive"


@pytest.mark.parametrize("error", [urllib.error.URLError("gone"), RuntimeError("corrupted")])
def test_failure_lists_every_way(
    error: Exception, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, folder: str, name: str, md5: str) -> None:
        (Path(folder) / name).write_bytes(b"half")
        raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    with pytest.raises(FileNotFoundError, match="CIFAR-10 was not found, nor could it") as caught:
        load_data("cifar10", tiny)
    for place in (tiny, tiny / "cifar10"):
        for path in (
            "cifar-10-batches-py/data_batch_1",
            "cifar-10-python.tar.gz",
            "train/<class>/*.jpg",
            "cifar10-*.safetensors",
        ):
            assert f": no {place}/{path}" in str(caught.value)
    assert str(error) in str(caught.value)
    assert not list(tiny.iterdir())


# The contract of every dataset


@pytest.mark.parametrize("name", DATASETS)
def test_contract_of_datasets(name: str, tiny: Path) -> None:
    root = write_imagenet(tiny) if name == "imagenet" else write_images(tiny)
    dataset = load_data(name, root)
    assert dataset.name == name
    assert dataset.device.type == "cpu"
    assert len(dataset.mean) == len(dataset.std) == dataset.channels
    for labels in (dataset.train.labels, dataset.test.labels):
        assert labels.unique().tolist() == list(range(dataset.classes))
    for images, labels in (
        next(dataset.train_batches(8, seed=0, epoch=0)),
        next(dataset.test_batches(8)),
    ):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.shape == (8, dataset.channels, dataset.size, dataset.size)
    assert dataset.steps(2) == len(dataset.train) // 2
    some = dataset.take(torch.tensor([0, 3]), torch.tensor([2]))
    assert (len(some.train), len(some.test), some.classes) == (2, 1, dataset.classes)
    assert some.test.labels.tolist() == dataset.train.labels[2:3].tolist()
    assert some.fingerprint != load_data(name, root).fingerprint == dataset.fingerprint
    assert len(dataset.fingerprint) == 16


@pytest.mark.slow
def test_real_cifar10(cifar10_folder: Path) -> None:
    dataset = load_data("cifar10", cifar10_folder)
    assert dataset.train.labels.bincount().tolist() == [5000] * 10
    assert dataset.test.labels.bincount().tolist() == [1000] * 10
    for channel in range(3):
        pixels = dataset.train.images[:, channel] / 255
        assert dataset.mean[channel] == pytest.approx(float(pixels.mean()), abs=0.002)
        assert dataset.std[channel] == pytest.approx(float(pixels.std()), abs=0.002)
