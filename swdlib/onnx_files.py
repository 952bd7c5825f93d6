"""ONNX files: a network for runtimes other than torch."""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from swdlib.files import write_whole
from swdlib.metrics import in_eval

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
