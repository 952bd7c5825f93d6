"""Interactive pieces of a page that need no kernel and no network: HTML from numbers."""

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from swdlib import plots
from swdlib.records import HISTOGRAM_RANGE

# In the handler, `this` is the slider; its frames are the images beside it. Unless autocomplete is
# off, a browser that goes back moves the slider to where it was, and tells no handler.
_SLIDER = """<figure class="swd-frames" style="margin: 0">
<label style="display: block">shown: <b>{first}</b>
<input type="range" min="0" max="{last}" value="0" autocomplete="off"
style="display: block; width: 100%" aria-valuetext="{first}" oninput="
const figure = this.closest('figure'), frames = figure.querySelectorAll('img');
frames.forEach((frame, k) => frame.hidden = k != this.value);
const label = frames[this.value].dataset.label;
this.setAttribute('aria-valuetext', label);
this.previousElementSibling.textContent = label;"></label>
{frames}</figure>"""

_LIVE_MODEL = """<div class="swd-model" data-problem="{problem}"><p>On the book's page a live model
stands here: a script draws it from the numbers of this cell.</p></div>"""


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
    places these are, and chooses target and update rule. Elsewhere a line of text stands for it.
    """
    vectors = {"hessian": hessian, "trained": trained, "start": start}
    problem = {
        **{name: np.asarray(values, dtype=float).tolist() for name, values in vectors.items()},
        **{"steps": steps, "weightDecay": weight_decay},
        **{"aMin": a_min, "aMax": a_max, "rate": rate},
    }
    return Html(_LIVE_MODEL.format(problem=html.escape(json.dumps(problem, allow_nan=False))))


def weights_over_training(histograms: Mapping[str, Mapping[str, Any]]) -> Html:
    """Histograms of |w| one at a time, chosen with a slider: label -> a row's `weights`.

    All have the same axes. The slider works with the keyboard too, and each picture says in words
    how many weights lie where. ValueError if there is no histogram.
    """
    if not histograms:
        raise ValueError("histograms must hold at least one: label -> a row's `weights`")
    limits = _limits(np.array([histogram["counts"] for histogram in histograms.values()]))
    frames: list[str] = []
    for label, histogram in histograms.items():
        ax = plots.weight_distribution({label: histogram})
        ax.set(**limits)
        words = f"Histogram of the absolute weights, {label}: {_in_words(histogram)}."
        frames.append(_frame(ax.figure, words, label, hidden=bool(frames)))
    first, last = html.escape(next(iter(histograms))), len(frames) - 1
    text = _SLIDER.format(first=first, last=last, frames="\n".join(frames))
    return Html(text, _histograms_csv(histograms))


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


def _frame(figure: Any, words: str, label: str, hidden: bool) -> str:
    buffer = io.StringIO()
    # Text stays text, in the reader's font, and equal numbers give equal files.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "swdlib"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    source = base64.b64encode(plots.for_both_grounds(buffer.getvalue()).encode()).decode()
    return (
        f'<img src="data:image/svg+xml;base64,{source}" alt="{html.escape(words)}" '
        f'data-label="{html.escape(label)}" class="dark-light" style="width: 100%"'
        f"{' hidden' if hidden else ''}>"
    )
