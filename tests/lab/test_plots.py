"""Plots: what is drawn is what the table says; no torch; readable on light and dark pages."""

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb, to_rgba

from book.in_kernel import figure_csv
from swdlib import plots
from swdlib.runs.training import weight_histogram
from swdlib.schedules import Constant, Exponential

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    """Close what a test has drawn."""
    yield
    plt.close("all")


def row(run: str, recipe: str, epoch: int, top1: float, **more: Any) -> dict[str, Any]:
    """Return a row as `load_records` makes it."""
    named = {"run": run, "recipe": recipe, "target_sparsity": 0.98, "iterations": None}
    return {**named, "kind": "train", "epoch": epoch, "top1": top1, "parameters": 1000, **more}


ROWS = pd.DataFrame(
    [
        row("a", "dense", 1, 50.0, target_sparsity=0.0),
        row("a", "dense", 2, 80.0, target_sparsity=0.0),
        row("b", "han2015", 1, 60.0, iterations=4),
        row("b", "han2015", 1, 20.0, iterations=4, kind="prune", parameters=20),
        row("b", "han2015", 2, 40.0, iterations=4, parameters=20),
    ]
)


def legend(ax: Axes) -> list[str]:
    """Return the texts of the legend's entries."""
    found = ax.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def points(line: Any) -> list[tuple[float, float]]:
    """Return the points of a line."""
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_accuracy_has_a_line_a_run_and_a_cross_a_cut() -> None:
    ax = plots.accuracy_over_epochs(ROWS)
    drawn = [points(line) for line in ax.lines]
    assert drawn == [[(1, 50), (2, 80)], [], [(1, 60), (1, 20), (2, 40)], [(1, 20)]]
    assert legend(ax) == ["dense", "han2015, 4 cuts at 98 %"]
    assert "%" in ax.get_ylabel()


def test_accuracy_against_kept_shows_the_last_row_of_each_run() -> None:
    ax = plots.accuracy_against_kept(ROWS)
    runs = [points(line) for line in ax.lines if line.get_marker() != "None"]
    assert runs == [[(1000, 80)], [(20, 40)]]
    assert ax.get_xscale() == "log"
    assert ax.get_xlim() == (10, 10_000)
    assert legend(ax) == ["dense", "han2015, 4 cuts"]


@pytest.mark.parametrize("draw", [plots.accuracy_over_epochs, plots.accuracy_against_kept])
def test_no_rows_give_an_empty_figure(draw: Callable[[pd.DataFrame], Axes]) -> None:
    ax = draw(ROWS[ROWS["recipe"] == "swd"])
    assert not [point for line in ax.lines for point in points(line)]
    assert ax.get_xlabel() and ax.get_legend() is None


@pytest.mark.parametrize("draw", [plots.accuracy_over_epochs, plots.accuracy_against_kept])
@pytest.mark.parametrize("measured", [{}, {"epoch": np.nan, "top1": np.nan, "parameters": np.nan}])
def test_runs_that_all_diverged_give_an_empty_figure(
    draw: Callable[[pd.DataFrame], Axes], measured: dict[str, float]
) -> None:
    config = {"recipe": "swd", "target_sparsity": 0.9, "iterations": None}
    rows = pd.DataFrame([{"run": run, "status": "diverged", **config, **measured} for run in "ab"])
    ax = draw(rows)
    assert not ax.lines and ax.get_xlabel() and ax.get_legend() is None


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.weight_distribution({}),
        lambda: plots.kept_weights({}),
        lambda: plots.pictures({}),
        lambda: plots.heat_map(pd.DataFrame(), "accuracy (%)"),
        lambda: plots.sparsity_cliff(pd.DataFrame()),
        lambda: plots.timeline({}),
        lambda: plots.timeline({"a": pd.DataFrame()}),
    ],
)
def test_nothing_to_show_gives_an_empty_figure(draw: Callable[[], Axes]) -> None:
    ax = draw()
    ax.figure.canvas.draw()
    shown = [point for line in ax.lines if line.get_gid() for point in points(line)]
    assert not shown and not ax.patches and not ax.images and ax.figure.axes == [ax]


def test_a_map_of_runs_that_all_diverged_has_crosses_alone() -> None:
    ax = plots.heat_map(GRID * np.nan, "accuracy (%)")
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.texts] == ["×"] * 4


def test_strips_of_runs_of_unequal_length_share_an_axis_of_the_longest() -> None:
    short = pd.DataFrame({"zero": [0.0, 0.5]})
    assert plots.timeline({"a": SHARES, "b": short}).get_xlim()[1] == SHARES.index.max()


def test_a_line_goes_through_the_means_of_runs_with_one_target() -> None:
    rows = pd.DataFrame(
        [
            row(run, "swd", 1, top1, parameters=kept, target_sparsity=target)
            for run, top1, kept, target in [
                ("a", 70.0, 20, 0.98),
                ("b", 74.0, 20, 0.98),
                ("c", 80.0, 100, 0.9),
            ]
        ]
    )
    dots, line = plots.accuracy_against_kept(rows).lines
    assert points(dots) == [(20, 70), (20, 74), (100, 80)]
    assert points(line) == [(100, 80), (20, 72)]


@pytest.mark.parametrize("none", [None, float("nan")])
def test_recipe_without_iterations_has_a_plain_name(none: float | None) -> None:
    named = row("c", "swd", 1, 1.0, iterations=none)
    assert plots.name_of(pd.Series(named)) == "swd at 98 %"


def test_weights_are_counted_at_their_magnitude_and_zeros_in_the_label() -> None:
    import torch

    histogram = weight_histogram([torch.tensor([0.0, 0.0, 0.5, -0.5, 3e-5])])
    ax = plots.weight_distribution({"end": histogram})
    [stairs] = ax.patches
    values, edges, _ = stairs.get_data()  # type: ignore[attr-defined]
    for magnitude, count in ((0.5, 2), (3e-5, 1)):
        bin_ = int(np.searchsorted(edges, magnitude)) - 1
        assert values[bin_] == count
    assert values.sum() == 3
    assert legend(ax) == ["end (2 are zero)"]
    low, high = ax.get_xlim()
    assert 1e-5 < low < 3e-5 and 0.5 < high < 1


def test_weights_that_are_all_zero_are_drawn() -> None:
    ax = plots.weight_distribution({"cut": {"zeros": 7, "counts": [0, 0, 0]}})
    assert legend(ax) == ["cut (7 are zero)"]


def test_schedule_is_drawn_from_start_to_end() -> None:
    ax = plots.schedule({"a": Exponential(0.1, 1e5), "b": Constant(3.0)})
    rising, level = (points(line) for line in ax.lines)
    assert rising[0] == (0.0, 0.1) and rising[-1] == (1.0, 1e5)
    assert rising[100] == pytest.approx((0.5, 100.0))
    assert {y for _, y in level} == {3.0}


def test_cliff_has_a_line_for_each_allocation() -> None:
    frame = pd.DataFrame(
        {"allocation": ["global", "global", "per layer"], "sparsity": [0, 0.5, 0.5], "top1": 9.0}
    )
    ax = plots.sparsity_cliff(frame)
    assert [points(line) for line in ax.lines] == [[(0, 9), (50, 9)], [(50, 9)]]
    assert legend(ax) == ["global", "per layer"]


CURVES = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, np.nan]}, index=pd.Index([0, 1], name="epoch"))
GRID = pd.DataFrame(
    [[90.0, np.nan], [50.0, 70.0]],
    index=pd.Index(["0.1", "10"], name="a_min"),
    columns=pd.Index(["100", "1000"], name="a_max"),
)


def bowl(x: Any, y: Any) -> Any:
    """Return a loss of two weights."""
    return x**2 + 2 * y**2


def test_curves_have_a_line_a_column_over_the_index() -> None:
    ax = plots.curves(CURVES, "loss")
    assert [points(line)[0] for line in ax.lines] == [(0, 1), (0, 3)]
    assert legend(ax) == ["a", "b"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")


def test_paths_go_from_a_cross_to_a_dot_on_equal_axes() -> None:
    ax = plots.paths(bowl, {"cut": [(1, 1), (0, 1)], "path": [(1, 1), (0.5, 1.2), (0, 2)]})
    drawn = [points(line) for line in ax.lines if line.get_label() in ("cut", "path")]
    assert drawn == [[(1, 1), (0, 1)], [(1, 1), (0.5, 1.2), (0, 2)]]
    assert [points(line) for line in ax.lines if line.get_marker() == "x"] == [[(1, 1)], [(1, 1)]]
    assert ax.get_aspect() == 1
    low, high = ax.get_xlim()
    assert low < 0 and high > 2  # both axes, where weights are zero, are in sight
    assert ax.get_ylim() == (low, high)


def test_paths_of_weights_are_named_once_a_group_beside_the_threshold() -> None:
    sizes = {"stay": np.array([[1.0, 2.0], [3.0, 4.0]]), "go": np.array([[0.1], [0.01]])}
    ax = plots.weight_paths(sizes, [0.5, 0.6])
    drawn = [points(line) for line in ax.lines]
    assert drawn == [
        [(0, 1), (1, 3)],
        [(0, 2), (1, 4)],
        [(0, 0.1), (1, 0.01)],
        [(0, 0.5), (1, 0.6)],
    ]
    assert legend(ax) == ["stay", "go", "threshold"]
    assert ax.get_yscale() == "log"
    assert len({line.get_linestyle() for line in ax.lines[:3]}) == 2


SHARES = pd.DataFrame(
    {"zero": [0.0, 0.0, 0.9], "pressed": [0.9, 0.9, 0.0]}, index=pd.Index([0.0, 2.0, 2.0])
)


def test_timeline_has_a_strip_a_method_whose_numbers_stay_shares() -> None:
    ax = plots.timeline({"swd": SHARES, "other": SHARES * 0})
    strips = [line for line in ax.lines if len(points(line)) == 3]
    assert [points(line) for line in strips[:2]] == [
        [(0, 0), (2, 0), (2, 0.9)],
        [(0, 0.9), (2, 0.9), (2, pytest.approx(np.nan, nan_ok=True))],
    ]
    tops = [line.get_transform() - ax.transData for line in strips[::2]]
    assert [float(top.transform((0, 1))[1]) for top in tops] == [0.75, -0.25]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["swd", "other"]
    assert legend(ax) == ["zero", "pressed"]
    assert ax.get_xlim() == (0, 2)


def test_timeline_has_room_for_any_number_of_shares() -> None:
    ax = plots.timeline({"swd": pd.DataFrame({f"{i}": [0.1, 0.2] for i in range(11)})})
    assert len(legend(ax)) == 11


def test_spread_has_a_row_a_column_with_its_mean() -> None:
    ax = plots.spread(pd.DataFrame({"a": [1.0, 3.0], "b": [5.0, 5.0]}), "accuracy (%)")
    assert [points(line) for line in ax.lines] == [
        [(1, 0), (3, 0)],
        [(2, 0)],
        [(5, -1), (5, -1)],
        [(5, -1)],
    ]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b"]
    assert legend(ax) == ["a run", "mean"]
    assert legend(plots.spread(CURVES, "size", dot="a filter")) == ["a filter", "mean"]
    assert ax.get_xlabel() == "accuracy (%)"


def test_map_writes_each_value_and_a_cross_where_there_is_none() -> None:
    ax = plots.heat_map(GRID, "accuracy (%)")
    assert [text.get_text() for text in ax.texts] == ["90", "50", "70", "×"]
    assert ax.texts[-1].get_position() == (1.5, 0.5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a_max", "a_min")
    bottom, top = ax.get_ylim()
    assert bottom < top  # the first row is the lowest


def test_kept_weights_are_drawn_side_by_side_under_their_labels() -> None:
    ax = plots.kept_weights({"a": np.eye(4), "b": np.zeros((4, 2))}, label="kept")
    assert ax.figure.axes[1].get_ylabel() == "kept"
    first, second = ax.images
    assert first.get_extent() == [0, 4, 4, 0]
    assert second.get_extent()[0] > 4 and np.ptp(second.get_extent()[:2]) == pytest.approx(2)
    np.testing.assert_array_equal(first.get_array(), np.eye(4))
    assert first.get_clim() == second.get_clim() == (0, 1)
    assert [text.get_text() for text in ax.texts] == ["a", "b"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("input maps", "output maps")
    for text in [*ax.texts, *ax.get_yticklabels(), *ax.figure.axes[1].get_yticklabels()]:
        assert to_hex(text.get_color()) == plots.INK


def test_pictures_lie_in_rows_under_their_names_and_keep_their_shape() -> None:
    image = np.zeros((10, 20, 3), np.uint8)
    ax = plots.pictures({"a": image, "b": image, "c": image}, columns=2)
    assert [text.get_text() for text in ax.texts] == ["a", "b", "c"]
    found = [picture.get_extent() for picture in ax.images]
    np.testing.assert_allclose(found, [(0, 1, 0.5, 0), (1.1, 2.1, 0.5, 0), (0, 1, 1.75, 1.25)])
    assert ax.get_xlim() == pytest.approx((0, 2.1))
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # as in images, from the top down


def test_map_can_be_read_on_a_light_and_on_a_dark_page() -> None:
    ax = plots.heat_map(GRID, "accuracy (%)")
    ax.figure.canvas.draw()
    bar = ax.collections[0].colorbar
    assert bar is not None
    texts = [ax.xaxis.label, *ax.get_xticklabels(), bar.ax.yaxis.label, *bar.ax.get_yticklabels()]
    for text in [*texts, ax.texts[-1]]:
        assert to_hex(text.get_color()) == plots.INK


TWICE = pd.concat([ROWS, ROWS.assign(run=ROWS["run"] + "2")])


@pytest.mark.parametrize(
    ("ax", "names"),
    [
        (
            lambda: plots.accuracy_over_epochs(TWICE),
            ["dense", "han2015, 4 cuts at 98 %", "han2015, 4 cuts at 98 %, cut"],
        ),
        (
            lambda: plots.accuracy_against_kept(ROWS),
            ["dense", "dense, mean", "han2015, 4 cuts", "han2015, 4 cuts, mean"],
        ),
        (lambda: plots.paths(bowl, {"a": [(1, 1), (0, 1)]}), ["a", "a, start"]),
        (lambda: plots.weight_paths({"stay": np.ones((2, 3))}, [1, 1]), ["stay", "threshold"]),
        (
            lambda: plots.timeline({"swd": SHARES, "b": SHARES}),
            ["swd, zero", "swd, pressed", "b, zero", "b, pressed"],
        ),
        (lambda: plots.spread(CURVES, "size"), ["a", "a, mean", "b", "b, mean"]),
        (lambda: plots.heat_map(GRID, "accuracy (%)"), ["accuracy (%)"]),
        (lambda: plots.kept_weights({"a": np.eye(4), "b": np.eye(2)}), ["a", "b"]),
    ],
)
def test_all_that_is_drawn_has_its_name_beside_its_numbers(
    ax: Callable[[], Axes], names: list[str]
) -> None:
    lines = csv.reader(figure_csv(ax().figure).splitlines())
    assert list(dict.fromkeys(name for name, *_ in lines if name != "series")) == names


def test_numbers_of_a_map_have_its_rows_and_columns_by_name() -> None:
    grid = GRID.rename_axis(index=r"$a_{\min}$").rename(columns={"1000": "1,000,000"})
    numbers = figure_csv(plots.heat_map(grid.rename({"10": "a, 10"}), "kept").figure)
    assert numbers == (
        "series,a_min,a_max,value\n"
        "kept,0.1,100,90.0\nkept,0.1,1000000,nan\n"
        'kept,"a, 10",100,50.0\nkept,"a, 10",1000000,70.0\n'
    )


def test_numbers_of_rows_and_strips_say_what_they_are() -> None:
    assert figure_csv(plots.spread(CURVES, "size").figure) == (
        'series,size,row\na,1.0,a\na,2.0,a\n"a, mean",1.5,a\nb,3.0,b\nb,nan,b\n"b, mean",3.0,b\n'
    )
    assert figure_csv(plots.timeline({"swd": SHARES}).figure).startswith("series,epoch,share\n")


DRAWN = [
    lambda ax: plots.accuracy_over_epochs(ROWS, ax),
    lambda ax: plots.accuracy_against_kept(ROWS, ax),
    lambda ax: plots.weight_distribution({"a": {"zeros": 0, "counts": [1, 2]}}, ax),
    lambda ax: plots.schedule({"a": Constant(1.0)}, ax),
    lambda ax: plots.sparsity_cliff(
        pd.DataFrame({"allocation": ["global"], "sparsity": [0.5], "top1": [9.0]}), ax
    ),
    lambda ax: plots.curves(CURVES, "loss", ax),
    lambda ax: plots.paths(bowl, {"cut": [(1, 1), (0, 1)]}, ax),
    lambda ax: plots.weight_paths({"stay": np.ones((2, 3))}, [0.5, 0.5], ax),
    lambda ax: plots.timeline({"swd": SHARES}, ax).set(ylabel="method") and ax,
    lambda ax: plots.spread(CURVES, "accuracy (%)", ax).set(ylabel="method") and ax,
]


def contrast(colour: Any, page: float) -> float:
    """Return WCAG's contrast between a colour and a page of relative luminance `page`."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    levels = sorted((float(np.dot(linear, (0.2126, 0.7152, 0.0722))), page))
    return (levels[1] + 0.05) / (levels[0] + 0.05)


DARK = 1.05 / contrast("#14181e", 1.0) - 0.05  # the luminance of pages and slides


def test_each_colour_can_be_seen_on_white_and_on_the_dark_ground_of_pages() -> None:
    for colour in plots.COLOURS:
        assert contrast(colour, 1.0) >= 3 and contrast(colour, DARK) >= 3, colour


def test_text_can_be_read_on_white_and_is_paler_on_a_dark_page() -> None:
    assert contrast(plots.INK, 1.0) >= 4.5 and contrast(plots.PALE_INK, DARK) >= 4.5
    assert contrast(plots.INK, DARK) >= 3.5  # where figures are no SVG, as in Jupyter


def test_dots_on_one_another_can_be_seen_and_have_an_opaque_outline() -> None:
    dots = plots.spread(CURVES, "size").lines[0]
    assert dots.get_markeredgecolor() == plots.COLOURS[0]
    assert to_rgba(dots.get_markerfacecolor())[3] < 1 and dots.get_alpha() is None


@pytest.mark.parametrize("draw", DRAWN)
def test_figure_can_be_read_on_a_light_and_on_a_dark_page(draw: Any) -> None:
    mine = plt.subplots()[1]
    ax = draw(mine)
    assert ax is mine
    mine.figure.canvas.draw()
    assert ax.patch.get_alpha() == ax.figure.patch.get_alpha() == 0
    texts = [ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()]
    found = ax.get_legend()
    assert found is not None
    for text in [*texts, *found.get_texts()]:
        assert to_hex(text.get_color()) == plots.INK
    assert ax.get_xlabel() and ax.get_ylabel()


def test_each_line_differs_from_its_neighbours_in_more_than_colour() -> None:
    runs = pd.concat([ROWS[:2].assign(run=name, recipe=name) for name in "xyz"])
    ax = plots.accuracy_over_epochs(runs)
    assert len({line.get_linestyle() for line in ax.lines[::2]}) == 3


def test_plotting_does_not_import_torch() -> None:
    code = "import sys, swdlib.lab.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_seeds_of_a_method_look_alike_and_are_named_once() -> None:
    runs = pd.concat([ROWS[:2].assign(run=f"{seed}", seed=seed) for seed in range(3)])
    ax = plots.accuracy_over_epochs(runs)
    lines = [line for line in ax.lines if line.get_marker() == "None"]
    assert len(lines) == 3
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 1
    assert len(ax.get_legend_handles_labels()[1]) == 1
