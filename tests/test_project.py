"""Contracts that hold the project together: layers, dependencies, the wheel, README, style."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import swdlib

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "swdlib"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}

METHOD = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "cli"}
LIBRARY = METHOD | {"data", "runs", "deploy", "lab", "cli"}

# Part of the library -> what it may import besides itself; a module at the top is the method's.
MAY_IMPORT = {
    "method": METHOD,
    "data": {"files"},
    "deploy": METHOD,
    "runs": METHOD | {"data", "deploy"},
    "lab": LIBRARY,
    "cli": LIBRARY,
}


def project() -> Any:
    """Return pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def imports(path: Path) -> set[str]:
    """Return the dotted names of all that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_imported(path: Path) -> set[str]:
    """Return the modules of the library that one of its files imports, such as runs.config."""
    names = {name.removeprefix("swdlib.") for name in imports(path) if name.startswith("swdlib.")}
    return names & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    part = module.split(".")[0] if "." in module or module == "cli" else "method"
    used = {name.split(".")[0] for name in modules_imported(MODULES[module])}
    assert used <= MAY_IMPORT[part] | {part}


def test_no_module_imports_itself_in_a_circle() -> None:
    left = {name: modules_imported(path) for name, path in MODULES.items()}
    while free := {name for name, used in left.items() if not used & left.keys()}:
        left = {name: used for name, used in left.items() if name not in free}
    assert not left


def test_map_of_the_library_shows_each_module_once() -> None:
    page = (ROOT / "book" / "api.md").read_text("utf-8")
    rows = re.findall(r"^\| [A-Z`].*\|$", page.split("## swd")[0], re.MULTILINE)
    assert sorted(re.findall(r"`([\w.]+)`", "".join(rows))) == sorted(MODULES)


@pytest.mark.parametrize("module", ["lab.plots", "runs.records"])
def test_drawing_and_reading_need_no_torch(module: str) -> None:
    assert not {name for name in imports(MODULES[module]) if name.split(".")[0] == "torch"}


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


def test_extras_include_one_another() -> None:
    extras = project()["project"]["optional-dependencies"]
    assert "swdlib[deploy]" in extras["runs"]
    assert {"swdlib[onnx]", "swdlib[runs]"} <= set(extras["lab"])
    assert "swdlib[lab]" in extras["book"] and "swdlib[book]" in extras["test"]


ALONE = """
import sys
HIDDEN = {hidden}


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
import torch
import swdlib

model = torch.nn.Linear(8, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
swd = swdlib.SelectiveWeightDecay(model, sparsity=0.75, steps=3)
swd.attach(optimizer)
for _ in range(3):
    model(torch.randn(2, 8)).square().sum().backward()
    optimizer.step()
masks = swd.prune()
swdlib.deploy.save_sparse(model, masks, "pruned")
print(int((model.weight == 0).sum()))
for use in ("Config", "load_data", "plots", "train"):
    try:
        getattr(swdlib, use)
    except ImportError as error:
        print(error)
"""


def test_the_method_needs_torch_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    hidden = {name for packages in swdlib._EXTRAS.values() for name in packages} - {"filelock"}
    source = ALONE.format(hidden=hidden)
    zeros, *errors = python("-c", source, folder=tmp_path, PYTHONPATH=str(ROOT)).splitlines()
    assert zeros == "24"
    remedy = re.compile(r"swdlib\.\w+ needs .*: pip install 'swdlib\[\w+\]'")
    assert len(errors) == 4 and all(map(remedy.fullmatch, errors))


def test_each_extra_lists_what_its_part_requires() -> None:
    extras = project()["project"]["optional-dependencies"]
    distributions = {"PIL": "pillow", "sklearn": "scikit-learn"}
    for extra, packages in swdlib._EXTRAS.items():
        lines = list(extras[extra])
        for line in lines:
            lines += extras[line[7:-1]] if line.startswith("swdlib[") else []
        names = {re.split(r"[<>=;\[ ]", line)[0] for line in lines}
        assert {distributions.get(package, package) for package in packages} <= names, extra


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
