"""`prune()` knows whether its cut is neutral, and says so if it is not."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW

from swdlib import SelectiveWeightDecay
from swdlib.baselines import GradualPruning
from swdlib.swd import NotNeutral

STEPS = 60
IMAGES, LABELS = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def sgd(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.05, momentum=0.9)


def penalty(model: nn.Module, **settings: Any) -> SelectiveWeightDecay:
    settings = {"sparsity": 0.8, "steps": STEPS, "update": "proximal", **settings}
    return SelectiveWeightDecay(model, **settings)


def backward(model: nn.Module) -> None:
    cross_entropy(model(IMAGES), LABELS % 4).backward()


def train(model: nn.Module, *optimizers: Any, steps: int = STEPS) -> None:
    for _ in range(steps):
        model.zero_grad()
        backward(model)
        for optimizer in optimizers:
            optimizer.step()


def alive(model: nn.Module, masks: dict[str, Tensor]) -> int:
    return sum(int((model.get_parameter(n)[~mask] != 0).sum()) for n, mask in masks.items())


def test_a_cut_of_what_has_decayed_says_nothing() -> None:
    model = mlp()
    optimizer, swd = sgd(model.parameters()), penalty(model)
    swd.attach(optimizer)
    train(model, optimizer)
    swd.prune()  # a warning would be an error


def test_steps_that_are_missing_are_told() -> None:
    model = mlp()
    optimizer, swd = sgd(model.parameters()), penalty(model, steps=4 * STEPS)
    swd.attach(optimizer)
    train(model, optimizer)
    with pytest.warns(
        NotNeutral, match="60 of 240 optimizer steps .* the strength reached 3.16"
    ) as told:
        swd.prune()
    assert told[0].filename == __file__


def test_a_forgotten_attach_is_told() -> None:
    model = mlp()
    swd = penalty(model)
    train(model, sgd(model.parameters()))
    with pytest.warns(NotNeutral, match=r"0 of 60 .* none of 0.weight, 2.weight by an attached"):
        swd.prune()


def test_what_no_attached_optimizer_steps_is_named() -> None:
    model = mlp()
    first, second = sgd(model[0].parameters()), sgd(model[2].parameters())
    swd = penalty(model)
    swd.attach(first)
    train(model, first, second)
    with pytest.warns(NotNeutral, match=r"none of 2\.weight by an attached optimizer"):
        swd.prune()


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_two_optimizers_are_as_one(update: str) -> None:
    one, two = mlp(), mlp()
    whole = sgd(one.parameters())
    halves = sgd(two[0].parameters()), sgd(two[2].parameters())
    single, double = (penalty(m, update=update) for m in (one, two))
    single.attach(whole)
    for optimizer in halves:
        double.attach(optimizer)
    # Selected again for the second optimizer, after the first has stepped: that is the same here.
    train(one, whole, steps=1)
    train(two, *halves, steps=1)
    assert double.step == single.step == 1
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    train(two, *halves)
    masks = double.prune() if update == "proximal" else {}  # the gradient update is too strong here
    train(two, *halves, steps=2)
    assert not alive(two, masks)


def test_gradual_pruning_counts_a_step_of_two_optimizers_once() -> None:
    model = mlp()
    halves = sgd(model[0].parameters()), AdamW(model[2].parameters())
    pruning = GradualPruning(model, sparsity=0.5, steps=4, every=2)
    for optimizer in halves:
        pruning.attach(optimizer)
    train(model, *halves, steps=4)
    assert pruning.step == 4
    assert not alive(model, pruning.masks)


def test_an_optimizer_of_parameters_that_are_stepped_already_is_refused() -> None:
    model = mlp()
    swd = penalty(model)
    swd.attach(sgd(model.parameters()))
    with pytest.raises(ValueError, match=r"attached already .* call detach\(\) first"):
        swd.attach(sgd(model[0].parameters()))
    swd.detach()
    swd.attach(sgd(model.parameters()))


def two_steps(model: nn.Module, optimizer: Any) -> None:
    backward(model)
    optimizer.first_step(zero_grad=True)
    backward(model)
    optimizer.second_step(zero_grad=True)


def one_step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


WRAPPED: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "sam": (lambda p: pytorch_optimizer.SAM(p, SGD, lr=0.05, momentum=0.9), two_steps),
    "lookahead": (lambda p: pytorch_optimizer.Lookahead(sgd(p), k=3), one_step),
    "schedule-free": (lambda p: pytorch_optimizer.ScheduleFreeSGD(p, lr=0.05), one_step),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.filterwarnings("ignore::swdlib.swd.NotNeutral")
def test_optimizers_that_keep_copies_of_the_weights(name: str) -> None:
    """Each counts its steps, and what was pruned never comes back, whatever is swapped in."""
    model = mlp()
    make, step = WRAPPED[name]
    optimizer = make(model.parameters())
    if name == "schedule-free":
        optimizer.train()
    swd = penalty(model)
    swd.attach(optimizer)
    for _ in range(STEPS):
        step(model, optimizer)
    assert swd.step == STEPS
    masks = swd.prune()
    for _ in range(7):
        step(model, optimizer)
        assert not alive(model, masks)
    if name == "schedule-free":
        optimizer.eval()
        assert not alive(model, masks)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_would_not_be_attached_and_is_refused(copied: Callable[[Any], Any]) -> None:
    model = mlp()
    optimizer, swd = sgd(model.parameters()), penalty(model)
    swd.attach(optimizer)
    with pytest.raises(TypeError, match=r"call detach\(\) before it is copied .* state_dict\(\)"):
        copied((model, optimizer, swd))
    swd.detach()
    twin, stepper, other = copy.deepcopy((model, optimizer, swd))
    other.attach(stepper)
    train(twin, stepper)
    assert other.step == STEPS and swd.step == 0


def test_a_layer_frozen_on_the_way_is_not_cut() -> None:
    model = mlp()
    optimizer, swd = sgd(model.parameters()), penalty(model)
    swd.attach(optimizer)
    train(model, optimizer, steps=5)
    model[0].requires_grad_(False)
    train(model, optimizer, steps=STEPS - 5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight was frozen before its weights were small"):
        swd.prune()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not swd.masks


def test_a_network_frozen_after_training_is_cut() -> None:
    model = mlp()
    optimizer, swd = sgd(model.parameters()), penalty(model)
    swd.attach(optimizer)
    train(model, optimizer)
    model.requires_grad_(False)
    assert not alive(model, swd.prune())


def test_a_parameter_replaced_on_the_way_is_told() -> None:
    model = mlp()
    swd = penalty(model)
    model[2].weight = nn.Parameter(torch.ones(4, 32))
    with pytest.raises(ValueError, match=r"2\.weight was replaced since .* make a new Selective"):
        swd.prune()
    assert model[2].weight.all()
