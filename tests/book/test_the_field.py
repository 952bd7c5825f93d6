"""The code of the page on the field runs, and its table of equivalents is true."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from swdlib import criteria, masks, structures
from swdlib.masks import Masks

PAGE = (Path(__file__).resolve().parents[2] / "book" / "the-field.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def run(source: str) -> dict[str, Any]:
    """Run code of the page and return what it defined."""
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(source, "the-field.md", "exec"), names)
    return names


def network() -> nn.Sequential:
    """Return a network whose layers have numbers of weights that a tenth divides."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))


def theirs(cut: Callable[[nn.Module], Any], model: nn.Sequential) -> Masks:
    """Return the masks of torch after `cut` was called with each linear layer."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            cut(layer)
    return {
        name.removesuffix("_mask"): mask.bool()
        for name, mask in model.named_buffers()
        if name.endswith("_mask")
    }


def test_cut_of_the_page_is_the_same_both_ways() -> None:
    *_, cut = SNIPPETS
    names = run(cut)
    assert masks.sparsity_of(names["kept"]) == pytest.approx(0.9, abs=1e-3)
    assert list(names["model"].state_dict()) == list(network().state_dict())


def test_distillation_loss_is_cross_entropy_without_and_zero_with_an_equal_teacher() -> None:
    loss = run(SNIPPETS[0])["distillation_loss"]
    outputs, labels = torch.randn(8, 4), torch.arange(8) % 4
    plain = nn.functional.cross_entropy(outputs, labels)
    torch.testing.assert_close(loss(outputs, torch.randn(8, 4), labels, weight=0.0), plain)
    assert abs(float(loss(outputs, outputs, labels, weight=1.0))) < 1e-6


def test_layer_by_layer_is_the_uniform_allocation() -> None:
    model, other = network(), network()
    kept = masks.select(structures.weights(model), 0.9, allocation=masks.uniform)
    found = theirs(lambda layer: prune.l1_unstructured(layer, "weight", 0.9), other)
    assert kept.keys() == found.keys()
    assert all(torch.equal(kept[name], found[name]) for name in kept)


def test_torch_leaves_the_parameters_in_another_order() -> None:
    layer = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    assert [name for name, _ in prune.remove(layer, "weight").named_parameters()] == [
        "bias",
        "weight",
    ]


def test_a_mask_of_ones_own_is_applied_by_name() -> None:
    model, mask = network(), torch.rand(30, 20) < 0.5
    expected = torch.where(mask, model[0].weight, 0.0)
    masks.apply_(model, {"0.weight": mask})
    assert torch.equal(model[0].weight, expected)


def test_state_dict_of_torch_grows_and_that_of_the_model_does_not() -> None:
    model = copy.deepcopy(network())
    theirs(lambda layer: prune.random_unstructured(layer, "weight", 0.5), model)
    assert {"0.weight_orig", "0.weight_mask"} < model.state_dict().keys()
    plain = network()
    kept = masks.select(structures.weights(plain), 0.5, criterion=criteria.Random(0))
    assert list(plain.state_dict()) == list(network().state_dict())
    assert masks.sparsity_of(kept) == 0.5


def test_an_amount_counts_what_is_left_and_a_sparsity_the_whole() -> None:
    model = network()
    for _ in range(2):
        found = theirs(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), model)
    assert masks.sparsity_of(found) == 0.75
    assert masks.sparsity_of(masks.select(structures.weights(network()), 0.5)) == 0.5


def test_page_has_its_parts() -> None:
    sections = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert PAGE.index("In short") < PAGE.index("fig-field") < PAGE.index("## ")  # answer first
    assert sections[-1] == "Summary" and len(SNIPPETS) == 2
