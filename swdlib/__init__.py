"""Selective weight decay and neural-network pruning: a small library beside a book."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from swdlib import criteria, deploy, masks, plots, recipes, schedules, structures
    from swdlib.config import Config
    from swdlib.data import load_data
    from swdlib.evaluation import evaluate
    from swdlib.experiments import run
    from swdlib.models import build_model
    from swdlib.penalties import SelectiveWeightDecay
    from swdlib.records import load_records
    from swdlib.training import train

# Public name -> module that holds it, imported when it is first used: an engineer who needs the
# penalty alone does not wait for plotting and data libraries.
_HOMES = {
    "Config": "config",
    "SelectiveWeightDecay": "penalties",
    "build_model": "models",
    "evaluate": "evaluation",
    "load_data": "data",
    "load_records": "records",
    "run": "experiments",
    "train": "training",
}
_MODULES = ("criteria", "deploy", "masks", "plots", "recipes", "schedules", "structures")

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


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"swdlib.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"swdlib.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'swdlib' has no attribute {name!r}")
