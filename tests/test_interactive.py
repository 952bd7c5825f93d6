"""Interactive pieces: HTML that holds its numbers, its words and all that it needs."""

import base64
import csv
import html
import json
import re
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

from swdlib.interactive import live_model, weights_over_training
from swdlib.records import HISTOGRAM_BINS, HISTOGRAM_RANGE

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
    first, second = images(text)
    assert (first["data-label"], second["data-label"]) == ("epoch 1", "epoch 2")
    assert not first["tag"].endswith(" hidden") and second["tag"].endswith(" hidden")
    assert 'max="1"' in text and "<b>epoch 1</b>" in text
    for image in (first, second):
        picture = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in picture and image["data-label"].encode() in picture
    assert not plt.get_fignums()


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
