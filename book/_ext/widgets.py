"""Scripts of single pages: each is loaded only where there is an element that it fills."""

import shutil
from itertools import chain
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).parent

SHARED = ("swd-widgets.js", "swd-widgets.css")

# Class of the element -> the files that fill it, in this order; they lie beside this one.
WIDGETS = {
    "swd-model": (*SHARED, "swd-model.js", "swd-model-page.js", "swd-model.css"),
    "swd-schedule": (*SHARED, "swd-schedule.js", "swd-schedule-page.js", "swd-schedule.css"),
    "swd-frames": (*SHARED, "swd-frames.js", "swd-frames.css"),
    "swd-runs": ("swd-runs.js", "swd-runs.css"),
}


def load_files(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Add the files of the page's widgets, each once; in this event, they go to this page alone."""
    body = context.get("body", "")
    needed = (files for name, files in WIDGETS.items() if f'class="{name}"' in body)
    for file in dict.fromkeys(chain.from_iterable(needed)):
        if file.endswith(".css"):
            app.add_css_file(f"widgets/{file}")
        else:
            app.add_js_file(f"widgets/{file}", loading_method="defer")


def copy_files(app: Sphinx, exception: Exception | None) -> None:
    """Copy the files into the finished book."""
    if exception is not None or app.builder.format != "html":
        return
    target = Path(app.outdir) / "_static" / "widgets"
    target.mkdir(parents=True, exist_ok=True)
    for file in {file for files in WIDGETS.values() for file in files}:
        shutil.copy(HERE / file, target)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("html-page-context", load_files)
    app.connect("build-finished", copy_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
