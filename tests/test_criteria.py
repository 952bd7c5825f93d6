import pytest
import torch
from torch import nn

from swdlib.criteria import magnitude, saliency


def test_magnitude_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([[-2.0, 0.5], [-0.0, 1.0]]))
    scores = magnitude(parameter)
    assert scores.tolist() == [[2.0, 0.5], [0.0, 1.0]]
    assert not scores.requires_grad and not scores[1, 0].signbit()


def test_saliency_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([[-2.0, 0.5], [3.0, 1.0]]))
    (parameter * torch.tensor([[1.0, -4.0], [0.0, 0.25]])).sum().backward()
    scores = saliency(parameter)
    assert scores.tolist() == [[2.0, 2.0], [0.0, 0.25]]
    assert not scores.requires_grad


def test_saliency_is_the_change_of_a_linear_loss() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 4))
    slope = torch.randn(3, 4)
    loss = (parameter * slope).sum()
    loss.backward()
    for i in range(12):
        without = parameter.detach().flatten().clone()
        without[i] = 0.0
        change = (loss.detach() - (without * slope.flatten()).sum()).abs()
        assert saliency(parameter).flatten()[i] == pytest.approx(change.item(), abs=1e-5)


def test_saliency_without_a_gradient_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"call loss.backward\(\)"):
        saliency(nn.Parameter(torch.ones(2, 2)))
