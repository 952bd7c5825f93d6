"""What a link to a page shows elsewhere: its title, its first sentence and the book's card.

The addresses are relative as long as `html_baseurl` is not set: readers of a link need a whole one.
"""

from html import escape
from typing import Any
from urllib.parse import urljoin

from docutils import nodes
from sphinx.application import Sphinx

CARD = "_static/card.png"
CARD_SHOWS = "A network's weights fall apart into two humps: those that shrank and those that stay."
LONGEST = 200  # characters of a description


def description(doctree: nodes.document) -> str:
    """Return the first sentences of a page outside of boxes, or what there is room for, as text."""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section):
            text = " ".join(paragraph.astext().split())
            if len(text) <= LONGEST:
                return text
            sentences, found, _ = text[:LONGEST].rpartition(". ")
            return f"{sentences}." if found else text[:LONGEST].rsplit(" ", 1)[0] + " …"
    return ""


def tags(title: str, about: str, address: str, base: str) -> str:
    """Return the <meta> elements of a page; `address` is its place below `base`."""
    climb = "../" * address.count("/")
    image = urljoin(base, CARD) if base else climb + CARD
    named = {"description": about, "twitter:card": "summary_large_image"}
    shared = {
        **{"og:type": "article", "og:title": title, "og:description": about, "og:image": image},
        **{"og:image:width": "1200", "og:image:height": "630", "og:image:alt": CARD_SHOWS},
        **({"og:url": urljoin(base, address)} if base else {}),
    }
    lines = [f'<meta name="{name}" content="{escape(text)}">' for name, text in named.items()]
    lines += [f'<meta property="{name}" content="{escape(text)}">' for name, text in shared.items()]
    return "\n".join(lines)


def add_tags(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Add the elements to the head of a page that has a text."""
    if tree is None or not (about := description(tree)):
        return
    title = nodes.unescape(app.env.titles[page].astext())
    address = f"{page}.html"
    added = tags(title, about, address, app.config.html_baseurl)
    context["metatags"] = f"{context.get('metatags', '')}\n{added}"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("html-page-context", add_tags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
