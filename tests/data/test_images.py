"""Images: augmentation against a slow reference, and batches that depend on numbers alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swdlib.data.images import (
    Dataset,
    Split,
    fingerprint_of,
    flip,
    generator_of,
    normalise,
    random_crop,
)


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
    order = torch.randperm(len(dataset.train), generator=generator_of(seed, epoch)).tolist()
    batches = []
    for step in range(dataset.steps(batch_size)):
        chosen = order[step * batch_size : (step + 1) * batch_size]
        generator = generator_of(seed, epoch, step)
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
    streams = {tuple(torch.rand(4, generator=generator_of(*n)).tolist()) for n in numbers}
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


def test_fingerprint_sees_every_pixel_and_label() -> None:
    dataset = numbered(4)
    train, test = dataset.train, dataset.test
    pixel = train.images.clone()
    pixel[3, 2, 5, 5] ^= 1
    label = test.labels.clone()
    label[0] += 1
    everything = [
        fingerprint_of(train, test),
        fingerprint_of(Split(pixel, train.labels), test),
        fingerprint_of(train, Split(test.images, label)),
        fingerprint_of(test, train),
    ]
    assert len(set(everything)) == 4
    assert fingerprint_of(train.to("cpu"), test) == everything[0]
