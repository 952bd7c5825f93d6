"""Checks of a pruned network: each names what is missing, and none raises an error."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from swdlib.lab.exercise import Check, check_pruned
from swdlib.masks import Masks, apply_, select
from swdlib.structures import weights

ALL = ["names", "accuracy", "masks", "sparsity", "zeros", "file"]


def network() -> nn.Module:
    """Return a network of 2,080 weights that can be pruned."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.Linear(40, 12))


def pruned(dense: nn.Module, sparsity: float = 0.9) -> tuple[nn.Module, Masks]:
    """Return a pruned copy of a network, and its masks."""
    model = copy.deepcopy(dense)
    masks = select(weights(model), sparsity)
    apply_(model, masks)
    return model, masks


def check(model: Any, masks: Any, dense: nn.Module, lost: float = 0.5) -> dict[str, Check]:
    """Check a network whose accuracy is `lost` points below that of `dense`."""
    found = check_pruned(
        model, masks, dense, sparsity=0.9, accuracy=lambda m: 90.0 - lost * (m is not dense)
    )
    return {one.name: one for one in found}


def failed(checks: dict[str, Check]) -> list[str]:
    """Return the names of the checks that failed."""
    return [name for name, one in checks.items() if not one.passed]


def test_a_network_pruned_as_asked_passes_all_checks() -> None:
    dense = network()
    checks = check(*pruned(dense), dense)
    assert list(checks) == ALL and failed(checks) == []
    assert str(checks["sparsity"]) == "✓ sparsity: 1,872 of 2,080 weights removed, 1,872 wanted"
    assert str(checks["accuracy"]) == "✓ accuracy: 89.5 % after 90.0 %, and 1 may be lost"


def test_one_weight_too_few_or_one_that_came_back_is_found() -> None:
    dense = network()
    model, masks = pruned(dense)
    masks["2.weight"][masks["2.weight"].logical_not().nonzero(as_tuple=True)] = True
    assert failed(check(model, masks, dense)) == ["sparsity"]
    model, masks = pruned(dense)
    first = next(model.parameters())
    with torch.no_grad():
        first[tuple((~masks["0.weight"]).nonzero()[0])] = 1e-30
    checks = check(model, masks, dense)
    assert failed(checks) == ["zeros"] and "file" not in checks
    assert "1 of the removed weights are not zero\n    prune last" in str(checks["zeros"])


def test_accuracy_may_fall_by_the_points_allowed_and_no_more() -> None:
    dense = network()
    assert failed(check(*pruned(dense), dense, lost=1.0)) == []
    assert failed(check(*pruned(dense), dense, lost=1.1)) == ["accuracy"]
    assert failed(check(*pruned(dense), dense, lost=float("nan"))) == ["accuracy"]


@pytest.mark.parametrize(
    ("masks", "found"),
    [
        (None, "NoneType"),
        ({}, "0 entries"),
        ({"0.weight": 1, "2.weight": 2}, "has no attribute 'dtype'"),
        ({"0.weight": torch.ones(40, 40), "2.weight": torch.ones(12, 40)}, "must be bool"),
    ],
)
def test_what_are_no_masks_is_said_in_words(masks: Any, found: str) -> None:
    dense = network()
    checks = check(copy.deepcopy(dense), masks, dense)
    assert failed(checks) == ["masks"] and list(checks) == ALL[:3]
    assert found in checks["masks"].found


@pytest.mark.parametrize("model", [None, 3, nn.Linear(2, 2), nn.Sequential(network())])
def test_another_network_is_said_in_words_and_nothing_else_is_looked_at(model: Any) -> None:
    dense = network()
    checks = check(model, {}, dense)
    assert failed(checks) == list(checks) == ["names"]


def test_what_holds_buffers_instead_of_parameters_is_another_network() -> None:
    dense = network()
    model, masks = pruned(dense)
    layer = model.get_submodule("0")
    weight = layer.get_parameter("weight").detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    checks = check(model, masks, dense)
    assert failed(checks) == list(checks) == ["names"]


def test_a_network_that_does_not_run_is_said_in_words() -> None:
    dense = network()
    model, masks = pruned(dense)

    def accuracy(one: nn.Module) -> float:
        if one is model:
            raise TypeError("forward() takes 3 positional arguments")
        return 90.0

    found = check_pruned(model, masks, dense, sparsity=0.9, accuracy=accuracy)
    [failure] = [one for one in found if not one.passed]
    assert failure.name == "accuracy" and "does not run: TypeError('forward() takes" in str(failure)


def test_masks_without_values_are_none() -> None:
    dense = network()
    model, masks = pruned(dense)
    checks = check(model, {name: mask.to("meta") for name, mask in masks.items()}, dense)
    assert failed(checks) == ["masks"] and "meta" in checks["masks"].found


def test_a_file_that_is_no_smaller_is_found() -> None:
    dense = network()
    model, masks = pruned(dense, 0.0)
    found = check_pruned(model, masks, dense, sparsity=0.0, accuracy=lambda m: 90.0)
    assert [one.name for one in found if not one.passed] == ["file"]


def test_neither_network_is_changed() -> None:
    dense = network()
    model, masks = pruned(dense)
    before = copy.deepcopy([dense.state_dict(), model.state_dict(), masks])
    check(model, masks, dense)
    torch.testing.assert_close(
        [dense.state_dict(), model.state_dict(), masks], before, rtol=0, atol=0
    )


def test_a_sparsity_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsity .* must be in \[0, 1\), not 95"):
        check_pruned(network(), {}, network(), sparsity=95, accuracy=lambda m: 90.0)


def test_minus_zero_is_found_and_told_apart() -> None:
    dense = network()
    model, masks = pruned(dense)
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            weight.copy_(dense.get_parameter(name)).mul_(mask)  # negative ones become -0.0
    checks = check(model, masks, dense)
    assert failed(checks) == ["zeros"] and "they are -0.0" in str(checks["zeros"])


def test_a_network_of_another_type_of_numbers_is_found() -> None:
    dense = network()
    model, masks = pruned(dense)
    assert failed(check(model.half(), masks, dense)) == ["names"]
