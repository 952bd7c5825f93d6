"""Files: written whole or not at all."""

import glob
import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new file beside `path`, then put it in the place of `path`.

    Folders are made as needed, a link is followed, and the content is on the disk before it gets
    its name. If `write` fails, what was at `path` stays and nothing else is left. OSError if `path`
    is a device or a pipe.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path} must be a file, or not be there yet, to be written")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{_short(path)}.{uuid.uuid4().hex}")
    try:
        write(unfinished)
        _sync(unfinished)
        os.replace(unfinished, path)
        if os.name == "posix":  # the name is part of the folder; Windows cannot open one
            _sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what a killed process left of `path`; nobody may be writing it."""
    for file in path.parent.glob(f".{glob.escape(_short(path))}.{'[0-9a-f]' * 32}"):
        file.unlink(missing_ok=True)


def _short(path: Path) -> str:
    """The name, short enough to be part of a longer one."""
    return os.fsdecode(os.fsencode(path.name)[:200])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
