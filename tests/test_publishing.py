"""What a new owner relies on: workflows, the release, the wheel, PyTorch without CUDA."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import swdlib
from tests.conftest import unavailable
from tests.test_project import PACKAGE, ROOT, project, python, snippets

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BIN = Path(sys.executable).parent


def workflow(path: Path) -> Any:
    """Return a workflow; YAML reads its key `on` as true."""
    return yaml.safe_load(path.read_text("utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    """Return the steps of all jobs of a workflow."""
    return [step for job in workflow(path)["jobs"].values() for step in job.get("steps", [])]


def make(*arguments: str, folder: Path = ROOT) -> str:
    """Run make and return what it prints."""
    done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# The workflows


@pytest.mark.parametrize("command", [["actionlint"], ["zizmor", "--offline", ".github"]])
def test_workflows_pass(command: list[str]) -> None:
    program = BIN / command[0]
    if not program.exists():
        unavailable(f"{command[0]} has no wheel for this system")
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit_and_name_their_version(path: Path) -> None:
    used = re.findall(r"uses: (.*)", path.read_text("utf-8"))
    assert used
    for line in used:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+|\./\.github/.*", line)


def test_an_action_has_one_version_in_all_workflows() -> None:
    text = "".join(path.read_text("utf-8") for path in WORKFLOWS)
    used = set(re.findall(r"uses: (\S+)@(\S+)", text))
    assert len(used) == len(dict(used))


def test_workflows_run_what_can_be_run_here() -> None:
    commands = [step["run"] for path in WORKFLOWS for step in steps(path) if "run" in step]
    assert sorted(command.split()[1] for command in commands) == [
        *("book", "lowest", "publish-check", "test"),
    ]
    for command in commands:
        assert make("-n", *command.split()[1:])


def test_tests_run_with_the_oldest_and_the_newest_python() -> None:
    oldest, above = re.findall(r"3\.(\d+)", project()["project"]["requires-python"])
    [path] = [path for path in WORKFLOWS if path.stem == "test"]
    assert workflow(path)["jobs"]["test"]["strategy"]["matrix"]["python"] == [
        *(f"3.{oldest}", f"3.{int(above) - 1}"),
    ]


def test_only_the_job_that_uploads_may_ask_for_a_token() -> None:
    for path in WORKFLOWS:
        assert workflow(path)["permissions"] == {"contents": "read"}
        granted = {name: job.get("permissions") for name, job in workflow(path)["jobs"].items()}
        allowed = {"deploy", "publish"} & set(granted)
        assert {name for name, given in granted.items() if given} == allowed


# PyTorch without CUDA


def test_torch_comes_from_its_own_index_if_it_is_asked_for() -> None:
    given = "-n", "VENV=_build/none", "book"
    index = "--index-url https://download.pytorch.org/whl/cpu torch torchvision"
    own, rest = [line for line in make(*given, "TORCH=cpu").splitlines() if "pip install" in line][
        -2:
    ]
    assert own.endswith(index) and rest.endswith("-e '.[book]'")
    assert "index-url" not in make(*given)
    assert "--index-url file:///wheels torch" in make(
        *given, "TORCH=cpu", "TORCH_INDEX=file:///wheels"
    )


# The release


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a release, as the workflow does, in a copy; return the folder with its files."""
    folder = tmp_path_factory.mktemp("release")
    cache = shutil.ignore_patterns("__pycache__")
    for name in ("swdlib", ".github"):
        shutil.copytree(ROOT / name, folder / name, ignore=cache)
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, folder)
    installed = ["--old-file=.venv/.test", f"BIN={BIN}"]
    make(*installed, "publish-check", f"TAG=v{swdlib.__version__}", folder=folder)
    with pytest.raises(AssertionError, match="v99"):
        make(*installed, "publish-check", "TAG=v99.0", folder=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(release: Path) -> Path:
    """Return the wheel of the release."""
    [path] = release.glob("*.whl")
    return path


@pytest.mark.slow
def test_sdist_has_the_library_and_what_builds_it(release: Path) -> None:
    [path] = release.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "swdlib/swd.py"} <= names


@pytest.mark.slow
def test_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"swdlib/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
    modules.add("swdlib/py.typed")
    assert modules <= names
    assert all(
        name.startswith(f"swdlib-{swdlib.__version__}.dist-info/") for name in names - modules
    )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a folder of its own and return that."""
    folder = tmp_path_factory.mktemp("installed")
    python("-m", "pip", "install", "--no-deps", "-t", str(folder), str(wheel), folder=folder)
    return folder


@pytest.mark.slow
def test_wheel_works_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    source = "import swdlib; print(swdlib.__file__, swdlib.__version__)"
    printed = python("-c", source, folder=tmp_path, PYTHONPATH=str(installed))
    assert printed == f"{installed / 'swdlib' / '__init__.py'} {swdlib.__version__}"
    run = ["-m", "swdlib.cli", "run", "--epochs", "1", "--width", "4"]
    printed = python(*run, folder=tmp_path, PYTHONPATH=str(installed))
    assert "89.98 % of the prunable weights removed" in printed
    assert list((tmp_path / "records" / "smoke").glob("*.json"))


@pytest.mark.slow
def test_wheel_runs_the_example_of_the_readme(installed: Path, tmp_path: Path) -> None:
    removed = "print(sum(int((~mask).sum()) for mask in masks.values()))"
    source = f"{snippets()[0]}\n{removed}"
    assert python("-c", source, folder=tmp_path, PYTHONPATH=str(installed)) == "2131"
