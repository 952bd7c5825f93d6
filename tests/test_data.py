import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from swdlib import data
from swdlib.data import DATASETS, Dataset, Split, flip, load_data, normalise, random_crop


def noise(count: int, *shape: int, seed: int = 0) -> Tensor:
    """Return uint8 images of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)


def numbered(count: int, tests: int = 5, padding: int = 0, flip: bool = False) -> Dataset:
    """Return a dataset whose labels are the images' numbers."""
    train = Split(noise(count, 3, 6, 6), torch.arange(count))
    test = Split(noise(tests, 3, 6, 6, seed=1), torch.arange(tests))
    channels = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    return Dataset("numbered", "test", train, test, count, *channels, padding, flip, "")


# Splits and augmentation


def test_split_checks_its_tensors() -> None:
    images, labels = noise(3, 1, 2, 2), torch.arange(3)
    assert len(Split(images, labels)) == 3
    with pytest.raises(ValueError, match=r"images must be uint8 .* not torch.float32"):
        Split(images.float(), labels)
    with pytest.raises(ValueError, match=r"shape \(N, C, H, W\), not .*\(3, 2, 2\)"):
        Split(images[:, 0], labels)
    with pytest.raises(ValueError, match=r"one for each of 3 images, not torch\.int64 of"):
        Split(images, labels[:2])
    with pytest.raises(ValueError, match="labels must be int64"):
        Split(images, labels.int())


def test_crop_and_flip_by_hand() -> None:
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).expand(3, 1, 2, 2)
    cropped = random_crop(image, torch.tensor([[0, 0], [1, 1], [2, 1]]), padding=1)
    assert cropped[:, 0].tolist() == [[[0, 0], [0, 1]], [[1, 2], [3, 4]], [[3, 4], [0, 0]]]
    mirrored = flip(image, torch.tensor([True, False, True]))
    assert mirrored[:, 0].tolist() == [[[2, 1], [4, 3]], [[1, 2], [3, 4]], [[2, 1], [4, 3]]]


def test_normalise_by_hand() -> None:
    pixels = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).view(1, 2, 1, 2)
    normal = normalise(pixels, (0.5, 0.2), (0.5, 0.1))
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal.flatten(), torch.tensor([-1.0, 1.0, 0.0, 2.0]))


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (5, 7, 2), (3, 3, 3)])
def test_augmentation_is_that_of_torchvision(height: int, width: int, padding: int) -> None:
    images = noise(20, 3, height, width)
    offsets = torch.randint(2 * padding + 1, (20, 2), generator=torch.Generator().manual_seed(1))
    mirrored = torch.arange(20) % 3 == 0
    cropped = random_crop(images, offsets, padding)
    for index, (row, column) in enumerate(offsets.tolist()):
        padded = reference.pad(images[index], [padding])
        one = reference.crop(padded, row, column, height, width)
        assert torch.equal(cropped[index], one)
        if mirrored[index]:
            one = reference.hflip(one)
        assert torch.equal(flip(cropped, mirrored)[index], one)
        normal = reference.normalize(reference.to_tensor(one.permute(1, 2, 0).numpy()), *NORMAL)
        assert torch.equal(normalise(one[None], *NORMAL)[0], normal)


NORMAL = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])


def slow_batches(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> list[list[Tensor]]:
    """Return the images of each batch, augmented one by one: slow, and plain to see."""
    order = torch.randperm(len(dataset.train), generator=data._generator(seed, epoch)).tolist()
    batches = []
    for step in range(dataset.steps(batch_size)):
        chosen = order[step * batch_size : (step + 1) * batch_size]
        generator = data._generator(seed, epoch, step)
        offsets = torch.randint(2 * dataset.padding + 1, (len(chosen), 2), generator=generator)
        mirrored = torch.randint(2, (len(chosen),), generator=generator)
        batch = []
        for index, (row, column), mirror in zip(chosen, offsets, mirrored, strict=True):
            image = reference.pad(dataset.train.images[index], [dataset.padding])
            image = reference.crop(image, int(row), int(column), dataset.size, dataset.size)
            image = reference.hflip(image) if mirror and dataset.flip else image
            batch.append(reference.normalize(image / 255, list(dataset.mean), list(dataset.std)))
        batches.append(batch)
    return batches


@pytest.mark.parametrize(("padding", "mirror"), [(2, True), (0, True), (1, False), (0, False)])
def test_batches_are_those_of_the_slow_reference(padding: int, mirror: bool) -> None:
    dataset = numbered(23, padding=padding, flip=mirror)
    fast = [images for images, _ in dataset.train_batches(8, seed=3, epoch=2)]
    slow = slow_batches(dataset, 8, seed=3, epoch=2)
    assert [len(batch) for batch in fast] == [8, 8, 7]
    for one, other in zip(fast, slow, strict=True):
        assert torch.equal(one, torch.stack(other))


def test_crops_and_flips_are_all_drawn_and_as_often() -> None:
    dataset = numbered(3000, padding=1, flip=True)
    plain = normalise(dataset.train.images, dataset.mean, dataset.std)
    (images, labels), *rest = dataset.train_batches(3000, seed=0, epoch=0)
    assert not rest
    seen = torch.zeros(3, 3, 2)
    raw = dataset.train.images[labels]
    for row in range(3):
        for column in range(3):
            crop = random_crop(raw, torch.tensor([[row, column]]).expand(3000, 2), 1)
            for mirror in range(2):
                one = flip(crop, torch.full((3000,), bool(mirror)))
                same = normalise(one, dataset.mean, dataset.std) == images
                seen[row, column, mirror] = same.flatten(1).all(1).sum()
    assert seen.sum() == len(plain) == 3000
    assert seen.min() > 110 and seen.max() < 230  # 3000 / 18 is 167, of standard deviation 13


# Batches


def drawn(dataset: Dataset, batch_size: int, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return list(dataset.train_batches(batch_size, **{"seed": 0, "epoch": 0, **options}))


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def labels_of(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    return [int(label) for _, labels in batches for label in labels]


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    dataset = numbered(20, padding=1, flip=True)
    first = drawn(dataset, 6)
    assert [len(labels) for _, labels in first] == [6, 6, 6, 2]
    assert sorted(labels_of(first)) == list(range(20))
    assert same(first, drawn(dataset, 6))
    orders = {tuple(labels_of(drawn(dataset, 6, seed=s, epoch=e))) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4
    assert tuple(range(20)) not in orders


def test_a_last_batch_of_one_image_is_left_out() -> None:
    assert [len(labels) for _, labels in drawn(numbered(9), 4)] == [4, 4]
    assert numbered(9).steps(4) == 2
    assert [len(labels) for _, labels in drawn(numbered(11), 4, world=2)] == [2, 2]
    assert numbered(11).steps(4, world=2) == 2
    assert numbered(11).steps(4) == 3


def test_a_batch_depends_on_nothing_but_its_numbers() -> None:
    dataset = numbered(20, padding=2, flip=True)
    whole = drawn(dataset, 6)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for start in range(5):
        assert same(whole[start:], drawn(dataset, 6, start=start))
    assert torch.equal(state, torch.get_rng_state())
    one, other = (
        dataset.train_batches(6, seed=0, epoch=0),
        dataset.train_batches(6, seed=0, epoch=0),
    )
    assert all(torch.equal(a, c) for (a, _), (c, _) in zip(one, other, strict=True))  # interleaved


def test_seeds_do_not_collide() -> None:
    numbers = [(1, 2), (2, 1), (12,), (1, 2, 0), (0, 1, 2), (0,), (1,), (-1,), (2**70,)]
    streams = {tuple(torch.rand(4, generator=data._generator(*n)).tolist()) for n in numbers}
    assert len(streams) == len(numbers)


@given(
    count=st.integers(2, 40),
    world=st.integers(1, 4),
    size=st.integers(2, 20),
    start=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_processes_share_the_batches_of_one(count: int, world: int, size: int, start: int) -> None:
    dataset = numbered(count, padding=1, flip=True)
    batch_size = max(size, 2 * world)
    shares = [drawn(dataset, batch_size, start=start, rank=r, world=world) for r in range(world)]
    whole = drawn(dataset, batch_size, start=start)
    steps = dataset.steps(batch_size, world=world)
    assert [len(share) for share in shares] == [max(steps - start, 0)] * world
    assert dataset.steps(batch_size) - steps in ((0,) if world == 1 else (0, 1))
    for step, batches in enumerate(zip(*shares, strict=True)):
        images, labels = torch.empty_like(whole[step][0]), torch.empty_like(whole[step][1])
        for rank, (own_images, own_labels) in enumerate(batches):
            assert len(own_labels) >= 2
            images[rank::world], labels[rank::world] = own_images, own_labels
        assert same([(images, labels)], [whole[step]])


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_test_images_come_once_and_unchanged(world: int) -> None:
    dataset = numbered(4, tests=8, padding=2, flip=True)
    parts = [list(dataset.test_batches(7, rank=rank, world=world)) for rank in range(world)]
    assert all(len(labels) > 0 for part in parts for _, labels in part)
    batches = [batch for part in parts for batch in part]
    assert sorted(labels_of(batches)) == list(range(8))
    plain = normalise(dataset.test.images, dataset.mean, dataset.std)
    assert all(torch.equal(images, plain[labels]) for images, labels in batches)
    if world == 1:
        assert labels_of(batches) == list(range(8))


def test_bad_shares_are_refused_at_once() -> None:
    dataset = numbered(8)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: dataset.train_batches(0, seed=0, epoch=0), "batch_size must be at least 2, not 0"),
        (lambda: drawn(dataset, 5, world=3), "batch_size must be at least 6, not 5: each of 3"),
        (lambda: drawn(dataset, 4, rank=2, world=2), "rank must be .* less than world, 2, not 2"),
        (lambda: drawn(dataset, 4, rank=-1), "rank must be at least 0"),
        (lambda: drawn(dataset, 4, world=0), "world must be at least 1, not 0"),
        (lambda: drawn(dataset, 4, start=-1), "start must be at least 0, not -1"),
        (lambda: dataset.steps(1), "batch_size must be at least 2, not 1"),
        (lambda: dataset.test_batches(0), "batch_size must be at least 1, not 0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


# Every dataset


@pytest.mark.parametrize("name", DATASETS)
def test_contract_of_datasets(name: str, tiny: Path) -> None:
    dataset = load_data(name, write_images(tiny))
    assert dataset.name == name
    assert len(dataset.mean) == len(dataset.std) == dataset.channels
    for split in (dataset.train, dataset.test):
        assert split.images.shape[1:] == (dataset.channels, dataset.size, dataset.size)
        assert split.labels.unique().tolist() == list(range(dataset.classes))
    images, labels = next(dataset.train_batches(8, seed=0, epoch=0))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.shape == (8, *dataset.train.images.shape[1:])
    assert load_data(name, tiny).fingerprint == dataset.fingerprint
    assert len(dataset.fingerprint) == 16


def test_unknown_dataset_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="dataset must be one of digits, cifar10, not 'mnist'"):
        load_data("mnist")


def test_fingerprint_sees_every_pixel_and_label() -> None:
    dataset = numbered(4)
    train, test = dataset.train, dataset.test
    pixel = train.images.clone()
    pixel[3, 2, 5, 5] ^= 1
    label = test.labels.clone()
    label[0] += 1
    everything = [
        data._fingerprint(train, test),
        data._fingerprint(Split(pixel, train.labels), test),
        data._fingerprint(train, Split(test.images, label)),
        data._fingerprint(test, train),
    ]
    assert len(set(everything)) == 4
    assert data._fingerprint(train.to("cpu"), test) == everything[0]


def test_holdout_takes_training_images_and_drops_the_test() -> None:
    whole, held = load_data("digits"), load_data("digits", holdout=0.1)
    assert (len(held.train), len(held.test)) == (1437 - 144, 144)
    assert rows(held.train, held.test) == rows(whole.train)
    assert not set(rows(held.test)) <= set(rows(whole.test))
    again = load_data("digits", holdout=0.1)
    assert again.fingerprint == held.fingerprint != whole.fingerprint
    larger = load_data("digits", holdout=0.2)
    assert torch.equal(larger.test.images[:144], held.test.images)


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


# CIFAR-10: five forms of the same 30 images, in class order as a folder of images has them

TRAIN = Split(noise(20, 3, 32, 32), torch.arange(20) // 2)
TEST = Split(noise(10, 3, 32, 32, seed=1), torch.arange(10))
BATCHES = {f"data_batch_{n + 1}": TRAIN[torch.arange(4 * n, 4 * n + 4)] for n in range(5)}
BATCHES["test_batch"] = TEST
FINGERPRINT = data._fingerprint(TRAIN, TEST)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, with the user's cache elsewhere and the network cut off."""

    def offline(*arguments: object) -> None:
        raise urllib.error.URLError("offline")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    root = tmp_path / "root"
    root.mkdir()
    return root


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


def records(split: Split) -> bytes:
    """Return a batch of the binary version."""
    labels = split.labels.to(torch.uint8)[:, None]
    return torch.cat([labels, split.images.flatten(1)], dim=1).numpy().tobytes()


def write_files(root: Path, folder: str, contents: dict[str, bytes]) -> Path:
    (root / folder).mkdir(parents=True)
    for name, content in contents.items():
        (root / folder / name).write_bytes(content)
    return root


def write_archive(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"readme.html": b"<p>", **contents}.items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_images(root: Path) -> Path:
    for part, split in (("train", TRAIN), ("test", TEST)):
        for index, label in enumerate(split.labels.tolist()):
            folder = root / part / data.CIFAR10_CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = split.images[index].permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(folder / f"{index:04}.png")
    return root


def python_contents() -> dict[str, bytes]:
    return {name: pickled(split) for name, split in BATCHES.items()}


def binary_contents() -> dict[str, bytes]:
    return {f"{name}.bin": records(split) for name, split in BATCHES.items()}


FORMS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "python files": ("files", lambda r: write_files(r, "cifar-10-batches-py", python_contents())),
    "binary files": ("files", lambda r: write_files(r, "cifar-10-batches-bin", binary_contents())),
    "python archive": (
        "archive",
        lambda r: write_archive(r / "cifar-10-python.tar.gz", python_contents()).parent,
    ),
    "binary archive": (
        "archive",
        lambda r: write_archive(r / "cifar-10-binary.tar.gz", binary_contents()).parent,
    ),
    "archive as root": ("archive", lambda r: write_archive(r / "any.tgz", python_contents())),
    "image folder": ("image folder", write_images),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_cifar10_gives_the_same_images(form: str, tiny: Path) -> None:
    source, write = FORMS[form]
    root = write(tiny)
    for _ in range(2):  # the second time from the cache, where there is one
        dataset = load_data("cifar10", root)
        assert (dataset.source, dataset.fingerprint) == (source, FINGERPRINT)
        assert torch.equal(dataset.train.images, TRAIN.images)
        assert torch.equal(dataset.test.labels, TEST.labels)
    caches = list(tiny.glob("*.safetensors"))
    assert len(caches) == (source != "files")
    assert not list(tiny.glob(".*"))


def test_arrays_pickled_by_a_later_python_are_read_too() -> None:
    later = pickle.dumps({b"data": TEST.images.flatten(1).numpy(), b"labels": [*range(10)]}, 4)
    images, labels = data._decode_pickle(later)
    assert torch.equal(images, TEST.images) and torch.equal(labels, TEST.labels)


@pytest.mark.parametrize("folder", ["data", "data/cifar10"])
def test_default_root(folder: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny)
    write_images(tiny / folder)
    assert load_data("cifar10").fingerprint == FINGERPRINT


def test_an_unfinished_folder_gives_way_to_the_archive(tiny: Path) -> None:
    write_files(tiny, "cifar-10-batches-py", {"data_batch_1": b"half"})
    write_archive(tiny / "cifar-10-python.tar.gz", python_contents())
    assert load_data("cifar10", tiny).source == "archive"


def test_originals_come_before_images(tiny: Path) -> None:
    write_images(tiny)
    assert load_data("cifar10", tiny).source == "image folder"
    write_archive(tiny / "cifar-10-binary.tar.gz", binary_contents())
    assert load_data("cifar10", tiny).source == "archive"


class Hostile:
    """When unpickled by `pickle.loads`, makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_pickles_run_no_code(tiny: Path) -> None:
    hostile = pickle.dumps(Hostile(tiny / "made"), 2)
    pickle.loads(hostile)
    (tiny / "made").rmdir()  # it is hostile indeed
    write_files(tiny, "cifar-10-batches-py", {**python_contents(), "data_batch_3": hostile})
    with pytest.raises(ValueError, match=r"cannot be read as CIFAR-10: .*mkdir does not belong"):
        load_data("cifar10", tiny)
    assert not (tiny / "made").exists()


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_cut_or_foreign_batches_are_errors(choice: st.DataObject) -> None:
    contents = python_contents()
    whole = contents["data_batch_2"]
    cut = whole[: choice.draw(st.integers(0, len(whole) - 1))]
    contents["data_batch_2"] = choice.draw(st.sampled_from([cut, b"N.", b"}.", b"](K\x01e."]))
    with pytest.raises(ValueError, match="somewhere cannot be read as CIFAR-10"):
        data._decode(contents, Path("somewhere"))


@given(st.binary(max_size=40))
@settings(deadline=None)
def test_foreign_binary_batches_are_errors(foreign: bytes) -> None:
    with pytest.raises(ValueError, match=r"cannot be read|labels must be 0 to 9"):
        parts = data._decode({**binary_contents(), "test_batch.bin": foreign}, Path("somewhere"))
        data._cifar10_dataset(*parts, "files")


def test_damaged_archives_are_errors_that_name_them(tiny: Path) -> None:
    archive = write_archive(tiny / "cifar-10-python.tar.gz", python_contents())
    whole = archive.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (whole[:middle], whole[:-1], flipped, b"not an archive", b""):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is damaged, fetch it"):
            load_data("cifar10", tiny)
    contents = python_contents()
    del contents["data_batch_4"]
    write_archive(archive, contents)
    with pytest.raises(ValueError, match="not all of it: no data_batch_4"):
        load_data("cifar10", tiny)
    assert [path.name for path in tiny.iterdir()] == [archive.name]


def test_labels_must_be_those_of_cifar10(tiny: Path) -> None:
    wrong = Split(TEST.images, torch.full((10,), 11))
    contents = {**binary_contents(), "test_batch.bin": records(wrong)}
    write_files(tiny, "cifar-10-batches-bin", contents)
    with pytest.raises(ValueError, match=r"labels must be 0 to 9, not \[11\]"):
        load_data("cifar10", tiny)


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
    with pytest.raises(ValueError, match=r"test/dog/0005\.png (must be an RGB|cannot be read)"):
        load_data("cifar10", tiny)
    assert not list(tiny.glob("*.safetensors"))


def test_a_class_without_images_is_an_error(tiny: Path) -> None:
    write_images(tiny)
    (tiny / "train" / "cat" / "notes.txt").write_text("other files are passed over")
    assert load_data("cifar10", tiny).fingerprint == FINGERPRINT
    for image in (tiny / "train" / "cat").glob("*.png"):
        image.unlink()
    with pytest.raises(ValueError, match="train/cat must have images"):
        load_data("cifar10", tiny)


# The decoded cache


@pytest.fixture
def cached(tiny: Path) -> Path:
    """Return the cache of a folder of images."""
    load_data("cifar10", write_images(tiny))
    (cache,) = tiny.glob("*.safetensors")
    return cache


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it an error to decode an image."""
    monkeypatch.setattr(data, "_read_image", lambda file: pytest.fail(f"{file} was decoded"))


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
        write_archive(Path(folder) / name, python_contents())

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
    with pytest.raises(FileNotFoundError, match="CIFAR-10 was not found, nor downloaded") as caught:
        load_data("cifar10", tiny)
    for place in (tiny, tiny / "cifar10"):
        for path in (
            "cifar-10-batches-py/data_batch_1",
            "cifar-10-batches-bin/data_batch_1.bin",
            "cifar-10-python.tar.gz",
            "cifar-10-binary.tar.gz",
            "train/<class>/*.jpg",
            "cifar10-*.safetensors",
        ):
            assert f": no {place}/{path}" in str(caught.value)
    assert str(error) in str(caught.value)
    assert not list(tiny.iterdir())


# Outside of this module


def test_import_leaves_slow_libraries_alone() -> None:
    code = "import swdlib.data, sys; print(*{'torchvision', 'sklearn', 'PIL'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_real_cifar10(cifar10_folder: Path) -> None:
    dataset = load_data("cifar10", cifar10_folder)
    assert dataset.train.labels.bincount().tolist() == [5000] * 10
    assert dataset.test.labels.bincount().tolist() == [1000] * 10
    for channel in range(3):
        pixels = dataset.train.images[:, channel] / 255
        assert dataset.mean[channel] == pytest.approx(float(pixels.mean()), abs=0.002)
        assert dataset.std[channel] == pytest.approx(float(pixels.std()), abs=0.002)
