"""Parameters that papermill is given: known ones of the right type pass, others are named."""

from contextlib import nullcontext

import pytest

from swdlib.lab.notebooks import check_parameters

OWN = "# None: as before.\nsparsity: float = 0.9  # removed\nepochs: int = None\n"


@pytest.mark.parametrize(
    "history",
    [
        ["", OWN, "from swdlib.lab.notebooks import check_parameters"],
        ["", OWN, "# Parameters\nsparsity = 0.5\nepochs = 3\n"],
        ["", OWN, "# Parameters\nepochs = 3\n", "seed = 1"],
        ["", "# Parameters\nseed = 1"],
    ],
)
def test_known_parameters_pass(history: list[str]) -> None:
    check_parameters({"In": history, "seed": 1, "sparsity": 0.5, "epochs": 3})


def test_unknown_parameter_is_named_with_those_there_are() -> None:
    given = "# Parameters\nsparsty = 0.5\nepochs = 3\n"
    message = "no parameter sparsty; its parameters are epochs, sparsity"
    with pytest.raises(ValueError, match=message):
        check_parameters({"In": ["", OWN, given, "anything"]})


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        ("points: float = 1.0", "'one'", "points must be of type float, not 'one'"),
        ("epochs: int = 3", "2.5", "epochs must be of type int, not 2.5"),
        ("epochs: int = 3", "True", "epochs must be of type int, not True"),
        ("fast: bool = True", "1", "fast must be of type bool, not 1"),
        ("levels: list = [0.8]", "0.9", "levels must be a list of numbers, not 0.9"),
        ("levels: list = [0.8]", "['0.9']", r"levels must be a list of numbers, not \['0.9'\]"),
        ("points: float = 1.0", "2", ""),
        ("epochs: int = None", "'many'", ""),  # what None stands for knows its type
    ],
)
def test_parameter_of_another_type_is_refused(own: str, given: str, message: str) -> None:
    name = own.partition(":")[0]
    namespace = {"In": ["", own, f"# Parameters\n{name} = {given}\n"], name: eval(given)}
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_parameters(namespace)
