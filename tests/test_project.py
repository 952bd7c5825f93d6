"""Contracts that hold the project together: layers, dependencies, the wheel, README, style."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import swdlib
from swdlib.experiments import UNDECIDING

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "swdlib"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# Module -> the modules next to it in the flow; what those may import, it may import too.
LAYERS: dict[str, set[str]] = {
    "schedules": set(),
    "criteria": set(),
    "tracing": set(),
    "graph": {"tracing"},
    "structures": {"criteria", "graph"},
    "allocations": {"structures"},
    "radix": set(),
    "readings": set(),
    "selection": {"radix", "readings"},
    "masks": {"allocations", "selection"},
    "joins": set(),
    "movement": {"masks"},
    "updates": {"readings"},
    "penalties": {"joins", "movement", "schedules", "updates"},
    "baselines": {"penalties"},
    "recipes": {"baselines"},
    "files": set(),
    "images": set(),
    "cifar10": {"files", "images"},
    "folders": set(),
    "streams": {"folders", "images"},
    "imagenet": {"folders", "images"},
    "data": {"cifar10", "streams"},
    "models": set(),
    "records": {"files"},
    "metrics": {"masks", "records"},
    "sparse_files": {"files", "masks"},
    "sparse_kernels": {"masks"},
    "onnx_files": {"files", "metrics"},
    "attention": set(),
    "shrinking": {"attention", "graph", "metrics"},
    "deploy": {"onnx_files", "shrinking", "sparse_files", "sparse_kernels"},
    "checks": {"metrics", "sparse_files"},
    "checkpoints": {"files"},
    "devices": set(),
    "evaluation": {"metrics"},
    "training": {"checkpoints", "devices", "recipes", "evaluation"},
    "config": {"data", "devices", "models", "recipes"},
    "experiments": {"config", "training", "records", "shrinking", "sparse_files"},
    "dryruns": {"experiments"},
    "plots": {"records"},
    "interactive": {"plots"},
    "claims": set(),
    "places": {"claims", "experiments"},
    "sweeps": {"dryruns", "places"},
    "history": {"experiments"},
    "audits": {"dryruns", "history"},
    "cli": {"audits", "dryruns", "sweeps", "plots"},
    "notebooks": set(),
}


def project() -> Any:
    """Return pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def imports(module: str) -> set[str]:
    """Return the dotted names of all that a module of the package imports, wherever it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(filter(None, ["swdlib" if node.level else "", node.module]))
            found |= {home} | {f"{home}.{alias.name}" for alias in node.names}
    return found


def siblings(module: str) -> set[str]:
    """Return the modules of the package that one of them imports."""
    parts = [name.split(".") for name in imports(module)]
    return {path[1] for path in parts if path[0] == "swdlib" and path[1:2]} & set(MODULES)


def reachable(module: str) -> set[str]:
    """Return all that a module may import."""
    return LAYERS[module] | {name for below in LAYERS[module] for name in reachable(below)}


def test_layers_go_one_way() -> None:
    order = list(LAYERS)
    for module, below in LAYERS.items():
        assert all(order.index(name) < order.index(module) for name in below), module


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_lies_before_it(module: str) -> None:
    assert module in LAYERS, f"add {module} to LAYERS"
    assert siblings(module) <= reachable(module)


def test_map_of_the_library_shows_each_module_once() -> None:
    page = (ROOT / "book" / "api.md").read_text("utf-8")
    rows = re.findall(r"^\| [A-Z].*\|$", page.split("## schedules")[0], re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == MODULES


def test_what_stands_for_the_code_of_a_run_is_all_that_it_imports() -> None:
    deciding, found = {"experiments"}, {"experiments"}
    while found:
        found = {name for module in found for name in siblings(module)} - deciding
        deciding |= found
    assert set(MODULES) - deciding == set(UNDECIDING) - {"__init__"}


@pytest.mark.parametrize("module", sorted({"plots", "records"} & set(MODULES)))
def test_drawing_and_reading_need_no_torch(module: str) -> None:
    assert not {name for name in imports(module) if name.split(".")[0] == "torch"}


@pytest.mark.parametrize("module", MODULES)
def test_module_has_its_tests(module: str) -> None:
    assert (ROOT / "tests" / f"test_{module}.py").is_file()


def test_environment_takes_its_packages_from_pyproject() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    *outside, inside = conda["dependencies"]
    assert outside == [f"python{project()['project']['requires-python']}", "pip"]
    [line] = inside["pip"]
    extras = project()["project"]["optional-dependencies"]
    assert line == f"-e .[{','.join(extras)}]"


def test_no_package_is_listed_twice() -> None:
    table = project()["project"]
    lists = [table["dependencies"], *table["optional-dependencies"].values()]
    lines = [line for listed in lists for line in listed if not line.startswith("swdlib[")]
    names = [re.split(r"[<>=;\[ ]", line)[0] for line in lines]
    assert len(names) == len(set(names))


def test_extras_that_test_and_build_the_book_take_deploy_along() -> None:
    extras = project()["project"]["optional-dependencies"]
    assert all("swdlib[deploy]" in extras[name] for name in ("book", "test"))


def test_every_public_name_is_there() -> None:
    for name in getattr(swdlib, "__all__", []):
        assert getattr(swdlib, name) is not None


def snippets() -> list[str]:
    """Return the Python code blocks of README.md."""
    return re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S
    )


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert snippets()
    names: dict[str, Any] = {"__name__": "readme"}
    for number, source in enumerate(snippets(), start=1):
        exec(compile(source, f"README.md, snippet {number}", "exec"), names)


def test_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "make book" in text
    assert "make test" in text


def python(*arguments: str, folder: Path, **variables: str) -> str:
    """Run Python elsewhere than in the repository and return what it prints."""
    command = [sys.executable, *arguments]
    environment = {**os.environ, **variables}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with `pip wheel . --no-deps`, in a copy, as it leaves a folder behind."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(PACKAGE, folder / "swdlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    python("-m", "pip", "wheel", ".", "--no-deps", folder=folder)
    [path] = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"swdlib/{path.name}" for path in PACKAGE.glob("*.py")}
    assert modules <= names
    assert all(
        name.startswith(f"swdlib-{swdlib.__version__}.dist-info/") for name in names - modules
    )


@pytest.mark.slow
def test_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    python("-m", "pip", "install", "--no-deps", "-t", str(target), str(wheel), folder=tmp_path)
    source = "import swdlib; print(swdlib.__file__, swdlib.__version__)"
    printed = python("-c", source, folder=tmp_path, PYTHONPATH=str(target))
    assert printed == f"{target / 'swdlib' / '__init__.py'} {swdlib.__version__}"
    run = ["-m", "swdlib.cli", "run", "--epochs", "1", "--width", "4"]
    printed = python(*run, folder=tmp_path, PYTHONPATH=str(target))
    assert "89.98 % of the prunable weights removed" in printed
    assert list((tmp_path / "records" / "smoke").glob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"]]
)
def test_code_passes(arguments: list[str]) -> None:
    python("-m", *arguments, folder=ROOT)


@pytest.mark.slow
def test_command_line_starts() -> None:
    script = Path(sys.executable).with_name("swdlib")
    run = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "run" in run.stdout
