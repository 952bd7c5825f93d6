"""What users' machines do to runs and files, done on purpose: `make torture`.

Processes are killed, bits flipped, settings and files made up, and many runs done in one process.
Each part counts what came of it; whatever is lost, silent, foreign or leaked is a fault, and the
status is 1. `--seed` begins other draws, `--share 0.1` does a tenth of them.
"""

import argparse
import gc
import json
import math
import os
import random
import resource
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import active_count
from typing import Any

import numpy
import torch
from PIL import Image
from torch import nn

from swdlib import SelectiveWeightDecay, schedules
from swdlib.data.cifar10 import CLASSES, load_cifar10
from swdlib.deploy.stored import load_sparse, save_sparse
from swdlib.masks import apply_, select
from swdlib.runs import records, training
from swdlib.runs.config import Config
from swdlib.runs.run import network_of, run
from swdlib.runs.sweep import read_grid
from swdlib.structures import weights
from tests.conftest import without_time

FAULTS = ("lost", "silent", "foreign", "leaked")
SMALL = Config(epochs=6, width=4, batch_size=32)


def torture(seed: int, share: float) -> Iterator[tuple[str, Counter[str]]]:
    """Yield the name of each part and the counts of its outcomes."""

    def number(whole: int) -> int:
        return max(1, math.ceil(share * whole))

    yield "kills of a run", kills(number(30), random.Random(seed))
    for name, make in FILES.items():
        with TemporaryDirectory() as folder:
            read = make(Path(folder))
            yield f"flipped bits: {name}", flips(read, number(300), random.Random(seed))
    yield "made-up settings", settings(number(1000), random.Random(seed))
    yield "made-up arguments", arguments(number(600), random.Random(seed))
    yield "made-up grids and records", texts(number(400), random.Random(seed))
    yield "runs in one process", runs(number(200))


# Kills


def kills(number: int, random: random.Random) -> Counter[str]:
    """Kill a run at random moments until it is done, over and over; each must end up on record.

    A record is equal if all but its dates and seconds is, and a network if every byte is.
    """
    counts: Counter[str] = Counter()
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # what is killed cleans nothing up
    context = get_context("forkserver")
    context.set_forkserver_preload(["swdlib.runs.run", "sklearn.datasets"])
    with TemporaryDirectory() as whole, TemporaryDirectory() as broken:
        for _ in range(2):  # the first one starts the server as well
            shutil.rmtree(whole)
            begun = time.monotonic()
            alone = context.Process(target=partial(run, SMALL, whole, progress=False))
            alone.start()
            alone.join()
        usual, wanted = time.monotonic() - begun, outcome(Path(whole))
        while counts["killed"] < number:
            process = context.Process(target=partial(run, SMALL, broken, progress=False))
            process.start()
            process.join(random.uniform(0, usual))
            if process.is_alive():
                process.kill()
                counts["killed"] += 1
            process.join()
            if process.exitcode == 0:
                equal = outcome(Path(broken)) == wanted
                counts["done and equal" if equal else "lost"] += 1
                shutil.rmtree(broken)
        run(SMALL, broken, progress=False)
        counts["done and equal" if outcome(Path(broken)) == wanted else "lost"] += 1
        strays = [p for p in Path(broken).rglob("*") if p.name.startswith(".") and p.is_file()]
        counts["leaked"] += len(strays)
    return counts


def outcome(folder: Path) -> Any:
    """What a run left: its record without dates and seconds, and the bytes of its network."""
    path = records.path_of(SMALL.settings(), folder)
    record = records.load(path)
    return record.config, without_time(record.rows), network_of(path).read_bytes()


# Flipped bits


def flips(read: Callable[[bytes | None], Any], number: int, random: random.Random) -> Counter[str]:
    """Flip one bit of a file, `number` times: it must be refused, or mean what it did."""
    counts: Counter[str] = Counter()
    whole, wanted = read(None)
    for _ in range(number):
        flipped = bytearray(whole)
        flipped[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        try:
            counts["harmless" if read(bytes(flipped))[1] == wanted else "silent"] += 1
        except (ValueError, OSError):
            counts["refused"] += 1
        except Exception as error:
            counts["foreign"] += 1
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return counts


Reader = Callable[[bytes | None], tuple[bytes, Any]]


def reader(path: Path, content: Callable[[], Any]) -> Reader:
    """A function that writes bytes to `path`, if there are any, and reads what they mean."""

    def read(changed: bytes | None) -> tuple[bytes, Any]:
        if changed is not None:
            path.write_bytes(changed)
        return path.read_bytes(), content()

    return read


def record_file(folder: Path) -> Reader:
    """The record of a run."""
    path = made(folder)
    return reader(path, lambda: records.load(path))


def made(folder: Path) -> Path:
    """The record of a small run that is made in the folder."""
    config = Config(epochs=1, width=2)
    run(config, folder, progress=False)
    return records.path_of(config.settings(), folder)


def checkpoint_file(folder: Path) -> Reader:
    """A checkpoint."""
    path, generator = folder / "run.pt", torch.Generator().manual_seed(0)
    state = {"model": {"a": torch.randn(20, 30, generator=generator)}, "rows": [{"loss": 0.5}]}
    training.save_checkpoint(path, state)

    def content() -> str:
        found = training.load_checkpoint(path)
        return repr([found["model"]["a"].tolist(), found["rows"]])

    return reader(path, content)


def network_file(folder: Path) -> Reader:
    """The sparse file of a pruned network."""
    path, model = folder / "net.safetensors.zlib", nn.Linear(30, 20)
    masks = select(weights(model), 0.5)
    apply_(model, masks)
    save_sparse(model, masks, path)

    def content() -> str:
        found = nn.Linear(30, 20)
        load_sparse(found, path)
        return repr({name: t.tolist() for name, t in found.state_dict().items()})

    return reader(path, content)


def images_file(folder: Path) -> Reader:
    """The cache of decoded images; a damaged one is made again."""
    generator = numpy.random.default_rng(0)
    for part in ("train", "test"):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            pixels = generator.integers(0, 256, (32, 32, 3), "uint8")
            Image.fromarray(pixels).save(folder / part / name / "0.png")
    load_cifar10(folder)
    path = next(folder.glob("*.safetensors"))

    def content() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "is damaged and ignored"
            try:
                return load_cifar10(folder).fingerprint
            except UserWarning as error:
                raise ValueError from error

    return reader(path, content)


FILES: dict[str, Callable[[Path], Reader]] = {
    "record": record_file,
    "checkpoint": checkpoint_file,
    "network": network_file,
    "decoded images": images_file,
}


# Made-up input

HOSTILE: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 1e-320, 1e308, -0.0, 0.5, 0.999, 1.0, 1.5, 10**18, -(10**30)),
    *(math.nan, math.inf, -math.inf, None, True, False, "", "swd", "none", "../../etc", "\x1b[2J"),
    *("a" * 5000, "=1+1", "<script>", b"bytes", [], [0.5], {}, {"a": 1}, (), object(), 1j),
    *(torch.tensor(0.5), torch.ones(3), torch.tensor(math.nan)),
)


def judged(counts: Counter[str], call: Callable[[], Any], what: object) -> None:
    """Count what a call with made-up input does: it works, or says what is wrong."""
    try:
        call()
        counts["accepted"] += 1
    except (ValueError, TypeError, OSError) as error:
        counts["refused" if str(error) else "foreign"] += 1
    except Exception as error:
        counts["foreign"] += 1
        print(f"{what!r:.200}: {type(error).__name__}: {error!s:.200}", file=sys.stderr)


def settings(number: int, random: random.Random) -> Counter[str]:
    """Give `Config` one, two or three made-up settings."""
    names, counts = [setting.name for setting in fields(Config)], Counter[str]()
    for _ in range(number):
        drawn = {random.choice(names): random.choice(HOSTILE) for _ in range(random.randint(1, 3))}
        judged(counts, partial(Config, **drawn), drawn)
    return counts


def arguments(number: int, random: random.Random) -> Counter[str]:
    """Give the public constructors and functions made-up arguments."""
    counts: Counter[str] = Counter()
    common = {"model": nn.Linear(4, 3), "sparsity": 0.5, "steps": 10}
    calls: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (SelectiveWeightDecay, {**common, "weight_decay": 1e-4}),
        (SelectiveWeightDecay, {**common, "every": 2}),
        (SelectiveWeightDecay, {**common, "update": "gradient"}),
        (schedules.Exponential, {"start": 0.1, "end": 1e5}),
        (schedules.Constant, {"value": 0.5}),
        (schedules.Cubic, {"start": 0.0, "end": 0.5, "begin": 0.2, "finish": 0.7}),
        (select, {"groups": weights(nn.Linear(4, 3)), "sparsity": 0.5}),
    ]
    for _ in range(number):
        function, right = random.choice(calls)
        drawn = {**right, random.choice(list(right)): random.choice(HOSTILE)}
        judged(counts, partial(function, **drawn), (function.__name__, drawn))
    return counts


def texts(number: int, random: random.Random) -> Counter[str]:
    """Read grids and records whose text was cut, repeated or mixed up."""
    counts: Counter[str] = Counter()
    with TemporaryDirectory() as folder:
        grid = 'profile = "smoke"\n[[grid]]\nseed = [0, 1]\nsparsity = [0.5, 0.9]\n'
        record = made(Path(folder))
        whole = record.read_text("utf-8")
        for _ in range(number):
            if random.random() < 0.5:
                path = Path(folder, "grid.toml")
                path.write_text(mixed(grid, random), "utf-8")
                judged(counts, lambda path=path: list(read_grid(path)), path.read_text("utf-8"))  # type: ignore[misc]
            else:
                record.write_text(damaged(whole, random), "utf-8")
                judged(counts, lambda: records.load(record).summary(), record.read_text("utf-8"))
    return counts


def mixed(text: str, random: random.Random) -> str:
    """Cut out a piece of the text and put it, or something foreign, elsewhere."""
    start, end = sorted(random.randrange(len(text) + 1) for _ in range(2))
    piece = random.choice([text[start:end], "[" * 2000, "\x00", "nan", "1e999", '"', "= [", "\n\n"])
    at = random.randrange(len(text) + 1)
    return text[:at] + piece + text[at:] if random.random() < 0.5 else text[:start] + piece


def damaged(text: str, random: random.Random) -> str:
    """A record's text mixed up, or its content changed with a checksum that fits."""
    if random.random() < 0.5:
        return mixed(text, random)
    content = json.loads(text)
    content[random.choice(list(content))] = random.choice([None, [], {}, 5, "x", [[]], [{}], [5]])
    content["checksum"] = records.checksum(content)
    return json.dumps(content)


# Leaks


def runs(number: int) -> Counter[str]:
    """Do many runs in one process: memory, open files and threads must not grow."""
    counts: Counter[str] = Counter()
    with TemporaryDirectory() as folder:
        for seed in range(number):
            run(Config(epochs=1, width=2, seed=seed), folder, progress=False)
            counts["done"] += 1
            if seed == number // 4:
                before = held()
        grown = {name: value - before[name] for name, value in held().items()}
    allowed = {"MiB": 30 + 0.05 * number, "files": 0, "threads": 0}
    for name, more in grown.items():
        if more > allowed[name]:
            counts["leaked"] += 1
            print(f"{more:g} {name} more after {number} runs", file=sys.stderr)
    return counts


def held() -> dict[str, float]:
    """The memory, open files and threads of this process."""
    gc.collect()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    return {"MiB": memory, "files": files, "threads": active_count()}


def main() -> None:
    """Do it all and print a line for each part."""
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--share", type=float, default=1.0)
    options = command.parse_args()
    faults = 0
    for name, counts in torture(options.seed, options.share):
        print(f"{name:28}", ", ".join(f"{n} {what}" for what, n in counts.items() if n), flush=True)
        faults += sum(counts[fault] for fault in FAULTS)
    print("nothing lost, silent, foreign or leaked" if not faults else f"{faults} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
