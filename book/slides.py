"""Slides: the cells of a chapter that are tagged `slide`, as one HTML file.

Headings, common mistakes and questions each begin a slide. It shows the first paragraph, formulas,
lists and tables with the sentence that introduces them, and the output of code. All other text is
in the notes.
"""

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import nbformat
from sphinx_external_toc.parsing import parse_toc_yaml

from book.prose import Block, blocks, inline, paragraph
from swdlib.lab.plots import for_both_grounds

FILES = Path(__file__).parent / "_ext"
LEFT_OUT = ("Parameters", "Check yourself", "Exercises")
FULL = 3  # a slide is full with so many formulas, lists and tables, or with one large output
LONG = 8  # lines of an output that is large, as pictures are
SENTENCE = re.compile(r"(?<=[.:?!)*])\s+(?=[A-Z*$`\[])")
MATHJAX = '<script defer src="../_static/mathjax/tex-chtml.js"></script>'


@dataclass
class Slide:
    """A title in Markdown; what is shown and the notes, as HTML."""

    title: str
    shown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    filled: int = 0
    large: bool = False  # whether it shows a large output


def write(stage: Path, target: Path) -> None:
    """Write the deck of each page of the book in `stage` that has slides, `target`/<name>.html."""
    target.mkdir(parents=True, exist_ok=True)
    for name in map(str, parse_toc_yaml(stage / "_toc.yml")):
        notebook = stage / f"{name}.ipynb"
        if notebook.is_file() and (slides := slides_of(notebook)):
            (target / f"{name}.html").write_text(deck(name, slides), encoding="utf-8")


def listing(stage: Path, names: Sequence[str]) -> str:
    """Return links to the decks of these notebooks, as a list in Markdown."""
    found = {name: slides_of(stage / f"{name}.ipynb") for name in names}
    return "\n".join(
        f'- <a href="slides/{name}.html">{inline(slides[0].title)}</a>, {len(slides)} slides'
        for name, slides in found.items()
        if slides
    )


def slides_of(notebook: Path) -> list[Slide]:
    """Return the slides of a notebook that has run, in its order."""
    slides: list[Slide] = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "slide" not in cell.metadata.get("tags", []):
            continue
        if cell.cell_type == "markdown":
            _add_prose(slides, list(blocks(cell.source)))
        else:
            outputs = [_shown(output, cell) for output in cell.outputs]
            for html in filter(None, outputs or [_text(cell.source)]):
                _add_output(slides, html)
    return [slide for slide in slides if slide.shown and slide.title not in LEFT_OUT]


def _add_prose(slides: list[Slide], found: list[Block]) -> None:
    for block, following in zip(found, [*found[1:], Block("end")], strict=True):
        if block.kind == "heading":
            slides.append(Slide(block.text))
        elif block.kind in ("mistake", "quiz"):
            slides.append(Slide(block.text, [block.html]))
        elif block.kind == "paragraph":
            _add_paragraph(slides, block.text, leads=following.kind == "block")
        elif block.kind == "box":
            html = re.sub(r"<p>Reading takes.*?</p>", "", block.html, flags=re.DOTALL)
            slide = _with_room(slides)
            slide.shown += [f"<p><strong>{inline(block.text)}</strong></p>", html]
        elif block.kind == "block":
            slide = _with_room(slides)
            slide.shown.append(block.html)
            slide.filled += 1


def _add_paragraph(slides: list[Slide], text: str, leads: bool) -> None:
    slide = slides[-1]
    if not (slide.shown or slide.notes):
        slide.shown.append(paragraph(text))
        return
    *others, last = SENTENCE.split(text)
    if said := " ".join(others if leads else [*others, last]):
        slide.notes.append(paragraph(said))
    if leads:
        _with_room(slides).shown.append(paragraph(last))


def _add_output(slides: list[Slide], html: str) -> None:
    """Add an output; of large ones a slide shows one."""
    if slides[-1].large:
        slides.append(Slide(slides[-1].title))
    slides[-1].shown.append(html)
    if html.startswith("<img") or max(html.count("<tr"), html.count("\n")) > LONG:
        slides[-1].large, slides[-1].filled = True, FULL


def _with_room(slides: list[Slide]) -> Slide:
    """Return the last slide, or another of its title if that is full."""
    if slides[-1].filled >= FULL:
        slides.append(Slide(slides[-1].title))
    return slides[-1]


def _shown(output: Any, cell: Any) -> str:
    """An output as HTML: a picture, a table or text; nothing if it needs a script."""
    data = output.get("data", {})
    html = data.get("text/html", "")
    if svg := data.get("image/svg+xml") or _drawn(html):
        alt = escape(cell.metadata.mystnb.image.alt, quote=True)
        source = b64encode(svg.encode()).decode()
        return f'<img alt="{alt}" src="data:image/svg+xml;base64,{source}">'
    if "<table" in html and "<script" not in html:
        table = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
        return f'<div class="wide" tabindex="0">{table}</div>'
    return _text(output.text) if output.get("name") == "stdout" else ""


def _drawn(html: str) -> str:
    """The static picture in the interactive figure of runs."""
    found = re.search(r'<div class="swd-runs">(<svg.*?</svg>)', html, re.DOTALL)
    return for_both_grounds(found[1]) if found else ""


def _text(text: str) -> str:
    return f'<pre tabindex="0">{escape(text.rstrip())}</pre>'


def deck(name: str, slides: Sequence[Slide]) -> str:
    """Return the deck of the chapter `name` with its style and script; formulas need MathJax."""
    parts = "\n".join(_section(slide, "h2" if i else "h1") for i, slide in enumerate(slides))
    parts = re.sub(r'href="([\w-]+)\.(?:ipynb|md)\b', r'href="../\1.html', parts)
    parts = parts.replace('href="#', f'href="../{name}.html#')
    parts = parts.replace("<pre><code", '<pre tabindex="0"><code')  # so that keys scroll it
    values = {
        "title": re.sub("<[^>]+>", "", inline(slides[0].title)),
        "name": name,
        "slides": parts,
        "mathjax": MATHJAX if 'class="math' in parts else "",
        **{kind: (FILES / f"slides.{kind}").read_text("utf-8") for kind in ("css", "js")},
    }
    template = (FILES / "slides.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _section(slide: Slide, level: str) -> str:
    notes = f'<div class="notes">{"".join(slide.notes)}</div>' if slide.notes else ""
    title = f"<{level}>{inline(slide.title)}</{level}>"
    return f"<section>{title}<div>{''.join(slide.shown)}</div>{notes}</section>"
