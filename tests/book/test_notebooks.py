"""The notebooks of the book, rerun with other parameters from other folders."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from papermill.exceptions import PapermillExecutionError

from book import kernels
from book.build import BOOK, INSTALLS, notebook_names
from book.reruns import SETTINGS, parameter_table
from swdlib.runs.config import Config

NAMES = notebook_names(BOOK)


@pytest.fixture(scope="module", autouse=True)
def forked_kernels() -> Iterator[None]:
    """Start kernels as forks, which saves each of them the import of its libraries."""
    factory = KernelProvisionerFactory.instance()
    with pytest.MonkeyPatch.context() as restored:
        restored.setattr(factory, "default_provisioner_name", factory.default_provisioner_name)
        restored.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        kernels.share_imports()
        yield


def cells(name: str) -> list[Any]:
    """Return the code cells of a stored notebook, that for Colab aside."""
    notebook = nbformat.read(BOOK / f"{name}.ipynb", as_version=4)
    own = (cell for cell in notebook.cells if INSTALLS not in cell.metadata.get("tags", []))
    return [cell for cell in own if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_come_first_and_are_checked_before_any_work(name: str) -> None:
    first, second = cells(name)[:2]
    assert first.metadata.get("tags") == ["parameters"]
    assert "check_parameters(globals())" in second.source and "Config(" in second.source
    assert all(type_ != "None" for type_ in types_of(name).values())


def types_of(name: str) -> dict[str, str]:
    """Return the parameters of a notebook with their types, as papermill infers them."""
    found = papermill.inspect_notebook(str(BOOK / f"{name}.ipynb"))
    return {parameter: about["inferred_type_name"] for parameter, about in found.items()}


def test_parameters_of_the_experiment() -> None:
    assert types_of("swd-on-cifar10") == {
        **dict.fromkeys(("profile", "dataset", "data_root", "recipe", "records"), "str"),
        **dict.fromkeys(("epochs", "width", "seed"), "int"),
        **dict.fromkeys(("sparsity", "a_min", "a_max"), "float"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_alternative_text_and_suits_both_modes(name: str) -> None:
    figures = [c for c in cells(name) if re.search(r"^(plots|plt)\.", c.source, re.MULTILINE)]
    assert figures
    for cell in figures:
        image = cell.metadata.get("mystnb", {}).get("image", {})
        assert len(image.get("alt", "").split()) > 8, cell.source
        assert image.get("classes") == "dark-light", cell.source  # not whitened in dark mode
        figure = cell.metadata["mystnb"].get("figure", {})
        assert len(figure.get("caption", "").split()) > 5, cell.source
        assert figure.get("name", "").startswith("fig-"), cell.source
        assert cell.source.count("plots.") == 1, "one alternative text is for one figure"


def solutions(name: str) -> list[str]:
    """Return the Python code of a notebook's folded solutions."""
    notebook = nbformat.read(BOOK / f"{name}.ipynb", as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return re.findall(r"^```python\n(.*?)^```", "\n".join(texts), re.MULTILINE | re.DOTALL)


def rerun(name: str, folder: Path, told: Sequence[str] = (), /, **parameters: Any) -> list[Any]:
    """Run a notebook, and cells with what is `told`, from a folder that is not the book's.

    Return the cells that ran, outputs and all.
    """
    notebook = nbformat.read(BOOK / f"{name}.ipynb", as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in told]
    nbformat.write(notebook, folder / "out.ipynb")
    papermill.execute_notebook(
        str(folder / "out.ipynb"),
        str(folder / "out.ipynb"),
        parameters=parameters,
        cwd=str(folder),
        progress_bar=False,
    )
    return ran(folder)


def ran(folder: Path) -> list[Any]:
    """Return the code cells that were run."""
    notebook = nbformat.read(folder / "out.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.get("execution_count")]


def printed(cells: list[Any]) -> str:
    """Return what cells printed, without warnings and progress."""
    outputs = [output for cell in cells for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


EXPERIMENTS: list[tuple[dict[str, Any], str]] = [
    ({"recipe": "dense", "epochs": 2, "width": 4}, "dense on digits: cnn of width 4, 2 epochs"),
    ({"recipe": "han2015", "epochs": 2, "sparsity": 0.5}, "han2015 on digits: cnn of width 16"),
    ({"a_max": 1e3, "epochs": 2, "seed": 7}, "swd on digits: cnn of width 16, 2 epochs, seed 7"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("parameters", "expected"), EXPERIMENTS)
def test_experiment_runs_with_other_parameters_from_any_folder(
    parameters: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    found = rerun("swd-on-cifar10", tmp_path, records=str(tmp_path / "records"), **parameters)
    assert expected in printed(found)
    assert list((tmp_path / "records" / "smoke").glob("digits-*.json"))


RERUNS: list[tuple[str, dict[str, Any], str]] = [
    ("what-is-pruning", {"seed": 1, "epochs": 2}, "test images are classified correctly"),
    (
        "swd-from-scratch",
        {"epochs": 2, "sparsity": 0.5, "a_max": 1e3},
        "The losses of all 46 steps are the same",
    ),
    (
        "lagrangian-smoothing",
        {"seed": 3, "epochs": 3, "sparsity": 0.3, "a_max": 1e4},
        "Loss at the end of the path: 0.233",
    ),
    (
        "schedules",
        {"seed": 5, "epochs": 2, "width": 8, "sparsity": 0.8, "a_max": 1e3},
        "287 held-out images; 3 seeds",
    ),
    (
        "what-goes-wrong",
        {"seed": 4, "epochs": 3, "width": 16},
        "select(..., 0.5): 5 of 10 removed",
    ),
    (
        "magnitude-and-its-cliff",
        {"seed": 2, "sparsity": 0.5, "epochs": 2, "finetune_epochs": 1, "width": 4},
        "on 287 held-out images; 1 epochs of tuning",
    ),
    (
        "where-zeros-come-from",
        {"seed": 2, "epochs": 2, "width": 8, "sparsity": 0.5},
        "on 287 held-out images; the cut takes 50%",
    ),
    (
        "what-moves",
        {"seed": 2, "epochs": 4, "width": 16, "sparsity": 0.8},
        "1,440 weights, of which 1,152 are selected; 18 steps an epoch",
    ),
    (
        "what-matters",
        {"seed": 2, "epochs": 2, "a_min": 10.0, "a_max": 1e3, "update": "gradient"},
        "on 287 held-out images, 4 seeds, 2 epochs",
    ),
    (
        "baselines-side-by-side",
        {
            **{"seed": 2, "sparsity": 0.5, "seeds": 2, "epochs": 3},
            **{"finetune_epochs": 2, "iterations": 2, "width": 8},
        },
        "on 287 held-out images, 2 seeds, 3 epochs",
    ),
    (
        "what-swd-costs",
        {"seed": 2, "epochs": 2, "width": 16, "sparsity": 0.8, "a_max": 10.0, "number": 50_000},
        "1,440 weights, 36 steps; 1,152 weights lie up to the threshold",
    ),
    (
        "swd-on-filters",
        {"seed": 2, "epochs": 2, "width": 8, "sparsity": 0.5},
        "6,274 parameters in all; measured on 287 held-out images",
    ),
    (
        "any-structure",
        {"seed": 2, "epochs": 2, "width": 8, "sparsity": 0.3},
        "12 bundles of filters in 21 convolutions",
    ),
    (
        "any-network",
        {
            **{"seed": 2, "seeds": 2, "steps": 40, "width": 16},
            **{"sparsity": 0.5, "unit_sparsity": 0.2},
        },
        "attention: 8 units",
    ),
]


# Pages that are not run above, or whose solutions are right for their own parameters alone.
APART = {*NAMES} - {name for name, _, _ in RERUNS} | {"swd-from-scratch", "schedules"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters", "expected"), RERUNS)
def test_page_and_its_solutions_run_with_other_parameters(
    name: str, parameters: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    told = solutions(name) if name not in APART else []
    found = rerun(name, tmp_path, told, **parameters)
    assert expected in printed(found)
    assert [cell.source for cell in found[len(found) - len(told) :]] == told


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(APART))
def test_solutions_run_at_the_end_of_their_page(name: str, tmp_path: Path) -> None:
    told = solutions(name)
    found = rerun(name, tmp_path, told, **{"epochs": 4} if "epochs" in types_of(name) else {})
    assert told and [cell.source for cell in found[-len(told) :]] == told


@pytest.mark.slow
def test_lab_finds_what_is_missing_and_its_solution_passes(tmp_path: Path) -> None:
    found = rerun("prune-your-own", tmp_path)
    as_it_stands, at_once, solved = (
        re.findall(r"^([✓✗]) (\w+)", printed([cell]), re.MULTILINE)
        for cell in found
        if re.search(r"^hand_in\(", cell.source, re.MULTILINE)
    )
    assert [name for sign, name in as_it_stands if sign == "✗"] == ["masks"]
    assert [name for sign, name in at_once if sign == "✗"] == ["accuracy"]
    assert {sign for sign, _ in solved} == {"✓"} and len(solved) == 6


@pytest.mark.slow
def test_a_trained_network_is_measured_anew(imagenet_folder: Path, tmp_path: Path) -> None:
    few = {"images": 8, "filter_shares": [0.05], "weight_shares": [0.3], "rounds": 1}
    small = {"epochs": 2, "width": 16, "sparsity": 0.5}
    places = {"data_root": str(imagenet_folder), "measured": "new.json"}
    found = rerun("smaller-networks", tmp_path, **small, **few, **places)
    assert "on a sample of 8 images" in printed(found)
    measured = json.loads((tmp_path / "new.json").read_text("utf-8"))
    assert len(measured["cuts"]) == 4
    assert measured["provenance"]["dataset"]["test_images"] == 8


@pytest.mark.slow
def test_imagenet_runs_on_real_images(imagenet_folder: Path, tmp_path: Path) -> None:
    few = {"seed": 1, "epochs": 2, "images": 20, "batch_size": 8, "sparsity": 0.5}
    found = printed(rerun("imagenet", tmp_path, data_root=str(imagenet_folder), **few))
    assert "1,000 training images in 1,000 classes, from one folder of images" in found
    assert "used here: 15 to train and 5 to measure on" in found
    assert "stopped after 2 of 4 steps" in found and "all weights equal" in found


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("swd-on-cifar10", {"sparsity": 1.5}, r"sparsity must be in \[0, 1\), not 1\.5"),
    ("swd-on-cifar10", {"recipe": "foo"}, "recipe must be one of dense, swd, .*, not 'foo'"),
    ("swd-on-cifar10", {"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
    ("swd-on-cifar10", {"epochs": "many"}, "epochs must be of type int, not 'many'"),
    ("swd-on-cifar10", {"profile": "huge"}, "profile must be one of .*, not 'huge'"),
    ("swd-on-cifar10", {"sparsty": 0.5}, "no parameter sparsty"),
    ("swd-from-scratch", {"a_min": -1.0}, r"a_min must be above 0, not -1\.0"),
    ("what-is-pruning", {"epoch": 3}, "no parameter epoch"),
    ("lagrangian-smoothing", {"sparsity": -0.1}, r"sparsity must be in \[0, 1\), not -0\.1"),
    ("schedules", {"width": 0}, "width must be a whole number of at least 1, not 0"),
    ("magnitude-and-its-cliff", {"finetune_epochs": 8}, "finetune_epochs must be at least .*not 8"),
    ("where-zeros-come-from", {"weight_decay": -1.0}, r"weight_decay must be 0 or more, not -1\.0"),
    ("what-moves", {"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1\.0"),
    ("what-matters", {"a_min": 0.0}, r"a_min must be above 0, not 0\.0"),
    ("baselines-side-by-side", {"seeds": 1}, "seeds must be at least 2, to show a spread, not 1"),
    ("what-swd-costs", {"number": 10}, "number must be at least 1000, not 10"),
    ("swd-on-filters", {"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1\.0"),
    ("any-structure", {"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1\.0"),
    ("any-network", {"seeds": 1}, "seeds must be at least 2, not 1"),
    ("any-network", {"width": 20}, "width must be a multiple of 8, the number of heads, not 20"),
    ("prune-your-own", {"filter_sparsity": -0.1}, r"sparsity .* must be in \[0, 1\), not -0\.1"),
    ("imagenet", {"images": 3}, "images must be at least 16, not 3"),
    ("imagenet", {"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
    ("scale-out", {"epochs": 3}, "epochs must be at least 4, so that a run is long enough, not 3"),
    ("smaller-networks", {"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1\.0"),
    ("smaller-networks", {"images": 0}, "images must be at least 1, not 0"),
]


def library_takes(name: str, value: Any) -> bool:
    """Return whether a parameter is none of the library's, or this value of it is allowed there."""
    try:
        Config(**{name: value} if name in SETTINGS else {})
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("name", "parameters", "message"), WRONG)
def test_page_says_what_is_allowed_of_a_parameter_that_it_refuses(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    known = papermill.inspect_notebook(str(BOOK / f"{name}.ipynb"))
    shown = {row.split("`")[1]: row.split(" | ") for row in parameter_table(known).splitlines()[2:]}
    if "of type" in message or "list of" in message:  # as the column of types says
        return
    for parameter in set(parameters) & set(known):
        assert shown[parameter][-1] != "– |"
        own = "; allowed: " in known[parameter]["help"]
        assert own or not library_takes(parameter, parameters[parameter])


@pytest.mark.parametrize("name", NAMES)
def test_page_without_fine_tuning_does_not_speak_of_it(name: str) -> None:
    table = parameter_table(papermill.inspect_notebook(str(BOOK / f"{name}.ipynb")))
    tuned = any("finetune" in cell.source for cell in cells(name))
    assert tuned or "fine-tuning" not in table


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Passed unknown parameter")
@pytest.mark.parametrize(("name", "parameters", "message"), WRONG)
def test_wrong_parameter_stops_before_any_work(
    name: str, parameters: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PapermillExecutionError, match=message):
        rerun(name, tmp_path, **parameters)
    assert "check_parameters" in ran(tmp_path)[-1].source
    assert list(tmp_path.iterdir()) == [tmp_path / "out.ipynb"]
