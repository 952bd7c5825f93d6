import pytest
import torch
from torch import nn

from swdlib.criteria import Random, batch_norm_scale, magnitude, saliency, score_of


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


def test_batch_norm_scale_by_hand() -> None:
    scores = batch_norm_scale(nn.Parameter(torch.tensor([-2.0, 0.5, 0.0])))
    assert scores.tolist() == [2.0, 0.5, 0.0]
    assert not scores.requires_grad


def test_batch_norm_scale_refuses_weights() -> None:
    with pytest.raises(ValueError, match=r"a parameter of shape \(2, 3\) holds none"):
        batch_norm_scale(torch.ones(2, 3))


def test_random_scores_depend_on_seed_and_name_alone() -> None:
    first = score_of(Random(1), "a", torch.zeros(50, 40))
    assert torch.equal(first, score_of(Random(1), "a", torch.rand(50, 40).double()))
    assert not torch.equal(first, score_of(Random(2), "a", torch.zeros(50, 40)))
    assert not torch.equal(first, score_of(Random(1), "b", torch.zeros(50, 40)))
    assert first.isfinite().all() and len(first.unique()) > 1990
    assert Random(1) == Random(1) != Random(2)


@pytest.mark.parametrize("size", [1, 9, 100])
def test_random_scores_give_units_of_all_sizes_equal_chances(size: int) -> None:
    units = Random(0)(torch.zeros(4000, size)).mean(1)
    for threshold, above in ((-1.0, 0.75), (0.0, 0.5), (3.0, 0.1024)):  # of Cauchy's distribution
        assert float((units > threshold).float().mean()) == pytest.approx(above, abs=0.025)


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fc has shape \(2, 3\), its scores have \(2,\)"):
        score_of(lambda p: p.sum(1), "fc", torch.ones(2, 3))
