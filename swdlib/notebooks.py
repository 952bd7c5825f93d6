"""Notebooks: what the book's notebooks need of papermill and lack."""

import ast
from collections.abc import Mapping
from itertools import pairwise
from typing import Any


def check_parameters(namespace: Mapping[str, Any]) -> None:
    """ValueError if papermill was given a parameter that the notebook lacks; it only warns itself.

    `namespace` is a notebook's `globals()`, where IPython keeps the source of the cells that ran as
    `In`. Papermill writes what it is given into a cell of its own, right after the notebook's.
    """
    history = namespace["In"]
    for own, given in pairwise(history):
        known = _assigned(own) if given.startswith("# Parameters\n") else set()
        if known and (unknown := sorted(_assigned(given) - known)):
            raise ValueError(
                f"the notebook has no parameter {', '.join(unknown)}; "
                f"its parameters are {', '.join(sorted(known))}"
            )


def _assigned(source: str) -> set[str]:
    """The names that a cell sets."""
    nodes = ast.walk(ast.parse(source))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
