"""Checkpoints: whole or not at all, and nothing in them runs."""

import pickle
from pathlib import Path
from typing import Any

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
