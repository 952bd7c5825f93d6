"""Keep a number and its percent sign on one line, and a formula and the mark behind it."""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

PERCENT = re.compile(r"(?<=\d) (?=%)")
MARKS = re.compile(r"[.,;:!?)]+")
SHORT = 40  # characters of TeX: a longer formula has to break
EXACT = (nodes.literal, nodes.math, nodes.raw, nodes.FixedTextElement)  # code and formulas


def tie(app: Sphinx, page: nodes.document) -> None:
    """Use no-break spaces before percent signs in the prose of a page, and tie short formulas."""
    for text in list(page.findall(nodes.Text)):
        if not isinstance(text.parent, EXACT):
            text.parent.replace(text, nodes.Text(PERCENT.sub("\N{NO-BREAK SPACE}", text)))
    for formula in list(page.findall(nodes.math)):
        if len(formula.astext()) <= SHORT:
            tie_marks(formula)


def tie_marks(formula: nodes.math) -> None:
    """Put a formula and the marks right behind it into one element, which CSS does not break."""
    parent, at = formula.parent, formula.parent.index(formula)
    behind = "".join(node for node in parent[at + 1 : at + 2] if isinstance(node, nodes.Text))
    if marks := MARKS.match(behind):
        tied = nodes.inline("", "", formula, nodes.Text(marks[0]), classes=["nobreak"])
        parent[at : at + 2] = [tied, nodes.Text(behind[marks.end() :])]


def setup(app: Sphinx) -> dict[str, Any]:
    """Tie them once a page is read."""
    app.connect("doctree-read", tie)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
