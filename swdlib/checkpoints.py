"""Checkpoints: the state of a stopped run, written whole or not at all."""

from pathlib import Path
from typing import Any

import torch

from swdlib.files import write_whole


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, lists and dicts of them) to `path`."""
    write_whole(path, lambda file: torch.save(state, file))


def load(path: Path | None) -> dict[str, Any]:
    """The state in `path`, tensors on the CPU; empty if there is no such file.

    Nothing in the file can run code. ValueError if it is damaged.
    """
    if path is None or not path.exists():
        return {}
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no readable checkpoint; delete it to start again") from error
    return state
