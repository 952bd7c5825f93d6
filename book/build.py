"""Run the book's notebooks and build its pages: `make book` and `make notebook` call this file.

The notebooks are stored without outputs. Papermill runs them in a copy of the book under _build,
which Jupyter Book then turns into pages without running anything again. How to rerun each page
(`reruns`) and the API reference (`api`) are written into that copy.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import papermill
import yaml
from IPython.core.displayhook import DisplayHook
from IPython.core.inputtransformer2 import TransformerManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
sys.path.insert(0, str(ROOT))  # run as a script, Python looks in book/ alone

from book import api, kernels, probes, reruns, slides  # noqa: E402

KEPT = ("kernelspec", "language_info")
TRACES = ("papermill", "execution", "collapsed", "scrolled")
INSTALLS = "install"
COLAB = """\
# On Colab, fetch the book and what it needs; anywhere else this does nothing.
import os
import sys

if "google.colab" in sys.modules and not os.path.isdir("/content/pruning-book"):
    !git clone --quiet --depth 1 --branch {branch} {url} /content/pruning-book
    %pip install --quiet -e "/content/pruning-book[deploy]"
    sys.path.insert(0, "/content/pruning-book")
    %cd /content/pruning-book/{path_to_book}"""
NOT_STAGED = (
    "_ext",
    "data",
    "out.ipynb",
    "*.py",
    "__pycache__",
    ".ipynb_checkpoints",
    "checkpoints",
)
PICTURES = {"image/svg+xml", "image/png", "text/html"}
RERUN = Path("records", "smoke")  # every build does these runs again


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and do what it asks."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "book":
            print(f"The book is built; open {build(BOOK, ROOT, options.profile)}")
        elif options.command == "notebook":
            parameters = {name: value_of(text) for name, text in options.p}
            print(f"Done; see {run_one(options.name, parameters, ROOT / '_build' / 'notebooks')}")
        else:
            strip(BOOK)
    except (ValueError, PapermillExecutionError) as error:
        sys.exit(f"error: {error}")


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = top.add_subparsers(dest="command", required=True)
    book = commands.add_parser("book", help="run every notebook and build the pages")
    book.add_argument("--profile", default="smoke", help="smoke, laptop or paper")
    one = commands.add_parser("notebook", help="run one notebook with other parameters")
    one.add_argument("name", help="its file name without .ipynb")
    one.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    commands.add_parser("strip", help="remove the outputs from the stored notebooks")
    return top


def value_of(text: str) -> Any:
    """Read a value as Python or JSON writes it (0.5, true, [1, 2]); all else is a string."""
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def build(book: Path, target: Path, profile: str = "smoke") -> Path:
    """Run the notebooks of `book`, build it in `target`/_build, and return the first page."""
    if profile == "smoke":
        # Its networks are too small for several threads, which would wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    stage = target / "_build" / "stage"
    copy_sources(book, stage)
    make_wheel(stage / reruns.WHEEL)
    # One more at a time than there are processors, as kernels that start or end mostly wait; large
    # runs have the machine to themselves. In threads, papermill would leave its event loops open.
    jobs = (os.cpu_count() or 1) + 1 if profile == "smoke" else 1
    begin = kernels.share_imports if profile == "smoke" else None  # a fork needs a single thread
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin) as pool:
        runs = list(pool.map(partial(run_page, book, stage, profile), notebook_names(book)))
    fill(stage, runs)
    index = make_pages(stage, book.parent / "_config.yml", target)
    slides.write(stage, index.parent / "slides")
    return index


def run_page(book: Path, stage: Path, profile: str, name: str) -> reruns.Run:
    """Run a notebook of `book` in `stage` and add the box on how to rerun it."""
    source, staged = book / f"{name}.ipynb", stage / f"{name}.ipynb"
    known = {"profile": profile} if "profile" in parameters_of(source) else {}
    if profile != "smoke":
        known |= absolute_data_root(source, {})
    run = execute(source, staged, known, folder=stage)
    check_outputs(staged)
    shutil.copy(source, stage / "data" / name)
    # Records that other runs write during the build are not staged.
    run.files = [str(p) for p in within(run.files, (book, stage)) if (stage / p).is_file()]
    reruns.zip_files(run, stage)
    insert_box(staged, run)
    return run


def run_one(name: str, parameters: dict[str, Any], output: Path) -> Path:
    """Run the notebook `name` beside the book's records and return the executed copy."""
    if name not in (names := notebook_names(BOOK)):
        raise ValueError(f"the notebook must be one of {', '.join(names)}, not {name!r}")
    target = output / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    source = BOOK / f"{name}.ipynb"
    execute(source, target, parameters | absolute_data_root(source, parameters), folder=BOOK)
    return target


def absolute_data_root(notebook: Path, given: dict[str, Any]) -> dict[str, str]:
    """Return `data_root` as an absolute path if the notebook has runs that need it.

    If none is `given`, it is `data` in the repository.
    """
    if given.get("data_root"):
        return {"data_root": str(Path(given["data_root"]).resolve())}
    needed = {"profile", "data_root"} <= set(parameters_of(notebook))
    return {"data_root": str(ROOT / "data")} if needed else {}


def copy_sources(book: Path, stage: Path) -> None:
    """Copy the book to a fresh folder, without the runs of an earlier build."""
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(book, stage, ignore=shutil.ignore_patterns(*NOT_STAGED))
    shutil.rmtree(stage / RERUN, ignore_errors=True)


def make_wheel(target: Path) -> None:
    """Build the library's wheel for downloaded notebooks, from a copy of what goes into it."""
    with TemporaryDirectory() as copy:
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        shutil.copytree(ROOT / "swdlib", Path(copy, "swdlib"))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
        offline = ["--no-build-isolation", "--disable-pip-version-check"]
        subprocess.run([*command, *offline, "--wheel-dir", target.parent, copy], check=True)
    if not target.is_file():
        raise ValueError(f"the wheel must be called {target.name}, not as in {target.parent}")


def notebook_names(book: Path) -> list[str]:
    """Return the names in _toc.yml, in its order, that are notebooks."""
    names = [str(name) for name in parse_toc_yaml(book / "_toc.yml")]
    return [name for name in names if (book / f"{name}.ipynb").is_file()]


def parameters_of(notebook: Path) -> list[str]:
    """Return the names that the notebook's cell tagged `parameters` sets."""
    return list(papermill.inspect_notebook(str(notebook)))


def execute(source: Path, target: Path, parameters: dict[str, Any], folder: Path) -> reruns.Run:
    """Run a notebook in `folder`, write it with its outputs, and return what it drew and read.

    The numbers behind its figures go to `data/<name>/` beside it. Raises ValueError for an unknown
    parameter, of which papermill only warns.
    """
    run = reruns.describe(source, parameters)
    known = list(run.parameters)
    if unknown := sorted(set(parameters) - set(known)):
        allowed = ", ".join(known) or "none"
        raise ValueError(f"{source.name} has no parameter {', '.join(unknown)}; it has: {allowed}")
    print(f"Running {source.name} {parameters or ''}", flush=True)
    carry_out = partial(run_cells, source, target, parameters, folder)
    try:
        carry_out()
    except DeadKernelError:  # it had started: running it again would not help
        raise
    except RuntimeError as error:
        print(f"{source.name} once more: {error}", flush=True)
        carry_out()
    notebook = nbformat.read(target, as_version=4)
    run.files = probes.files_read(notebook)
    run.figures = probes.numbers_drawn(notebook, target.parent, f"data/{target.stem}")
    nbformat.write(notebook, target)
    return run


def run_cells(source: Path, target: Path, parameters: dict[str, Any], folder: Path) -> None:
    """Run a notebook with the cells of `probes` and write it with its outputs.

    RuntimeError if its kernel does not start: another program may use a port meant for it.
    """
    nbformat.write(probes.added(source), target)
    papermill.execute_notebook(
        str(target), str(target), parameters=parameters, cwd=str(folder), progress_bar=False
    )


def within(files: list[str], folders: tuple[Path, ...]) -> list[Path]:
    """Return those files that come with the book, relative to whichever of `folders` they are in.

    Records of the profile smoke and files that are not staged are left out.
    """
    found = [
        Path(file).relative_to(folder.resolve())
        for file in files
        for folder in folders
        if Path(file).is_relative_to(folder.resolve())
    ]
    own = (path for path in found if not path.is_relative_to(RERUN))
    return sorted({path for path in own if not set(path.parts) & set(NOT_STAGED)})


def insert_box(notebook: Path, run: reruns.Run) -> None:
    """Insert the box on how to rerun a notebook before its first section.

    The box lists the parameters, so that their cells are left out of the page.
    """
    content = nbformat.read(notebook, as_version=4)
    sections = (
        i
        for i, cell in enumerate(content.cells)
        if cell.cell_type == "markdown" and cell.source.startswith("## ")
    )
    at = next(sections, len(content.cells))
    content.cells.insert(at, nbformat.v4.new_markdown_cell(reruns.box(run)))
    for cell in content.cells:
        if {"parameters", "injected-parameters"} & set(tags := cell.metadata.get("tags", [])):
            cell.metadata["tags"] = [*tags, "remove-cell"]
    content.cells = with_one_fold(content.cells)
    nbformat.write(content, notebook)


def with_one_fold(cells: list[Any]) -> list[Any]:
    """Join each folded cell that shows nothing with the folded cell behind it, under one button."""
    joined: list[Any] = []
    for cell in cells:
        last = joined[-1] if joined else None
        if last and folded(last) and folded(cell) and not last.outputs:
            cell.source = f"{joined.pop().source}\n\n{cell.source}"
        joined.append(cell)
    return joined


def folded(cell: Any) -> bool:
    """Return whether a page shows only the outputs of a cell."""
    return cell.cell_type == "code" and "hide-input" in cell.metadata.get("tags", [])


def fill(stage: Path, runs: list[reruns.Run]) -> None:
    """Replace the lines `% generated: ...` of the staged pages."""
    records = stage / "records"
    parts: dict[str, Any] = {
        "api": api.reference,
        "chapters": lambda: reruns.every_chapter(runs, stage / "_toc.yml"),
        "pages": lambda: reruns.every_page(runs),
        "grids": lambda: reruns.every_grid(stage / "grids"),
        "records": lambda: reruns.every_record(records),
        "picture": lambda: reruns.picture(records),
        "expected": lambda: reruns.expected(records),
        "live": lambda: reruns.live(stage / "measurements" / "expected.json", runs),
        "slides": lambda: slides.listing(stage, [run.name for run in runs]),
    }
    for page in stage.glob("*.md"):
        text = re.sub(
            r"^% generated: (\w+) ?([\w.]*)$",
            lambda found: parts[found[1]](*filter(None, [found[2]])),
            page.read_text("utf-8"),
            flags=re.MULTILINE,
        )
        page.write_text(text, encoding="utf-8")


def check_outputs(notebook: Path) -> None:
    """Raise ValueError unless every code cell ran without an error and shows what it should.

    Jupyter Book publishes a notebook that never ran or that failed without a warning.
    """
    cells = [
        cell
        for cell in nbformat.read(notebook, as_version=4).cells
        if cell.cell_type == "code" and cell.source.strip()
    ]
    outputs = [output for cell in cells for output in cell.outputs]
    if any(output.output_type == "error" for output in outputs):
        raise ValueError(f"{notebook.name} has a cell that failed")
    if any(cell.execution_count is None for cell in cells):
        raise ValueError(f"{notebook.name} has a cell that never ran")
    if cells and not outputs:
        raise ValueError(f"{notebook.name} ran but shows no output")
    for cell in cells:
        if lost := missing(cell):
            raise ValueError(f"{notebook.name} has a cell that shows no {lost}: {cell.source}")


def missing(cell: Any) -> str:
    """Return what kind of output a code cell should show and does not, or an empty string."""
    shown = {output.get("name", output.output_type) for output in cell.outputs}
    shown |= {kind for output in cell.outputs for kind in output.get("data", {})}
    source = TransformerManager().transform_cell(cell.source)  # magics as plain Python
    body = ast.parse(source).body
    if "image" in cell.metadata.get("mystnb", {}) and not shown & PICTURES:
        return "figure"
    if "print" in map(function_of, body) and "stdout" not in shown:
        return "text"
    quiet = DisplayHook.semicolon_at_end_of_expression(source)
    if quiet or not body or not isinstance(body[-1], ast.Expr):
        return ""
    # A function may print and return nothing; a method has a value here.
    values = {"execute_result", "stdout"} if function_of(body[-1]) else {"execute_result"}
    return "" if shown & values else "value"


def function_of(line: ast.stmt) -> str:
    """Return the name of the function, not a method, that a line of code calls."""
    match line:
        case ast.Expr(value=ast.Call(func=ast.Name(id=name))):
            return str(name)
    return ""


def strip(book: Path) -> None:
    """Rewrite the stored notebooks without the traces of a run."""
    for path in (book / f"{name}.ipynb" for name in notebook_names(book)):
        fresh = path.with_suffix(".tmp")
        fresh.write_text(stripped(path), encoding="utf-8")
        os.replace(fresh, path)


def stripped(path: Path, repository: dict[str, str] | None = None) -> str:
    """Return the text of a notebook without outputs, counts and the traces of a run.

    If the `repository`, by default that of _config.yml, has an address, `install_cell` is added.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = installing(notebook.cells, repository or repository_of(ROOT / "_config.yml"))
    notebook.metadata = {key: notebook.metadata[key] for key in KEPT if key in notebook.metadata}
    for cell in notebook.cells:
        for trace in TRACES:
            cell.metadata.pop(trace, None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(notebook) + "\n"


def repository_of(config: Path) -> dict[str, str]:
    """Return the repository's entry in _config.yml; its `url` may be empty."""
    found: dict[str, str] = yaml.safe_load(config.read_text("utf-8"))["repository"]
    return found


def installing(cells: list[Any], repository: dict[str, str]) -> list[Any]:
    """Put the install cell before the first code cell, or remove it if there is no address."""
    own = [cell for cell in cells if INSTALLS not in cell.metadata.get("tags", [])]
    first = next((i for i, cell in enumerate(own) if cell.cell_type == "code"), len(own))
    return own[:first] + [install_cell(repository)] * bool(repository["url"]) + own[first:]


def install_cell(repository: dict[str, str]) -> Any:
    """Return the cell that fetches the book and installs the library on Colab, hidden on pages."""
    source = COLAB.format(**repository)
    tags = {"tags": [INSTALLS, "remove-cell"]}
    return nbformat.v4.new_code_cell(source, metadata=tags, id="cell-install")


def make_pages(stage: Path, config: Path, target: Path) -> Path:
    """Build the staged pages with warnings as errors and return the first page."""
    html = target / "_build" / "html"
    shutil.rmtree(html, ignore_errors=True)
    # By its module, since the path of the command depends on the system.
    tool = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    strict = ["--all", "-W", "-n", "--keep-going", "-q"]
    paths = ["--config", str(config), "--path-output", str(target)]
    command = [*tool, "build", str(stage), *strict, *paths]
    # Warnings go to stderr; stdout only says where the pages are.
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise ValueError("the pages could not be built without warnings; they are listed above")
    return html / "index.html"


if __name__ == "__main__":
    main()
