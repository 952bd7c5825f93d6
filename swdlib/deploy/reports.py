"""Deployment: what pruning gains once training is over, measured side by side."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from swdlib.deploy.shrinking import shrink
from swdlib.deploy.stored import (
    INSTALL,
    PACKAGES,
    check_example,
    in_onnxruntime,
    load_sparse,
    missing,
    save_sparse,
    to_onnx,
)
from swdlib.masks import Masks, apply_
from swdlib.metrics import bytes_on_disk, count_macs, in_eval, latencies, parameters

if TYPE_CHECKING:
    import pandas as pd
import warnings

from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

__all__ = ["Report", "load_sparse", "report", "save_sparse", "shrink", "sparse_linears", "to_onnx"]


@dataclass(frozen=True)
class Report:
    """What pruning gains, and in `text` what it cannot gain and why; `print` shows both.

    `table` has a row for each network and the columns `parameters`; `macs`, multiply-accumulates
    for one image; `bytes` on disk; `latency_ms`, milliseconds for one image; `images_per_s`, the
    throughput at the example's batch size; `difference`, the largest of the outputs from those of
    the masked network.
    """

    table: "pd.DataFrame"
    text: str

    def __str__(self) -> str:
        whole, few = "{:,.0f}".format, "{:,.4g}".format
        formats = dict.fromkeys(("parameters", "macs", "bytes"), whole)
        formats |= {"latency_ms": few, "images_per_s": few, "difference": "{:.1e}".format}
        return f"{self.table.to_string(formatters=formats)}\n\n{self.text}"


@dataclass(frozen=True)
class _Network:
    run: Callable[[Tensor], Tensor]
    parameters: int
    macs: int
    bytes: int


@torch.no_grad()
def report(model: nn.Module, masks: Masks, example: Tensor, *, rounds: int = 5) -> Report:
    """Measure a network dense, masked, shrunk, shrunk in onnxruntime, and with sparse kernels.

    `example` is a batch, shape (N, ...), on the model's device. The networks are timed in turn in
    the same rounds, on as many threads as torch uses, and the median counts. Left out are
    onnxruntime where it is missing or the example is not float32 on the CPU, and sparse kernels
    where no layer can use them (see `sparse_linears`). The model is not changed.
    """
    import pandas as pd  # here, as it takes long to import

    check_example(example)
    with in_eval(model):
        _require_tensor(model(example[:1]))
        shrunk = shrink(model, masks, example).eval()
        networks = _networks(model, masks, shrunk, example[:1])
        outputs = {name: network.run(example).float() for name, network in networks.items()}
        single, batch = (
            latencies({name: partial(n.run, x) for name, n in networks.items()}, rounds=rounds)
            for x in (example[:1], example)
        )
    rows = {
        name: {
            "parameters": network.parameters,
            "macs": network.macs,
            "bytes": network.bytes,
            "latency_ms": 1e3 * single[name],
            "images_per_s": len(example) / batch[name],
            "difference": (outputs[name] - outputs["masked"]).abs().max().item(),
        }
        for name, network in networks.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    return Report(table, _explain(table, masks, shrunk, example))


def _networks(
    model: nn.Module, masks: Masks, shrunk: nn.Module, one: Tensor
) -> dict[str, _Network]:
    masked = copy.deepcopy(model).eval()
    apply_(masked, masks)
    macs, kept = count_macs(model, one), parameters(model, masks)
    smaller = parameters(shrunk), count_macs(shrunk, one)
    file = bytes_on_disk(lambda path: save_sparse(masked, masks, path))
    networks = {
        "dense": _Network(model, parameters(model), macs, _dense_bytes(model)),
        "masked": _Network(masked, kept, macs, file),
        "shrunk": _Network(shrunk, *smaller, _dense_bytes(shrunk)),
    }
    if _fits_onnxruntime(one):
        with TemporaryDirectory() as folder:
            path = Path(folder, "shrunk.onnx")
            to_onnx(shrunk, one, path)
            run, size = in_onnxruntime(path), path.stat().st_size
        networks["onnxruntime"] = _Network(run, *smaller, size)
    sparse = sparse_linears(model, masks)
    if sparse_layers(sparse):
        done = macs - macs_left_out(sparse, one)
        networks["sparse kernels"] = _Network(sparse, kept, done, file)
    return networks


def _dense_bytes(model: nn.Module) -> int:
    return bytes_on_disk(lambda path: save_sparse(model, {}, path))


def _fits_onnxruntime(example: Tensor) -> bool:
    on_cpu = example.device.type == "cpu" and example.dtype == torch.float32
    return on_cpu and not missing(*PACKAGES)


def _require_tensor(output: object) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return one tensor, not {type(output).__name__}")


def _explain(table: "pd.DataFrame", masks: Masks, shrunk: nn.Module, example: Tensor) -> str:
    """How it was measured, and what cannot be faster and why: a sentence a line."""
    device, threads = example.device.type, torch.get_num_threads()
    of_threads = f", {threads} thread{'s'[: threads > 1]}" if device == "cpu" else ""
    sentences = [
        f"Measured on {device}{of_threads}; throughput at batch size {len(example)}.",
        _about_shrinking(table),
        _about_zeros(shrunk),
        _about_sparse_kernels(table),
        _about_two_of_four(table, masks),
    ]
    if "onnxruntime" not in table.index:
        sentences.append(f"onnxruntime is left out: it takes float32 on a CPU, and {INSTALL}.")
    return "\n".join(filter(None, sentences))


def _about_shrinking(table: "pd.DataFrame") -> str:
    dense, shrunk = table.loc["dense"], table.loc["shrunk"]
    if shrunk["parameters"] == dense["parameters"]:
        return (
            "Nothing can be taken out: the masks empty no whole filter, channel or head, so that "
            "the shrunk network has the shapes, and the speed, of the dense one."
        )
    return (
        f"Shrinking leaves {shrunk['parameters'] / dense['parameters']:.1%} of the parameters and "
        f"{shrunk['macs'] / dense['macs']:.1%} of the multiply-accumulates, and gives "
        f"{shrunk['images_per_s'] / dense['images_per_s']:.2f} times the throughput of the dense "
        "network."
    )


def _about_zeros(shrunk: nn.Module) -> str:
    weights = [p for p in shrunk.parameters() if p.ndim > 1]
    zeros = sum(int((p == 0).sum()) for p in weights)
    if not zeros:
        return ""
    return (
        f"{zeros / sum(p.numel() for p in weights):.1%} of the weights in the shrunk network are "
        "zero and cannot make it faster: dense kernels multiply zeros like any other number. Only "
        "the sparse file is smaller for them."
    )


def _about_sparse_kernels(table: "pd.DataFrame") -> str:
    if "sparse kernels" not in table.index:
        return (
            "No layer can use torch's sparse kernels: they are for linear layers of which nearly "
            "all weights are removed, and there are none for convolutions."
        )
    sparse, masked = table.loc["sparse kernels"], table.loc["masked"]
    return (
        "torch's sparse kernels, in linear layers only, leave out "
        f"{1 - sparse['macs'] / masked['macs']:.1%} of the masked network's multiply-accumulates: "
        f"{sparse['latency_ms'] / masked['latency_ms']:.2f} times its latency, "
        f"{sparse['images_per_s'] / masked['images_per_s']:.2f} times its throughput. A weight "
        "whose position must be read costs far more than one in a dense row, so that they gain "
        "only where nearly all are removed, and less in large batches."
    )


def _about_two_of_four(table: "pd.DataFrame", masks: Masks) -> str:
    if "sparse kernels" in table.index or not any(map(is_two_of_four, masks.values())):
        return ""
    return (
        "2:4 sparsity is faster only in linear layers on a CUDA GPU of compute capability 8.0 or "
        "newer, in float16 or bfloat16."
    )


# sparse_kernels --------------------------------------------------------------------------------


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
