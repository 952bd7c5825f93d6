"""Dry runs: every recipe at toy size, estimates by hand, and the published networks."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swdlib.data.load import SHAPES, load_data
from swdlib.recipes import RECIPES
from swdlib.runs import dryrun as dryruns
from swdlib.runs.config import Config
from swdlib.runs.dryrun import dry_run
from swdlib.runs.records import duration
from tests.data.test_imagenet_files import write_imagenet

TINY: dict[str, Any] = {"epochs": 6, "finetune_epochs": 2, "width": 4, "batch_size": 32}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every batch keep the loop busy for a second."""

    class Clocked(dryruns._Timed):
        def _time(self, batches: Any, seconds: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in batches:
                yield images, labels
                seconds.append(1 / len(labels))
            del seconds[1:]

        def read_seconds(self) -> float | None:
            return None if super().read_seconds() is None else 3 / 32

    monkeypatch.setattr(dryruns, "_Timed", Clocked)


@pytest.mark.usefixtures("clock")
def test_the_estimate_by_hand() -> None:
    estimate = dry_run(Config(**TINY), progress=False)
    assert estimate.images == "1,437 to train and 360 to test, from scikit-learn"
    # 44 batches of 32 and one of 29 in each of 6 epochs; evaluated after each, and after the cut.
    assert (estimate.steps, estimate.evaluations) == (6 * 45, 7)
    assert (estimate.step_seconds, estimate.read_seconds) == (pytest.approx(1), None)
    assert estimate.seconds == pytest.approx(6 * 45 + 7 * 360 / 32)
    assert estimate.parameters == sum(p.numel() for p in network().parameters())
    assert estimate.memory > 2**26


def network() -> torch.nn.Module:
    return Config(**TINY).build(load_data("digits"))


@pytest.mark.usefixtures("clock")
def test_a_step_waits_for_its_images(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path, 100, 40)
    settings = {"dataset": "imagenet", "data_root": str(root), "recipe": "dense", **TINY}
    estimate = dry_run(Config(**settings), progress=False)
    assert estimate.images == "100 to train and 40 to test, from folders train and val"
    assert (estimate.step_seconds, estimate.read_seconds) == (pytest.approx(3), pytest.approx(3))
    assert estimate.seconds == pytest.approx(6 * 4 * 3 + 6 * 40 * 3 / 32)
    assert "for 32 images, read in 3 s" in estimate.text()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_estimated(recipe: str) -> None:
    structure = "filters" if recipe == "liu2017" else "weights"
    estimate = dry_run(Config(recipe=recipe, structure=structure, **TINY), progress=False)
    assert estimate.steps == 6 * 45
    assert 0 < estimate.step_seconds < estimate.seconds
    assert f"Dry run of {recipe}" in estimate.text()


@pytest.mark.parametrize("dataset", SHAPES)
def test_images_that_are_not_found_are_random(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swdlib.data.cifar10._download", _no_download)
    *_, trained, _ = SHAPES[dataset]
    settings = {**TINY, "batch_size": 4, "dataset": dataset, "data_root": str(tmp_path)}
    estimate = dry_run(Config(**settings), progress=False)
    assert "random ones of the same shape: " in estimate.images
    assert estimate.images.endswith(("ImageNet was not found", "CIFAR-10 was not found"))
    assert estimate.steps == 6 * -(-trained // 4)
    held = dry_run(Config(**settings, holdout=0.1), progress=False)
    assert held.steps == 6 * -(-(trained - round(trained / 10)) // 4)
    assert held.evaluations == 7


def test_shapes_are_those_of_the_datasets(tmp_path: Path) -> None:
    data = load_data("imagenet", write_imagenet(tmp_path, 1, 1))
    assert (data.channels, data.size, data.classes) == SHAPES["imagenet"][:3]


def test_little_data_will_do() -> None:
    estimate = dry_run(Config(**{**TINY, "batch_size": 2000}), progress=False)
    assert estimate.steps == 6


def test_a_published_network_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dryruns.PUBLISHED, ("digits", "cnn", 4), 1_000)
    with pytest.raises(ValueError, match="cnn must have 1,000 parameters, as published, not 1,"):
        dry_run(Config(**TINY), progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("dataset", "batch_size", "count"), [("cifar10", 4, 4_330_442), ("imagenet", 2, 25_587_240)]
)
def test_the_published_configurations(
    dataset: str, batch_size: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swdlib.data.cifar10._download", _no_download)
    config = Config(profile="paper", dataset=dataset, data_root=str(tmp_path))
    # Without bf16, which many processors emulate.
    small = dataclasses.replace(config, batch_size=batch_size, precision="fp32")
    estimate = dry_run(small, progress=False)
    assert estimate.parameters == count
    assert f"{count:,} parameters, as published" in estimate.text()
    *_, trained, _ = SHAPES[dataset]
    # A last batch of one image is left out.
    assert estimate.steps == config.epochs * (trained // batch_size)


def _no_download(root: Path, tried: list[str]) -> Path:
    raise FileNotFoundError("CIFAR-10 was not found. Put it where one of these looks:")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (1.5, "1.5 s"),
        (119, "119 s"),
        (150, "2.5 minutes"),
        (9000, "2.5 hours"),
        (2e6, "23.1 days"),
    ],
)
def test_durations_are_told_in_units_that_fit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
