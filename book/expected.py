"""Run the pages that a class runs, each with five seeds, and keep what they ended with.

A page is a notebook; what is asked of it are expressions in its own names. Runs on file are not
done again, unless the page, what is asked, the version of the library or of what it needs, or the
machine has changed since: then those of that page are all done again. The provenance has the commit
as well, but most commits change no number: delete the file to run everything again.
"""

import argparse
import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import papermill

from swdlib import load_data
from swdlib.files import write_whole
from swdlib.runs.run import provenance

BOOK = Path(__file__).resolve().parent
STORED = BOOK / "measurements" / "expected.json"
SEEDS = range(5)
ASKED = "asked"  # the tag of the cell that is added for a run

# In words, and as an expression that a cell behind the page's last one could hold.
PAGES = {
    "what-is-pruning": {
        "trained": "top1",
        "half of the weights cut": "accuracy",
        "edge: highest sparsity that costs at most five points": (
            "100 * levels[sum((cliff.top1[cliff.allocation == 'global'] >= top1 - 5).cummin()) - 1]"
        ),
    },
    "swd-from-scratch": {
        "SWD, before the cut": "cuts.loc['as trained', 'before the cut']",
        "SWD, after the cut": "cuts.loc['as trained', 'after the cut']",
    },
    "schedules": {
        f"{name}, after the cut": f"runs['{name}'][0][-1]['top1']"
        for name in ("exponential", "cosine", "linear", "steps", "constant")
    },
    "baselines-side-by-side": {
        f"`{name}`": f"finals['{name}'][0]"
        for name in ("random_pruning", "han2015", "renda2020", "swd")
    },
    "magnitude-and-its-cliff": {
        "cut at 90 %": "again.loc[90, 'as cut']",
        "cut at 90 %, recalibrated": "again.loc[90, 'recalibrated']",
    },
    "smaller-networks": {
        f"{structure}, {way}, after the cut": f"table['{structure}, {way}']['after it']"
        for structure in ("weights", "filters")
        for way in ("plain training", "SWD")
    },
    "prune-your-own": {
        "dense": "accuracy(dense)",
        "cut at once": "accuracy(cut_at_once(sparsity)[0])",
        "cut, then retrain": "accuracy(rivals['cut, then retrain'])",
        "gradual pruning": "accuracy(rivals['gradual pruning'])",
        "worked solution": "accuracy(solved)",
    },
}


def main(arguments: list[str] | None = None) -> None:
    """Run what is not on file and store each run as it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pages", nargs="*", help=f"of {', '.join(PAGES)}; none: all")
    parser.add_argument("--to", type=Path, default=STORED, help="the file that is written")
    options = parser.parse_args(arguments)
    if unknown := set(options.pages) - set(PAGES):
        parser.error(f"nothing is asked of {', '.join(sorted(unknown))}; see --help")
    for name in options.pages or PAGES:
        for seed in SEEDS:
            measure(BOOK / f"{name}.ipynb", PAGES[name], seed, options.to)


def measure(source: Path, asked: dict[str, str], seed: int, path: Path) -> None:
    """Run a page with a seed, unless that is in the file `path`, and add its answers there."""
    stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
    facts = facts_of(source, asked)
    section = stored.get(source.stem)
    runs = section["runs"] if section and same(section["provenance"], facts) else {}
    if str(seed) in runs:
        return
    print(f"Running {source.name} with seed {seed}", flush=True)
    runs[str(seed)] = answers(source, asked, seed)
    stored[source.stem] = {"provenance": facts, "parameters": parameters(source), "runs": runs}
    text = json.dumps(stored, indent=1) + "\n"
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def parameters(source: Path) -> dict[str, str]:
    """Return what a page sets its parameters to, all but its seed."""
    found = papermill.inspect_notebook(str(source))
    return {name: about["default"] for name, about in found.items() if name != "seed"}


def facts_of(source: Path, asked: dict[str, str]) -> dict[str, Any]:
    """Return with what a page is run: date, versions, library, machine, and the page itself."""
    facts = provenance(load_data("digits"))
    del facts["dataset"]  # the pages split it each in its own way
    cells = nbformat.read(source, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    text = source.name + json.dumps([code, asked])
    return {**facts, "page": hashlib.sha256(text.encode()).hexdigest()[:12]}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether runs with these facts belong together."""
    if one["code"]["version"] != other["code"]["version"]:
        return False
    return all(one[key] == other[key] for key in ("versions", "machine", "page"))


def answers(source: Path, asked: dict[str, str], seed: int) -> dict[str, float]:
    """Run a page with a seed and return what the expressions come to."""
    notebook = nbformat.read(source, as_version=4)
    values = ", ".join(f"{words!r}: float({asks})" for words, asks in asked.items())
    last = f"import json\n\nprint(json.dumps({{{values}}}))"
    notebook.cells.append(nbformat.v4.new_code_cell(last, metadata={"tags": [ASKED]}))
    with TemporaryDirectory() as folder:
        target = str(Path(folder, source.name))
        nbformat.write(notebook, target)
        papermill.execute_notebook(
            target, target, {"seed": seed}, cwd=str(source.parent), progress_bar=False
        )
        ran = nbformat.read(target, as_version=4)
    [cell] = [cell for cell in ran.cells if ASKED in cell.metadata.get("tags", [])]
    found: dict[str, float] = json.loads(cell.outputs[0].text)
    return found


if __name__ == "__main__":
    main()
