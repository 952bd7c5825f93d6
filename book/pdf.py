"""The book as one PDF: `make pdf` has a browser print the pages that `make book` built.

Code that is folded on a page is left out; solutions are shown.
"""

import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from playwright.sync_api import Browser, Playwright, sync_playwright
from pypdf import PageObject, PdfReader, PdfWriter
from pypdf.generic import ArrayObject, NameObject

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks in book/ alone

from swdlib.files import write_whole  # noqa: E402

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
SHEET: dict[str, Any] = {
    "format": "A4",
    "scale": 0.8,
    "print_background": True,
    "margin": {"top": "18mm", "bottom": "20mm", "left": "16mm", "right": "16mm"},
}
STYLE = """
details.hide, .headerlink, .prev-next-footer, .bd-header-article { display: none !important; }
.bd-article { padding: 0 !important; }
"""
NUMBER = """<div style="height: 290mm; break-after: page; position: relative; font: 9pt sans-serif">
<span style="position: absolute; bottom: 6mm; width: 100%; text-align: center">{}</span></div>"""


def main() -> None:
    """Write _build/book.pdf."""
    html, target = ROOT / "_build" / "html", ROOT / "_build" / "book.pdf"
    if not (html / "index.html").is_file():
        sys.exit("error: there are no pages to print; run `make book` first")
    with sync_playwright() as playwright:
        browser = start(playwright)
        content = bind(browser, html, parts_of(ROOT / "book" / "_toc.yml"))
        browser.close()
    write_whole(target, lambda file: file.write_bytes(content))
    print(f"The book is written to {target}")


def start(playwright: Playwright) -> Browser:
    """Launch the browser that is installed: Debian's Chromium, or else Playwright's own."""
    path = str(CHROMIUM) if CHROMIUM.exists() else None
    return playwright.chromium.launch(executable_path=path, args=FLAGS)


def parts_of(toc: Path) -> dict[str, list[str]]:
    """Return the captions of the book's parts with the names of their pages."""
    content = yaml.safe_load(toc.read_text("utf-8"))
    parts = {part["caption"]: [p["file"] for p in part["chapters"]] for part in content["parts"]}
    return {"": [content["root"]], **parts}


def bind(browser: Browser, html: Path, parts: dict[str, list[str]]) -> bytes:
    """Return the pages below `html` as one PDF with numbered sheets, an outline and its links."""
    book, starts = PdfWriter(), {}
    for caption, names in parts.items():
        part = None
        for name in names:
            title, content = printed(browser, (html / f"{name}.html").as_uri())
            starts[name] = len(book.pages)
            book.append(BytesIO(content), import_outline=False)
            if caption and part is None:
                part = book.add_outline_item(title=caption, page_number=starts[name])
            book.add_outline_item(title=title, page_number=starts[name], parent=part)
    link(book, starts)
    number(book.pages[1:], PdfReader(BytesIO(numbers(browser, len(book.pages)))).pages[1:])
    book.add_metadata({"/Title": "Neural-network pruning with Selective Weight Decay"})
    book.compress_identical_objects()
    bound = BytesIO()
    book.write(bound)
    return bound.getvalue()


def printed(browser: Browser, address: str) -> tuple[str, bytes]:
    """Return a page's heading and the page as a PDF."""
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(address)
    page.evaluate("window.MathJax?.startup?.promise.then(() => true)")
    page.add_style_tag(content=STYLE)
    title = page.locator("article h1").first.text_content() or ""
    content = page.pdf(**SHEET)
    context.close()
    return title.removesuffix("#").strip(), content


def link(book: PdfWriter, starts: dict[str, int]) -> None:
    """Let links to pages lead to their place in the book, and remove those to other files."""
    for sheet in book.pages:
        kept = ArrayObject()
        for reference in sheet.get("/Annots", []):
            annotation = reference.get_object()
            address = urlsplit(annotation.get("/A", {}).get("/URI", ""))
            page = Path(unquote(address.path)).stem
            if address.scheme == "file":
                if page not in starts:
                    continue
                place = [book.pages[starts[page]].indirect_reference, NameObject("/Fit")]
                annotation[NameObject("/Dest")] = ArrayObject(place)
                del annotation["/A"]
            kept.append(reference)
        sheet[NameObject("/Annots")] = kept


def numbers(browser: Browser, count: int) -> bytes:
    """Return as many sheets as a PDF, each of which has its number at the foot and nothing else."""
    page = browser.new_page()
    page.set_content("".join(NUMBER.format(i + 1) for i in range(count)))
    content = page.pdf(format="A4")
    page.close()
    return content


def number(sheets: Sequence[PageObject], feet: Sequence[PageObject]) -> None:
    """Lay a foot over each sheet."""
    for sheet, foot in zip(sheets, feet, strict=False):
        sheet.merge_page(foot)
        sheet.compress_content_streams()  # which merging undid


if __name__ == "__main__":
    main()
