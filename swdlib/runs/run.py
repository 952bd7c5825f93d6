"""Experiments: a configuration in, a record out. A run that is on record is not run again."""

import hashlib
import json
import math
import os
import platform
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swdlib.data.load import AnyDataset, load_data
from swdlib.deploy.shrinking import shrink
from swdlib.deploy.stored import is_stored, save_sparse
from swdlib.masks import NotFinite
from swdlib.metrics import count_macs, evaluate, in_eval, latencies, parameters, renewed
from swdlib.runs import records
from swdlib.runs.config import Config, build, options_of, phases_of
from swdlib.runs.devices import Tracker, find_device, is_main_process, main_process_first
from swdlib.runs.records import Record
from swdlib.runs.training import Row, train
from swdlib.structures import is_prunable

# Modules without which a run is the same to the bit: what shows results, or uses a network after.
UNDECIDING = (
    *("__init__", "audits", "checks", "claims"),
    *("cli", "deploy", "dryruns", "history", "imagenet"),
    *("interactive", "notebooks", "onnx_files", "places", "plots"),
    *("sparse_kernels", "sweeps"),
)

# Structures whose units leave the network for good, so that it is measured once more without them.
LEAVING = ("filters", "channels", "filters_and_channels")


def run(
    config: Config,
    folder: str | Path | None = None,
    *,
    again: bool = False,
    progress: bool = True,
) -> Record:
    """The record of `config`: read from `folder` if it is there, otherwise trained and written.

    A run that was stopped resumes from its checkpoint below `folder`; ValueError if other code
    wrote that. Beside the record lies the trained network, as a sparse file (see
    `deploy.load_sparse`). `again` trains even so, from the start. The default folder is
    `records.default_folder()`.
    """
    folder = Path(folder or records.default_folder())
    path = records.path_of(config.settings(), folder)
    if path.exists() and not again:
        return records.load(path)
    device = find_device(config.device)
    checkpoint = path.parent / "checkpoints" / f"{path.stem}.pt"
    with main_process_first():
        if again:
            checkpoint.unlink(missing_ok=True)
        data = load_data(config.dataset, config.data_root, device=device, holdout=config.holdout)
    model = build(config, data)
    options = options_of(config, checkpoint=checkpoint, code=code_digest(), progress=progress)
    if config.tracker:
        trackers = path.parent / "trackers"
        options["log_to"] = Tracker(config.tracker, trackers, path.stem, config.settings())
    record = _train(config, model, data, options)
    if is_main_process():
        _save(model, path.with_suffix(".safetensors.zlib"))
        records.save(record, folder)
        checkpoint.unlink(missing_ok=True)
    return record


def _save(model: nn.Module, path: Path) -> None:
    """Write the network, without its zeros."""
    weights = {name: p.detach() for name, p in model.named_parameters() if is_prunable(p)}
    save_sparse(model, {name: is_stored(w) for name, w in weights.items()}, path)


def _train(config: Config, model: nn.Module, data: AnyDataset, options: dict[str, Any]) -> Record:
    # A folder of this machine is no result, nor who is told of it.
    settings = {**config.settings(), "data_root": None, "tracker": None}
    facts = provenance(data)
    try:
        example = next(data.test_batches(2))[0]
        rows = train(model, data, phases_of(config, example), **options)
        if config.structure in LEAVING:
            rows.append(_shrunk(model, data, example, rows[-1]))
        rows[-1] |= _renewed(model, data)
    except NotFinite as error:
        return Record(settings, [], {**facts, "error": str(error)}, status="diverged")
    return Record(settings, rows, facts)


def _shrunk(model: nn.Module, data: AnyDataset, example: Tensor, last: Row) -> Row:
    """The row of the network that is left: measured again, and timed on one image, in turn."""
    masks = {name: p.detach() != 0 for name, p in model.named_parameters()}
    small, image = shrink(model, masks, example), example[:1]
    with in_eval(model), in_eval(small), torch.inference_mode():
        seconds = latencies({"dense": partial(model, image), "shrunk": partial(small, image)})
    return {
        **last,
        "kind": "shrink",
        **evaluate(small, data),
        "parameters": parameters(small),
        "macs": count_macs(small, image),
        "dense_macs": count_macs(model, image),
        "latency_ms": 1000 * seconds["shrunk"],
        "dense_latency_ms": 1000 * seconds["dense"],
    }


def _renewed(model: nn.Module, data: AnyDataset) -> Row:
    """What the last row has besides: the network measured with new batch-norm statistics."""
    fresh = renewed(model, data)
    measured = evaluate(fresh, data) if fresh else {}
    return {f"renewed_{name}": value for name, value in measured.items()}


def provenance(data: AnyDataset) -> dict[str, Any]:
    """With what a run was made: dataset, versions, code and machine."""
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
        "code": {"version": version("swdlib"), "digest": code_digest()},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
        },
    }


def code_digest() -> str:
    """Twelve hexadecimal digits that stand for the library's code that decides a result."""
    paths = Path(__file__).parents[1].rglob("*.py")
    return digest_of({path.name: path.read_bytes() for path in paths}, UNDECIDING)


def digest_of(files: Mapping[str, bytes], undeciding: Collection[str]) -> str:
    """The digest of a library of these files, by name, without the modules `undeciding`."""
    digest = hashlib.sha256()
    for name in sorted(files):
        if name.removesuffix(".py") not in undeciding:
            digest.update(name.encode() + files[name])
    return digest.hexdigest()[:12]


# claims --------------------------------------------------------------------------------

BEAT = 20.0  # seconds from one heartbeat to the next
STALE = 300.0  # seconds without one; the clocks of machines that share a folder differ by less


class Busy(OSError):
    """The run is being done by another process."""


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold the claim file `path` in the context; Busy, an OSError, if another process holds it.

    Of several processes, on one machine or on several with a common folder, one gets it. The file
    says which: its host and pid, as JSON.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) if path.exists() and not is_claimed(path) else nullcontext():
        _create(path, json.dumps(mine))
    done = threading.Event()
    threading.Thread(target=_beat, args=(path, mine, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        if _read(path) == mine:  # one that slept too long has lost it
            path.unlink(missing_ok=True)


def is_claimed(path: Path) -> bool:
    """Whether there is a claim that counts."""
    return _age(path) < STALE and _may_be_alive(_read(path))


def _age(path: Path) -> float:
    """Seconds since the last heartbeat; infinite if the file is not there, or no longer."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _beat(path: Path, mine: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(BEAT):
        if _read(path) == mine:  # another's, once it was taken over, must be able to grow stale
            with suppress(OSError):  # gone, or a network's folder that fails for a moment
                os.utime(path)


def _read(path: Path) -> dict[str, Any]:
    """What a claim says; nothing if it is not there, or not written out yet."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _may_be_alive(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or os.name == "nt":
        return True  # only the heartbeat tells
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _create(path: Path, text: str = "") -> None:
    try:
        with path.open("x", encoding="utf-8") as file:  # O_EXCL: fails if it exists
            file.write(text)
    except FileExistsError as error:
        holder = "process {pid} on {host}".format(**{"pid": "?", "host": "?", **_read(path)})
        raise Busy(f"{path.stem} is being run by {holder}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[None]:
    """Delete a stale claim, alone: who saw it at the same time must not delete what comes next."""
    guard = path.with_suffix(".takeover")
    try:
        _create(guard)
    except Busy:
        if STALE < _age(guard) < math.inf:  # its process died in here
            guard.unlink(missing_ok=True)
        raise
    try:
        if not is_claimed(path):
            path.unlink(missing_ok=True)
        yield
    finally:
        guard.unlink(missing_ok=True)


BUSY = 75  # exit status of a run that another process is doing; sysexits.h: try again later


def run_alone(
    config: Config,
    folder: str | Path | None = None,
    *,
    again: bool = False,
    progress: bool = True,
) -> Record:
    """As `experiments.run`; Busy, an OSError, if another process is doing the same run."""
    folder = Path(folder or records.default_folder())
    path = records.path_of(config.settings(), folder)
    if path.exists() and not again:
        return records.load(path)
    find_device(config.device)  # the processes of one run find each other
    with claim(claim_of(path)) if is_main_process() else nullcontext():
        return run(config, folder, again=again, progress=progress)


def claim_of(path: Path) -> Path:
    """The claim of the run whose record is `path`; it lies beside the checkpoint."""
    return path.parent / "checkpoints" / f"{path.stem}.claim"
