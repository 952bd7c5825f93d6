"""Interactive figures as HTML that needs neither a kernel nor a network."""

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
from swdlib.lab.evidence import finals
from swdlib.runs.records import HISTOGRAM_RANGE

# Where the slider cannot be moved, a few frames are shown below each other. The `!important` rules
# override pages that have one for `hidden`.
_WITHOUT_SLIDER = """<style>
.swd-frames p { display: none; margin: 0; font-weight: bold; }
@media print, (scripting: none) {
  .swd-frames label { display: none !important; }
  .swd-frames .swd-kept { display: block !important; break-inside: avoid; }
  .swd-frames p { display: block; }
}
</style>"""

# In the handler, `this` is the slider; each frame is a name and an image. With autocomplete,
# a browser that goes back to the page would restore the slider without calling the handler.
_SLIDER = """<figure class="swd-frames" style="margin: 0"{play}>{style}
<label style="display: block">shown: <b>{shown}</b>
<input type="range" min="0" max="{last}" value="{start}" autocomplete="off"
style="display: block; width: 100%" aria-valuetext="{shown}" oninput="
const figure = this.closest('figure'), frames = figure.querySelectorAll('div');
frames.forEach((frame, k) => frame.hidden = k != this.value);
const label = frames[this.value].firstElementChild.textContent;
this.setAttribute('aria-valuetext', label);
this.previousElementSibling.textContent = label;"></label>
{frames}</figure>"""

_LIVE_MODEL = """<div class="swd-model" data-problem="{problem}"><div>{picture}</div>
<p>Where scripts run, as on the book's page in a browser, the settings behind this path can be
changed.</p></div>"""

# With r = 7 the ring lies around the marker of its run.
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
    """HTML that a notebook displays, and the numbers behind it as CSV if it has any."""

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

    On a page of the book, the reader can change the strengths `a_min` and `a_max`, the learning
    `rate`, the target and the update rule. Elsewhere the path for the given values is drawn.
    """
    vectors = {"hessian": hessian, "trained": trained, "start": start}
    problem = {
        **{name: np.asarray(values, dtype=float).tolist() for name, values in vectors.items()},
        **{"steps": steps, "weightDecay": weight_decay},
        **{"aMin": a_min, "aMax": a_max, "rate": rate},
    }
    numbers = html.escape(json.dumps(problem, allow_nan=False))

    def loss(x: Any, y: Any) -> Any:
        away = np.stack([x, y], axis=-1) - np.array(trained)
        return np.einsum("...i,ij,...j", away, np.array(hessian), away) / 2

    ax = plots.paths(loss, {"SWD": path_of(problem)})
    words = "The path of two weights under SWD, over the contours of their loss."
    return Html(_LIVE_MODEL.format(problem=numbers, picture=_image(ax.figure, words)))


def path_of(problem: Mapping[str, Any]) -> Any:
    """The weights of the live model as it starts: before the first and after each step, (n, 2)."""
    hessian, trained, w = (np.array(problem[name]) for name in ("hessian", "trained", "start"))
    steps, points = problem["steps"], [w]
    for step in range(steps):
        a = problem["aMin"] * (problem["aMax"] / problem["aMin"]) ** (step / steps)
        selected = np.arange(2) == np.abs(w).argmin()
        pull = a * problem["weightDecay"] * w * selected
        w = w - problem["rate"] * (hessian @ (w - trained) + pull)
        points.append(w)
    return np.array(points)


def weights_over_training(
    histograms: Mapping[str, Mapping[str, Any]],
    *,
    start: int = 0,
    log: bool = False,
    play: bool = False,
) -> Html:
    """Histograms of |w| one at a time, chosen with a slider: label -> a row's `weights`.

    They share their axes, and the alternative text of each says how many weights lie where. `start`
    is the number of the first one shown; counts are on a logarithmic axis if `log`. On a page of
    the book a button plays them, and with `play` they play once by themselves, unless the reader
    wants no motion. On paper and without scripts, the first, the middle and the last are shown.
    ValueError if there is no histogram, and for a `start` that is not the number of one.
    """
    if not histograms:
        raise ValueError("histograms must hold at least one: label -> a row's `weights`")
    last = len(histograms) - 1
    if not 0 <= start <= last:
        raise ValueError(f"start must be in 0 to {last}, the number of a histogram, not {start}")
    counts = np.array([histogram["counts"] for histogram in histograms.values()])
    limits = _limits(counts, log)
    frames: list[str] = []
    for label, histogram in histograms.items():
        ax = plots.weight_distribution({label: histogram})
        ax.set(**limits)
        words = f"Histogram of the absolute weights, {label}: {_in_words(histogram)}."
        kept = " swd-kept" if len(frames) in (0, last // 2, last) else ""
        frames.append(
            f'<div class="swd-frame{kept}"{"" if len(frames) == start else " hidden"}>'
            f"<p>{html.escape(label)}</p>{_image(ax.figure, words)}</div>"
        )
    values = {
        **{"style": _WITHOUT_SLIDER, "last": last, "frames": "\n".join(frames), "start": start},
        **{"shown": html.escape(list(histograms)[start]), "play": " data-play" if play else ""},
    }
    return Html(_SLIDER.format(**values), _histograms_csv(histograms))


def accuracy_of_runs(rows: pd.DataFrame) -> Html:
    """The figure of `plots.accuracy_against_kept`, each of whose points names its run.

    The line below it names the run of the highest accuracy. On a page of the book it follows the
    mouse, a tap or the arrow keys to the nearest point; elsewhere each point has a tooltip.
    """
    runs = _last_rows(rows)
    table = runs.reindex(columns=list(_COLUMNS.values())).set_axis(list(_COLUMNS), axis="columns")
    table = table.astype({"parameters kept": int})
    numbers = table.to_csv(index=False, lineterminator="\n")
    words = [_in_a_line(run) for _, run in table.iterrows()]
    best = int(table["top1"].argmax()) if words else 0
    ax = plots.accuracy_against_kept(runs)
    what = "Final Top-1 accuracy against parameters kept, on a logarithmic axis"
    methods = "; ".join(table["method"].unique()) or "none"
    svg = _inline(_svg(ax.figure, numbers), f"{what}, {len(table)} runs: {methods}")
    svg = svg.replace("</svg>", f"{_points(ax, table, words, best)}</svg>")
    shown = html.escape(words[best]) if words else "There is no run with a result."
    return Html(f'<div class="swd-runs">{svg}<p role="status">{shown}</p></div>', numbers)


def _last_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The last row of each run that has a result, by method and from left to right."""
    if "top1" not in rows:
        return rows.iloc[:0]
    runs = finals(rows)
    return runs.iloc[np.lexsort((runs["seed"], runs["parameters"], runs["method"].factorize()[0]))]


def _in_a_line(run: "pd.Series[Any]") -> str:
    return (
        f"{run['method']}, sparsity {100 * run['sparsity']:g} %, seed {run['seed']}, highest "
        f"learning rate {run['rate']:g}: Top-1 {run['top1']:.2f} %, "
        f"{run['parameters kept']:,} parameters kept, record {run['record'][:8]}"
    )


def _points(ax: Any, table: pd.DataFrame, words: Sequence[str], best: int) -> str:
    """A ring for the pointer around each run's marker; the Tab key goes to `best` first."""
    centres = ax.transData.transform(table[["parameters kept", "top1"]].to_numpy(dtype=float))
    centres *= 72 / ax.figure.dpi  # an SVG counts in points, and down from its top
    height = 72 * ax.figure.get_figheight()
    return "\n".join(
        _RUN.format(x=x, y=height - y, tab=0 if i == best else -1, words=html.escape(words[i]))
        for i, (x, y) in enumerate(centres)
    )


def _inline(svg: str, words: str) -> str:
    """An SVG file as part of a page, without the ids and style rules that would reach beyond it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)  # not of markers and clip paths
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


def _limits(counts: Any, log: bool) -> dict[str, Any]:
    """Limits and scale of axes on which all histograms, rows of `counts`, fit.

    The first bin also counts all smaller weights: it may be too high for the picture.
    """
    edges = np.logspace(*HISTOGRAM_RANGE, counts.shape[1] + 1)
    filled = np.flatnonzero(counts.sum(axis=0))
    first, last = (filled[0], filled[-1]) if filled.size else (0, counts.shape[1] - 1)
    highest = max(counts[:, 1:].max(), 1)
    heights = (
        {"yscale": "log", "ylim": (0.8, 2 * highest)} if log else {"ylim": (0, 1.05 * highest)}
    )
    return {"xlim": (edges[first], edges[last + 1]), **heights}


def _in_words(histogram: Mapping[str, Any]) -> str:
    counts, zeros = histogram["counts"], histogram["zeros"]
    low, high = HISTOGRAM_RANGE
    parts = []
    for exponent in (-6, -3, -1):
        end = round(len(counts) * (exponent - low) / (high - low))
        share = (zeros + sum(counts[:end])) / max(zeros + sum(counts), 1)
        parts.append(f"{100 * share:.0f} % are below {10.0**exponent:g}")
    return ", ".join(parts)


def _image(figure: Any, words: str) -> str:
    source = base64.b64encode(plots.for_both_grounds(_svg(figure)).encode()).decode()
    return (
        f'<img src="data:image/svg+xml;base64,{source}" alt="{html.escape(words)}" '
        f'class="dark-light" style="width: 100%">'
    )


def _svg(figure: Any, salt: str = "swdlib") -> str:
    """Close a figure and return it as an SVG file, whose ids depend on `salt`."""
    buffer = io.StringIO()
    # Text stays text, in the reader's font; equal numbers give equal files.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
