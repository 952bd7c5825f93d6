"""The command line: flags are the fields of Config."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import load as load_onnx
from safetensors.torch import load_file

import swdlib
from swdlib import cli
from swdlib.data.load import load_data
from swdlib.deploy.stored import in_onnxruntime
from swdlib.runs import records
from swdlib.runs.config import Config
from swdlib.runs.records import Record, load_records
from swdlib.runs.run import lock, lock_of
from swdlib.runs.workers import Workers

GRIDS = Path(__file__).resolve().parents[1] / "book" / "grids"
QUICK = ["--epochs", "1", "--width", "4"]


def test_run_then_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--records", str(tmp_path)]
    cli.main(["run", *QUICK, "--sparsity", "0.5", *folder])
    printed = capsys.readouterr().out
    assert "swd at sparsity 0.5: cnn of width 4 on digits, 1 epochs, seed 0" in printed
    assert "50.00 % of the prunable weights removed" in printed and "on record" not in printed
    cli.main(["run", *QUICK, "--sparsity", "0.5", *folder])
    [path] = (tmp_path / "smoke").glob("*.json")
    again = capsys.readouterr().out
    assert again == f"{printed}on record already, so not trained again: {path}\n"
    cli.main(["show", *folder])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["dataset", "model", "recipe"]
    assert line.split()[:3] == ["digits", "cnn", "swd"]
    assert load_records(tmp_path)["run"].iloc[0] in line


def test_version_is_that_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"swdlib {swdlib.__version__}\n")


def test_progress_is_a_line_for_each_row_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["run", "--epochs", "2", "--width", "4", "--records", str(tmp_path)])
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == [
        *("epoch 1, train", "epoch 2, train", "epoch 2, prune"),
    ]


# What is done with records


def put(folder: Path, top1: float, **settings: Any) -> str:
    """Write the record of a run and return its address."""
    config = Config(**settings).settings()
    row = {"kind": "prune", "top1": top1, "loss": 1.0, "parameters": 100, "sparsity": 0.9}
    facts = {"code": {"commit": "abc"}, "dataset": {"source": "files"}}
    records.save(records.Record(config, [{**row, "weights": {}}], facts), folder)
    return records.address(config)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Return a folder of records: two rates of SWD with two seeds each, and another method."""
    for lr, seed, top1 in ((0.1, 0, 95.0), (0.1, 1, 85.0), (0.4, 0, 93.0), (0.4, 1, 91.0)):
        put(tmp_path, top1, lr=lr, seed=seed)
    put(tmp_path, 80.0, recipe="han2015", holdout=0.1)
    return tmp_path


def shown(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, str]]:
    """Return the rows that `swdlib show` prints."""
    cli.main(["show", "--records", str(folder), *flags])
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_show_has_the_columns_that_tell_runs_apart(
    several: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shown(several, capsys)
    assert {"peak_lr", "a_max", "iterations", "measured_on", "commit"} <= set(rows[0])
    assert {"width", "batch_size", "data_source"}.isdisjoint(rows[0])
    _, *swd = rows
    assert {(row["peak_lr"], row["seed"]) for row in swd} == {
        *(("0.1", "0"), ("0.1", "1"), ("0.4", "0"), ("0.4", "1")),
    }


@pytest.mark.parametrize(
    ("flags", "top1"),
    [
        (["--where", "recipe=swd", "--where", "lr=0.4"], [93, 91]),
        (["--where", "peak-lr=0.40", "--where", "seed=1"], [91]),
        (["--where", "a_max=none"], [80]),
        (
            ["--where", "recipe=swd", "--best"],
            [93, 91],
        ),  # their mean is 92, that of 95 and 85 is 90
        (["--where", "recipe=swd", "--sort", "top1"], [85, 91, 93, 95]),
    ],
)
def test_runs_are_chosen_and_sorted(
    flags: list[str], top1: list[float], several: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["show", "--records", str(several), *flags, "--json"])
    assert [row["top1"] for row in json.loads(capsys.readouterr().out)] == top1
    cli.main(["show", "--records", str(several), *flags, "--csv"])
    rows = csv.DictReader(capsys.readouterr().out.splitlines())
    assert [float(row["top1"]) for row in rows] == top1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--where", "nothing=1"], "nothing is no column; there are run, "),
        (["--where", "seed=7"], "none of the 5 runs on record is such a run"),
        (["--sort", "nothing"], "--sort must be one of run, .*, not 'nothing'"),
    ],
)
def test_a_choice_that_cannot_be_is_told(flags: list[str], told: str, several: Path) -> None:
    with pytest.raises(SystemExit, match=told):
        cli.main(["show", "--records", str(several), *flags])


def test_a_choice_without_a_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["show", "--where", "seed"])
    assert "must be NAME=VALUE, not 'seed'" in capsys.readouterr().err


def test_plot_is_written_to_a_file(several: Path) -> None:
    target = several / "plot.svg"
    cli.main(["plot", str(target), "--records", str(several), "--where", "recipe=swd"])
    assert "<svg" in target.read_text("utf-8")


def test_figure_of_the_results_is_drawn_by_the_command_on_its_page(tmp_path: Path) -> None:
    page = (GRIDS.parent / "results.md").read_text("utf-8")
    [command] = re.findall(r"^```sh\nswdlib (.*?)\n```", page, re.MULTILINE | re.DOTALL)
    arguments = shlex.split(command.replace("\\\n", ""))
    arguments[1] = str(tmp_path / arguments[1])
    cli.main([*arguments, "--records", str(GRIDS.parent / "records" / "laptop")])
    drawn, stored = (
        (folder / "accuracy.svg").read_text() for folder in (tmp_path, GRIDS.parent / "_static")
    )
    assert drawn.count("clip-path=") == stored.count("clip-path=")  # as many lines and points


def test_network_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--records", str(tmp_path)]
    cli.main(["run", *QUICK, "--structure", "filters", "--sparsity", "0.5", *place])
    [record], [stored] = tmp_path.rglob("*.json"), tmp_path.rglob("*.zlib")
    onnx, dense, sparse = (tmp_path / name for name in ("a.onnx", "a.safetensors", "a.zlib"))
    run = load_records(tmp_path)["run"].iloc[0]
    cli.main(["export", run[:5], "--dense", str(dense), *place])
    assert capsys.readouterr().out.endswith(f"written: {dense}\n")
    network = Config(epochs=1, width=4).build(load_data("digits"))
    network.load_state_dict(load_file(dense))
    cli.main(["export", str(record), "--sparse", str(sparse)])
    assert sparse.read_bytes() == stored.read_bytes()
    cli.main(["export", run, "--onnx", str(onnx), *place])
    images, _ = next(load_data("digits").test_batches(8))
    logits = in_onnxruntime(onnx)(images)
    assert torch.allclose(logits, network.eval()(images), atol=1e-4)
    kept = sum(np.prod(weight.dims) for weight in load_onnx(onnx).graph.initializer)
    assert kept < 0.7 * sum(p.numel() for p in network.parameters())
    stored.unlink()
    with pytest.raises(SystemExit, match="came without its network, which the same run makes"):
        cli.main(["export", run, "--onnx", str(onnx), *place])


def test_exported_network_of_the_published_structure_is_as_small_as_its_record_says(
    tmp_path: Path,
) -> None:
    network = ["--model", "tessier_resnet20", "--width", "4", "--structure", "tessier_scales"]
    place = ["--records", str(tmp_path)]
    cli.main(["run", *QUICK, *network, "--criterion", "batch_norm_scale", *place])
    [record] = tmp_path.rglob("*.json")
    cli.main(["export", str(record), "--onnx", str(tmp_path / "a.onnx")])
    stored = sum(np.prod(w.dims) for w in load_onnx(tmp_path / "a.onnx").graph.initializer)
    assert stored < 1.05 * records.load(record).final["parameters"]  # and constants of the graph


def test_export_asks_for_one_run(several: Path) -> None:
    with pytest.raises(SystemExit, match="not 'xyz', with which 0 begin"):
        cli.main(["export", "xyz", "--dense", "a", "--records", str(several)])


def test_a_tracked_run_has_the_same_record(tmp_path: Path) -> None:
    folder = ["--records", str(tmp_path)]
    cli.main(["run", *QUICK, *folder, "--tracker", "tensorboard"])
    assert list((tmp_path / "smoke" / "trackers").rglob("events.out.tfevents.*"))
    [path] = (tmp_path / "smoke").glob("*.json")
    assert records.load(path).config["tracker"] is None
    cli.main(["run", *QUICK, *folder])
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.parametrize(
    ("processor", "precision", "warned"),
    [("AVX2", "bf16", True), ("AVX2", "fp32", False), ("AVX512", "bf16", False)],
)
def test_emulated_bf16_is_announced(
    processor: str,
    precision: str,
    warned: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: processor)
    more = ["--precision", precision, "--device", "cpu", "--records", str(tmp_path)]
    for command in ("run", "sweep"):
        cli.main([command, *QUICK, *more])
        assert ("try --precision fp32" in capsys.readouterr().err) == warned


@pytest.mark.slow
def test_sweep_takes_several_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ["--recipe", "dense", "swd", "--sparsity", "0.5"]
    cli.main(["sweep", *QUICK, *values, "--records", str(tmp_path), "--jobs", "2"])
    printed = capsys.readouterr().out
    assert "[2/2]" in printed and "target_sparsity" in printed
    final = load_records(tmp_path).groupby("run").tail(1)
    assert sorted(final["target_sparsity"]) == [0.0, 0.5]


class Stubborn:
    """Workers with whom every run fails."""

    @contextmanager
    def __call__(self, *arguments: Any, **options: Any) -> Iterator[Workers]:
        def start(config: Config) -> "Future[Any]":
            future: Future[Any] = Future()
            future.set_exception(RuntimeError("killed by SIGKILL"))
            return future

        yield Workers(start, slots=1)


@pytest.mark.parametrize("workers", ["local", "ray"])
def test_a_sweep_of_a_grid_file_tells_at_the_end_what_failed(
    workers: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(cli, "on_ray" if workers == "ray" else "local", Stubborn())
    command = ["sweep", str(GRIDS / "digits.toml"), "--on", workers, "--retries", "1"]
    with pytest.raises(SystemExit, match="4 of 4 runs failed") as stopped:
        cli.main([*command, "--seed", "7", "--records", str(tmp_path)])
    assert "dense: cnn of width 16 on digits, 6 epochs, seed 7: killed by SIGKILL" in str(
        stopped.value
    )
    assert capsys.readouterr().out.count("restarted") == 4


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--gpus", "2"], "--gpus means nothing with --on local, which has --jobs"),
        (["--on", "local", "--address", "auto"], "--address means nothing with --on local"),
        (["--on", "ray", "--jobs", "2"], "--on ray, which has --cpus and --gpus and --address"),
    ],
)
def test_a_flag_of_other_workers_is_refused(flags: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=told):
        cli.main(["sweep", *QUICK, *flags, "--records", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--retries", "-1"], "retries must be 0 or more, not -1"),
        (["--on", "ray", "--gpus", "-1"], "gpus must be 0 or more, not -1"),
        (["--seed", str(2**63)], f"seed must be below 2\\*\\*63, not {2**63}"),
    ],
)
def test_a_wrong_number_is_told_before_any_run(flags: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=told):
        cli.main(["sweep", *QUICK, *flags, "--records", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_setting_that_the_recipe_does_not_use_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--recipe", "dense", "--sparsity", "0.5", "--seed", "1"]
    cli.main(["run", *QUICK, *given, "--records", str(tmp_path)])
    assert "swdlib: dense does not use sparsity\n" in capsys.readouterr().err


def test_check_wants_folders_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.touch()
    with pytest.raises(SystemExit, match=r"a\.json is a file: give the folder of the records"):
        cli.main(["check", str(file)])
    with pytest.raises(SystemExit, match=r"--data-root must be a folder, not .*none"):
        cli.main(["check", str(tmp_path), "--data-root", str(tmp_path / "none")])


def test_a_run_that_is_done_elsewhere_has_an_exit_status_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(epochs=1, width=4)
    path = lock_of(records.path_of(config.settings(), tmp_path))
    with lock(path), pytest.raises(SystemExit) as stopped:
        cli.main(["run", *QUICK, "--records", str(tmp_path)])
    assert stopped.value.code == 75
    assert "is being run by another process" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_says_how_to_go_on(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "run", lambda *a, **o: os.kill(os.getpid(), number))
    # A shell's background job ignores Ctrl-C, and so would these tests in one.
    given = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="; the same command resumes from the last checkpoint"):
        cli.main(["run"])
    with pytest.raises(SystemExit, match=r"command, without --again, resumes from the last"):
        cli.main(["run", "--again"])  # which would start from the beginning
    assert signal.getsignal(signal.SIGTERM) == before
    signal.signal(signal.SIGINT, given)


def test_a_dry_run_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["run", *QUICK, "--dry-run", "--records", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Dry run of swd at sparsity 0.9: cnn of width 4 on digits, 1 epochs, seed 0"
    assert lines[6].startswith("whole run  23 steps and 2 evaluations: about ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [f.name for f in fields(Config)])
def test_every_field_is_a_flag(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "sweep"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        flag = f"--{setting.replace('_', '-')}"  # whole: --a is in --a-min
        assert re.search(rf"{flag}(?![\w-])", capsys.readouterr().out)


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
        (["run", "--tracker", "magic"], "tracker must be one of"),
        (["sweep", "no.toml"], "swdlib: error: .*no.toml"),
        (["run", "--dataset", "cifar10", "--data-root", "/nowhere/x"], "CIFAR-10"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swdlib.data.cifar10._download", _no_download)
    with pytest.raises(SystemExit, match=message):
        cli.main([*arguments, "--records", str(tmp_path)])
    assert not list(tmp_path.rglob("*.json"))


def _no_download(root: Path, tried: list[str]) -> Path:
    raise FileNotFoundError("CIFAR-10 was not found")


def test_show_without_records_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no record in .*`swdlib run` makes one"):
        cli.main(["show", "--records", str(tmp_path)])


def test_a_flag_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--epochs", "many"])
    assert "invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes_make_one_run(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    accelerate += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    run = ["-m", "swdlib.cli", "run", "--model", "mlp", "--epochs", "2", "--device"]
    printed = []
    for device, launch in (("auto", torchrun), ("cpu", accelerate)):
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


def test_another_record_that_is_damaged_does_not_spoil_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text("{")
    cli.main(["sweep", *QUICK, "--records", str(tmp_path)])
    assert "top1" in capsys.readouterr().out


def test_what_a_record_says_is_no_formula_and_no_order_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**Config().settings(), "recipe": "=cmd|' /C calc'!A0", "update": "\x1b]0;owned\x07"}
    row = {"kind": "train", "top1": 1.0, "loss": 1.0, "parameters": 1, "sparsity": 0.5}
    for seed in (0, 1):
        records.save(Record({**config, "seed": seed, "lr": seed + 1.0}, [row]), tmp_path)
    cli.main(["show", "--records", str(tmp_path), "--csv"])
    rows = csv.DictReader(capsys.readouterr().out.splitlines())
    assert {row["recipe"] for row in rows} == {"'" + config["recipe"]}
    for command in (["show"], ["show", "--where", "update=x"], ["check"]):
        with suppress(SystemExit):
            cli.main([*command, "--records", str(tmp_path)])
    out, err = capsys.readouterr()
    assert out and "\x1b" not in out + err and "\x07" not in out + err


def test_an_error_that_names_a_record_is_no_order_to_the_terminal(tmp_path: Path) -> None:
    content = {"\x1b]0;owned\x07": 1}
    whole = {**content, "checksum": records.checksum(content)}
    (tmp_path / "a.json").write_text(json.dumps(whole))
    with pytest.raises(SystemExit) as error:
        cli.main(["show", "--records", str(tmp_path)])
    assert "owned" in str(error.value) and "\x1b" not in str(error.value)
