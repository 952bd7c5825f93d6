"""Records with their networks: whether each is sound and its figures are true; exports."""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from swdlib import published
from swdlib.data.load import SHAPES, AnyDataset, load_data
from swdlib.deploy.stored import load_sparse, tensors_of_state, to_onnx
from swdlib.files import write_whole
from swdlib.metrics import evaluate, parameters
from swdlib.models import build_model
from swdlib.runs import records
from swdlib.runs.config import Config
from swdlib.runs.records import Record, digest
from swdlib.runs.run import SHRINKABLE, git, network_of, shrunk
from swdlib.structures import is_prunable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

IMAGES = {"digits": (1, 8, 10), **SHAPES}  # channels, size and classes

# In a folder of records: the fingerprints of the data that they were made with.
KNOWN = "known.toml"

# Arithmetic other than that of the weights.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# How far figures may be from the record's when they are computed again: other machines add in
# another order. Relative for the loss, in points for the Top-1 accuracy.
TOLERANCE = {"fp32": (1e-3, 0.1), "bf16": (0.05, 1.0), "fp16": (0.05, 1.0)}

# Structures whose sparsity is not that of all that they cut.
BY_THRESHOLD = ("parameters", *published.STRUCTURES)

Known = dict[str, list[Any]] | None


@dataclass
class Audit:
    """What was found of one record; `problems` is empty if it is sound."""

    path: Path
    code: str = "-"
    data: str = "-"
    figures: str = "-"
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = "WRONG" if self.problems else "sound"
        facts = f"{verdict}  {self.path.stem}  code: {self.code}  data: {self.data}"
        return "\n    ".join([f"{facts}  figures: {self.figures}", *self.problems])


def audit_all(folder: Path, data_root: Path | None = None) -> Iterator[Audit]:
    """Audit every record below `folder`, one after the other.

    Data must be listed in the file `known.toml` of that folder, if there is one, as
    `fingerprint = [dataset, fraction held out]` under `[fingerprints]`.
    """
    path = folder / KNOWN
    known = None
    if path.is_file():
        known = tomllib.loads(path.read_text("utf-8")).get("fingerprints", {})
    for path in sorted(folder.rglob("*.json")):
        yield audit(path, data_root, known)


def audit(path: Path, data_root: Path | None = None, known: Known = None) -> Audit:
    """Audit one record.

    Figures are computed again if the trained network lies beside the record and its data is there:
    the digits, or what `data_root` holds. Nothing that is read can run code.
    """
    found = Audit(path)
    try:
        record = records.load(path)
        if path != (home := records.path_of(record.config, path.parent.parent)):
            found.problems.append(f"it belongs at {home}")
        if record.status not in ("finished", "diverged"):
            found.problems.append(f"status must be finished or diverged, not {record.status!r}")
        elif record.status == "finished":
            found.problems += _rows(record)
            found.problems += _sizes(record)
        _code(record, found)
        data = _data(record, found, data_root, known)
        has_network = network_of(path).is_file()
        if has_network and digest(network_of(path).read_bytes()) != record.provenance["network"]:
            found.problems.append(f"{network_of(path).name} is not the network of this run")
        if has_network and data is not None and record.status == "finished":
            _figures(record, found, data)
    except Exception as error:  # one record must not stop the audit of others
        found.problems.append(f"it cannot be read: {error!r}")
    return found


def untrained(config: Mapping[str, Any]) -> nn.Module:
    """A network as a record's configuration says, with other weights."""
    channels, size, classes, *_ = IMAGES[config["dataset"]]
    width = config["width"]
    return build_model(config["model"], channels=channels, size=size, classes=classes, width=width)


def export(path: Path, *, onnx: str | None, dense: str | None, sparse: str | None) -> None:
    """Write the network of the record `path` to the files that are named.

    `onnx` is without the filters or channels that were removed; `dense` is a file of safetensors
    with every weight, zeros too; `sparse` is as `deploy.save_sparse` writes it.
    """
    config, stored = records.load(path).config, network_of(path)
    if not stored.is_file():
        raise FileNotFoundError(
            f"{stored} is missing: the record came without its network, which the same run makes "
            f"again, with --again"
        )
    network = untrained(config)
    load_sparse(network, stored)
    if sparse:
        write_whole(Path(sparse), lambda file: file.write_bytes(stored.read_bytes()))
    if dense:
        content = safetensors.torch.save(tensors_of_state(network))
        write_whole(Path(dense), lambda file: file.write_bytes(content))
    if onnx:
        channels, size, *_ = IMAGES[config["dataset"]]
        example = torch.randn(2, channels, size, size)
        if config["structure"] in SHRINKABLE:
            network = shrunk(network, config["structure"], example)
        to_onnx(network, example, onnx)


def _rows(record: Record) -> Iterator[str]:
    """Problems of the rows in themselves: their order, and numbers that cannot be."""
    for name in ("epoch", "step"):
        everything = [row[name] for row in record.rows]
        trained = [row[name] for row in record.rows if row["kind"] == "train"]
        if sorted(everything) != everything or sorted(set(trained)) != trained:
            yield f"rows: {name} must rise"
    epochs = [row["epoch"] for row in record.rows if row["kind"] == "train"]
    wanted = Config(**record.config).epochs_in_all()
    if epochs != [*range(1, len(epochs) + 1)] or len(epochs) != wanted:
        yield f"rows: epochs must be 1 to {wanted}, not {epochs}"
    for number, row in enumerate(record.rows):
        measured = [row[name] for name in ("loss", "top1", "top5", "sparsity", "parameters")]
        in_range = 0 <= row["top1"] <= row["top5"] <= 100 and 0 <= row["sparsity"] < 1
        if not (all(map(math.isfinite, measured)) and row["loss"] >= 0 and in_range):
            yield f"row {number}: a loss, accuracy or sparsity is out of range"


def _sizes(record: Record) -> Iterator[str]:
    """Compare sparsity and parameters with the network that the configuration builds."""
    config = record.config
    with torch.device("meta"):  # takes no memory and draws no weights
        network = untrained(config)
    total = parameters(network)
    prunable = sum(p.numel() for p in network.parameters() if is_prunable(p))
    by_weight = config["structure"] in ("weights", None)
    for number, row in enumerate(record.rows):
        removed = total - row["parameters"]
        if by_weight and abs(removed - row["sparsity"] * prunable) > 1e-6 * prunable:
            yield f"row {number}: {removed:,} removed is no sparsity of {row['sparsity']}"
        if not by_weight and not 0 <= removed < total:
            yield f"row {number}: {row['parameters']:,} parameters of {total:,}"
        if row["weights"]["zeros"] + sum(row["weights"]["counts"]) != prunable:
            yield f"row {number}: weights must count {prunable:,}"
        kept = row.get("kept_weights", 0), row.get("kept_parameters", total)
        if not (0 <= kept[0] <= prunable and kept[0] <= kept[1] <= total):
            yield f"row {number}: {kept[0]:,} weights and {kept[1]:,} parameters kept of {total:,}"
    if config["structure"] in BY_THRESHOLD:
        return
    # Structures come in units, which may take more weights than the target but not fewer.
    target, reached = config["sparsity"], record.final["sparsity"]
    if not -1 <= (reached - target) * prunable <= (1 if by_weight else math.inf):
        yield f"sparsity is {reached}, not {target}"


def _code(record: Record, found: Audit) -> None:
    """Note which code made the record, and whether the repository's history has its commit."""
    code = record.provenance["code"]
    if "commit" not in code:
        found.code = f"version {code['version']}"
        return
    found.code = f"commit {code['commit']}" + ("" if code["clean"] else " with changes")
    if (known := _commits()) is None:
        found.code += " (not checked: no history here)"
    elif code["commit"] not in known:
        found.problems.append(f"its commit, {code['commit']}, is not in the history")


@cache
def _commits() -> frozenset[str] | None:
    """All commits of the repository, twelve digits each; None without its whole history."""
    if git("rev-parse", "--is-shallow-repository") != "false":
        return None
    names = git("rev-list", "--all")
    return None if names is None else frozenset(name[:12] for name in names.split())


def _data(record: Record, found: Audit, root: Path | None, known: Known) -> AnyDataset | None:
    """Check the dataset's fingerprint; the data, if it is there and is that of the record."""
    name, holdout = record.config["dataset"], record.config.get("holdout") or 0.0
    fingerprint = record.provenance["dataset"]["fingerprint"]
    data = _load(name, holdout, root) if name == "digits" or root else None
    if data is not None and data.fingerprint == fingerprint:
        found.data = "computed again"
        return data
    if known is not None and known.get(fingerprint) == [name, holdout]:
        found.data = "known"
    elif known is None and data is None:
        found.data = "not checked"
    else:
        found.data = "unknown"
        found.problems.append(
            f"fingerprint {fingerprint} is not of {name} with {holdout:g} held out"
        )
    return None


@cache
def _load(name: str, holdout: float, root: Path | None) -> AnyDataset | None:
    try:
        return load_data(name, root, holdout=holdout)
    except FileNotFoundError:
        return None


def _figures(record: Record, found: Audit, data: AnyDataset) -> None:
    """Load the network that lies beside the record, and measure it again."""
    path = network_of(found.path)
    found.figures = "computed again"
    try:
        config = Config(**{**record.config, "device": "cpu"})
        network = config.build(data)
        load_sparse(network, path)
    except (ValueError, TypeError, OSError) as error:
        found.problems.append(f"{path.name} does not hold its network: {error}")
        return
    precision, last = record.config["precision"], record.final
    with torch.autocast("cpu", DTYPES.get(precision), enabled=precision in DTYPES):
        measured = evaluate(network, config.normalised(data))
    relative, points = TOLERANCE[precision]
    for name, slack in (("loss", relative * last["loss"]), ("top1", points)):
        if not abs(measured[name] - last[name]) <= slack + 1e-9:
            found.problems.append(f"{name} is {measured[name]:.4f}, not {last[name]:.4f}")
    zeros = sum(int((p == 0).sum()) for p in network.parameters() if is_prunable(p))
    if zeros != last["weights"]["zeros"]:
        found.problems.append(f"{zeros:,} weights are zero, not {last['weights']['zeros']:,}")
