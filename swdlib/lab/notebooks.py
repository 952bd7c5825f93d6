"""Notebooks: what the book's notebooks need of papermill and lack, and what their pages show."""

import ast
import csv
import io
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

CSV = "text/csv"

_read: list[str] = []  # what was read since `keep_numbers`


def check_parameters(namespace: Mapping[str, Any]) -> None:
    """ValueError if papermill was given a parameter that the notebook lacks; it only warns itself.

    Also if one is not of the type that the notebook's cell says. `namespace` is a notebook's
    `globals()`, where IPython keeps the source of the cells that ran as `In`. Papermill writes what
    it is given into a cell of its own, right after the notebook's.
    """
    history = namespace["In"]
    for own, given in pairwise(history):
        known = _assigned(own) if given.startswith("# Parameters\n") else set()
        if known and (unknown := sorted(_assigned(given) - known)):
            raise ValueError(
                f"the notebook has no parameter {', '.join(unknown)}; "
                f"its parameters are {', '.join(sorted(known))}"
            )
        for name, kind in _annotated(own).items() if known else ():
            _check_type(name, namespace[name], kind)


def _annotated(source: str) -> dict[str, str]:
    """The types that a cell states, by name; without those whose default is None."""
    return {
        ast.unparse(node.target): ast.unparse(node.annotation)
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.value or node) != "None"
    }


def _check_type(name: str, value: Any, kind: str) -> None:
    types = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "list": (list,)}
    fits = isinstance(value, types[kind]) and (kind == "bool" or not isinstance(value, bool))
    if kind == "list":
        fits = fits and all(isinstance(item, int | float) for item in value)
    if not fits:
        words = "a list of numbers" if kind == "list" else f"of type {kind}"
        raise ValueError(f"{name} must be {words}, not {value!r}")


def _assigned(source: str) -> set[str]:
    """The names that a cell sets."""
    nodes = ast.walk(ast.parse(source))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def keep_numbers() -> None:
    """From here on, what a notebook shows brings the numbers behind it along as text/csv.

    Figures do, which are drawn as SVG, and whatever has a method `_repr_csv_`.

    Also notes the JSON files that are opened, for `files_read`. To be called in a notebook's kernel
    alone: neither can be undone.
    """
    from IPython import get_ipython  # there is one wherever a notebook runs
    from IPython.core.formatters import BaseFormatter
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    from matplotlib_inline.backend_inline import set_matplotlib_formats
    from traitlets import ObjectName, Unicode

    class CsvFormatter(BaseFormatter):
        format_type = Unicode(CSV)
        print_method = ObjectName("_repr_csv_")

        def __call__(self, shown: Any) -> str | None:
            # Not registered for figures: matplotlib's backend unregisters what is.
            if isinstance(shown, Figure):
                return figure_csv(shown) or None
            return super().__call__(shown)

    rcParams["svg.hashsalt"] = "swdlib"  # equal numbers give equal files
    set_matplotlib_formats("svg", metadata={"Date": None})
    display = get_ipython().display_formatter
    display.formatters[CSV] = CsvFormatter(parent=display)
    sys.addaudithook(_note_reading)


def _note_reading(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith(".json") and "r" in str(arguments[1]):
        _read.append(str(Path(str(arguments[0])).resolve()))


def files_read() -> list[str]:
    """The JSON files that were read since `keep_numbers`, such as records; each once."""
    return list(dict.fromkeys(_read))


def figure_csv(figure: Any) -> str:
    """The numbers that a matplotlib figure shows, a line a point: CSV with the axes' labels.

    `series` is the name, `get_gid`, or else the label in the legend. The columns are named as the
    axes are, by label or else by gid: otherwise x and y, or of a picture or heat map, which also
    has a value, row and column. Marks of TeX are left out.
    """
    file = io.StringIO()
    write = csv.writer(file, lineterminator="\n").writerow
    for ax in figure.axes:
        points = ["series", _name(ax.xaxis, "x"), _name(ax.yaxis, "y")]
        grid = ["series", _name(ax.yaxis, "row"), _name(ax.xaxis, "column"), "value"]
        for header, rows in ((points, _points(ax)), (grid, _grids(ax))):
            for i, row in enumerate(rows):
                if i == 0:
                    write(header)
                write(row)
    return file.getvalue()


def _name(axis: Any, otherwise: str) -> str:
    return _plain(axis.get_label_text() or axis.get_gid() or otherwise)


def _plain(text: str) -> str:
    """A text without the marks of TeX."""
    return re.sub(r"[$\\{}]", "", text)


def _points(ax: Any) -> Iterator[list[Any]]:
    for line in ax.get_lines():
        # A line across the whole picture, such as an axis, is no data.
        if all(line.get_transform().contains_branch_seperately(ax.transData)):
            yield from _named(line, line.get_xdata(), _rows(ax.yaxis, line.get_ydata()))
    for patch in ax.patches:
        if hasattr(patch, "get_data"):  # stairs: counts between edges
            counts, edges, _ = patch.get_data()
            yield from _named(patch, edges[:-1], counts)
        elif hasattr(patch, "get_height"):
            yield from _named(patch, [patch.get_x() + patch.get_width() / 2], [patch.get_height()])
    for points in ax.collections:
        if type(points).__name__ == "PathCollection":  # what scatter draws
            yield from _named(points, *np.asarray(points.get_offsets()).T)


def _named(artist: Any, x: Any, y: Any) -> Iterator[list[Any]]:
    label = str(artist.get_label())
    name = _plain(artist.get_gid() or ("" if label.startswith("_") else label))
    return (
        [name, a, b] for a, b in zip(np.asarray(x).tolist(), np.asarray(y).tolist(), strict=True)
    )


def _rows(axis: Any, values: Any) -> Any:
    """The names of values that all lie in rows with names, otherwise the values."""
    names: dict[float, str] = {}
    if type(axis.get_major_formatter()).__name__ == "FuncFormatter":  # ticks with names given
        labels = (label.get_text() for label in axis.get_ticklabels())
        names = dict(zip(axis.get_ticklocs().tolist(), labels, strict=True))
    places = np.asarray(values).tolist()
    return [names[place] for place in places] if names.keys() >= set(places) else values


def _grids(ax: Any) -> Iterator[list[Any]]:
    meshes = [m for m in ax.collections if type(m).__name__ == "QuadMesh"]
    for i, picture in enumerate([*meshes, *ax.images]):
        values = np.ma.filled(np.ma.asarray(picture.get_array()).astype(float), np.nan)
        if values.ndim == 2 and ax.get_label() != "<colorbar>":
            rows, columns = map(_labels, (ax.yaxis, ax.xaxis), values.shape)
            for row, column in np.ndindex(*values.shape):
                name = picture.get_gid() or i
                yield [name, rows[row], columns[column], values[row, column].item()]


def _labels(axis: Any, number: int) -> list[Any]:
    """The labels of rows or columns if a tick is at the middle of each, otherwise their numbers."""
    if np.array_equal(axis.get_ticklocs(), np.arange(number) + 0.5):
        return [_ungrouped(_plain(label.get_text())) for label in axis.get_ticklabels()]
    return list(range(number))


def _ungrouped(text: str) -> str:
    """A number without the commas between its thousands; any other text as it is."""
    grouped = re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text)
    return text.replace(",", "") if grouped else text
