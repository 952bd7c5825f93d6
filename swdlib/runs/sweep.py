"""Sweeps: many runs; one on record is not done again, one done elsewhere is waited for."""

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from swdlib.runs import records
from swdlib.runs.config import Config
from swdlib.runs.records import Record, address, duration
from swdlib.runs.run import Busy, is_locked, lock_of
from swdlib.runs.workers import Workers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

POLL = 2.0  # seconds between looks at runs that other processes do


def grid(settings: Mapping[str, Sequence[Any]]) -> list[Config]:
    """Every combination of the settings' values; those that make the same run count once.

    >>> [c.recipe for c in grid({"recipe": ["dense", "swd"], "sparsity": [0.9, 0.95]})]
    ['dense', 'swd', 'swd']
    """
    combinations = itertools.product(*settings.values())
    return _once(Config(**dict(zip(settings, values, strict=True))) for values in combinations)


def _once(configs: Iterator[Config]) -> list[Config]:
    return list({address(config.settings()): config for config in configs}.values())


def read_grid(path: str | Path, given: Mapping[str, Sequence[Any]] | None = None) -> list[Config]:
    """The runs of a grid file, in its order, each once; `given` overrides its settings.

    The file is TOML: settings, each a value or a list of values, and any number of blocks
    `[[grid]]` of further settings. A block gives every combination of its values and those above
    the blocks. A mistake raises ValueError with the file and the setting.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        blocks = content.pop("grid", [{}])
        if not (isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks)):
            raise ValueError("grid must be blocks that begin with [[grid]]")
        settings = [{**_lists({**content, **block}), **(given or {})} for block in blocks]
        return _once(config for block in settings for config in grid(block))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _lists(block: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = [setting.name for setting in fields(Config)]
    if unknown := [name for name in block if name not in names]:
        raise ValueError(f"{unknown[0]} is no setting; there are {', '.join(names)}")
    lists = {name: v if isinstance(v, list) else [v] for name, v in block.items()}
    for name, values in lists.items():
        if not values or not all(isinstance(v, str | int | float) for v in values):
            raise ValueError(f"{name} must be a text, number or truth value, or a list of them")
    return lists


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended: its record, or, if it failed, the error."""

    config: Config
    record: Record | None = None
    error: str = ""


def sweep(
    configs: Sequence[Config],
    folder: Path,
    workers: Workers,
    *,
    retries: int = 2,
    tell: Callable[[str], None] = print,
) -> Iterator[Outcome]:
    """Let `workers` do the runs, in order, and yield how each ended as soon as it has.

    A run on record is not done again; one that another process is doing is waited for. A run that
    fails is restarted from its checkpoint up to `retries` times; then the others go on without it.
    `tell` is called with lines on the progress of the sweep and the time left.
    """
    if retries < 0:
        raise ValueError(f"retries must be 0 or more, not {retries}")
    waiting, running, failures = list(configs), dict[Future[Any], Config](), Counter[Config]()
    progress = _Progress(len(waiting), folder, tell)
    while waiting or running:
        for config in list(waiting):
            path = records.path_of(config.settings(), folder)
            if path.exists():
                waiting.remove(config)
                yield progress.end(config)
            elif len(running) < workers.slots and not is_locked(lock_of(path)):
                waiting.remove(config)
                tell(f"next: {config.title()}")
                running[workers.start(config)] = config
        if waiting and not running:
            time.sleep(POLL)
        for future in wait(running, timeout=POLL, return_when=FIRST_COMPLETED).done:
            config, error = running.pop(future), future.exception()
            if error is None:
                progress.done_here += 1
                yield progress.end(config)
            elif isinstance(error, Busy):  # another process was faster
                waiting.append(config)
            else:
                reason = (str(error).strip() or repr(error)).splitlines()[-1]
                failures[config] += 1
                if failures[config] > retries:
                    yield progress.end(config, reason)
                else:
                    tell(f"restarted, since it failed ({reason}): {config.title()}")
                    waiting.insert(0, config)


class _Progress:
    """How many runs of a sweep have ended, and when the others will have."""

    def __init__(self, total: int, folder: Path, tell: Callable[[str], None]):
        self.total, self.folder, self.tell = total, folder, tell
        self.ended = self.done_here = 0
        self.began = time.monotonic()

    def end(self, config: Config, error: str = "") -> Outcome:
        """Tell how a run ended, and estimate the time left as if the others took as long."""
        path, record = records.path_of(config.settings(), self.folder), None
        try:
            record = None if error else records.load(path)
        except FileNotFoundError:
            error = f"no record came to {path}: do all machines share that folder?"
        except ValueError as damaged:
            error = str(damaged)
        self.ended += 1
        result = record.summary() if record else f"failed: {error}"
        line = f"[{self.ended}/{self.total}] {config.title()}: {result}"
        left = self.total - self.ended
        if left and self.done_here:
            seconds = (time.monotonic() - self.began) / self.done_here * left
            line += f"; about {duration(seconds)} left"
        self.tell(line)
        return Outcome(config, record, error)
