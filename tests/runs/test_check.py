"""Audits: a sound record passes; each kind of tampering is found."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swdlib import cli
from swdlib.data.load import load_data
from swdlib.deploy.stored import load_sparse, save_sparse
from swdlib.runs import check as audits
from swdlib.runs import records
from swdlib.runs.check import Audit, audit, audit_all
from swdlib.runs.config import Config
from swdlib.runs.run import code, network_of, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BOOK = Path(__file__).resolve().parents[2] / "book" / "records"
CONFIG = Config(epochs=2, width=4, sparsity=0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one record and its network."""
    folder = tmp_path_factory.mktemp("made")
    run(CONFIG, folder, progress=False)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, to be tampered with."""
    return shutil.copytree(made, tmp_path / "copy")


def record_in(folder: Path) -> Path:
    return records.path_of(CONFIG.settings(), folder)


def tampered(folder: Path, change: Callable[[dict[str, Any]], object]) -> Audit:
    path = record_in(folder)
    content = json.loads(path.read_text("utf-8"))
    change(content)
    content["checksum"] = records.checksum(content)  # one who tampers may know of it
    path.write_text(json.dumps(content), "utf-8")
    [found] = audit_all(folder)
    return found


def test_a_record_just_made_is_sound(made: Path) -> None:
    [found] = audit_all(made)
    assert found.problems == []
    assert (found.data, found.figures) == ("computed again", "computed again")
    said = f"commit {code()['commit']}" if "commit" in code() else f"version {code()['version']}"
    assert found.code.startswith(said)
    assert str(found).startswith(f"sound  {record_in(made).stem}  code: {said}")


@pytest.mark.parametrize("structure", ["filters", "weights"])
@pytest.mark.parametrize("recipe", ["dense", "han2015"])
def test_other_methods_and_structures_are_sound(
    recipe: str, structure: str, tmp_path: Path
) -> None:
    config = Config(epochs=2, finetune_epochs=1, width=4, recipe=recipe, structure=structure)
    run(config, tmp_path, progress=False)
    [found] = audit_all(tmp_path)
    assert found.problems == []


def test_held_out_images_and_divergence_are_sound(tmp_path: Path) -> None:
    run(Config(epochs=1, width=4, holdout=0.3), tmp_path, progress=False)
    run(Config(epochs=1, width=4, lr=1e20), tmp_path, progress=False)
    found = list(audit_all(tmp_path))
    assert [one.problems for one in found] == [[], []]
    assert sorted(one.figures for one in found) == ["-", "computed again"]


def set_row(number: int, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["rows"][number].update(values)


def set_code(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["provenance"].update(code={"version": "0.1.0", **values})


TAMPERING: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "configuration": (lambda c: c["config"].update(seed=3), "has been changed"),
    "status": (lambda c: c.update(status="best"), "finished or diverged, not 'best'"),
    "no rows": (lambda c: c.update(rows=[]), "has no rows"),
    "an epoch left out": (lambda c: c["rows"].pop(0), "epochs must be 1 to 2, not [2]"),
    "the cut left out": (lambda c: c["rows"].pop(), "sparsity is 0.0, not 0.5"),
    "order": (lambda c: c["rows"].reverse(), "epoch must rise"),
    "twice": (lambda c: c["rows"].insert(0, c["rows"][0]), "step must rise"),
    "accuracy": (set_row(0, top1=101.0), "row 0: a loss, accuracy or sparsity is out of range"),
    "infinity": (set_row(1, loss=float("inf")), "row 1: a loss, accuracy"),
    "sparsity": (set_row(-1, sparsity=0.6), "sparsity is 0.6, not 0.5"),
    "parameters": (set_row(0, parameters=100), "removed is no sparsity of 0.0"),
    "weights": (set_row(0, weights={"zeros": 0, "counts": [1]}), "row 0: weights must count"),
    "a column": (lambda c: c["rows"][0].pop("loss"), "KeyError('loss')"),
    "rows of another kind": (lambda c: c.update(rows=[1, 2]), "cannot be read"),
    "code": (set_code(commit="123", clean=True), "its commit, 123, is not in the history"),
    "a commit without its state": (set_code(commit="abc"), "KeyError('clean')"),
    "no provenance": (lambda c: c.update(provenance={}), "KeyError('code')"),
    "data": (
        lambda c: c["provenance"]["dataset"].update(fingerprint="f00"),
        "fingerprint f00 is not of digits with 0 held out",
    ),
    "loss": (set_row(-1, loss=0.1), "loss is"),
    "top1": (set_row(-1, top1=0.5), "top1 is"),
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_tampering_is_found(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = TAMPERING[kind]
    monkeypatch.setattr(audits, "_commits", lambda: frozenset({"abc"}))
    found = tampered(folder, change)
    assert any(message in problem for problem in found.problems), found.problems
    assert str(found).startswith("WRONG")


def test_figures_are_computed_again_in_the_arithmetic_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audits, "TOLERANCE", {"bf16": (1e-5, 0.01)})
    run(dataclasses.replace(CONFIG, precision="bf16"), tmp_path, progress=False)
    [found] = audit_all(tmp_path)
    assert (found.figures, found.problems) == ("computed again", [])


@pytest.mark.parametrize("text", ["", "{", "[]", '"rows"', '{"config": {}, "rows": []}'])
def test_what_is_no_record_is_found(text: str, folder: Path) -> None:
    record_in(folder).write_text(text, "utf-8")
    [found] = audit_all(folder)
    assert found.problems


@pytest.mark.parametrize("text", ["[" * 100_000, '{"config": ' * 100_000])
def test_one_record_does_not_stop_the_audit_of_others(text: str, folder: Path) -> None:
    other = record_in(folder).with_name("other.json")
    other.write_text(text, "utf-8")
    first, second = audit_all(folder)
    assert first.problems == [] and second.problems


def test_a_network_of_impossible_size_is_found(folder: Path) -> None:
    assert tampered(folder, lambda content: content["config"].update(width=10**12)).problems


def test_a_record_that_was_moved_is_found(folder: Path) -> None:
    path = record_in(folder)
    path.rename(path.with_name(f"better-{path.name}"))
    [found] = audit_all(folder)
    assert "it belongs at" in found.problems[0]


@pytest.mark.parametrize(
    ("values", "known", "said"),
    [
        ({"commit": "abc", "clean": True}, {"abc"}, "commit abc"),
        ({"commit": "abc", "clean": False}, {"abc"}, "commit abc with changes"),
        ({"commit": "abc", "clean": True}, None, "commit abc (not checked: no history here)"),
        ({}, {"abc"}, "version 0.1.0"),
        ({"digest": "f659550770fb"}, {"abc"}, "version 0.1.0"),  # of a former version of swdlib
    ],
)
def test_the_code_is_named(
    values: dict[str, Any], known: Any, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audits, "_commits", lambda: known)
    found = tampered(folder, set_code(**values))
    assert (found.code, found.problems) == (said, [])


def test_another_network_beside_the_record_is_found(folder: Path) -> None:
    path = record_in(folder).with_suffix(".safetensors.zlib")
    config = Config(**json.loads(record_in(folder).read_text("utf-8"))["config"])
    network = config.build(load_data("digits"))
    masks = load_sparse(network, path)
    name, mask = next((name, mask) for name, mask in masks.items() if not mask.all())
    place = tuple((~mask).nonzero()[0])
    with torch.no_grad():
        network.get_parameter(name)[place] = 1e-20  # one weight too many
    mask[place] = True
    save_sparse(network, masks, path)
    [found] = audit_all(folder)
    another, problem = found.problems
    assert "is not the network of this run" in another
    assert "weights are zero, not" in problem
    for damage in (b"", path.read_bytes()[:-9]):
        path.write_bytes(damage)
        [found] = audit_all(folder)
        assert "does not hold its network" in found.problems[1]
    save_file({"weight": torch.zeros(1)}, path)
    [found] = audit_all(folder)
    assert "does not hold its network" in found.problems[1]


def test_rows_and_network_of_another_run_are_found(folder: Path) -> None:
    """Of seed 1 under the configuration of seed 0, with the checksum made new or not."""
    other = dataclasses.replace(CONFIG, seed=1)
    run(other, folder, progress=False)
    path, theirs = record_in(folder), records.path_of(other.settings(), folder)
    content = json.loads(path.read_text("utf-8"))
    content["rows"] = json.loads(theirs.read_text("utf-8"))["rows"]
    path.write_text(json.dumps(content), "utf-8")
    assert "has been changed since it was written" in audit(path).problems[0]
    content["checksum"] = records.checksum(content)
    path.write_text(json.dumps(content), "utf-8")
    assert any("is" in problem for problem in audit(path).problems)
    network_of(path).write_bytes(network_of(theirs).read_bytes())
    assert "is not the network of this run" in audit(path).problems[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["config"].update(epochs=10**9),
        lambda content: content["rows"][0].update(parameters=10**400),
        lambda content: content.update(provenance=None),
        lambda content: content.update(rows=5),
    ],
)
def test_numbers_of_any_size_take_no_memory(change: Any, folder: Path) -> None:
    assert tampered(folder, change).problems


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "smoke" / "pipe.json")
    _, found = audit_all(folder)
    assert "it is no file" in found.problems[0]


def test_without_the_network_figures_are_not_computed_again(folder: Path) -> None:
    record_in(folder).with_suffix(".safetensors.zlib").unlink()
    [found] = audit_all(folder)
    assert (found.figures, found.problems) == ("-", [])


def test_known_fingerprints_are_those_of_the_data(cifar10_folder: Path) -> None:
    known = tomllib.loads((BOOK / "known.toml").read_text("utf-8"))["fingerprints"]
    roots = {"digits": None, "cifar10": cifar10_folder}
    assert known
    for fingerprint, (name, holdout) in known.items():
        assert load_data(name, roots[name], holdout=holdout).fingerprint == fingerprint


@pytest.mark.parametrize(
    ("known", "said"),
    [
        (None, "not checked"),
        ('ae3bcfea977962c9 = ["cifar10", 0.0]', "known"),
        ('ae3bcfea977962c9 = ["cifar10", 0.1]', "unknown"),
        ('ae3bcfea977962c9 = ["digits", 0.0]', "unknown"),
        ("", "unknown"),
    ],
)
def test_data_that_is_not_here_must_be_listed_if_there_is_a_list(
    known: str | None, said: str, tmp_path: Path
) -> None:
    (tmp_path / "laptop").mkdir()
    shutil.copy(
        BOOK / "laptop" / "cifar10-resnet20-swd-0.98-fb11a67e37786b60.json", tmp_path / "laptop"
    )
    if known is not None:
        (tmp_path / "known.toml").write_text(f"[fingerprints]\n{known}\n", "utf-8")
    [found] = audit_all(tmp_path)
    problem = "fingerprint ae3bcfea977962c9 is not of cifar10 with 0 held out"
    assert (found.data, found.problems) == (said, [problem] if said == "unknown" else [])


def test_the_command_tells_all_and_fails_if_something_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["check", str(folder)])
    assert "sound" in capsys.readouterr().out
    record_in(folder).write_text("", "utf-8")
    with pytest.raises(SystemExit, match=r"1 of 1 records in .* are wrong"):
        cli.main(["check", str(folder)])
    assert "is no readable record" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no record in"):
        cli.main(["check", str(folder / "empty")])


def test_the_records_of_the_book_are_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = shutil.ignore_patterns("checkpoints", "*.safetensors.zlib")
    for part in ("laptop", "ablations"):
        shutil.copytree(BOOK / part, tmp_path / "records" / part, ignore=left_out)
    shutil.copy(BOOK / "known.toml", tmp_path / "records")
    cli.main(["check", str(tmp_path / "records")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list((tmp_path / "records").rglob("*.json")))
    assert all(line.startswith("sound  ") for line in lines)
    assert not any("data: not checked" in line for line in lines)


@pytest.mark.slow
def test_a_network_of_the_book_measures_as_its_record_says(
    cifar10_folder: Path, tmp_path: Path
) -> None:
    # One in fp32: processors without bf16 would take minutes.
    config = Config(
        profile="laptop",
        recipe="renda2020",
        structure="filters",
        criterion="batch_norm_scale",
        sparsity=0.9,
        finetune_epochs=5,
        lr=0.2,
    )
    path = records.path_of(config.settings(), BOOK)
    (tmp_path / "laptop").mkdir()
    for file in (path, path.with_suffix(".safetensors.zlib")):
        shutil.copy(file, tmp_path / "laptop")
    [found] = audit_all(tmp_path, cifar10_folder)
    assert (found.data, found.figures, found.problems) == (*["computed again"] * 2, [])


def test_a_record_can_be_audited_alone(made: Path) -> None:
    assert audit(record_in(made)).problems == []
