"""Interactive pieces of a page that need no kernel and no network: HTML from numbers."""

import base64
import csv
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from swdlib import plots
from swdlib.runs.records import HISTOGRAM_RANGE

# On paper and without scripts nothing can be moved: what is kept there shows the course. `hidden`
# is important in many pages' styles.
_WITHOUT_SLIDER = """<style>
.swd-frames p { display: none; margin: 0; font-weight: bold; }
@media print, (scripting: none) {
  .swd-frames label { display: none !important; }
  .swd-frames .swd-kept { display: block !important; break-inside: avoid; }
  .swd-frames p { display: block; }
}
</style>"""

# In the handler, `this` is the slider; its frames are beside it, each a name and an image. Unless
# autocomplete is off, a browser that goes back moves the slider to where it was, and tells no
# handler.
_SLIDER = """<figure class="swd-frames" style="margin: 0">{style}
<label style="display: block">shown: <b>{first}</b>
<input type="range" min="0" max="{last}" value="0" autocomplete="off"
style="display: block; width: 100%" aria-valuetext="{first}" oninput="
const figure = this.closest('figure'), frames = figure.querySelectorAll('div');
frames.forEach((frame, k) => frame.hidden = k != this.value);
const label = frames[this.value].firstElementChild.textContent;
this.setAttribute('aria-valuetext', label);
this.previousElementSibling.textContent = label;"></label>
{frames}</figure>"""

_LIVE_MODEL = """<div class="swd-model" data-problem="{problem}"><div>{picture}</div>
<p>Where scripts run, as on the book's page in a browser, the settings behind this path can be
moved.</p></div>"""

# With r = 7 a point's ring lies around its marker; a script finds the nearest point, however far.
_RUN = (
    '<circle class="run" cx="{x:.2f}" cy="{y:.2f}" r="7" fill="none" pointer-events="all" '
    'role="img" tabindex="{tab}" aria-label="{words}"><title>{words}</title></circle>'
)

# What a table of runs calls its columns -> what `load_records` calls them.
_COLUMNS = {
    "method": "method",
    "sparsity": "target_sparsity",
    "seed": "seed",
    "rate": "peak_lr",
    "parameters kept": "parameters",
    "top1": "top1",
    "record": "run",
}


@dataclass(frozen=True)
class Html:
    """What a notebook shows as it is, and the numbers behind it as CSV if it has any."""

    text: str = field(repr=False)  # long
    numbers: str | None = field(default=None, repr=False)

    def _repr_html_(self) -> str:
        return self.text

    def _repr_csv_(self) -> str | None:
        return self.numbers


def live_model(
    hessian: Sequence[Sequence[float]],
    trained: Sequence[float],
    start: Sequence[float],
    *,
    steps: int,
    weight_decay: float,
    a_min: float,
    a_max: float,
    rate: float,
) -> Html:
    """A live model of SWD on the loss 1/2 (w - trained)' hessian (w - trained) of two weights.

    On a page of the book the reader moves `a_min`, `a_max` and the learning `rate`, whose starting
    places these are, and chooses target and update rule. Elsewhere the path from them is drawn.
    """
    vectors = {"hessian": hessian, "trained": trained, "start": start}
    problem = {
        **{name: np.asarray(values, dtype=float).tolist() for name, values in vectors.items()},
        **{"steps": steps, "weightDecay": weight_decay},
        **{"aMin": a_min, "aMax": a_max, "rate": rate},
    }
    numbers = html.escape(json.dumps(problem, allow_nan=False))
    return Html(_LIVE_MODEL.format(problem=numbers, picture=_path_picture(problem)))


def _path_picture(problem: Mapping[str, Any]) -> str:
    hessian, trained = np.array(problem["hessian"]), np.array(problem["trained"])

    def loss(x: Any, y: Any) -> Any:
        away = np.stack([x, y], axis=-1) - trained
        return np.einsum("...i,ij,...j", away, hessian, away) / 2

    ax = plots.paths(loss, {"SWD": path_of(problem)})
    return _image(ax.figure, "The path of two weights under SWD, over the contours of their loss.")


def path_of(problem: Mapping[str, Any]) -> Any:
    """The two weights before the first and after each step of the live model, as it starts."""
    hessian, trained, w = (np.array(problem[name]) for name in ("hessian", "trained", "start"))
    steps, points = problem["steps"], [w]
    for step in range(steps):
        a = problem["aMin"] * (problem["aMax"] / problem["aMin"]) ** (step / steps)
        selected = np.arange(2) == np.abs(w).argmin()
        pull = a * problem["weightDecay"] * w * selected
        w = w - problem["rate"] * (hessian @ (w - trained) + pull)
        points.append(w)
    return np.array(points)


def weights_over_training(histograms: Mapping[str, Mapping[str, Any]]) -> Html:
    """Histograms of |w| one at a time, chosen with a slider: label -> a row's `weights`.

    All have the same axes. The slider works with the keyboard too, and each picture says in words
    how many weights lie where. On paper and without scripts, the first, the middle and the last
    are shown. ValueError if there is no histogram.
    """
    if not histograms:
        raise ValueError("histograms must hold at least one: label -> a row's `weights`")
    limits = _limits(np.array([histogram["counts"] for histogram in histograms.values()]))
    last = len(histograms) - 1
    frames: list[str] = []
    for label, histogram in histograms.items():
        ax = plots.weight_distribution({label: histogram})
        ax.set(**limits)
        words = f"Histogram of the absolute weights, {label}: {_in_words(histogram)}."
        kept = len(frames) in (0, last // 2, last)
        frames.append(_frame(ax.figure, words, label, kept=kept, hidden=bool(frames)))
    first, look = html.escape(next(iter(histograms))), {"style": _WITHOUT_SLIDER}
    text = _SLIDER.format(first=first, last=last, frames="\n".join(frames), **look)
    return Html(text, _histograms_csv(histograms))


def accuracy_of_runs(rows: pd.DataFrame) -> Html:
    """The figure of `plots.accuracy_against_kept`, whose points say which run each of them is.

    Below it stands the run of the highest accuracy. On a page of the book that line then follows
    the mouse, a tap or the arrow keys to the nearest point; elsewhere each point has a tooltip.
    """
    runs = _last_rows(rows)
    table = runs.reindex(columns=list(_COLUMNS.values())).set_axis(list(_COLUMNS), axis="columns")
    table = table.astype({"parameters kept": int})
    numbers = table.to_csv(index=False, lineterminator="\n")
    words = [_run_in_words(run) for _, run in table.iterrows()]
    best = int(table["top1"].argmax()) if words else 0
    ax = plots.accuracy_against_kept(runs)
    svg = _inline(_svg(ax.figure, numbers), _runs_in_words(table))
    svg = svg.replace("</svg>", f"{_points(ax, table, words, best)}</svg>")
    shown = html.escape(words[best]) if words else "There is no run with a result."
    return Html(f'<div class="swd-runs">{svg}<p role="status">{shown}</p></div>', numbers)


def _last_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The last row of each run with a result; of each method in turn, from left to right."""
    if "top1" not in rows:
        return rows.iloc[:0]
    runs = rows.groupby("run", sort=False).tail(1).dropna(subset=["top1"])
    runs = runs.assign(method=[plots.method_of(run) for _, run in runs.iterrows()])
    return runs.iloc[np.lexsort((runs["seed"], runs["parameters"], runs["method"].factorize()[0]))]


def _run_in_words(run: "pd.Series[Any]") -> str:
    return (
        f"{run['method']}, sparsity {100 * run['sparsity']:g} %, seed {run['seed']}, highest "
        f"learning rate {run['rate']:g}: Top-1 {run['top1']:.2f} %, "
        f"{run['parameters kept']:,} parameters kept, record {run['record'][:8]}"
    )


def _runs_in_words(table: pd.DataFrame) -> str:
    what = "Final Top-1 accuracy against parameters kept, on a logarithmic axis"
    return f"{what}, {len(table)} runs: {'; '.join(table['method'].unique()) or 'none'}"


def _points(ax: Any, table: pd.DataFrame, words: Sequence[str], best: int) -> str:
    """A ring around each run's marker, which can be pointed at; `best` comes first with Tab."""
    places = ax.transData.transform(table[["parameters kept", "top1"]].to_numpy(dtype=float))
    places *= 72 / ax.figure.dpi  # an SVG counts in points, and down from its top
    height = 72 * ax.figure.get_figheight()
    return "\n".join(
        _RUN.format(x=x, y=height - y, tab=0 if i == best else -1, words=html.escape(words[i]))
        for i, (x, y) in enumerate(places)
    )


def _inline(svg: str, words: str) -> str:
    """An SVG file as a part of a page: names and rules that would reach beyond it are gone."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)  # that of no marker or clip path
    label = f'role="group" aria-label="{html.escape(words)}" stroke-linejoin="round"'
    return svg.replace("<svg", f"<svg {label}", 1)


def _histograms_csv(histograms: Mapping[str, Mapping[str, Any]]) -> str:
    file = io.StringIO()
    write = csv.writer(file, lineterminator="\n").writerow
    write(["series", "from", "to", "number of weights"])
    for label, histogram in histograms.items():
        write([label, 0.0, 0.0, histogram["zeros"]])
        edges = np.logspace(*HISTOGRAM_RANGE, len(histogram["counts"]) + 1).tolist()
        for low, high, count in zip(edges, edges[1:], histogram["counts"], strict=False):
            write([label, low, high, count])
    return file.getvalue()


def _limits(counts: Any) -> dict[str, tuple[float, float]]:
    """Axes that hold all histograms, rows of `counts`.

    The first bin also counts whatever is smaller, and may stand out of the picture.
    """
    edges = np.logspace(*HISTOGRAM_RANGE, counts.shape[1] + 1)
    filled = np.flatnonzero(counts.sum(axis=0))
    first, last = (filled[0], filled[-1]) if filled.size else (0, counts.shape[1] - 1)
    return {
        "xlim": (edges[first], edges[last + 1]),
        "ylim": (0, 1.05 * max(counts[:, 1:].max(), 1)),
    }


def _in_words(histogram: Mapping[str, Any]) -> str:
    counts, zeros = histogram["counts"], histogram["zeros"]
    low, high = HISTOGRAM_RANGE
    parts = []
    for exponent in (-6, -3, -1):
        place = round(len(counts) * (exponent - low) / (high - low))
        share = (zeros + sum(counts[:place])) / max(zeros + sum(counts), 1)
        parts.append(f"{100 * share:.0f} % are below {10.0**exponent:g}")
    return ", ".join(parts)


def _frame(figure: Any, words: str, label: str, *, kept: bool, hidden: bool) -> str:
    return (
        f'<div class="swd-frame{" swd-kept" if kept else ""}"{" hidden" if hidden else ""}>'
        f"<p>{html.escape(label)}</p>{_image(figure, words)}</div>"
    )


def _image(figure: Any, words: str) -> str:
    source = base64.b64encode(plots.for_both_grounds(_svg(figure)).encode()).decode()
    return (
        f'<img src="data:image/svg+xml;base64,{source}" alt="{html.escape(words)}" '
        f'class="dark-light" style="width: 100%">'
    )


def _svg(figure: Any, salt: str = "swdlib") -> str:
    """A figure, which is closed, as an SVG file; with another `salt` its parts have other names."""
    buffer = io.StringIO()
    # Text stays text, in the reader's font, and equal numbers give equal files.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
