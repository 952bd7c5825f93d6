"""Configurations: defaults, checks and addresses."""

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from swdlib.criteria import batch_norm_scale
from swdlib.data.load import load_data
from swdlib.masks import erk, uniform
from swdlib.models import build_model
from swdlib.recipes import RECIPES, Prune, Train
from swdlib.runs import records
from swdlib.runs.config import LR_SCHEDULES, PROFILES, Config
from swdlib.structures import STRUCTURES


def address(**settings: Any) -> str:
    return records.address(Config(**settings).settings())


def test_what_is_not_given_comes_from_the_profile() -> None:
    config = Config(profile="laptop", epochs=3)
    assert (config.dataset, config.model, config.width, config.epochs) == (
        "cifar10",
        "resnet20",
        8,
        3,
    )
    assert dataclasses.replace(config, seed=1).epochs == 3


def test_the_paper_profile_is_the_published_set_up() -> None:
    config = Config(profile="paper")
    published = {
        "dataset": "cifar10",
        "model": "tessier_resnet20",
        "width": 64,
        "epochs": 300,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 5e-4,
        "a_min": 0.1,
        "a_max": 1e5,
    }
    assert published.items() <= config.settings().items()
    [training, _] = config.phases()
    assert isinstance(training, Train)
    rates = [training.lr(epoch / 300) for epoch in (0, 99, 100, 199, 200, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_paper_profile_depends_on_the_dataset() -> None:
    config = Config(profile="paper", dataset="imagenet")
    expected = {
        "model": "tessier_resnet50",
        "width": 64,
        "epochs": 90,
        "batch_size": 256,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 1e-4,
        "precision": "bf16",
    }
    assert expected.items() <= config.settings().items()
    [training, _] = config.phases()
    assert isinstance(training, Train)
    rates = [training.lr(epoch / 90) for epoch in (0, 29, 30, 59, 60, 89)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    for recipe in RECIPES:
        structure = "filters" if recipe == "liu2017" else "weights"
        given: Any = {"recipe": recipe, "structure": structure, "budget": "equal"}
        phases = Config(profile="paper", dataset="imagenet", **given).phases()
        assert sum(phase.epochs for phase in phases if isinstance(phase, Train)) == 90
    narrow = Config(profile="paper", dataset="imagenet", model="resnet20", weight_decay=5e-4)
    assert (narrow.width, narrow.weight_decay) == (64, 5e-4)
    assert Config(profile="laptop", dataset="imagenet", recipe="dense").weight_decay == 5e-4


def test_addresses_stay_as_they_were() -> None:
    # Records are found by these: a changed default must not change them.
    assert address() == "47e1d21dc7416c1b"
    assert address(profile="laptop", sparsity=0.98) == "fb11a67e37786b60"
    assert address(profile="paper", model="resnet20") == "cbd64325e4f02b96"


@pytest.mark.parametrize("model", ["inception_v3", "vit_b_32"])
def test_a_network_that_is_too_large_for_the_images_is_told_before_any_work(model: str) -> None:
    images = SimpleNamespace(channels=3, size=32, classes=10)
    with pytest.raises(ValueError, match=f"model '{model}' cannot take images of 32 x 32 pixels"):
        Config(model=model, dataset="cifar10").build(cast(Any, images))


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_learning_rates_peak_at_lr_and_end_at_a_hundredth(name: str) -> None:
    course = LR_SCHEDULES[name](0.2)
    assert max(course(step / 100) for step in range(101)) == pytest.approx(0.2)
    assert course(1.0) == pytest.approx(0.002)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_profile_runs_every_recipe(profile: str, recipe: str, structure: str) -> None:
    if recipe == "liu2017" and "filters" not in structure:
        return  # refused, see below
    config = Config(profile=profile, recipe=recipe, structure=structure, budget="equal")
    phases = config.phases()
    assert sum(phase.epochs for phase in phases if isinstance(phase, Train)) == config.epochs
    cuts = [phase.sparsity for phase in phases if isinstance(phase, Prune)]
    assert cuts[-1:] == ([] if recipe == "dense" else [0.9])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": "desktop"}, "profile must be one of smoke, laptop, paper, not 'desktop'"),
        ({"dataset": "mnist"}, "dataset must be one of digits, cifar10, imagenet, not 'mnist'"),
        ({"recipe": "magic"}, "recipe must be one of dense, swd, .*, soft, not 'magic'"),
        ({"structure": "rows"}, "structure must be one of weights, parameters, .*not 'rows'"),
        ({"update": "newton"}, "update must be one of gradient, proximal, not 'newton'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, not 'fp8'"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), not -0.1"),
        ({"sparsity": float("nan")}, "sparsity must be a finite number, not nan"),
        ({"sparsity": "0.9"}, "sparsity must be of type float, not '0.9'"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        ({"epochs": 2.5}, "epochs must be of type int, not 2.5"),
        ({"epochs": True}, "epochs must be of type int, not True"),
        ({"nesterov": "true"}, "nesterov must be of type bool, not 'true'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov must be false if momentum is 0"),
        ({"lr": 0.0}, "lr must be above 0, not 0.0"),
        ({"a_min": 0.0}, "a_min must be above 0, not 0.0"),
        ({"a": -1.0, "recipe": "swd_constant"}, "a must be above 0, not -1.0"),
        ({"growth": "sudden"}, "growth must be one of exponential, linear, .*, not 'sudden'"),
        ({"growth_end": 0.0}, "growth_end must be above 0 and at most 1, not 0.0"),
        ({"every": 0, "recipe": "zhu2017"}, "every must be a whole number of at least 1, not 0"),
        (
            {"l1": -1e-4, "recipe": "liu2017", "structure": "filters"},
            "l1 must be 0 or more, not -0.0001",
        ),
        ({"ramp_end": 1.5, "recipe": "zhu2017"}, r"ramp_end must be in \[0, 1\], not 1.5"),
        ({"ramp_end": 0.1, "recipe": "zhu2017"}, "ramp_begin < ramp_end <= 1, not 0.2 and 0.1"),
        ({"weight_decay": -1e-4}, "weight_decay must be 0 or more, not -0.0001"),
        ({"holdout": 1.0}, r"holdout must be in \[0, 1\), not 1.0"),
        ({"width": 0}, "width must be a whole number of at least 1, not 0"),
        ({"clip": 0.0}, "clip must be above 0, not 0.0"),
        ({"recipe": "han2015", "epochs": 5, "finetune_epochs": 5}, "less than epochs"),
        ({"recipe": "han2015", "iterations": 7}, r"at least iterations \(7\)"),
    ],
)
def test_an_impossible_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_equal_settings_have_one_address() -> None:
    assert address(lr=1) == address(lr=1.0) == address(lr=np.float64(1))
    assert address(seed=np.int64(3)) == address(seed=3)
    assert address(data_root="/somewhere", device="cpu") == address()


def test_settings_that_came_later_leave_the_addresses_of_earlier_runs() -> None:
    earlier = {n: v for n, v in Config().settings().items() if n not in ("growth", "growth_end")}
    assert records.address(earlier) == address()
    others = [address(growth="linear"), address(growth_end=0.8)]
    assert len({address(), *others}) == 3


def test_settings_that_a_recipe_does_not_use_do_not_tell_runs_apart() -> None:
    assert address(recipe="dense", sparsity=0.5, a_max=10.0) == address(recipe="dense")
    assert address(recipe="han2015", a_max=10.0) == address(recipe="han2015")
    assert address(recipe="swd", a_max=10.0) != address(recipe="swd")
    assert address(recipe="dense", weight_decay=0.0) != address(recipe="dense")
    assert address(recipe="dense", seed=1) != address(recipe="dense")


def test_what_is_not_given_comes_from_the_recipe() -> None:
    names = ["a", "a_min", "a_max", "update", "ramp_begin", "ramp_end", "every", "l1"]
    names += ["growth", "growth_end"]

    def defaults(recipe: str) -> dict[str, Any]:
        config = Config(recipe=recipe, structure="filters")
        return {n: getattr(config, n) for n in names if getattr(config, n) is not None}

    assert defaults("dense") == defaults("soft") == {}
    as_published = {"update": "gradient", "growth": "exponential", "growth_end": 1.0}
    assert defaults("swd") == {"a_min": 0.1, "a_max": 1e5, **as_published}
    assert defaults("swd_constant") == {"a": 100.0, "update": "gradient"}
    ramp = {"ramp_begin": 0.1, "ramp_end": 0.7}
    assert defaults("swd_rising") == {"a_min": 10.0, "a_max": 5e4, **ramp, **as_published}
    assert defaults("zhu2017") == {"ramp_begin": 0.2, "ramp_end": 0.7, "every": 100}
    assert defaults("liu2017") == {"l1": 1e-4}
    assert Config(recipe="swd_rising", a_min=1.0).a_min == 1.0
    assert Config(recipe="han2015").iterations == 1
    assert Config(recipe="dense").iterations is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_of_a_recipe_is_a_field(recipe: str) -> None:
    fields = {field.name for field in dataclasses.fields(Config)}
    config = Config(recipe=recipe, structure="filters")
    for name in inspect.signature(RECIPES[recipe]).parameters:
        assert name in fields
        assert getattr(config, name) is not None


def test_torchvision_networks_have_no_width() -> None:
    assert Config(model="resnet18").width is None
    with pytest.raises(ValueError, match="width must be None for torchvision's resnet18"):
        Config(model="resnet18", width=16)


def test_an_unknown_network_is_refused_before_any_data_is_read() -> None:
    with pytest.raises(ValueError, match="not 'resnt20'; did you mean resnet20"):
        Config(model="resnt20")


@pytest.mark.parametrize("recipe", ["swd", "zhu2017", "soft", "han2015", "one_shot"])
def test_another_criterion_and_allocation_reach_every_phase_that_ranks(recipe: str) -> None:
    config = Config(
        recipe=recipe,
        structure="filters",
        criterion="batch_norm_scale",
        allocation="uniform",
    )
    example = torch.zeros(1, 1, 8, 8)
    for phase in config.phases(example):
        if isinstance(phase, Prune):
            assert (phase.criterion, phase.allocation) == (batch_norm_scale, uniform)
        elif phase.penalty:
            model = build_model("cnn", channels=1, size=8, width=4)
            penalty: Any = phase.penalty(model, steps=30)
            assert (penalty.criterion, penalty.allocation) == (batch_norm_scale, uniform)


@pytest.mark.parametrize("recipe", ["liu2017", "random_pruning"])
def test_a_recipe_with_a_criterion_of_its_own_takes_no_other(recipe: str) -> None:
    with pytest.raises(ValueError, match="criterion must be left out"):
        Config(recipe=recipe, structure="filters", criterion="magnitude")
    phases = Config(recipe=recipe, structure="filters", allocation="erk").phases()
    assert [p.allocation for p in phases if isinstance(p, Prune)] == [erk]


def test_dense_training_has_no_criterion_and_no_allocation() -> None:
    config = Config(recipe="dense", criterion="magnitude", allocation="erk")
    assert config.criterion is config.allocation is None


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if "filters" not in s])
def test_ranking_by_scales_needs_a_structure_that_has_them(structure: str) -> None:
    allowed = "structure must be one of filters, filters_and_channels, .*"
    with pytest.raises(ValueError, match=f"{allowed}recipe 'liu2017' .*not '{structure}'"):
        Config(recipe="liu2017", structure=structure)
    with pytest.raises(ValueError, match=f"{allowed}criterion 'batch_norm_scale' .*'{structure}'"):
        Config(structure=structure, criterion="batch_norm_scale")


def test_the_configuration_builds_its_network_from_its_seed() -> None:
    data = load_data("digits")
    first, again, other = (Config(seed=seed, width=4).build(data) for seed in (0, 0, 1))
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_the_options_are_those_of_the_configuration_and_more() -> None:
    config = Config(seed=3, clip=0.5, batch_size=32, lr=0.3)
    options = config.options(progress=False, seed=4)
    assert (options["clip"], options["batch_size"]) == (0.5, 32)
    assert (options["seed"], options["progress"]) == (4, False)
    [group] = options["optimizer"]([torch.nn.Parameter(torch.ones(1))]).param_groups
    names = ("lr", "momentum", "nesterov", "weight_decay")
    assert [group[name] for name in names] == [getattr(config, name) for name in names]
