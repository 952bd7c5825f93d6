import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from swdlib.masks import find_groups, prunable, select, sparsity_of
from swdlib.penalties import SelectiveWeightDecay
from swdlib.recipes import RECIPES, Phase, Prune, Recipe, Train, dense, han2015, swd
from swdlib.schedules import Constant, Cosine, Exponential
from swdlib.structures import STRUCTURES, Structure, kernels, weights

LR = Cosine(0.1, 0.001)
SETTINGS: dict[str, Any] = {
    "epochs": 10,
    "lr": LR,
    "sparsity": 0.9,
    "structure": weights,
    "weight_decay": 5e-4,
    "a_min": 0.1,
    "a_max": 1e5,
    "update": "gradient",
    "finetune_epochs": 4,
    "iterations": 3,
}


def phases_of(recipe: Recipe, **settings: Any) -> list[Phase]:
    settings = {**SETTINGS, **settings}
    return recipe(**{name: settings[name] for name in inspect.signature(recipe).parameters})


def epochs_of(phases: list[Phase]) -> int:
    return sum(phase.epochs for phase in phases if isinstance(phase, Train))


def cuts_of(phases: list[Phase]) -> list[float]:
    return [phase.sparsity for phase in phases if isinstance(phase, Prune)]


def test_dense_by_hand() -> None:
    assert dense(7, LR) == [Train(7, LR)]


def test_swd_by_hand() -> None:
    train, prune = phases_of(swd, update="proximal", a_min=2.0, a_max=8.0, weight_decay=0.1)
    assert isinstance(train, Train) and train.penalty
    assert (train.epochs, train.lr) == (10, LR)
    assert prune == Prune(0.9, weights)
    model = nn.Linear(4, 5)
    penalty = train.penalty(model, steps=30)
    assert isinstance(penalty, SelectiveWeightDecay)
    assert penalty.model is model and penalty.steps == 30
    assert penalty.weight_decay == 0.1 and penalty.update == "proximal"
    assert penalty.report() == {"strength": 2.0, "target": 0.9}
    penalty.step = 15
    assert penalty.strength == pytest.approx(Exponential(2.0, 8.0)(0.5))


def test_han2015_by_hand() -> None:
    tune = Constant(0.001)
    assert han2015(10, LR, 0.9, weights, 4, 1) == [
        Train(6, LR),
        Prune(0.9, weights),
        Train(4, tune),
    ]
    phases = han2015(10, LR, 0.875, kernels, 7, 3)
    assert phases[:1] + phases[2::2] == [
        Train(3, LR),
        Train(2, tune),
        Train(2, tune),
        Train(3, tune),
    ]
    assert all(isinstance(p, Prune) and p.structure is kernels for p in phases[1::2])
    # An eighth is left after three cuts to a half.
    assert cuts_of(phases) == pytest.approx([0.5, 0.75, 0.875])


@given(data=st.data(), sparsity=st.floats(0.0, 0.999), finetune_epochs=st.integers(1, 60))
def test_han2015_spends_the_budget_and_reaches_the_target(
    data: st.DataObject, sparsity: float, finetune_epochs: int
) -> None:
    iterations = data.draw(st.integers(1, finetune_epochs))
    epochs = data.draw(st.integers(finetune_epochs + 1, 400))
    phases = han2015(epochs, LR, sparsity, weights, finetune_epochs, iterations)
    assert [type(phase) for phase in phases] == [Train, *[Prune, Train] * iterations]
    assert epochs_of(phases) == epochs
    assert epochs_of(phases[1:]) == finetune_epochs
    shares = [phase.epochs for phase in phases[1:] if isinstance(phase, Train)]
    assert max(shares) - min(shares) <= 1
    cuts = cuts_of(phases)
    assert cuts[-1] == sparsity
    left = [1.0, *(1 - cut for cut in cuts)]
    for before, after in pairwise(left):
        assert after / before == pytest.approx((1 - sparsity) ** (1 / iterations), rel=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_contract_of_recipes(recipe: Recipe, structure: Structure) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(6, 4))
    phases = phases_of(recipe, structure=structure)
    assert isinstance(phases[0], Train)
    assert epochs_of(phases) == SETTINGS["epochs"]
    for phase in phases:
        if isinstance(phase, Prune):
            groups = find_groups(model, phase.structure)
            removed = sparsity_of(select(groups, phase.sparsity, phase.criterion))
            assert removed * prunable(groups) + 0.5 >= phase.sparsity * prunable(groups)
        elif phase.penalty:
            penalty = phase.penalty(model, steps=5)
            penalty.attach(SGD(model.parameters(), lr=phase.lr(0.0)))
            penalty.load_state_dict(penalty.state_dict())
            assert penalty.report()
            penalty.detach()
    assert cuts_of(phases) == sorted(cuts_of(phases))
    assert recipe is dense or cuts_of(phases)[-1] == SETTINGS["sparsity"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"iterations": 5}, r"at least iterations \(5\) and less than epochs \(10\).*not 4"),
        ({"finetune_epochs": 0, "iterations": 1}, "finetune_epochs must be .* not 0"),
        ({"finetune_epochs": 10}, r"less than epochs \(10\).*not 10"),
        ({"finetune_epochs": -2, "iterations": -3}, "iterations must be at least 1, not -3"),
    ],
)
def test_fine_tuning_that_does_not_fit_the_budget_is_refused(
    settings: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        phases_of(han2015, **settings)


@pytest.mark.parametrize("epochs", [0, -1, 2.5])
def test_a_phase_without_whole_epochs_is_refused(epochs: Any) -> None:
    with pytest.raises(
        ValueError, match=f"epochs must be a whole number of at least 1, not {epochs}"
    ):
        dense(epochs, LR)


def test_a_strength_that_cannot_grow_exponentially_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start=0.0"):
        phases_of(swd, a_min=0.0)


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan")])
def test_an_impossible_sparsity_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=f"must be in .*, not {sparsity}"):
        Prune(sparsity, weights)
    with pytest.raises(ValueError, match=f"must be in .*, not {sparsity}"):
        phases_of(han2015, sparsity=sparsity)
