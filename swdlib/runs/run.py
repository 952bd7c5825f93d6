"""Runs: a configuration in, a record out. A run on record is not trained again."""

import copy
import hashlib
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from swdlib import published
from swdlib.comparing import in_eval
from swdlib.data.load import AnyDataset, load_data
from swdlib.deploy.shrinking import shrink
from swdlib.deploy.stored import is_stored, save_sparse
from swdlib.files import remove_unfinished
from swdlib.masks import NotFinite, kept
from swdlib.metrics import count_macs, evaluate, latencies, parameters, recalibrated
from swdlib.runs import records
from swdlib.runs.config import Config
from swdlib.runs.devices import Tracker, find_device, is_main_process, main_process_first
from swdlib.runs.records import Record
from swdlib.runs.training import Row, train
from swdlib.structures import is_prunable

# Structures whose units can be cut out of the network, which is then measured once more.
SHRINKABLE = ("filters", "channels", "filters_and_channels", "tessier_scales", "tessier_filters")

BUSY = 75  # exit status of `swdlib run` for Busy; sysexits.h: temporary failure, try again later


def run(
    config: Config, folder: str | Path | None = None, *, again: bool = False, progress: bool = True
) -> Record:
    """The record of `config`: read from `folder` if it is there, otherwise trained and written.

    A run that was stopped resumes from its checkpoint below `folder`; ValueError if other code
    wrote that. `again` trains from the start, whatever is there. Beside the record lies the trained
    network, as a sparse file (see `deploy.load_sparse`). Busy, an OSError, if another process or
    thread is doing the run, see `lock`. The default folder is `records.default_folder()`.
    """
    folder = Path(folder or records.default_folder())
    path = records.path_of(config.settings(), folder)
    checkpoint = lock_of(path).with_suffix(".pt")

    def is_done() -> bool:
        # A checkpoint beside the record is of a run with `again` that was stopped.
        return path.exists() and not again and not checkpoint.exists()

    if is_done():
        return records.load(path)
    device = find_device(config.device)  # the processes of one accelerate run find each other
    with lock(lock_of(path)) if is_main_process() else nullcontext():
        with main_process_first():
            if is_done():  # another process was faster
                return records.load(path)
            for file in (checkpoint, path, network_of(path)):
                remove_unfinished(file)
            if again:
                checkpoint.unlink(missing_ok=True)
            root, holdout = config.data_root, config.holdout
            data = load_data(config.dataset, root, device=device, holdout=holdout)
            data = config.normalised(data)
        model = config.build(data)
        identity = f"{records.address(config.settings())} by code {code_digest()}"
        options = config.options(checkpoint=checkpoint, identity=identity, progress=progress)
        if config.tracker:
            trackers = path.parent / "trackers"
            options["log_to"] = Tracker(config.tracker, trackers, path.stem, config.settings())
        record = _train(config, model, data, options)
        if is_main_process():
            weights = {name: p.detach() for name, p in model.named_parameters() if is_prunable(p)}
            masks = {name: is_stored(weight) for name, weight in weights.items()}
            save_sparse(model, masks, network_of(path))
            record.provenance["network"] = records.digest(network_of(path).read_bytes())
            records.save(record, folder)
            checkpoint.unlink(missing_ok=True)
        return record


def _train(config: Config, model: nn.Module, data: AnyDataset, options: dict[str, Any]) -> Record:
    # A record does not say where the data lay or which tracker watched.
    settings = {**config.settings(), "data_root": None, "tracker": None}
    facts = provenance(data)
    try:
        example = next(data.test_batches(2))[0]
        rows = train(model, data, config.phases(example), **options)
        if config.structure in SHRINKABLE:
            small = shrunk(model, config.structure, example)
            rows.append(_measure_shrunk(model, small, data, example, rows[-1]))
        twin = recalibrated(model, data)
        if twin is not None:
            measured = evaluate(twin, data)
            rows[-1] |= {f"renewed_{name}": value for name, value in measured.items()}
    except NotFinite as error:
        return Record(settings, [], {**facts, "error": str(error)}, status="diverged")
    return Record(settings, rows, facts)


def shrunk(model: nn.Module, structure: str, example: Tensor) -> nn.Module:
    """A copy of a pruned network without the units of `structure` that are zero."""
    masked = copy.deepcopy(model)
    if structure in published.STRUCTURES:
        published.zero_unread_(masked)
    return shrink(masked, {name: p.detach() != 0 for name, p in masked.named_parameters()}, example)


def _measure_shrunk(
    model: nn.Module, small: nn.Module, data: AnyDataset, example: Tensor, last: Row
) -> Row:
    """The row of the shrunk network: measured again, and timed on one image beside the dense."""
    image = example[:1]
    with in_eval(model), in_eval(small), torch.inference_mode():
        seconds = latencies({"dense": partial(model, image), "shrunk": partial(small, image)})
    return {
        **last,
        "kind": "shrink",
        **evaluate(small, data),
        "parameters": parameters(small),
        **kept(small),
        "macs": count_macs(small, image),
        "dense_macs": count_macs(model, image),
        "latency_ms": 1000 * seconds["shrunk"],
        "dense_latency_ms": 1000 * seconds["dense"],
    }


def provenance(data: AnyDataset) -> dict[str, Any]:
    """The dataset, versions, code and machine of a run."""
    packages = ("torch", "torchvision", "accelerate", "numpy")
    device = data.device
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dataset": {
            "name": data.name,
            "source": data.source,
            "fingerprint": data.fingerprint,
            "train_images": len(data.train),
            "test_images": len(data.test),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "code": code(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
        },
    }


def code() -> dict[str, Any]:
    """The version of swdlib and, if it runs from a git checkout of its repository, the commit.

    `clean` says whether all of the library is as in the commit.
    """
    found: dict[str, Any] = {"version": version("swdlib")}
    commit = git("rev-parse", "HEAD")
    # Without the lock on the index that another git command may need at the same time.
    changes = git("--no-optional-locks", "status", "--porcelain", "--", "swdlib")
    if commit is not None and changes is not None:
        found |= {"commit": commit[:12], "clean": not changes}
    return found


def git(*arguments: str) -> str | None:
    """What git prints in the checkout that swdlib runs from; None without a checkout or git."""
    root = records.checkout()
    if root is None or not (root / ".git").exists():  # else git would look in the folders above
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def network_of(path: Path) -> Path:
    """The file of the trained network that belongs to the record `path`."""
    return path.with_suffix(".safetensors.zlib")


def code_digest() -> str:
    """Twelve hexadecimal digits that stand for the library's code."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Busy(OSError):
    """The run is being done by another process or thread."""


@contextmanager
def lock(path: Path, timeout: float = 1.0) -> Iterator[None]:
    """Hold the lock file `path` in the context; Busy if somebody else does for `timeout` seconds.

    The operating system keeps the lock and releases it when the process ends, however it ends. The
    file is removed with the lock; one that a killed process left is not locked, and is removed by
    the next holder or look at it. Machines that share a folder see each other's locks if its file
    system passes them on, as NFS 4 does. Where it does not, two machines may do the same run; where
    it has no locks at all, taking one raises OSError.
    """
    try:
        # Several users may share the folder, so that all may open the file, which is empty.
        held = FileLock(path, mode=0o666).acquire(timeout, poll_interval=0.02)
    except Timeout as error:
        raise Busy(f"{path.stem} is being run by another process, which holds {path}") from error
    with held:
        try:
            yield
        finally:
            # Before the release: filelock refuses a file that was removed while it waited for it.
            with suppress(PermissionError):  # Windows, where filelock removes it after the release
                path.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock file `path`."""
    if not path.exists():
        return False
    try:
        with lock(path, timeout=0):  # so briefly that one who wants the lock outwaits it
            return False
    except Busy:
        return True


def lock_of(path: Path) -> Path:
    """The lock file of the run whose record is `path`; it lies beside the checkpoint."""
    return path.parent / "checkpoints" / f"{path.stem}.lock"
