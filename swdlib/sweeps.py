"""Sweeps: many runs, one after the other; what is on record already is not run again."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swdlib.config import Config
from swdlib.experiments import run
from swdlib.records import Record, address


def grid(settings: Mapping[str, Sequence[Any]]) -> list[Config]:
    """Every combination of the settings' values, without those that come to the same run.

    >>> [c.recipe for c in grid({"recipe": ["dense", "swd"], "sparsity": [0.9, 0.95]})]
    ['dense', 'swd', 'swd']
    """
    combinations = itertools.product(*settings.values())
    configs = [Config(**dict(zip(settings, values, strict=True))) for values in combinations]
    return list({address(config.settings()): config for config in configs}.values())


def sweep(
    configs: Sequence[Config], folder: str | Path | None = None, *, progress: bool = True
) -> Iterator[Record]:
    """Run the configurations in order and yield each record when it is there."""
    for number, config in enumerate(configs, start=1):
        if progress:
            print(f"[{number}/{len(configs)}] {config.title()}", flush=True)
        yield run(config, folder, progress=progress)
