"""What a notebook draws and reads: two cells, added for its run alone, find out."""

import json
from pathlib import Path
from typing import Any

import nbformat

from book.in_kernel import CSV
from book.reruns import Figure
from swdlib.lab.plots import for_both_grounds

PROBE = "probe"  # the tag of these cells
SVG = "image/svg+xml"
FIRST = """\
import sys

sys.path.insert(0, {folder!r})
import in_kernel

del sys.path[0], sys
in_kernel.keep_numbers()"""
LAST = "import json\n\nprint(json.dumps(in_kernel.files_read()))"


def added(source: Path) -> Any:
    """Return a notebook with a cell before and one after it that record what it draws and reads."""
    notebook = nbformat.read(source, as_version=4)
    first = FIRST.format(folder=str(Path(__file__).resolve().parent))
    before, after = (
        nbformat.v4.new_code_cell(code, metadata={"tags": [PROBE]}) for code in (first, LAST)
    )
    notebook.cells = [before, *notebook.cells, after]
    return notebook


def files_read(notebook: Any) -> list[str]:
    """Remove the cells that `added` put there and return the files that the notebook read."""
    probes = [cell for cell in notebook.cells if PROBE in cell.metadata.get("tags", [])]
    notebook.cells = [cell for cell in notebook.cells if cell not in probes]
    printed = [output.text for output in probes[-1].outputs if output.get("name") == "stdout"]
    files: list[str] = json.loads("".join(printed))
    return files


def numbers_drawn(notebook: Any, root: Path, folder: str) -> list[Figure]:
    """Move the numbers of figures from the outputs of a notebook to files in `root`/`folder`.

    The figures are made readable on dark pages.
    """
    (root / folder).mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    for cell in notebook.cells:
        words = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if svg := data.get(SVG):
                data[SVG] = for_both_grounds(svg)
            if numbers := data.pop(CSV, None):
                name = f"{folder}/figure-{len(figures) + 1}.csv"
                (root / name).write_text(numbers, encoding="utf-8")
                figures.append(Figure(name, words))
    return figures
