"""Files are written whole or not at all."""

from pathlib import Path

import pytest

from swdlib.files import write_whole


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
