"""Checkpoints: whole or not at all, and nothing in them runs."""

import pickle
import random
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from swdlib.runs import training


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "run.pt"
    state = {"weights": torch.arange(3.0), "rows": [{"loss": 0.5}], "penalty": None}
    training.save_checkpoint(path, state)
    loaded = training.load_checkpoint(path)
    assert torch.equal(loaded.pop("weights"), torch.arange(3.0))
    assert loaded == {"rows": [{"loss": 0.5}], "penalty": None}
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]


def test_no_file_is_an_empty_state(tmp_path: Path) -> None:
    assert training.load_checkpoint(tmp_path / "run.pt") == {}
    assert training.load_checkpoint(None) == {}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "run.pt"
    training.save_checkpoint(path, {"step": 1})

    def fail(state: Any, file: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        training.save_checkpoint(path, {"step": 2})
    assert training.load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
    return type(a) is type(b) and bool(a == b)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path, generator = tmp_path / "run.pt", random.Random(0)
    state = {"model": {"a": torch.randn(20, 30)}, "rows": [{"loss": 0.5}], "masks": {}, "step": 3}
    training.save_checkpoint(path, state)
    whole, found = path.read_bytes(), 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(training.load_checkpoint(path), state)
        except ValueError:
            found += 1
    assert found > 200  # the rest fell between the parts of the file, or into dates


@pytest.mark.parametrize("content", [[1, 2], 5, torch.zeros(2)])
def test_what_is_no_state_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        training.load_checkpoint(tmp_path / "run.pt")


def test_a_compressed_file_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(10_000)}, tmp_path / "run.pt")
    with ZipFile(tmp_path / "run.pt") as plain, ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="no readable checkpoint"):
        training.load_checkpoint(tmp_path / "bomb.pt")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def fail(state: Any, file: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672]")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"run\.pt could not be written; is the disk full"):
        training.save_checkpoint(tmp_path / "run.pt", {"step": 2})


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.pt"
    path.write_bytes(pickle.dumps({"model": Bomb()}))
    torch.save({"model": Bomb()}, tmp_path / "zipped.pt")
    for file in (path, tmp_path / "zipped.pt"):
        with pytest.raises(ValueError, match="delete it to start again"):
            training.load_checkpoint(file)
    assert not Path("exploded").exists()


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    training.save_checkpoint(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"run\.pt is no readable checkpoint"):
        training.load_checkpoint(path)
