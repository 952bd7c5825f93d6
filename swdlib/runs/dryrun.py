"""Dry runs: two steps of each phase at full size, before days are spent on the whole run."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swdlib.data.images import Dataset, Split, count_steps
from swdlib.data.load import SHAPES, AnyDataset, load_data
from swdlib.metrics import parameters
from swdlib.recipes import Train
from swdlib.runs.config import Config
from swdlib.runs.devices import find_device, main_process_first
from swdlib.runs.records import duration
from swdlib.runs.training import train

STEPS = 2

# The parameters of the published networks, by dataset, network and width.
PUBLISHED: dict[tuple[str, str, int | None], int] = {
    ("cifar10", "tessier_resnet20", 64): 4_330_442,
    ("imagenet", "tessier_resnet50", 64): 25_587_240,
}


# What the publications leave open, on CIFAR-10 and on ImageNet.
UNKNOWN = (
    "which network the published accuracies were measured on",
    "the published batch size, learning rates and weight decay; these are the usual ones",
)


@dataclass(frozen=True)
class Estimate:
    """What a run would take: its slowest step, the whole of it, and memory.

    `images` says which images the steps were measured on. `read_seconds` is the time it takes to
    read the images of a step; None if they are in memory. `kept_weights` and `kept_parameters` (see
    `masks.kept`) are what the last cut left here. `memory` is the peak in bytes, of the GPU or,
    without one, of this process so far.
    """

    config: Config
    images: str
    device: str
    parameters: int
    kept_weights: int
    kept_parameters: int
    step_seconds: float
    read_seconds: float | None
    steps: int
    evaluations: int
    seconds: float
    memory: int

    def text(self) -> str:
        """Some lines to print."""
        config = self.config
        published = (config.dataset, config.model, config.width) in PUBLISHED
        epochs = ", ".join(
            f"{phase.epochs}" if isinstance(phase, Train) else f"cut to {phase.sparsity:g}"
            for phase in config.phases()
        )
        unknown = UNKNOWN[config.dataset == "imagenet"] if config.profile == "paper" else ""
        reading = "" if self.read_seconds is None else f", read in {duration(self.read_seconds)}"
        return (
            f"Dry run of {config.title()}\n"
            f"images     {self.images}\n"
            f"network    {self.parameters:,} parameters{', as published' if published else ''}\n"
            f"kept       {self.kept_weights:,} weights; {self.kept_parameters:,} of all parameters "
            f"are not zero ({100 * self.kept_parameters / self.parameters:.3g} %)\n"
            f"epochs     {epochs}, budget {config.budget!r}\n"
            f"a step     {duration(self.step_seconds)} in {config.precision} on {self.device}, "
            f"for {config.batch_size} images{reading}\n"
            f"whole run  {self.steps:,} steps and {self.evaluations} evaluations: "
            f"about {duration(self.seconds)}\n"
            f"memory     {self.memory / 2**30:.1f} GiB"
            + (f"\nunknown    {unknown}" if unknown else "")
        )


def dry_run(config: Config, *, progress: bool = True) -> Estimate:
    """Take two steps in each phase of the run, evaluate a batch, and estimate the whole.

    No record is written. CIFAR-10 is downloaded if it is missing, as for a run; images that cannot
    be found are replaced by random ones of the same shape. ValueError if the number of parameters
    is published for this network and differs.
    """
    device = find_device(config.device)
    with main_process_first():
        data, images, trained, tested = _find(config)
    data = config.normalised(data).to(device)
    model = config.build(data)
    published = PUBLISHED.get((config.dataset, config.model, config.width))
    if published not in (None, found := parameters(model)):
        raise ValueError(
            f"model {config.model} must have {published:,} parameters, as published, not {found:,}"
        )
    timed = _Timed(_first(data, STEPS * config.batch_size, config.batch_size))
    phases = config.phases(next(_first(data, 2, 2).test_batches(2))[0])
    short = [replace(p, epochs=1) if isinstance(p, Train) else p for p in phases]
    left = train(model, timed, short, **config.options(progress=progress))[-1]

    # From the seconds of an image to those of a step of each phase, and of the whole run.
    read = timed.read_seconds()
    each = [config.batch_size * max(seconds, read or 0) for seconds in timed.training]
    epochs = [phase.epochs for phase in phases if isinstance(phase, Train)]
    steps = [count * count_steps(trained, config.batch_size) for count in epochs]
    evaluations = sum(epochs) + len(phases) - len(epochs)
    testing = evaluations * tested * max(min(timed.testing), read or 0)
    on_gpu = device.type == "cuda"
    return Estimate(
        config,
        images,
        device=torch.cuda.get_device_name(device) if on_gpu else device.type,
        parameters=found,
        kept_weights=left["kept_weights"],
        kept_parameters=left["kept_parameters"],
        step_seconds=max(each),
        read_seconds=None if read is None else read * config.batch_size,
        steps=sum(steps),
        evaluations=evaluations,
        seconds=testing + sum(n * seconds for n, seconds in zip(steps, each, strict=True)),
        memory=torch.cuda.max_memory_allocated(device) if on_gpu else _peak_memory(),
    )


def _find(config: Config) -> tuple[AnyDataset, str, int, int]:
    """Images, what they are, and how many of them a run is trained on and tested on."""
    try:
        data = load_data(config.dataset, config.data_root, holdout=config.holdout)
    except FileNotFoundError as error:
        reason = str(error).split(":")[0].split(". ")[0]
    else:
        trained, tested = len(data.train), len(data.test)
        found = f"{trained:,} to train and {tested:,} to test, from {data.source}"
        return data, found, trained, tested
    channels, size, classes, trained, tested = SHAPES[config.dataset]
    if config.holdout:
        tested = round(config.holdout * trained)
        trained -= tested
    shape = (STEPS * config.batch_size, channels, size, size)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    split = Split(pixels, torch.randint(classes, shape[:1], generator=generator))
    unit, padding = (0.5,) * channels, 4 if size == 32 else 0
    made = Dataset(config.dataset, "random", split, split, classes, unit, unit, padding, True, "")
    return made, f"random ones of the same shape: {reason}", trained, tested


def _first(data: AnyDataset, train: int, test: int) -> AnyDataset:
    """A few of the training images, some of which are also the test images."""
    count = min(train, len(data.train))
    numbers = torch.arange(count) * (len(data.train) // count)  # of all classes
    return data.take(numbers, numbers[:test])


class _Timed:
    """A dataset that measures for how many seconds each of its images keeps the loop busy."""

    def __init__(self, data: AnyDataset) -> None:
        self.data, self.device, self.world = data, data.device, 1
        self.training: list[float] = []  # one number for each epoch
        self.testing: list[float] = []  # and one for each evaluation

    def steps(self, batch_size: int, *, world: int = 1) -> int:
        self.world = world
        return self.data.steps(batch_size, world=world)

    def train_batches(self, batch_size: int, **options: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._time(self.data.train_batches(batch_size, **options), self.training)

    def test_batches(self, batch_size: int, **options: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._time(self.data.test_batches(batch_size, **options), self.testing)

    def _time(
        self, batches: Iterator[tuple[Tensor, Tensor]], seconds: list[float]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        each = []
        started = self._now()
        for images, labels in batches:
            if not isinstance(self.data, Dataset):  # workers read files during the step before
                started = self._now()
            yield images, labels
            each.append((self._now() - started) / (len(labels) * self.world))
            started = self._now()
        seconds.append(min(each))  # the first step is slower than all that follow

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def read_seconds(self) -> float | None:
        """The seconds that all processes together need to read an image; None if in memory."""
        if isinstance(self.data, Dataset):
            return None
        alone = replace(self.data, workers=0, device=torch.device("cpu"))
        started = time.monotonic()
        _, labels = next(alone.test_batches(64))
        readers = self.world * max(1, self.data.workers)
        return (time.monotonic() - started) / (len(labels) * readers)


def _peak_memory() -> int:
    """The peak memory of this process so far, in bytes."""
    import resource  # here, as Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
