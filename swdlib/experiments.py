"""Experiments: a configuration in, a record out. A run that is on record is not run again."""

import hashlib
import platform
from collections.abc import Collection, Mapping
from dataclasses import fields
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from swdlib import records
from swdlib.config import Config, phases_of
from swdlib.data import AnyDataset, load_data
from swdlib.devices import Tracker, find_device, is_main_process, main_process_first
from swdlib.evaluation import evaluate, renewed
from swdlib.masks import NotFinite
from swdlib.metrics import count_macs, in_eval, latencies, parameters
from swdlib.models import build_model
from swdlib.records import Record
from swdlib.shrinking import shrink
from swdlib.sparse_files import is_stored, save_sparse
from swdlib.structures import is_prunable
from swdlib.training import Options, Row, train

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
        _save(model, path.with_suffix(".safetensors"))
        records.save(record, folder)
        checkpoint.unlink(missing_ok=True)
    return record


def _save(model: nn.Module, path: Path) -> None:
    """Write the network, without its zeros."""
    weights = {name: p.detach() for name, p in model.named_parameters() if is_prunable(p)}
    save_sparse(model, {name: is_stored(w) for name, w in weights.items()}, path)


def build(config: Config, data: AnyDataset) -> nn.Module:
    """The configuration's network for `data`, its weights drawn from the configuration's seed."""
    torch.manual_seed(config.seed)
    return build_model(
        config.model,
        channels=data.channels,
        size=data.size,
        classes=data.classes,
        width=config.width,
    )


def options_of(config: Config, **more: Any) -> dict[str, Any]:
    """The configuration's options for `train`, and `more` of them."""
    optimizer = partial(
        SGD,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    shared = {f.name for f in fields(Options)} & {f.name for f in fields(config)}
    return {"optimizer": optimizer, **{name: getattr(config, name) for name in shared}, **more}


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
    paths = Path(__file__).parent.glob("*.py")
    return digest_of({path.name: path.read_bytes() for path in paths}, UNDECIDING)


def digest_of(files: Mapping[str, bytes], undeciding: Collection[str]) -> str:
    """The digest of a library of these files, by name, without the modules `undeciding`."""
    digest = hashlib.sha256()
    for name in sorted(files):
        if name.removesuffix(".py") not in undeciding:
            digest.update(name.encode() + files[name])
    return digest.hexdigest()[:12]
