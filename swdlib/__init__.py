"""Selective weight decay and neural-network pruning: a small library beside a book."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from swdlib import criteria, deploy, masks, recipes, schedules, structures
    from swdlib.data.load import load_data
    from swdlib.lab import plots
    from swdlib.metrics import evaluate
    from swdlib.models import build_model
    from swdlib.runs.config import Config
    from swdlib.runs.records import load_records
    from swdlib.runs.run import run
    from swdlib.runs.training import train
    from swdlib.swd import SelectiveWeightDecay

# Public name -> module that holds it, imported when it is first used: an engineer who needs the
# penalty alone does not wait for plotting and data libraries.
_HOMES = {
    "Config": "runs.config",
    "SelectiveWeightDecay": "swd",
    "build_model": "models",
    "evaluate": "metrics",
    "load_data": "data.load",
    "load_records": "runs.records",
    "run": "runs.run",
    "train": "runs.training",
}
_MODULES = {
    **{name: name for name in ("criteria", "deploy", "masks", "recipes", "schedules")},
    **{"structures": "structures", "plots": "lab.plots"},
}

__all__ = [
    "Config",
    "SelectiveWeightDecay",
    "build_model",
    "criteria",
    "deploy",
    "evaluate",
    "load_data",
    "load_records",
    "masks",
    "plots",
    "recipes",
    "run",
    "schedules",
    "structures",
    "train",
]


# What pip installs with swdlib[extra] -> the packages that the part needs; see pyproject.toml.
_EXTRAS = {
    "deploy": ("pandas",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "data": ("PIL", "sklearn", "torchvision", "tqdm"),
    "runs": ("accelerate", "filelock", "pandas", "PIL", "sklearn", "torchvision", "tqdm"),
    "lab": ("matplotlib", "pandas", "seaborn"),
}


def missing(extra: str) -> list[str]:
    """The packages of swdlib[extra] that are not installed."""
    return [name for name in _EXTRAS[extra] if importlib.util.find_spec(name) is None]


def require_extra(user: str, extra: str) -> None:
    """ImportError, with the line that installs them, if packages that `user` needs are missing."""
    if absent := missing(extra):
        raise ImportError(f"{user} needs {', '.join(absent)}: pip install 'swdlib[{extra}]'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"swdlib.{_MODULES[name]}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"swdlib.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'swdlib' has no attribute {name!r}")
