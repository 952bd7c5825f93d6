"""Devices: where a run happens, and in what arithmetic. accelerate knows the rest."""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]

# accelerate is imported in the functions, as it takes longer than all of the library.


def find_device(name: str = "auto") -> torch.device:
    """The device of this process: "auto" takes the best there is, else "cpu", "cuda" or "mps".

    ValueError if there is no such device here.
    """
    from accelerate.state import PartialState

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(name, True):
        raise ValueError(f"device {name!r} is not available here: use 'auto' or 'cpu'")
    if not torch.distributed.is_initialized():
        PartialState._reset_state()
    # Told of no CPU, accelerate takes several processes without a GPU for as many single ones.
    has_gpu = any(present.values()) or torch.xpu.is_available()
    device: torch.device = PartialState(cpu=name == "cpu" or not has_gpu).device
    return device


def is_main_process() -> bool:
    """Whether this is the one process of a run that writes files."""
    from accelerate.state import PartialState

    return bool(PartialState().is_main_process)


def main_process_first() -> AbstractContextManager[None]:
    """A context that the main process goes through before the others: it fills a cache for them."""
    from accelerate.state import PartialState

    context: AbstractContextManager[None] = PartialState().main_process_first()
    return context


def make_accelerator(device: torch.device, precision: Precision) -> Any:
    """An accelerate.Accelerator for `device`; fp16 needs a GPU, else ValueError."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision 'fp16' needs a GPU: use 'bf16' or 'fp32' on a CPU")
    # accelerate keeps one precision and device a process; a notebook may train with several.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    mixed = "no" if precision == "fp32" else precision
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")
