"""Measure what selection costs, compared with what memory allows: `make bench` calls this file.

The measures of a section take turns in one run, and the table has their medians. Ratios carry over
to other machines, milliseconds do not. Nothing is downloaded: pixels are random. On a shared
machine, OMP_NUM_THREADS=1 makes it count the processor time of a single thread.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet50

from swdlib.criteria import batch_norm_scale, magnitude
from swdlib.data.images import Dataset as Images
from swdlib.data.images import Split
from swdlib.files import write_whole
from swdlib.masks import removed_weights, select_units
from swdlib.metrics import evaluate
from swdlib.models import build_model
from swdlib.recipes import Train
from swdlib.runs.run import code
from swdlib.runs.training import sgd, train
from swdlib.schedules import Constant
from swdlib.structures import filters
from swdlib.swd import SelectiveWeightDecay

STORED = Path(__file__).parent / "measurements" / "speed.json"
STEPS = 24  # of training that are timed together
SIZES = (10**5, 10**6, 10**7, 10**8)
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

Row = dict[str, Any]
Timed = tuple[Callable[[], object], Callable[[], Any]]  # what is done before, and what is timed


class Rest(torch.optim.Optimizer):
    """An optimizer that does nothing, so that a step costs what its hooks cost."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


def clock() -> float:
    """Seconds; with a single thread those of this process, so that other programs do not count."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def clock_of_all() -> float:
    """As `clock`, but with a single thread workers that have ended count as well."""
    used = os.times()
    of_all = used.user + used.system + used.children_user + used.children_system
    return of_all if torch.get_num_threads() == 1 else time.perf_counter()


def nothing() -> None:
    """Do nothing."""


def medians(functions: Mapping[str, Timed], rounds: int) -> dict[str, float]:
    """The median milliseconds of each function over rounds in which they take turns."""

    def timed(before: Callable[[], object], function: Callable[[], Any]) -> float:
        before()
        return milliseconds(function)

    return in_turns({name: partial(timed, *both) for name, both in functions.items()}, rounds)


def milliseconds(function: Callable[[], Any], now: Callable[[], float] = clock) -> float:
    """The duration of a call."""
    start = now()
    function()
    return 1e3 * (now() - start)


def in_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each measure over rounds in which they take turns."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


def with_gradients(model: nn.Module) -> nn.Module:
    """Give every parameter a gradient."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


def penalised(model: nn.Module, **settings: Any) -> Callable[[], None]:
    """A step of training that consists of the penalty alone."""
    penalty = SelectiveWeightDecay(model, **{"sparsity": 0.9, "steps": 10**6, **settings})
    optimizer = Rest(model.parameters())
    penalty.attach(optimizer)
    return optimizer.step


def moving(model: nn.Module) -> Callable[[], None]:
    """A function that moves weights as a step of SGD does: a little noise and a little decay."""

    @torch.no_grad()
    def move() -> None:
        for parameter in model.parameters():
            parameter.mul_(1 - 5e-5).add_(torch.randn_like(parameter), alpha=1e-4)

    return move


@torch.no_grad()
def jump(model: nn.Module) -> None:
    """Replace all weights, as loading others would."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02 + 0.03 * float(torch.rand(())))


def naive(model: nn.Module, sparsity: float = 0.9, scale: float = 5e-5) -> None:
    """The plain way: sort all weights, mask those below the threshold, differentiate."""
    weights = [p for p in model.parameters() if p.ndim >= 2]
    ordered = torch.cat([w.detach().abs().flatten() for w in weights]).sort().values
    threshold = ordered[round(sparsity * len(ordered))]
    selected = [w * (w.detach().abs() < threshold) for w in weights]
    (0.5 * scale * torch.stack([w.square().sum() for w in selected]).sum()).backward()


def resnet50_steps(rounds: int) -> list[Row]:
    """Exact selection and update of ResNet-50's weights, compared with a copy and the plain way."""
    model = with_gradients(resnet50())
    move = moving(model)
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim >= 2])
    # Memory that was never written would be read from a single page of zeros.
    gradients, first, second = (torch.ones_like(weights) for _ in range(3))

    def copy() -> None:  # as many bytes as SWD, which reads three arrays and writes one
        first.copy_(weights)
        second.copy_(gradients)

    step = penalised(model)
    step()
    copied, usual = medians({"copy": (move, copy), "step": (move, step)}, rounds).values()
    [jumped] = medians({"step": (lambda: jump(model), step)}, rounds).values()
    fresh = [penalised(model) for _ in range(rounds)]
    [first_step] = medians({"step": (move, lambda: fresh.pop()())}, rounds).values()
    [plain] = medians({"plain": (nothing, lambda: naive(model))}, max(2, rounds // 5)).values()
    return [
        row("copy of the same bytes", copied, "ms"),
        row("plain way", plain, "ms"),
        row("select and update, eager", usual, "ms"),
        row("select and update, eager, to a copy", usual / copied, "x", 2.5),
        row("plain way to select and update, eager", plain / usual, "x", least=100),
        row("step after a jump to a usual one, eager", jumped / usual, "x", 3),
        row("first step to a usual one, eager", first_step / usual, "x", 3),
    ]


def layers(number: int) -> nn.Module:
    """Ten matrices with `number` weights in all."""
    return nn.ParameterList([nn.Parameter(torch.empty(10, number // 100)) for _ in range(10)])


def against_size(rounds: int) -> list[Row]:
    """Nanoseconds per weight of a step, by the number of weights."""
    rows = []
    for number in SIZES:
        model = layers(number)
        jump(model)
        with_gradients(model)
        step = penalised(model)
        step()
        times = medians({"step": (moving(model), step)}, max(3, rounds // (number // 10**7 + 1)))
        rows.append(row(f"a step of {number:,} weights", 1e6 * times["step"] / number, "ns/weight"))
    return rows


def extra_memory() -> list[Row]:
    """The peak memory of steps, in copies of the largest tensor."""
    held = held_by_steps(layers(3 * 10**7)) / (4 * 3 * 10**6)
    return [row("extra memory, in copies of the largest tensor", held, "x", 1)]


def held_by_steps(model: nn.Module, steps: int = 3) -> int:
    """The peak of the bytes that steps allocate in torch, plus that of NumPy and Python.

    The memory of the process would depend on the system's pages and on other threads.
    """
    jump(model)
    step = penalised(with_gradients(model))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tracemalloc.start()
        for _ in range(steps):
            step()
        by_others = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return by_others + max(accumulate(event.nbytes() for event in events))


def structured(rounds: int) -> list[Row]:
    """What it costs to select filters of ResNet-50, and what a step with the update costs."""
    model = with_gradients(resnet50())
    structure = filters(torch.zeros(2, 3, 64, 64))
    groups = structure(model)
    functions: dict[str, Timed] = {}
    for criterion in (batch_norm_scale, magnitude):
        step = penalised(model, sparsity=0.5, structure=structure, criterion=criterion)
        functions[criterion.__name__] = (nothing, partial(select_units, groups, 0.5, criterion))
        functions[f"{criterion.__name__}, step"] = (nothing, step)
    functions["masks"] = (
        nothing,
        partial(removed_weights, groups, select_units(groups, 0.5, batch_norm_scale)),
    )
    times = medians(functions, rounds)
    return [
        row("choice of ResNet-50's filters by their scales", times["batch_norm_scale"], "ms", 5),
        row("choice of ResNet-50's filters by magnitude", times["magnitude"], "ms"),
        row("which weights leave with ResNet-50's filters", times["masks"], "ms"),
        row("select and update filters by scales", times["batch_norm_scale, step"], "ms"),
        row("select and update filters by magnitude", times["magnitude, step"], "ms"),
    ]


class Pictures(Dataset):
    """Images as torchvision's CIFAR10 gives them: each turned into a PIL image and transformed."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, change: Any) -> None:
        self.images, self.labels, self.change = images, labels, change

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.change(Image.fromarray(self.images[index])), int(self.labels[index])


def plain_loader(split: Split, train: bool, batch_size: int) -> DataLoader:
    """The usual way: torchvision's transforms and a DataLoader of two workers."""
    crop = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()] if train else []
    change = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    images = split.images.permute(0, 2, 3, 1).contiguous().numpy()
    pictures = Pictures(images, split.labels.numpy(), change)
    return DataLoader(pictures, batch_size, shuffle=train, num_workers=2)


def pixels(count: int) -> Split:
    """Random images of CIFAR-10's size."""
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return Split(images, torch.randint(10, (count,)))


def training(rounds: int) -> list[Row]:
    """Steps of ResNet-20 on images of CIFAR-10's size, by `train` and by a plain loop."""
    data = Images(
        "random", "drawn", pixels(STEPS * 128), pixels(10_000), 10, MEAN, STD, 4, True, ""
    )
    model = build_model("resnet20")
    ways = {"ours": partial(our_step, data), "plain": partial(plain_step, data)}
    our_step(replace(data, train=pixels(128)))  # the first call imports what it needs
    ours, plain = in_turns(ways, max(3, rounds // 3)).values()
    batch = cycle_of(data)
    step = penalised(with_gradients(model))
    step()
    small = {"data": (nothing, lambda: next(batch)), "penalty": (moving(model), step)}
    parts = medians(small, rounds)
    return [
        row("step of ResNet-20, 16 maps, batch 128", ours, "ms"),
        row("share of a step that selects and updates", 100 * parts["penalty"] / ours, "%", 1),
        row("share of a step that makes the batch", 100 * parts["data"] / ours, "%", 3),
        row("plain way to ours, an epoch of training", plain / ours, "x", least=1.3),
        *evaluation(model, data, max(2, rounds // 5)),
    ]


def cycle_of(data: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, epoch after epoch."""
    for epoch in count():
        yield from data.train_batches(128, seed=0, epoch=epoch)


def our_step(data: Images) -> float:
    """Milliseconds of a step with its batch, by `train` as a `Config` sets it up."""
    options = {"channels_last": True, "progress": False}
    model, data = build_model("resnet20"), replace(data, test=pixels(2))
    learn = partial(train, model, data, [Train(1, Constant(0.1))], **options)
    return milliseconds(learn, clock_of_all) / STEPS


def plain_step(data: Images) -> float:
    """The same by the usual loop."""
    model = build_model("resnet20").train()
    optimizer = sgd(model.parameters())

    def learn() -> None:
        correct = 0
        for images, labels in plain_loader(data.train, True, 128):
            optimizer.zero_grad()
            logits = model(images)
            cross_entropy(logits, labels).backward()
            optimizer.step()
            correct += (logits.argmax(1) == labels).sum().item()

    return milliseconds(learn, clock_of_all) / STEPS


def evaluation(model: nn.Module, data: Images, rounds: int) -> list[Row]:
    """Evaluation of 10,000 images, by `evaluate` with channels last and by a plain loop."""
    usual = deepcopy(model)
    model.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def plain() -> float:
        usual.eval()
        correct = 0
        for images, labels in plain_loader(data.test, False, 128):
            correct += (usual(images).argmax(1) == labels).sum().item()
        return correct / len(data.test)

    ways = {"ours": lambda: evaluate(model, data), "plain": plain}
    ours, usual_way = in_turns(
        {name: partial(milliseconds, way, clock_of_all) for name, way in ways.items()}, rounds
    ).values()
    what = "plain way to ours, evaluation of 10,000 images"
    return [row(what, usual_way / ours, "x", least=1.3)]


def imports(rounds: int) -> list[Row]:
    """Seconds that `import swdlib` takes beyond `import torch`."""
    clock = "import time; import torch; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    seconds = [float(in_python(clock.format("import swdlib"))) for _ in range(rounds)]
    return [row("import swdlib beyond import torch", statistics.median(seconds), "s", 0.3)]


def in_python(script: str, cwd: Path = STORED.parents[2]) -> str:
    """What a new process of Python prints."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def on_gpu(rounds: int) -> list[Row]:
    """The share of a step of ResNet-50 in bf16, batch 128, that selects and updates on a GPU."""
    model = resnet50().cuda()
    optimizer = sgd(model.parameters())
    images = torch.randn(128, 3, 224, 224, device="cuda")
    labels = torch.randint(1000, (128,), device="cuda")

    def learn() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()

    def choose() -> None:
        step()
        torch.cuda.synchronize()

    learn()
    step = penalised(model)
    choose()
    times = medians({"step": (nothing, learn), "penalty": (nothing, choose)}, rounds)
    share = 100 * times["penalty"] / times["step"]
    return [row("share of a step of ResNet-50 in bf16 on a GPU", share, "%", 1)]


def row(
    what: str, value: float, unit: str, most: float | None = None, least: float | None = None
) -> Row:
    """A line of the table; `most` or `least` is the goal."""
    return {
        "what": what,
        "value": float(f"{value:.3g}"),
        "unit": unit,
        "most": most,
        "least": least,
    }


def line(row: Row) -> str:
    """A row as text."""
    goal = "" if row["most"] is None else f"<= {row['most']:g}"
    goal = goal if row["least"] is None else f">= {row['least']:g}"
    return f"{row['what']:<58} {row['value']:>9g} {row['unit']:<10} {goal}"


def machine() -> dict[str, Any]:
    """The software and hardware of the measurement."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "code": code(),
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cpu": processor()},
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def processor() -> str:
    """The processor's name: on Linux its model."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "resnet50": resnet50_steps,
    "size": against_size,
    "memory": lambda rounds: extra_memory(),
    "structured": structured,
    "training": training,
    "import": lambda rounds: imports(5),
    **({"gpu": on_gpu} if torch.cuda.is_available() else {}),
}


def main() -> None:
    """Measure, print a table and store it, a section at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; none: all")
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds of which the medians are given"
    )
    parser.add_argument("--to", type=Path, default=STORED, help="the file that is written")
    options = parser.parse_args()
    for name in options.sections or SECTIONS:
        torch.manual_seed(0)
        rows = []
        for found in SECTIONS[name](options.rounds):
            rows.append(found)
            print(line(found), flush=True)
        store(options.to, name, {"provenance": machine(), "rounds": options.rounds, "rows": rows})


def store(path: Path, name: str, section: dict[str, Any]) -> None:
    """Put a section into a file, which keeps its others."""
    stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
    content = {key: {**stored, name: section}.get(key) for key in SECTIONS}
    text = json.dumps({key: value for key, value in content.items() if value}, indent=1)
    write_whole(path, lambda file: file.write_text(text + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
