"""Notebooks anywhere: parameters that papermill is given, scripts, files of the book."""

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import nbformat
import pytest

from swdlib.lab.notebooks import check_parameters, from_book
from swdlib.runs import records

BOOK = Path(__file__).resolve().parents[2] / "book"

OWN = "# None: as before.\nsparsity: float = 0.9  # removed\nepochs: int = None\n"


@pytest.mark.parametrize(
    "history",
    [
        ["", OWN, "from swdlib.lab.notebooks import check_parameters"],
        ["", OWN, "# Parameters\nsparsity = 0.5\nepochs = 3\n"],
        ["", OWN, "# Parameters\nepochs = 3\n", "seed = 1"],
        ["", "# Parameters\nseed = 1"],
    ],
)
def test_known_parameters_pass(history: list[str]) -> None:
    check_parameters({"In": history, "seed": 1, "sparsity": 0.5, "epochs": 3})


def test_unknown_parameter_is_named_with_those_there_are() -> None:
    given = "# Parameters\nsparsty = 0.5\nepochs = 3\n"
    message = "no parameter sparsty; its parameters are epochs, sparsity"
    with pytest.raises(ValueError, match=message):
        check_parameters({"In": ["", OWN, given, "anything"]})


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        ("points: float = 1.0", "'one'", "points must be of type float, not 'one'"),
        ("epochs: int = 3", "2.5", "epochs must be of type int, not 2.5"),
        ("epochs: int = 3", "True", "epochs must be of type int, not True"),
        ("fast: bool = True", "1", "fast must be of type bool, not 1"),
        ("levels: list = [0.8]", "0.9", "levels must be a list of numbers, not 0.9"),
        ("levels: list = [0.8]", "['0.9']", r"levels must be a list of numbers, not \['0.9'\]"),
        ("points: float = 1.0", "2", ""),
        ("epochs: int = None", "'many'", ""),  # what None stands for knows its type
    ],
)
def test_parameter_of_another_type_is_refused(own: str, given: str, message: str) -> None:
    name = own.partition(":")[0]
    namespace = {"In": ["", own, f"# Parameters\n{name} = {given}\n"], name: eval(given)}
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_parameters(namespace)


def test_nothing_is_checked_in_a_script() -> None:
    check_parameters({"seed": 1})


def test_files_of_the_book_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert from_book("records/laptop") == BOOK / "records" / "laptop"
    monkeypatch.setattr(records, "checkout", lambda: None)  # an installed package
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"records/laptop is missing.* in a checkout of"):
        from_book("records/laptop")
    (tmp_path / "records" / "laptop").mkdir(parents=True)
    assert from_book("records/laptop") == Path("records/laptop")


def test_every_file_that_a_page_shows_is_there() -> None:
    text = "".join(path.read_text("utf-8") for path in BOOK.glob("*.ipynb"))
    places = re.findall(r'from_book\(\\"(.*?)\\"\)', text)
    assert len(places) == 9
    assert all(from_book(place).exists() for place in places)
    assert "default_folder()." not in text and "default_folder() /" not in text


def script_of(name: str) -> str:
    """Return a notebook as `jupyter nbconvert --to script` writes it: its code, cell after cell."""
    cells = nbformat.read(BOOK / f"{name}.ipynb", as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["what-is-pruning", "swd-from-scratch"])
def test_a_chapter_runs_as_a_script_anywhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(script_of(name), "utf-8")
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
