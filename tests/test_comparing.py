"""Comparing: equal networks are found equal, others are not, whatever they return."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from swdlib.comparing import Differs, inputs_like, require_equal
from swdlib.labels import storage_of
from tests.toys import Net

OUTPUTS: dict[str, Callable[[Tensor], object]] = {
    "numbers": lambda y: y,
    "tiny": lambda y: y * 1e-9,
    "complex": lambda y: torch.complex(y, y),
    "with infinities": lambda y: y.masked_fill(y > 0.3, -torch.inf),
    "whole numbers": lambda y: (y * 1000).round().long(),
    "nested": lambda y: {"a": [y.sum()], "b": (None, y)},
    "with random numbers": lambda y: y + torch.rand_like(y),
    "the best few": lambda y: y.gather(0, y.topk(2, 0).indices),
}


def network(name: str, factor: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    net = Net(lambda net, x: OUTPUTS[name](net.a(x)), a=nn.Linear(3, 4))
    net.get_parameter("a.weight").data *= factor
    return net


@pytest.mark.parametrize("name", OUTPUTS)
def test_equal_outputs_are_equal_and_others_differ(name: str) -> None:
    x = torch.randn(5, 3)
    require_equal(network(name), network(name), [x])
    with pytest.raises(Differs):
        require_equal(network(name, 1.01), network(name), [x])


def test_roundings_are_decided_in_double_precision() -> None:
    def run(order: int) -> nn.Module:
        torch.manual_seed(0)
        return Net(
            lambda net, x: net.a(x)[:, ::order].sum(1) if order == 1 else net.a(x).flip(1).sum(1),
            a=nn.Linear(3, 999),
        )

    require_equal(run(-1), run(1), [torch.randn(5, 3)])


def test_random_inputs_are_of_the_examples_kind() -> None:
    example = {"image": torch.tensor([[1.0, 2.0]] * 40), "ids": torch.zeros(2, 40).long()}
    drawn = inputs_like(example, {storage_of(example["ids"]): 7}, 2)
    assert set(drawn[0]["image"].flatten().tolist()) == {1.0, 2.0}
    assert set(drawn[0]["ids"].flatten().tolist()) == set(range(7))
    (kept,) = inputs_like((torch.zeros(2).long(),), {}, 1)
    assert kept[0].tolist() == [0, 0]
    (noise,) = inputs_like(torch.zeros(2, 3), {}, 1)
    assert noise.std() > 0
