"""Buttons that lead to the repository: on if _config.yml sets `repository.url`, otherwise off."""

from typing import Any

from sphinx.application import Sphinx

BUTTONS = ("use_repository_button", "use_issues_button", "use_edit_page_button")
LAUNCH = {
    "colab_url": "https://colab.research.google.com",
    "binderhub_url": "https://mybinder.org",
    "notebook_interface": "jupyterlab",
}


def set_buttons(options: dict[str, Any]) -> None:
    """Turn on or off all options of the theme that need the repository's address."""
    known = bool(options.get("repository_url"))
    options.update(dict.fromkeys(BUTTONS, known))
    options["launch_buttons"] = dict(LAUNCH) if known else {}


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx; the theme reads its options later."""
    app.connect(
        "config-inited", lambda app, config: set_buttons(config.html_theme_options), priority=1
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
