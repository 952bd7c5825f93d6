"""Records: a run as a small JSON file, addressed by its configuration."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swdlib.files import write_whole

if TYPE_CHECKING:
    import pandas as pd

# Where a run is done, which should not change its result: no part of its address.
NOT_ADDRESSED = ("data_root", "device", "tracker")

# Settings that were added later: at these values, which earlier runs had, they do not change the
# address.
AS_BEFORE = {
    "growth": "exponential",
    "growth_end": 1.0,
    "budget": "equal",
    "normalisation": "measured",
}

# A row's histogram of the weights counts log10 |w| in equal bins, from 1e-12 to 10: under a strong
# penalty weights get that small.
HISTOGRAM_RANGE = (-12.0, 1.0)
HISTOGRAM_BINS = 104

# In a table, settings whose names rows use for what they measured.
RENAMED = {"sparsity": "target_sparsity", "lr": "peak_lr"}

# Runs that are alike in these are compared: the best of them is one of a method.
COMPARED = ("dataset", "holdout", "model", "width", "structure", "target_sparsity", "recipe")


@dataclass(frozen=True)
class Record:
    """A run that has ended.

    `config` holds the settings, `rows` a dict for each training epoch and each cut, `provenance`
    the dataset, versions, code and machine; `status` is "finished" or "diverged".
    """

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    provenance: dict[str, Any] = field(default_factory=dict)
    status: str = "finished"

    @property
    def final(self) -> dict[str, Any]:
        """The last row, by which the run is judged."""
        return self.rows[-1]

    def summary(self) -> str:
        """A line that says how the run ended."""
        if self.status != "finished":
            return f"{self.status}: {self.provenance.get('error', '')}"
        last = self.final
        kept = f"{last.get('kept_parameters', last['parameters']):,} parameters"
        if "kept_weights" in last:  # rows of earlier versions do not count them
            kept = f"{last['kept_weights']:,} weights and, of the whole network, {kept}"
        return (
            f"Top-1 {last['top1']:.2f} %, loss {last['loss']:.4f}, {kept} kept, "
            f"{100 * last['sparsity']:.2f} % of the prunable weights removed"
        )


def address(config: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that identify the configuration.

    A setting that is None or as in `AS_BEFORE` does not count, so that records keep their addresses
    when settings are added.
    """
    without = {**dict.fromkeys(config), **AS_BEFORE}
    counted = {k: v for k, v in config.items() if v is not None and v != without[k]}
    addressed = {k: v for k, v in counted.items() if k not in NOT_ADDRESSED}
    return digest(json.dumps(addressed, sort_keys=True, allow_nan=False).encode())


def digest(content: bytes) -> str:
    """Sixteen hexadecimal digits that identify the bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def checksum(content: dict[str, Any]) -> str:
    """That of a record's content, whatever the order and the spaces in its file."""
    counted = {name: value for name, value in content.items() if name != "checksum"}
    return digest(json.dumps(counted, sort_keys=True).encode())


def path_of(config: dict[str, Any], folder: Path) -> Path:
    """The path of a configuration's record: its name is a readable part, then the address."""
    name = "-".join(str(config[k]) for k in ("dataset", "model", "recipe", "sparsity"))
    return folder / str(config["profile"]) / f"{name}-{address(config)}.json"


def checkout() -> Path | None:
    """The checkout of its repository that swdlib runs from; None if it is an installed package."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "book").is_dir() and (root / "pyproject.toml").is_file() else None


def default_folder() -> Path:
    """`book/records` if swdlib runs from a checkout of its repository, otherwise `./records`."""
    root = checkout()
    return root / "book" / "records" if root else Path("records")


def save(record: Record, folder: Path) -> Path:
    """Write the record, whole or not at all, and return its path."""
    content = asdict(record)
    content["checksum"] = checksum(content)
    # One line for each row: the files are small, and changes to them can be read.
    rows = ",\n".join("  " + json.dumps(row) for row in content.pop("rows"))
    head = json.dumps(content, indent=1)
    text = f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'
    path = path_of(record.config, folder)
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path


def load(path: Path) -> Record:
    """Read a record; ValueError if it is damaged, or if its name and configuration disagree."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path} is no readable record: it is no file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("checksum", None) != (own := checksum(content)):
            raise ValueError(f"its content has been changed since it was written: it has {own}")
        record = Record(**content)
        if not isinstance(record.provenance, dict):
            raise ValueError(f"provenance must be a table, not {record.provenance!r:.80}")
        expected = address(record.config)
        if record.status == "finished" and not record.rows:
            raise ValueError("it is finished, but has no rows")
        record.summary()
    except (TypeError, AttributeError, LookupError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no readable record: {error}") from error
    if not path.stem.endswith(expected):
        raise ValueError(f"{path} has been changed: its configuration has the address {expected}")
    return record


def load_records(folder: str | Path | None = None) -> "pd.DataFrame":
    """All records below `folder` as one table (see `tabulate`); ValueError if one is damaged."""
    return tabulate(map(load, sorted(Path(folder or default_folder()).rglob("*.json"))))


def tabulate(found: Iterable[Record]) -> "pd.DataFrame":
    """Records as one tidy table, with a line for each of their rows.

    Beside what the row holds, a line has the run's address in `run`, `status`, `data_source`,
    `commit` and the settings. Of these, `sparsity` becomes `target_sparsity` and `lr` `peak_lr`:
    `sparsity` and `lr` are the row's. Runs that differ by their seed alone share `setup`.
    """
    import pandas as pd  # here, as it takes long to import

    rows: list[dict[str, Any]] = []
    for record in found:
        shared = {
            "run": address(record.config),
            "setup": address({**record.config, "seed": None}),
            "status": record.status,
            "data_source": record.provenance.get("dataset", {}).get("source"),
            "commit": record.provenance.get("code", {}).get("commit"),
            **{RENAMED.get(name, name): value for name, value in record.config.items()},
        }
        rows += [{**shared, **row} for row in record.rows or [{}]]  # a diverged run has none
    return pd.DataFrame(rows)


def last_rows(table: "pd.DataFrame") -> "pd.DataFrame":
    """The last row of each run, by which it is judged."""
    return table.groupby("run", sort=False).tail(1)


def final_accuracy(ends: "pd.DataFrame") -> "pd.Series[float]":
    """Top-1 in percent in last rows: recalibrated, or as trained where that was not measured."""
    if "renewed_top1" in ends:
        return ends["renewed_top1"].fillna(ends["top1"])
    return ends["top1"]


def choose(
    table: "pd.DataFrame", where: Iterable[tuple[str, str]] = (), *, best: bool = False
) -> "pd.DataFrame":
    """The rows of runs whose columns have the values of `where`: pairs of a name and a text.

    With `best`, of the runs that are alike in `COMPARED` only those of the setup whose mean final
    accuracy over the seeds is highest, with recalibrated batch norm where that was measured.
    """
    for name, text in where:
        column = RENAMED.get(name, name)
        if column not in table:
            raise ValueError(f"{name} is no column; there are {', '.join(map(str, table))}")
        ends = last_rows(table)
        runs = ends["run"][[_matches(value, text) for value in ends[column]]]
        table = table[table["run"].isin(runs)]
    if not best or table.empty or "top1" not in table:
        return table
    ends = last_rows(table)
    mean = final_accuracy(ends).groupby(ends["setup"]).transform("mean")
    highest = mean.groupby([ends[name] for name in COMPARED], dropna=False).transform("max")
    return table[table["run"].isin(ends["run"][mean == highest])]


def _matches(value: Any, text: str) -> bool:
    if value is None or value != value:  # not a number: the run has no such setting
        return text.lower() == "none"
    try:
        return bool(float(text) == value)
    except ValueError:
        return text.lower() == str(value).lower()


def find(run: str, folder: Path) -> Path:
    """The record below `folder` whose address begins with `run`; a path of a record is itself."""
    if run.endswith(".json"):
        return Path(run)
    found = [p for p in sorted(folder.rglob("*.json")) if p.stem.rpartition("-")[2].startswith(run)]
    if len(found) != 1:
        raise ValueError(
            f"run must be the beginning of one address below {folder}, as `swdlib show` lists "
            f"them, not {run!r}, with which {len(found)} begin"
        )
    return found[0]


def duration(seconds: float) -> str:
    """Seconds in a unit that suits them, to three digits."""
    units = ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "minutes"), (172_800, 3600, "hours"))
    for limit, size, unit in units:
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:,.1f} days"
