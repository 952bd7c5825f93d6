"""ImageNet as it is decoded: crops by hand, batches that depend on numbers alone, a whole run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from swdlib import cli
from swdlib.data import imagenet
from swdlib.data.imagenet import ImageFolders, count_workers
from swdlib.data.load import load_data
from swdlib.deploy.stored import load_sparse
from swdlib.models import build_model
from swdlib.runs.config import Config
from swdlib.runs.records import load_records
from swdlib.runs.training import train
from tests.data.test_imagenet_files import write_imagenet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageFolders:
    """Return 20 images to train, read where they are used; red and green are column and row."""
    root = write_imagenet(tmp_path_factory.mktemp("images"), 0, 7)
    for label in range(20):
        pixels = np.zeros((256, 256, 3), np.uint8)
        pixels[..., 0], pixels[..., 1], pixels[..., 2] = *np.indices((256, 256))[::-1], label
        Image.fromarray(pixels).save(root / "train" / f"n{label:08}" / "a.png")
    return replace(load_data("imagenet", root), workers=0)


def pixels_of(data: ImageFolders, images: Tensor) -> Tensor:
    """Return the pixels, in 0 to 255, that were normalised."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (data.mean, data.std))
    return (images * std + mean) * 255


def drawn(data: ImageFolders, batch_size: int, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return list(data.train_batches(batch_size, **{"seed": 0, "epoch": 0, **options}))


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def by_label(batches: list[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    pairs = [pair for batch in batches for pair in zip(*batch, strict=True)]
    return {int(label): image for image, label in pairs}


# What is seen of an image


def test_training_crops_are_of_8_to_100_percent_and_of_ratio_3_to_4(data: ImageFolders) -> None:
    batches = [batch for epoch in range(5) for batch in drawn(data, 20, epoch=epoch)]
    pixels = torch.cat([pixels_of(data, images) for images, _ in batches])
    assert pixels.shape == (100, 3, 224, 224)
    labels = torch.cat([labels for _, labels in batches]).view(-1, 1, 1).expand(-1, 224, 224)
    torch.testing.assert_close(pixels[:, 2], labels.float())
    across = pixels[:, 0, 100, -9] - pixels[:, 0, 100, 8]  # far from where scaling blurs
    down = pixels[:, 1, -9, 100] - pixels[:, 1, 8, 100]
    area = across.abs() * down * (224 / 207 / 256) ** 2
    ratio = across.abs() / down
    assert 0.07 < area.min() < 0.15 and 0.8 < area.max() < 1.02
    assert 0.72 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.36
    assert 30 < (across < 0).sum() < 70  # half are mirrored, of standard deviation 5


def test_in_tests_the_centre_is_seen(data: ImageFolders, tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "root", 2, 0)
    wide = np.random.default_rng(0).integers(256, size=(256, 301, 3), dtype=np.uint8)
    Image.fromarray(wide).save(root / "val" / "n00000003" / "a.png")
    Image.new("L", (512, 1024), 200).save(root / "val" / "n00000004" / "b.jpg")
    (images, labels), *rest = load_data("imagenet", root).test_batches(5)
    assert (labels.tolist(), rest) == ([3, 4], [])
    seen = pixels_of(data, images).permute(0, 2, 3, 1)
    # Half of the 301 - 224 columns are left of the centre.
    np.testing.assert_allclose(seen[0], wide[16:240, 38:262], atol=1e-3)
    torch.testing.assert_close(seen[1], torch.full((224, 224, 3), 200.0), rtol=0, atol=1)


def test_pixels_are_normalised(data: ImageFolders) -> None:
    (images, labels), *_ = data.test_batches(1)
    assert labels.tolist() == [0] and images.dtype == torch.float32
    colour = (0.0, 0.0, 3 / 255)
    expected = [(c - m) / s for c, m, s in zip(colour, data.mean, data.std, strict=True)]
    assert images[0, :, 100, 100].tolist() == pytest.approx(expected)


# Batches


def test_an_epoch_has_every_image_once_in_an_order_of_its_own(data: ImageFolders) -> None:
    assert (data.steps(6), len(data.train), len(data.test)) == (4, 20, 7)
    first = drawn(data, 6)
    assert [len(labels) for _, labels in first] == [6, 6, 6, 2]
    assert sorted(by_label(first)) == list(range(20))
    orders = {tuple(by_label(drawn(data, 6, seed=s, epoch=e))) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


def test_a_crop_depends_on_seed_epoch_and_image_alone(data: ImageFolders) -> None:
    whole = drawn(data, 6)
    state = torch.get_rng_state()
    assert all(same(whole[start:], drawn(data, 6, start=start)) for start in range(5))
    assert torch.equal(state, torch.get_rng_state())
    one, other = by_label(whole), by_label(drawn(data, 20))
    assert all(torch.equal(one[n], other[n]) for n in range(20))
    for options in ({"seed": 1}, {"epoch": 1}):
        other = by_label(drawn(data, 6, **options))
        assert sum(torch.equal(one[n], other[n]) for n in range(20)) == 0


def test_other_processes_decode_the_same(data: ImageFolders) -> None:
    state = torch.get_rng_state()
    two = replace(data, workers=2)
    assert same(drawn(data, 6, start=1), drawn(two, 6, start=1))
    assert same(list(data.test_batches(2)), list(two.test_batches(2)))
    assert torch.equal(state, torch.get_rng_state())
    assert len(next(two.train_batches(6, seed=0, epoch=0))[1]) == 6  # and the rest is left


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_train_share_the_batches_of_one(world: int, data: ImageFolders) -> None:
    shares = [drawn(data, 6, rank=rank, world=world) for rank in range(world)]
    whole = drawn(data, 6)[: data.steps(6, world=world)]
    for step, batches in enumerate(zip(*shares, strict=True)):
        for rank, batch in enumerate(batches):
            assert same([batch], [tuple(part[rank::world] for part in whole[step])])  # type: ignore[list-item]
    tests = [list(data.test_batches(3, rank=rank, world=world)) for rank in range(world)]
    assert sorted(n for share in tests for n in by_label(share)) == list(range(7))


def test_test_batches_are_not_larger_than_memory_allows(
    data: ImageFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet, "TEST_BATCH", 3)
    assert [labels.tolist() for _, labels in data.test_batches(1000)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_bad_shares_are_refused_at_once(data: ImageFolders) -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: data.train_batches(1, seed=0, epoch=0), "batch_size must be at least 2, not 1"),
        (lambda: data.train_batches(4, seed=0, epoch=0, start=-1), "start must be at least 0"),
        (lambda: data.train_batches(4, seed=0, epoch=0, rank=2, world=2), "less than world, 2"),
        (lambda: data.test_batches(0), "batch_size must be at least 1, not 0"),
        (lambda: data.steps(1), "batch_size must be at least 2, not 1"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(workers: int, tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "root", 8, 1)
    path = root / "train" / "n00000005" / "a.png"
    path.write_bytes(path.read_bytes()[:50])
    damaged = replace(load_data("imagenet", root), workers=workers)
    with pytest.raises(ValueError) as caught:
        drawn(damaged, 4)
    assert str(caught.value).startswith(f"{path} cannot be read as an image")


def test_each_process_that_trains_has_its_share_of_the_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(96)), raising=False)
    for training, decoding in (("1", 32), ("5", 19), ("99", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", training)
        assert count_workers() == decoding
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5, 6}, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert count_workers() == 3


def test_to_a_device_and_back(data: ImageFolders) -> None:
    moved = data.to("meta")
    assert moved.device.type == next(moved.test_batches(2))[0].device.type == "meta"
    assert moved.to("cpu").fingerprint == data.fingerprint


# The whole of it, on real images


@pytest.fixture(scope="module")
def sample(imagenet_folder: Path) -> ImageFolders:
    """Return 48 real images to train and 24 to test."""
    whole = load_data("imagenet", imagenet_folder, holdout=0.1)
    return whole.take(torch.arange(48), torch.arange(48, 72))


SETTINGS: dict[str, Any] = {
    **{"profile": "paper", "dataset": "imagenet", "model": "cnn", "width": 4, "epochs": 2},
    **{"batch_size": 8, "lr": 0.01},
}

KILLED = """
import sys
from pathlib import Path
from tests.data.test_imagenet import killed_at
from swdlib.data.load import load_data
import torch
torch.set_num_threads(1)
whole = load_data("imagenet", sys.argv[1], holdout=0.1)
killed_at(8, whole.take(torch.arange(48), torch.arange(48, 72)), Path(sys.argv[2]))
"""


def carry_out(sample: ImageFolders, **options: Any) -> tuple[list[dict[str, Any]], Any]:
    """Train on the sample and return the rows, without their times, and the weights."""
    config = Config(**SETTINGS)
    model = config.build(sample)
    phases = config.phases(next(sample.test_batches(2))[0])
    rows = train(model, sample, phases, **config.options(progress=False, **options))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows], model.state_dict()


def killed_at(step: int, sample: ImageFolders, checkpoint: Path) -> None:
    """Train, write a checkpoint at every step, and die at one of them."""
    make = Config(**SETTINGS).options()["optimizer"]

    def optimizer(parameters: Any) -> Any:
        made, taken = make(parameters), [0]

        def count(*_: Any) -> None:
            taken[0] += 1
            if taken[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)

        made.register_step_post_hook(count)
        return made

    carry_out(sample, checkpoint=checkpoint, save_every=1, optimizer=optimizer)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_on_real_images_ends_as_an_unbroken_one(
    sample: ImageFolders, imagenet_folder: Path, tmp_path: Path
) -> None:
    whole, weights = carry_out(sample)
    checkpoint = tmp_path / "run.pt"
    command = [sys.executable, "-c", KILLED, str(imagenet_folder), str(checkpoint)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert torch.load(checkpoint, weights_only=True)["position"]["steps"] == 7
    rows, resumed = carry_out(sample, checkpoint=checkpoint)
    assert rows == whole
    assert [row["kind"] for row in rows] == ["train", "train", "prune"]
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_on_a_sample_of_imagenet(
    imagenet_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    # Without the profile's bf16, which many processors emulate.
    command += ["--epochs=1", "--batch-size=64", "--precision=fp32", "--structure=weights"]
    command += ["--data-root", str(imagenet_folder)]
    with pytest.raises(SystemExit, match="one folder of images was found"):
        cli.main(["run", *command, "--records", str(tmp_path)])
    cli.main(["run", *command, "--holdout=0.1", "--records", str(tmp_path)])
    assert "swd at sparsity 0.9: cnn of width 4 on imagenet, 1 epochs" in capsys.readouterr().out
    table = load_records(tmp_path)
    assert table["data_source"].unique().tolist() == ["one folder of images"]
    assert table["precision"].unique().tolist() == ["fp32"]
    final = table.iloc[-1]
    assert 0 <= final["top1"] <= final["top5"] <= 100
    assert final["loss"] == pytest.approx(np.log(1000), abs=1.5)  # as good as chance
    assert final["sparsity"] == pytest.approx(0.9, abs=1e-3)
    [path] = tmp_path.rglob("*.safetensors.zlib")
    masks = load_sparse(build_model("cnn", width=4, size=224, classes=1000), path)
    assert sum(int((~mask).sum()) for mask in masks.values()) == final["weights"]["zeros"]
