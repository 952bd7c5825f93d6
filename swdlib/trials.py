"""Trials: which units a network's own code lets go, found by taking them out and comparing."""

import copy
import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from swdlib.channels import trace
from swdlib.comparing import Decisions, Differs, call, inputs_like, plain, require_equal, tensors_of
from swdlib.cutting import cut, replace, twin
from swdlib.labels import HERE, PINNED, TORCH, Call, Place
from swdlib.units import ATTEMPTS, Found, Units, Untraceable, units

# An attribute of a kind of module, and the line of code that reads a size from it.
Told = tuple[type[nn.Module], str, Call]


@dataclass(frozen=True)
class Held:
    """Units that stay: their groups, the reason, and the line of code that it comes from."""

    names: tuple[str, ...]
    reason: str
    place: Place | None = None

    def __str__(self) -> str:
        where = f" ({self.place[0]}:{self.place[1]})" if self.place else ""
        names = ", ".join(self.names[:3]) + (" and others" if len(self.names) > 3 else "")
        return f"{names}: {self.reason}{where}"


# Trials -------------------------------------------------------------------------------------------


@torch.no_grad()
def telling(model: nn.Module) -> nn.Module:
    """A twin of the model that hides nothing: constants, such as zeros, are drawn at random."""
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        statistic = name.endswith(("running_mean", "running_var"))
        if not tensor.is_floating_point() or not tensor.numel() or tensor.min() != tensor.max():
            continue
        if isinstance(tensor, nn.Parameter) or statistic:
            if tensor.numel() == 1 and tensor.item() != 0:
                continue
            drawn = torch.rand(tensor.shape, generator=generator)
            few = 0.5 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
            zero = tensor.flatten()[0] == 0
            changed[name] = ((2 * drawn - 1) * few if zero else drawn + 0.5).to(tensor)
    other = twin(model)
    replace(other, changed)
    return other


def removable(model: nn.Module, example: Any) -> "Removable":
    """The units of `model` that can be removed, and what has to stay though labels let it go.

    `example` is an input: a tensor, a tuple of arguments, or a dict of keyword arguments. Each
    group has lost either half of its units on a copy, and the outputs were those of the masked
    network. Raises Untraceable for a network that does not run on the example.
    """
    return _Trials(model, example).run()


class _Trials:
    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = telling(model).eval()
        try:
            example = self._few(example)
            self.labels = trace(self.model, [example])
            self.examples = inputs_like(example, self.labels.ranges, 4)
            if self.labels.steered:
                self.labels = trace(self.model, [example, *self.examples])
        except Exception as error:  # the network raises what it likes
            raise Untraceable(
                f"the channels of {type(model).__name__} cannot be followed, since it does not run "
                f"on the example ({error!r}); give the model an example that it takes, or use "
                "structures that need none: weights, kernels, blocks, n_of_m"
            ) from error
        self.choice: dict[Call, int] = {}
        self.told: set[Told] = set()
        self.asked: set[tuple[type[nn.Module], Call, int]] = set()
        self.held: list[Held] = []
        self._hold_unseen(example)

    def _few(self, example: Any) -> Any:
        """Two images are enough, if the network takes them."""
        if isinstance(example, Tensor) and example.ndim and len(example) > 2:
            with suppress(Exception), plain(Decisions()):
                call(self.model, example[:2])
                return example[:2]
        return example

    def _hold_unseen(self, example: Any) -> None:
        """Follow what only training runs; hold what neither runs, and all that may feed it."""

        def unseen() -> list[Any]:
            owners = self.labels.owners.values()
            return [o for o in owners if not o.seen and isinstance(o.tensor, nn.Parameter)]

        if unseen():
            trained = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()}).train()
            self.labels.watch(trained)
            double = tree_map(
                lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim else x, example
            )
            with suppress(Exception), plain(self.labels):  # it may not train on such a batch
                output = call(trained, double)
                for tensor in tensors_of(output):
                    self.labels.joins.join(self.labels.of(tensor), PINNED)
        if missed := unseen():
            widths = {n for o in missed for n in o.tensor.shape[:2] if n > 1}
            joins = self.labels.joins
            for owner in self.labels.owners.values():
                for dim in owner.long:
                    if owner in missed or any(_feeds(owner.tensor.shape[dim], w) for w in widths):
                        joins.join(owner.labels(dim), PINNED)
            self.held.append(
                Held(
                    tuple(o.name for o in missed),
                    "the example does not run it, so that nothing tells what it reads, and layers "
                    "of its width stay: give an example that runs it, or remove it",
                )
            )

    def run(self) -> "Removable":
        now = units(self.labels, self.choice)
        while (failure := self.failure(now, now.found)) is not None:
            bad, failure = self._narrowed(now, failure)
            now = self._without(now, bad, failure)
        return Removable(now, self.told, self.held)

    def _narrowed(self, now: Units, failure: "Failure") -> tuple[Found, "Failure"]:
        """A group without which the trial would not have failed like this."""
        good: list[Found] = []
        rest = list(now.found)
        while len(rest) > 1:
            half = rest[: len(rest) // 2]
            error = self.failure(now, [*good, *half])
            if error is None:
                good, rest = [*good, *half], rest[len(half) :]
            else:
                rest, failure = half, error
        return rest[0], failure

    def _without(self, now: Units, bad: Found, failure: "Failure") -> Units:
        """The units once a size in the code is told, or read another way, or the group is held."""
        if self._tell(now, bad, failure):
            return now
        line = failure.place[:3] if failure.place else ("", 0, 0)
        holds = line in {p[:3] for p in bad.places}
        lines = {line} if holds else {p[:3] for p in bad.places} & self._options()
        while any(self.choice.get(p, 0) < ATTEMPTS - 1 for p in lines):
            for p in lines:
                self.choice[p] = self.choice.get(p, 0) + 1
            then = units(self.labels, self.choice)
            if [(f.name, f.count) for f in then.found] != [(f.name, f.count) for f in now.found]:
                return then
        if holds:
            self.choice[line] = ATTEMPTS
            then = units(self.labels, self.choice)
            left = {f.name for f in then.found}
            names = tuple(f.name for f in now.found if f.name not in left)
            if bad.name in names:
                self.held.append(Held(names, failure.reason, failure.place))
                return then
        for part in bad.parts:
            owner = self.labels.owners[part.name]
            self.labels.joins.join(owner.labels(part.dim)[part.units >= 0], PINNED)
        self.held.append(Held((bad.name,), failure.reason, failure.place))
        return units(self.labels, self.choice)

    def _tell(self, now: Units, bad: Found, failure: "Failure") -> bool:
        """Whether the group can go if modules of this kind are told sizes that they hold."""
        kind, place = failure.kind, failure.place
        if kind is None or place is None:
            return False
        asked = kind, place[:3], self.choice.get(place[:3], 0)
        if asked in self.asked:
            return False
        self.asked.add(asked)
        module = self.model.get_submodule(place[3])
        sizes = now.sizes(self._kept(now, now.found, 0)).get(place, {})
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and any(v in sizes for v in _numbers(value))
        ]
        heads = [n for n in names if "head" in n or not isinstance(getattr(module, n), int)]
        for chosen in (names, heads):
            added = {(kind, name, place[:3]) for name in chosen} - self.told
            self.told |= added
            error = self.failure(now, [bad]) if added else failure
            if error is None or error.place not in (None, failure.place):
                return True
            self.told -= added
        return False

    def _kept(self, now: Units, found: Sequence[Found], half: int) -> dict[tuple[str, int], Tensor]:
        """What stays if one part of each group's units goes, or the rest."""
        gone = []
        for group in found:  # not as many of each: code may rely on pieces of one size
            first = int((group.parts[0].units >= 0).int().argmax())
            generator = torch.Generator().manual_seed(zlib.crc32(f"{group.name} {first}".encode()))
            share = 0.3 + 0.4 * float(torch.rand((), generator=generator))
            drawn = torch.randperm(group.count, generator=generator)
            few = min(max(round(share * group.count), 1), group.count - 1)
            gone.append(((drawn < few) == (half == 0)) & (group.count > 1))
        return kept_of(found, gone)

    def _options(self) -> set[Call]:
        """Lines whose size can be read in several ways."""
        several = {place[:3] for _, place in self.labels.splits}
        for seen, places in self.labels.patterns.values():
            if sum(n > 1 for n in seen.shape) > 1:
                several |= {p[:3] for p in places}
        return several

    def failure(self, now: Units, found: Sequence[Found]) -> "Failure | None":
        """What goes wrong if one half of each group's units is removed, or the other."""
        for half in (0, 1):
            kept = self._kept(now, found, half)
            small, masked = twin(self.model), twin(self.model)
            try:
                mask(masked, kept)
                Removable(now, self.told, []).cut(small, kept)
                require_equal(small, masked, self.examples[half::2][:1])
            except Exception as error:
                return Failure.of(error, small)
        return None


@dataclass(frozen=True)
class Removable:
    """The units of a model that can be removed, and what has to stay though labels let it go.

    `told` are the attributes that modules of a kind must be told when units go.
    """

    units: Units
    told: set[Told]
    held: list[Held]

    @property
    def found(self) -> list[Found]:
        return self.units.found

    def cut(self, model: nn.Module, kept: Mapping[tuple[str, int], Tensor]) -> None:
        """Cut a copy of the model, in place, down to the kept slices."""
        sizes = self.units.sizes(kept) if self.told else {}
        cut(model, kept)
        for name, module in model.named_modules():
            for kind, attribute, line in self.told:
                if type(module) is kind and (*line, name) in sizes:
                    value = _told(getattr(module, attribute), sizes[(*line, name)])
                    setattr(module, attribute, value)


def _feeds(count: int, width: int) -> bool:
    """Whether so many channels, or square maps of them that are flattened, are of the width."""
    return width % count == 0 and math.isqrt(width // count) ** 2 == width // count


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if type(v) is int and v > 1]


def _told(value: Any, sizes: Mapping[int, set[int]]) -> Any:
    """A size, or several, with those that have changed in one way changed."""
    if isinstance(value, list | tuple):
        return type(value)(_told(v, sizes) for v in value)
    changed = sizes.get(value, set()) if type(value) is int else set()
    return next(iter(changed)) if len(changed) == 1 else value


def kept_of(found: Sequence[Found], gone: Sequence[Tensor]) -> dict[tuple[str, int], Tensor]:
    """(Name, dimension) -> which slices stay, if the units `gone` of each group go."""
    kept: dict[tuple[str, int], Tensor] = {}
    for group, dropped in zip(found, gone, strict=True):
        for part in group.parts:
            key = part.name, part.dim
            kept[key] = kept.get(key, torch.ones(len(part.units), dtype=torch.bool))
            kept[key] = kept[key] & ~part.slices(dropped)
    return kept


@torch.no_grad()
def mask(model: nn.Module, kept: Mapping[tuple[str, int], Tensor]) -> None:
    """Put zeros, in copies of the parameters, where `cut` would remove slices."""
    parameters = dict(model.named_parameters())
    changed: dict[str, Tensor] = {}
    for (name, dim), stays in kept.items():
        if name in parameters and not stays.all():
            if name not in changed:
                changed[name] = parameters[name].detach().clone()
            gone = (~stays).nonzero().squeeze(1).to(changed[name].device)
            changed[name].index_fill_(dim, gone, 0)
    replace(model, changed)


@dataclass(frozen=True)
class Failure:
    """Why a smaller network is not the masked one, and the place and module whose code says so."""

    reason: str
    place: Place | None = None
    kind: type[nn.Module] | None = None

    @classmethod
    def of(cls, error: Exception, model: nn.Module) -> "Failure":
        if isinstance(error, Differs):
            return cls(f"without them the network computes something else: {error}")
        names = {id(module): name for name, module in model.named_modules()}
        place: Place | None = None
        kind: type[nn.Module] | None = None
        step = error.__traceback__
        while step is not None:
            frame = step.tb_frame
            if not frame.f_code.co_filename.startswith((TORCH, *HERE)):
                owner = frame.f_locals.get("self")
                name = names.get(id(owner), "")
                place = (frame.f_code.co_filename, step.tb_lineno, step.tb_lasti, name)
                kind = None
                if isinstance(owner, nn.Module) and id(owner) in names:
                    kind = type(owner)
            step = step.tb_next
        return cls(
            f"the code holds their number: {' '.join(str(error).split())[:150]}", place, kind
        )
