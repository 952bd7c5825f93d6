import pytest
import torch
from torch import nn

from swdlib.criteria import magnitude
from swdlib.structures import STRUCTURES, Group, Structure, kernels, weights


class Tied(nn.Module):
    """Two layers that share a weight, a frozen one and an odd parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(3))
        self.cube = nn.Parameter(torch.ones(2, 3, 2, 2))


def sizes(groups: list[Group]) -> dict[str, tuple[int, int]]:
    return {group.name: (group.units, group.size) for group in groups}


def test_weights_by_hand() -> None:
    model = Tied()
    assert sizes(weights(model)) == {"cube": (24, 1), "first.weight": (9, 1)}
    assert weights(model)[0].parameter is model.cube


def test_kernels_by_hand() -> None:
    assert sizes(kernels(Tied())) == {"cube": (6, 4)}
    model = nn.Sequential(nn.Conv1d(2, 3, 5), nn.Conv3d(2, 1, 2), nn.Conv2d(4, 4, 3, groups=4))
    assert sizes(kernels(model)) == {"0.weight": (6, 5), "1.weight": (2, 8), "2.weight": (4, 9)}


def test_norms_and_biases_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm(2))
    assert [group.name for group in weights(model)] == ["0.weight"]
    assert weights(nn.BatchNorm2d(2)) == kernels(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3)])
def test_empty_kernels_are_no_units(shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.empty = nn.Parameter(torch.empty(shape))
    assert kernels(model) == []


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_contract_of_structures(structure: Structure) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 4))
    names = dict(model.named_parameters())
    groups = structure(model)
    assert groups
    for group in groups:
        assert group.parameter is names[group.name]
        assert group.units * group.size == group.parameter.numel()
        scores = group.scores(magnitude)
        assert scores.shape == (group.units,)
        spread = group.spread(torch.arange(group.units))
        assert spread.shape == group.parameter.shape
        assert spread.flatten().bincount().tolist() == [group.size] * group.units
        for unit in range(group.units):
            score = group.parameter[spread == unit].abs().mean()
            torch.testing.assert_close(scores[unit], score)


def test_order_of_units_is_the_logical_one_whatever_the_layout() -> None:
    data = torch.arange(48.0).reshape(2, 6, 2, 2)
    for layout in (data, data.to(memory_format=torch.channels_last)):
        whole = Group("w", nn.Parameter(layout))
        assert whole.scores(magnitude).tolist() == list(range(48))
        assert torch.equal(whole.spread(torch.arange(48)), data.long())
        kernel = Group("w", nn.Parameter(layout), size=4)
        assert kernel.scores(magnitude).tolist() == [4 * i + 1.5 for i in range(12)]


def test_a_criterion_of_the_wrong_shape_is_refused() -> None:
    group = weights(nn.Linear(3, 2))[0]
    with pytest.raises(ValueError, match=r"weight has shape \(2, 3\), its scores have \(2,\)"):
        group.scores(lambda parameter: parameter.abs().sum(1))
