"""Units: from the labels of a network to what can be removed of it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from swdlib.channels import Follower
from swdlib.labels import FREE, PINNED, Call, Joins, Owner, Place, compressed

ATTEMPTS = 3  # ways to read a line of code that holds a size, before its units are pinned


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
