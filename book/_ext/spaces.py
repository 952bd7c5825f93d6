"""Keep a number and its percent sign on one line."""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

PERCENT = re.compile(r"(?<=\d) (?=%)")
EXACT = (nodes.literal, nodes.math, nodes.raw, nodes.FixedTextElement)  # code and formulas


def tie(app: Sphinx, page: nodes.document) -> None:
    """Put a space that no line ends at between the two, in all prose of a page."""
    for text in list(page.findall(nodes.Text)):
        if not isinstance(text.parent, EXACT):
            text.parent.replace(text, nodes.Text(PERCENT.sub("\N{NO-BREAK SPACE}", text)))


def setup(app: Sphinx) -> dict[str, Any]:
    """Tie them once a page is read."""
    app.connect("doctree-read", tie)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
