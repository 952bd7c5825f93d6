"""Plots: records in, matplotlib Axes out.

A table `rows` is what `load_records` returns, or a part of it. Each function draws on `ax`, or on a
new figure if it is None, and returns the Axes. Backgrounds are transparent and text is grey, paler
on dark pages (`for_both_grounds`), so that a figure can be read there too; colours are seaborn's
colour-blind palette, darkened where it is too pale for a white page. What has no entry in the
legend has its name as gid, for the table of the figure's numbers, and so has an axis without label.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.transforms import Affine2D

from swdlib.runs.records import HISTOGRAM_RANGE

# Text needs a contrast of 4.5:1 (WCAG 1.4.3), which no grey has on white and on a dark page.
INK, PALE_INK = "#747474", "#949494"
# Lines need a contrast of 3:1 (WCAG 1.4.11), on white and on the dark ground of slides. On white,
# five colours of seaborn's palette have less. These are darker here, though not all alike, and so
# is vermilion, so that colour-blind readers can still tell them apart.
COLOURS = sns.color_palette(
    [
        "#0173b2",
        "#cd8404",  # orange, darker
        "#029e73",
        "#cb5a00",  # vermilion, darker
        "#cc78bc",
        "#ae7c52",  # brown, darker
        "#9a6a8b",  # pink, darker
        "#949494",
        "#827b17",  # yellow, darker
        "#4a9cca",  # sky blue, darker
    ]
)
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")


def accuracy_over_epochs(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Top-1 accuracy after each epoch, a line a run, alike for all seeds; a cross marks a cut."""
    ax = _axes(ax, "epoch", "Top-1 accuracy (%)")
    if _without_results(rows):
        return ax
    for i, (name, runs) in enumerate(rows.groupby(rows.apply(name_of, axis=1), sort=False)):
        look = {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i % len(STYLES)]}
        for j, (_, run) in enumerate(runs.groupby("run", sort=False)):
            ax.plot(run["epoch"], run["top1"], label=None if j else name, gid=name, **look)
        cuts = runs[runs["kind"] == "prune"]
        look = {"color": look["color"], "markersize": 9, "gid": f"{name}, cut"}
        ax.plot(cuts["epoch"], cuts["top1"], "X", **look)
    return _legend_above(ax, title="× after a cut", ncols=2)


def accuracy_against_kept(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Final Top-1 accuracy against the parameters that are left: a point a run, a line a method.

    The line goes through the means of the runs that share a target.
    """
    ax = _axes(ax, "parameters kept", "final Top-1 accuracy (%)")
    ax.set_xscale("log")
    if _without_results(rows):
        return ax
    finals = rows.groupby("run", sort=False).tail(1)
    for i, (name, runs) in enumerate(finals.groupby(finals.apply(method_of, axis=1), sort=False)):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.plot(runs["parameters"], runs["top1"], ls="", markersize=8, label=name, **look)
        means = runs.groupby("target_sparsity")[["parameters", "top1"]].mean()
        look = {"color": look["color"], "lw": 1.2, "gid": f"{name}, mean"}
        ax.plot(means["parameters"], means["top1"], "-", **look)
    # Whole powers of ten: marks between them would be written over each other.
    low, high = np.log10(finals["parameters"].agg(["min", "max"]))
    ax.set_xlim(10 ** np.floor(low - 0.05), 10 ** np.ceil(high + 0.05))
    return _legend(ax)


def weight_distribution(weights: Mapping[str, Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Histograms of |w|, an outline each: label -> a row's `weights`.

    Zeros have no logarithm: their number stands in the label.
    """
    ax = _axes(ax, "absolute weight |w|", "number of weights")
    for i, (label, histogram) in enumerate(weights.items()):
        counts = histogram["counts"]
        edges = np.logspace(*HISTOGRAM_RANGE, len(counts) + 1)
        zeros = f" ({histogram['zeros']:,} are zero)" if histogram["zeros"] else ""
        look = {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i % len(STYLES)]}
        ax.stairs(counts, edges, lw=1.6, label=label + zeros, **look)
    total = np.sum([histogram["counts"] for histogram in weights.values()], axis=0)
    filled = np.atleast_1d(total).nonzero()[0]  # without histograms, the sum is a number
    if filled.size:
        ax.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
    ax.set_xscale("log")
    return _legend(ax)


def schedule(schedules: Mapping[str, Callable[[float], float]], ax: Axes | None = None) -> Axes:
    """Schedules over progress, from 0 to 1: label -> schedule. The value's axis is logarithmic."""
    ax = _axes(ax, "progress t / T", "value")
    progress = np.linspace(0, 1, 201)
    for i, (label, value) in enumerate(schedules.items()):
        look = {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i % len(STYLES)]}
        ax.plot(progress, [value(float(p)) for p in progress], label=label, **look)
    ax.set_yscale("log")
    return _legend(ax)


def sparsity_cliff(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy `top1` against `sparsity`, both columns of `frame`; a line for each `allocation`."""
    ax = _axes(ax, "sparsity (% of weights removed)", "Top-1 accuracy (%)")
    if frame.empty:
        return ax
    for i, (label, part) in enumerate(frame.groupby("allocation", sort=False)):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        style = STYLES[i % len(STYLES)]
        ax.plot(100 * part["sparsity"], part["top1"], ls=style, ms=5, label=label, **look)
    ax.set_ylim(0, 102)
    return _legend(ax)


def curves(frame: pd.DataFrame, ylabel: str, ax: Axes | None = None, *, lines: bool = True) -> Axes:
    """A line for each column of `frame` over its index, whose name is the axis label.

    Without `lines` points alone are drawn.
    """
    ax = _axes(ax, str(frame.index.name), ylabel)
    for i, (label, values) in enumerate(frame.items()):
        look = {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i % len(STYLES)] if lines else ""}
        ax.plot(frame.index, values, marker=MARKERS[i % len(MARKERS)], ms=4, label=label, **look)
    return _legend(ax)


def paths(
    loss: Callable[[Any, Any], Any], points: Mapping[str, Any], ax: Axes | None = None
) -> Axes:
    """Paths over the contours of a loss of two weights: label -> points of shape (n, 2).

    `loss(x, y)` works on arrays. A cross marks the start of each path and a dot its end; at
    contour k the loss is (k / 5)^2 above the least that is in sight.
    """
    ax = _axes(ax, "weight $w_1$", "weight $w_2$")
    every = np.concatenate([np.zeros((1, 2)), *(np.asarray(path) for path in points.values())])
    low, high = every.min() - 0.3, every.max() + 0.3
    x, y = np.meshgrid(*[np.linspace(low, high, 301)] * 2)
    height = loss(x, y)
    levels = height.min() + (np.arange(1, 15) / 5) ** 2
    ax.grid(visible=False)
    ax.contour(x, y, height, levels, colors=INK, linewidths=0.7, alpha=0.6)
    for line in (ax.axhline, ax.axvline):
        line(0, color=INK, lw=1.2)
    for i, (label, path) in enumerate(points.items()):
        look = {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i % len(STYLES)], "lw": 2}
        places = np.asarray(path)
        ax.plot(*places.T, marker="o", markevery=[-1], label=label, **look)
        ax.plot(*places[0], "x", color=INK, mew=2, ms=8, gid=f"{label}, start")
    ax.set_aspect("equal")
    return _legend_above(ax)


def weight_paths(
    sizes: Mapping[str, Any], threshold: Sequence[float], ax: Axes | None = None
) -> Axes:
    """Absolute weights step by step, a thin line a weight: label -> sizes (steps, weights).

    Below `threshold`, given for each step, a weight is selected. A zero has no place on the
    logarithmic axis.
    """
    ax = _axes(ax, "step", "absolute weight |w|")
    for i, (label, of_steps) in enumerate(sizes.items()):
        look = {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i % len(STYLES)], "lw": 1}
        ax.plot(of_steps, gid=label, **look)[0].set_label(label)
    ax.plot(threshold, color=INK, lw=2.5, label="threshold")
    ax.set_yscale("log")
    return _legend(ax)


def timeline(shares: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """What methods do to the weights while they train, a strip each: label -> a table over epochs.

    Its columns are shares of the weights from 0 to 1; a strip is as high as all of them. The first
    share is filled, of the others only what is above 0 is drawn.
    """
    ax = _axes(ax, "epoch", "", rows=len(shares))
    ax.grid(visible=False)
    for i, (label, table) in enumerate(shares.items()):
        place = Affine2D().scale(1, 0.75).translate(0, -i) + ax.transData
        ax.axhline(-i, color=INK, lw=0.6)
        for j, (kind, share) in enumerate(table.items()):
            look = {"color": COLOURS[j % len(COLOURS)], "ls": STYLES[j % len(STYLES)], "lw": 1.6}
            look |= {"label": "" if i else kind, "gid": f"{label}, {kind}"}
            drawn = share.where(share > 0) if j else share
            ax.plot(share.index, drawn, transform=place, **look)
            if j == 0:
                ax.fill_between(share.index, share, color=COLOURS[0], alpha=0.35, transform=place)
    if ends := [table.index.max() for table in shares.values() if len(table)]:
        ax.set_xlim(0, max(ends))
    ax.yaxis.set_gid("share")
    ax.set_yticks(-np.arange(len(shares)) + 0.35, list(shares))
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(0.8 - len(shares), 0.9)
    return _legend_above(ax)


def spread(
    values: pd.DataFrame, xlabel: str, ax: Axes | None = None, *, dot: str = "a run"
) -> Axes:
    """The values of each column as dots in a row of their own, and a bar at their mean.

    `dot` says what a dot stands for.
    """
    ax = _axes(ax, xlabel, "", rows=len(values.columns))
    rows = -np.arange(len(values.columns))
    # Dots that lie on one another show; their outlines keep the contrast.
    dots = {"color": COLOURS[0], "mfc": (COLOURS[0], 0.4)}
    bar = {"color": COLOURS[3], "ms": 13, "mew": 2}
    for i, (name, of_name) in enumerate(values.items()):
        ax.plot(of_name, [-i] * len(of_name), "o", label="" if i else dot, gid=f"{name}", **dots)
        ax.plot(of_name.mean(), -i, "|", label="" if i else "mean", gid=f"{name}, mean", **bar)
    ax.yaxis.set_gid("row")
    ax.set_yticks(rows, list(values.columns))
    return _legend_above(ax)


def heat_map(table: pd.DataFrame, label: str, ax: Axes | None = None) -> Axes:
    """The values of a table as colours and numbers; its index and columns name the axes.

    `label` is that of the colours. Where a value is missing, the run diverged: a cross.
    """
    ax = _axes(ax, str(table.columns.name), str(table.index.name))
    if table.empty:
        return ax
    look = {"annot": True, "fmt": ".0f", "cmap": "cividis", "cbar_kws": {"label": label}}
    look["gid"] = label
    if table.isna().all(axis=None):
        look |= {"vmin": 0, "vmax": 1}  # seaborn finds none
    ax.grid(visible=False)
    sns.heatmap(table, ax=ax, **look)
    ax.invert_yaxis()
    ax.tick_params(axis="y", rotation=0)
    for row, column in zip(*np.isnan(table.to_numpy(dtype=float)).nonzero(), strict=True):
        ax.text(column + 0.5, row + 0.5, "×", color=INK, ha="center", va="center", size="large")
    _grey(ax.collections[0].colorbar)
    return ax


def kept_weights(
    shares: Mapping[str, Any],
    ax: Axes | None = None,
    *,
    label: str = "share of the kernel kept",
) -> Axes:
    """What is left of layers: name -> the share of each kernel that is kept, (outputs, inputs).

    They are drawn side by side, each under its name; `label` is that of the colours, from 0 to 1.
    """
    if not shares:
        return _axes(ax, "input maps", "output maps")
    sizes = np.array([np.shape(share) for share in shares.values()])
    gap = 0.2 * sizes[:, 1].max()
    # Of the figure's width, the panels have about 3.6 inches.
    height = min(4.0, 1 + 3.6 * sizes[:, 0].max() / (sizes[:, 1] + gap).sum())
    ax = _axes(ax, "input maps", "output maps", height=height)
    ax.grid(visible=False)
    left = 0.0
    for name, share in shares.items():
        rows, columns = np.shape(share)
        image = ax.imshow(
            share,
            cmap="cividis",
            interpolation="nearest",
            extent=(left, left + columns, rows, 0),
            vmin=0,
            vmax=1,
            gid=name,
        )
        ax.text(left + columns / 2, -1, name, color=INK, ha="center", va="bottom")
        left += columns + gap
    ax.set_xlim(0, left - gap)
    ax.set_xticks([])
    ax.spines[:].set_visible(False)
    _grey(ax.figure.colorbar(image, ax=ax, shrink=0.8, label=label))
    return ax


def pictures(images: Mapping[str, Any], ax: Axes | None = None, *, columns: int = 4) -> Axes:
    """Pictures in rows of `columns`, each under its name: label -> (height, width, 3), 0 to 255."""
    rows = -(-len(images) // columns)
    ax = _axes(ax, "", "", rows=6 * rows)
    if not images:
        return ax
    ax.grid(visible=False)
    for i, (label, pixels) in enumerate(images.items()):
        height, width = np.shape(pixels)[:2]
        left, top, side = 1.1 * (i % columns), 1.25 * (i // columns), max(height, width)
        ax.imshow(pixels, extent=(left, left + width / side, top + height / side, top))
        ax.text(left, top - 0.04, label, color=INK, va="bottom")
    ax.set(xlim=(0, 1.1 * min(columns, len(images)) - 0.1), ylim=(1.25 * rows - 0.25, -0.25))
    ax.set_axis_off()
    return ax


def for_both_grounds(svg: str) -> str:
    """A figure as SVG whose grey is paler on dark pages: where `color-scheme`, in CSS, is dark."""
    rules = "".join(
        f'[style*="{part}: {INK}"] {{ {part}: {PALE_INK} !important }}'
        for part in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark) {{ {rules} }}</style>"
    return svg.replace("<defs>", f"{style}<defs>", 1)


def name_of(row: "pd.Series[Any]") -> str:
    """The name of a row's run: its recipe, number of cuts and target sparsity in percent."""
    target = f" at {100 * row['target_sparsity']:g} %" if row["target_sparsity"] > 0 else ""
    return method_of(row) + target


def method_of(row: "Mapping[str, Any] | pd.Series[Any]") -> str:
    """The name of a row's method: its recipe, and its number of cuts if there are several."""
    cuts = row["iterations"] or 1  # None or NaN where the recipe has none
    return f"{row['recipe']}, {cuts:.0f} cuts" if cuts > 1 else str(row["recipe"])


def _without_results(rows: pd.DataFrame) -> bool:
    """Whether there is no row, or each is that of a run that diverged, for which none was kept."""
    return "top1" not in rows or bool(rows["top1"].isna().all())


def _axes(ax: Axes | None, xlabel: str, ylabel: str, rows: int = 0, height: float = 0) -> Axes:
    if ax is None:
        height = height or max(3.4, 1 + 0.35 * rows)
        ax = plt.subplots(figsize=(5.0, height), dpi=180, layout="constrained")[1]
    ax.figure.patch.set_alpha(0.0)
    ax.patch.set_alpha(0.0)
    ax.set_xlabel(xlabel, color=INK)
    ax.set_ylabel(ylabel, color=INK)
    ax.title.set_color(INK)
    ax.tick_params(which="both", colors=INK)
    for spine in ax.spines.values():
        spine.set_color(INK)
    ax.grid(color=INK, alpha=0.25, lw=0.6)
    sns.despine(ax=ax)
    return ax


def _grey(bar: Any) -> None:
    bar.ax.yaxis.label.set_color(INK)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_edgecolor(INK)


def _legend(ax: Axes, **look: Any) -> Axes:
    if ax.get_legend_handles_labels()[1]:
        legend = ax.legend(frameon=False, labelcolor=INK, fontsize="small", **look)
        legend.get_title().set(color=INK, fontsize="small")
    return ax


def _legend_above(ax: Axes, **look: Any) -> Axes:
    if legend := _legend(ax, **look).get_legend():
        legend.set_loc("lower left")
        legend.set_bbox_to_anchor((0, 1), ax.transAxes)
    return ax
