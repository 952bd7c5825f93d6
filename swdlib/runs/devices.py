"""Devices: where a run happens, and in what arithmetic. accelerate knows the rest."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16", "fp16"]

# accelerate is imported in the functions: its import takes longer than that of all of swdlib.


def find_device(name: str = "auto") -> torch.device:
    """The device of this process: "auto" takes the best there is, else "cpu", "cuda" or "mps".

    ValueError if there is no such device here.
    """
    from accelerate.state import PartialState

    present = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available()}
    present["mps"] = torch.backends.mps.is_available()
    if not present.get(name):
        raise ValueError(f"device {name!r} is not available here: use 'auto' or 'cpu'")
    if not torch.distributed.is_initialized():
        PartialState._reset_state()
    return torch.device(_processes(cpu=name == "cpu").device)


def is_main_process() -> bool:
    """Whether this is the one process of a run that writes files."""
    return bool(_processes().is_main_process)


def main_process_first() -> AbstractContextManager[None]:
    """A context that the main process goes through before the others: it fills a cache for them."""
    context: AbstractContextManager[None] = _processes().main_process_first()
    return context


def _processes(cpu: bool = False) -> Any:
    """accelerate's state of this process and the others of the run."""
    from accelerate.state import PartialState

    # Without a GPU, accelerate groups several processes only if cpu=True is passed.
    gpus = (torch.cuda, torch.backends.mps, torch.xpu)
    return PartialState(cpu=cpu or not any(gpu.is_available() for gpu in gpus))


def can_be_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether the gradients of `model` come out right where images lie channels last.

    On processors with AVX2 alone, oneDNN writes past its memory in the backward pass of a strided
    1x1 convolution of fewer than 8 maps (oneDNN issue 6035): wrong gradients, or a crash.
    """
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return True
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    strided = [conv for conv in convs if max(conv.stride) > 1 and max(conv.kernel_size) == 1]
    return all(conv.in_channels // conv.groups >= 8 for conv in strided)


@dataclass(frozen=True)
class Tracker:
    """Where the figures of a run are sent while it lasts.

    `name` is a tracker that accelerate knows; those that write files do so in `folder`. `run` names
    the run and `settings` are its configuration. Raises ValueError if there is no such tracker.
    """

    name: str
    folder: Path = Path("trackers")
    run: str = "run"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_tracker(self.name)


def check_tracker(name: str) -> None:
    """ValueError if accelerate knows no tracker `name`, or its package is not installed."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(kind) for kind in LoggerType.list() if kind != "all"]
    if name not in known:
        raise ValueError(f"tracker must be one of {', '.join(known)}, not {name!r}")
    if name not in map(str, get_available_trackers()):
        raise ValueError(f"tracker {name!r} is not installed: pip install {name}")


def make_accelerator(
    device: torch.device, precision: Precision, tracker: Tracker | None = None
) -> Any:
    """An accelerate.Accelerator, its tracker started; ValueError for fp16 without a GPU."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision 'fp16' needs a GPU: use 'bf16' or 'fp32' on a CPU")
    # accelerate keeps one precision and device a process; a notebook may train with several.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    mixed = "no" if precision == "fp32" else precision
    options = {"mixed_precision": mixed, "cpu": device.type == "cpu"}
    if tracker is None:
        return Accelerator(**options)
    folder = tracker.folder / tracker.run
    accelerator = Accelerator(**options, log_with=tracker.name, project_dir=folder)
    settings = {name: value for name, value in tracker.settings.items() if value is not None}
    # The other trackers have no name for a run, or give it one of their own.
    named = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}
    names = {kind: {argument: tracker.run} for kind, argument in named.items()}
    accelerator.init_trackers("swdlib", settings, names)
    return accelerator
