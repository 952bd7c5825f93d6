"""Sweeps: every combination once."""

from pathlib import Path

import pytest

from swdlib.sweeps import grid, sweep


def test_the_grid_has_every_combination_once() -> None:
    configs = grid({"recipe": ["dense", "swd"], "sparsity": [0.5, 0.9], "seed": [0, 1]})
    found = [(c.recipe, c.sparsity, c.seed) for c in configs]
    assert found == [
        ("dense", 0.0, 0),
        ("dense", 0.0, 1),
        *[("swd", sparsity, seed) for sparsity in (0.5, 0.9) for seed in (0, 1)],
    ]


def test_a_mistake_in_a_grid_comes_to_light_before_the_first_run() -> None:
    with pytest.raises(ValueError, match="sparsity"):
        grid({"sparsity": [0.5, 1.5]})


def test_a_sweep_yields_a_record_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = grid({"epochs": [1], "width": [4], "recipe": ["dense", "swd"]})
    records = list(sweep(configs, tmp_path))
    assert [record.config["recipe"] for record in records] == ["dense", "swd"]
    assert "[2/2] swd at sparsity 0.9: cnn of width 4 on digits" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.json"))) == 2
