"""Sparse kernels: the same outputs for fewer multiply-accumulates, where torch has a kernel."""

import pytest
import torch
from torch import Tensor, nn

from swdlib.deploy.reports import is_two_of_four, macs_skipped, sparse_linears
from swdlib.masks import Masks, apply_
from swdlib.models import build_model

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL")
STRIDED = torch.strided
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def mlp_with(removed: float) -> tuple[nn.Module, Masks]:
    """Return an MLP of 192, 20, 20 and 10 units, and masks that remove weights of the first two."""
    torch.manual_seed(0)
    model = build_model("mlp", size=8, width=20)
    shapes = {"1.weight": (20, 192), "3.weight": (20, 20)}
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for mask in masks.values():
        mask.view(-1)[: round(removed * mask.numel())] = False
    return model, masks


def sparse_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose weight is in a sparse layout."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [m for m in linears if type(m.weight.data) is not Tensor or m.weight.layout != STRIDED]


@needs_mkl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_are_those_of_the_masked_network(dtype: torch.dtype) -> None:
    model, masks = mlp_with(0.9)
    model.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse = sparse_linears(model, masks)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert model.training and not sparse.training
    assert len(sparse_layers(sparse)) == 2 and not sparse_layers(model)
    apply_(model, masks)
    images = torch.randn(3, 3, 8, 8, dtype=dtype)
    torch.testing.assert_close(sparse(images), model(images))


@needs_mkl
def test_skipped_multiply_accumulates_by_hand() -> None:
    model, masks = mlp_with(0.9)
    zeros = round(0.9 * 20 * 192) + round(0.9 * 20 * 20)
    sparse = sparse_linears(model, masks)
    assert macs_skipped(sparse, torch.randn(1, 3, 8, 8)) == zeros
    assert macs_skipped(sparse, torch.randn(5, 3, 8, 8)) == 5 * zeros
    assert macs_skipped(model, torch.randn(5, 3, 8, 8)) == 0
    one = nn.Linear(4, 2, bias=False)
    alone = sparse_linears(one, {"weight": torch.zeros(2, 4).bool()})
    assert sparse_layers(alone) == [alone]
    assert macs_skipped(alone, torch.randn(3, 7, 4)) == 3 * 7 * 8


@needs_mkl
@pytest.mark.parametrize(("removed", "sparsity", "layers"), [(0.5, 0.9, 0), (0.5, 0.5, 2)])
def test_layers_below_the_sparsity_stay_dense(removed: float, sparsity: float, layers: int) -> None:
    model, masks = mlp_with(removed)
    assert len(sparse_layers(sparse_linears(model, masks, sparsity))) == layers


def test_convolutions_half_precision_and_subclasses_stay_dense() -> None:
    cnn = build_model("cnn", size=8, width=4)
    masks = {"0.weight": torch.zeros(4, 3, 3, 3, dtype=torch.bool)}
    assert not sparse_layers(sparse_linears(cnn, masks))
    model, masks = mlp_with(0.9)
    assert not sparse_layers(sparse_linears(model.bfloat16(), masks))
    attention = nn.MultiheadAttention(8, 2)  # its out_proj is a subclass of Linear
    masks = {"out_proj.weight": torch.zeros(8, 8, dtype=torch.bool)}
    assert not sparse_layers(sparse_linears(attention, masks))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1]]), True),
        (torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]]), True),
        (torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0]]), False),
        (torch.tensor([[1, 1, 0, 0, 0, 1]]), False),
        (torch.tensor([1, 1, 0, 0]), False),
        (torch.tensor([1, 0, 0, 1]).reshape(1, 4, 1, 1).expand(2, 4, 3, 3), True),
        (torch.tensor([1, 1, 0, 1]).reshape(1, 4, 1, 1).expand(2, 4, 3, 3), False),
    ],
)
def test_two_of_four_by_hand(mask: Tensor, expected: bool) -> None:
    assert is_two_of_four(mask.bool()) is expected


if GPU:  # of compute capability 8.0: there is nothing to skip where there is none

    def test_two_of_four_on_a_gpu() -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 64)).cuda().half()
        mask = torch.tensor([True, False, False, True]).repeat(64, 32).cuda()
        sparse = sparse_linears(model, {"0.weight": mask})
        batch = torch.randn(16, 128).cuda().half()
        assert macs_skipped(sparse, batch) == 16 * 64 * 64
        apply_(model, {"0.weight": mask})
        with torch.no_grad():
            torch.testing.assert_close(sparse(batch), model(batch), rtol=1e-2, atol=1e-2)
