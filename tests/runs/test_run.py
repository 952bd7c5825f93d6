"""Configurations, runs and their records; a killed run ends as an uninterrupted one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from swdlib.data.images import Dataset, Split
from swdlib.data.load import load_data
from swdlib.deploy.stored import load_sparse
from swdlib.metrics import evaluate
from swdlib.recipes import RECIPES
from swdlib.runs import records
from swdlib.runs import run as experiments
from swdlib.runs import training as checkpoints
from swdlib.runs.config import Config
from swdlib.runs.run import Busy, is_locked, lock, lock_of, run
from swdlib.runs.training import train
from swdlib.structures import STRUCTURES
from tests.conftest import without_time

ROOT = Path(__file__).resolve().parents[2]
QUICK: dict[str, Any] = {"epochs": 2, "finetune_epochs": 1, "width": 4}


def quick_config(recipe: str, structure: str) -> Config:
    network = {"model": "mlp", "width": 16} if structure == "channels" else {}
    more = {"epochs": 3} if recipe == "wang2021" else {}  # before and after its choice, and tuning
    return Config(recipe=recipe, structure=structure, sparsity=0.5, **{**QUICK, **network, **more})


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_recipe_makes_a_record(recipe: str, structure: str, tmp_path: Path) -> None:
    if recipe == "liu2017" and "filters" not in structure:
        return  # nothing else has batch-norm scales: Config refuses it
    config = quick_config(recipe, structure)
    record = run(config, tmp_path, progress=False)
    assert record.status == "finished"
    final = record.final
    assert {"loss", "top1", "top5", "sparsity", "parameters", "weights"} <= final.keys()
    assert record.provenance["dataset"]["fingerprint"] == load_data("digits").fingerprint
    assert record.provenance["dataset"]["train_images"] == 1437
    assert record.provenance["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record.provenance["code"] == experiments.code()
    assert ("renewed_top1" in final) == (config.model == "cnn")  # an mlp has no batch norm
    if recipe == "dense":
        assert final["sparsity"] == 0
    elif structure == "weights":
        total = sum(final["weights"]["counts"]) + final["weights"]["zeros"]
        assert final["sparsity"] == pytest.approx(round(0.5 * total) / total, abs=1e-12)
    elif structure == "parameters":
        # Scales of batch norm are counted, which are large, unless they rank at random.
        assert 0.48 < final["sparsity"] < (0.52 if recipe == "random_pruning" else 0.5)
    else:
        assert 0.5 <= final["sparsity"] < 0.6  # a filter of a network as small as this is large


@pytest.mark.parametrize("structure", ["filters", "filters_and_channels"])
def test_what_is_left_of_a_shrunk_network_is_measured_again(structure: str, tmp_path: Path) -> None:
    """The last row is that of the smaller network, which computes what the masked one does."""
    config = Config(recipe="one_shot", structure=structure, sparsity=0.7, epochs=2)
    *_, masked, shrunk = run(config, tmp_path, progress=False).rows
    assert (masked["kind"], shrunk["kind"]) == ("prune", "shrink")
    same = ("parameters", "sparsity", "top1", "top5", "epoch", "step", "weights")
    assert [shrunk[name] for name in same] == [masked[name] for name in same]
    assert shrunk["loss"] == pytest.approx(masked["loss"], rel=1e-5)
    assert shrunk["macs"] < shrunk["dense_macs"]
    assert shrunk["latency_ms"] > 0 < shrunk["dense_latency_ms"]


def test_a_network_that_stays_as_large_is_not_measured_again(tmp_path: Path) -> None:
    kinds = [Config(recipe="one_shot", structure=s, **QUICK) for s in ("weights", "kernels")]
    for config in [*kinds, Config(recipe="dense", structure="filters", **QUICK)]:
        assert run(config, tmp_path, progress=False).final["kind"] != "shrink"


def test_the_trained_network_lies_beside_its_record(tmp_path: Path) -> None:
    config = Config(sparsity=0.75, **QUICK)
    record = run(config, tmp_path, progress=False)
    [path] = tmp_path.rglob("*.safetensors.zlib")
    network = config.build(load_data("digits"))
    masks = load_sparse(network, path)
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    assert zeros == record.final["weights"]["zeros"]
    assert evaluate(network, load_data("digits"))["top1"] == record.final["top1"]
    assert not list(tmp_path.rglob("*.pt"))


def test_a_run_on_record_is_not_run_again(tmp_path: Path, monkeypatch: Any) -> None:
    config = Config(**QUICK)
    first = run(config, tmp_path, progress=False)
    monkeypatch.setattr(experiments, "train", None)  # which would fail if it were called
    assert run(dataclasses.replace(config, device="cpu"), tmp_path) == first
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        run(config, tmp_path, again=True)


def test_a_run_is_locked_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = Config(**QUICK), list[bool]()
    path = lock_of(records.path_of(config.settings(), tmp_path))

    def look(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        seen.append(is_locked(path))
        with pytest.raises(Busy, match=f"{path.stem} is being run by another process"):
            run(config, tmp_path)
        return train(*arguments, **options)

    monkeypatch.setattr(experiments, "train", look)
    run(config, tmp_path, progress=False)
    assert seen == [True] and not list(path.parent.iterdir())


def test_a_run_on_record_needs_no_lock(tmp_path: Path) -> None:
    config = Config(**QUICK)
    record = run(config, tmp_path, progress=False)
    with lock(lock_of(records.path_of(config.settings(), tmp_path))):
        assert run(config, tmp_path) == record
        with pytest.raises(Busy):
            run(config, tmp_path, again=True)


def test_a_record_that_was_written_while_the_run_waited_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(**QUICK)
    record = run(config, tmp_path / "other", progress=False)

    @contextmanager
    def lock_after_another(path: Path) -> Iterator[None]:
        records.save(record, tmp_path)
        with lock(path):
            yield

    monkeypatch.setattr(experiments, "lock", lock_after_another)
    monkeypatch.setattr(experiments, "train", None)  # which would fail if it were called
    assert run(config, tmp_path) == record


def test_other_processes_of_an_accelerate_run_take_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(**QUICK)
    monkeypatch.setattr(experiments, "is_main_process", lambda: False)
    with lock(lock_of(records.path_of(config.settings(), tmp_path))):
        assert run(config, tmp_path, progress=False).status == "finished"
    assert not list(tmp_path.rglob("*.json"))


def test_again_starts_from_the_start_and_other_code_does_not_go_on(
    tmp_path: Path, monkeypatch: Any
) -> None:
    config = Config(**QUICK)
    record = run(config, tmp_path / "whole", progress=False)
    save = checkpoints.save_checkpoint

    def stop(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Config, "options", partialmethod(Config.options, save_every=10))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save_checkpoint", stop)
        run(config, tmp_path, progress=False)
    monkeypatch.setattr(experiments, "code_digest", lambda: "other")
    with pytest.raises(ValueError, match=r"checkpoint of another run.* resume with the settings"):
        run(config, tmp_path, progress=False)
    lost = torch.load(next(tmp_path.rglob("*.pt")), weights_only=True)
    lost["model"] = {name: 0 * tensor for name, tensor in lost["model"].items()}
    save(next(tmp_path.rglob("*.pt")), {**lost, "run": {**lost["run"], "code": "other"}})
    rows = run(config, tmp_path, again=True, progress=False).rows
    assert without_time(rows) == without_time(record.rows)


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


def times_of_checkpoints(folder: Path) -> set[int]:
    try:
        return {path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    except FileNotFoundError:  # the run has just ended and removed its checkpoint
        return set()


def kill_after_a_checkpoint(recipe: str, folder: Path) -> None:
    """Start a run and kill it once it has written a new checkpoint."""
    known = times_of_checkpoints(folder)
    process = start(recipe, folder)
    while not times_of_checkpoints(folder) - known:
        assert process.poll() is None  # it has not ended before
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["swd", "han2015"])
def test_a_killed_run_ends_as_an_unbroken_one(recipe: str, tmp_path: Path) -> None:
    unbroken = start(recipe, tmp_path / "whole")
    for _ in range(2):
        kill_after_a_checkpoint(recipe, tmp_path / "killed")
    assert start(recipe, tmp_path / "killed").wait() == 0
    assert unbroken.wait() == 0
    [whole], [resumed] = ((tmp_path / n).rglob("*.json") for n in ("whole", "killed"))
    expected, found = (json.loads(path.read_text("utf-8")) for path in (whole, resumed))
    assert without_time(found["rows"]) == without_time(expected["rows"])
    assert found["config"] == expected["config"]
    networks = [path.with_suffix(".safetensors.zlib").read_bytes() for path in (whole, resumed)]
    assert networks[0] == networks[1]


@pytest.fixture(scope="module")
def some_of_cifar10(cifar10_folder: Path) -> Dataset:
    """Return every hundredth image of CIFAR-10: 500 to train, 100 to test."""
    whole = load_data("cifar10", cifar10_folder)
    train, test = (Split(s.images[::100], s.labels[::100]) for s in (whole.train, whole.test))
    return dataclasses.replace(whole, train=train, test=test)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_swd_on_cifar10_with_every_structure(structure: str, some_of_cifar10: Dataset) -> None:
    model, width = ("mlp", 32) if structure == "channels" else ("resnet20", 4)
    config = Config(
        profile="laptop", model=model, structure=structure, sparsity=0.5, epochs=2, width=width
    )
    network = config.build(some_of_cifar10)
    example = some_of_cifar10.test.images[:2].float()
    phases = config.phases(example)
    rows = train(network, some_of_cifar10, phases, **config.options(progress=False))
    assert 0.5 <= rows[-1]["sparsity"] < 0.53  # a filter holds up to two hundredths
    assert rows[-1]["parameters"] < sum(p.numel() for p in network.parameters())
    assert rows[-2]["norm_selected"] < rows[0]["norm_selected"]
    assert {"entered", "left", "selected", "norm_kept"} <= rows[-2].keys()
