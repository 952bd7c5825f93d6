"""Notebooks: what the book's notebooks need of papermill and lack."""

import ast
from collections.abc import Sequence


def check_parameters(history: Sequence[str]) -> None:
    """ValueError if papermill was given a parameter that the notebook lacks; it only warns itself.

    `history` is `In`, the source of the cells that ran. Papermill writes the parameters it is given
    into a cell of its own, right after the one that holds the notebook's.
    """
    for own, given in zip(history, history[1:], strict=False):
        if given.startswith("# Parameters\n"):
            known = _assigned(own)
            if unknown := sorted(_assigned(given) - known):
                raise ValueError(
                    f"the notebook has no parameter {', '.join(unknown)}; "
                    f"its parameters are {', '.join(sorted(known))}"
                )


def _assigned(source: str) -> set[str]:
    """The names that a cell sets."""
    nodes = ast.walk(ast.parse(source))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
