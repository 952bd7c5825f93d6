"""Configurations, runs and their records; a killed run ends as an unbroken one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from swdlib import experiments, records
from swdlib.data import load_data
from swdlib.experiments import LR_SCHEDULES, PROFILES, Config, build, phases_of, run
from swdlib.recipes import RECIPES, Prune, Train
from swdlib.structures import STRUCTURES

ROOT = Path(__file__).resolve().parents[1]
QUICK: dict[str, Any] = {"epochs": 3, "finetune_epochs": 1, "width": 4}


def address(**settings: Any) -> str:
    return records.address(Config(**settings).settings())


def test_what_is_not_given_comes_from_the_profile() -> None:
    config = Config(profile="laptop", epochs=3)
    assert (config.dataset, config.model, config.width, config.epochs) == (
        "cifar10",
        "resnet20",
        8,
        3,
    )
    assert dataclasses.replace(config, seed=1).epochs == 3


def test_the_paper_profile_is_the_published_set_up() -> None:
    config = Config(profile="paper")
    published = {
        "dataset": "cifar10",
        "model": "resnet20",
        "width": 64,
        "epochs": 300,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 5e-4,
        "a_min": 0.1,
        "a_max": 1e5,
    }
    assert published.items() <= config.settings().items()
    [training, _] = phases_of(config)
    assert isinstance(training, Train)
    rates = [training.lr(epoch / 300) for epoch in (0, 99, 100, 199, 200, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_learning_rates_peak_at_lr_and_end_at_a_hundredth(name: str) -> None:
    course = LR_SCHEDULES[name](0.2)
    assert max(course(step / 100) for step in range(101)) == pytest.approx(0.2)
    assert course(1.0) == pytest.approx(0.002)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_profile_runs_every_recipe(profile: str, recipe: str, structure: str) -> None:
    config = Config(profile=profile, recipe=recipe, structure=structure)
    phases = phases_of(config)
    assert sum(phase.epochs for phase in phases if isinstance(phase, Train)) == config.epochs
    cuts = [phase.sparsity for phase in phases if isinstance(phase, Prune)]
    assert cuts[-1:] == ([] if recipe == "dense" else [0.9])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": "desktop"}, "profile must be one of smoke, laptop, paper, not 'desktop'"),
        ({"dataset": "mnist"}, "dataset must be one of digits, cifar10, not 'mnist'"),
        ({"recipe": "magic"}, "recipe must be one of dense, swd, han2015, not 'magic'"),
        ({"structure": "rows"}, "structure must be one of weights, kernels, not 'rows'"),
        ({"update": "newton"}, "update must be one of gradient, proximal, not 'newton'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, not 'fp8'"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), not -0.1"),
        ({"sparsity": float("nan")}, "sparsity must be a finite number, not nan"),
        ({"sparsity": "0.9"}, "sparsity must be of type float, not '0.9'"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"epochs": 2.5}, "epochs must be of type int, not 2.5"),
        ({"epochs": True}, "epochs must be of type int, not True"),
        ({"nesterov": "true"}, "nesterov must be of type bool, not 'true'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov must be false if momentum is 0"),
        ({"lr": 0.0}, "lr must be above 0, not 0.0"),
        ({"a_min": 0.0}, "a_min must be above 0, not 0.0"),
        ({"weight_decay": -1e-4}, "weight_decay must be 0 or more, not -0.0001"),
        ({"holdout": 1.0}, r"holdout must be in \[0, 1\), not 1.0"),
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"clip": 0.0}, "clip must be above 0, not 0.0"),
        ({"recipe": "han2015", "epochs": 5, "finetune_epochs": 5}, "less than epochs"),
        ({"recipe": "han2015", "iterations": 7}, r"at least iterations \(7\)"),
    ],
)
def test_an_impossible_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_equal_settings_have_one_address() -> None:
    assert address(lr=1) == address(lr=1.0) == address(lr=np.float64(1))
    assert address(seed=np.int64(3)) == address(seed=3)
    assert address(data_root="/somewhere", device="cpu") == address()


def test_settings_that_a_recipe_does_not_use_do_not_tell_runs_apart() -> None:
    assert address(recipe="dense", sparsity=0.5, a_max=10.0) == address(recipe="dense")
    assert address(recipe="han2015", a_max=10.0) == address(recipe="han2015")
    assert address(recipe="swd", a_max=10.0) != address(recipe="swd")
    assert address(recipe="dense", weight_decay=0.0) != address(recipe="dense")


def test_torchvision_networks_have_no_width() -> None:
    assert Config(model="resnet18").width is None


def test_the_seed_draws_the_network() -> None:
    data = load_data("digits")
    first, again, other = (build(Config(seed=seed, width=4), data) for seed in (0, 0, 1))
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_recipe_makes_a_record(recipe: str, structure: str, tmp_path: Path) -> None:
    config = Config(recipe=recipe, structure=structure, sparsity=0.5, **QUICK)
    record = run(config, tmp_path, progress=False)
    assert record.status == "finished"
    final = record.final
    assert {"loss", "top1", "top5", "sparsity", "parameters", "weights"} <= final.keys()
    assert record.provenance["dataset"]["fingerprint"] == load_data("digits").fingerprint
    assert record.provenance["dataset"]["train_images"] == 1437
    assert record.provenance["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record.provenance["code"]["digest"] == experiments.code_digest()
    if recipe == "dense":
        assert final["sparsity"] == 0
    elif structure == "weights":
        total = sum(final["weights"]["counts"]) + final["weights"]["zeros"]
        assert final["sparsity"] == pytest.approx(round(0.5 * total) / total, abs=1e-12)
    else:
        assert 0.5 <= final["sparsity"] < 0.51


def test_the_trained_network_lies_beside_its_record(tmp_path: Path) -> None:
    config = Config(sparsity=0.75, **QUICK)
    record = run(config, tmp_path, progress=False)
    [path] = tmp_path.rglob("*.safetensors")
    zeros = sum(int((t == 0).sum()) for t in load_file(path).values() if t.ndim >= 2)
    assert zeros == record.final["weights"]["zeros"]
    assert not list(tmp_path.rglob("*.pt"))


def test_a_run_on_record_is_not_run_again(tmp_path: Path, monkeypatch: Any) -> None:
    config = Config(**QUICK)
    first = run(config, tmp_path, progress=False)
    monkeypatch.setattr(experiments, "train", None)  # which would fail if it were called
    assert run(dataclasses.replace(config, device="cpu"), tmp_path) == first
    with pytest.raises(TypeError):
        run(config, tmp_path, again=True)


def test_two_runs_of_one_configuration_agree(tmp_path: Path) -> None:
    config = Config(**QUICK)
    first, second = (run(config, tmp_path / name, progress=False) for name in "ab")
    assert without_time(first.rows) == without_time(second.rows)


def test_a_diverged_run_is_on_record(tmp_path: Path) -> None:
    record = run(Config(lr=1e20, **QUICK), tmp_path, progress=False)
    assert record.status == "diverged"
    assert "diverged" in record.provenance["error"]
    [path] = tmp_path.rglob("*.json")
    assert records.load(path) == record


def test_held_out_images_take_the_place_of_the_test_images(tmp_path: Path) -> None:
    record = run(Config(holdout=0.1, **QUICK), tmp_path, progress=False)
    counts = record.provenance["dataset"]
    assert (counts["train_images"], counts["test_images"]) == (1293, 144)


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


KILLED = """
import sys
import torch
from swdlib import Config, run
torch.set_num_threads(1)
run(Config(recipe=sys.argv[1], epochs=40, finetune_epochs=20, width=4), sys.argv[2], progress=False)
"""


def start(recipe: str, folder: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, recipe, str(folder)]
    return subprocess.Popen(command, env=environment, cwd=ROOT)


def kill_after_a_checkpoint(recipe: str, folder: Path) -> bool:
    """Start a run, kill it once it has written a new checkpoint; False if it finished first."""
    known = {path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    process = start(recipe, folder)
    while process.poll() is None:
        if {path.stat().st_mtime_ns for path in folder.rglob("*.pt")} - known:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    assert process.returncode == 0
    return False


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["swd", "han2015"])
def test_a_killed_run_ends_as_an_unbroken_one(recipe: str, tmp_path: Path) -> None:
    assert start(recipe, tmp_path / "whole").wait() == 0
    killed = 0
    while kill_after_a_checkpoint(recipe, tmp_path / "killed"):
        killed += 1
    assert killed >= 2
    [whole], [resumed] = ((tmp_path / n).rglob("*.json") for n in ("whole", "killed"))
    expected, found = (json.loads(path.read_text("utf-8")) for path in (whole, resumed))
    assert without_time(found["rows"]) == without_time(expected["rows"])
    assert found["config"] == expected["config"]
    weights = [load_file(path.with_suffix(".safetensors")) for path in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
