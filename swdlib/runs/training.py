"""Training: the loop that carries out a list of phases.

The loop knows phases, penalties and masks, never the name of a method. It runs on Hugging Face
accelerate: on a CPU, a GPU, or several processes, each of which works on its share of every batch.
"""

import copy
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from inspect import getclosurevars
from pathlib import Path
from types import FunctionType
from typing import Any, get_args
from zipfile import ZipFile

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from swdlib.files import write_whole
from swdlib.hooks import Method
from swdlib.masks import (
    DIVERGED,
    Masks,
    NotFinite,
    apply_,
    check_reachable,
    emptied,
    find_groups,
    kept,
    select,
    sparsity_of,
)
from swdlib.metrics import BATCH, Data, count_correct, means, parameters, sums_over_test
from swdlib.recipes import Phase, Prune, Train
from swdlib.runs.devices import Precision, Tracker, can_be_channels_last, make_accelerator
from swdlib.runs.records import HISTOGRAM_BINS, HISTOGRAM_RANGE
from swdlib.schedules import check_count
from swdlib.structures import is_prunable

Row = dict[str, Any]


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The published optimizer: momentum 0.9, weight decay 5e-4; the phases set its rate."""
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Options:
    """How `train` runs.

    Args:
        optimizer: makes the optimizer of each phase from parameters; the phase sets its rate.
        loss: of (logits, labels, reduction="sum").
        batch_size: images in a step, over all processes.
        seed: of batch order, augmentation and dropout.
        precision: "fp32", or "bf16" or "fp16" autocast.
        accumulate: parts that a batch is worked through in, to save memory.
        clip: the largest gradient norm.
        compile: whether the network is compiled by torch.compile.
        channels_last: whether images and weights lie channels last in memory; where that would
            give wrong gradients (`devices.can_be_channels_last`), they do not.
        checkpoint: file that a stopped run resumes from, bit for bit on a CPU.
        save_every: steps between two writes of the checkpoint.
        identity: names the run, such as its configuration and code: a checkpoint of another one
            is refused, as is one of other data.
        progress: whether a bar is shown, or where that is no terminal, a line for each row.
        log_to: tracker that the numbers of each row are sent to.
    """

    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = sgd
    loss: Callable[..., Tensor] = cross_entropy
    batch_size: int = 128
    seed: int = 0
    precision: Precision = "fp32"
    accumulate: int = 1
    clip: float | None = None
    compile: bool = False
    channels_last: bool = False
    checkpoint: Path | None = None
    save_every: int = 200
    identity: str = ""
    progress: bool = True
    log_to: Tracker | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "save_every"):
            check_count(name, getattr(self, name))
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision must be one of {get_args(Precision)}, not {self.precision!r}"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is a gradient norm above 0, or None, not {self.clip!r}")


def train(model: nn.Module, data: Data, phases: Sequence[Phase], **options: Any) -> list[Row]:
    """Carry out `phases` on `model`, in place, and return one row for each epoch and each cut.

    `model` maps images to logits and is moved to the device of `data`, a dataset such as
    `load_data` returns. `options` are the fields of `Options`. Seeds torch's global generators.
    Raises TypeError for an option or a dataset that is none, and NotFinite, a ValueError, if
    training diverges.
    """
    needed = ("device", "steps", "train_batches", "test_batches")
    if not all(hasattr(data, name) for name in needed):
        raise TypeError(
            f"data must be a dataset such as load_data returns, with {', '.join(needed)}, "
            f"not {data!r:.80}"
        )
    allowed = [option.name for option in fields(Options)]
    for name in sorted(options.keys() - set(allowed)):
        if name in {f.name for phase in (Train, Prune) for f in fields(phase)}:
            hint = f"the phases set {name}"
        else:
            hint = "".join(f"did you mean {near}?" for near in get_close_matches(name, allowed, 1))
        raise TypeError(
            f"train has no option {name!r}{hint and f' ({hint})'}; "
            f"the options are {', '.join(allowed)}"
        )
    return _Loop(model, data, phases, Options(**options)).run()


@dataclass
class _Position:
    """How far a run has come: with the weights and the optimizer, all that it resumes from."""

    phase: int = 0
    epoch: int = 0  # done in this phase
    batch: int = 0  # done in this epoch
    images: int = 0  # seen in this epoch
    seconds: float = 0.0  # spent in this epoch
    epochs: int = 0  # done in all phases
    steps: int = 0  # done in all phases


class _Loop:
    def __init__(self, model: nn.Module, data: Data, phases: Sequence[Phase], options: Options):
        self.model, self.data, self.phases, self.options = model, data, phases, options
        self.device = data.device
        self.accelerator = make_accelerator(self.device, options.precision, options.log_to)
        self.share = {
            "rank": self.accelerator.process_index,
            "world": self.accelerator.num_processes,
        }
        self.channels_last = options.channels_last and can_be_channels_last(model, self.device)
        self.steps_per_epoch = data.steps(options.batch_size, world=self.share["world"])
        self.at = _Position()
        self.rows: list[Row] = []
        self.masks: Masks = {}
        self.start: dict[str, Tensor] = {}  # the network before the first phase, to rewind to
        self.totals = torch.zeros(2, device=self.device)  # loss, correct: summed over the epoch
        self.optimizer: Any = None
        self.penalty: Method | None = None

    def run(self) -> list[Row]:
        self.model.to(self.device)
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if any(isinstance(phase, Prune) and phase.rewind for phase in self.phases):
            self.start = copy.deepcopy(self.model.state_dict())
        self._resume()
        for phase in self.phases[self.at.phase :]:
            if isinstance(phase, Prune):  # a sparsity out of reach is refused before hours of work
                groups = find_groups(self.model, phase.structure)
                check_reachable(groups, phase.sparsity, phase.allocation)
        self.network = self.accelerator.prepare(self.model)
        if self.options.compile:
            self.network = torch.compile(self.network)
        epochs = sum(phase.epochs for phase in self.phases if isinstance(phase, Train))
        self.shown = self.options.progress and self.accelerator.is_main_process
        self.bar = tqdm(
            total=epochs * self.steps_per_epoch,
            initial=self.at.steps,
            unit="step",
            disable=None if self.shown else True,  # None: in a log file there are lines instead
            leave=False,
            mininterval=1,
        )
        try:
            with self.bar:
                while self.at.phase < len(self.phases):
                    phase = self.phases[self.at.phase]
                    if isinstance(phase, Prune):
                        self._cut(phase)
                    else:
                        self._train(phase)
                    done = self.at
                    self.at = _Position(done.phase + 1, epochs=done.epochs, steps=done.steps)
                    self.penalty = None
        finally:
            self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
            for tracker in self.accelerator.trackers:
                tracker.finish()  # accelerate's end_training would also end the process group
        return self.rows

    def _cut(self, phase: Prune) -> None:
        groups = find_groups(self.model, phase.structure)
        masks = select(groups, phase.sparsity, phase.criterion, phase.allocation)
        if phase.rewind:
            self.model.load_state_dict(self.start)
        if phase.held:
            # Another structure or a lower sparsity must not revive what an earlier cut removed.
            self.masks |= {n: m & self.masks[n] if n in self.masks else m for n, m in masks.items()}
        apply_(self.model, masks | self.masks)
        self._add_row("prune", {"emptied": len(emptied(self.masks))})

    def _train(self, phase: Train) -> None:
        steps = phase.epochs * self.steps_per_epoch
        if self.optimizer is None or not phase.keep_momentum:
            made = self.options.optimizer(self.model.parameters())
            self.optimizer = self.accelerator.prepare(made)
        self.penalty = phase.penalty(self.model, steps=steps) if phase.penalty else None
        if self.penalty:
            self.penalty.attach(self.optimizer)
        self._restore()
        while self.at.epoch < phase.epochs:
            self._epoch(phase)
        if self.penalty:
            self.penalty.detach()

    def _epoch(self, phase: Train) -> None:
        self.network.train()
        started = time.monotonic() - self.at.seconds
        for images, labels in self.data.train_batches(
            self.options.batch_size,
            seed=self.options.seed,
            epoch=self.at.epochs,
            start=self.at.batch,
            **self.share,
        ):
            self._step(images, labels, self._rate(phase, self.at.batch))
            self.at.seconds = time.monotonic() - started
            if self.at.steps % self.options.save_every == 0:
                self._save()
        at, rate = self.at, self._rate(phase, self.at.batch - 1)
        loss, correct = (self.accelerator.reduce(self.totals.clone()) / at.images).tolist()
        if not math.isfinite(loss):
            raise NotFinite(f"the training loss of epoch {at.epochs + 1} is {loss}: {DIVERGED}")
        if not all(bool(weights.isfinite().all()) for weights in self.model.parameters()):
            raise NotFinite(f"after epoch {at.epochs + 1} a weight is not finite: {DIVERGED}")
        self.totals.zero_()
        self.at = _Position(at.phase, at.epoch + 1, epochs=at.epochs + 1, steps=at.steps)
        trained = {"train_loss": loss, "train_top1": 100 * correct, "seconds": at.seconds}
        self._add_row("train", {"lr": rate, **trained})

    def _rate(self, phase: Train, batch: int) -> float:
        done = self.at.epoch * self.steps_per_epoch + batch
        return phase.lr(done / (phase.epochs * self.steps_per_epoch))

    def _step(self, images: Tensor, labels: Tensor, rate: float) -> None:
        # A seed for each step makes dropout resumable without the states of the generators.
        # torch.manual_seed, which seeds all kinds of devices, takes a stack trace for each of them.
        on_cpu = self.device.type == "cpu"
        seed = (self.options.seed * 1_000_003 + self.at.steps) * 1_000_003 + self.share["rank"]
        (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(seed % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._backward(images, labels)
        if self.options.clip is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masks:  # momentum and weight decay must not revive what was cut
            apply_(self.model, self.masks)
        self.at.batch += 1
        self.at.steps += 1
        self.bar.update()

    def _backward(self, images: Tensor, labels: Tensor) -> None:
        world, total = self.share["world"], len(labels)
        if world > 1:
            total = int(self.accelerator.reduce(torch.tensor(total, device=self.device)))
        self.at.images += total
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        parts = self.options.accumulate
        pairs = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
        for i, (some_images, some_labels) in enumerate(pairs):
            waits = i < len(pairs) - 1  # only the last part's backward pass syncs the processes
            with self.accelerator.no_sync(self.network) if waits else nullcontext():
                logits = self.network(some_images)
                loss = self.options.loss(logits, some_labels, reduction="sum")
                # The gradients are averaged over the processes: each gives `world` times its share.
                self.accelerator.backward(loss * (world / total))
            correct = count_correct(logits.detach(), some_labels)
            self.totals += torch.stack([loss.detach().float(), correct.float()])

    def _add_row(self, kind: str, measured: Row) -> None:
        sums = sums_over_test(self.network, self.data, self.options.loss, BATCH, **self.share)
        masks = self.masks | (self.penalty.masks if self.penalty else {})
        row = {
            "kind": kind,
            "phase": self.at.phase,
            "epoch": self.at.epochs,
            "step": self.at.steps,
            **kept(self.model, masks),
            **(self.penalty.report() if self.penalty else {}),
            **measured,
            **means(self.accelerator.reduce(sums)),
            "sparsity": sparsity_of(masks),
            "parameters": parameters(self.model, masks),
            "weights": weight_histogram(p for p in self.model.parameters() if is_prunable(p)),
        }
        self.rows.append(row)
        # A cut is logged at the same step as the epoch before it: the kind tells them apart.
        numbers = {f"{kind}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
        self.accelerator.log(numbers, step=self.at.steps)
        self.bar.set_postfix(epoch=self.at.epochs, top1=f"{row['top1']:.2f}")
        if self.shown and self.bar.disable:
            print(f"epoch {row['epoch']}, {kind}: Top-1 {row['top1']:.2f} %", file=sys.stderr)

    def _save(self) -> None:
        totals = self.accelerator.reduce(self.totals.clone())
        if self.options.checkpoint is None or not self.accelerator.is_main_process:
            return
        state = {
            "run": self._identity(),
            "position": vars(self.at),
            "rows": self.rows,
            "totals": totals.cpu(),
            "model": self.model.state_dict(),
            "masks": self.masks,
            "start": self.start,
            "optimizer": self.optimizer.state_dict(),
            "penalty": self.penalty.state_dict() if self.penalty else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        save_checkpoint(self.options.checkpoint, state)

    def _identity(self) -> dict[str, Any]:
        """What a run and its checkpoint must agree in."""
        names = ("seed", "batch_size", "precision", "accumulate", "clip", "identity")
        given = {name: getattr(self.options, name) for name in names}
        data = getattr(self.data, "fingerprint", "")
        return {**given, "data": data, "phases": [_in_words(phase) for phase in self.phases]}

    def _resume(self) -> None:
        """Take position, rows, weights and masks from the checkpoint, if there is one."""
        self.saved = load_checkpoint(self.options.checkpoint)
        if not self.saved:
            return
        other, this = self.saved.get("run"), self._identity()
        if other != this:
            raise ValueError(
                f"{self.options.checkpoint} is the checkpoint of another run, of {other}, "
                f"and this is {this}; resume with the settings and the code that began it, "
                "delete it, or choose another file"
            )
        self.at = _Position(**self.saved["position"])
        self.rows = self.saved["rows"]
        self.model.load_state_dict(self.saved["model"])
        self.start = self.saved["start"]
        self.masks = {name: mask.to(self.device) for name, mask in self.saved["masks"].items()}
        if self.share["rank"] == 0:
            self.totals += self.saved["totals"].to(self.device)

    def _restore(self) -> None:
        """Take the states of optimizer, penalty and gradient scaler from the checkpoint, once."""
        if not self.saved:
            return
        self.optimizer.load_state_dict(self.saved["optimizer"])
        if self.penalty:
            self.penalty.load_state_dict(self.saved["penalty"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(self.saved["scaler"])
        self.saved = {}


def _in_words(setting: Any) -> str:
    """A phase, or a setting of one, in words that are the same in every process."""
    if isinstance(setting, Train):
        penalty = f" with {_in_words(setting.penalty)}" if setting.penalty else ""
        kept = ", momentum kept" if setting.keep_momentum else ""
        return f"{setting.epochs} epochs at {_in_words(setting.lr)}{penalty}{kept}"
    if isinstance(setting, Prune):
        by = _in_words(setting.criterion), _in_words(setting.allocation)
        once = ("" if setting.held else ", once") + (", rewound" if setting.rewind else "")
        cut = f"cut {setting.sparsity:g} of {_in_words(setting.structure)}"
        return f"{cut} by {', '.join(by)}{once}"
    if isinstance(setting, partial):
        return f"{_in_words(setting.func)}({_listed(setting.keywords)})"
    if isinstance(setting, FunctionType):
        held = getclosurevars(setting).nonlocals
        plain = {
            n: v for n, v in held.items() if isinstance(v, int | float | str) or is_dataclass(v)
        }
        return setting.__name__ + (f"({_listed(plain)})" if plain else "")
    without_address = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(setting))
    return getattr(setting, "__name__", None) or without_address


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_in_words(value)}" for name, value in settings.items())


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, lists and dicts of them) to `path`."""

    def write(file: Path) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch does not say what the system said
            raise OSError(f"{path} could not be written; is the disk full? ({error})") from error

    write_whole(path, write)


def load_checkpoint(path: Path | None) -> dict[str, Any]:
    """The state in `path`, tensors on the CPU; empty if there is no such file.

    Nothing in the file can run code. ValueError if it is damaged, be it by one bit.
    """
    if path is None or not path.exists():
        return {}
    try:
        with ZipFile(path) as file:
            # torch does not compare checksums, and what it writes is never compressed.
            if file.testzip() or any(part.compress_type for part in file.infolist()):
                raise ValueError("its content does not fit its checksums")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except Exception as error:
        raise ValueError(f"{path} is no readable checkpoint; delete it to start again") from error
    return state


@torch.no_grad()
def weight_histogram(tensors: Iterable[Tensor]) -> dict[str, list[int] | int]:
    """Counts of log10 |w| in equal bins over HISTOGRAM_RANGE, and of zeros beside them.

    Values beyond the range are counted in the bin at its end.
    """
    low, high = HISTOGRAM_RANGE
    flat = torch.cat([torch.zeros(0), *(t.detach().flatten().cpu() for t in tensors)])
    sizes = flat[flat != 0].abs().to(torch.promote_types(flat.dtype, torch.float32))
    share = ((sizes.log10() - low) / (high - low)).clamp(0.0, 1.0)
    bins = (share * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
    counts = torch.bincount(bins, minlength=HISTOGRAM_BINS)
    return {"zeros": int((flat == 0).sum()), "counts": counts.tolist()}
