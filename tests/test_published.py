"""The published system: equal to a literal reading of it, and written out where it is data."""

from typing import Any

import pytest
import torch
from torch import nn

from swdlib import published, structures
from swdlib.comparing import in_eval
from swdlib.data.images import Dataset, Split
from swdlib.deploy import shrink
from swdlib.masks import find_groups, kept, select
from swdlib.models import build_model
from swdlib.published import REFERENCES, SmoothL1, published_count, tessier_scales, zero_unread_
from swdlib.recipes import Prune, Train
from swdlib.runs.config import Config
from swdlib.runs.records import address
from swdlib.schedules import Constant, Steps
from tests.fidelity import CASES, compare


@pytest.mark.parametrize(
    ("method", "structure", "width"),
    [*((*case, 4) for case in CASES), *((*case, 8) for case in CASES[:3])],
)
def test_it_is_the_literal_reading(method: str, structure: str, width: int) -> None:
    found = compare(method, structure, width)
    assert found["steps with another w*"] == found["masks differ in"] == 0
    assert found["weights differ by"] < 1e-12
    assert found["kept, library"] == found["kept, reference"]
    assert found["estimate, library"] == found["estimate, reference"]


class Toy(nn.Module):
    """One parameter of each kind: 8 ranked values, of which the median is 0.4; a norm; a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 1)
        self.norm = nn.BatchNorm1d(2)
        self.linear = nn.Linear(2, 1, bias=False)
        self.gain = nn.Parameter(torch.tensor([0.3]))
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[[0.1]], [[-0.6]]]))
            self.get_parameter("conv.bias").copy_(torch.tensor([0.2, 0.5]))
            self.norm.weight.copy_(torch.tensor([0.35, 1.0]))
            self.linear.weight.copy_(torch.tensor([[0.3, -0.4]]))


def test_the_layers_give_the_threshold_and_everything_below_it_goes() -> None:
    # Ranked are 0.1, 0.2, 0.3, 0.4, 0.5, 0.6; at place int(0.5 * 6) is 0.4.
    masks = select(structures.parameters(Toy()), 0.5)
    assert {name: mask.flatten().tolist() for name, mask in masks.items()} == {
        "gain": [False],
        "conv.weight": [False, True],
        "conv.bias": [False, True],
        "norm.weight": [False, True],
        "norm.bias": [False, False],
        "linear.weight": [False, True],
    }


def test_modules_can_be_ranked_as_well() -> None:
    model = Toy()
    # With 0.35, 1, 0 and 0 there are 10, and 0.35 is at place int(0.5 * 10).
    masks = select(structures.parameters(model, also=[model.norm]), 0.5)
    assert masks["norm.weight"].tolist() == [True, True]
    assert masks["gain"].tolist() == [False]


def test_weights_that_tie_with_the_threshold_stay() -> None:
    model = Toy()
    nn.init.constant_(model.conv.weight, 0.4)
    # 0.2, 0.3, 0.4, 0.4, 0.4, 0.5: two lie below the one at place 3.
    assert kept(model, select(structures.parameters(model), 0.5))["kept_weights"] == 3


def test_a_network_of_norms_alone_has_nothing_to_rank() -> None:
    with pytest.raises(ValueError, match="nothing that structure 'parameters' can prune"):
        find_groups(nn.BatchNorm1d(3), structures.parameters)


@pytest.mark.parametrize("name", ["tessier_resnet20", "tessier_resnet18", "tessier_resnet50"])
@pytest.mark.parametrize("size", [32, 96])
def test_with_all_scales_the_estimate_counts_every_parameter(name: str, size: int) -> None:
    model = build_model(name, width=4, size=size)
    groups = tessier_scales(model)
    total = sum(p.numel() for p in model.parameters())
    assert published_count(model, [group.units for group in groups]) == total


def test_the_estimate_of_a_bottleneck_written_out() -> None:
    # Stem: 3 scales; the first block, with a projection: inside 2 and 1, outputs 5.
    model = build_model("tessier_resnet50", width=4, size=96)
    groups = tessier_scales(model)
    numbers = [0] * len(groups)
    numbers[:4] = [3, 2, 1, 5]
    block = 3 * 2 + 2 * 2 + 9 * 2 * 1 + 2 * 1 + 1 * 5 + 2 * 5 + 2 * 5 + 3 * 5 + 2 * 5
    assert published_count(model, numbers) == 147 * 3 + 2 * 3 + block + 10


def test_scales_are_cut_with_their_shifts_alone() -> None:
    model = build_model("tessier_resnet20", width=4)
    groups = tessier_scales(model)
    names = {name for group in groups for name in group.parameters}
    assert len(groups) == 1 + 9 * 2
    assert len(names) == 2 * len(groups)
    assert not any("norms.1" in name or "shortcut" in name for name in names)


@pytest.mark.parametrize("structure", published.STRUCTURES)
def test_other_networks_are_refused_with_a_remedy(structure: str) -> None:
    with pytest.raises(ValueError, match=r"tessier_resnet20, .* use another, such as"):
        published.STRUCTURES[structure](None)(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not for model 'resnet20': use another"):
        Config(model="resnet20", structure=structure)


def cut_scales(structure: str, sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    model = build_model("tessier_resnet20", width=8)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.1, 1.0)
                module.bias.normal_()
        groups = published.STRUCTURES[structure](None)(model)
        for name, mask in select(groups, sparsity).items():
            model.get_parameter(name).mul_(mask)
    return model


@pytest.mark.parametrize("structure", ["tessier_scales", "tessier_filters"])
def test_a_network_cut_by_scales_shrinks_and_computes_the_same(structure: str) -> None:
    model, images = cut_scales(structure, 0.75), torch.randn(4, 3, 32, 32)
    counted = [int((g.parameter != 0).sum()) for g in tessier_scales(model)]
    with in_eval(model), torch.no_grad():
        before = model(images)
        zero_unread_(model)
        assert torch.equal(model(images), before)
        small = shrink(model, {n: p != 0 for n, p in model.named_parameters()}, images[:1])
        assert torch.allclose(small.eval()(images), before, atol=1e-5)
    left = sum(p.numel() for p in small.parameters())
    assert published_count(model, counted) < left < 69_122  # the estimate unties the shortcuts


# References ---------------------------------------------------------------------------------------

LR = Steps(0.1, 0.1, (1 / 3, 2 / 3))


def written_out(phases: list[Any]) -> list[Any]:
    return [
        ("cut", phase.sparsity, phase.criterion.__name__, phase.held)
        if isinstance(phase, Prune)
        else (phase.epochs, phase.lr, bool(phase.penalty), phase.keep_momentum)
        for phase in phases
    ]


def phases_of(recipe: str, structure: Any = structures.weights, **more: Any) -> list[Any]:
    settings = {"sparsity": 0.9, "finetune_epochs": 50, **more}
    return written_out(REFERENCES[recipe](epochs=300, lr=LR, structure=structure, **settings))


LAST = Constant(0.1 * 0.1**2)


def test_han2015_as_published() -> None:
    assert phases_of("han2015", iterations=4) == [
        (300, Steps(0.1, 0.1, (100 / 300, 200 / 300)), False, False),
        ("cut", 0.225, "magnitude", True),
        (50, LAST, False, True),
        ("cut", 0.45, "magnitude", True),
        (50, LAST, False, True),
        ("cut", 0.675, "magnitude", True),
        (50, LAST, False, True),
        ("cut", 0.9, "magnitude", True),
        (50, LAST, False, True),
    ]


def test_renda2020_as_published() -> None:
    assert phases_of("renda2020") == [
        (300, Steps(0.1, 0.1, (100 / 300, 200 / 300)), False, False),
        ("cut", 0.9, "magnitude", True),
        (50, Steps(0.1, 0.1, (16 / 50, 33 / 50)), False, False),
    ]


def test_renda2020_of_scales_has_the_penalty_of_network_slimming_until_the_last_cut() -> None:
    assert [phase[2] for phase in phases_of("renda2020", tessier_scales, iterations=2)] == [
        *(True, "magnitude", True, "magnitude", False)
    ]


def test_liu2017_as_published() -> None:
    assert phases_of("liu2017", tessier_scales) == [
        (300, Steps(0.1, 0.1, (100 / 300, 200 / 300)), True, False),
        ("cut", 0.9, "batch_norm_scale", True),
        (50, LAST, False, True),
    ]


def test_soft_as_published_cuts_before_the_first_epoch() -> None:
    phases = REFERENCES["soft"](epochs=300, lr=LR, structure=structures.weights, sparsity=0.9)
    assert written_out(phases) == [
        ("cut", 0.9, "magnitude", False),
        (300, Steps(0.1, 0.1, (100 / 300, 200 / 300)), True, False),
        ("cut", 0.9, "magnitude", True),
    ]


def test_the_published_l1_is_smooth_and_keeps_the_sign_of_its_slope_beyond_one() -> None:
    model = build_model("tessier_resnet20", width=4)
    penalty = SmoothL1(model, l1=0.1, structure=tessier_scales)
    assert len(penalty.scales) == 19
    slope = penalty.slope(torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 2.0]))
    assert slope.tolist() == [1.0, -2.0, -1.0, 0.0, 1.0, 1.0]


def test_published_targets_are_thousandths() -> None:
    with pytest.raises(ValueError, match=r"whole thousandths .* not 0\.9985"):
        phases_of("han2015", sparsity=0.9985)


# Settings -----------------------------------------------------------------------------------------


def test_the_profile_paper_is_the_published_set_up() -> None:
    config = Config(profile="paper", sparsity=0.999)
    found = {name: getattr(config, name) for name in ("structure", "budget", "normalisation")}
    assert found == {
        "structure": "tessier_parameters",
        "budget": "equal",  # SWD has one
        "normalisation": "published",
    }
    assert Config(profile="paper", recipe="han2015").budget == "published"
    assert Config(profile="paper", dataset="imagenet").normalisation == "measured"
    assert Config(profile="paper", model="resnet20").structure == "parameters"


def test_the_profile_paper_ranks_filters_by_scale() -> None:
    assert Config(profile="paper", structure="filters").criterion == "batch_norm_scale"
    with pytest.raises(ValueError, match="structure must be one of filters"):
        Config(profile="paper", recipe="liu2017")


def test_only_references_have_a_published_budget() -> None:
    with pytest.raises(ValueError, match="budget must be 'equal' for recipe 'zhu2017'"):
        Config(recipe="zhu2017", budget="published")


def test_a_published_budget_adds_its_epochs_after_each_cut() -> None:
    given: dict[str, Any] = {"recipe": "han2015", "finetune_epochs": 3, "iterations": 3}
    epochs = {
        budget: [p.epochs for p in Config(budget=budget, **given).phases() if isinstance(p, Train)]
        for budget in ("equal", "published")
    }
    assert epochs == {"equal": [27, 1, 1, 1], "published": [30, 3, 3, 3]}


def test_settings_that_came_later_do_not_move_earlier_records() -> None:
    settings = Config().settings()
    assert settings["budget"] == "equal" and settings["normalisation"] == "measured"
    before = {k: v for k, v in settings.items() if k not in ("budget", "normalisation")}
    assert address(settings) == address(before)
    assert address({**settings, "normalisation": "published"}) != address(before)


def test_the_published_normalisation_replaces_the_deviations() -> None:
    none = Split(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    unit: tuple[float, ...] = (0.5,) * 3
    data = Dataset("cifar10", "made", none, none, 10, unit, unit, 4, True, "")
    published = Config(profile="paper").normalised(data)
    assert published.std == (0.2023, 0.1994, 0.2010)
    assert published.mean == data.mean
    assert Config(dataset="cifar10").normalised(data) is data
