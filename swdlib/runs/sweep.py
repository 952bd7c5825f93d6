"""Sweeps: many runs; what is on record already, or being done elsewhere, is not done again."""

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
from swdlib.runs.run import Busy, claim_of, is_claimed
from swdlib.runs.workers import Place

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

POLL = 2.0  # seconds from one look to the next at runs that are done elsewhere


def grid(settings: Mapping[str, Sequence[Any]]) -> list[Config]:
    """Every combination of the settings' values, without those that come to the same run.

    >>> [c.recipe for c in grid({"recipe": ["dense", "swd"], "sparsity": [0.9, 0.95]})]
    ['dense', 'swd', 'swd']
    """
    combinations = itertools.product(*settings.values())
    return _once(Config(**dict(zip(settings, values, strict=True))) for values in combinations)


def _once(configs: Iterator[Config]) -> list[Config]:
    return list({address(config.settings()): config for config in configs}.values())


def read_grid(path: str | Path, given: Mapping[str, Sequence[Any]] | None = None) -> list[Config]:
    """The runs of a grid file, in its order, each once; `given` takes the place of its settings.

    The file is TOML: settings, each a value or a list of values, and any number of blocks
    `[[grid]]` of further settings. A block is every combination of its values and those above the
    blocks. ValueError that names the file and the setting if something is wrong with it.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        blocks = content.pop("grid", [{}])
        if not (isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks)):
            raise ValueError("grid must be blocks that begin with [[grid]]")
        settings = [{**_lists({**content, **block}), **(given or {})} for block in blocks]
        return _once(config for block in settings for config in grid(block))
    except ValueError as error:
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
    place: Place,
    *,
    retries: int = 2,
    tell: Callable[[str], None] = print,
) -> Iterator[Outcome]:
    """Do the runs at `place`, in order, and yield how each ended when it has.

    A run on record is not done again; one that another process is doing is waited for. A run that
    fails is begun again `retries` times, from its checkpoint; then the others go on without it.
    `tell` is called with lines that say where the sweep is and when it will be over.
    """
    if retries < 0:
        raise ValueError(f"retries must be 0 or more, not {retries}")
    return _Sweep(configs, folder, place, retries, tell).outcomes()


class _Sweep:
    def __init__(
        self,
        configs: Sequence[Config],
        folder: Path,
        place: Place,
        retries: int,
        tell: Callable[[str], None],
    ):
        self.waiting, self.total = list(configs), len(configs)
        self.folder, self.place, self.retries, self.tell = folder, place, retries, tell
        self.running: dict[Future[Any], Config] = {}
        self.tries: Counter[Config] = Counter()
        self.over = self.done_here = 0
        self.began = time.monotonic()

    def outcomes(self) -> Iterator[Outcome]:
        while self.waiting or self.running:
            yield from self._start()
            if self.running:
                done, _ = wait(self.running, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from self._end(self.running.pop(future), future)
            elif self.waiting:
                time.sleep(POLL)

    def _start(self) -> Iterator[Outcome]:
        """Start what there is room for; what is on record by now is over."""
        for config in list(self.waiting):
            path = records.path_of(config.settings(), self.folder)
            if path.exists():
                self.waiting.remove(config)
                yield self._read(config)
            elif len(self.running) < self.place.slots and not is_claimed(claim_of(path)):
                self.waiting.remove(config)
                self.tell(f"next: {config.title()}")
                self.running[self.place.start(config)] = config

    def _end(self, config: Config, future: Future[Any]) -> Iterator[Outcome]:
        try:
            future.result()
        except Busy:  # somebody else was faster
            self.waiting.append(config)
        except Exception as error:
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            self.tries[config] += 1
            if self.tries[config] <= self.retries:
                self.tell(f"begun again, since it failed ({reason}): {config.title()}")
                self.waiting.insert(0, config)
            else:
                yield self._over(Outcome(config, error=reason))
        else:
            self.done_here += 1
            yield self._read(config)

    def _read(self, config: Config) -> Outcome:
        path = records.path_of(config.settings(), self.folder)
        try:
            return self._over(Outcome(config, records.load(path)))
        except FileNotFoundError:
            lost = f"no record came to {path}: do all machines share that folder?"
            return self._over(Outcome(config, error=lost))
        except ValueError as error:
            return self._over(Outcome(config, error=str(error)))

    def _over(self, outcome: Outcome) -> Outcome:
        self.over += 1
        said = outcome.record.summary() if outcome.record else f"failed: {outcome.error}"
        head = f"[{self.over}/{self.total}] {outcome.config.title()}"
        self.tell(f"{head}: {said}{self._time_left()}")
        return outcome

    def _time_left(self) -> str:
        """An estimate from the runs done by this sweep, as if the others took as long."""
        left = self.total - self.over
        if not (left and self.done_here):
            return ""
        seconds = (time.monotonic() - self.began) / self.done_here * left
        return f"; about {duration(seconds)} left"
