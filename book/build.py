"""Run the book's notebooks and build its pages: `make book` and `make notebook` call this file.

The notebooks are stored without outputs. They run through papermill in a copy of the book, under
_build, where Jupyter Book then turns them into pages without running anything again.
"""

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
KEPT = ("kernelspec", "language_info")
TRACES = ("papermill", "execution", "collapsed", "scrolled")
NOT_STAGED = ("_ext", "*.py", "__pycache__", ".ipynb_checkpoints", "smoke", "checkpoints")


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
        # Its networks are too small to share: threads that wait for each other cost more.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    stage = target / "_build" / "stage"
    copy_sources(book, stage)
    for name in notebook_names(book):
        source, staged = book / f"{name}.ipynb", stage / f"{name}.ipynb"
        known = {"profile": profile} if "profile" in parameters_of(source) else {}
        execute(source, staged, known, folder=staged.parent)
        check_outputs(staged)
    return make_pages(stage, book.parent / "_config.yml", target)


def run_one(name: str, parameters: dict[str, Any], output: Path) -> Path:
    """Run the notebook `name` beside the book's records and return the executed copy."""
    if name not in (names := notebook_names(BOOK)):
        raise ValueError(f"the notebook must be one of {', '.join(names)}, not {name!r}")
    target = output / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    execute(BOOK / f"{name}.ipynb", target, parameters, folder=BOOK)
    return target


def copy_sources(book: Path, stage: Path) -> None:
    """Copy the book to a fresh folder; runs of an earlier build are left behind."""
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(book, stage, ignore=shutil.ignore_patterns(*NOT_STAGED))


def notebook_names(book: Path) -> list[str]:
    """Return the names in _toc.yml, in its order, that are notebooks."""
    names = [str(name) for name in parse_toc_yaml(book / "_toc.yml")]
    return [name for name in names if (book / f"{name}.ipynb").is_file()]


def parameters_of(notebook: Path) -> list[str]:
    """Return the names that the notebook's cell tagged `parameters` sets."""
    return list(papermill.inspect_notebook(str(notebook)))


def execute(source: Path, target: Path, parameters: dict[str, Any], folder: Path) -> None:
    """Run a notebook in `folder` and write it with its outputs.

    Raises ValueError for an unknown parameter, of which papermill only warns.
    """
    known = parameters_of(source)
    if unknown := sorted(set(parameters) - set(known)):
        allowed = ", ".join(known) or "none"
        raise ValueError(f"{source.name} has no parameter {', '.join(unknown)}; it has: {allowed}")
    print(f"Running {source.name} {parameters or ''}", flush=True)
    papermill.execute_notebook(
        str(source), str(target), parameters=parameters, cwd=str(folder), progress_bar=False
    )


def check_outputs(notebook: Path) -> None:
    """Raise ValueError unless every code cell ran, without an error, and one shows something.

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


def strip(book: Path) -> None:
    """Rewrite the stored notebooks without what a run leaves in them."""
    for path in sorted(book.glob("*.ipynb")):
        fresh = path.with_suffix(".tmp")
        fresh.write_text(stripped(path), encoding="utf-8")
        os.replace(fresh, path)


def stripped(path: Path) -> str:
    """Return the text of a notebook without outputs, counts and the traces of a run."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata = {key: notebook.metadata[key] for key in KEPT if key in notebook.metadata}
    for cell in notebook.cells:
        for trace in TRACES:
            cell.metadata.pop(trace, None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(notebook) + "\n"


def make_pages(stage: Path, config: Path, target: Path) -> Path:
    """Build the staged pages with warnings as errors and return the first page."""
    html = target / "_build" / "html"
    shutil.rmtree(html, ignore_errors=True)
    tool = Path(sys.executable).with_name("jupyter-book")
    strict = ["--all", "-W", "-n", "--keep-going", "-q"]
    places = ["--config", str(config), "--path-output", str(target)]
    command = [str(tool), "build", str(stage), *strict, *places]
    # Warnings go to stderr; what is left is advice on where the pages are.
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise ValueError("the pages could not be built without warnings; they are listed above")
    return html / "index.html"


if __name__ == "__main__":
    main()
