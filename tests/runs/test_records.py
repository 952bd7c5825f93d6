"""Records: addresses, files that are whole, and the tidy table."""

import dataclasses
import json
import random
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from swdlib.lab.evidence import finals, lead
from swdlib.lab.plots import interval
from swdlib.runs import records
from swdlib.runs.records import Record, load_records


def config(**changes: Any) -> dict[str, Any]:
    settings = {
        "profile": "laptop",
        "dataset": "digits",
        "data_root": None,
        "device": "cpu",
        "model": "cnn",
        "recipe": "swd",
        "sparsity": 0.9,
        "lr": 0.1,
        "seed": 0,
    }
    return {**settings, **changes}


def record(**changes: Any) -> Record:
    rows = [
        {"kind": "train", "epoch": 1, "top1": 50.0, "loss": 1.0, "sparsity": 0.0, "lr": 0.05},
        {"kind": "prune", "epoch": 1, "top1": 40.0, "loss": 2.0, "sparsity": 0.9, "parameters": 7},
    ]
    return Record(config(**changes), rows, {"dataset": {"source": "scikit-learn"}})


def test_the_address_depends_on_what_is_run_and_not_on_where() -> None:
    first = records.address(config())
    assert first == records.address(dict(reversed(config().items())))
    assert first == records.address(config(data_root="/elsewhere", device="cuda", tracker="wandb"))
    # A setting that is not used may as well not be there.
    assert first == records.address(config(ramp_begin=None))
    others = [config(seed=1), config(sparsity=0.95), config(lr=0.2), config(recipe="dense")]
    assert len({first, *(records.address(other) for other in others)}) == 5


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = records.save(record(), tmp_path)
    assert records.load(path) == record()
    assert path.parent == tmp_path / "laptop"
    assert path.name == f"digits-cnn-swd-0.9-{records.address(config())}.json"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_record_without_rows_is_readable_json(tmp_path: Path) -> None:
    diverged = dataclasses.replace(record(), rows=[], status="diverged")
    assert records.load(records.save(diverged, tmp_path)) == diverged


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"config": {}, "rows": [], "x": 1}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    path = records.save(record(), tmp_path)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=path.name):
        records.load(path)


def test_a_record_whose_configuration_was_edited_is_refused(tmp_path: Path) -> None:
    path = records.save(record(), tmp_path)
    content = json.loads(path.read_text("utf-8"))
    content["config"]["seed"] = 7
    content["checksum"] = records.checksum(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"address {records.address(config(seed=7))}"):
        records.load(path)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path, generator = records.save(record(), tmp_path), random.Random(0)
    whole = path.read_bytes()
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            found = records.load(path)
        except ValueError as error:
            assert path.name in str(error)
        else:
            assert found == record()


@pytest.mark.parametrize(
    "values",
    [
        {"rows": []},
        {"rows": [{}]},
        {"rows": 5},
        {"rows": None},
        {"config": 3},
        {"provenance": None},
    ],
)
def test_a_record_of_another_shape_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    path = records.save(record(), tmp_path)
    content = {**json.loads(path.read_text("utf-8")), **values}
    content["checksum"] = records.checksum(content)
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match="is no readable record"):
        records.load(path)


def test_numbers_that_json_lacks_have_no_address() -> None:
    with pytest.raises(ValueError, match="JSON"):
        records.address(config(lr=float("nan")))


def test_the_table_has_a_row_for_each_row(tmp_path: Path) -> None:
    records.save(record(), tmp_path)
    records.save(record(recipe="dense", sparsity=0.0), tmp_path)
    records.save(dataclasses.replace(record(seed=3), rows=[], status="diverged"), tmp_path)
    table = load_records(tmp_path)
    assert len(table) == 2 + 2 + 1
    assert table["run"].nunique() == 3
    swd = table[(table["recipe"] == "swd") & (table["seed"] == 0)]
    assert swd["target_sparsity"].tolist() == [0.9, 0.9]
    assert swd["sparsity"].tolist() == [0.0, 0.9]
    assert swd["peak_lr"].tolist() == [0.1, 0.1]
    assert swd["data_source"].tolist() == ["scikit-learn"] * 2
    assert table[table["status"] == "diverged"]["top1"].isna().all()


def test_the_default_folder_is_that_of_the_book_in_a_checkout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = Path(__file__).resolve().parents[2]
    assert records.checkout() == root
    assert records.default_folder() == root / "book" / "records"
    monkeypatch.setattr(records, "__file__", "/lib/site-packages/swdlib/runs/records.py")
    assert records.checkout() is None
    assert records.default_folder() == Path("records")


def test_an_empty_folder_is_an_empty_table(tmp_path: Path) -> None:
    assert load_records(tmp_path).empty


def test_the_summary_says_how_the_run_ended() -> None:
    line = "Top-1 40.00 %, loss 2.0000, 7 parameters kept, 90.00 % of the prunable weights removed"
    assert record().summary() == line
    lost = Record(config(), [], {"error": "fc.weight holds NaN"}, "diverged")
    assert lost.summary() == "diverged: fc.weight holds NaN"


def test_the_committed_records_are_sound() -> None:
    """Every record of the book can be read and lies at its address."""
    folder = Path(__file__).resolve().parents[2] / "book" / "records"
    paths = [path for path in folder.rglob("*.json") if path.parent != folder / "smoke"]
    assert paths
    for path in paths:
        found = records.load(path)
        assert path == records.path_of(found.config, path.parent.parent)
        assert (
            found.config["data_root"] is None or not Path(found.config["data_root"]).is_absolute()
        )
        assert found.provenance["dataset"]["fingerprint"]
        assert list(found.provenance["code"]) == ["version", "commit", "clean"]
        assert found.status in ("finished", "diverged")


ROOT = Path(__file__).resolve().parents[2]
Ends = dict[tuple[str, str, int, str, str], list[float]]


@pytest.fixture(scope="module")
def ends() -> Ends:
    """Return the accuracies of the laptop runs, a seed each, that the tables are about."""
    found: Ends = defaultdict(list)
    for path in (ROOT / "book" / "records" / "laptop").glob("*.json"):
        if (record := records.load(path)).status != "finished":
            continue
        config, final = record.config, record.final
        structure = "filters" if config["structure"] == "filters" else "weights"
        usual = config["precision"] == "bf16" and not config["holdout"]
        if structure == "weights":
            usual &= config["lr"] == 0.4 and config["a_min"] in (None, 0.1, 1.0)
        if usual:
            for name in {"top1", "renewed_top1"} & final.keys():
                level = f"{100 * config['sparsity']:g} %"
                cuts = config["iterations"] or 1
                found[structure, config["recipe"], cuts, level, name].append(final[name])
    return found


def tables(page: str) -> list[list[list[str]]]:
    """Return the tables of a page whose first column has weights or filters, or methods."""
    lines = (ROOT / page).read_text("utf-8").splitlines()
    rows = [line.split("|")[1:-1] for line in lines if re.match(r"\| (`|weights|filters)", line)]
    found: list[list[list[str]]] = []
    for cells in ([cell.strip() for cell in row] for row in rows):
        if "`" in cells[0]:
            found[-1].append(cells)
        else:
            found.append([cells])
    return found


def test_the_figures_of_the_results_are_on_record(ends: Ends) -> None:
    """Each number of the tables is a mean over the seeds, trained or recalibrated."""
    found = tables("book/results.md")
    assert [(table[0][0], len(table) > 3) for table in found] == [
        ("weights", True),
        ("filters", True),
    ]
    for (structure, *levels), *methods in found:
        for label, *numbers in methods:
            name = "renewed_top1" if "recalibrated" in label else "top1"
            recipe, cuts = label.split("`")[1], 4 if "4 cuts" in label else 1
            expected = [ends[structure, recipe, cuts, level, name] for level in levels]
            assert numbers == [f"{fmean(runs):.2f}" if runs else "" for runs in expected], label


def test_the_figures_of_the_readme_are_means_of_three_seeds_with_their_intervals(
    ends: Ends,
) -> None:
    [[(_, *columns), *methods]] = tables("README.md")
    assert len(methods) == 3
    for label, *numbers in methods:
        recipe = label.split("`")[1]
        for column, number in zip(columns, numbers, strict=True):
            level, _, recalibrated = column.partition(", ")
            name = "renewed_top1" if recalibrated else "top1"
            runs = ends["weights", recipe, 1, level, name]
            mean, half = interval(runs) if len(runs) > 1 else (0.0, 0.0)
            assert number == (f"{mean:.2f} ± {half:.2f}" if len(runs) == 3 else ""), label
    [dense] = ends["weights", "dense", 1, "0 %", "top1"]
    assert f"Without pruning it reaches {dense:.2f} (one seed)" in (ROOT / "README.md").read_text()


def test_what_the_readme_says_of_leads_follows_from_the_records() -> None:
    rows = load_records(ROOT / "book" / "records" / "laptop").query(
        "dataset == 'cifar10' and structure == 'weights' and holdout == 0 and peak_lr == 0.4"
    )
    recalibrated = finals(rows[rows["recipe"].isin(["swd", "swd_rising", "zhu2017"])])
    trained = recalibrated.assign(accuracy=recalibrated["top1"])

    def said(ends: Any, ours: str, theirs: str, level: float) -> Any:
        return lead(ends, ours, theirs).loc[level]

    for ends in (trained, recalibrated):
        assert said(ends, "swd_rising", "zhu2017", 0.98)["verdict"] == "level"
        assert said(ends, "swd_rising", "swd", 0.98)["verdict"] == "ahead"
        assert said(ends, "zhu2017", "swd", 0.98)["verdict"] == "ahead"
    assert said(trained, "swd_rising", "zhu2017", 0.99)["verdict"] == "ahead"
    found = said(recalibrated, "swd_rising", "zhu2017", 0.99)
    assert found["verdict"] == "level" and found["seeds"] == 3
    mean, half = found["lead"], found["half of interval"]
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert "At 98 % gradual pruning and the variant are level and ahead of `swd`." in text
    words = f"the 95 % interval of the paired difference, {mean - half:.1f} to {mean + half:.1f},"
    assert f"At 99 % the variant is ahead as trained; recalibrated, {words} includes zero" in text


def test_the_interval_is_that_of_students_t() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5, abs=1e-3)  # 0.975, 2 degrees
