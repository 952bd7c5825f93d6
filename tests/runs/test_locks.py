"""Claims: one process at a time, and none that is gone stands in the way."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from swdlib.runs import run as claims
from swdlib.runs.run import Busy, claim, is_claimed


def gone() -> int:
    """Return the pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_behind(path: Path, age: float = 0.0, **changes: Any) -> None:
    """Write the claim of a process that was killed."""
    host = socket.gethostname()
    path.write_text(json.dumps({"host": host, "pid": gone(), "token": "x", **changes}), "utf-8")
    os.utime(path, (time.time() - age,) * 2)


def test_a_claim_says_whose_it_is_and_goes_with_its_context(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "run.claim"
    with claim(path):
        assert is_claimed(path)
        assert json.loads(path.read_text("utf-8"))["pid"] == os.getpid()
        with (
            pytest.raises(Busy, match=f"run is being run by process {os.getpid()} on"),
            claim(path),
        ):
            pass
        assert is_claimed(path)
    assert not is_claimed(path)
    assert not list(path.parent.iterdir())


def test_a_claim_is_given_back_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.claim"
    with pytest.raises(KeyboardInterrupt), claim(path):
        raise KeyboardInterrupt
    assert not path.exists()


@pytest.mark.parametrize(
    ("age", "changes", "counts"),
    [
        (0.0, {}, False),  # its process is gone
        (0.0, {"pid": os.getpid()}, True),
        (299.0, {"host": "elsewhere"}, True),
        (301.0, {"host": "elsewhere"}, False),
        (301.0, {"pid": os.getpid()}, False),  # another process has its pid by now
        (0.0, {"pid": "?"}, True),
        (0.0, {"pid": 10**30}, True),
    ],
)
def test_a_claim_counts_while_it_may_be_alive(
    age: float, changes: dict[str, Any], counts: bool, tmp_path: Path
) -> None:
    path = tmp_path / "run.claim"
    left_behind(path, age, **changes)
    assert is_claimed(path) == counts
    if counts:
        with pytest.raises(Busy), claim(path):
            pass
    else:
        with claim(path):
            assert json.loads(path.read_text("utf-8"))["pid"] == os.getpid()
    assert [file.name for file in tmp_path.iterdir()] == ["run.claim"] * counts


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "null", "{}"])
def test_a_claim_that_is_not_written_out_yet_counts(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.claim"
    path.write_text(content, "utf-8")
    with pytest.raises(Busy), claim(path):
        pass
    os.utime(path, (time.time() - 301,) * 2)
    with claim(path):
        assert is_claimed(path)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_the_same_time_one_gets_it(stale: bool, tmp_path: Path) -> None:
    path, together, holding, held = tmp_path / "run.claim", threading.Barrier(16), [], []
    done = threading.Event()

    def attempt() -> None:
        together.wait()
        try:
            with claim(path):
                holding.append(1)
                done.wait(10)
        except Busy:
            held.append(1)
            if len(held) == 15:
                done.set()

    for _ in range(5):
        done.clear()
        holding.clear()
        held.clear()
        if stale:
            left_behind(path)
        threads = [threading.Thread(target=attempt) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(holding) == 1
    assert not list(tmp_path.iterdir())


def test_a_takeover_that_was_left_behind_stands_in_the_way_of_one_attempt(tmp_path: Path) -> None:
    path, guard = tmp_path / "run.claim", tmp_path / "run.takeover"
    left_behind(path)
    left_behind(guard, age=301)
    with pytest.raises(Busy), claim(path):
        pass
    with claim(path):
        assert is_claimed(path) and not guard.exists()


def test_a_heart_beats_while_a_claim_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.01)
    path = tmp_path / "run.claim"
    with claim(path):
        os.utime(path, (0, 0))
        until = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert is_claimed(path) and path.stat().st_mtime > 0
        left_behind(path, age=301, host="elsewhere")  # taken over, and then left
        time.sleep(0.2)
        assert not is_claimed(path)
    left_behind(path, age=301, host="elsewhere")
    time.sleep(0.2)
    assert not is_claimed(path)


def test_a_heart_goes_on_after_a_beat_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT", 0.01)
    beats: list[Path] = []

    def fail_at_first(path: Path) -> None:
        beats.append(path)
        if len(beats) == 1:
            raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr(os, "utime", fail_at_first)
    with claim(tmp_path / "run.claim"):
        until = time.monotonic() + 10
        while len(beats) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    assert len(beats) >= 3


def test_a_claim_that_was_taken_over_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "run.claim"
    with claim(path):
        left_behind(path, host="elsewhere")
    assert is_claimed(path)
