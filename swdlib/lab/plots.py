"""Plots: records in, matplotlib Axes out.

A table `rows` is what `load_records` returns, or a part of it. Each function draws on `ax`, or on a
new figure if it is None, and returns the Axes. Backgrounds are transparent and text is grey, paler
on dark pages (`for_both_grounds`), so that a figure can be read there too; colours are seaborn's
colour-blind palette, darkened where it is too pale for a white page. The book publishes the numbers
behind each figure: an artist without an entry in the legend, or an axis without a label, is named
there by its gid.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.transforms import Affine2D
from scipy.special import stdtrit

from swdlib.runs.records import HISTOGRAM_RANGE, last_rows

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
        for j, (_, run) in enumerate(runs.groupby("run", sort=False)):
            label = None if j else name
            ax.plot(run["epoch"], run["top1"], label=label, gid=name, **_look(i))
        cuts = runs[runs["kind"] == "prune"]
        look = {"color": _cycle(COLOURS, i), "markersize": 9, "gid": f"{name}, cut"}
        ax.plot(cuts["epoch"], cuts["top1"], "X", **look)
    return _legend_above(ax, title="× after a cut", ncols=2)


def accuracy_against_kept(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Final Top-1 accuracy against the parameters kept: a point a run, a line a method.

    The line goes through the means of the runs that share a target. A bar is the 95 % interval of
    the mean of runs that differ by their seed alone (Student's t).
    """
    ax = _axes(ax, "parameters kept", "final Top-1 accuracy (%)")
    ax.set_xscale("log")
    if _without_results(rows):
        return ax
    finals = last_rows(rows)
    for i, (name, runs) in enumerate(finals.groupby(finals.apply(method_of, axis=1), sort=False)):
        look = {"color": _cycle(COLOURS, i), "marker": _cycle(MARKERS, i)}
        ax.plot(runs["parameters"], runs["top1"], ls="", markersize=8, label=name, **look)
        means = runs.groupby("target_sparsity")[["parameters", "top1"]].mean()
        look = {"color": look["color"], "lw": 1.2, "gid": f"{name}, mean"}
        ax.plot(means["parameters"], means["top1"], "-", **look)
        for _, seeds in runs.groupby("setup") if "setup" in runs else ():
            if seeds["top1"].count() > 1:
                mean, half = interval(seeds["top1"].dropna())
                at = [seeds["parameters"].mean()] * 2
                bar = look | {"lw": 2.5, "alpha": 0.6, "gid": f"{name}, 95 % interval"}
                ax.plot(at, [mean - half, mean + half], "-", **bar)
    # Whole powers of ten: the labels of ticks between them would overlap.
    low, high = np.log10(finals["parameters"].agg(["min", "max"]))
    ax.set_xlim(10 ** np.floor(low - 0.05), 10 ** np.ceil(high + 0.05))
    return _legend(ax)


def interval(values: Any) -> tuple[float, float]:
    """The mean of two values or more, and half of its 95 % interval by Student's t."""
    half = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def weight_distribution(weights: Mapping[str, Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Histograms of |w|, an outline each: label -> a row's `weights`.

    Zeros cannot be drawn on the logarithmic axis: the label says how many there are.
    """
    ax = _axes(ax, "absolute weight |w|", "number of weights")
    for i, (label, histogram) in enumerate(weights.items()):
        counts = histogram["counts"]
        edges = np.logspace(*HISTOGRAM_RANGE, len(counts) + 1)
        zeros = f" ({histogram['zeros']:,} are zero)" if histogram["zeros"] else ""
        ax.stairs(counts, edges, lw=1.6, label=label + zeros, **_look(i))
    total = np.sum([histogram["counts"] for histogram in weights.values()], axis=0)
    filled = np.atleast_1d(total).nonzero()[0]  # without histograms, the sum is a number
    if filled.size:
        ax.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
    ax.set_xscale("log")
    return _legend(ax)


def schedule(schedules: Mapping[str, Callable[[float], float]], ax: Axes | None = None) -> Axes:
    """Schedules over progress from 0 to 1, on a logarithmic axis: label -> schedule."""
    ax = _axes(ax, "progress t / T", "value")
    progress = np.linspace(0, 1, 201)
    for i, (label, value) in enumerate(schedules.items()):
        ax.plot(progress, [value(float(p)) for p in progress], label=label, **_look(i))
    ax.set_yscale("log")
    return _legend(ax)


def sparsity_cliff(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Accuracy `top1` against `sparsity`, both columns of `frame`; a line for each `allocation`."""
    ax = _axes(ax, "sparsity (% of weights removed)", "Top-1 accuracy (%)")
    if frame.empty:
        return ax
    for i, (label, part) in enumerate(frame.groupby("allocation", sort=False)):
        look = _look(i) | {"marker": _cycle(MARKERS, i), "ms": 5}
        ax.plot(100 * part["sparsity"], part["top1"], label=label, **look)
    ax.set_ylim(0, 102)
    return _legend(ax)


def curves(frame: pd.DataFrame, ylabel: str, ax: Axes | None = None, *, lines: bool = True) -> Axes:
    """A line for each column of `frame` over its index, whose name is the axis label.

    With `lines=False` only the points are drawn.
    """
    ax = _axes(ax, str(frame.index.name), ylabel)
    for i, (label, values) in enumerate(frame.items()):
        look = _look(i) | {"marker": _cycle(MARKERS, i), "ms": 4} | ({} if lines else {"ls": ""})
        ax.plot(frame.index, values, label=label, **look)
    return _legend(ax)


def paths(
    loss: Callable[[Any, Any], Any], points: Mapping[str, Any], ax: Axes | None = None
) -> Axes:
    """Paths over the contours of a loss of two weights: label -> points of shape (n, 2).

    `loss(x, y)` takes arrays. A cross marks the start of each path and a dot its end; at contour k
    the loss is (k / 5)^2 above the lowest one in the picture.
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
        w = np.asarray(path)
        ax.plot(*w.T, marker="o", markevery=[-1], lw=2, label=label, **_look(i))
        ax.plot(*w[0], "x", color=INK, mew=2, ms=8, gid=f"{label}, start")
    ax.set_aspect("equal")
    return _legend_above(ax)


def weight_paths(
    sizes: Mapping[str, Any], threshold: Sequence[float], ax: Axes | None = None
) -> Axes:
    """Absolute weights step by step, a thin line a weight: label -> sizes (steps, weights).

    Weights below `threshold`, one value a step, are selected. The axis is logarithmic, so that
    zeros are not drawn.
    """
    ax = _axes(ax, "step", "absolute weight |w|")
    for i, (label, of_steps) in enumerate(sizes.items()):
        ax.plot(of_steps, gid=label, lw=1, **_look(i))[0].set_label(label)
    ax.plot(threshold, color=INK, lw=2.5, label="threshold")
    ax.set_yscale("log")
    return _legend(ax)


def timeline(shares: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """What methods do to the weights while they train, a strip each: label -> a table over epochs.

    Its columns are fractions of the weights, and a strip is as high as a fraction of 1. The first
    column is filled; the others are drawn where they are above 0.
    """
    ax = _axes(ax, "epoch", "", rows=len(shares))
    ax.grid(visible=False)
    for i, (label, table) in enumerate(shares.items()):
        strip = Affine2D().scale(1, 0.75).translate(0, -i) + ax.transData
        ax.axhline(-i, color=INK, lw=0.6)
        for j, (kind, share) in enumerate(table.items()):
            look = _look(j) | {"label": "" if i else kind, "gid": f"{label}, {kind}", "lw": 1.6}
            drawn = share.where(share > 0) if j else share
            ax.plot(share.index, drawn, transform=strip, **look)
            if j == 0:
                ax.fill_between(share.index, share, color=COLOURS[0], alpha=0.35, transform=strip)
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

    `dot` is the legend's name for a dot.
    """
    ax = _axes(ax, xlabel, "", rows=len(values.columns))
    rows = -np.arange(len(values.columns))
    # Translucent, so that dots on top of each other can be told apart; the outline is opaque.
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

    `label` is that of the colour bar. A missing value, that of a run that diverged, is a cross.
    """
    ax = _axes(ax, str(table.columns.name), str(table.index.name))
    if table.empty:
        return ax
    ax.grid(visible=False)
    look: dict[str, Any] = {"fmt": ".0f", "cmap": "cividis", "gid": label}
    if table.isna().all(axis=None):
        look |= {"vmin": 0, "vmax": 1}  # seaborn finds none
    sns.heatmap(table, ax=ax, annot=True, cbar_kws={"label": label}, **look)
    ax.invert_yaxis()
    ax.tick_params(axis="y", rotation=0)
    for row, column in zip(*np.isnan(table.to_numpy(dtype=float)).nonzero(), strict=True):
        ax.text(column + 0.5, row + 0.5, "×", color=INK, ha="center", va="center", size="large")
    _grey(ax.collections[0].colorbar)
    return ax


def kept_weights(
    shares: Mapping[str, Any], ax: Axes | None = None, *, label: str = "share of the kernel kept"
) -> Axes:
    """Layers side by side: name -> the share of each kernel that is kept, (outputs, inputs).

    `label` is that of the colour bar, from 0 to 1.
    """
    if not shares:
        return _axes(ax, "input maps", "output maps")
    sizes = np.array([np.shape(share) for share in shares.values()])
    gap = 0.2 * sizes[:, 1].max()
    # The panels have about 3.6 inches of the figure's width.
    height = min(4.0, 1 + 3.6 * sizes[:, 0].max() / (sizes[:, 1] + gap).sum())
    ax = _axes(ax, "input maps", "output maps", height=height)
    ax.grid(visible=False)
    left = 0.0
    for name, share in shares.items():
        rows, columns = np.shape(share)
        extent = (left, left + columns, rows, 0)
        look: dict[str, Any] = {"cmap": "cividis", "interpolation": "nearest", "gid": name}
        image = ax.imshow(share, extent=extent, vmin=0, vmax=1, **look)
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
    """Whether there are no rows, or only those of runs that diverged, which have no results."""
    return "top1" not in rows or bool(rows["top1"].isna().all())


def _cycle(values: Sequence[Any], i: int) -> Any:
    return values[i % len(values)]


def _look(i: int) -> dict[str, Any]:
    """Colour and line style of the i-th line."""
    return {"color": _cycle(COLOURS, i), "ls": _cycle(STYLES, i)}


def _axes(ax: Axes | None, xlabel: str, ylabel: str, rows: int = 0, height: float = 0) -> Axes:
    if ax is None:
        height = height or max(3.2, 1 + 0.35 * rows)
        ax = plt.subplots(figsize=(6.4, height), dpi=180, layout="constrained")[1]
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
