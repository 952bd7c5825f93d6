"""What pages end with over seeds: what is asked of them, the runs on file, and the table."""

import ast
import builtins
import json
import symtable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from book import build, expected, reruns
from swdlib import load_data
from swdlib.runs.run import provenance
from tests.book.test_book import NOTEBOOKS, code, stored

STORED = json.loads(expected.STORED.read_text("utf-8"))


def bound(name: str) -> set[str]:
    """Return the names that the cells of a page define, those inside of functions left out."""
    cells = nbformat.read(build.BOOK / f"{name}.ipynb", as_version=4).cells
    own = [cell for cell in cells if build.INSTALLS not in cell.metadata.get("tags", [])]
    text = "\n".join(cell.source for cell in own if cell.cell_type == "code")
    symbols = symtable.symtable(text, name, "exec").get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}


@pytest.mark.parametrize("name", expected.PAGES)
def test_what_is_asked_of_a_page_is_in_its_names(name: str) -> None:
    assert name in NOTEBOOKS
    for asks in expected.PAGES[name].values():
        nodes = ast.walk(ast.parse(asks, mode="eval"))
        used = {node.id for node in nodes if isinstance(node, ast.Name)} - set(dir(builtins))
        assert used and used <= bound(name), asks


def test_pages_of_the_plans_are_asked() -> None:
    plans, _ = (build.BOOK / "for-teachers.md").read_text("utf-8").split("## Expected results")
    assert all(f"({name}.ipynb" in plans for name in expected.PAGES)


def test_every_page_is_on_file_with_every_seed_and_all_that_is_asked() -> None:
    assert list(STORED) == list(expected.PAGES)
    for name, section in STORED.items():
        assert sorted(section["runs"]) == [str(seed) for seed in expected.SEEDS], name
        for found in section["runs"].values():
            assert list(found) == list(expected.PAGES[name]), name
            assert all(0 <= value <= 100 for value in found.values()), name


@pytest.mark.parametrize("name", STORED)
def test_runs_on_file_have_the_parameters_of_the_page(name: str) -> None:
    found = expected.parameters(build.BOOK / f"{name}.ipynb")
    assert STORED[name]["parameters"] == found, "run book/expected.py"


def test_lines_of_the_table_come_from_the_file(tmp_path: Path) -> None:
    runs = {str(seed): {"before": 90.0 + seed, "after": 50.0} for seed in range(3)}
    path = tmp_path / "expected.json"
    path.write_text(json.dumps({"a": {"runs": runs}, "b": {"runs": {"0": {"end": 1.25}}}}))
    titles = [reruns.Run("a", "A page", "", {}, {})]
    first, of_first, second, of_second = reruns.live(path, titles).split("\n\n")[:4]
    assert first == "[A page](a.ipynb), 3 seeds:"
    assert of_first.splitlines()[2:] == [
        "| before | 90.0 | 91.0 | 92.0 |",
        "| after | 50.0 | 50.0 | 50.0 |",
    ]
    assert second == "[b](b.ipynb), 1 seeds:"
    assert of_second.splitlines()[2:] == ["| end | 1.2 | 1.2 | 1.2 |"]


def test_table_is_put_on_the_page_for_teachers(tmp_path: Path) -> None:
    for place in ("for-teachers.md", "measurements/expected.json"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes((build.BOOK / place).read_bytes())
    (tmp_path / "records").mkdir()
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: for-teachers\n")
    build.fill(tmp_path, [])
    text = (tmp_path / "for-teachers.md").read_text("utf-8")
    assert reruns.live(expected.STORED, []) in text


ASKED = {"twice": "value", "more": "value + 1"}


def toy(folder: Path, more: str = "") -> Path:
    """Write a page whose end depends on its seed."""
    return stored(
        folder, code("seed: int = 0\nby: int = 2", "parameters"), code(f"value = by * seed{more}")
    )


@pytest.mark.slow
def test_page_is_asked_what_it_ended_with(tmp_path: Path) -> None:
    page = toy(tmp_path)
    before = page.read_bytes()
    assert expected.answers(page, ASKED, seed=3) == {"twice": 6.0, "more": 7.0}
    assert page.read_bytes() == before and list(tmp_path.iterdir()) == [page]


def measured(monkeypatch: pytest.MonkeyPatch, page: Path, seeds: Any, **changed: Any) -> list[int]:
    """Measure a page with seeds, and return those with which it was run."""
    done: list[int] = []

    def run(source: Path, asked: dict[str, str], seed: int) -> dict[str, float]:
        done.append(seed)
        return {words: float(seed) for words in asked}

    monkeypatch.setattr(expected, "answers", run)
    for seed in seeds:
        expected.measure(page, changed.get("asked", ASKED), seed, page.with_name("found.json"))
    return done


def test_runs_on_file_are_kept_until_the_page_or_what_is_asked_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = toy(tmp_path)
    assert measured(monkeypatch, page, [0, 1]) == [0, 1]
    assert measured(monkeypatch, page, [0, 1, 2]) == [2]
    section = json.loads((tmp_path / "found.json").read_text("utf-8"))["small"]
    assert section["runs"] == {str(s): {"twice": s, "more": s} for s in range(3)}
    assert section["parameters"] == {"by": "2"}
    assert {"date", "versions", "code", "machine", "page"} == set(section["provenance"])
    assert measured(monkeypatch, toy(tmp_path, " + 1"), [2]) == [2]
    assert measured(monkeypatch, page, [2], asked={"twice": "value"}) == [2]
    section = json.loads((tmp_path / "found.json").read_text("utf-8"))["small"]
    assert section["runs"] == {"2": {"twice": 2.0}}


@pytest.mark.parametrize(
    ("code", "done"),
    [
        ({"commit": "0123456789ab", "clean": False}, []),
        ({"version": "99.0", "commit": "0123456789ab", "clean": True}, [0]),
    ],
)
def test_runs_on_file_are_kept_for_a_version_of_the_library(
    code: dict[str, Any], done: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = toy(tmp_path)
    assert measured(monkeypatch, page, [0]) == [0]
    facts = provenance(load_data("digits"))
    later = {**facts, "date": "tomorrow", "code": {**facts["code"], **code}}
    monkeypatch.setattr(expected, "provenance", lambda data: dict(later))
    assert measured(monkeypatch, page, [0]) == done


def test_page_of_which_nothing_is_asked_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        expected.main(["glossary"])
    assert "nothing is asked of glossary" in capsys.readouterr().err
