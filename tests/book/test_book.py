"""The book: its notebooks as they are stored, the pipeline, and every page in a real browser."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from zipfile import ZipFile

import axe_playwright_python
import nbformat
import numpy as np
import papermill
import pytest
import torch
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from playwright.sync_api import Error as BrowserError
from pypdf import PdfReader
from sphinx_external_toc.parsing import parse_toc_yaml
from torch import nn

from book import build, pdf, reruns
from book._ext.widgets import WIDGETS as WIDGETS_OF_PAGES
from swdlib import SelectiveWeightDecay
from swdlib.criteria import magnitude
from swdlib.lab.interactive import path_of, weights_over_training
from swdlib.lab.plots import INK, PALE_INK, method_of
from swdlib.runs.config import LR_SCHEDULES
from swdlib.runs.records import HISTOGRAM_BINS, load
from swdlib.schedules import Constant, Exponential, Schedule, growing
from tests.conftest import unavailable

NOTEBOOKS = build.notebook_names(build.BOOK)
RECORDS = reruns.committed(build.BOOK / "records")
PAGES = [*parse_toc_yaml(build.BOOK / "_toc.yml"), "search"]
WIDTHS = {"desktop": 1280, "phone": 390}
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")


# The notebooks as they are stored


def read(name: str) -> Any:
    """Return the stored notebook `name`."""
    return nbformat.read(build.BOOK / f"{name}.ipynb", as_version=4)


def tagged(notebook: Any, tag: str) -> list[Any]:
    """Return the cells of a notebook that carry a tag."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_every_notebook_of_the_book_is_a_page() -> None:
    assert NOTEBOOKS
    stored = {path.stem for path in build.BOOK.glob("*.ipynb")}
    assert stored - {"out"} == set(NOTEBOOKS)  # out.ipynb is what papermill leaves


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_clean(name: str) -> None:
    path = build.BOOK / f"{name}.ipynb"
    assert path.read_text("utf-8") == build.stripped(path), "run `make strip`"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_has_one_cell_of_parameters(name: str) -> None:
    assert len(tagged(read(name), "parameters")) == 1
    assert build.parameters_of(build.BOOK / f"{name}.ipynb")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_valid_and_names_the_kernel_that_runs_it(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


# The pipeline


def code(source: str, *tags: str, count: int | None = None, outputs: Any = ()) -> Any:
    """Return a code cell."""
    return nbformat.v4.new_code_cell(
        source, metadata={"tags": list(tags)}, execution_count=count, outputs=list(outputs)
    )


def stored(folder: Path, *cells: Any) -> Path:
    """Write a small notebook and return its path."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=list(cells), metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "small.ipynb")
    return folder / "small.ipynb"


SHOWN = nbformat.v4.new_output("stream", name="stdout", text="1\n")
VALUE = nbformat.v4.new_output("execute_result", {"text/plain": "1"})
FAILED = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
RAN = code("print(1)", count=1, outputs=[SHOWN])


def figure(*outputs: Any) -> Any:
    """Return a cell of code that ran and should have drawn a figure."""
    cell = code("draw();", count=9, outputs=outputs)
    cell.metadata["mystnb"] = {"image": {"alt": "A line."}}
    return cell


def test_unknown_parameter_is_refused_before_anything_runs(tmp_path: Path) -> None:
    source = stored(tmp_path, code("seed: int = 0", "parameters"))
    target = tmp_path / "out.ipynb"
    with pytest.raises(ValueError, match=r"small.ipynb has no parameter sead; it has: seed"):
        build.execute(source, target, {"sead": 1}, folder=tmp_path)
    assert not target.exists()


@pytest.mark.slow
def test_parameters_reach_the_notebook_which_runs_in_its_folder(tmp_path: Path) -> None:
    report = code("from pathlib import Path\nprint(seed + 1, Path.cwd().name)")
    source = stored(tmp_path, code("seed: int = 0", "parameters"), report)
    text = source.read_text()
    target = tmp_path / "out.ipynb"
    build.execute(source, target, {"seed": 41}, folder=tmp_path)
    build.check_outputs(target)
    assert f"42 {tmp_path.name}" in target.read_text()
    assert source.read_text() == text


@pytest.mark.slow
def test_a_kernel_that_does_not_begin_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = stored(tmp_path, code("print(41 + 1)")), tmp_path / "out.ipynb"
    really, failures = papermill.execute_notebook, [RuntimeError("Kernel didn't respond")]

    def unlucky(*given: Any, **more: Any) -> Any:
        if failures:
            raise failures.pop()
        return really(*given, **more)

    monkeypatch.setattr(papermill, "execute_notebook", unlucky)
    build.execute(source, target, {}, folder=tmp_path)
    assert "42" in target.read_text()
    failures += [RuntimeError("Kernel didn't respond"), RuntimeError("Kernel didn't respond")]
    with pytest.raises(RuntimeError, match="didn't respond"):
        build.execute(source, target, {}, folder=tmp_path)
    failures += [DeadKernelError("Kernel died")]
    with pytest.raises(DeadKernelError):
        build.execute(source, target, {}, folder=tmp_path)


@pytest.mark.slow
def test_failing_notebook_stops_the_build(tmp_path: Path) -> None:
    source, target = stored(tmp_path, code("1 / 0")), tmp_path / "out.ipynb"
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        build.execute(source, target, {}, folder=tmp_path)
    with pytest.raises(ValueError, match="a cell that failed"):
        build.check_outputs(target)


@pytest.mark.slow
def test_failing_page_stops_the_build_of_the_book(tmp_path: Path) -> None:
    book = tmp_path / "book"
    book.mkdir()
    (book / "_toc.yml").write_text("format: jb-book\nroot: out-0\nchapters: [{file: out-1}]\n")
    for number, source in enumerate(("print(1)", "1 / 0")):
        os.replace(
            stored(book, code("seed = 0", "parameters"), code(source)), book / f"out-{number}.ipynb"
        )
    with pytest.raises(PapermillExecutionError, match="ZeroDivisionError"):
        build.build(book, tmp_path)
    assert not (tmp_path / "_build" / "html").exists()


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        ([code("f()", count=1, outputs=[FAILED])], "a cell that failed"),
        ([code("f()", count=1, outputs=[SHOWN]), code("g()")], "a cell that never ran"),
        ([code("f()", count=1), code("g()", count=2)], "shows no output"),
        ([RAN, figure()], "a cell that shows no figure: draw"),
        ([RAN, figure(SHOWN)], "no figure"),
        ([RAN, code("print(1)\nx = 2", count=2)], "no text"),
        ([RAN, code("print(1)\nx", count=2, outputs=[VALUE])], "no text"),
        ([RAN, code("f()", count=2)], "no value"),
        ([RAN, code("print(1)\nx.T", count=2, outputs=[SHOWN])], "no value"),
    ],
)
def test_page_that_would_mislead_is_refused(tmp_path: Path, cells: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        build.check_outputs(stored(tmp_path, *cells))


def test_page_that_ran_is_accepted(tmp_path: Path) -> None:
    prose = nbformat.v4.new_markdown_cell("Prose")
    ran = code("x = 1", count=1), code("print(x)", count=2, outputs=[SHOWN])
    quiet = code("x.sort();  # in place", count=3), code("%pip list\nx = 2", count=4)
    shown = code("x.T", count=5, outputs=[VALUE]), code("told(x)", count=6, outputs=[SHOWN])
    drawn = nbformat.v4.new_output("display_data", {"image/svg+xml": "<svg/>"})
    build.check_outputs(stored(tmp_path, prose, *ran, *quiet, *shown, figure(drawn), code("")))


def test_stripping_removes_what_a_run_leaves(tmp_path: Path) -> None:
    path = stored(tmp_path, code("print(1)", count=1, outputs=[SHOWN]))
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["papermill"] = {"duration": 1.0}
    notebook.cells[0].metadata["papermill"] = {"duration": 1.0}
    nbformat.write(notebook, path)
    path.write_text(build.stripped(path))
    assert "papermill" not in path.read_text()
    [cell] = nbformat.read(path, as_version=4).cells
    assert (cell.source, cell.outputs, cell.execution_count) == ("print(1)", [], None)


def test_stage_holds_committed_records_but_not_those_of_trials(tmp_path: Path) -> None:
    of_trials = ("records/smoke/run.json", "data/cifar10/image.jpg", "out.ipynb")
    for name in ("records/cifar10/run.json", "page.md", "build.py", *of_trials):
        (tmp_path / "book" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "book" / name).write_text("{}")
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "old.md").write_text("gone")
    build.copy_sources(tmp_path / "book", tmp_path / "stage")
    found = {str(p.relative_to(tmp_path / "stage")) for p in (tmp_path / "stage").rglob("*.*")}
    assert found == {"page.md", "records/cifar10/run.json"}


def test_data_is_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    page = build.BOOK / "swd-on-cifar10.ipynb"
    assert build.absolute_data_root(page, {}) == {"data_root": str(build.ROOT / "data")}
    assert build.absolute_data_root(page, {"data_root": "mine"}) == {
        "data_root": str(tmp_path / "mine")
    }
    # These two have a record that stands in for data.
    for name in ("smaller-networks", "imagenet"):
        assert build.absolute_data_root(build.BOOK / f"{name}.ipynb", {}) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("true", True),
        ("None", None),
        ("[0.9, 0.99]", [0.9, 0.99]),
        ("swd", "swd"),
        ("", ""),
        ("a b", "a b"),
        ("__import__('os')", "__import__('os')"),
    ],
)
def test_values_are_read_as_they_are_written(text: str, value: object) -> None:
    assert build.value_of(text) == value


def test_unknown_notebook_lists_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be one of .*, not 'nowhere'"):
        build.run_one("nowhere", {}, tmp_path)


def test_command_line_reports_an_error_without_a_traceback() -> None:
    with pytest.raises(SystemExit, match="error: the notebook must be one of"):
        build.main(["notebook", "nowhere", "-p", "seed", "1"])


# Every page in a browser


@pytest.fixture(scope="session")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the whole book once and return the folder of its pages."""
    return build.build(build.BOOK, tmp_path_factory.mktemp("book")).parent


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Start Debian's Chromium, or else Playwright's own."""
    with sync_playwright() as playwright:
        try:
            started = pdf.start(playwright)
        except BrowserError:
            unavailable("apt-get install chromium, or run `playwright install chromium`")
        yield started
        started.close()


@dataclass
class Visit:
    """A page opened from disk, with the network off, and what went wrong on it."""

    page: Page
    address: str
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Listen, open the page and wait for its formulas."""
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("requestfailed", lambda request: self.faults.append(request.url))
        self.page.on("request", lambda request: self.judge(request.url))
        self.page.goto(self.address)
        self.page.evaluate("window.MathJax?.startup?.promise.then(() => true)")

    @property
    def name(self) -> str:
        """The page's name in _toc.yml."""
        return Path(urlsplit(self.address).path).stem

    @property
    def is_on_phone(self) -> bool:
        """Whether the window is as wide as a phone's."""
        size = self.page.viewport_size
        return size is not None and size["width"] == WIDTHS["phone"]

    def judge(self, address: str) -> None:
        """Note a request that leaves the disk."""
        if urlsplit(address).scheme not in ("file", "data", "blob"):
            self.faults.append(f"asked for {address}")


@contextmanager
def tab(browser: Browser, width: int) -> Iterator[Page]:
    """Open an empty tab without network."""
    context = browser.new_context(
        viewport={"width": width, "height": 844},
        has_touch=width == WIDTHS["phone"],
        offline=True,
    )
    context.set_default_timeout(20_000)
    yield context.new_page()
    context.close()


@pytest.fixture(params=WIDTHS)
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """Return an empty tab, as wide as a desktop's or a phone's."""
    with tab(browser, WIDTHS[request.param]) as page:
        yield page


VISIBLE_TEXT = """() => {
    const article = document.querySelector("article, main").cloneNode(true);
    article.querySelectorAll("pre, code, script, style, mjx-container").forEach(e => e.remove());
    return article.textContent;
}"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
TALLER = "document.documentElement.scrollHeight - document.documentElement.clientHeight"
LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.href)"
HEADINGS = """[...document.querySelectorAll(
    ":is(article, .bd-search-container) :is(h1, h2, h3, h4, h5, h6)")]"""


VISITS = [(name, width) for width in WIDTHS for name in PAGES]


@pytest.fixture(scope="session", params=VISITS, ids="-".join)
def visit(html: Path, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """Open a page once for all tests that change nothing on it."""
    name, width = request.param
    with tab(browser, WIDTHS[width]) as page:
        visit = Visit(page, (html / f"{name}.html").as_uri())
        page.wait_for_load_state("networkidle")
        yield visit


@pytest.mark.slow
def test_page_opens_from_disk_without_a_fault(visit: Visit) -> None:
    assert visit.faults == []
    assert visit.page.evaluate(OVERFLOW) <= 0


@pytest.mark.slow
def test_formulas_are_set(visit: Visit) -> None:
    page = visit.page
    formulas = page.locator(".math").count()
    assert page.locator(".math mjx-container").count() >= formulas
    assert page.locator("mjx-merror").count() == 0
    # The first page counts as having the formulas of the pages it lists.
    loaded = page.locator("script[src*=mathjax]").count()
    assert visit.name == PAGES[0] or loaded == (formulas > 0)
    assert not re.search(r"\$\$|\\\(|\\\[|\\[a-z]{2,}|\$[^$\n]+\$", page.evaluate(VISIBLE_TEXT))


HEIGHT = 9_000  # pixels of a chapter in a window of a laptop


@pytest.mark.slow
def test_chapter_is_no_endless_page(visit: Visit) -> None:
    if visit.name in NOTEBOOKS and not visit.is_on_phone:
        assert visit.page.evaluate("document.querySelector('article').scrollHeight") <= HEIGHT


@pytest.mark.slow
def test_images_load_and_say_what_they_show(visit: Visit) -> None:
    for image in visit.page.locator("img").all():
        alternative = image.get_attribute("alt") or ""
        assert len(alternative.split()) > 1, image.get_attribute("src")
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


@pytest.mark.slow
def test_links_inside_the_book_lead_somewhere(visit: Visit) -> None:
    for link in visit.page.evaluate(LINKS):
        parts = urlsplit(link)
        if parts.scheme == "file":
            target = Path(unquote(parts.path))
            assert target.is_file(), link
            anchor = unquote(parts.fragment)
            assert not anchor or f'id="{anchor}"' in target.read_text("utf-8"), link


@pytest.mark.slow
def test_headings_are_in_order(visit: Visit) -> None:
    levels = visit.page.evaluate(f"{HEADINGS}.map(heading => +heading.tagName[1])")
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels


@pytest.mark.slow
def test_page_is_light_enough_for_a_phone(visit: Visit) -> None:
    sources = visit.page.evaluate("[...new Set([...document.images].map(image => image.src))]")
    files = [Path(unquote(urlsplit(s).path)) for s in [visit.address, *sources] if "file:" in s]
    assert sum(file.stat().st_size for file in files) < 2_000_000


FILLED = ", ".join(f".{name}" for name in WIDGETS_OF_PAGES)


@pytest.mark.slow
def test_scripts_of_a_page_load_nowhere_else(visit: Visit) -> None:
    loaded = visit.page.locator("script[src*=widgets], link[href*=widgets]").count()
    assert (loaded > 0) == (visit.page.locator(FILLED).count() > 0)


# What axe-core finds against its rules and is left as it is -> where, and why.
TOLERATED = {
    "region": (".navbar-brand, .sidebar-primary-item", "the theme has the title outside of <nav>"),
    "empty-table-header": ("th", "pandas leaves the corner of a table empty"),
    "aria-allowed-role": (".citation", "docutils gives each work the role doc-biblioentry"),
    "aria-deprecated-role": (".citation", "the same role, which is out of date"),
    "aria-required-children": (".citation-list", "the same role is not that of a list's items"),
}

FINDINGS = """async ([options, tolerated]) => {
    const found = await axe.run(document, {resultTypes: ["violations"], ...options});
    return found.violations.flatMap(rule => rule.nodes
        .filter(node => !document.querySelector(node.target[0])?.matches(tolerated[rule.id] ?? "_"))
        .map(node => `${rule.id}: ${node.target}: ${node.html.slice(0, 200)}`));
}"""

# Text of the same colour and size on the same ground has the same contrast: one of it is enough.
CONTRAST = """async mode => {
    document.documentElement.dataset.theme = mode;
    const seen = new Map();
    for (const element of document.querySelectorAll("body *:not(script, style, mjx-container *)")) {
        const hasText = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        if (!hasText || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        const look = [style.color, style.fontSize, style.fontWeight];
        for (let ground = element; ground; ground = ground.parentElement) {
            look.push(getComputedStyle(ground).backgroundColor);
        }
        seen.set(look.filter(part => part !== "rgba(0, 0, 0, 0)").join(), element);
    }
    const found = await axe.run({include: [...seen.values()]}, {runOnly: ["color-contrast"]});
    return found.violations.flatMap(rule => rule.nodes.map(
        node => `${mode}: ${node.html.slice(0, 200)}: ${node.failureSummary}`));
}"""

STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"


@pytest.mark.slow
def test_axe_finds_nothing_against_its_rules(visit: Visit) -> None:
    visit.page.add_script_tag(path=AXE)
    tolerated = {rule: selector for rule, (selector, _) in TOLERATED.items()}
    options = {"rules": {"color-contrast": {"enabled": False}}}
    assert visit.page.evaluate(FINDINGS, [options, tolerated]) == []


@pytest.mark.slow
def test_pages_are_bound_into_one_pdf_with_an_outline_and_links(
    html: Path, browser: Browser
) -> None:
    parts = pdf.parts_of(build.BOOK / "_toc.yml")
    assert [name for names in parts.values() for name in names] == PAGES[:-1]
    chosen = {"": ["intro"], "Learn": ["what-is-pruning", "magnitude-and-its-cliff"]}
    book: Any = PdfReader(BytesIO(pdf.bind(browser, html, chosen)))
    intro, part, chapters = book.outline
    titles = [chapter.title for chapter in chapters]
    assert part.title == "Learn" and titles[0].startswith("1. ") and titles[1].startswith("2. ")
    starts = [book.get_destination_page_number(item) for item in (intro, *chapters)]
    assert starts[0] == 0 and starts == sorted(set(starts))
    for i, sheet in enumerate(book.pages):
        assert i == 0 or sheet.extract_text().split()[-1] == str(i + 1)
    notes = [note.get_object() for sheet in book.pages for note in sheet.get("/Annots", [])]
    assert not [note for note in notes if "file:" in str(note.get("/A"))]
    inside = {note["/Dest"][0] for note in notes if isinstance(note.get("/Dest"), list)}
    assert book.pages[starts[1]].indirect_reference in inside  # from the first page
    assert "magnitude" in "".join(sheet.extract_text() for sheet in book.pages)
    assert "check_parameters" not in book.pages[starts[1]].extract_text()  # folded code


# After all that look at the page as it was opened; on a phone the colours are the same.
@pytest.mark.slow
@pytest.mark.parametrize(
    "visit", [v for v in VISITS if "desktop" in v], indirect=True, ids="-".join
)
def test_text_stands_out_in_light_and_dark(visit: Visit) -> None:
    visit.page.add_script_tag(path=AXE)
    visit.page.add_style_tag(content=STILL)
    visit.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    for mode in ("light", "dark"):
        assert visit.page.evaluate(CONTRAST, mode) == []


@pytest.mark.slow
def test_search_finds_a_word(html: Path, page: Page) -> None:
    visit = Visit(page, (html / "search.html").as_uri() + "?q=pruning")
    page.locator("#search-results li").first.wait_for()
    page.locator("#search-results li a").first.click()
    page.locator("article h1").wait_for()
    assert "search.html" not in page.url
    assert visit.faults == []


@pytest.mark.slow
def test_search_starts_from_the_one_button(html: Path, page: Page) -> None:
    visit = Visit(page, (html / "intro.html").as_uri())
    buttons = page.locator(".search-button:visible, .search-button__button:visible")
    if buttons.count() == 0:
        page.locator(".primary-toggle:visible").first.click()
    assert buttons.count() == 1
    buttons.click()
    field = page.locator("input[name=q]:visible")
    field.fill("pruning")
    field.press("Enter")
    page.locator("#search-results li").first.wait_for()
    assert visit.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES[:2])
def test_page_turns_dark(html: Path, page: Page, name: str) -> None:
    visit = Visit(page, (html / f"{name}.html").as_uri())
    for _ in range(3):
        page.locator(".theme-switch-button:visible").first.click()
        if page.locator("html").get_attribute("data-theme") == "dark":
            break
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in re.findall(r"\d+", colour)[:3]) < 64, colour
    assert visit.faults == []


# Paper and phones

# Words in colours whose contrast with white is below 4.5:1 (WCAG 1.4.3).
FAINT_ON_PAPER = """() => {
    const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
        .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    return [...document.querySelectorAll("article *:not(script, style)")].filter(element =>
        [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
        && element.checkVisibility()
        && 1.05 / (light(getComputedStyle(element).color) + 0.05) < 4.5
    ).map(element => `${element.className}: ${element.textContent.slice(0, 60)}`);
}"""
THEME = "document.documentElement.dataset.theme"
STATIC = build.BOOK / "_static"


@pytest.mark.slow
def test_dark_page_is_printed_dark_on_white(html: Path, page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    visit = Visit(page, (html / "swd-on-cifar10.html").as_uri())
    page.add_style_tag(content=STILL)
    body, code, value = ("article p", ".cell_input .n", ".cell_input .mi")
    assert all(page.locator(kind).count() for kind in (body, code, value))
    assert page.evaluate(FAINT_ON_PAPER)  # pale on the screen
    page.emulate_media(color_scheme="dark", media="print")
    page.wait_for_function(f"{THEME} === 'light'")
    assert page.evaluate(FAINT_ON_PAPER) == []
    page.emulate_media(color_scheme="dark", media="screen")
    page.wait_for_function(f"{THEME} === 'dark'")
    assert visit.faults == []


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_theme_comes_back_after_each_printing(browser: Browser, theme: str) -> None:
    with tab(browser, WIDTHS["desktop"]) as page:
        page.set_content(f"<html data-theme={theme}>")
        page.add_script_tag(path=STATIC / "print-light.js")
        page.evaluate(f"seen = []; addEventListener('beforeprint', () => seen.push({THEME}))")
        for count in (1, 2):
            page.pdf()  # tells beforeprint and the query of the media
            page.wait_for_function(f"!matchMedia('print').matches && {THEME} === '{theme}'")
            assert page.evaluate("seen") == ["light"] * count
        for name, expected in (("beforeprint", "light"), ("afterprint", theme)):
            page.evaluate(f"dispatchEvent(new Event('{name}'))")
            assert page.evaluate(THEME) == expected


# What a cell printed and cannot be seen at once: its first words.
CUT_OFF = """kind => [...document.querySelectorAll(`${kind} .cell_output .stream pre`)]
    .filter(printed => printed.scrollWidth > printed.closest(".output").clientWidth)
    .map(printed => printed.textContent.trim().slice(0, 40))"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scale-out", "smaller-networks"])
def test_printed_words_wrap_on_a_phone_and_columns_do_not(
    html: Path, browser: Browser, name: str
) -> None:
    with tab(browser, WIDTHS["phone"]) as page:
        page.goto((html / f"{name}.html").as_uri())
        assert page.locator(".cell_output .stream pre").count() > 5
        assert page.evaluate(CUT_OFF, ".cell:not(.tag_columns)") == []
        columns = page.locator(".tag_columns .cell_output .stream pre").count()
        assert len(page.evaluate(CUT_OFF, ".tag_columns")) == columns
        assert (columns > 0) == (name == "smaller-networks")


# Slides

DECKS = [name for name in NOTEBOOKS if tagged(read(name), "slide")]
ON_SHOW = "[...document.querySelectorAll('section')].map(s => s.checkVisibility())"
LOOKS = """["notes", "dark"].map(id => document.getElementById(id).getAttribute("aria-pressed"))
    .concat(getComputedStyle(document.body).backgroundColor)"""
SWIPE = """across => {
    const touch = x => new Touch({identifier: 1, target: document.body, clientX: x, clientY: 300});
    const send = (name, touches) => document.body.dispatchEvent(
        new TouchEvent(name, {bubbles: true, touches, changedTouches: touches}));
    send("touchstart", [touch(200)]);
    send("touchend", [touch(200 + across)]);
}"""


def slide_shown(page: Page) -> int:
    """Return which slide is shown, the only one."""
    [number] = [i for i, shown in enumerate(page.evaluate(ON_SHOW)) if shown]
    assert page.locator("#count").inner_text().startswith(f"{number + 1} of ")
    return int(number)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECKS)
def test_deck_can_be_shown_and_read(html: Path, page: Page, name: str) -> None:
    visit = Visit(page, (html / "slides" / f"{name}.html").as_uri())
    last = len(page.evaluate(ON_SHOW)) - 1
    page.add_script_tag(path=AXE)
    for number in range(last + 1):
        assert slide_shown(page) == number
        assert page.evaluate(OVERFLOW) <= 0
        assert visit.is_on_phone or page.evaluate(TALLER) <= 0
        page.keyboard.press("ArrowRight")
    assert slide_shown(page) == last > 4
    for image in page.locator("img").all():
        assert len((image.get_attribute("alt") or "").split()) > 8
    page.get_by_role("button", name="Notes").click()
    page.emulate_media(media="print")
    assert all(page.evaluate(ON_SHOW))
    for mode in ("light", "dark"):
        page.evaluate("mode => { document.documentElement.dataset.theme = mode; }", mode)
        assert page.evaluate(FINDINGS, [{}, {"empty-table-header": "th"}]) == []
    assert page.locator("mjx-merror").count() == 0
    assert not re.search(r"\\\(|\\\[|\$\$|\{\w+\}", page.evaluate(VISIBLE_TEXT))
    assert visit.faults == []


@pytest.mark.slow
def test_slides_follow_keys_buttons_swipes_and_the_address(html: Path, page: Page) -> None:
    visit = Visit(page, (html / "slides" / f"{DECKS[0]}.html").as_uri() + "#3")
    assert slide_shown(page) == 2
    for key, number in (("ArrowRight", 3), ("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1)):
        page.keyboard.press(key)
        assert slide_shown(page) == number
    for across, number in ((-120, 2), (120, 1), (-20, 1)):
        page.evaluate(SWIPE, across)
        assert slide_shown(page) == number
    page.get_by_role("button", name="Next slide").click()
    assert slide_shown(page) == 2 and page.url.endswith("#3")
    notes = page.get_by_role("button", name="Notes")
    notes.click()
    assert notes.get_attribute("aria-pressed") == "true"
    assert visit.faults == []


@pytest.mark.slow
def test_space_and_page_keys_read_a_tall_slide_to_its_end(html: Path, page: Page) -> None:
    visit = Visit(page, (html / "slides" / f"{DECKS[0]}.html").as_uri() + "#3")
    page.get_by_role("button", name="Notes").click()  # with which slides are not made to fit
    page.evaluate("document.activeElement.blur()")  # else the space bar presses the button
    page.add_style_tag(content="main > section { height: 250vh; overflow: hidden; }")
    for on, back in ((" ", "Shift+ "), ("PageDown", "PageUp")):
        places = []
        for key in (on, on, on, back, "ArrowRight", on, back, back):
            page.keyboard.press(key)
            places.append((slide_shown(page), page.evaluate("Math.round(scrollY)")))
        part, end = places[0][1], places[1][1]
        assert 0 < part < 844 < end and page.evaluate("innerHeight") == 844
        seen = [(2, part), (2, end), (3, 0), (2, 0), (3, 0), (3, part), (3, 0), (2, 0)]
        assert places == seen
    page.keyboard.press(" ")
    page.keyboard.press("ArrowRight")
    assert slide_shown(page) == 3
    assert visit.faults == []


@pytest.mark.slow
def test_letters_do_nothing_and_a_button_turns_the_slides_dark(html: Path, page: Page) -> None:
    visit = Visit(page, (html / "slides" / f"{DECKS[0]}.html").as_uri())
    light, button = page.evaluate(LOOKS), page.get_by_role("button", name="Dark")
    page.keyboard.press("n")
    page.keyboard.press("d")
    assert page.evaluate(LOOKS) == light and light[:2] == ["false", "false"]
    page.emulate_media(color_scheme="dark")
    page.locator("#dark[aria-pressed=true]").wait_for()
    dark = page.evaluate(LOOKS)
    assert dark[2] != light[2]
    for key, looks in ((" ", light), ("Enter", dark)):
        button.press(key)
        assert page.evaluate(LOOKS) == looks and slide_shown(page) == 0
    assert visit.faults == []


# Figures


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_are_vectors_and_paler_on_a_dark_page(
    html: Path, browser: Browser, scheme: Any
) -> None:
    with tab(browser, WIDTHS["desktop"]) as page:  # on a phone hardly a pixel is all ink
        page.emulate_media(color_scheme=scheme)
        visit = Visit(page, (html / "schedules.html").as_uri())
        figure = page.locator('.cell_output img[src$=".svg"]').first
        drawn = Image.open(BytesIO(figure.screenshot())).convert("RGB")
    pixels = np.asarray(drawn).reshape(-1, 3)
    ink, pale = ((pixels == tuple(bytes.fromhex(c[1:]))).all(1).sum() for c in (INK, PALE_INK))
    assert (ink > pale) == (scheme == "light")  # smoothed edges have both
    assert visit.faults == []


# The live model and the slider

WIDGETS = build.BOOK / "_ext"
PROBLEM: dict[str, Any] = {
    "hessian": [[1.0, 0.8], [0.8, 1.2]],
    "trained": [1.0, 1.5],
    "start": [1.3, 0.3],
    "steps": 400,
    "weightDecay": 5e-4,
}
DEFAULTS = {"aMin": 0.1, "aMax": 1e5, "rate": 0.02, "target": "smaller", "update": "gradient"}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"update": "proximal"},
    {"target": "none"},
    {"target": "first", "aMin": 30.0},
    {"target": "second", "update": "proximal", "rate": 0.3},
    {"aMin": 1e3, "aMax": 1e3, "rate": 0.05},
    {"aMin": 3e3, "aMax": 1.0},
    {"aMax": 3e6, "update": "proximal"},
]


def path_by_library(problem: dict[str, Any], settings: dict[str, Any]) -> list[list[float]]:
    """Return the weights before the first and after each step of swdlib's SWD with torch's SGD."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    model.load_state_dict({"weight": torch.tensor([problem["start"]], dtype=torch.float64)})
    fixed = {"first": [[0.0, 1.0]], "second": [[1.0, 0.0]]}.get(settings["target"])
    swd = SelectiveWeightDecay(
        model,
        sparsity=0.0 if settings["target"] == "none" else 0.5,
        steps=problem["steps"],
        weight_decay=problem["weightDecay"],
        strength=Exponential(settings["aMin"], settings["aMax"]),
        criterion=(lambda parameter: torch.tensor(fixed)) if fixed else magnitude,
        update=settings["update"],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["rate"])
    swd.attach(optimizer)
    hessian, trained = (
        torch.tensor(problem[name], dtype=torch.float64) for name in ("hessian", "trained")
    )
    points = [model.weight[0].tolist()]
    for _ in range(problem["steps"]):
        optimizer.zero_grad()
        away = model.weight[0] - trained
        (away @ hessian @ away / 2).backward()
        optimizer.step()
        points.append(model.weight[0].tolist())
    return points


@pytest.fixture(scope="module")
def script(browser: Browser) -> Iterator[Page]:
    """Return an empty page with the numbers of live model and schedules, but no pictures."""
    tab = browser.new_page()
    for name in ("swd-model.js", "swd-schedule.js"):
        tab.add_script_tag(path=WIDGETS / name)
    yield tab
    tab.close()


def test_picture_of_the_live_model_without_scripts_is_that_of_its_start() -> None:
    found = path_of(PROBLEM | DEFAULTS)
    np.testing.assert_allclose(found, path_by_library(PROBLEM, DEFAULTS), rtol=1e-9)


@pytest.mark.parametrize("changed", SETTINGS)
def test_live_model_takes_the_steps_of_the_library(script: Page, changed: dict[str, Any]) -> None:
    settings = DEFAULTS | changed
    found = script.evaluate("([p, s]) => swdModel.path(p, s)", [PROBLEM, settings])
    assert len(found) == PROBLEM["steps"] + 1
    np.testing.assert_allclose(found, path_by_library(PROBLEM, settings), rtol=1e-9, atol=1e-9)


def test_live_model_diverges_where_the_library_does(script: Page) -> None:
    # Past the bound rounding errors grow as the weights do, so that only what is before is alike.
    settings = DEFAULTS | {"rate": 0.2}
    problem = PROBLEM | {"steps": 1000}
    found = script.evaluate("([p, s]) => swdModel.run(p, s)", [problem, settings])
    expected = np.array(path_by_library(problem, settings))
    assert found["diverged"] == (np.abs(expected) >= 1e3).any(axis=1).argmax() > 0
    assert found["product"] == pytest.approx(10)
    written = script.evaluate("([p, r]) => swdModel.csv(p, r)", [problem, found])
    rows = np.loadtxt(written.splitlines(), delimiter=",", skiprows=1)
    assert rows[:, 0].tolist() == list(range(found["diverged"]))
    assert (np.abs(rows[:, 1:3]) < 1e3).all()
    stable = 880  # from here on rate * a * mu is above 2
    np.testing.assert_allclose(found["points"][:stable], expected[:stable], rtol=1e-9, atol=1e-9)


def test_live_model_selects_the_first_of_two_equal_weights(script: Page) -> None:
    problem = PROBLEM | {"start": [0.5, -0.5], "trained": [0.5, -0.5], "steps": 3}
    settings = DEFAULTS | {"aMin": 1e4}
    found = script.evaluate("([p, s]) => swdModel.path(p, s)", [problem, settings])
    np.testing.assert_allclose(found, path_by_library(problem, settings), rtol=1e-9, atol=1e-9)
    assert found[1] == [0.45, -0.5]


def test_live_model_knows_the_end_of_the_path(script: Page) -> None:
    hessian, trained = (np.array(PROBLEM[name]) for name in ("hessian", "trained"))
    for i in range(2):
        least = script.evaluate("([p, i]) => swdModel.constrained(p, i)", [PROBLEM, i])
        penalty = 1e12 * np.diag(np.arange(2) == i)
        limit = np.linalg.solve(hessian + penalty, hessian @ trained)
        np.testing.assert_allclose(least, limit, atol=1e-9)
        loss = script.evaluate("([p, w]) => swdModel.lossOf(p, w)", [PROBLEM, least])
        away = limit - trained
        np.testing.assert_allclose(loss, away @ hessian @ away / 2, atol=1e-9)


def test_live_model_gives_its_numbers(script: Page) -> None:
    written = script.evaluate(
        "([p, s]) => swdModel.csv(p, swdModel.run(p, s))", [PROBLEM, DEFAULTS]
    )
    header, *rows = (line.split(",") for line in written.splitlines())
    assert header == ["step", "w1", "w2", "loss"]
    found = np.array(rows, dtype=float)
    assert found[:, 0].tolist() == list(range(PROBLEM["steps"] + 1))
    np.testing.assert_allclose(found[:, 1:3], path_by_library(PROBLEM, DEFAULTS), atol=1e-9)
    away = found[:, 1:3] - PROBLEM["trained"]
    loss = ((away @ np.array(PROBLEM["hessian"])) * away).sum(axis=1) / 2
    np.testing.assert_allclose(found[:, 3], loss, atol=1e-9)


PUBLISHED: dict[str, Any] = {
    "growth": "exponential",
    **{"aMin": 0.1, "aMax": 1e5, "growthEnd": 1.0},
    **{"lrSchedule": "triangle", "highest": 0.2},
    **{"momentum": 0.9, "nesterov": True, "weightDecay": 5e-4, "steps": 180},
}
TUNED: list[dict[str, Any]] = [
    {},
    {"growth": "linear", "growthEnd": 0.65},
    {"growth": "cosine", "lrSchedule": "steps", "highest": 0.1},
    {"growth": "cosine", "aMax": 1e4, "growthEnd": 0.9, "nesterov": False},
    {"growth": "cubic", "lrSchedule": "cosine"},
    {"growth": "per_step"},
    {"growth": "per_step", "lrSchedule": "steps", "growthEnd": 0.5},
    {"growth": "per_step", "lrSchedule": "cosine", "growthEnd": 0.35, "highest": 0.7},
    {"growth": "constant", "aMax": 3e4},
    {"aMin": 3e3, "aMax": 1.0, "lrSchedule": "constant", "growthEnd": 0.05},
]


def schedules_of(settings: dict[str, Any]) -> tuple[Schedule, Schedule]:
    """Return the learning rate and the strength as swdlib has them."""
    kind, highest = settings["lrSchedule"], settings["highest"]
    constant = kind == "constant"
    rate: Schedule = Constant(highest) if constant else LR_SCHEDULES[kind](highest)
    if settings["growth"] == "constant":
        return rate, Constant(settings["aMax"])
    ends = settings["aMin"], settings["aMax"], settings["growthEnd"]
    return rate, growing(settings["growth"], *ends, rate)


@pytest.mark.parametrize("changed", TUNED)
def test_tuned_schedules_are_those_of_the_library(script: Page, changed: dict[str, Any]) -> None:
    settings, places = PUBLISHED | changed, np.linspace(0, 1, 11).tolist()
    values = "[swdSchedule.rate(s, t), swdSchedule.strength(s, t)]"
    found = script.evaluate(f"([s, places]) => places.map(t => {values})", [settings, places])
    expected = [[schedule(t) for schedule in schedules_of(settings)] for t in places]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("changed", TUNED)
def test_tuned_schedules_are_summed_over_their_steps(script: Page, changed: dict[str, Any]) -> None:
    settings = PUBLISHED | changed
    bound, found, written = script.evaluate(
        "s => [swdSchedule.bound(s), swdSchedule.run(s), swdSchedule.csv(swdSchedule.run(s))]",
        settings,
    )
    places = [step / 180 for step in range(180)]
    rate, strength = (np.array([f(t) for t in places]) for f in schedules_of(settings))
    products = rate * strength * 5e-4
    header, *rows = (line.split(",") for line in written.splitlines())
    assert header == ["step", "progress", "rate", "strength", "product"]
    columns = np.column_stack([range(180), places, rate, strength, products])
    np.testing.assert_allclose(np.array(rows, dtype=float), columns, rtol=1e-9)
    assert found["largest"]["product"] == pytest.approx(products.max(), rel=1e-9)
    assert found["largest"]["progress"] == places[products.argmax()]
    assert [row["progress"] for row in found["above"]] == [
        t for t, product in zip(places, products, strict=True) if product > bound
    ]
    assert found["push"] == pytest.approx(10 * products.sum(), rel=1e-9)


@pytest.mark.parametrize(("nesterov", "stated"), [(True, 1.357), (False, 3.8)])
def test_past_the_bound_a_weight_grows(script: Page, nesterov: bool, stated: float) -> None:
    bound = script.evaluate("s => swdSchedule.bound(s)", PUBLISHED | {"nesterov": nesterov})
    assert bound == pytest.approx(stated, abs=5e-4)
    for share, grows in ((0.99, False), (1.01, True)):
        weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=share * bound, momentum=0.9, nesterov=nesterov)
        for _ in range(1000):
            weight.grad = weight.detach().clone()
            optimizer.step()
        assert (abs(weight.item()) > 1) == grows


LIVE, SLIDER = "lagrangian-smoothing", "schedules"


def move(slider: Locator, share: float) -> None:
    """Bring a slider to a share of its way: with a finger on a phone, else with the mouse."""
    slider.scroll_into_view_if_needed()
    box, page, thumb = slider.bounding_box(), slider.page, 16
    assert box is not None

    def place(share: float) -> tuple[float, float]:
        x = box["x"] + thumb / 2 + share * (box["width"] - thumb)
        return x, box["y"] + box["height"] / 2

    if page.evaluate("navigator.maxTouchPoints"):
        page.touchscreen.tap(*place(share))
        return
    page.mouse.move(*place(slider.evaluate("s => (s.value - s.min) / (s.max - s.min)")))
    page.mouse.down()
    page.mouse.move(*place(share), steps=4)
    page.mouse.up()


@pytest.mark.slow
def test_live_model_is_driven_with_the_keyboard(html: Path, page: Page) -> None:
    visit = Visit(page, (html / f"{LIVE}.html").as_uri())
    model, status = page.locator(".swd-model"), page.locator(".swd-model [role=status]")
    first = status.inner_text()
    problem = json.loads(model.get_attribute("data-problem") or "")
    end = path_by_library(problem, DEFAULTS)[-1]
    assert f"End: w = ({end[0]:.3f}, {end[1]:.3f})" in first

    rate = page.get_by_label("learning rate")
    rate.press("End")
    assert rate.get_attribute("aria-valuetext") == "0.7"
    assert f"of {problem['steps']}." in status.inner_text()
    diverged = re.match(r"Diverged at step (\d+)", status.inner_text())
    link = unquote(model.get_by_role("link", name="CSV").get_attribute("href") or "")
    assert diverged and len(link.splitlines()) == int(diverged[1]) + 1
    page.get_by_label("update rule").select_option("proximal")
    assert "it has no bound" in status.inner_text()
    with page.expect_download() as download:
        model.get_by_role("link", name="CSV").press("Enter")
    steps = download.value.path().read_text("utf-8").splitlines()
    assert len(steps) == problem["steps"] + 2 and steps[1].startswith("0,")
    page.get_by_label("strength at the start").press("ArrowRight")
    assert page.get_by_label("strength at the start").get_attribute("aria-valuetext") == "0.3"
    picture = model.get_by_role("img")
    assert status.inner_text() in (picture.get_attribute("aria-label") or "")
    model.get_by_role("button", name="Reset").press("Enter")
    page.wait_for_function(
        "words => document.querySelector('.swd-model p').textContent === words", arg=first
    )
    assert visit.faults == []
    assert page.evaluate(OVERFLOW) <= 0


@pytest.mark.slow
def test_live_model_is_driven_with_a_mouse_or_a_finger(html: Path, page: Page) -> None:
    visit = Visit(page, (html / f"{LIVE}.html").as_uri())
    line, status = page.locator(".swd-model polyline"), page.locator(".swd-model p")
    end = page.get_by_label("strength at the end")
    move(end, 0)
    assert end.get_attribute("aria-valuetext") == "1"
    problem = json.loads(page.locator(".swd-model").get_attribute("data-problem") or "")
    x, y = path_by_library(problem, DEFAULTS | {"aMax": 1.0})[-1]
    assert f"End: w = ({x:.3f}, {y:.3f})" in status.inner_text()
    drawn = (line.get_attribute("points") or "").split()[-1].split(",")
    scale = 376 / 3.25  # of the picture, in which -0.5 is at 24 and 2.75 at its end
    expected = [24 + (x + 0.5) * scale, (2.75 - y) * scale]
    np.testing.assert_allclose([float(part) for part in drawn], expected, atol=0.1)
    assert visit.faults == []


@pytest.mark.slow
def test_buttons_of_the_live_model_set_its_fields(html: Path, page: Page) -> None:
    visit = Visit(page, (html / f"{LIVE}.html").as_uri())
    model, status = page.locator(".swd-model"), page.locator(".swd-model [role=status]")
    assert model.locator("animateMotion").evaluate("motion => motion.getStartTime()") >= 0
    tries: dict[str, dict[str, Any]] = {
        "Start at 1,000": {"aMin": 1000.0},
        "End at 1,000": {"aMax": 1000.0},
        "The same, proximal": {"rate": 0.2, "update": "proximal"},
    }
    for words, changed in tries.items():
        model.get_by_role("button", name=words).click()
        problem = json.loads(model.get_attribute("data-problem") or "")
        x, y = path_by_library(problem, DEFAULTS | changed)[-1]
        expect(status).to_contain_text(f"End: w = ({x:.3f}, {y:.3f})".replace("-", "−"))
    model.get_by_role("button", name="Learning rate 0.2").click()
    expect(status).to_contain_text("Diverged at step")
    assert page.get_by_label("update rule").input_value() == "gradient"
    assert visit.faults == []


@pytest.mark.slow
def test_live_model_is_in_step_when_the_browser_comes_back(html: Path, page: Page) -> None:
    page.goto((html / f"{LIVE}.html").as_uri())
    rate, status = page.get_by_label("learning rate"), page.locator(".swd-model [role=status]")
    first = (rate.input_value(), status.inner_text())
    rate.press("End")
    page.goto((html / f"{PAGES[0]}.html").as_uri())
    page.go_back()
    assert (rate.input_value(), status.inner_text()) == first


@pytest.mark.slow
def test_every_setting_of_the_live_model_is_drawn(html: Path, page: Page) -> None:
    visit = Visit(page, (html / f"{LIVE}.html").as_uri())
    for target in ("smaller", "first", "second", "none"):
        page.get_by_label("target").select_option(target)
        for key in ("Home", "End"):
            page.get_by_label("strength at the end").press(key)
            drawn = page.locator(".swd-model polyline").get_attribute("points") or ""
            numbers = [float(part) for part in re.split("[ ,]", drawn)]
            assert len(numbers) > 100 and np.isfinite(numbers).all()
    assert visit.faults == []


def assert_drawn(page: Page, changed: dict[str, Any]) -> None:
    """Check both lines of the picture against the library's schedules."""
    settings, places = PUBLISHED | changed, [step / 180 for step in range(181)]
    rate, strength = (np.array([f(t) for t in places]) for f in schedules_of(settings))
    lines = page.locator(".swd-schedule polyline:not(.above)").all()
    drawn = [
        [spot.split(",") for spot in (line.get_attribute("points") or "").split()] for line in lines
    ]
    # Heights from the top: 0.001 to ten million, and 1e-10 to ten thousand.
    heights = (
        np.interp(np.log10(strength), (-3, 7), (206, 26)),
        np.interp(np.log10(rate * strength * 5e-4), (-10, 4), (426, 246)),
    )
    for spots, expected in zip(drawn, heights, strict=True):
        x, y = np.array(spots, dtype=float).T
        np.testing.assert_allclose(x, np.interp(places, (0, 1), (40, 390)), atol=0.06)
        np.testing.assert_allclose(y, expected, atol=0.06)


@pytest.mark.slow
def test_schedules_are_drawn_as_they_are_tuned(html: Path, page: Page) -> None:
    visit = Visit(page, (html / f"{SLIDER}.html").as_uri())
    tuned, status = page.locator(".swd-schedule"), page.locator(".swd-schedule [role=status]")
    first, above = status.inner_text(), tuned.locator("polyline.above")
    assert "Nesterov's momentum is 1.357. It stays below the bound." in first
    assert "Largest decay rate: 0.368, at 93.3 % of training" in first
    assert "Total decay P over 180 steps: 129." in first
    assert_drawn(page, {})

    growth, end = tuned.get_by_label("growth of the"), tuned.get_by_label("strength at the end")
    growth.press("ArrowDown")
    assert growth.input_value() == "linear"
    assert "first passes the bound at 16.7 % of training" in status.inner_text()
    assert "above it in 130 of 180 steps: there training diverges" in status.inner_text()
    assert len((above.get_attribute("points") or "").split()) == 131
    assert_drawn(page, {"growth": "linear"})
    for key in ("Tab", "Tab", "ArrowLeft"):
        page.keyboard.press(key)
    assert end.get_attribute("aria-valuetext") == "30,000"
    assert "It stays below" in status.inner_text() and above.count() == 0
    assert_drawn(page, {"growth": "linear", "aMax": 3e4})
    tuned.get_by_label("momentum of 0.9").select_option("heavy ball")
    assert "bound of heavy-ball momentum is 3.8" in status.inner_text()

    with page.expect_download() as download:
        tuned.get_by_role("link", name="CSV").press("Enter")
    steps = download.value.path().read_text("utf-8").splitlines()
    assert len(steps) == 181 and steps[1].startswith("0,0,0.02,0.1,")
    assert status.inner_text() in (tuned.get_by_role("img").get_attribute("aria-label") or "")
    tuned.get_by_role("button", name="Reset").press("Enter")
    page.wait_for_function(
        "words => document.querySelector('.swd-schedule p').textContent === words", arg=first
    )
    assert_drawn(page, {})
    assert visit.faults == []
    assert page.evaluate(OVERFLOW) <= 0


@pytest.mark.slow
def test_schedules_are_tuned_with_a_mouse_or_a_finger(html: Path, page: Page) -> None:
    visit = Visit(page, (html / f"{SLIDER}.html").as_uri())
    tuned, status = page.locator(".swd-schedule"), page.locator(".swd-schedule [role=status]")
    move(tuned.get_by_label("strength at the end"), 1)
    assert tuned.locator("polyline.above").count() == 1
    assert_drawn(page, {"aMax": 3e6})
    move(tuned.get_by_label("strength at the start"), 0)
    move(tuned.get_by_label("growth ends at"), 9 / 19)
    move(tuned.get_by_label("highest learning rate"), 0)
    tuned.get_by_label("learning-rate schedule").select_option("steps")
    changed = {"aMin": 0.01, "aMax": 3e6, "growthEnd": 0.5, "highest": 1e-3, "lrSchedule": "steps"}
    assert_drawn(page, changed)
    assert "Total decay P over 180 steps: 60.3." in status.inner_text()
    tuned.get_by_label("growth of the").select_option("constant")
    assert tuned.get_by_label("strength at the start").is_disabled()
    assert_drawn(page, changed | {"growth": "constant"})
    assert visit.faults == []


@pytest.mark.slow
def test_schedules_are_in_step_when_the_browser_comes_back(html: Path, page: Page) -> None:
    page.goto((html / f"{SLIDER}.html").as_uri())
    end, status = page.get_by_label("strength at the end"), page.locator(".swd-schedule p")
    first = (end.input_value(), status.inner_text())
    end.press("End")
    page.get_by_label("growth of the").select_option("linear")
    page.goto((html / f"{PAGES[0]}.html").as_uri())
    page.go_back()
    assert (end.input_value(), status.inner_text()) == first
    assert_drawn(page, {})


@pytest.mark.slow
def test_schedules_are_drawn_on_paper_and_without_scripts(html: Path, browser: Browser) -> None:
    address = (html / f"{SLIDER}.html").as_uri()
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(address)
    still = page.locator(".swd-schedule img")
    assert "can be tuned" in page.locator(".swd-schedule p").inner_text()
    assert still.is_visible() and still.evaluate("image => image.naturalWidth") > 100
    context.close()
    with tab(browser, WIDTHS["desktop"]) as page:
        page.emulate_media(color_scheme="dark", media="print")
        page.goto(address)
        tuned = page.locator(".swd-schedule")
        assert tuned.get_by_role("img").is_visible()
        assert not tuned.locator("button, a").first.is_visible()
        colours = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
        assert tuned.evaluate(colours) == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
        assert_drawn(page, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", [PAGES[0], SLIDER])
def test_slider_shows_one_frame_at_a_time(html: Path, page: Page, name: str) -> None:
    visit = Visit(page, (html / f"{name}.html").as_uri())
    frames, slider = page.locator(".swd-frames img"), page.get_by_label("shown")
    last = frames.count() - 1
    assert last > 3
    for key, number in (("Home", 0), ("ArrowRight", 1), ("End", last), ("ArrowLeft", last - 1)):
        slider.press(key)
        shown = [i for i in range(last + 1) if frames.nth(i).is_visible()]
        assert shown == [number]
        label = page.locator(".swd-frames p").nth(number).text_content()
        assert slider.get_attribute("aria-valuetext") == label
        assert page.locator(".swd-frames b").inner_text() == label
    assert visit.faults == []


def test_slider_is_in_step_when_the_browser_comes_back(browser: Browser, tmp_path: Path) -> None:
    counts = [0] * HISTOGRAM_BINS
    shown = weights_over_training({str(k): {"zeros": k, "counts": counts} for k in range(3)})
    (tmp_path / "page.html").write_text(shown.text, encoding="utf-8")
    (tmp_path / "other.html").write_text("", encoding="utf-8")
    with tab(browser, WIDTHS["desktop"]) as page:
        page.goto((tmp_path / "page.html").as_uri())
        page.get_by_label("shown").press("End")
        page.goto((tmp_path / "other.html").as_uri())
        page.go_back()
        value = int(page.get_by_label("shown").input_value())
        assert [i for i in range(3) if page.locator("img").nth(i).is_visible()] == [value]


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_slider_plays_once_unless_the_reader_wants_no_motion(
    browser: Browser, tmp_path: Path, motion: Any
) -> None:
    counts = [0] * HISTOGRAM_BINS
    histograms = {str(k): {"zeros": k, "counts": counts} for k in range(4)}
    shown = weights_over_training(histograms, start=3, play=True)
    scripts = "".join(
        f"<script>{(WIDGETS / f'swd-{name}.js').read_text('utf-8')}</script>"
        for name in ("widgets", "frames")
    )
    (tmp_path / "page.html").write_text(shown.text + scripts, encoding="utf-8")
    with tab(browser, WIDTHS["desktop"]) as page:
        page.emulate_media(reduced_motion=motion)
        page.goto((tmp_path / "page.html").as_uri())
        seen = page.locator(".swd-frames b")
        if motion == "reduce":
            page.wait_for_timeout(600)
            assert seen.inner_text() == "3"
            page.get_by_role("button", name="Play").click()
        for number in ("0", "1", "3"):
            page.wait_for_function(f"document.querySelector('b').textContent === '{number}'")
        page.get_by_role("button", name="Play").click()
        page.get_by_role("button", name="Pause").click()
        assert seen.inner_text() == "0"
        page.get_by_label("shown").press("ArrowRight")
        page.wait_for_timeout(600)
        assert seen.inner_text() == "1"


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("media", ["screen", "print"])
def test_slider_shows_a_few_frames_on_paper_and_without_scripts(
    browser: Browser, tmp_path: Path, media: Any, scripts: bool
) -> None:
    counts = [0] * HISTOGRAM_BINS
    shown = weights_over_training({f"at {k}": {"zeros": k, "counts": counts} for k in range(5)})
    theme = "<style>[hidden] { display: none !important; }</style>"
    (tmp_path / "page.html").write_text(theme + shown.text, encoding="utf-8")
    context = browser.new_context(java_script_enabled=scripts, offline=True)
    page = context.new_page()
    page.emulate_media(media=media)
    page.goto((tmp_path / "page.html").as_uri())
    names, slider = page.locator(".swd-frames p").all(), page.get_by_label("shown")
    seen = [i for i, image in enumerate(page.locator("img").all()) if image.is_visible()]
    moves = scripts and media == "screen"
    assert slider.is_visible() == moves
    assert seen == ([0] if moves else [0, 2, 4])
    named = [name.inner_text() for name in names if name.is_visible()]
    assert named == [f"at {i}" for i in seen if not moves]
    context.close()


# The points of runs

RUNS_SHOWN = {"swd-on-cifar10": 40, "swd-on-filters": 20}  # page -> runs in its figure


def behind(point: Locator) -> str:
    """Return the words for the run of a point, from the record that the point names."""
    named = (point.get_attribute("aria-label") or "")[-8:]
    [path] = [path for path in RECORDS if path.stem[-16:-8] == named]
    record = load(path)
    config, last = record.config, record.final
    return (
        f"{method_of(config)}, sparsity {100 * config['sparsity']:g} %, seed {config['seed']}, "
        f"highest learning rate {config['lr']:g}: Top-1 {last['renewed_top1']:.2f} %, "
        f"{last['parameters']:,} parameters kept, record {named}"
    )


def middle(point: Locator) -> tuple[float, float]:
    """Return the place of a point once it is in sight."""
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    assert box
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS_SHOWN)
def test_run_behind_a_point_is_named_under_the_mouse(html: Path, page: Page, name: str) -> None:
    visit = Visit(page, (html / f"{name}.html").as_uri())
    points, status = page.locator(".swd-runs .run"), page.locator(".swd-runs [role=status]")
    assert points.count() == RUNS_SHOWN[name]
    words = [point.get_attribute("aria-label") for point in points.all()]
    assert status.inner_text() in words
    for i in (0, 7, -1):
        page.mouse.move(*middle(points.nth(i)))
        assert behind(points.nth(i)) == words[i]
        assert words[i] in status.inner_text().splitlines()
    assert page.evaluate(OVERFLOW) <= 0
    assert visit.faults == []


@pytest.mark.slow
def test_arrow_keys_move_from_run_to_run(html: Path, page: Page) -> None:
    visit = Visit(page, (html / "swd-on-cifar10.html").as_uri())
    points, status = page.locator(".swd-runs .run"), page.locator(".swd-runs [role=status]")
    page.locator(".swd-runs .run[tabindex='0']").focus()
    last = points.count() - 1
    keys = ("Home", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp", "End")
    for key, at in zip(keys, (0, 1, 2, 1, 0, 0, last), strict=True):
        page.keyboard.press(key)
        assert status.inner_text() == behind(points.nth(at))
        assert points.nth(at).evaluate("point => point === document.activeElement")
        assert page.locator(".swd-runs [tabindex='0']").count() == 1
    page.keyboard.press("Tab")
    assert page.locator(".swd-runs :focus").count() == 0  # one stop, not one a point
    assert visit.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_tap_names_the_nearest_run_or_all_that_lie_there(
    html: Path, browser: Browser, width: str
) -> None:
    context = browser.new_context(
        viewport={"width": WIDTHS[width], "height": 844}, has_touch=True, offline=True
    )
    page = context.new_page()
    visit = Visit(page, (html / "swd-on-cifar10.html").as_uri())
    points, status = page.locator(".swd-runs .run"), page.locator(".swd-runs [role=status]")
    for point in (points.last, points.first):
        x, y = middle(point)
        page.touchscreen.tap(x - 3, y - 3)
        told = status.inner_text().splitlines()
        assert behind(point) in told
        assert page.locator(".swd-runs .shown").count() == len(told)
    assert visit.faults == []
    context.close()


@pytest.mark.slow
def test_figure_of_runs_stands_alone_on_paper_and_names_a_run_without_scripts(
    html: Path, browser: Browser
) -> None:
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto((html / "swd-on-cifar10.html").as_uri())
    status = page.locator(".swd-runs [role=status]")
    assert status.inner_text().startswith("dense, ")
    page.emulate_media(media="print")
    assert page.locator(".swd-runs svg").is_visible() and not status.is_visible()
    context.close()


def test_ink_of_runs_follows_the_page() -> None:
    rules = (WIDGETS / "swd-runs.css").read_text("utf-8")
    assert all(f'[style*="{part}: {INK}"]' in rules for part in ("fill", "stroke"))


# Questions to check oneself, and how a page was made

ASKING = "what-is-pruning"


@pytest.mark.slow
def test_answers_open_one_at_a_time_with_the_keyboard(html: Path, page: Page) -> None:
    visit = Visit(page, (html / f"{ASKING}.html").as_uri())
    answers = page.locator(".quiz").first.locator("details")
    for i in (1, 0):
        answers.nth(i).locator("summary").press("Enter")
        shown = [answers.nth(k).locator("p").is_visible() for k in range(answers.count())]
        assert shown == [k == i for k in range(answers.count())]
    assert answers.nth(0).locator("p").inner_text().startswith("No.")
    assert page.locator(".quiz").count() == page.locator(".quiz .quiz-right").count() >= 3
    assert visit.faults == []


@pytest.mark.slow
def test_what_is_folded_can_be_read_on_paper_and_without_scripts(
    html: Path, browser: Browser
) -> None:
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto((html / f"{ASKING}.html").as_uri())
    folded = page.locator(".quiz details p, details.sd-dropdown p")
    assert folded.count() > 10
    assert not any(paragraph.is_visible() for paragraph in folded.all())
    page.locator(".quiz summary").first.click()
    assert folded.first.is_visible() or page.locator(".quiz details p").first.is_visible()
    page.emulate_media(media="print")
    assert all(paragraph.is_visible() for paragraph in folded.all())
    context.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_page_of_a_notebook_says_how_to_rerun_it(html: Path, name: str) -> None:
    text = (html / f"{name}.html").read_text("utf-8")
    assert text.count('sd-summary-text">Rerun this page<') == 1
    assert f"papermill {name}.ipynb out.ipynb" in re.sub("<[^>]+>", "", text)
    links = re.findall(r'href="(_downloads/[^"]+)"', text)
    assert f"{name}.ipynb" in {link.rpartition("/")[2] for link in links}
    figures = sum("plots." in cell.source for cell in read(name).cells if cell.cell_type == "code")
    tables = [link for link in links if link.endswith(".csv")]
    assert tables or not figures
    for link in tables:
        header, first, *_ = (html / link).read_text("utf-8").splitlines()
        assert header.startswith(("series,", "method,")) and first


@pytest.mark.slow
def test_downloaded_notebook_is_the_one_that_is_stored(html: Path) -> None:
    [found] = (html / "_downloads").glob(f"*/{ASKING}.ipynb")
    assert found.read_bytes() == (build.BOOK / f"{ASKING}.ipynb").read_bytes()


@pytest.mark.slow
def test_downloaded_notebook_runs_with_the_wheel_beside_it(
    html: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [notebook] = (html / "_downloads").glob("*/what-is-pruning.ipynb")
    [wheel] = (html / "_downloads").glob(f"*/{reruns.WHEEL.name}")
    with ZipFile(wheel) as content:
        content.extractall(tmp_path / "library")
    asking = nbformat.read(notebook, as_version=4)
    asking.cells.append(code("import swdlib\nprint(swdlib.__file__)"))
    nbformat.write(asking, tmp_path / "asking.ipynb")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))
    papermill.execute_notebook(
        str(tmp_path / "asking.ipynb"),
        str(tmp_path / "out.ipynb"),
        parameters={"epochs": 1},
        cwd=str(tmp_path),
        progress_bar=False,
    )
    last = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1]
    assert last.outputs[0].text == f"{tmp_path}/library/swdlib/__init__.py\n"


@pytest.mark.slow
def test_every_committed_record_can_be_downloaded(html: Path) -> None:
    text = (html / "reproduce.html").read_text("utf-8")
    assert RECORDS
    assert not [path.name for path in RECORDS if f"/{path.name}" not in text]
