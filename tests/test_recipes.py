"""Recipes: by hand, their budgets, and each of them on digits, stopped and resumed."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from swdlib.baselines import BatchNormL1, DenseFeedback, GradualPruning
from swdlib.criteria import Random, batch_norm_scale
from swdlib.data.images import Dataset, Split
from swdlib.data.load import load_data
from swdlib.hooks import Method
from swdlib.masks import find_groups, prunable, select, sparsity_of
from swdlib.models import build_model
from swdlib.recipes import (
    RECIPES,
    Phase,
    Prune,
    Recipe,
    Train,
    dense,
    frankle2019,
    han2015,
    lin2020,
    liu2017,
    one_shot,
    peste2021,
    random_pruning,
    renda2020,
    soft,
    swd,
    swd_constant,
    swd_every,
    swd_finetune,
    swd_rising,
    wang2021,
    zhu2017,
)
from swdlib.runs.training import train
from swdlib.schedules import Constant, Cosine, Exponential
from swdlib.structures import STRUCTURES, filters, kernels, weights
from swdlib.swd import SelectiveWeightDecay
from tests.runs.test_training import assert_resumes

LR = Cosine(0.1, 0.001)
SETTINGS: dict[str, Any] = {
    "epochs": 10,
    "lr": LR,
    "sparsity": 0.9,
    "structure": weights,
    "finetune_epochs": 4,
    "iterations": 3,
}


QUIET: dict[str, Any] = {"batch_size": 64, "progress": False}


def phases_of(recipe: Recipe, **settings: Any) -> list[Phase]:
    """The recipe's phases; its own defaults hold for what neither SETTINGS nor `settings` give."""
    settings = {**SETTINGS, **settings}
    wanted = inspect.signature(recipe).parameters
    return recipe(**{name: value for name, value in settings.items() if name in wanted})


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
    assert {"strength": 2.0, "target": 0.9}.items() <= penalty.report().items()
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


def penalty_of(phase: Phase, model: nn.Module, steps: int = 30) -> Any:
    assert isinstance(phase, Train) and phase.penalty
    return phase.penalty(model, steps=steps)


def test_renda2020_replays_the_learning_rates_after_every_cut() -> None:
    assert renda2020(12, LR, 0.75, kernels, 6, 2) == [
        Train(6, LR),
        Prune(0.5, kernels),
        Train(3, LR),
        Prune(0.75, kernels),
        Train(3, LR),
    ]


def test_random_pruning_is_han2015_at_random() -> None:
    expected = [
        dataclasses.replace(phase, criterion=Random(7)) if isinstance(phase, Prune) else phase
        for phase in phases_of(han2015)
    ]
    assert phases_of(random_pruning, seed=7) == expected
    assert phases_of(random_pruning, seed=8) != expected


def test_one_shot_ends_with_the_cut() -> None:
    assert one_shot(5, LR, 0.9, kernels) == [Train(5, LR), Prune(0.9, kernels)]


def test_swd_with_a_constant_strength() -> None:
    train, prune = phases_of(swd_constant, a=3.0)
    penalty = penalty_of(train, nn.Linear(4, 5))
    assert {penalty.strength} == {3.0}
    penalty.step = 29
    assert (penalty.strength, penalty.sparsity) == (3.0, 0.9)
    assert prune == Prune(0.9, weights)
    penalty = penalty_of(phases_of(swd_constant)[0], nn.Linear(4, 5))
    assert penalty.strength == Exponential(0.1, 1e5)(0.5)  # half-way of the published growth


def test_swd_whose_target_rises() -> None:
    train, prune = phases_of(swd_rising, a_min=1.0, a_max=100.0, ramp_begin=0.1, ramp_end=0.7)
    penalty = penalty_of(train, nn.Linear(4, 5))
    targets, strengths = [], []
    for penalty.step in (0, 3, 12, 21, 30):
        targets.append(penalty.sparsity)
        strengths.append(penalty.strength)
    assert targets == pytest.approx([0, 0, 0.9 * (1 - 0.5**3), 0.9, 0.9])
    assert strengths == pytest.approx([100**t for t in (0, 0.1, 0.4, 0.7, 1)])
    assert prune == Prune(0.9, weights)


@pytest.mark.parametrize("recipe", [swd, swd_rising])
def test_swd_that_grows_otherwise(recipe: Recipe) -> None:
    settings = {"a_min": 2.0, "a_max": 8.0, "growth": "linear", "growth_end": 0.5}
    penalty = penalty_of(phases_of(recipe, **settings)[0], nn.Linear(4, 5))
    found = []
    for penalty.step in (0, 6, 15, 30):
        found.append(penalty.strength)
    assert found == pytest.approx([2, 4.4, 8, 8])
    for end in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"growth_end must be above 0 and .* not {end}"):
            phases_of(recipe, growth_end=end)


def test_swd_that_chooses_rarely() -> None:
    train, prune = phases_of(swd_every, every=7)
    penalty = penalty_of(train, nn.Linear(4, 5))
    assert isinstance(penalty, SelectiveWeightDecay) and penalty.every == 7
    assert prune == Prune(0.9, weights)
    always = penalty_of(phases_of(swd_every, every=1)[0], nn.Linear(4, 5))
    assert isinstance(always, SelectiveWeightDecay) and always.every == 1


def test_swd_then_fine_tuning_at_the_last_rate() -> None:
    train, prune, tune = phases_of(swd_finetune, finetune_epochs=3)
    assert isinstance(train, Train)
    assert (train.epochs, train.lr) == (7, LR)
    assert isinstance(penalty_of(train, nn.Linear(4, 5)), SelectiveWeightDecay)
    assert [prune, tune] == [Prune(0.9, weights), Train(3, Constant(0.001))]


def test_zhu2017_by_hand() -> None:
    train, prune = phases_of(zhu2017, structure=kernels, sparsity=0.8, every=7)
    assert isinstance(train, Train) and train.epochs == 10
    penalty = penalty_of(train, nn.Conv2d(1, 2, 3))
    assert isinstance(penalty, GradualPruning) and not penalty.soft
    assert (penalty.every, penalty.steps, penalty.groups[0].size) == (7, 30, 9)
    found = []
    for penalty.step in (0, 6, 12, 21, 30):
        found.append(penalty.sparsity)
    assert found == pytest.approx([0, 0, 0.8 * (1 - 0.6**3), 0.8, 0.8])
    assert prune == Prune(0.8, kernels)


def test_liu2017_by_hand() -> None:
    structure = filters(torch.zeros(1, 1, 8, 8))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    train, prune, tune = phases_of(liu2017, structure=structure)
    penalty = penalty_of(train, model)
    assert isinstance(train, Train) and train.epochs == 6
    assert isinstance(penalty, BatchNormL1) and penalty.l1 == 1e-4
    assert prune == Prune(0.9, structure, batch_norm_scale)
    assert tune == Train(4, LR)


def test_soft_pruning_cuts_once_an_epoch() -> None:
    train, prune = phases_of(soft)
    penalty = penalty_of(train, nn.Linear(4, 5), steps=10 * 13)
    assert isinstance(penalty, GradualPruning) and penalty.soft
    assert (penalty.every, penalty.sparsity) == (13, 0.9)
    assert prune == Prune(0.9, weights)


@pytest.mark.parametrize("recipe", [swd_rising, zhu2017])
@pytest.mark.parametrize(("begin", "end"), [(0.7, 0.2), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_a_ramp_that_does_not_rise_is_refused(recipe: Recipe, begin: float, end: float) -> None:
    with pytest.raises(
        ValueError, match=rf"0 <= ramp_begin < ramp_end <= 1, not {begin} and {end}"
    ):
        phases_of(recipe, ramp_begin=begin, ramp_end=end)


EXAMPLE = torch.zeros(1, 1, 8, 8)


def toy() -> nn.Module:
    torch.manual_seed(0)
    conv = (nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    head = (nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4))
    return nn.Sequential(*conv, *head)


def has_scales(structure: str) -> bool:
    """Whether the structure's units have batch-norm scales that can be ranked."""
    try:
        for group in find_groups(toy(), STRUCTURES[structure](EXAMPLE)):
            group.scores(batch_norm_scale)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_contract_of_recipes(recipe: str, structure: str) -> None:
    model = toy()
    phases = phases_of(RECIPES[recipe], structure=STRUCTURES[structure](EXAMPLE), sparsity=0.5)
    if recipe == "liu2017" and not has_scales(structure):
        with pytest.raises(ValueError, match="scale"):
            penalty_of(phases[0], model)
        return
    assert isinstance(phases[0], Train)
    assert epochs_of(phases) == SETTINGS["epochs"]
    for phase in phases:
        if isinstance(phase, Prune):
            groups = find_groups(model, phase.structure)
            removed = sparsity_of(select(groups, phase.sparsity, phase.criterion))
            assert removed * prunable(groups) + 0.5 >= phase.sparsity * prunable(groups)
        elif phase.penalty:
            check_protocol(phase.penalty(model, steps=50), SGD(model.parameters(), lr=0.1))
    assert cuts_of(phases) == sorted(cuts_of(phases))
    assert recipe == "dense" or cuts_of(phases)[-1] == 0.5


def check_protocol(penalty: Method, optimizer: SGD) -> None:
    penalty.attach(optimizer)
    penalty.load_state_dict(penalty.state_dict())
    assert penalty.report()
    assert penalty.masks == {}
    penalty.detach()


@pytest.mark.parametrize("structure", ["weights", "kernels"])
def test_slimming_without_scales_is_refused(structure: str) -> None:
    train = phases_of(liu2017, structure=STRUCTURES[structure](EXAMPLE))[0]
    with pytest.raises(ValueError, match="use a structure whose units have scales"):
        penalty_of(train, toy())


@lru_cache
def digits() -> Dataset:
    """A few hundred of the digits: five steps of a batch an epoch."""
    data = load_data("digits")
    return dataclasses.replace(data, train=Split(data.train.images[:320], data.train.labels[:320]))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("cnn", channels=1, size=8, classes=10, width=4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_trains_on_digits_and_resumes_bit_for_bit(recipe: str, tmp_path: Path) -> None:
    structure = filters(EXAMPLE) if recipe == "liu2017" else weights
    toy_settings = {"epochs": 4, "finetune_epochs": 2, "iterations": 2, "every": 3}
    settings = {**toy_settings, "structure": structure, "sparsity": 0.6}
    phases: Callable[[], list[Phase]] = partial(phases_of, RECIPES[recipe], **settings)
    options = {"stride": 7, "save_every": 3, **QUIET}
    rows = assert_resumes(network, digits(), phases, tmp_path, **options)
    assert min(row["loss"] for row in rows) < math.log(10)  # better than guessing
    total = 4 * 9 + 8 * 4 * 9 + 16 * 8 * 9 + 160
    if recipe == "dense":
        assert rows[-1]["sparsity"] == 0
    elif structure is weights:
        assert rows[-1]["sparsity"] == round(0.6 * total) / total
        assert rows[-1]["weights"]["zeros"] == round(0.6 * total)
    else:
        assert 0.6 <= rows[-1]["sparsity"] < 0.7


def test_a_lottery_ticket_starts_again_from_its_first_weights() -> None:
    model = build_model("resnet20", channels=1, size=8, classes=10, width=4)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, digits(), [Train(1, LR), Prune(0.5, weights, rewind=True)], **QUIET)
    for name, value in model.state_dict().items():
        assert torch.equal(value, torch.where(value == 0, 0, start[name])), name
    assert sparsity_of({n: p != 0 for n, p in model.named_parameters() if p.ndim > 1}) > 0.49
    phases = phases_of(frankle2019)
    assert phases[0::2] == phases_of(renda2020)[0::2]
    assert all(isinstance(cut, Prune) and cut.rewind for cut in phases[1::2])


def test_lin2020_by_hand() -> None:
    train, prune = phases_of(lin2020, every=5)
    assert isinstance(train, Train) and train.penalty and prune == Prune(0.9, weights)
    penalty = train.penalty(nn.Linear(4, 5), steps=30)
    assert isinstance(penalty, DenseFeedback) and penalty.every == 5 and penalty.sparsity == 0
    penalty.step = 15
    assert penalty.sparsity == 0.9


def test_peste2021_is_pruned_and_dense_in_turns() -> None:
    settings = {"epochs": 20, "sparsity": 0.6}
    rows = train(network(0), digits(), phases_of(peste2021, **settings), **QUIET)
    found = [round(row["sparsity"], 2) for row in rows]
    # An epoch is a turn, the last step of which begins the next one; 0.85 of the epochs are 17.
    assert found == [0, *[0.6, 0] * 7, *[0.6] * 6]


def test_wang2021_chooses_once_and_lets_the_decay_grow_linearly() -> None:
    first, second, prune, tune = phases_of(wang2021, weight_decay=0.1)
    assert isinstance(second, Train) and second.penalty
    assert (first, second.epochs) == (Train(3, LR), 3)
    assert (prune, tune) == (Prune(0.9, weights), Train(4, Constant(LR(1.0))))
    model = nn.Linear(4, 5)
    penalty = second.penalty(model, steps=30)
    assert isinstance(penalty, SelectiveWeightDecay)
    [before] = [chosen.clone() for chosen in penalty.selected()]
    with torch.no_grad():
        model.weight.copy_(torch.rand(5, 4))
    penalty.step = 15
    assert torch.equal(penalty.selected()[0], before)
    assert penalty.strength == 1000
    with pytest.raises(ValueError, match=r"at least finetune_epochs \+ 2.*not 10 with .* 9"):
        phases_of(wang2021, finetune_epochs=9)


@pytest.mark.parametrize("recipe", ["zhu2017", "soft"])
def test_the_sparsity_of_gradual_pruning_is_on_record(recipe: str) -> None:
    settings = {"epochs": 5, "every": 1, "ramp_begin": 0.0, "ramp_end": 0.9, "sparsity": 0.6}
    rows = train(network(0), digits(), phases_of(RECIPES[recipe], **settings), **QUIET)
    found = [row["sparsity"] for row in rows]
    target = [row["target"] for row in rows if row["kind"] == "train"]
    assert found[:-1] == pytest.approx(target, abs=1e-3)
    assert found == sorted(found) and found[0] > 0.2
    kept = [row["parameters"] for row in rows]
    assert kept == sorted(kept, reverse=True)
    for name in ("loss", "top1", "weights", "parameters"):  # the cut changes nothing
        assert rows[-1][name] == rows[-2][name]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"iterations": 0}, "iterations must be .* at least 1, not 0"),
        ({"iterations": 5}, r"at least iterations \(5\) and less than epochs \(10\).*not 4"),
        ({"finetune_epochs": 0, "iterations": 1}, "finetune_epochs must be .* not 0"),
        ({"finetune_epochs": 10}, r"less than epochs \(10\).*not 10"),
        (
            {"finetune_epochs": -2, "iterations": -3},
            "iterations must be .* at least 1, not -3",
        ),
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
