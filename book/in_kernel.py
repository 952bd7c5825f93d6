"""What the build of the book runs in a notebook's kernel: it keeps the numbers behind figures.

The cells of `probes` import this file by its folder, as a kernel has no package `book`. So it
imports nothing of the book; a notebook that runs elsewhere does without it.
"""

import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CSV = "text/csv"

_read: list[str] = []


def keep_numbers() -> None:
    """Send the numbers behind what a notebook shows along as text/csv, and note the files it reads.

    Figures have numbers, and so has whatever has a method `_repr_csv_`. Neither the formatter nor
    the note of files can be undone: call this in a notebook's kernel alone.
    """
    from IPython import get_ipython
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
    """Return the JSON files that were read since `keep_numbers`, such as records; each once."""
    return list(dict.fromkeys(_read))


def figure_csv(figure: Any) -> str:
    """Return the numbers that a matplotlib figure shows as CSV, a line a point.

    The column `series` has an artist's gid, or else its label in the legend. The other columns have
    an axis's label, or else its gid; without either they are x and y, or row and column for images
    and heat maps, which also have a column `value`. Signs of TeX are dropped.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for ax in figure.axes:
        points = ["series", _name(ax.xaxis, "x"), _name(ax.yaxis, "y")]
        grid = ["series", _name(ax.yaxis, "row"), _name(ax.xaxis, "column"), "value"]
        for header, rows in ((points, list(_points(ax))), (grid, list(_grids(ax)))):
            if rows:
                writer.writerows([header, *rows])
    return file.getvalue()


def _name(axis: Any, otherwise: str) -> str:
    return _plain(axis.get_label_text() or axis.get_gid() or otherwise)


def _plain(text: str) -> str:
    """A text without the signs of TeX."""
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
    """The names of the ticks at `values` if each has one, otherwise the values."""
    names: dict[float, str] = {}
    if type(axis.get_major_formatter()).__name__ == "FuncFormatter":  # ticks with names given
        labels = (label.get_text() for label in axis.get_ticklabels())
        names = dict(zip(axis.get_ticklocs().tolist(), labels, strict=True))
    heights = np.asarray(values).tolist()
    return [names[height] for height in heights] if names.keys() >= set(heights) else values


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
    """The labels of rows or columns if each has a tick at its middle, otherwise their indices."""
    if not np.array_equal(axis.get_ticklocs(), np.arange(number) + 0.5):
        return list(range(number))
    labels = [_plain(label.get_text()) for label in axis.get_ticklabels()]
    with_commas = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")  # between thousands
    return [text.replace(",", "") if with_commas.fullmatch(text) else text for text in labels]
