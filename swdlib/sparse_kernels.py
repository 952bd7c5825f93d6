"""Sparse kernels: what torch offers for zeros that stay where they are."""

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from swdlib.masks import Masks, apply_


@torch.no_grad()
def sparse_linears(model: nn.Module, masks: Masks, sparsity: float = 0.9) -> nn.Module:
    """A masked copy, for inference only, whose sparse linear layers use torch's sparse kernels.

    On a GPU of compute capability 8.0 or newer, in float16 or bfloat16, these are the layers whose
    mask keeps at most two of each four neighbours in a row (2:4) and whose numbers of outputs and
    inputs are multiples of 32 and 64. In float32 or float64, on a GPU or on a CPU with MKL, they
    are those with at least the fraction `sparsity` of their weights removed, in compressed rows
    (CSR). torch has neither for convolutions.
    """
    masked = copy.deepcopy(model).eval()
    apply_(masked, masks)
    for name, module in masked.named_modules():
        mask = masks.get(f"{name}.weight" if name else "weight")
        # A subclass may hand its weight to a fused kernel, which takes no sparse one.
        if type(module) is nn.Linear and mask is not None:
            weight = _sparse(module.weight.detach(), mask, sparsity)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return masked


def _sparse(weight: Tensor, mask: Tensor, sparsity: float) -> Tensor:
    """The weight in the layout of the kernel that suits it; as it is if none does."""
    kept = int(mask.sum())
    with warnings.catch_warnings():
        # torch says, once in a process, that its sparse tensors may still change.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemi", UserWarning)
        if _fits_two_of_four(weight) and is_two_of_four(mask):
            return to_sparse_semi_structured(weight)
        if _fits_rows(weight) and mask.numel() - kept >= sparsity * mask.numel():
            return weight.to_sparse_csr()
    return weight


def is_two_of_four(mask: Tensor) -> bool:
    """Whether `mask` (outputs, inputs, ...) keeps at most two of each four inputs in a row."""
    if mask.ndim < 2 or mask.shape[1] % 4:
        return False
    return bool((mask.movedim(1, -1).reshape(-1, 4).sum(1) <= 2).all())


def _fits_two_of_four(weight: Tensor) -> bool:
    return (
        weight.is_cuda
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and weight.dtype in (torch.float16, torch.bfloat16)
        and not (weight.shape[0] % 32 or weight.shape[1] % 64)
    )


def _fits_rows(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and torch.backends.mkl.is_available()
    return (weight.is_cuda or on_cpu) and weight.dtype in (torch.float32, torch.float64)


def sparse_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of a network of `sparse_linears` that use a sparse kernel."""
    return [m for m in model.modules() if isinstance(m, nn.Linear) and _left_out(m.weight)]


@torch.no_grad()
def macs_left_out(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates that sparse kernels do not do in one pass of `example`."""
    left_out = 0

    def add(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal left_out
        assert isinstance(layer, nn.Linear)
        left_out += _left_out(layer.weight) * (output.numel() // layer.out_features)

    hooks = [layer.register_forward_hook(add) for layer in sparse_layers(model)]
    model(example)
    for hook in hooks:
        hook.remove()
    return left_out


def _left_out(weight: Tensor) -> int:
    """How many weights a layer's kernel does not read."""
    if isinstance(weight, SparseSemiStructuredTensor):
        return weight.numel() // 2
    return weight.numel() - weight._nnz() if weight.layout == torch.sparse_csr else 0
