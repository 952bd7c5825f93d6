"""Workers: the runs of a sweep as processes of this machine, or as tasks of Ray."""

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swdlib.runs import records
from swdlib.runs.config import Config
from swdlib.runs.run import BUSY, Busy, lock_of, run
from swdlib.schedules import check_count


@dataclass(frozen=True)
class Workers:
    """What does the runs of a sweep.

    `start` starts one; its future ends when the run's record is written, or raises: Busy if another
    process is doing the run. `slots` is how many may be started at a time.
    """

    start: Callable[[Config], "Future[Any]"]
    slots: int


def flags(config: Config) -> list[str]:
    """The arguments of `swdlib run` that make this configuration."""
    given = {name: value for name, value in config.settings().items() if value is not None}
    text = {n: str(v).lower() if isinstance(v, bool) else str(v) for n, v in given.items()}
    # One word each, so that no value can be mistaken for another flag.
    return [f"--{name.replace('_', '-')}={value}" for name, value in text.items()]


@contextmanager
def local(folder: Path, jobs: int = 1) -> Iterator[Workers]:
    """Processes of this machine, `jobs` at a time, each a `swdlib run`.

    A single one shows its progress; with several, each writes to a .log file beside its checkpoint.
    Those that still run when the context ends are stopped as by Ctrl-C.
    OMP_NUM_THREADS sets the threads of each.
    """
    check_count("jobs", jobs)
    running: set[subprocess.Popen[bytes]] = set()

    def start(config: Config) -> "Future[None]":
        path = lock_of(records.path_of(config.settings(), folder)).with_suffix(".log")
        log = path if jobs > 1 else None
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") if log else nullcontext() as messages:
            process = subprocess.Popen(
                [sys.executable, "-m", "swdlib.cli", "run", *flags(config), f"--records={folder}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=messages,
                start_new_session=True,  # Ctrl-C reaches only the sweep, which then stops its runs
            )
        running.add(process)
        return pool.submit(_finish, process, log)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield Workers(start, jobs)
        finally:
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)


def _finish(process: "subprocess.Popen[bytes]", log: Path | None) -> None:
    code = process.wait()
    if code == BUSY:
        raise Busy("the run is being done by another process")
    if code:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        raise RuntimeError(f"{how}; see {log}" if log else how)
    if log:
        log.unlink(missing_ok=True)


@contextmanager
def on_ray(
    folder: Path, *, cpus: float = 1, gpus: float = 0, address: str | None = None
) -> Iterator[Workers]:
    """Tasks of Ray that ask for `cpus` and `gpus` each; with a fraction, tasks share a GPU.

    `address` is that of a cluster, by default RAY_ADDRESS; without either, Ray is started on this
    machine. On a cluster, all machines see `folder` under the same path and have swdlib installed.
    The sweep restarts what fails, not Ray.
    """
    for name, number in {"cpus": cpus, "gpus": gpus}.items():
        if not number >= 0:
            raise ValueError(f"{name} must be 0 or more, not {number:g}")
    ray = _import_ray()
    folder = folder.absolute()  # a worker has another current folder
    started = not ray.is_initialized()
    if started:
        before = signal.getsignal(signal.SIGTERM)
        ray.init(address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's handler would exit without any clean-up
    resources = [node["Resources"] for node in ray.nodes()]
    if not any(r.get("CPU", 0) >= cpus and r.get("GPU", 0) >= gpus for r in resources):
        # Only a warning, since an autoscaling cluster may add such a machine.
        words = f"{cpus:g} CPUs and {gpus:g} GPUs"
        warnings.warn(f"Ray has no machine with {words}: runs wait until one comes", stacklevel=3)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_task)
    references: list[Any] = []

    def start(config: Config) -> "Future[None]":
        settings = config.settings()
        if config.data_root is not None:
            settings["data_root"] = str(Path(config.data_root).expanduser().absolute())
        references.append(task.remote(settings, folder, max(1, int(cpus))))
        return references[-1].future()

    try:
        yield Workers(start, slots=10_000)  # Ray holds tasks back until there is room
    finally:
        for reference in references:
            ray.cancel(reference)  # does nothing to one that has ended
        if references:
            ray.wait(references, num_returns=len(references), timeout=5)
        if started:
            ray.shutdown()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # report nothing to anyone
    try:
        import ray
    except ImportError as error:
        raise ImportError("--on ray needs Ray: pip install 'swdlib[ray]'") from error
    return ray


def _task(settings: dict[str, Any], folder: Path, threads: int) -> None:
    import torch

    # Ray cancels by SIGINT, which processes of a sweep in the background would ignore.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    run(Config(**settings), folder, progress=False)
