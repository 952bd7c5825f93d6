"""Networks on disk: compressed files of pruned networks, and ONNX for other programs.

A file of `save_sparse` is 16 bytes that name its format, the inflated size (8 bytes, little-endian)
and a zlib stream of safetensors, which has every tensor under its name in `state_dict()`:

    safetensors.torch.load(zlib.decompress(path.read_bytes()[24:]))

Zeros compress to almost nothing, and most masks follow from them: the metadata's "masks" lists, as
JSON, the parameters whose mask removes each +0.0 and nothing else. Any other mask is a bool tensor
called ".mask." and the parameter's name.
"""

import json
import logging
import zlib
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from swdlib import require_extra
from swdlib.comparing import in_eval
from swdlib.files import write_whole
from swdlib.masks import Masks, check_mask

MAGIC = b"swdlib.sparse 2\n"
MASK = ".mask."  # no module has an empty name, so that no name of a state_dict starts with a dot


@torch.no_grad()
def save_sparse(model: nn.Module, masks: Masks, path: str | Path) -> None:
    """Write all of `model.state_dict()` to `path`, compressed: removed weights cost little.

    A tensor under several names is written once. The file is written whole or not at all.
    ValueError if a removed weight is not +0.0: it would be lost.
    """
    stored = tensors_of_state(model)
    parameters = _parameters(model, stored)
    implied = []
    for name, mask in masks.items():
        check_mask(name, mask, parameters)
        mask, nonzero = mask.cpu(), is_stored(stored[name])
        if (nonzero & ~mask).any():
            raise ValueError(
                f"{name} holds weights that its mask removes and that are not +0.0: "
                "call masks.apply_(model, masks) first"
            )
        if torch.equal(mask, nonzero):
            implied.append(name)
        else:
            stored[MASK + name] = mask.contiguous()
    content = safetensors.torch.save(stored, {"masks": json.dumps(sorted(implied))})
    data = MAGIC + len(content).to_bytes(8, "little") + zlib.compress(content, 6)
    write_whole(Path(path), lambda file: file.write_bytes(data))


@torch.no_grad()
def load_sparse(model: nn.Module, path: str | Path) -> Masks:
    """Fill `model` from a file of `save_sparse`, bit for bit, and return the masks.

    The model must have the architecture of the one that was saved; it is filled whole or not at
    all. Nothing in the file can run code or take more memory than the model can need. ValueError,
    with the path and the reason, if the file is damaged or fits another model.
    """
    path = Path(path)
    tensors = _tensors(model)
    try:
        state, masks = _parse(_inflate(path, tensors), tensors, _parameters(model, tensors))
    except OSError:
        raise
    except Exception as error:  # zlib, safetensors and json each have errors of their own
        kind, reason = type(model).__name__, error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is no sparse file of this {kind}: {reason}") from error
    names = {id(tensor): name for name, tensor in tensors.items()}
    everything = model.state_dict(keep_vars=True)
    model.load_state_dict({name: state[names[id(t)]] for name, t in everything.items()})
    return {name: mask.to(tensors[name].device) for name, mask in masks.items()}


def is_stored(weights: Tensor) -> Tensor:
    """Where a weight is anything but +0.0, the only value that a mask may remove."""
    # By its bits: in a comparison, -0.0 equals +0.0, and so may a denormal.
    return (weights.contiguous().unsqueeze(-1).view(torch.uint8) != 0).any(-1)


def tensors_of_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of the tensors of `state_dict()`, each once, as safetensors takes them."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in _tensors(model).items()
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `state_dict()`, each once, under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        ordinary = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not ordinary or name.startswith((MASK, "__metadata__")):
            raise ValueError(f"only ordinary tensors can be stored, and {name!r} is none")
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _parameters(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    # A module may give its state other names than its parameters have.
    return {name: p for name, p in model.named_parameters() if name in tensors}


def _inflate(path: Path, tensors: dict[str, Tensor]) -> bytes:
    """The safetensors in the file; no more is read and inflated than `tensors` can need."""
    # A header entry is a name, a dtype, a shape and two offsets. There may be one for the tensor
    # and one for its mask; a name in the list of masks is escaped twice.
    header_limit = 256 + sum(
        3 * len(json.dumps(name)) + 2 * (128 + 21 * t.ndim) for name, t in tensors.items()
    )
    limit = 8 + header_limit + sum(t.nbytes + t.numel() for t in tensors.values())
    with path.open("rb") as file:
        magic, size = file.read(len(MAGIC)), int.from_bytes(file.read(8), "little")
        data = file.read(limit + limit // 100 + 1024)  # what cannot be compressed grows by less
    if magic != MAGIC:
        if b'"swdlib.sparse"' in data[:1024]:
            raise ValueError("an older version of swdlib wrote it: load and save it with that one")
        raise ValueError(f"it starts with {magic!r}, not with {MAGIC!r}")
    if size > limit:
        raise ValueError(f"it says that it holds {size:,} bytes; the model needs {limit:,} at most")
    stream = zlib.decompressobj()
    content = stream.decompress(data, size + 1)
    if len(content) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"it is damaged: it does not end after the {size:,} bytes that it says")
    if (header := int.from_bytes(content[:8], "little")) > header_limit:
        raise ValueError(f"its header has {header:,} bytes; the model needs {header_limit:,}")
    return content


def _parse(
    content: bytes, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], Masks]:
    """The tensors and the masks, on the CPU; ValueError unless all of them fit the model."""
    stored = safetensors.torch.load(content)
    masks = {n.removeprefix(MASK): stored.pop(n) for n in [*stored] if n.startswith(MASK)}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    implied = set(json.loads(header["__metadata__"]["masks"]))
    lacks, extra = tensors.keys() - stored.keys(), (stored.keys() | implied) - tensors.keys()
    if lacks or extra:
        raise ValueError(f"it lacks {sorted(lacks)} and holds {sorted(extra)} besides")
    for name, like in tensors.items():
        found = stored[name]
        if found.shape != like.shape or found.dtype != like.dtype:
            raise ValueError(
                f"{name} must be {like.dtype} of shape {tuple(like.shape)}, "
                f"not {found.dtype} of {tuple(found.shape)}; load a shrunk network into one that "
                "deploy.shrink made with the same masks"
            )
    masks |= {name: is_stored(stored[name]) for name in sorted(implied)}
    for name, mask in masks.items():
        check_mask(name, mask, parameters)
        if (is_stored(stored[name]) & ~mask).any():
            raise ValueError(f"{name} holds weights that its mask removes")
    return stored, masks


@torch.no_grad()
def to_onnx(model: nn.Module, example: Tensor, path: str | Path) -> None:
    """Write `model`, in evaluation mode, as an ONNX file that takes batches of any size.

    `example` is a batch, shape (N, ...). The file's input is called "input", its output "output".
    It is written whole or not at all, and the model keeps its mode. ValueError if torch's exporter
    cannot follow the model, or takes its batch size as fixed; ImportError, with the line that
    installs them, if packages are missing.
    """
    require_extra("deploy.to_onnx", "onnx")
    check_example(example)
    pair = torch.cat([example[:1], example[:1]])  # the exporter takes a batch size of 1 as fixed
    logger = logging.getLogger("onnxscript.optimizer")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it warns about nodes that it made itself
        with in_eval(model):
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
    finally:
        logger.setLevel(level)
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    if shape is not None and isinstance(shape[0], int):
        raise ValueError(
            f"{type(model).__name__} cannot be written as ONNX for batches of any size: its code "
            "fixes the batch size, as len(x) does; use x.shape[0] or x.flatten(1) there"
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's notes: source code and paths of this machine
    write_whole(Path(path), lambda file: program.save(file, external_data=False))


def in_onnxruntime(path: str | Path) -> Callable[[Tensor], Tensor]:
    """A file of `to_onnx` as a function of a batch on the CPU, on as many threads as torch uses.

    ImportError, with the line that installs it, if onnxruntime is missing.
    """
    require_extra("deploy.in_onnxruntime", "onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin while they wait would slow down whatever runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        [output] = session.run(["output"], {"input": batch.numpy()})
        return torch.from_numpy(output)

    return run


def check_example(example: Tensor) -> None:
    """TypeError or ValueError unless `example` is a batch of at least one image."""
    if not isinstance(example, Tensor):
        raise TypeError(f"example must be a tensor, a batch of images, not {example!r}")
    if not example.ndim or not len(example):
        raise ValueError(
            "example must be a batch of at least one image, shape (N, ...), not of shape "
            f"{tuple(example.shape)}"
        )
