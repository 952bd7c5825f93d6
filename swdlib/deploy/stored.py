"""Sparse files: a pruned network on disk, in a size that follows the weights it keeps.

A file is safetensors; a key is a kind, a colon and a name of `state_dict()`:

    dense:NAME   a tensor that no mask covers, as it is
    full:NAME    a tensor whose mask removes nothing, as it is
    values:NAME  the weights that a mask keeps, in order

and where these lie, in the smaller of two codes:

    bits:NAME    a bit a weight, eight in a byte, the first the highest; or
    low:NAME     the low 16 bits of the position of each weight kept, and
    counts:NAME  how many are kept in each block of 65,536 positions

The metadata holds the format, its version and a digest of all that is stored.
"""

import hashlib
import importlib.util
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from swdlib.files import write_whole
from swdlib.masks import Masks, check_mask
from swdlib.metrics import in_eval

FORMAT = {"format": "swdlib.sparse", "version": "1"}
BLOCK = 1 << 16
CODES = ({"dense"}, {"full"}, {"values", "bits"}, {"values", "low", "counts"})


@torch.no_grad()
def save_sparse(model: nn.Module, masks: Masks, path: str | Path) -> None:
    """Write all of `model.state_dict()` to `path`, of masked parameters only what is kept.

    A kept weight costs its own size and two bytes, or its own size where a bit for each weight of
    its tensor is less. A tensor under several names is written once. The file is written whole or
    not at all. ValueError if a removed weight is not zero: it would be lost.
    """
    tensors = _tensors(model)
    parameters = _maskable(model, tensors)
    for name, mask in masks.items():
        check_mask(name, mask, parameters)
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # A copy, as safetensors refuses tensors that share memory.
        whole = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if name in masks:
            stored |= _encode(name, whole.flatten(), masks[name].cpu().flatten(), tensor.shape)
        else:
            stored[f"dense:{name}"] = whole
    metadata = FORMAT | {"sha256": _digest(stored)}
    write_whole(Path(path), lambda file: save_file(stored, file, metadata=metadata))


@torch.no_grad()
def load_sparse(model: nn.Module, path: str | Path) -> Masks:
    """Fill `model` from a file of `save_sparse`, bit for bit, and return the masks.

    The model must have the architecture of the one that was saved; it is filled whole or not at
    all. Nothing in the file can run code or make this take more memory than the model needs.
    ValueError, with the path and the reason, if the file is damaged or fits another model.
    """
    path = Path(path)
    tensors = _tensors(model)
    try:
        state, masks = _decode(_read(path, tensors), tensors, _maskable(model, tensors))
    except ValueError as error:
        kind = type(model).__name__
        raise ValueError(f"{path} is no sparse file of this {kind}: {error}") from error
    firsts = {id(tensor): name for name, tensor in tensors.items()}
    everything = model.state_dict(keep_vars=True)
    model.load_state_dict({name: state[firsts[id(t)]] for name, t in everything.items()})
    return masks


def is_stored(weights: Tensor) -> Tensor:
    """Where a weight is other than the zero without a sign, the only one that a mask may remove."""
    return (weights != 0) | weights.signbit()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `state_dict()`, each once, under its first name."""
    seen: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"only ordinary tensors can be stored, and {name!r} is none")
        seen.setdefault(id(tensor), name)
    return {name: tensors[name] for name in seen.values()}


def _maskable(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    # A module may give its state other names than its parameters have.
    return {name: p for name, p in model.named_parameters() if name in tensors}


def _encode(name: str, flat: Tensor, mask: Tensor, shape: torch.Size) -> dict[str, Tensor]:
    if mask.all():
        return {f"full:{name}": flat.reshape(shape)}
    # All bits, so that -0.0, which would come back as 0.0, counts as well.
    if _bytes(flat[~mask]).any():
        raise ValueError(
            f"{name} holds weights that its mask removes and that are not zero: "
            "call masks.apply_(model, masks) first"
        )
    code = {"values": flat[mask], **_encode_positions(mask.numpy())}
    return {f"{kind}:{name}": tensor for kind, tensor in code.items()}


def _encode_positions(mask: NDArray[np.bool_]) -> dict[str, Tensor]:
    positions = np.flatnonzero(mask)
    bits = np.packbits(mask)
    low = (positions % BLOCK).astype(np.uint16)
    counts = np.bincount(positions // BLOCK, minlength=_blocks(mask.size)).astype(np.uint32)
    if bits.nbytes <= low.nbytes + counts.nbytes:
        return {"bits": torch.from_numpy(bits)}
    return {"low": torch.from_numpy(low), "counts": torch.from_numpy(counts)}


def _blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _read(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that is stored in the file, if it is what was written."""
    _check_size(path, tensors)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"it cannot be read ({error})") from error
    found = {key: metadata.get(key) for key in FORMAT}
    if found != FORMAT:
        raise ValueError(f"its format is {found}, not {FORMAT}")
    if metadata.get("sha256") != _digest(stored):
        raise ValueError("its contents are not those that were written: it is damaged")
    return stored


def _check_size(path: Path, tensors: dict[str, Tensor]) -> None:
    """ValueError if the file or its header is larger than any for these tensors, before it is read.

    No tensor has more than three entries, whose codes take no more than a bit a weight.
    """
    header_limit = 1024 + sum(3 * (len(json.dumps(name)) + 256) for name in tensors)
    data_limit = sum(t.nbytes + -(-t.numel() // 8) for t in tensors.values())
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if header > header_limit or size > 8 + header_limit + data_limit:
        raise ValueError(
            f"it has {size:,} bytes and says {header:,} are its header; "
            f"more than {8 + header_limit + data_limit:,} and {header_limit:,} are never needed"
        )


def _digest(stored: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(stored):
        tensor = stored[key]
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    # A tensor without elements may have a stride that view() refuses.
    flat = tensor.reshape(-1) if tensor.numel() else torch.empty(0, dtype=tensor.dtype)
    return flat.view(torch.uint8)


def _decode(
    stored: dict[str, Tensor], tensors: dict[str, Tensor], maskable: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], Masks]:
    """The whole tensors, on the CPU, and the masks; ValueError unless they fit `tensors`."""
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in stored.items():
        kind, _, name = key.partition(":")
        entries[name][kind] = tensor
    if entries.keys() != tensors.keys():
        missing, extra = tensors.keys() - entries.keys(), entries.keys() - tensors.keys()
        raise ValueError(f"it lacks {sorted(missing)} and holds {sorted(extra)} besides")
    state, masks = {}, {}
    for name, entry in entries.items():
        if set(entry) not in CODES or ("dense" not in entry and name not in maskable):
            raise ValueError(f"it holds {name!r} as {sorted(entry)}")
        like = tensors[name]
        state[name], mask = _decode_tensor(name, entry, like)
        if mask is not None:
            masks[name] = mask.to(like.device)
    return state, masks


def _decode_tensor(
    name: str, entry: dict[str, Tensor], like: Tensor
) -> tuple[Tensor, Tensor | None]:
    for kind in ("dense", "full"):
        if kind in entry:
            whole = _checked(f"{kind}:{name}", entry[kind], tuple(like.shape), like.dtype)
            return whole, torch.ones(like.shape, dtype=torch.bool) if kind == "full" else None
    mask = torch.from_numpy(_decode_positions(name, entry, like.numel()))
    values = _checked(f"values:{name}", entry["values"], (int(mask.sum()),), like.dtype)
    whole = torch.zeros(like.numel(), dtype=like.dtype)
    # As bytes: torch puts a single value by way of a number, which changes the bits of a NaN.
    whole.view(torch.uint8).view(-1, like.itemsize)[mask] = _bytes(values).view(-1, like.itemsize)
    return whole.reshape(like.shape), mask.reshape(like.shape)


def _decode_positions(name: str, entry: dict[str, Tensor], numel: int) -> NDArray[np.bool_]:
    """A flat mask; ValueError unless the positions are in order, in range and as many as said."""
    if "bits" in entry:
        bits = _checked(f"bits:{name}", entry["bits"], (-(-numel // 8),), torch.uint8).numpy()
        mask = np.unpackbits(bits).astype(bool)
        if mask[numel:].any():
            raise ValueError(f"bits:{name} keeps weights beyond the last, which is {numel}")
        return mask[:numel]
    counts = _checked(f"counts:{name}", entry["counts"], (_blocks(numel),), torch.uint32).numpy()
    # Before anything as long as the sum is made.
    kept = int(counts.sum(dtype=np.int64))
    low = _checked(f"low:{name}", entry["low"], (kept,), torch.uint16).numpy()
    positions = np.repeat(np.arange(len(counts)) * BLOCK, counts) + low
    if (np.diff(positions) <= 0).any() or (positions >= numel).any():
        raise ValueError(f"low:{name} is out of order or beyond the last weight, {numel}")
    mask = np.zeros(numel, dtype=bool)
    mask[positions] = True
    return mask


def _checked(key: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{key} must be {dtype} of shape {shape}, not {tensor.dtype} of {tuple(tensor.shape)}"
        )
    return tensor


# onnx_files --------------------------------------------------------------------------------

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INSTALL = f"pip install {' '.join(PACKAGES)}"


@torch.no_grad()
def to_onnx(model: nn.Module, example: Tensor, path: str | Path) -> None:
    """Write `model`, in evaluation mode, as an ONNX file that takes batches of any size.

    `example` is a batch, shape (N, ...). The file's input is called "input", its output "output".
    It is written whole or not at all, and the model keeps its mode. ValueError if torch's exporter
    cannot follow the model; ImportError, with the line that installs them, if packages are missing.
    """
    _require("onnx", "onnxscript")
    check_example(example)
    program = _export(model, example)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's notes: source code and paths of this machine
    write_whole(Path(path), lambda file: program.save(file, external_data=False))


def _export(model: nn.Module, example: Tensor) -> torch.onnx.ONNXProgram:
    # Of a single image, the exporter would take the size of the batch for a constant.
    pair = torch.cat([example[:1], example[:1]])
    with in_eval(model), _errors_only("onnxscript.optimizer"):
        try:
            program = torch.onnx.export(
                model,
                (pair,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["input"],
                output_names=["output"],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(
                f"{type(model).__name__} cannot be written as ONNX: {error.__cause__ or error}"
            ) from error
    assert program is not None
    return program


@contextmanager
def _errors_only(logger: str) -> Iterator[None]:
    """A context in which a logger is silent about what is no error."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


def in_onnxruntime(path: str | Path) -> Callable[[Tensor], Tensor]:
    """A file of `to_onnx` as a function of a batch on the CPU, on as many threads as torch uses.

    ImportError, with the line that installs it, if onnxruntime is missing.
    """
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait in a loop would take the time of whatever runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        [output] = session.run(["output"], {"input": batch.numpy()})
        return torch.from_numpy(output)

    return run


def missing(*packages: str) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _require(*packages: str) -> None:
    if absent := missing(*packages):
        raise ImportError(f"ONNX needs {' and '.join(absent)}: {INSTALL}")


def check_example(example: Tensor) -> None:
    """TypeError or ValueError unless `example` is a batch of at least one image."""
    if not isinstance(example, Tensor):
        raise TypeError(f"example must be a tensor, a batch of images, not {example!r}")
    if not example.ndim or not len(example):
        raise ValueError(
            "example must be a batch of at least one image, shape (N, ...), not of shape "
            f"{tuple(example.shape)}"
        )
