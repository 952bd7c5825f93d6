"""Dry runs: two steps of a configuration at full size, before days are spent on all of them."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from swdlib.data.images import Dataset, Split, count_steps
from swdlib.data.load import SHAPES, AnyDataset, load_data
from swdlib.metrics import parameters
from swdlib.recipes import Phase, Train
from swdlib.runs.config import Config, build, options_of, phases_of
from swdlib.runs.devices import find_device, main_process_first
from swdlib.runs.records import duration
from swdlib.runs.training import train

STEPS = 2


# The parameters of the published networks, by dataset, network and width.
PUBLISHED = {("cifar10", "resnet20", 64): 4_330_442, ("imagenet", "resnet50", None): 25_557_032}


@dataclass(frozen=True)
class Estimate:
    """What a run would take: its slowest step, the whole of it, and memory.

    `images` says what the steps were taken on. `read_seconds` are those in which the images of a
    step are read; None if they need not be. `memory` is the peak in bytes, of the GPU or, without
    one, of this process so far.
    """

    config: Config
    images: str
    device: str
    parameters: int
    step_seconds: float
    read_seconds: float | None
    steps: int
    evaluations: int
    seconds: float
    memory: int

    def text(self) -> str:
        """Some lines to print."""
        config = self.config
        published = ", as published" if _published(config) else ""
        reading = "" if self.read_seconds is None else f", read in {duration(self.read_seconds)}"
        return (
            f"Dry run of {config.title()}\n"
            f"images     {self.images}\n"
            f"network    {self.parameters:,} parameters{published}\n"
            f"a step     {duration(self.step_seconds)} in {config.precision} on {self.device}, "
            f"for {config.batch_size} images{reading}\n"
            f"whole run  {self.steps:,} steps and {self.evaluations} evaluations: "
            f"about {duration(self.seconds)}\n"
            f"memory     {self.memory / 2**30:.1f} GiB"
        )


def dry_run(config: Config, *, progress: bool = True) -> Estimate:
    """Take two steps in each phase of the run, evaluate a batch, and estimate the whole.

    No record is written. CIFAR-10 is downloaded if it is not there, as for a run; images that are
    not to be had are random ones of the same shape.
    ValueError if the network should have a published number of parameters and has another.
    """
    device = find_device(config.device)
    with main_process_first():
        data, images, counts = _find(config)
    data = data.to(device)
    model = build(config, data)
    _check(config, parameters(model))
    phases = phases_of(config, next(_take(data, 2, 2).test_batches(2))[0])
    watched = _Watched(_take(data, STEPS * config.batch_size, config.batch_size))
    train(model, watched, [_shorten(p) for p in phases], **options_of(config, progress=progress))
    return Estimate(
        config,
        images,
        _name(device),
        parameters(model),
        memory=_peak_memory(device),
        **_extrapolate(config, phases, watched, *counts),
    )


def _extrapolate(
    config: Config, phases: Sequence[Phase], watched: "_Watched", trained: int, tested: int
) -> dict[str, Any]:
    """From the seconds an image to those of a run on so many images."""
    read = watched.read_seconds()
    each = [config.batch_size * max(seconds, read or 0) for seconds in watched.training]
    epochs = [phase.epochs for phase in phases if isinstance(phase, Train)]
    steps = [count * count_steps(trained, config.batch_size) for count in epochs]
    evaluations = sum(epochs) + len(phases) - len(epochs)
    testing = evaluations * tested * max(min(watched.testing), read or 0)
    return {
        "step_seconds": max(each),
        "read_seconds": None if read is None else read * config.batch_size,
        "steps": sum(steps),
        "evaluations": evaluations,
        "seconds": testing + sum(n * seconds for n, seconds in zip(steps, each, strict=True)),
    }


def _find(config: Config) -> tuple[AnyDataset, str, tuple[int, int]]:
    """Images, what they are, and how many of them a run trains on and is tested on."""
    try:
        data = load_data(config.dataset, config.data_root, holdout=config.holdout)
    except FileNotFoundError as error:
        channels, size, classes, trained, tested = SHAPES[config.dataset]
        if config.holdout:
            tested = round(config.holdout * trained)
            trained -= tested
        reason = str(error).split(":")[0].split(". ")[0]
        found = f"random ones of the same shape: {reason}"
        return _random(config, channels, size, classes), found, (trained, tested)
    counts = len(data.train), len(data.test)
    found = "{:,} to train and {:,} to test".format(*counts)
    return data, f"{found}, from {data.source}", counts


def _random(config: Config, channels: int, size: int, classes: int) -> Dataset:
    shape = (STEPS * config.batch_size, channels, size, size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    split = Split(images, torch.randint(classes, shape[:1], generator=generator))
    unit = (0.5,) * channels
    padding = 4 if size == 32 else 0
    return Dataset(config.dataset, "random", split, split, classes, unit, unit, padding, True, "")


def _take(data: AnyDataset, train: int, test: int) -> AnyDataset:
    count = min(train, len(data.train))
    numbers = torch.arange(count) * (len(data.train) // count)  # of all classes
    return data.take(numbers, numbers[:test])


def _shorten(phase: Phase) -> Phase:
    return replace(phase, epochs=1) if isinstance(phase, Train) else phase


def _published(config: Config) -> int | None:
    return PUBLISHED.get((config.dataset, config.model, config.width))


def _check(config: Config, found: int) -> None:
    published = _published(config)
    if published is not None and found != published:
        raise ValueError(
            f"model {config.model} must have {published:,} parameters, as published, not {found:,}"
        )


class _Watched:
    """A dataset that notes for how many seconds an image of it keeps the loop busy."""

    def __init__(self, data: AnyDataset) -> None:
        self.data, self.device, self.world = data, data.device, 1
        self.training: list[float] = []  # one number an epoch
        self.testing: list[float] = []  # and one an evaluation

    def steps(self, batch_size: int, *, world: int = 1) -> int:
        self.world = world
        return self.data.steps(batch_size, world=world)

    def train_batches(self, batch_size: int, **options: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._watch(self.data.train_batches(batch_size, **options), self.training)

    def test_batches(self, batch_size: int, **options: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._watch(self.data.test_batches(batch_size, **options), self.testing)

    def _watch(
        self, batches: Iterator[tuple[Tensor, Tensor]], seconds: list[float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        each = []
        started = self._now()
        for images, labels in batches:
            if not isinstance(self.data, Dataset):  # those are read while the step before is taken
                started = self._now()
            yield images, labels
            each.append((self._now() - started) / (len(labels) * self.world))
            started = self._now()
        seconds.append(min(each))  # the first takes longer than all that follow

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def read_seconds(self) -> float | None:
        """The seconds an image in which all processes read; None if images are in memory."""
        if isinstance(self.data, Dataset):
            return None
        alone = replace(self.data, workers=0, device=torch.device("cpu"))
        started = time.monotonic()
        _, labels = next(alone.test_batches(64))
        readers = self.world * max(1, self.data.workers)
        return (time.monotonic() - started) / (len(labels) * readers)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
