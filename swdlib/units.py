"""Units: what can be removed of a network, by its labels, and by trials of what its code allows."""

import copy
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from swdlib.channels import Follower, trace
from swdlib.comparing import (
    Decisions,
    Differs,
    call,
    cut,
    inputs_like,
    mask,
    plain,
    replace,
    require_equal,
    tensors_of,
    twin,
)
from swdlib.labels import FREE, HERE, PINNED, TORCH, Call, Joins, Owner, Place, compressed

# An attribute of a kind of module, and the line of code that reads a size from it.
Told = tuple[type[nn.Module], str, Call]

ATTEMPTS = 3  # ways to read a line of code that holds a size, before its units are pinned


# What the labels let go together ------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Slices of a parameter along `dim`; slice i belongs to unit `units[i]`, or to none if -1.

    `role` is "weight" for what makes a channel, "input" for what reads it, "tied" for both, "scale"
    and "shift" for what normalises it or is added to it, "buffer" for statistics.
    """

    name: str
    parameter: Tensor
    dim: int
    units: Tensor
    role: str

    def slices(self, chosen: Tensor) -> Tensor:
        """Which slices belong to the units that a bool tensor (units,) chooses: one (slices,)."""
        extended = torch.cat([chosen, chosen.new_zeros(1)])  # index -1, of no unit, is False
        return extended[self.units.to(chosen.device)]


@dataclass(frozen=True)
class Found:
    """`count` units of one kind ("filter", "channel" or "head") and the slices that they own.

    `places` are the lines of the network's code that see these units.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    count: int
    places: frozenset[Place] = frozenset()


class Untraceable(ValueError):
    """The channels of a network cannot be followed."""


@dataclass(frozen=True)
class Units:
    """The units of a model, and the labels that they come from."""

    found: list[Found]
    labels: Follower
    joins: Joins

    def sizes(self, kept: Mapping[tuple[str, int], Tensor]) -> dict[Place, dict[int, set[int]]]:
        """What becomes of the sizes that each line of code sees, if only `kept` slices stay."""
        stays = torch.ones(len(self.joins.parent) + 1, dtype=torch.bool)  # the last one is FREE
        for (name, dim), slices in kept.items():
            stays[self.joins.find(self.labels.owners[name].labels(dim))] = slices
        sizes: dict[Place, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        for labels, places in self.labels.patterns.values():
            found = compressed(self.joins.find(labels))
            left = stays[found]
            for dim, size in enumerate(found.shape):
                if size > 1:
                    count = int(left.movedim(dim, 0).reshape(size, -1).any(1).sum())
                    for place in places:
                        sizes[place][size].add(count)
        return sizes


def units(labels: Follower, choice: Mapping[Call, int] | None = None) -> Units:
    """The units that can be removed, those that own slices of the same parameters together.

    `choice` says, of lines that hold a size, which way to read them; ATTEMPTS pins their units.
    """
    choice = choice or {}
    joins = Joins(labels.joins.parent.clone())
    for pieces, place in labels.splits:
        if choice.get(place[:3], 0) == 1:
            joins.collapse(pieces, [0])
    for owner in labels.owners.values():
        if owner.elements:
            labels.record(labels.of_elements(owner))
    before = None
    while before is None or not torch.equal(before, joins.parent):
        before = joins.parent.clone()
        for seen, places in labels.patterns.values():
            _square(joins, compressed(joins.find(seen)), max(choice.get(p[:3], 0) for p in places))
        for one, other, size in labels.later:
            _meet(joins, compressed(joins.find(one)), other, size)
        for owner in labels.owners.values():
            if owner.elements:
                _slice(joins, owner)
    return Units(list(_grouped(labels, joins)), labels, joins)


def _square(joins: Joins, labels: Tensor, attempt: int) -> None:
    """Join what would leave a tensor with holes, and pin a unit that is all of a tensor."""
    varying = [d for d, n in enumerate(labels.shape) if n > 1]
    if attempt >= ATTEMPTS or not varying:
        joins.join(labels, PINNED)
    if len(varying) < 2 or _is_square(labels, varying):
        return

    # The units run along one dimension: first the one that leaves most of them.
    def count(dim: int) -> int:
        along = labels.movedim(dim, 0).flatten(1)
        return int(((along != PINNED).all(1) & (along > 0).any(1)).sum())

    order = sorted(varying, key=count, reverse=True)
    kept = order[min(attempt, len(order) - 1)]
    joins.collapse(labels, [d for d in varying if d != kept])


def _is_square(labels: Tensor, varying: Sequence[int]) -> bool:
    """Whether each class fills whole slices along one dimension; FREE fills any."""
    values, index = labels.unique(return_inverse=True)
    size = index.flatten().bincount(minlength=len(values))
    free = labels == FREE
    whole = values <= PINNED
    for dim in varying:
        n = labels.shape[dim]
        place = torch.arange(n).reshape([-1 if d == dim else 1 for d in range(labels.ndim)])
        held = torch.zeros(len(values), n, dtype=torch.long)
        held[index.flatten(), place.expand(labels.shape).flatten()] = 1
        filled = held @ free.movedim(dim, 0).flatten(1).sum(1)
        whole |= size + filled == held.sum(1) * (labels.numel() // n)
    return bool(whole.all())


def _meet(joins: Joins, one: Tensor, other: Tensor, size: Sequence[int]) -> None:
    ndim = max(one.ndim, other.ndim)
    one, other = (a.reshape([1] * (ndim - a.ndim) + list(a.shape)) for a in (one, other))
    sizes = [1] * (ndim - len(size)) + list(size)
    if any(one.shape[d] > 1 and sizes[d] > 1 for d in range(ndim)):
        joins.join(one, other)
    else:
        joins.join(other, PINNED)


def _slice(joins: Joins, owner: Owner) -> None:
    """Join the slices of a parameter whose elements are used one by one with the elements."""
    shape = owner.tensor.shape
    elements = joins.find(owner.elements + torch.arange(prod(shape))).reshape(shape)
    for dim in owner.long:
        along = elements.movedim(dim, 0).flatten(1)
        alike = (along == along[:, :1]).all(1)
        joins.join(owner.labels(dim), torch.where(alike, along[:, 0], PINNED))
        owner.roles[dim].add("shift")


def _grouped(labels: Follower, joins: Joins) -> Iterator[Found]:
    heads = set(joins.find(torch.cat([*labels.heads, torch.zeros(1).long()])).tolist())
    owned: dict[int, list[tuple[int, int]]] = {}
    slices: list[tuple[Owner, int, str, Tensor]] = []
    for owner in labels.owners.values():
        for dim in owner.long:
            role = _role(owner, dim)
            unit = joins.find(owner.labels(dim))
            if role and bool((unit > 0).any()):
                values, counts = unit.unique(return_counts=True)
                for u, held in zip(values.tolist(), counts.tolist(), strict=True):
                    if u > 0:
                        owned.setdefault(u, []).append((len(slices), held))
                slices.append((owner, dim, role, unit))
    seen: dict[int, set[Place]] = defaultdict(set)
    for pattern, places in labels.patterns.values():
        for u in joins.find(pattern).unique().tolist():
            seen[u] |= places
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for u, held in owned.items():
        alike.setdefault(tuple(held), []).append(u)
    for common, us in alike.items():
        us = sorted(us)
        order = torch.full([len(joins.parent)], -1)
        order[torch.tensor(us)] = torch.arange(len(us))
        parts = tuple(
            Part(o.name, o.tensor, dim, order[unit], role)
            for o, dim, role, unit in (slices[i] for i, _ in common)
        )
        made = [p.name for p in parts if p.role in ("weight", "tied")]
        if not made or not any(p.role in ("input", "tied") for p in parts):
            continue  # nothing computes these channels, or nothing reads them
        kind = "filter" if labels.filters & set(made) else "channel"
        kind = "head" if heads & set(us) else kind
        lines = frozenset(p for u in us for p in seen[u])
        yield Found(made[0].removesuffix(".in_proj_weight"), kind, parts, len(us), lines)


def _role(owner: Owner, dim: int) -> str:
    roles = owner.roles.get(dim, set())
    if not isinstance(owner.tensor, nn.Parameter):
        return "buffer" if owner.seen and len(owner.long) == 1 else ""
    if {"weight", "input"} <= roles:
        return "tied"
    known = [r for r in ("weight", "input", "scale", "shift") if r in roles]
    return known[0] if known else "shift" if owner.seen and len(owner.long) == 1 else ""


# What the code allows: trials ---------------------------------------------------------------------


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
    network. Raises Untraceable for a network that does not run on the example. What was found holds
    for the same model and example until a module or a shape changes.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    modules = [(name, id(module)) for name, module in model.named_modules()]
    seen = modules, [(name, tensor.shape) for name, tensor in tensors]
    before, of, found = _known.get(model, (None, None, None))
    if found is None or of is not example or before != seen:
        found = _Trials(model, example).run()
        _known[model] = seen, example, found
    return found


# What the last call found of each model that is still in use. It holds no module.
_known: WeakKeyDictionary[nn.Module, tuple[Any, Any, "Removable"]] = WeakKeyDictionary()


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
        self.labels.beside.clear()  # which only the passes needed
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
