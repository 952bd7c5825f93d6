"""Workers: runs in processes and on Ray; a killed run ends as an uninterrupted one."""

import os
import signal
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from swdlib import cli
from swdlib.recipes import RECIPES
from swdlib.runs import records
from swdlib.runs import workers as swd_workers
from swdlib.runs.config import WITH_SCALES, Config
from swdlib.runs.run import is_locked, lock_of, run
from swdlib.runs.sweep import Outcome, sweep
from swdlib.runs.workers import Workers, flags, local, on_ray
from swdlib.structures import STRUCTURES
from tests.conftest import without_time

QUICK: dict[str, Any] = {"epochs": 1, "width": 4}
LONG = Config(epochs=30, width=4)  # long enough for several checkpoints


def lock_in(folder: Path, config: Config) -> Path:
    return lock_of(records.path_of(config.settings(), folder))


@pytest.mark.parametrize(
    ("recipe", "structure"),
    [(r, s) for r in RECIPES for s in STRUCTURES if r != "liu2017" or s in WITH_SCALES],
)
def test_flags_make_the_same_configuration(recipe: str, structure: str) -> None:
    more: dict[str, Any] = {"clip": 1e-7, "nesterov": False, "data_root": "-a folder", "lr": 0.1}
    for config in (
        Config(recipe=recipe, structure=structure),
        Config(recipe=recipe, structure=structure, model="resnet18", **more),
    ):
        options = cli.parser().parse_args(["run", *flags(config)])
        assert Config(**cli._given(options)) == config


def wait_for(there: Any) -> None:
    until = time.monotonic() + 120
    while not there():
        assert time.monotonic() < until, "nothing came of it"
        time.sleep(0.005)


def process_of(folder: Path, config: Config) -> psutil.Process:
    """Return the process that has the lock of a run, once it has written a checkpoint."""
    path, found = lock_in(folder, config), list[psutil.Process]()

    def search() -> bool:
        if path.with_suffix(".pt").exists():
            for process in psutil.process_iter(["open_files"]):
                paths = [file.path for file in process.info["open_files"] or []]  # None: not ours
                if str(path.resolve()) in paths and process.pid != os.getpid():
                    found.append(process)
        return bool(found)

    wait_for(search)
    return found[0]


def sweep_and_kill(folder: Path, workers: Workers) -> tuple[list[Outcome], list[str]]:
    """Do two runs; kill the process of the first once it has written a checkpoint."""
    configs = [LONG, Config(seed=1, **QUICK)]
    lines: list[str] = []
    killer = threading.Thread(target=lambda: process_of(folder, LONG).kill(), daemon=True)
    killer.start()
    return list(sweep(configs, folder, workers, tell=lines.append)), lines


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the record of LONG, made here without a break."""
    folder = tmp_path_factory.mktemp("unbroken")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(LONG, folder, progress=False)
    torch.set_num_threads(threads)
    return folder


def assert_same_run(found: Path, expected: Path) -> None:
    one, other = (records.path_of(LONG.settings(), folder) for folder in (found, expected))
    rows = [without_time(records.load(path).rows) for path in (one, other)]
    assert rows[0] == rows[1]
    networks = [path.with_suffix(".safetensors.zlib").read_bytes() for path in (one, other)]
    assert networks[0] == networks[1]


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_ends_as_an_unbroken_one(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with local(tmp_path, jobs=2) as workers:
        outcomes, lines = sweep_and_kill(tmp_path, workers)
    assert all(outcome.record for outcome in outcomes)
    [again] = [line for line in lines if line.startswith("restarted")]
    assert "killed by SIGKILL; see " in again
    assert_same_run(tmp_path, unbroken)
    assert not list((tmp_path / "smoke" / "checkpoints").iterdir())  # nor a log


@pytest.mark.slow
def test_processes_that_still_run_are_stopped_and_release_their_locks(tmp_path: Path) -> None:
    lost = Config(dataset="cifar10", data_root=str(tmp_path / "grid.toml"), **QUICK)
    (tmp_path / "grid.toml").write_text("no archive", "utf-8")
    with local(tmp_path, jobs=2) as workers:
        running, failing = workers.start(LONG), workers.start(lost)
        with pytest.raises(RuntimeError, match=r"exit status 1; see .*\.log"):
            failing.result()
        log = lock_in(tmp_path, lost).with_suffix(".log").read_text("utf-8")
        assert "grid.toml is damaged" in log
        process_of(tmp_path, LONG)
    with pytest.raises(RuntimeError, match="exit status 1"):
        running.result()
    assert not is_locked(lock_in(tmp_path, LONG)) and not lock_in(tmp_path, LONG).exists()
    assert lock_in(tmp_path, LONG).with_suffix(".pt").exists()


def test_no_jobs_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="jobs must be a whole number of at least 1, not 0"),
        local(tmp_path, 0),
    ):
        pass


def test_without_ray_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ImportError, match=r"needs Ray: pip install 'swdlib\[ray\]'"),
        on_ray(tmp_path),
    ):
        pass


class TwoMachines:
    """Stands for Ray on two machines, one with GPUs, where every task is over at once."""

    def __getattr__(self, name: str) -> Any:  # is_initialized, remote and its result, cancel
        return lambda *arguments, **options: self

    def __call__(self, *arguments: Any) -> "TwoMachines":
        return self

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Resources": {"CPU": 64.0}}, {"Resources": {"CPU": 4.0, "GPU": 2.0}}]


def test_what_no_machine_has_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swd_workers, "_import_ray", TwoMachines)
    with on_ray(tmp_path, cpus=4, gpus=0.5), on_ray(tmp_path, cpus=64):
        pass
    with (
        pytest.warns(UserWarning, match=r"no machine with 64 CPUs and 1 GPUs: runs wait"),
        on_ray(tmp_path, cpus=64, gpus=1),
    ):
        pass


@pytest.mark.slow
def test_a_lost_worker_of_ray_is_replaced_and_its_run_ends_as_an_unbroken_one(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=2))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    stopping = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves its log files open
        with on_ray(tmp_path) as workers:
            assert signal.getsignal(signal.SIGTERM) == stopping
            outcomes, lines = sweep_and_kill(tmp_path, workers)
    assert not ray.is_initialized()
    assert [outcome.error for outcome in outcomes] == [""] * 2
    [again] = [line for line in lines if line.startswith("restarted")]
    assert "The worker died unexpectedly" in again
    assert_same_run(tmp_path, unbroken)
