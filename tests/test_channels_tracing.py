"""Tracing: where channels pass and where they end."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swdlib.channels import follow, sides, tensors_of, tied_to


class Between(nn.Module):
    """Two convolutions, over places in so many dimensions, with an operation between them."""

    def __init__(self, operation: object, dimensions: int) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d)[dimensions - 1]
        self.first, self.second = convolution(2, 4, 1), convolution(4, 3, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(self.first(x)))  # type: ignore[operator]


def reached(operation: object, dimensions: int) -> set[str]:
    """Return the sides of layers and the ends that the first convolution's outputs lead to."""
    torch.manual_seed(0)
    model = Between(operation, dimensions)
    graph = follow(model, torch.randn(2, 2, *[4] * dimensions))
    names: dict[object, str] = {model.first: "first", model.second: "second"}
    return {f"{names.get(m, 'end')} {side}" for m, side, _, _ in tied_to(graph, model.first)}


PASSES = {
    "relu": F.relu,
    "pool": lambda x: (F.avg_pool1d if x.ndim == 3 else F.avg_pool2d)(x, 2),
    "pad": lambda x: F.pad(x, (1, 1)),
    "crop": lambda x: x[:, :, 1:],
    "scale": lambda x: 2 * x + 1,
    "gate": lambda x: x * x.mean((2, 3)[: x.ndim - 2], keepdim=True).sigmoid(),
}
ENDS = {
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "group norm": lambda x: F.group_norm(x, 2),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "index": lambda x: x[:, [1, 0, 3, 2]],
    "softmax": lambda x: x.softmax(1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "part": lambda x: x * x[:, :1],
    "sort": lambda x: x.sort(1).values,
    "shuffle": lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
}


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("name", PASSES)
def test_channels_pass(name: str, dimensions: int) -> None:
    assert reached(PASSES[name], dimensions) == {"first out", "second in"}


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("name", ENDS)
def test_channels_end(name: str, dimensions: int) -> None:
    assert any(place.startswith("end") for place in reached(ENDS[name], dimensions))


def test_indices_lead_back_to_the_outputs_that_they_belong_to() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    tied = tied_to(follow(model, torch.zeros(1, 1, 2, 2)), model[0])
    (linear,) = [(mine, root) for module, _, mine, root in tied if module is model[2]]
    assert np.array_equal(linear[0] // 4, linear[1])


def test_sides_by_hand() -> None:
    assert sides(nn.Conv2d(2, 6, 3)) == [("out", 6), ("in", 2)]
    assert sides(nn.Conv2d(2, 6, 3, groups=2)) == [("out", 6)]
    assert sides(nn.ConvTranspose2d(2, 6, 3)) == [("out", 6), ("in", 2)]
    assert sides(nn.Linear(3, 5)) == [("out", 5), ("in", 3)]
    assert sides(nn.BatchNorm2d(4)) == [("out", 4)]
    assert sides(nn.PReLU(4)) == [("out", 4)]
    for module in (nn.PReLU(), nn.BatchNorm2d(4, affine=False), nn.LayerNorm(4), nn.ReLU()):
        assert sides(module) == []


def test_tensors_of_nested_outputs() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert tensors_of({"x": [a, None], "y": (b, "text", 3)}) == [a, b]
    assert tensors_of(a) == [a] and tensors_of(None) == []
