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

# Where and how a run is done, not what: the same result is expected with any of these.
NOT_ADDRESSED = ("data_root", "device", "tracker")

# Settings that came later, and how runs were done before: with these, they are the same runs still.
AS_BEFORE = {"growth": "exponential", "growth_end": 1.0}

# A row's histogram of the weights counts log10 |w| in equal bins, from 1e-12 to 10: wide enough for
# what a strong penalty leaves of a weight.
HISTOGRAM_RANGE = (-12.0, 1.0)
HISTOGRAM_BINS = 104

# Names that the configuration shares with what a row measures.
RENAMED = {"sparsity": "target_sparsity", "lr": "peak_lr"}


@dataclass(frozen=True)
class Record:
    """A finished run.

    `config` holds the configuration; `rows` a dict a training epoch and a cut; `provenance` the
    versions, machine and dataset; `status` is "finished" or "diverged".
    """

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    provenance: dict[str, Any] = field(default_factory=dict)
    status: str = "finished"

    @property
    def final(self) -> dict[str, Any]:
        """The last row: what the run is judged by, whatever came before."""
        return self.rows[-1]

    def summary(self) -> str:
        """A line that says how the run ended."""
        if self.status != "finished":
            return f"{self.status}: {self.provenance.get('error', '')}"
        last = self.final
        return (
            f"Top-1 {last['top1']:.2f} %, loss {last['loss']:.4f}, {last['parameters']:,} "
            f"parameters kept, {100 * last['sparsity']:.2f} % of the prunable weights removed"
        )


def address(config: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for the configuration.

    A setting that is None or `AS_BEFORE` does not count: the address stays as it was when settings
    are added that a run does not use, or that it could not choose.
    """
    without = {**dict.fromkeys(config), **AS_BEFORE}
    counted = {k: v for k, v in config.items() if v is not None and v != without[k]}
    addressed = {k: v for k, v in counted.items() if k not in NOT_ADDRESSED}
    text = json.dumps(addressed, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def path_of(config: dict[str, Any], folder: Path) -> Path:
    """Where the record of a configuration lies: a readable name, then its address."""
    name = "-".join(str(config[k]) for k in ("dataset", "model", "recipe", "sparsity"))
    return folder / str(config["profile"]) / f"{name}-{address(config)}.json"


def default_folder() -> Path:
    """`book/records` if swdlib runs from a checkout of its repository, otherwise `./records`."""
    root = Path(__file__).resolve().parent.parent
    is_checkout = (root / "book").is_dir() and (root / "pyproject.toml").is_file()
    return root / "book" / "records" if is_checkout else Path("records")


def save(record: Record, folder: Path) -> Path:
    """Write the record, whole or not at all, and return its path."""
    path = path_of(record.config, folder)
    text = _to_json(asdict(record))
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path


def _to_json(content: dict[str, Any]) -> str:
    # A line a row: small files whose changes can be read.
    rows = ",\n".join("  " + json.dumps(row) for row in content.pop("rows"))
    head = json.dumps(content, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def load(path: Path) -> Record:
    """Read a record; ValueError if it is damaged, or its name not its configuration's address."""
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
        expected = address(record.config)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no readable record: {error}") from error
    if not path.stem.endswith(expected):
        raise ValueError(f"{path} has been changed: its configuration has the address {expected}")
    return record


def load_records(folder: str | Path | None = None) -> "pd.DataFrame":
    """All records below `folder` as one table, see `tabulate`; ValueError if one is damaged."""
    return tabulate(map(load, sorted(Path(folder or default_folder()).rglob("*.json"))))


def tabulate(found: Iterable[Record]) -> "pd.DataFrame":
    """Records as one tidy table: a row a recorded row.

    Each row has the run's address in `run`, its configuration, `status` and `data_source` beside
    what was measured. Of the configuration, `sparsity` is called `target_sparsity` and `lr`
    `peak_lr`: `sparsity` and `lr` are those of the row.
    """
    import pandas as pd  # here, as it takes long to import

    rows: list[dict[str, Any]] = []
    for record in found:
        shared = {
            "run": address(record.config),
            "status": record.status,
            "data_source": record.provenance.get("dataset", {}).get("source"),
            **{RENAMED.get(name, name): value for name, value in record.config.items()},
        }
        rows += [{**shared, **row} for row in record.rows or [{}]]  # a diverged run has none
    return pd.DataFrame(rows)


def duration(seconds: float) -> str:
    """Seconds as a person would say them, to two or three digits."""
    for limit, size, unit in (
        (1, 1e-3, "ms"),
        (120, 1, "s"),
        (7200, 60, "minutes"),
        (172_800, 3600, "hours"),
    ):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:,.1f} days"
