"""Places: where the runs of a sweep are done, in processes of this machine or as tasks of Ray."""

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
from swdlib.runs.run import BUSY, Busy, claim_of, run_alone


@dataclass(frozen=True)
class Place:
    """Where runs are done.

    `start` begins one; its future ends when the run's record is written, or raises: Busy if another
    process is doing the run. `slots` is how many are started at a time.
    """

    start: Callable[[Config], "Future[Any]"]
    slots: int


def flags(config: Config) -> list[str]:
    """The arguments of `swdlib run` that make this configuration."""
    given = {name: value for name, value in config.settings().items() if value is not None}
    # One word each, so that no value can be taken for another flag.
    return [f"--{name.replace('_', '-')}={_text(value)}" for name, value in given.items()]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def local(folder: Path, jobs: int = 1) -> Iterator[Place]:
    """Processes of this machine, `jobs` at a time, each a `swdlib run`.

    One at a time shows its bar; of several, what they say goes to a .log file beside the
    checkpoint. Those that still run when the context ends are stopped as by Ctrl-C. How many
    threads each has is said by OMP_NUM_THREADS, as ever.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    running: set[subprocess.Popen[bytes]] = set()

    def start(config: Config) -> "Future[None]":
        path = records.path_of(config.settings(), folder)
        log = claim_of(path).with_suffix(".log") if jobs > 1 else None
        process = _start([*flags(config), f"--records={folder}"], log)
        running.add(process)
        return pool.submit(_finish, process, log)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield Place(start, jobs)
        finally:
            for process in running:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)


def _start(arguments: list[str], log: Path | None) -> "subprocess.Popen[bytes]":
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") if log else nullcontext() as messages:
        return subprocess.Popen(
            [sys.executable, "-m", "swdlib.cli", "run", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=messages,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which then stops its runs
        )


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
) -> Iterator[Place]:
    """Tasks of Ray that ask for `cpus` and `gpus` each; a fraction of a GPU is shared.

    `address` is that of a cluster, by default RAY_ADDRESS; without either, Ray is started on this
    machine. On a cluster, all machines see `folder` under the same path and have swdlib installed.
    Ray retries nothing: the sweep does.
    """
    for name, number in {"cpus": cpus, "gpus": gpus}.items():
        if not number >= 0:
            raise ValueError(f"{name} must be 0 or more, not {number:g}")
    ray = _import_ray()
    folder = folder.absolute()  # a worker's current folder is another
    started = not ray.is_initialized()
    if started:
        with _own_handlers():
            ray.init(address, include_dashboard=False, log_to_driver=False, configure_logging=False)
    _warn_if_too_much(ray, {"CPU": cpus, "GPU": gpus})
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_task)
    references: list[Any] = []

    def start(config: Config) -> "Future[None]":
        settings = config.settings()
        if config.data_root is not None:
            settings["data_root"] = str(Path(config.data_root).expanduser().absolute())
        references.append(task.remote(settings, folder, max(1, int(cpus))))
        return references[-1].future()

    try:
        yield Place(start, slots=10_000)  # Ray holds back what has no room yet
    finally:
        for reference in references:
            ray.cancel(reference)  # one that is over stays as it is
        if references:
            ray.wait(references, num_returns=len(references), timeout=5)
        if started:
            ray.shutdown()


def _warn_if_too_much(ray: Any, asked: dict[str, float]) -> None:
    """Say so if no machine has what a run asks for: an autoscaling cluster may add one."""
    for node in ray.nodes():
        if all(node["Resources"].get(name, 0) >= number for name, number in asked.items()):
            return
    words = " and ".join(f"{number:g} {name}s" for name, number in asked.items())
    warnings.warn(f"Ray has no machine with {words}: runs wait until one comes", stacklevel=4)


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Keep what SIGTERM does: Ray would end the program without giving anything back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    try:
        import ray
    except ImportError as error:
        raise ImportError("--on ray needs Ray: pip install 'swdlib[ray]'") from error
    return ray


def _task(settings: dict[str, Any], folder: Path, threads: int) -> None:
    import torch

    # Ray cancels by SIGINT, which a sweep that was started in the background ignores.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    run_alone(Config(**settings), folder, progress=False)
