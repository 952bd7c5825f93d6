"""What pages say: the API reference, how to rerun them, quizzes, slides, words."""

import doctest
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from zipfile import ZipFile

import nbformat
import pytest
import yaml
from docutils import nodes
from docutils.utils import new_document
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image
from torch import Tensor

import swdlib
from book import api, build, probes, reruns, slides
from book._ext import share
from book.prose import MARKDOWN, blocks, inline
from swdlib import plots
from swdlib.cli import parser
from swdlib.runs.config import Config
from swdlib.runs.records import Record, address, load, path_of, save
from tests.book.test_book import NOTEBOOKS, SHOWN, code, stored

ROOT = build.ROOT
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "swdlib").with_suffix("").parts)
    for path in (ROOT / "swdlib").rglob("*.py")
    if path.stem != "__init__"
)
RECORDS = reruns.committed(build.BOOK / "records")

sys.path.append(str(build.BOOK / "_ext"))  # as Sphinx does with local extensions
quiz: Any = importlib.import_module("quiz")
repository: Any = importlib.import_module("repository")
spaces: Any = importlib.import_module("spaces")


# The API reference


@dataclass
class Sample:
    """A class for the tests.

    Args:
        size: how large
            it is.

    >>> Sample(2).size
    2
    """

    size: int = 1

    def twice(self, by: Tensor | None = None, *, loud: bool = False) -> int:
        """Return w* * 2 of `a_b`."""
        return 2 * self.size

    @property
    def half(self) -> float:
        """Half of it."""
        return self.size / 2

    def undocumented(self) -> None: ...


def test_entry_has_signature_arguments_examples_and_methods() -> None:
    text = "\n\n".join(api._entry(Sample, "Sample", "###"))
    assert text.startswith("### `Sample`\n\n```python\nSample(size: int = 1)\n```\n\nA class")
    assert "- `size`: how large it is." in text
    assert "```python\n>>> Sample(2).size\n2\n```" in text
    assert "`Sample.twice(by: Tensor | None = None, *, loud: bool = False) -> int`" in text
    assert "Return w\\* \\* 2 of `a_b`." in text
    assert "`Sample.half`\n: Half of it." in text
    assert "undocumented" not in text


def test_long_signature_has_a_line_for_each_parameter() -> None:
    text = api.signature(swdlib.SelectiveWeightDecay, "SelectiveWeightDecay")
    lines = text.splitlines()
    assert lines[:3] == ["SelectiveWeightDecay(", "    model: Module,", "    *,"]
    assert "    structure: Structure = weights," in lines
    assert '    update: Literal["gradient", "proximal"] = "gradient",' in lines


def referenced() -> list[str]:
    """Return the modules on the page, in its order."""
    page = (build.BOOK / "api.md").read_text("utf-8")
    return re.findall(r"^## ([\w.]+)\n\n% generated: api \1$", page, re.MULTILINE)


def test_reference_holds_every_public_name() -> None:
    text = {name: api.reference(name) for name in referenced()}
    for name in swdlib.__all__:
        modules = {module.split(".")[-1] for module in text}
        assert name in modules or any(f"### `{name}`" in page for page in text.values()), name
    assert not any(" at 0x" in page for page in text.values())


def test_reference_has_the_method_first_and_then_its_folders() -> None:
    order = referenced()
    method = ["swd", "schedules", "criteria", "structures", "masks", "hooks", "recipes", "fast"]
    assert [name for name in order if name in method] == method
    folders = [name.split(".")[0] for name in order if name not in MODULES or "." in name]
    assert list(dict.fromkeys(folders)) == ["runs", "data", "deploy", "lab"]
    assert order[-len(folders) :] == [name for name in order if name.split(".")[0] in folders]


def examples(text: str) -> doctest.DocTest:
    """Return the examples of a text; a fence of Markdown ends one."""
    plain = text.replace("```", "")
    return doctest.DocTestParser().get_doctest(plain, {}, "examples", None, 0)


def run_examples(test: doctest.DocTest) -> None:
    """Run examples and fail with what differs."""
    said = io.StringIO()
    doctest.DocTestRunner(verbose=False).run(test, out=said.write)
    assert not said.getvalue(), said.getvalue()


def test_examples_of_the_reference_run() -> None:
    test = examples((build.BOOK / "api.md").read_text("utf-8"))
    assert len(test.examples) > 30
    run_examples(test)


# What needs files that no package has, or a page to be seen on.
WITHOUT_EXAMPLE = {"lab.interactive", "lab.pretrained"}


def test_every_module_of_the_reference_is_shown_at_work() -> None:
    page = (build.BOOK / "api.md").read_text("utf-8")
    sections = dict(re.findall(r"^## ([\w.]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    shown = {name for name, text in sections.items() if ">>>" in text + api.reference(name)}
    assert set(sections) - shown == WITHOUT_EXAMPLE
    assert {"runs.run", "runs.workers", "runs.check", "runs.dryrun", "hooks", "fast"} < shown


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    for test in doctest.DocTestFinder().find(importlib.import_module(f"swdlib.{name}")):
        run_examples(test)


# How to rerun a page


OWN = """# What it is for.
seed: int = 0  # the first
sparsity: float = None
recipe: str = "swd"
shares: list = [0.1, 0.2]  # a_b | c*
width: int = 16  # maps; allowed: a multiple of 8"""


@pytest.fixture
def run(tmp_path: Path) -> reruns.Run:
    """Return a run of a small notebook."""
    heading = nbformat.v4.new_markdown_cell("# A page\n\nReading takes 5 minutes, running 1.")
    return reruns.describe(stored(tmp_path, heading, code(OWN, "parameters")), {"seed": 1})


def test_run_knows_the_title_of_its_page_and_the_time_it_takes(run: reruns.Run) -> None:
    assert (run.name, run.title, run.minutes) == ("small", "A page", "5")


def test_chapters_are_listed_by_part(run: reruns.Run, tmp_path: Path) -> None:
    parts = [
        {"caption": "Learn", "numbered": True, "chapters": [{"file": "small"}]},
        {"caption": "Deploy", "numbered": True, "chapters": [{"file": "text"}]},
        {"caption": "Appendices", "chapters": [{"file": "small"}]},
    ]
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump({"parts": parts}))
    (tmp_path / "text.md").write_text("# In text\n\nMore")
    assert reruns.every_chapter([run], tmp_path / "_toc.yml").splitlines() == [
        *("**Learn**" + reruns.PURPOSES["Learn"], "", "1. [A page](small.ipynb) 5 minutes"),
        *("", "**Deploy**" + reruns.PURPOSES["Deploy"], "", "2. [In text](text.md)"),
        *("", "**Appendices**", "", "[A page](small.ipynb)."),
    ]


def test_commands_pass_what_was_given(run: reruns.Run) -> None:
    assert reruns.command(run) == "papermill small.ipynb out.ipynb -p seed 1"
    assert reruns.make(run) == 'make notebook NAME=small ARGS="-p seed 1"'
    run.given = {}
    assert reruns.make(run) == "make notebook NAME=small"


def test_table_tells_type_default_allowed_values_and_meaning(run: reruns.Run) -> None:
    rows = reruns.parameter_table(run.parameters).splitlines()[2:]
    found = [[cell.strip() for cell in row.split(" | ")] for row in rows]
    seed, sparsity, recipe, shares, width = found
    assert seed == ["| `seed`", "the first", "int", "`0`", "0 or more |"]
    assert sparsity[2:] == ["float", "`None`: 0.9 (recipe swd)", "in [0, 1) |"]
    assert "han2015" in recipe[4] and recipe[1] == "method"
    assert shares[1] == r"a\_b \/ c\*" and shares[3:] == ["`[0.1, 0.2]`", "– |"]
    assert width[1] == "maps" and width[4] == "a multiple of 8 |"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("epochs", "a whole number of at least 1"),
        ("a_max", "above 0"),
        ("data_root", "–"),
        ("images", "–"),
    ],
)
def test_allowed_values_are_those_that_the_library_takes(name: str, said: str) -> None:
    assert reruns.allowed(name) == said


def test_box_links_notebook_numbers_and_records(run: reruns.Run) -> None:
    run.figures = [reruns.Figure("data/small/figure-1.csv", "A line: it rises.")]
    run.files = ["records/laptop/one.json"]
    box = reruns.box(run)
    assert "{download}`small.ipynb <data/small/small.ipynb>`" in box
    assert "1. {download}`CSV <data/small/figure-1.csv>` – A line\n" in box
    assert "{download}`one.json <records/laptop/one.json>`" in box
    assert box.startswith(":::{dropdown}") and box.endswith("\n:::")


@pytest.mark.slow
def test_figures_and_files_of_a_run_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text("{}")
    reads = "import json\n\njson.load(open('facts.json'))"
    draws = "import matplotlib.pyplot as plt\n\nplt.plot([1, 2], [3, 5], label='a');"
    shows = "from swdlib.lab.interactive import Html\n\nHtml('<b>b</b>', 'shown\\nb\\n')"
    cells = code("seed: int = 0", "parameters"), code(reads), code(draws), code(shows)
    target = tmp_path / "out.ipynb"
    found = build.execute(stored(tmp_path, *cells), target, {"seed": 2}, folder=tmp_path)
    names = [f"data/out/figure-{number}.csv" for number in (1, 2)]
    assert [figure.csv for figure in found.figures] == names
    assert (tmp_path / "data/out/figure-1.csv").read_text() == "series,x,y\na,1,3\na,2,5\n"
    assert (tmp_path / "data/out/figure-2.csv").read_text() == "shown\nb\n"
    assert str(tmp_path / "facts.json") in found.files
    notebook = nbformat.read(target, as_version=4)
    assert probes.PROBE not in str(notebook) and "text/csv" not in str(notebook)
    build.check_outputs(target)


def test_only_files_of_the_book_count(tmp_path: Path) -> None:
    names = ["records/laptop/a.json", "records/smoke/b.json", "records/laptop/a.json"]
    files = [*(str(tmp_path / "book" / name) for name in names), "/elsewhere/c.json"]
    assert build.within(files, (tmp_path / "book",)) == [Path("records/laptop/a.json")]


def test_box_comes_before_the_first_section(tmp_path: Path, run: reruns.Run) -> None:
    prose = [nbformat.v4.new_markdown_cell(text) for text in ("# A page", "## More")]
    path = stored(tmp_path, prose[0], code("seed = 0", "parameters"), code("f()"), prose[1])
    build.insert_box(path, run)
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert [s.startswith(":::{dropdown}") for s in sources] == [False, False, False, True, False]


def test_folded_cells_in_a_row_share_a_button() -> None:
    cells = [code("a", "hide-input"), code("b", "hide-input"), code("c"), code("d", "hide-input")]
    assert [cell.source for cell in build.with_one_fold(cells)] == ["a\n\nb", "c", "d"]
    cells = [code("a", "hide-input", outputs=[SHOWN]), code("b", "hide-input")]
    assert len(build.with_one_fold(cells)) == 2


def test_marked_lines_are_filled(tmp_path: Path, run: reruns.Run) -> None:
    (tmp_path / "records").mkdir()
    page = tmp_path / "page.md"
    page.write_text("Before\n\n% generated: pages\n\n% generated: api schedules\n\nAfter\n")
    build.fill(tmp_path, [run])
    text = page.read_text()
    assert "## [A page](small.ipynb)" in text and "### `Exponential`" in text
    assert "generated" not in text and text.startswith("Before") and text.endswith("After\n")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem[-16:])
def test_command_of_a_record_makes_that_record(path: Path) -> None:
    config = load(path).config
    given = vars(parser().parse_args(shlex.split(reruns.shell(config))[1:]))
    settings = {name: given[name] for name in given if name in reruns.SETTINGS}
    assert address(Config(**settings).settings()) == address(config)


def test_grids_are_listed_with_their_commands(tmp_path: Path) -> None:
    lines = ["# Two seeds.", "#     swdlib sweep some.toml", "seed = [0, 1]"]
    (tmp_path / "some.toml").write_text("\n".join(lines), "utf-8")
    first = "{download}`some.toml <grids/some.toml>`, 2 runs. Two seeds."
    assert reruns.every_grid(tmp_path) == f"{first}\n\n```sh\nswdlib sweep some.toml\n```"


@pytest.mark.parametrize(
    "path", sorted((build.BOOK / "grids").glob("*.toml")), ids=lambda p: p.stem
)
def test_command_of_a_grid_is_one(path: Path) -> None:
    command = path.read_text("utf-8").splitlines()[1].removeprefix("#     ")
    given = parser().parse_args(shlex.split(command)[1:])
    assert (command.split()[:2], Path(given.grid)) == (
        ["swdlib", "sweep"],
        Path("book/grids", path.name),
    )


def test_many_files_of_a_folder_are_linked_as_one(tmp_path: Path, run: reruns.Run) -> None:
    many = [f"records/all/{i}.json" for i in range(reruns.MANY + 1)]
    for name in [*many, "records/all/other.json", "records/one.json", "data/small/x"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    run.files = [*many, "records/one.json"]
    reruns.zip_files(run, tmp_path)
    link = "{download}`51 files <data/small/records-all.zip>` of `book/records/all`"
    one = "{download}`one.json <records/one.json>`"
    assert reruns.files_read(run) == f"{one}, {link}"
    assert f"Read from the book: {one}, {link}." in reruns.every_page([run])
    assert [p.name for p in tmp_path.glob("data/small/*.zip")] == ["records-all.zip"]
    with ZipFile(tmp_path / "data/small/records-all.zip") as archive:
        assert archive.namelist() == sorted(many)
        assert archive.read(many[7]).decode() == many[7]


def test_markup_and_commands_in_a_record_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> `x` [a](b)\n# c; rm -rf ~ $(id)"
    row = {"kind": "train", "top1": 1.0, "loss": 1.0, "parameters": 1, "sparsity": 0.5}
    config = {**Config().settings(), "profile": "laptop", "tracker": None, "update": hostile}
    save(Record({**config, "zz": "; id"}, [row], {"dataset": {"source": hostile}}), tmp_path)
    page = f"{reruns.every_record(tmp_path)}\n\n{reruns.expected(tmp_path)}"
    shown = MARKDOWN.render(page)
    assert "<script" not in shown and 'href="b"' not in shown and "<h1" not in shown
    command = reruns.shell(config | {"zz": "; id"})
    assert shlex.split(command)[-1] == hostile and "zz" not in command


def test_few_files_are_linked_one_by_one(tmp_path: Path, run: reruns.Run) -> None:
    run.files = [f"records/all/{i}.json" for i in range(reruns.MANY)]
    reruns.zip_files(run, tmp_path)
    assert reruns.files_read(run).count("{download}") == reruns.MANY
    assert not list(tmp_path.rglob("*.zip"))


def test_same_files_give_the_same_bytes(tmp_path: Path, run: reruns.Run) -> None:
    found = []
    for date, order in ((0, 1), (10**9, -1)):
        run.files = [f"records/{i}.json" for i in range(reruns.MANY + 1)][::order]
        for name in [*run.files, "data/small/x"]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
            os.utime(tmp_path / name, (date, date))
        reruns.zip_files(run, tmp_path)
        found.append((tmp_path / "data/small/records.zip").read_bytes())
    assert found[0] == found[1]


def test_expected_results_are_over_seeds_alone(tmp_path: Path) -> None:
    def put(top1: float, **changed: Any) -> None:
        config = Config(profile="laptop", **changed).settings()
        row = {"kind": "train", "top1": top1, "loss": 1.0, "parameters": 1, "sparsity": 0.5}
        save(Record(config, [row], {"dataset": {"source": "files"}}), tmp_path)

    put(60.0, sparsity=0.5)
    put(62.0, sparsity=0.5, seed=1)
    put(70.0, sparsity=0.9)
    put(80.0, sparsity=0.9, holdout=0.1)  # not on the test images
    several, one = reruns.expected(tmp_path).split(":::{dropdown} ")
    data, _, _, _, *rows = several.strip().splitlines()
    assert data == "Data: cifar10, files."
    command = "swdlib run --profile laptop --recipe swd"
    assert rows == [f"| 61.00 | 60.00 to 62.00 | 2 | `{command} --sparsity 0.5` |"]
    assert one.splitlines()[0] == "Examples, of one seed each: 1"
    assert one.splitlines()[-2:] == [f"| 70.00 | `{command}` |", ":::"]


def test_minutes_of_the_path_for_an_afternoon_are_those_of_its_pages() -> None:
    intro = (build.BOOK / "intro.md").read_text("utf-8")
    path = re.search(
        r"^\*\*An afternoon\.\*\*(.*?): (\d+) minutes to read, and (\d+) more for the lab",
        intro,
        re.DOTALL | re.MULTILINE,
    )
    assert path
    pages = re.findall(r"\((\S+)\.ipynb\)", path[1])
    assert pages == [name for name in NOTEBOOKS if name in pages]  # in the order of the book
    minutes = [reruns.describe(build.BOOK / f"{name}.ipynb", {}).minutes for name in pages]
    assert int(path[2]) == sum(map(int, minutes))
    lab = (build.BOOK / "prune-your-own.ipynb").read_text("utf-8")
    assert f"the lab another {path[3]}" in lab


def test_first_page_shows_each_epoch_of_a_run_on_record() -> None:
    text = reruns.picture(build.BOOK / "records")
    assert re.findall(r"<p>(.*?)</p>", text) == [f"epoch {i}" for i in range(1, 11)]
    assert text.count('class="swd-frame') - 1 == 10 and ' value="9"' in text  # it opens on the last
    before, after, dense = (float(top1) for top1 in re.findall(r"(\d+\.\d\d) %", text)[-3:])
    assert abs(before - after) < 0.5 and dense > before


def test_records_of_trials_are_not_those_of_the_book(tmp_path: Path) -> None:
    for profile in ("smoke", "laptop"):
        config = Config(profile=profile).settings()
        save(Record(config, [], {"dataset": {"source": "files"}}), tmp_path)
    kept = path_of(Config(profile="laptop").settings(), tmp_path)
    assert reruns.committed(tmp_path) == [kept]


# Quizzes


def test_answers_are_read_with_their_reasons() -> None:
    lines = ["- [ ] 3", "  One too", "  many.", "", "- [x] 2", "  Yes."]
    assert quiz.answers_in(lines) == [(False, "3", "One too many."), (True, "2", "Yes.")]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["- [ ] 3", "- [x] 2", "  Yes."], "an answer must say why, on the next line: '3'"),
        (["* 3"], r"must begin with - \[ \] or - \[x\], not '\* 3'"),
        (["  Yes."], "must begin with"),
    ],
)
def test_faulty_quiz_is_refused(lines: list[str], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        quiz.answers_in(lines)


def prose_of(cells: list[Any]) -> str:
    """Return the prose of a notebook's cells."""
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_chapter_has_questions_to_check_oneself(name: str) -> None:
    cells = nbformat.read(build.BOOK / f"{name}.ipynb", as_version=4).cells
    assert prose_of(cells).count("\n:::{quiz} ") >= 3


def faults_of(cells: list[Any]) -> list[str]:
    """Return what a chapter lacks of what each of them has."""
    text = prose_of(cells)
    exercises = re.findall(r"^\*\*\d+\.\*\* ", text, re.MULTILINE)
    has = {
        "answer": ":::{admonition} In short\n" in opening(cells),
        "figure": any("figure" in cell.metadata.get("mystnb", {}) for cell in hook(cells)),
        "aims": ":::{admonition} What you will learn\n" in text,
        "summary": re.search(r"^## Summary$", text, re.MULTILINE),
        "time": re.search(r"^Reading takes \d+ minutes\b", text, re.MULTILINE),
        "exercises": len(exercises) >= 3,
        "solutions": text.count("\n:::{dropdown} Solution\n") == len(exercises),
        "mistake": ":::{admonition} Common mistake" in text,
        "picture before formulas": not formulas(prose_of(before_picture(cells))),
    }
    return [name for name, found in has.items() if not found]


def hook(cells: list[Any]) -> list[Any]:
    """Return the cells before the first section."""
    sections = (i for i, cell in enumerate(cells) if re.match(r"## ", cell.source))
    return cells[: next(sections, len(cells))]


def opening(cells: list[Any]) -> str:
    """Return the prose before the first section."""
    return prose_of(hook(cells))


def before_picture(cells: list[Any]) -> list[Any]:
    """Return the cells before the first figure."""
    drawn = ["image" in cell.metadata.get("mystnb", {}) for cell in cells]
    return cells[: drawn.index(True)]


def formulas(text: str) -> list[str]:
    """Return the formulas of prose: displayed ones, and those that join symbols by a sign.

    A lone symbol, a number and a product without a sign only name something.
    """
    plain = re.sub(r"`[^`\n]*`", "", text)
    inline = re.findall(r"(?<!\$)\$([^$]+)\$(?!\$)", plain)
    joined = (
        r"[a-zA-Z})|] *([=<>+/-]|\\(le|ge|times|cdot|in)\b) *[\\a-zA-Z(|]|[a-zA-Z}]\^\{?\d|\\frac"
    )
    return re.findall(r"\$\$.+?\$\$", plain, re.DOTALL) + [
        found for found in inline if re.search(joined, found)
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_chapter_has_all_its_parts_and_a_picture_before_the_first_formula(name: str) -> None:
    assert faults_of(nbformat.read(build.BOOK / f"{name}.ipynb", as_version=4).cells) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("In short", "Briefly", "answer"),
        ("## Summary", "## End", "summary"),
        ("What you will learn", "Aims", "aims"),
        ("Reading takes", "It takes", "time"),
        ("**", "", "exercises"),
        (":::{dropdown} Solution", ":::{dropdown} Hint", "solutions"),
        ("Common mistake", "Mistake", "mistake"),
        ("# What is pruning?", "$$a = b$$", "picture before formulas"),
        ("# What is pruning?", "Let $n = sN$ be.", "picture before formulas"),
    ],
)
def test_chapter_without_a_part_is_found(old: str, new: str, fault: str) -> None:
    cells = nbformat.read(build.BOOK / "what-is-pruning.ipynb", as_version=4).cells
    for cell in cells:
        cell.source = cell.source.replace(old, new)
    assert fault in faults_of(cells)


FOLDED = {"parameters", "hide-input", "hide-cell", "remove-input", "remove-cell"}
LINES = 80  # of code that a page shows unasked


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_page_shows_little_code(name: str) -> None:
    cells = nbformat.read(build.BOOK / f"{name}.ipynb", as_version=4).cells
    code = (cell for cell in cells if cell.cell_type == "code")
    shown = (cell for cell in code if not FOLDED & set(cell.metadata.get("tags", [])))
    assert sum(len(cell.source.splitlines()) for cell in shown) <= LINES


def with_tasks() -> list[str]:
    """Return the chapters of the parts that teach and measure."""
    parts = yaml.safe_load((build.BOOK / "_toc.yml").read_text("utf-8"))["parts"]
    return [page["file"] for part in parts[:2] for page in part["chapters"]]


@pytest.mark.parametrize("name", sorted(with_tasks()))
def test_chapter_has_a_blank_to_fill_in_which_is_checked(name: str) -> None:
    cells = nbformat.read(build.BOOK / f"{name}.ipynb", as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert "check_answer(" in code or "check_pruned(" in code
    assert "## Your turn" in prose_of(cells)


PRIVATE = (
    r"\banew\b|\bnew statistics\b|\brenewed\b|\bcourses? of the (learning )?rate\b|\bfor long\b"
    r"|\bin earnest\b|\bto go\b(?= ?[,.:;])|\bthe shock\b|\bechoes\b|\bwhat is told\b"
)


PAGES = sorted(p for p in build.BOOK.glob("*.*") if p.suffix in (".md", ".ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_uses_the_words_of_the_field(page: Path) -> None:
    assert not re.findall(PRIVATE, page.read_text("utf-8"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("$a$, $a_{\\min}$, $w^*$, $\\eta\\, a\\, \\mu$, $5 \\cdot 10^4$ and `$a = b$`", []),
        ("$k \\times k$ of $w_1$", ["k \\times k"]),
        ("$s < t$:\n$$\na\n$$", ["$$\na\n$$", "s < t"]),
    ],
)
def test_formulas_are_distinguished_from_symbols(text: str, found: list[str]) -> None:
    assert formulas(text) == found


# Slides

FORMULA = "where $a_b < 1$ holds:\n\n$$a = b & c$$"
TITLE = "# A *page*\n\nFirst. More of it.\n\nSecond [link](other.ipynb#there). It is " + FORMULA
MANY = "\n\n".join(["$$a$$"] * 4)
MISTAKE = ":::{admonition} Common mistake: haste\n:class: warning\nNever *do* that.\n:::"
QUESTION = ":::{quiz} How much is $1 + 1$?\n- [ ] 3\n  Too many.\n- [x] 2\n  Yes.\n:::"
ENDING = f"After the figure.\n\n{MISTAKE}\n\n## Exercises\n\n**1.** Compute.\n\n{QUESTION}"
DRAWING = {"image/svg+xml": "<svg/>", "text/plain": "<Figure>"}
PICTURE = nbformat.v4.new_output("display_data", DRAWING)
TABLE = nbformat.v4.new_output("execute_result", {"text/html": "<style>x</style><table></table>"})
PRINTED = nbformat.v4.new_output("stream", name="stdout", text="1 < 2\n")


def prose(source: str, *tags: str) -> Any:
    """Return a cell of prose."""
    return nbformat.v4.new_markdown_cell(source, metadata={"tags": list(tags)})


@pytest.fixture
def lesson(tmp_path: Path) -> list[slides.Slide]:
    """Return the slides of a small notebook."""
    drawn = code("draw()", "slide", outputs=[PRINTED, PICTURE, TABLE])
    drawn.metadata["mystnb"] = {"image": {"alt": 'A "line": it rises.'}}
    cells = [
        *(prose(TITLE, "slide"), code("hidden()", outputs=[PRINTED]), drawn),
        *(prose("## Untold\n\nNot on a slide."), prose(f"## Many\n\n{MANY}", "slide")),
        *(code("a < b", "slide"), prose(ENDING, "slide")),
    ]
    return slides.slides_of(stored(tmp_path, *cells))


def test_slides_begin_at_headings_mistakes_questions_and_when_one_is_full(
    lesson: list[slides.Slide],
) -> None:
    mistake = "Common mistake: haste"
    expected = ["A *page*", "A *page*", "Many", "Many", mistake, "How much is $1 + 1$?"]
    assert [slide.title for slide in lesson] == expected
    assert [str(slide.shown).count("math block") for slide in lesson] == [1, 0, 3, 1, 0, 0]
    assert "Never <em>do</em> that." in lesson[4].shown[0]
    assert lesson[5].shown[0].count("<details") == 2


def test_slide_shows_the_start_formulas_and_outputs_and_notes_the_rest(
    lesson: list[slides.Slide],
) -> None:
    shown = "".join(lesson[0].shown)
    assert shown.startswith("<p>First. More of it.</p><p>It is where")
    assert r"\[a = b &amp; c\]" in shown and r"\(a_b &lt; 1\)" in shown
    assert "<pre" in shown and "1 &lt; 2" in shown and "hidden" not in shown
    assert 'alt="A &quot;line&quot;: it rises." src="data:image/svg+xml;base64,PHN2Zy8+"' in shown
    assert "<table>" not in shown  # there is no room beside a picture
    assert "<table>" in lesson[1].shown[0] and "<style>" not in lesson[1].shown[0]
    assert lesson[0].notes == ['<p>Second <a href="other.ipynb#there">link</a>.</p>']
    assert "a &lt; b" in lesson[3].shown[-1]  # code that shows nothing is shown itself
    assert lesson[3].notes == ["<p>After the figure.</p>"]


def test_deck_is_one_file_whose_links_lead_to_the_pages(lesson: list[slides.Slide]) -> None:
    text = slides.deck("small", lesson)
    assert text.count("<section>") == 6 and text.count("<h1>") == 1
    assert "<title>Slides: A page</title>" in text and "<h1>A <em>page</em></h1>" in text
    assert 'href="../other.html#there"' in text and 'href="../small.html"' in text
    assert text.count(slides.MATHJAX) == 1 and "{{" not in text
    assert not re.search(r'(src|href)="(https?:|//)', text)
    assert slides.MATHJAX not in slides.deck("small", [slides.Slide("A", ["<p>b</p>"])])


def contents(book: Path, *names: str) -> None:
    """Write the _toc.yml of a book of these pages."""
    files = "".join(f"- file: {name}\n" for name in names)
    start = "format: jb-book\nroot: intro\nchapters:\n"
    (book / "_toc.yml").write_text(start + files, encoding="utf-8")


def test_chapters_without_slides_have_no_deck(tmp_path: Path, lesson: list[slides.Slide]) -> None:
    stored(tmp_path, prose("# Other")).rename(tmp_path / "other.ipynb")
    stored(tmp_path, prose(TITLE, "slide"))
    contents(tmp_path, "small", "other")
    slides.write(tmp_path, tmp_path / "slides")
    assert [path.name for path in (tmp_path / "slides").iterdir()] == ["small.html"]
    line = '- <a href="slides/small.html">A <em>page</em></a>, 1 slides'
    assert slides.listing(tmp_path, ["small", "other"]) == line


def test_notebook_that_is_no_page_has_no_deck(tmp_path: Path) -> None:
    for name in ("out", "small"):
        stored(tmp_path, prose(TITLE, "slide")).rename(tmp_path / f"{name}.ipynb")
    contents(tmp_path, "small")
    slides.write(tmp_path, tmp_path / "slides")
    assert [path.name for path in (tmp_path / "slides").iterdir()] == ["small.html"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the {term}`push`.", "the push."),
        ("{term}`Pushes <push>` and `<code>`", "Pushes and <code>&lt;code&gt;</code>"),
        ("{term}`a & b`", "a &amp; b"),
        ("as shown {cite}`han2015`.", "as shown [han2015]."),
        ("`{term}` and {term} stay", "<code>{term}</code> and {term} stay"),
    ],
)
def test_role_on_a_slide_shows_its_text(text: str, shown: str) -> None:
    assert inline(text) == shown
    [block] = blocks(f"- {text}")
    assert block.html.strip() == f"<ul>\n<li>{shown}</li>\n</ul>"


LESSON = ("what-is-pruning", "swd-from-scratch", "lagrangian-smoothing")  # of one hour


@pytest.mark.parametrize("name", LESSON)
def test_chapters_of_the_first_lesson_have_slides(name: str) -> None:
    cells = nbformat.read(build.BOOK / f"{name}.ipynb", as_version=4).cells
    assert sum("slide" in cell.metadata.get("tags", []) for cell in cells) >= 8


def test_table_on_a_slide_scrolls_and_how_long_reading_takes_is_left_out(tmp_path: Path) -> None:
    table = "Numbers:\n\n| a | b |\n| --- | --- |\n| 1 | 2 |"
    box = ":::{admonition} What you will know\nA lot.\n\nReading takes 5\nminutes.\n:::"
    path = stored(tmp_path, prose(f"# A page\n\nFirst.\n\n{table}\n\n{box}", "slide"))
    shown = "".join(slides.slides_of(path)[0].shown)
    assert '<div class="wide" tabindex="0"><table>' in shown and "<td>2</td>" in shown
    assert "A lot." in shown and "minutes" not in shown


def test_picture_of_runs_is_drawn_on_a_slide_and_made_fit_for_a_dark_one(tmp_path: Path) -> None:
    runs = '<div class="swd-runs"><svg><defs></defs></svg><p role="status">The best run</p></div>'
    shown = nbformat.v4.new_output("execute_result", {"text/html": runs})
    cell = code("f()", "slide", outputs=[shown])
    cell.metadata["mystnb"] = {"image": {"alt": "Runs."}}
    [slide] = slides.slides_of(stored(tmp_path, prose("# A page", "slide"), cell))
    [image] = slide.shown
    found = re.fullmatch(r'<img alt="Runs." src="data:image/svg\+xml;base64,(.*)">', image)
    assert found is not None
    picture = b64decode(found[1]).decode()
    assert picture == plots.for_both_grounds("<svg><defs></defs></svg>") and "dark" in picture


# Links to the pages


def test_link_to_a_page_shows_its_title_its_first_sentences_and_the_card() -> None:
    page, boxed = new_document("page.md"), nodes.note("", nodes.paragraph("", "In a box."))
    page += nodes.section("", boxed, nodes.paragraph("", f"One. {'Two ' * 60}."))
    assert share.description(page) == "One."
    page[0][1] = nodes.paragraph("", "First, ", nodes.emphasis("", "short"))
    assert share.description(page) == "First, short"
    found = share.tags('A "page"', "One.", "slides/page.html", "")
    assert 'property="og:title" content="A &quot;page&quot;"' in found
    assert 'content="../_static/card.png"' in found and "og:url" not in found
    found = share.tags("A page", "One.", "page.html", "https://example.org/book/")
    assert 'content="https://example.org/book/_static/card.png"' in found
    assert 'property="og:url" content="https://example.org/book/page.html"' in found


def test_card_has_the_size_that_links_show() -> None:
    with Image.open(build.BOOK / share.CARD) as card:
        assert card.size == (1200, 630)


# On Colab

ADDRESS = {"url": "https://github.com/someone/book", "branch": "main", "path_to_book": "book"}


def test_notebooks_install_the_library_on_colab_if_the_repository_has_an_address(
    tmp_path: Path,
) -> None:
    title, own = nbformat.v4.new_markdown_cell("# A page"), code("seed: int = 0", "parameters")
    path = stored(tmp_path, title, own, code("f()"))
    path.write_text(off := build.stripped(path, ADDRESS | {"url": ""}), encoding="utf-8")
    assert "google.colab" not in off
    path.write_text(on := build.stripped(path, ADDRESS), encoding="utf-8")
    _, install, parameters, _ = nbformat.reads(on, as_version=4).cells
    assert "git clone" in install.source and "remove-cell" in install.metadata.tags
    assert parameters.metadata.tags == ["parameters"]
    assert build.parameters_of(path) == ["seed"]
    assert build.stripped(path, ADDRESS) == on  # and not a second time
    assert build.stripped(path, ADDRESS | {"url": ""}) == off


@pytest.mark.parametrize("on_colab", [False, True])
def test_install_cell_works_on_colab_and_does_nothing_elsewhere(
    on_colab: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TransformerManager().transform_cell(build.install_cell(ADDRESS).source)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if on_colab:
        monkeypatch.setitem(sys.modules, "google.colab", sys)
    shell = Mock()
    exec(source, {"get_ipython": lambda: shell})
    calls = " | ".join(str(argument) for call in shell.mock_calls for argument in call.args)
    if not on_colab:
        assert not calls
        return
    folder = "/content/pruning-book"
    assert f"--branch main https://github.com/someone/book {folder} |" in calls
    assert f'pip | install --quiet -e "{folder}[deploy]"' in calls
    assert calls.endswith(f"cd | {folder}/book") and sys.path[0] == folder


def test_address_is_read_from_the_one_setting(tmp_path: Path) -> None:
    config = tmp_path / "_config.yml"
    config.write_text(yaml.safe_dump({"title": "A book", "repository": ADDRESS}), "utf-8")
    assert build.repository_of(config) == ADDRESS
    assert set(build.repository_of(ROOT / "_config.yml")) == set(ADDRESS)


# Buttons, words and works


def test_buttons_come_and_go_with_the_address_of_the_repository() -> None:
    options: dict[str, Any] = {"repository_url": ""}
    repository.set_buttons(options)
    assert not any(options[name] for name in (*repository.BUTTONS, "launch_buttons"))
    options["repository_url"] = "https://example.org/book"
    repository.set_buttons(options)
    assert all(options[name] for name in (*repository.BUTTONS, "launch_buttons"))


@pytest.mark.slow
def test_buttons_lead_to_the_repository(tmp_path: Path) -> None:
    shown = nbformat.v4.new_output("stream", name="stdout", text="1\n")
    ran = code("print(1)", count=1, outputs=[shown])
    stage = tmp_path / "stage"
    stage.mkdir()
    stored(stage, nbformat.v4.new_markdown_cell("# A page"), ran).rename(stage / "page.ipynb")
    (stage / "_toc.yml").write_text("format: jb-book\nroot: page\n")
    (stage / "references.bib").write_text("")
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    config["repository"]["url"] = "https://github.com/someone/book"
    config["html"].pop("favicon")
    folders = config["sphinx"]["local_extensions"]
    config["sphinx"]["local_extensions"] = {name: str(ROOT / folders[name]) for name in folders}
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config))
    page = build.make_pages(stage, tmp_path / "_config.yml", tmp_path).with_name("page.html")
    text = page.read_text("utf-8")
    where = "someone/book/blob/main/book/page.ipynb"
    assert f"https://colab.research.google.com/github/{where}" in text
    assert "https://mybinder.org/v2/gh/someone/book/main" in text
    assert "https://github.com/someone/book/edit/main/book/page.ipynb" in text
    assert "https://github.com/someone/book/issues/new" in text


def test_a_line_ends_between_no_number_and_its_percent_sign() -> None:
    percent = nodes.paragraph(
        "", "", nodes.Text("98 % of 5 weights, in "), nodes.literal("", "9 %")
    )
    page = new_document("page")
    page += percent
    spaces.tie(Mock(), page)
    assert percent.astext() == "98\N{NO-BREAK SPACE}% of 5 weights, in 9 %"


def test_no_line_begins_with_the_mark_behind_a_short_formula() -> None:
    page = new_document("page")
    texts = [nodes.Text(text) for text in (", ", ", ", ").", " or ")]
    long = nodes.math("", "a" * 41)
    formulas = [long, *(nodes.math("", letter) for letter in "bcd")]
    parts = [part for pair in zip(formulas, texts, strict=True) for part in pair]
    page += nodes.paragraph("", "", *parts)
    words = page.astext()
    spaces.tie(Mock(), page)
    tied = list(page.findall(nodes.inline))
    assert [node.astext() for node in tied] == ["b,", "c)."]
    assert all(node["classes"] == ["nobreak"] for node in tied)
    assert page.astext() == words and long.parent is page[0]


def test_words_are_spelt_right() -> None:
    places = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "book", "swdlib"]
    left_out = "*/records/*,*/grids/*,*/measurements/*,*.pyc"
    options = ["--ignore-words-list", "arange,ser,bailin,spred", "--skip", left_out]
    command = [sys.executable, "-m", "codespell_lib", *options, *places]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_work_that_is_cited_by_number_is_in_the_bibliography() -> None:
    works = (build.BOOK / "references.bib").read_text("utf-8")
    pages = [*build.BOOK.glob("*.md"), *build.BOOK.glob("*.ipynb"), ROOT / "README.md"]
    for path in [*pages, *(ROOT / "swdlib").rglob("*.py")]:
        numbers = re.findall(r"(?i)\barxiv[ .:]\D{0,12}(\d{4}\.\d{5})", path.read_text("utf-8"))
        assert not {n for n in numbers if n not in works}, path.name
