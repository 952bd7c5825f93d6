"""Make pages that need no network: MathJax comes from an installed wheel, Thebe stays out."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

# The wheel is 24 MB; these folders are what the one script can ask for.
SCRIPT = "tex-chtml.js"
FOLDERS = ("a11y", "input/tex/extensions", "output/chtml/fonts", "sre", "ui")


def wheel_folder() -> Path:
    """Return the folder of MathJax inside the package sphinx-mathjax-offline."""
    package = import_module("sphinx-mathjax-offline")
    return Path(str(package.__file__)).parent / "static" / "mathjax"


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Copy MathJax into the finished book; scripts in html_static_path would load on every page."""
    if exception is not None or app.builder.format != "html":
        return
    target = Path(app.outdir) / "_static" / "mathjax"
    for folder in FOLDERS:
        shutil.copytree(wheel_folder() / folder, target / folder, dirs_exist_ok=True)
    shutil.copy(wheel_folder() / SCRIPT, target)


def leave_out_thebe(app: Sphinx) -> None:
    """Stop sphinx_thebe, which Jupyter Book always loads, from adding its scripts to the pages.

    They need a CDN, and one of them is added twice, which is an error in the browser.
    """
    for event in ("env-before-read-docs", "doctree-resolved"):
        for listener in list(app.events.listeners[event]):
            if listener.handler.__name__ in ("init_thebe_core", "update_thebe_context"):
                app.disconnect(listener.id)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx, which loads mathjax_path only on pages with formulas."""
    app.setup_extension("sphinx_thebe")
    leave_out_thebe(app)
    app.config.mathjax_path = f"mathjax/{SCRIPT}"
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
