"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest

from swdlib.files import remove_unfinished, write_whole


def test_a_file_and_its_folder_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_whole(path, lambda file: file.write_text("new"))
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"

    def write(file: Path) -> None:
        file.write_text("outer")
        write_whole(path, lambda other: other.write_text("inner"))
        assert path.read_text() == "inner" and file.read_text() == "outer"

    write_whole(path, write)
    assert path.read_text() == "outer" and list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_text("old")

    def fail(file: Path) -> None:
        file.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    write_whole(tmp_path / "link.txt", lambda file: file.write_text("new"))
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe must be a file"):
        write_whole(tmp_path / "pipe", lambda file: file.write_text("new"))
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127])
def test_names_may_be_as_long_as_the_system_allows(name: str, tmp_path: Path) -> None:
    write_whole(tmp_path / name, lambda file: file.write_text("new"))
    assert (tmp_path / name).read_text() == "new"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "run [1].pt", tmp_path / "another run.pt"
    for file in (path, other):
        (tmp_path / f".{file.name}.{'0' * 32}").write_text("half")
    remove_unfinished(path)
    assert [file.name for file in tmp_path.iterdir()] == [f".another run.pt.{'0' * 32}"]
