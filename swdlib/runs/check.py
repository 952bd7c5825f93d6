"""Audits: whether a record is what it says: sound, of known code and data, its figures true."""

import ast
import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swdlib.data.load import SHAPES, AnyDataset, load_data
from swdlib.deploy.stored import load_sparse
from swdlib.metrics import evaluate, parameters
from swdlib.models import build_model
from swdlib.runs import records
from swdlib.runs import run as experiments
from swdlib.runs.config import Config, build
from swdlib.runs.records import Record
from swdlib.structures import is_prunable

# Of the data in whole and of what is left of it if a fraction is held out, as (dataset, fraction).
FINGERPRINTS = {
    "993ac88bd2d994bc": ("digits", 0.0),
    "cb14aac5cc882f9d": ("digits", 0.1),
    "ae3bcfea977962c9": ("cifar10", 0.0),  # its images re-encoded as JPEG, here and below
    "54b49b7ecb19fd8a": ("cifar10", 0.1),
    "aa7fb58995b4a897": ("cifar10", 0.2),
}

# Digests of code that was never committed; there are records made by it.
UNCOMMITTED = {"c8535b62156a": "of 2026-11-24, between the commits 3a5a4a4 and 568343d"}

# Arithmetic other than that of the weights.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# How far figures may be from the record's when they are computed again: on other machines, sums
# are made in another order. Relative for the loss, in points for the Top-1 accuracy.
TOLERANCE = {"fp32": (1e-3, 0.1), "bf16": (0.05, 1.0), "fp16": (0.05, 1.0)}


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
    """Audit every record below `folder`, one after the other."""
    for path in sorted(folder.rglob("*.json")):
        yield audit(path, data_root)


def audit(path: Path, data_root: Path | None = None) -> Audit:
    """Audit one record.

    Figures are computed again if the trained network lies beside the record and its data is there:
    the digits, or what `data_root` holds. Nothing that is read can run code.
    """
    found = Audit(path)
    try:
        record = records.load(path)
        if path != (home := records.path_of(record.config, path.parent.parent)):
            found.problems.append(f"it belongs at {home}")
        found.problems += _rows(record)
        _code(record, found)
        data = _data(record, found, data_root)
        if data is not None and record.status == "finished":
            _figures(record, found, data)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, OSError) as error:
        found.problems.append(f"it cannot be read: {error!r}")
    return found


# What it says of itself -------------------------------------------------------------------------


def _rows(record: Record) -> Iterator[str]:
    if record.status not in ("finished", "diverged"):
        yield f"status must be finished or diverged, not {record.status!r}"
    if record.status != "finished":
        return
    if not record.rows:
        yield "it is finished, but has no rows"
        return
    yield from _order(record)
    for number, row in enumerate(record.rows):
        measured = [row[name] for name in ("loss", "top1", "top5", "sparsity", "parameters")]
        in_range = 0 <= row["top1"] <= row["top5"] <= 100 and 0 <= row["sparsity"] < 1
        if not (all(map(math.isfinite, measured)) and row["loss"] >= 0 and in_range):
            yield f"row {number}: a loss, accuracy or sparsity is out of range"
    yield from _sizes(record)


def _order(record: Record) -> Iterator[str]:
    for name in ("epoch", "step"):
        everything = [row[name] for row in record.rows]
        trained = [row[name] for row in record.rows if row["kind"] == "train"]
        if sorted(everything) != everything or sorted(set(trained)) != trained:
            yield f"rows: {name} must rise"
    epochs = [row["epoch"] for row in record.rows if row["kind"] == "train"]
    if epochs != list(range(1, record.config["epochs"] + 1)):
        yield f"rows: epochs must be 1 to {record.config['epochs']}, not {epochs}"


def _sizes(record: Record) -> Iterator[str]:
    """Compare sparsity and parameters with the network that the configuration builds."""
    network = _network(record.config)
    total = parameters(network)
    prunable = sum(p.numel() for p in network.parameters() if is_prunable(p))
    target, last = record.config["sparsity"], record.final
    for number, row in enumerate(record.rows):
        removed = total - row["parameters"]
        if record.config["structure"] in ("weights", None):
            if abs(removed - row["sparsity"] * prunable) > 1e-6 * prunable:
                yield f"row {number}: {removed:,} removed is no sparsity of {row['sparsity']}"
        elif not 0 <= removed < total:
            yield f"row {number}: {row['parameters']:,} parameters of {total:,}"
        weights = row["weights"]
        if weights["zeros"] + sum(weights["counts"]) != prunable:
            yield f"row {number}: weights must count {prunable:,}"
    slack = 1 if record.config["structure"] in ("weights", None) else math.inf
    if not -1 <= (last["sparsity"] - target) * prunable <= slack:
        yield f"sparsity is {last['sparsity']}, not {target}"


def _network(config: dict[str, Any]) -> nn.Module:
    channels, size, classes, *_ = {"digits": (1, 8, 10), **SHAPES}[config["dataset"]]
    with torch.device("meta"):  # takes no memory and draws no weights
        return build_model(
            config["model"], channels=channels, size=size, classes=classes, width=config["width"]
        )


# By what it was made ----------------------------------------------------------------------------


def _code(record: Record, found: Audit) -> None:
    digest = record.provenance["code"]["digest"]
    found.code = code_of(record)
    if found.code == "unknown":
        found.code = f"not committed, {UNCOMMITTED.get(digest, digest)}"
        if digest not in UNCOMMITTED:
            found.problems.append(f"its code, {digest}, is that of no commit")


def _data(record: Record, found: Audit, root: Path | None) -> AnyDataset | None:
    """Check the dataset's fingerprint; the data, if it is there and is that of the record."""
    name, holdout = record.config["dataset"], record.config.get("holdout") or 0.0
    said = record.provenance["dataset"]
    data = _load(name, holdout, root) if name == "digits" or root else None
    if data is not None and data.fingerprint == said["fingerprint"]:
        found.data = "computed again"
        return data
    if FINGERPRINTS.get(said["fingerprint"]) == (name, holdout):
        found.data = "known"
    else:
        found.data = "unknown"
        found.problems.append(
            f"fingerprint {said['fingerprint']} is not of {name} with {holdout:g} held out"
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
    path = found.path.with_suffix(".safetensors.zlib")
    if not path.is_file():
        return
    found.figures = "computed again"
    try:
        network = build(Config(**{**record.config, "device": "cpu"}), data)
        load_sparse(network, path)
    except (ValueError, TypeError, OSError) as error:
        found.problems.append(f"{path.name} does not hold its network: {error}")
        return
    precision, last = record.config["precision"], record.final
    with torch.autocast("cpu", DTYPES.get(precision), enabled=precision in DTYPES):
        measured = evaluate(network, data)
    relative, points = TOLERANCE[precision]
    for name, slack in (("loss", relative * last["loss"]), ("top1", points)):
        if not abs(measured[name] - last[name]) <= slack + 1e-9:
            found.problems.append(f"{name} is {measured[name]:.4f}, not {last[name]:.4f}")
    zeros = sum(int((p == 0).sum()) for p in network.parameters() if is_prunable(p))
    if zeros != last["weights"]["zeros"]:
        found.problems.append(f"{zeros:,} weights are zero, not {last['weights']['zeros']:,}")


# history --------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


class NoHistory(LookupError):
    """There is no git, no repository, or only the end of its history."""


@dataclass(frozen=True)
class Commit:
    """A commit, its day, and the digest that its code wrote into records."""

    name: str
    day: str
    digest: str


def code_of(record: Record) -> str:
    """The code that a record was made by, in words.

    "current" is that of today; otherwise "older, commit ... of ...", or "unknown" if it is that of
    no commit. Without the repository's history, "not current, history unknown".
    """
    digest = record.provenance.get("code", {}).get("digest")
    if digest == experiments.code_digest():
        return "current"
    try:
        found = next((commit for commit in commits() if commit.digest == digest), None)
    except NoHistory:
        return "not current, history unknown"
    return f"older, commit {found.name[:7]} of {found.day}" if found else "unknown"


@cache
def commits(root: Path = ROOT) -> tuple[Commit, ...]:
    """The commits that changed the library, newest first; NoHistory if git does not know them."""
    if _git(root, "rev-parse", "--is-shallow-repository").strip() == b"true":
        raise NoHistory("the repository is a shallow clone: git fetch --unshallow")
    lines = _git(root, "log", "--format=%H %cs", "--", "swdlib").decode().splitlines()
    if not lines:
        raise NoHistory(f"{root} is no checkout of the repository")
    contents: dict[str, bytes] = {}
    found = []
    for name, day in (line.split() for line in lines):
        files = dict(_files(root, name))
        _read_blobs(root, set(files.values()) - contents.keys(), contents)
        digest = digest_of({file: contents[blob] for file, blob in files.items()})
        found.append(Commit(name, day, digest))
    return tuple(found)


def digest_of(files: dict[str, bytes]) -> str:
    """What `code_digest` gives for a library of these modules."""
    return experiments.digest_of(files, _undeciding(files.get("experiments.py", b"")))


def _undeciding(source: bytes) -> set[str]:
    """The modules that a version of `experiments` leaves out, read without running it."""
    assigned = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assign))
    for node in assigned:
        if ast.unparse(node.targets[0]).upper() == "UNDECIDING":
            names = (leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant))
            return {str(name).removesuffix(".py") for name in names}
    return set()


def _files(root: Path, commit: str) -> Iterator[tuple[str, str]]:
    for line in _git(root, "ls-tree", commit, "swdlib/").decode().splitlines():
        about, path = line.split("\t")
        if path.endswith(".py"):
            yield Path(path).name, about.split()[2]


def _read_blobs(root: Path, names: set[str], contents: dict[str, bytes]) -> None:
    output = _git(root, "cat-file", "--batch", given="\n".join(names).encode())
    while output:
        head, _, output = output.partition(b"\n")
        name, _, size = head.decode().split()
        contents[name], output = output[: int(size)], output[int(size) + 1 :]


def _git(root: Path, *arguments: str, given: bytes = b"") -> bytes:
    try:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, input=given, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoHistory(f"git does not know the history of {root}: {error}") from error
