"""Claims: a file that says who is doing a run, so that nobody else does it at the same time.

A claim counts while its process lives and its heartbeat, the time of the file's last change, is
fresh. Otherwise it is stale, and the next one takes it over and goes on from the checkpoint.
"""

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

BEAT = 20.0  # seconds from one heartbeat to the next
STALE = 300.0  # seconds without one; the clocks of machines that share a folder differ by less


class Busy(OSError):
    """The run is being done by another process."""


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Hold the claim file `path` in the context; Busy, an OSError, if another process holds it.

    Of several processes, on one machine or on several with a common folder, one gets it. The file
    says which: its host and pid, as JSON.
    """
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) if path.exists() and not is_claimed(path) else nullcontext():
        _create(path, json.dumps(mine))
    done = threading.Event()
    threading.Thread(target=_beat, args=(path, mine, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        if _read(path) == mine:  # one that slept too long has lost it
            path.unlink(missing_ok=True)


def is_claimed(path: Path) -> bool:
    """Whether there is a claim that counts."""
    return _age(path) < STALE and _may_be_alive(_read(path))


def _age(path: Path) -> float:
    """Seconds since the last heartbeat; infinite if the file is not there, or no longer."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _beat(path: Path, mine: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(BEAT):
        if _read(path) == mine:  # another's, once it was taken over, must be able to grow stale
            with suppress(OSError):  # gone, or a network's folder that fails for a moment
                os.utime(path)


def _read(path: Path) -> dict[str, Any]:
    """What a claim says; nothing if it is not there, or not written out yet."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _may_be_alive(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or os.name == "nt":
        return True  # only the heartbeat tells
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _create(path: Path, text: str = "") -> None:
    try:
        with path.open("x", encoding="utf-8") as file:  # O_EXCL: fails if it exists
            file.write(text)
    except FileExistsError as error:
        holder = "process {pid} on {host}".format(**{"pid": "?", "host": "?", **_read(path)})
        raise Busy(f"{path.stem} is being run by {holder}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[None]:
    """Delete a stale claim, alone: who saw it at the same time must not delete what comes next."""
    guard = path.with_suffix(".takeover")
    try:
        _create(guard)
    except Busy:
        if STALE < _age(guard) < math.inf:  # its process died in here
            guard.unlink(missing_ok=True)
        raise
    try:
        if not is_claimed(path):
            path.unlink(missing_ok=True)
        yield
    finally:
        guard.unlink(missing_ok=True)
