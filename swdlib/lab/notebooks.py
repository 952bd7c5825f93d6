"""Notebooks: a check of their parameters, which papermill lacks, and the book's files."""

import ast
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from swdlib.runs.records import default_folder

_TYPES: dict[str, Any] = {"int": int, "float": int | float, "str": str, "bool": bool, "list": list}


def check_parameters(namespace: Mapping[str, Any]) -> None:
    """Check the parameters that papermill was given against the cell that sets their defaults.

    `namespace` is the notebook's `globals()`, in which IPython keeps the source of the cells that
    ran as `In`; in a script there is nothing to check. Papermill writes what it is given into a
    cell of its own, right after that of the defaults. ValueError for a parameter that the notebook
    does not have, of which papermill only warns, and for a value that is not of the annotated type.
    """
    for own, given in pairwise(namespace.get("In", [])):
        known = _assigned(own) if given.startswith("# Parameters\n") else set()
        if not known:
            continue
        if unknown := sorted(_assigned(given) - known):
            raise ValueError(
                f"the notebook has no parameter {', '.join(unknown)}; "
                f"its parameters are {', '.join(sorted(known))}"
            )
        for node in ast.parse(own).body:
            # Where the default is None, the library knows the type.
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.value or node) != "None":
                name = ast.unparse(node.target)
                _check_type(name, namespace[name], ast.unparse(node.annotation))


def from_book(place: str) -> Path:
    """A file or folder of the book, such as records/laptop; FileNotFoundError says how to get it.

    It lies in the checkout that swdlib runs from, or, if that is an installed package, in the
    current folder.
    """
    path = default_folder().parent / place
    if not path.exists():
        raise FileNotFoundError(
            f"{path.absolute()} is missing. This page shows {place} of the book, which the library "
            "does not bring: run the page in a checkout of the repository, or put there the file "
            "that the page offers under 'Rerun this page'"
        )
    return path


def _assigned(source: str) -> set[str]:
    nodes = ast.walk(ast.parse(source))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _check_type(name: str, value: Any, kind: str) -> None:
    fits = isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))
    if kind == "list":
        fits = fits and all(isinstance(item, int | float) for item in value)
    if not fits:
        words = "a list of numbers" if kind == "list" else f"of type {kind}"
        raise ValueError(f"{name} must be {words}, not {value!r}")
