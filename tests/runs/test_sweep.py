"""Sweeps: every combination once, on record once, and failures told at the end."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swdlib.runs import records
from swdlib.runs import sweep as sweeps
from swdlib.runs.config import Config
from swdlib.runs.records import Record
from swdlib.runs.run import lock, lock_of
from swdlib.runs.sweep import grid, read_grid, sweep
from swdlib.runs.workers import Workers

ROOT = Path(__file__).resolve().parents[2]


def test_the_grid_has_every_combination_once() -> None:
    configs = grid({"recipe": ["dense", "swd"], "sparsity": [0.5, 0.9], "seed": [0, 1]})
    found = [(c.recipe, c.sparsity, c.seed) for c in configs]
    assert found == [
        ("dense", 0.0, 0),
        ("dense", 0.0, 1),
        *[("swd", sparsity, seed) for sparsity in (0.5, 0.9) for seed in (0, 1)],
    ]


def test_a_mistake_in_a_grid_comes_to_light_before_the_first_run() -> None:
    with pytest.raises(ValueError, match="sparsity"):
        grid({"sparsity": [0.5, 1.5]})


def written(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


BLOCKS = """
epochs = 3
seed = [0, 1]
[[grid]]
recipe = ["dense", "swd"]
[[grid]]
recipe = "swd"
sparsity = [0.9, 0.95]
epochs = 4
[[grid]]
recipe = "dense"
nesterov = true  # as the profile has it: the same runs again
"""


def test_a_grid_file_is_the_union_of_its_blocks(tmp_path: Path) -> None:
    found = [(c.recipe, c.sparsity, c.epochs, c.seed) for c in read_grid(written(tmp_path, BLOCKS))]
    assert found == [
        *[(*run, 3, seed) for seed in (0, 1) for run in (("dense", 0.0), ("swd", 0.9))],
        *[("swd", sparsity, 4, seed) for seed in (0, 1) for sparsity in (0.9, 0.95)],
    ]


def test_a_grid_file_needs_no_blocks_and_flags_take_the_place_of_its_settings(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, 'recipe = "swd"\nsparsity = [0.5, 0.6]\n')
    assert [c.sparsity for c in read_grid(path)] == [0.5, 0.6]
    found = read_grid(path, {"sparsity": [0.7], "device": ["cpu"]})
    assert [(c.sparsity, c.device) for c in found] == [(0.7, "cpu")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = ", r"grid\.toml: "),
        ("epoch = 3", r"grid\.toml: epoch is no setting; there are profile, dataset"),
        ("[grid]\nepochs = 3", r"grid must be blocks that begin with \[\[grid\]\]"),
        ("grid = 3", r"grid must be blocks"),
        ("[[grid]]\nsparsity = 1.5", r"grid\.toml: sparsity must be in \[0, 1\), not 1.5"),
        ("sparsity = nan", r"sparsity must be a finite number"),
        ('sparsity = "0.5"', r"sparsity must be of type float, not '0.5'"),
        ("epochs = []", r"epochs must be a text, number or truth value, or a list of them"),
        ("epochs = [[3]]", r"epochs must be a text"),
        ("recipe = [{a = 1}]", r"recipe must be a text"),
        ("[epochs]\na = 1", r"epochs must be a text"),
        ("seed = 2026-11-24", r"seed must be a text"),
    ],
)
def test_a_mistake_in_a_grid_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_grid(written(tmp_path, text))


@given(st.text() | st.text("=[]{}\"' \nepochs.1,"))
def test_any_text_is_a_grid_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = folder / "any.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert read_grid(path)
    except ValueError as error:
        assert "any.toml" in str(error)


@pytest.mark.parametrize("path", sorted((ROOT / "book" / "grids").glob("*.toml")), ids=str)
def test_the_grids_of_the_book_can_be_read(path: Path) -> None:
    assert read_grid(path)


# The loop, with runs that do not train ----------------------------------------------------------


class Here:
    """Workers whose runs are calls in a thread, which take the lock and write the record."""

    def __init__(self, folder: Path, fails: Callable[[Config, int], bool] | None = None):
        self.folder, self.fails, self.calls = folder, fails, list[Config]()
        self.workers = Workers(self.start, slots=1)

    def start(self, config: Config) -> "Future[None]":
        future: Future[None] = Future()
        threading.Thread(target=self._run, args=(config, future)).start()
        return future

    def _run(self, config: Config, future: "Future[None]") -> None:
        try:
            path = records.path_of(config.settings(), self.folder)
            with lock(lock_of(path)):
                if path.exists():
                    return future.set_result(None)  # as `run` does, if another was faster
                self.calls.append(config)
                if self.fails and self.fails(config, self.calls.count(config)):
                    raise RuntimeError("a story\nkilled by SIGKILL")
                records.save(record_of(config), self.folder)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)


def record_of(config: Config) -> Record:
    row = {"kind": "train", "top1": 50.0, "loss": 1.0, "parameters": 7, "sparsity": 0.0}
    return Record(config.settings(), [row], {"dataset": {"source": "made up"}})


SEEDS = [Config(seed=seed) for seed in range(4)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "POLL", 0.01)


def test_a_sweep_does_its_runs_in_order_and_what_is_on_record_not_again(tmp_path: Path) -> None:
    here, lines = Here(tmp_path), list[str]()
    records.save(record_of(SEEDS[1]), tmp_path)
    outcomes = list(sweep(SEEDS, tmp_path, here.workers, tell=lines.append))
    assert here.calls == [SEEDS[0], SEEDS[2], SEEDS[3]]
    assert {o.config.seed for o in outcomes} == {0, 1, 2, 3}
    assert all(o.record == record_of(o.config) and not o.error for o in outcomes)
    assert sum(line.startswith("next: ") for line in lines) == 3
    assert lines[-1].startswith("[4/4] swd at sparsity 0.9: cnn of width 16 on digits, 30 epochs")
    assert lines[-1].endswith("removed")
    assert any("; about " in line and line.endswith(" left") for line in lines[:-1])
    again = list(sweep(SEEDS, tmp_path, here.workers, tell=lines.append))
    assert len(here.calls) == 3 and len(again) == 4


def test_a_run_that_fails_is_restarted_and_the_others_go_on(tmp_path: Path) -> None:
    lines: list[str] = []
    # Seed 1 fails for ever, seed 2 twice.
    here = Here(tmp_path, lambda c, n: c.seed == 1 or (c.seed == 2 and n <= 2))
    outcomes = list(sweep(SEEDS, tmp_path, here.workers, retries=2, tell=lines.append))
    assert [c.seed for c in here.calls] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert [(o.config.seed, o.error) for o in outcomes] == [
        (0, ""),
        (1, "killed by SIGKILL"),
        (2, ""),
        (3, ""),
    ]
    again = [line for line in lines if line.startswith("restarted, since it failed (killed by")]
    assert len(again) == 4
    assert any("[2/4]" in line and "failed: killed by SIGKILL" in line for line in lines)


def test_two_sweeps_on_one_folder_do_no_run_twice(tmp_path: Path) -> None:
    both, found = [Here(tmp_path), Here(tmp_path)], dict[int, Any]()

    def work(number: int) -> None:
        configs = SEEDS if number else SEEDS[::-1]
        found[number] = list(sweep(configs, tmp_path, both[number].workers, tell=lambda line: None))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(c.seed for here in both for c in here.calls) == [0, 1, 2, 3]
    assert all(len(found[n]) == 4 and all(o.record for o in found[n]) for n in (0, 1))


def test_a_run_that_is_done_elsewhere_is_waited_for(tmp_path: Path) -> None:
    here, path = Here(tmp_path), records.path_of(SEEDS[0].settings(), tmp_path)
    ended = []
    with lock(lock_of(path)):
        outcomes = sweep(SEEDS[:2], tmp_path, here.workers, tell=lambda line: None)
        ended.append(next(outcomes).config.seed)
        records.save(record_of(SEEDS[0]), tmp_path)
        ended += [outcome.config.seed for outcome in outcomes]
    assert ended == [1, 0]
    assert here.calls == [SEEDS[1]]


def test_a_damaged_record_fails_its_run_and_no_other(tmp_path: Path) -> None:
    path = records.save(record_of(SEEDS[0]), tmp_path)
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, "config": {}}), encoding="utf-8")
    workers = Here(tmp_path).workers
    outcomes = list(sweep(SEEDS[:2], tmp_path, workers, tell=lambda line: None))
    assert "has been changed" in outcomes[0].error and outcomes[1].record


def test_a_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    workers = Here(tmp_path / "of another machine").workers
    [outcome] = sweep(SEEDS[:1], tmp_path, workers, tell=lambda line: None)
    assert "do all machines share that folder?" in outcome.error


def test_a_grid_too_deep_to_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "deep.toml").write_text("seed = " + 5000 * "[")
    with pytest.raises(ValueError, match=r"deep\.toml: .*recursion"):
        read_grid(tmp_path / "deep.toml")
