"""The command line: flags are the fields of Config."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from swdlib import cli
from swdlib.config import Config
from swdlib.records import load_records

QUICK = ["--epochs", "1", "--width", "4"]


def test_run_then_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--records", str(tmp_path)]
    cli.main(["run", *QUICK, "--sparsity", "0.5", *folder])
    printed = capsys.readouterr().out
    assert "swd at sparsity 0.5: cnn of width 4 on digits, 1 epochs, seed 0" in printed
    assert "50.00 % of the prunable weights removed" in printed
    cli.main(["show", *folder])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["dataset", "data_source", "model"]
    assert line.split()[:3] == ["digits", "scikit-learn", "cnn"]
    assert load_records(tmp_path)["run"].iloc[0] in line


def test_sweep_takes_several_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--recipe", "dense", "swd", "--sparsity", "0.5", "0.8"]
    cli.main(["sweep", *QUICK, *values, "--records", str(tmp_path)])
    assert "[3/3]" in capsys.readouterr().out
    final = load_records(tmp_path).groupby("run").tail(1)
    assert sorted(final["target_sparsity"]) == [0.0, 0.5, 0.8]


@pytest.mark.parametrize("setting", [f.name for f in fields(Config)])
def test_every_field_is_a_flag(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "sweep"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert f"--{setting.replace('_', '-')}" in capsys.readouterr().out


def test_flags_have_the_types_of_the_fields() -> None:
    arguments = ["run", "--a-min", "1", "--a_max", "100", "--nesterov", "false", "--width", "4"]
    options = cli.parser().parse_args(arguments)
    given = {"a_min": 1.0, "a_max": 100.0, "nesterov": False, "width": 4}
    assert {name: getattr(options, name) for name in given} == given
    assert not hasattr(options, "seed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--sparsity", "1.5"], r"swdlib: error: sparsity must be in \[0, 1\), not 1.5"),
        (["run", "--recipe", "magic"], "recipe must be one of"),
        (["run", "--dataset", "cifar10", "--data-root", "/nowhere/x"], "CIFAR-10"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swdlib.cifar10._download", _no_download)
    with pytest.raises(SystemExit, match=message):
        cli.main([*arguments, "--records", str(tmp_path)])
    assert not list(tmp_path.rglob("*.json"))


def _no_download(root: Path, tried: list[str]) -> Path:
    raise FileNotFoundError("CIFAR-10 was not found")


def test_show_without_records_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no record yet"):
        cli.main(["show", "--records", str(tmp_path)])


def test_a_flag_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--epochs", "many"])
    assert "invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_make_one_run(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = ["-m", "swdlib.cli", "run", "--model", "mlp", "--epochs", "2", "--device"]
    printed = []
    for device in ("auto", "cpu"):
        command = [*launch, *run, device, "--records", str(tmp_path / device)]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    assert printed[0].count("Top-1") == 1
    cli.main([*run[2:], "cpu", "--records", str(tmp_path / "one")])
    top1 = [load_records(tmp_path / name)["top1"].tolist() for name in ("auto", "one")]
    assert top1[0] == pytest.approx(top1[1], abs=1.5)  # a sum in another order; a few images


@pytest.mark.slow
def test_the_installed_command_answers() -> None:
    script = Path(sys.executable).with_name("swdlib")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "run" in done.stdout
    assert "show" in done.stdout
