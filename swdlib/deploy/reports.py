"""Reports: what pruning gains once training is over, measured side by side; sparse kernels."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from swdlib import missing, require_extra
from swdlib.comparing import in_eval
from swdlib.deploy import stored
from swdlib.deploy.shrinking import shrink
from swdlib.masks import Masks, apply_, kept
from swdlib.metrics import bytes_on_disk, count_macs, latencies, parameters

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Report:
    """What pruning gains, and in `text` what it cannot gain and why; `print` shows both.

    `table` has a row for each network and the columns `parameters`; `kept_weights` and
    `kept_parameters`, those that are not zero (see `masks.kept`); `macs`, multiply-accumulates for
    one image; `bytes` on disk; `latency_ms`, milliseconds for one image; `images_per_s`, the
    throughput at the example's batch size; `difference`, the largest difference between its outputs
    and those of the masked network.
    """

    table: "pd.DataFrame"
    text: str

    def __str__(self) -> str:
        whole, few = "{:,.0f}".format, "{:,.4g}".format
        counts = ("parameters", "kept_weights", "kept_parameters", "macs", "bytes")
        formats = dict.fromkeys(counts, whole)
        formats |= {"latency_ms": few, "images_per_s": few, "difference": "{:.1e}".format}
        return f"{self.table.to_string(formatters=formats)}\n\n{self.text}"


# What runs a network, and what of it needs no clock.
Network = tuple[Callable[[Tensor], Tensor], dict[str, int]]


@torch.no_grad()
def report(model: nn.Module, masks: Masks, example: Tensor, *, rounds: int = 5) -> Report:
    """Measure a network dense, masked, shrunk, shrunk in onnxruntime, and with sparse kernels.

    `example` is a batch, shape (N, ...), on the model's device. The networks are timed in turn in
    the same rounds, on as many threads as torch uses; the median counts. onnxruntime is left out
    where it is missing, `to_onnx` refuses or the example is not float32 on the CPU, sparse kernels
    where no layer can use them (see `sparse_linears`). The model is not changed. ImportError if
    pandas is missing.
    """
    require_extra("deploy.report", "deploy")
    import pandas as pd  # here, as it takes long to import

    stored.check_example(example)
    one = example[:1]
    with in_eval(model):
        if not isinstance(output := model(one), Tensor):
            raise TypeError(f"the model must return one tensor, not {type(output).__name__}")
        shrunk = shrink(model, masks, example).eval()
        networks = _networks(model, masks, shrunk, one)
        outputs = {name: run(example).float() for name, (run, _) in networks.items()}
        single, batch = (
            latencies({name: partial(run, x) for name, (run, _) in networks.items()}, rounds=rounds)
            for x in (one, example)
        )
    rows = {
        name: {
            **counted,
            "latency_ms": 1e3 * single[name],
            "images_per_s": len(example) / batch[name],
            "difference": (outputs[name] - outputs["masked"]).abs().max().item(),
        }
        for name, (_, counted) in networks.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    threads, device = torch.get_num_threads(), example.device.type
    of_threads = f", {threads} thread{'s'[: threads > 1]}" if device == "cpu" else ""
    how = f"Measured on {device}{of_threads}; throughput at batch size {len(example)}."
    sentences = [how, *_about_shrinking(table, shrunk), *_about_sparse_kernels(table, masks)]
    if "onnxruntime" not in table.index:
        needs = (
            "it takes float32 on a CPU, a network that deploy.to_onnx can write, "
            "and pip install 'swdlib[onnx]'"
        )
        sentences.append(f"onnxruntime is left out: {needs}.")
    return Report(table, "\n".join(sentences))


def _networks(model: nn.Module, masks: Masks, shrunk: nn.Module, one: Tensor) -> dict[str, Network]:
    def counts(network: nn.Module) -> dict[str, int]:
        size = len(safetensors.torch.save(stored.tensors_of_state(network)))
        here = {"macs": count_macs(network, one), "bytes": size}
        return {"parameters": parameters(network), **kept(network), **here}

    masked = copy.deepcopy(model).eval()
    apply_(masked, masks)
    file = bytes_on_disk(lambda path: stored.save_sparse(masked, masks, path))
    dense, smaller = counts(model), counts(shrunk)
    left = dense | {"parameters": parameters(model, masks), **kept(model, masks), "bytes": file}
    networks: dict[str, Network] = {
        "dense": (model, dense),
        "masked": (masked, left),
        "shrunk": (shrunk, smaller),
    }
    fits_onnxruntime = one.device.type == "cpu" and one.dtype == torch.float32
    if fits_onnxruntime and not missing("onnx"):
        with TemporaryDirectory() as folder, suppress(ValueError):  # not every network has a file
            path = Path(folder, "shrunk.onnx")
            stored.to_onnx(shrunk, one, path)
            run, size = stored.in_onnxruntime(path), path.stat().st_size
            networks["onnxruntime"] = run, smaller | {"bytes": size}
    sparse = sparse_linears(model, masks)
    if skipped := macs_skipped(sparse, one):
        networks["sparse kernels"] = sparse, left | {"macs": left["macs"] - skipped}
    return networks


def _about_shrinking(table: "pd.DataFrame", network: nn.Module) -> Iterator[str]:
    dense, shrunk = table.loc["dense"], table.loc["shrunk"]
    if shrunk["parameters"] == dense["parameters"]:
        yield (
            "Nothing can be taken out: the masks empty no whole filter, channel or head, so that "
            "the shrunk network has the shapes, and the speed, of the dense one."
        )
    else:
        yield (
            f"Shrinking leaves {shrunk['parameters'] / dense['parameters']:.1%} of the parameters "
            f"and {shrunk['macs'] / dense['macs']:.1%} of the multiply-accumulates, and gives "
            f"{shrunk['images_per_s'] / dense['images_per_s']:.2f} times the throughput of the "
            "dense network."
        )
    weights = [p for p in network.parameters() if p.ndim > 1]
    if zeros := sum(int((p == 0).sum()) for p in weights):
        yield (
            f"{zeros / sum(p.numel() for p in weights):.1%} of the weights in the shrunk network "
            "are zero and cannot make it faster: dense kernels multiply zeros like any other "
            "number. Only the sparse file is smaller for them."
        )


def _about_sparse_kernels(table: "pd.DataFrame", masks: Masks) -> Iterator[str]:
    if "sparse kernels" in table.index:
        sparse, masked = table.loc["sparse kernels"], table.loc["masked"]
        yield (
            "torch's sparse kernels, in linear layers only, leave out "
            f"{1 - sparse['macs'] / masked['macs']:.1%} of the masked network's "
            f"multiply-accumulates: {sparse['latency_ms'] / masked['latency_ms']:.2f} times its "
            f"latency, {sparse['images_per_s'] / masked['images_per_s']:.2f} times its "
            "throughput. A weight whose position must be read costs far more than one in a dense "
            "row, so they gain only where nearly all weights are removed, and less in large "
            "batches."
        )
        return
    yield (
        "No layer can use torch's sparse kernels: they are for linear layers of which nearly all "
        "weights are removed, and there are none for convolutions."
    )
    if any(map(is_two_of_four, masks.values())):
        yield (
            "2:4 sparsity is faster only in linear layers on a CUDA GPU of compute capability 8.0 "
            "or newer, in float16 or bfloat16."
        )


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
    fits_two_of_four = (
        weight.is_cuda
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and weight.dtype in (torch.float16, torch.bfloat16)
        and not (weight.shape[0] % 32 or weight.shape[1] % 64)
    )
    has_csr = weight.is_cuda or (weight.device.type == "cpu" and torch.backends.mkl.is_available())
    fits_csr = has_csr and weight.dtype in (torch.float32, torch.float64)
    with warnings.catch_warnings():
        # torch says, once in a process, that its sparse tensors may still change.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemi", UserWarning)
        if fits_two_of_four and is_two_of_four(mask):
            return to_sparse_semi_structured(weight)
        if fits_csr and int((~mask).sum()) >= sparsity * mask.numel():
            return weight.to_sparse_csr()
    return weight


def is_two_of_four(mask: Tensor) -> bool:
    """Whether `mask` (outputs, inputs, ...) keeps at most two of each four inputs in a row."""
    if mask.ndim < 2 or mask.shape[1] % 4:
        return False
    return bool((mask.movedim(1, -1).reshape(-1, 4).sum(1) <= 2).all())


@torch.no_grad()
def macs_skipped(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates that sparse kernels skip in one pass of `example`."""
    skipped = 0

    def add(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal skipped
        assert isinstance(layer, nn.Linear)
        unread, weight = 0, layer.weight
        if isinstance(weight, SparseSemiStructuredTensor):
            unread = weight.numel() // 2
        elif weight.layout == torch.sparse_csr:
            unread = weight.numel() - weight._nnz()
        skipped += unread * (output.numel() // layer.out_features)

    hooks = [m.register_forward_hook(add) for m in model.modules() if type(m) is nn.Linear]
    model(example)
    for hook in hooks:
        hook.remove()
    return skipped
