"""Interactive pieces: HTML that holds its numbers, its words and all that it needs."""

import base64
import csv
import html
import json
import re
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from swdlib.lab.interactive import accuracy_of_runs, live_model, weights_over_training
from swdlib.runs.config import Config
from swdlib.runs.records import HISTOGRAM_BINS, HISTOGRAM_RANGE, Record, address, tabulate

matplotlib.use("agg")

PROBLEM: dict[str, Any] = {
    "hessian": [[1.0, 0.8], [0.8, 1.2]],
    "trained": [1.0, 1.5],
    "start": [1.3, 0.3],
    "steps": 10,
    "weight_decay": 5e-4,
    "a_min": 0.1,
    "a_max": 1e5,
    "rate": 0.02,
}


def histogram(zeros: int = 0, **counts: int) -> dict[str, Any]:
    """Return a row's `weights` with a count in the bin above 10 to the power that a name gives."""
    low, high = HISTOGRAM_RANGE
    bins = [0] * HISTOGRAM_BINS
    for name, count in counts.items():
        exponent = -int(name.removeprefix("minus"))
        bins[round((exponent - low) / (high - low) * HISTOGRAM_BINS)] = count
    return {"zeros": zeros, "counts": bins}


def images(text: str) -> list[dict[str, str]]:
    """Return the attributes of the images in HTML."""
    tags = re.findall(r"<img ([^>]*)>", text)
    return [dict(re.findall(r'([\w-]+)="([^"]*)"', tag)) | {"tag": tag} for tag in tags]


def test_live_model_holds_its_numbers() -> None:
    text = live_model(**PROBLEM)._repr_html_()
    found = re.search(r'class="swd-model" data-problem="([^"]*)"', text)
    assert found is not None
    assert json.loads(html.unescape(found[1])) == {
        "hessian": [[1.0, 0.8], [0.8, 1.2]],
        "trained": [1.0, 1.5],
        "start": [1.3, 0.3],
        "steps": 10,
        "weightDecay": 5e-4,
        "aMin": 0.1,
        "aMax": 1e5,
        "rate": 0.02,
    }


def test_number_that_a_page_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        live_model(**PROBLEM | {"rate": float("nan")})


def test_slider_has_a_frame_a_histogram_and_shows_the_first() -> None:
    shown = {"epoch 1": histogram(minus1=10), "epoch 2": histogram(2, minus8=6, minus1=2)}
    text = weights_over_training(shown)._repr_html_()
    frames = re.findall(r'<div class="swd-frame swd-kept"( hidden)?><p>(.*?)</p><img', text)
    assert frames == [("", "epoch 1"), (" hidden", "epoch 2")]
    assert 'max="1"' in text and "<b>epoch 1</b>" in text
    for image, (_, label) in zip(images(text), frames, strict=True):
        picture = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in picture and label.encode() in picture
    assert not plt.get_fignums()


def test_slider_opens_on_the_wanted_histogram() -> None:
    shown = {"epoch 1": histogram(minus1=10), "epoch 2": histogram(2, minus8=6, minus1=2)}
    text = weights_over_training(shown, start=1, play=True).text
    assert re.findall(r'<div class="swd-frame swd-kept"( hidden)?>', text) == [" hidden", ""]
    assert 'value="1"' in text and "<b>epoch 2</b>" in text and " data-play>" in text
    with pytest.raises(ValueError, match="start must be in 0 to 1, the number of a histogram"):
        weights_over_training(shown, start=2)


def test_few_large_weights_are_seen_on_a_logarithmic_axis() -> None:
    shown = {"end": histogram(minus8=5000, minus1=5)}
    plain, log = (images(weights_over_training(shown, log=log).text)[0] for log in (False, True))
    assert plain["src"] != log["src"] and plain["alt"] == log["alt"]


def test_frame_says_how_many_weights_lie_where() -> None:
    shown = {"epoch 2": histogram(2, minus8=3, minus5=3, minus1=2)}
    [frame] = images(weights_over_training(shown).text)
    assert frame["alt"] == (
        "Histogram of the absolute weights, epoch 2: 50 % are below 1e-06, 80 % are below 0.001, "
        "80 % are below 0.1."
    )


def test_slider_brings_its_numbers_along() -> None:
    shown = {"epoch 1": histogram(minus1=10), "the end": histogram(2, minus8=6)}
    header, *lines = csv.reader((weights_over_training(shown)._repr_csv_() or "").splitlines())
    assert header == ["series", "from", "to", "number of weights"]
    assert len(lines) == 2 * (1 + HISTOGRAM_BINS)
    rows = [(label, float(low), float(high), int(count)) for label, low, high, count in lines]
    filled = [(label, low, count) for label, low, _, count in rows if count]
    assert filled == [
        ("epoch 1", pytest.approx(0.1), 10),
        ("the end", 0.0, 2),
        ("the end", pytest.approx(1e-8), 6),
    ]
    assert all(low < high or low == high == 0 for _, low, high, _ in rows)


def test_frames_share_their_axes() -> None:
    alone = images(weights_over_training({"b": histogram(minus1=5)}).text)[0]
    beside = images(
        weights_over_training({"a": histogram(minus8=50), "b": histogram(minus1=5)}).text
    )[1]
    assert alone["src"] != beside["src"]
    again = weights_over_training({"a": histogram(minus8=50), "b": histogram(minus1=5)}).text
    assert images(again)[1]["src"] == beside["src"]


def test_label_cannot_break_out_of_its_attribute() -> None:
    text = weights_over_training({'"><script>': histogram(minus1=1)}).text
    assert "<script>" not in text


def test_weights_that_are_all_zero_are_drawn() -> None:
    [frame] = images(weights_over_training({"cut": histogram(7)}).text)
    assert "100 % are below 1e-06" in frame["alt"]


def test_slider_without_a_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold at least one"):
        weights_over_training({})


def ended(top1: float, parameters: int, **settings: Any) -> Record:
    """Return the record of a run that got better to its end."""
    rows = [{"epoch": i, "top1": top1 - 2 + i, "parameters": parameters} for i in (1, 2)]
    return Record(Config(**settings).settings(), rows)


DENSE = ended(80, 70_000, recipe="dense", lr=0.4)
CUT = ended(60, 2_490, recipe="han2015", iterations=4, sparsity=0.98, lr=0.1, seed=2)
CUT_LESS = ended(75.125, 7_929, recipe="han2015", iterations=4, sparsity=0.9, lr=0.1)
SWD = ended(60, 2_490, recipe="swd", sparsity=0.98, lr=0.4)
DIVERGED = Record(Config(recipe="swd", sparsity=0.5).settings(), [], status="diverged")
RUNS = tabulate([DENSE, CUT_LESS, CUT, SWD, DIVERGED])
SWD_IN_WORDS = (
    "swd, sparsity 98 %, seed 0, highest learning rate 0.4: Top-1 60.00 %, 2,490 parameters kept, "
    f"record {address(SWD.config)[:8]}"
)


def tagged(rows: pd.DataFrame, name: str) -> list[ElementTree.Element]:
    """Return the elements of a name in the figure of runs, which must be well-formed."""
    figure = ElementTree.fromstring(accuracy_of_runs(rows).text)
    return [e for e in figure.iter() if e.tag.removeprefix("{http://www.w3.org/2000/svg}") == name]


def test_each_run_with_a_result_has_a_point_from_left_to_right_in_its_method() -> None:
    points = tagged(RUNS, "circle")
    words = [point.get("aria-label", "") for point in points]
    assert [re.split(" seed|, highest", label)[0] for label in words] == [
        "dense, sparsity 0 %,",
        *("han2015, 4 cuts, sparsity 98 %,", "han2015, 4 cuts, sparsity 90 %,"),
        "swd, sparsity 98 %,",
    ]
    assert "seed 2, highest learning rate 0.1: Top-1 60.00 %" in words[1]
    assert words[3] == SWD_IN_WORDS == points[3][0].text
    assert not plt.get_fignums()


def test_points_of_runs_lie_on_their_markers() -> None:
    drawn = {(float(u.get("x", 0)), float(u.get("y", 0))) for u in tagged(RUNS, "use")}
    for point in tagged(RUNS, "circle"):
        x, y = float(point.get("cx", 0)), float(point.get("cy", 0))
        assert any(abs(x - a) < 0.01 and abs(y - b) < 0.01 for a, b in drawn)


def test_line_below_the_runs_has_the_best_which_tab_reaches() -> None:
    reached = [point for point in tagged(RUNS, "circle") if point.get("tabindex") == "0"]
    [status] = tagged(RUNS, "p")
    assert [point.get("aria-label") for point in reached] == [status.text]
    assert (status.text or "").startswith("dense, ") and status.get("role") == "status"


def test_figure_of_runs_says_what_it_shows_and_brings_its_numbers_along() -> None:
    [svg] = tagged(RUNS, "svg")
    label = svg.get("aria-label", "")
    assert svg.get("role") == "group" and len(label.split()) > 8
    assert label.endswith("4 runs: dense; han2015, 4 cuts; swd")
    header, *lines = csv.reader((accuracy_of_runs(RUNS)._repr_csv_() or "").splitlines())
    assert header == ["method", "sparsity", "seed", "rate", "parameters kept", "top1", "record"]
    assert lines[1:3] == [
        ["han2015, 4 cuts", "0.98", "2", "0.1", "2490", "60.0", address(CUT.config)],
        ["han2015, 4 cuts", "0.9", "0", "0.1", "7929", "75.125", address(CUT_LESS.config)],
    ]
    assert len(lines) == 4


def test_figures_of_runs_share_no_name_and_no_rule_with_their_page() -> None:
    one, other = (accuracy_of_runs(rows).text for rows in (RUNS, RUNS[:2]))
    assert one.startswith('<div class="swd-runs"><svg ') and one == accuracy_of_runs(RUNS).text
    names, others = (re.findall(r'\bid="([^"]*)"', text) for text in (one, other))
    assert len(names) == len(set(names)) and not set(names) & set(others)
    assert set(re.findall(r'(?:href="|url\()#(\w+)', one)) == set(names)
    assert "<style" not in one


def test_name_of_a_method_cannot_break_out_of_a_point() -> None:
    name = '"><script>alert(1)</script>&'
    hostile = RUNS.assign(recipe=name, iterations=None)
    assert "<script" not in accuracy_of_runs(hostile).text
    assert (tagged(hostile, "circle")[0].get("aria-label") or "").startswith(name)
    assert (tagged(hostile, "p")[0].text or "").startswith(name)


@pytest.mark.parametrize("rows", [pd.DataFrame(), RUNS[:0], tabulate([DIVERGED])])
def test_figure_without_a_run_says_so(rows: pd.DataFrame) -> None:
    shown = accuracy_of_runs(rows)
    assert "There is no run with a result." in shown.text and "0 runs: none" in shown.text
    assert "<circle" not in shown.text
    assert (shown.numbers or "").count("\n") == 1
