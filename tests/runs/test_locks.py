"""Locks: one process or thread at a time, and none that has ended stands in the way."""

import fcntl
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from swdlib.runs.run import Busy, is_locked, lock, lock_of

HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1], timeout=0):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held_elsewhere(path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Hold the lock in another process."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_lock_file_lies_beside_the_checkpoint() -> None:
    path = Path("records/smoke/digits-cnn-swd-0.9-0123.json")
    assert lock_of(path) == Path("records/smoke/checkpoints/digits-cnn-swd-0.9-0123.lock")


def test_a_lock_and_its_file_last_as_long_as_the_context(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "run-0.9-0123.lock"
    assert not is_locked(path) and not path.parent.exists()
    with lock(path):
        assert is_locked(path) and path.exists()
        with pytest.raises(Busy, match=r"run-0.9-0123 is being run by another process.*\.lock$"):
            lock(path, timeout=0).__enter__()
        assert is_locked(path)
    assert not is_locked(path)
    assert not list(path.parent.iterdir())


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with pytest.raises(KeyboardInterrupt), lock(path):
        raise KeyboardInterrupt
    assert not path.exists()
    with lock(path, timeout=0):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_killed_process_is_free_at_once(
    number: signal.Signals, tmp_path: Path
) -> None:
    path = tmp_path / "run.lock"
    with held_elsewhere(path) as process:
        assert is_locked(path)
        with pytest.raises(Busy):
            lock(path, timeout=0).__enter__()
        process.send_signal(number)
        process.wait()
        assert path.exists()
        with lock(path, timeout=0):
            assert is_locked(path)
    assert not path.exists()


def test_a_look_removes_the_file_that_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with held_elsewhere(path) as process:
        assert is_locked(path) and path.exists()
        process.kill()
        process.wait()
        assert path.exists() and not is_locked(path)
    assert not path.exists()


def test_a_short_look_of_another_process_is_outwaited(tmp_path: Path) -> None:
    path, looking, done = tmp_path / "run.lock", threading.Event(), threading.Event()

    def look() -> None:
        with lock(path):
            looking.set()
            done.wait(0.1)

    thread = threading.Thread(target=look)
    thread.start()
    looking.wait()
    with lock(path):
        assert is_locked(path)
    thread.join()
    assert not path.exists()


def test_another_user_of_a_shared_folder_may_open_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with lock(path):
        assert path.stat().st_mode & 0o666 == 0o666


def test_a_folder_that_cannot_be_made_is_not_busy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        lock(tmp_path / "file" / "run.lock").__enter__()
    assert not isinstance(caught.value, Busy)


@pytest.mark.parametrize("left_behind", [False, True])
def test_of_many_threads_at_the_same_time_one_gets_it(left_behind: bool, tmp_path: Path) -> None:
    path, together = tmp_path / "run.lock", threading.Barrier(16)
    holding, refused, done = list[int](), list[int](), threading.Event()

    def attempt() -> None:
        together.wait()
        try:
            with lock(path, timeout=0):
                holding.append(1)
                done.wait(10)
        except Busy:
            refused.append(1)
            if len(refused) == 15:
                done.set()

    for _ in range(5):
        for found in (holding, refused):
            found.clear()
        done.clear()
        if left_behind:
            path.touch()
        threads = [threading.Thread(target=attempt) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(holding), len(refused)) == (1, 15)
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_removed_before_it_could_be_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = tmp_path / "run.lock", fcntl.flock
    holder = lock(path)
    holder.__enter__()

    def release_first(file: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        holder.__exit__(None, None, None)  # after the file was opened
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", release_first)
    with lock(path):
        assert path.exists() and is_locked(path)
    assert not path.exists()
