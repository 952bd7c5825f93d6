"""A chapter's Markdown block by block, for pages that Sphinx does not make."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.myst_role import myst_role_plugin

from book._ext.quiz import answers_in


@dataclass(frozen=True)
class Block:
    """A heading, paragraph, box, mistake, quiz or folded part; `block` is any other: list, formula.

    `text` is Markdown: the whole heading or paragraph, or the title of a box. `html` is the content
    of all other blocks.
    """

    kind: str
    text: str = ""
    html: str = ""


def blocks(source: str) -> Iterator[Block]:
    """Return the blocks of a cell. A box of class `warning` is a mistake."""
    tokens, start, depth = MARKDOWN.parse(source), 0, 0
    for end, token in enumerate(tokens, 1):
        depth += token.nesting
        if depth == 0:
            yield _block(tokens[start:end])
            start = end


def _block(tokens: list[Token]) -> Block:
    kind = tokens[0].type.removesuffix("_open")
    if kind in ("heading", "paragraph"):
        return Block(kind, tokens[1].content)
    if kind == "colon_fence":
        return _fenced(*tokens[0].info.strip().partition(" ")[::2], tokens[0].content)
    html = MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})
    if kind == "table":
        html = f'<div class="wide" tabindex="0">{html}</div>'
    return Block("block", html=html)


def _fenced(directive: str, title: str, content: str) -> Block:
    if directive == "{quiz}":
        return Block("quiz", title, "".join(map(_answer, answers_in(content.splitlines()))))
    if directive != "{admonition}":
        return Block("folded")
    plain = re.sub(r"^:class:.*\n", "", content)
    kind = "box" if plain == content else "mistake"
    return Block(kind, title, f'<div class="box">{MARKDOWN.render(plain)}</div>')


def _answer(answer: tuple[bool, str, str]) -> str:
    right, text, why = answer
    kind = "right" if right else "wrong"
    return f'<details class="{kind}"><summary>{inline(text)}</summary>{paragraph(why)}</details>'


def inline(text: str) -> str:
    """Return a line of Markdown as HTML."""
    return MARKDOWN.renderInline(text)


def paragraph(text: str) -> str:
    """Return a paragraph of Markdown as HTML."""
    return f"<p>{inline(text)}</p>"


def _labelled(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    """A numbered formula; a slide has no number to give it."""
    return _formula(tokens[at].content, {"display_mode": True})


def _formula(content: str, options: dict[str, Any]) -> str:
    left, right = (r"\[", r"\]") if options["display_mode"] else (r"\(", r"\)")
    return left + escape(content, quote=False) + right


def _role(renderer: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    """A role's text without its target; of a citation, which only Sphinx can resolve, the key."""
    name = tokens[at].meta["name"]
    if name in REFERENCES:
        return REFERENCES[name]
    text = re.sub(r"\s*<[^<>]*>$", "", tokens[at].content)
    return escape(f"[{text}]" if name.startswith("cite") else text)


REFERENCES = {"numref": "the figure", "eq": "above"}  # only Sphinx knows the numbers

MARKDOWN = (
    MarkdownIt("commonmark")
    .enable("table")
    .use(dollarmath_plugin, renderer=_formula)
    .use(colon_fence_plugin)
    .use(myst_role_plugin)
)
MARKDOWN.add_render_rule("myst_role", _role)
MARKDOWN.add_render_rule("math_block_label", _labelled)
