"""Labels: beside every tensor, for each element, the unit whose removal takes the element away.

Parameters bring the labels in, one for each slice along each dimension. They lie beside storages,
so that views and writes in place need no rule. Labels that must go together are joined.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# The label of what is never removed, and of constants, which take any size. Units count from 1.
PINNED, FREE = 0, -1

# A call in the network's code: its file, its line and its instruction; and the module that runs it.
Call = tuple[str, int, int]
Place = tuple[str, int, int, str]


class Joins:
    """Labels joined into classes; a class is called by its least label."""

    def __init__(self, parent: Tensor | None = None) -> None:
        self.parent = torch.zeros(1, dtype=torch.long) if parent is None else parent

    def add(self, count: int) -> int:
        """The first of `count` new labels."""
        first = len(self.parent)
        self.parent = torch.cat([self.parent, torch.arange(first, first + count)])
        return first

    def find(self, labels: Tensor) -> Tensor:
        """The classes of labels; FREE stays."""
        found = labels.clamp(min=0)
        while not torch.equal(above := self.parent[found], found):
            found = above
        return torch.where(labels < 0, labels, found)

    def join(self, a: Tensor, b: Tensor | int) -> None:
        """Join labels pairwise, broadcast; FREE joins nothing."""
        a, b = torch.broadcast_tensors(a, torch.as_tensor(b))
        assert isinstance(b, Tensor)
        apart = (a >= 0) & (b >= 0) & (a != b)
        a, b = a[apart], b[apart]
        while len(a):
            a, b = self.find(a), self.find(b)
            a, b = a[a != b], b[a != b]
            self.parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")

    def collapse(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """Join all labels along `dims`, which have one element afterwards."""
        varying = [d for d in dims if labels.shape[d] > 1]
        if varying:
            one = labels.amax(varying, keepdim=True)
            self.join(labels, one)
            return one
        return labels


@dataclass
class Owner:
    """A parameter or buffer, and the first label of its slices along each dimension."""

    name: str
    tensor: Tensor
    slices: list[int]
    elements: int = 0  # the first label of its elements, if they are used one by one
    roles: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    seen: bool = False

    def labels(self, dim: int) -> Tensor:
        return torch.arange(self.tensor.shape[dim]) + self.slices[dim]

    @property
    def long(self) -> list[int]:
        """The dimensions of more than one slice."""
        return [d for d, n in enumerate(self.tensor.shape) if n > 1]


@dataclass
class _Beside:
    """The labels of a storage, in the geometry of the tensor that it was made for."""

    alive: StorageWeakRef  # while there is a weak reference, no other storage gets its address
    geometry: tuple[Any, ...]
    labels: Tensor | None  # of size 1 along dimensions along which they do not vary
    flat: Tensor | None = None  # one for each element of the storage, once a view needs them
    loose: bool = False  # whether they are of parameters and buffers alone
    owner: Owner | None = None


def storage_of(tensor: Tensor) -> int:
    """A number for the tensor's storage; 0 if it has none to speak of."""
    strided = tensor.layout == torch.strided and tensor.device.type != "meta"
    return tensor.untyped_storage()._cdata if strided else 0


def geometry_of(tensor: Tensor) -> tuple[Any, ...]:
    size = tensor.element_size()
    length = tensor.untyped_storage().nbytes() // size
    return tensor.shape, tensor.stride(), tensor.storage_offset(), size, length


def compressed(labels: Tensor) -> Tensor:
    """The labels, of size 1 along dimensions along which they do not vary."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
        elif size == 0:
            return torch.full([1] * labels.ndim, FREE)
    return labels


class Labels:
    """The labels of all tensors of a network."""

    def __init__(self, model: nn.Module) -> None:
        self.joins = Joins()
        self.beside: dict[int, _Beside] = {}
        self.owners: dict[str, Owner] = {}
        self.patterns: dict[tuple[Any, ...], tuple[Tensor, set[Place]]] = {}
        self.watch(model)

    # Tensors and their labels ---------------------------------------------------------------------

    def watch(self, model: nn.Module) -> None:
        """Label the slices of all parameters and buffers of `model`."""
        self.names = {id(module): name for name, module in model.named_modules()}
        buffers = dict(model.named_buffers())
        for name, tensor in [*model.named_parameters(), *buffers.items()]:
            owner = self.owners.get(name)
            if owner is None:
                slices = [self.joins.add(size) for size in tensor.shape]
                owner = self.owners[name] = Owner(name, tensor, slices)
            key, shared = storage_of(tensor), self.beside.get(storage_of(tensor))
            if shared and shared.owner is not owner:  # two in one storage, or an odd layout
                self.pin(owner)
            elif key:
                alive = StorageWeakRef(tensor.untyped_storage())
                geometry = geometry_of(tensor)
                self.beside[key] = _Beside(alive, geometry, None, loose=True, owner=owner)

    def of(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor, of size 1 along dimensions along which they do not vary."""
        beside = self.beside.get(storage_of(tensor))
        if beside is None or tensor.numel() == 0:  # a tensor that no operation made
            fixed = tensor.is_floating_point() and tensor.numel() > 1
            return torch.full([1] * tensor.ndim, PINNED if fixed else FREE)
        if beside.owner and beside.labels is None:
            beside.owner.seen = True
            beside.labels = self.of_elements(beside.owner)
        if beside.labels is not None and beside.geometry == geometry_of(tensor):
            return compressed(self.joins.find(beside.labels))
        flat, size = self._flat(beside), beside.geometry[3]
        if tensor.element_size() > size:  # real numbers seen as complex ones
            pairs = flat.reshape(-1, tensor.element_size() // size)
            flat = self.joins.collapse(pairs, [1]).squeeze(1)
        elif tensor.element_size() < size:
            flat = flat.repeat_interleave(size // tensor.element_size())
        view = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return compressed(self.joins.find(compressed(view)))

    def _flat(self, beside: _Beside) -> Tensor:
        if beside.flat is None:
            shape, stride, offset, _, length = beside.geometry
            beside.flat = torch.full([length], FREE)
            assert beside.labels is not None
            beside.flat.as_strided(shape, stride, offset).copy_(beside.labels.expand(shape))
        return beside.flat

    def of_elements(self, owner: Owner) -> Tensor:
        shape, long = owner.tensor.shape, owner.long
        if not owner.tensor.is_floating_point() or not long:
            return torch.full([1] * len(shape), FREE)
        if len(long) == 1:
            return owner.labels(long[0]).reshape(shape)
        if not isinstance(owner.tensor, nn.Parameter):  # an adjacency, positions: not followed
            return torch.full([1] * len(shape), PINNED)
        owner.elements = owner.elements or self.joins.add(prod(shape))
        return (owner.elements + torch.arange(prod(shape))).reshape(shape)

    def put(self, tensor: Tensor, labels: Tensor, loose: bool = False) -> None:
        """Lay labels, which broadcast to it, beside a tensor."""
        key, labels = storage_of(tensor), compressed(labels)
        if labels.numel() == 1 and int(labels) > 0 and not loose:  # a unit that is all of a tensor
            self.joins.join(labels, PINNED)
            labels = torch.full_like(labels, PINNED)
        beside = self.beside.get(key)
        if beside is None or (beside.owner is None and beside.geometry == geometry_of(tensor)):
            if key:
                alive = StorageWeakRef(tensor.untyped_storage())
                self.beside[key] = _Beside(alive, geometry_of(tensor), labels, loose=loose)
        elif beside.owner:  # statistics are written to in training
            self.joins.join(labels, self.of(tensor))
        else:
            where = tensor.shape, tensor.stride(), tensor.storage_offset()
            self._flat(beside).as_strided(*where).copy_(labels.expand(tensor.shape))
            beside.labels, beside.loose = None, beside.loose and loose
        self.record(labels)

    def record(self, labels: Tensor) -> None:
        if labels.numel() > 1 or bool((labels > 0).all()):
            key = (labels.shape, labels.contiguous().numpy().tobytes())
            self.patterns.setdefault(key, (labels, set()))[1].add(place_of(self.names))

    def loose(self, tensor: Tensor) -> bool:
        beside = self.beside.get(storage_of(tensor))
        return beside is not None and beside.loose

    def pin(self, owner: Owner) -> None:
        for dim in owner.long:
            self.joins.join(owner.labels(dim), PINNED)

    def axes(self, tensor: Tensor) -> tuple[Owner, list[tuple[Tensor, int]]] | None:
        """Of a parameter, or of what was cut from it or moved: its owner and, for each dimension,
        the labels of the slices and their dimension in the owner. None of anything else.
        """
        beside = self.beside.get(storage_of(tensor))
        if beside is None or not beside.loose or tensor.element_size() != beside.geometry[3]:
            return None
        owner = beside.owner
        if owner is not None:
            strides = [max(s, 1) for s in owner.tensor.stride()]
            first = tensor.storage_offset() - owner.tensor.storage_offset()
            lines: list[Tensor] = [
                torch.arange(n) * s + first
                for n, s in zip(tensor.shape, tensor.stride(), strict=True)
            ]
        else:
            elements = self.of(tensor).expand(tensor.shape)
            known = [o for o in self.owners.values() if 0 < o.elements <= int(elements.min())]
            owner = max(known, key=lambda o: o.elements, default=None)
            if owner is None or int(elements.max()) >= owner.elements + owner.tensor.numel():
                return None
            elements = elements - owner.elements
            strides = [prod(owner.tensor.shape[d + 1 :]) for d in range(owner.tensor.ndim)]
            lines = [
                elements.movedim(d, 0).reshape(n, -1)[:, 0] for d, n in enumerate(tensor.shape)
            ]
            plain = lines[0][0].expand(tensor.shape)
            for d, line in enumerate(lines):
                plain = plain + (line - line[0]).reshape([-1, *[1] * (tensor.ndim - 1 - d)])
            if not torch.equal(elements, plain):
                return None
        if not isinstance(owner.tensor, nn.Parameter):
            return None
        owner.seen = True
        sizes = owner.tensor.shape
        varies = [
            [p for p in owner.long if (c := line // strides[p] % sizes[p]).min() < c.max()]
            for line in lines
        ]
        used = [p for ps in varies for p in ps]
        if len(used) != len(set(used)):
            return None
        mains = [ps[0] if ps else -1 for ps in varies]
        for p in set(owner.long) - set(mains):  # one slice of many, or columns that are merged
            self.joins.join(owner.labels(p), PINNED)
        return owner, [
            (owner.slices[p] + line // strides[p] % sizes[p], p)
            if p >= 0
            else (torch.full([1], PINNED if len(line) == 1 else FREE), p)
            for line, p in zip(lines, mains, strict=True)
        ]

    def merge(self, operands: Sequence[tuple[Tensor, Sequence[int]]], ndim: int) -> Tensor:
        """Join what meets element by element; what is broadcast over units joins nothing.

        Of units along one dimension and others along another, the fewer are pinned.
        """
        labels = [a.reshape([1] * (ndim - a.ndim) + list(a.shape)) for a, _ in operands]
        sizes = [[1] * (ndim - len(s)) + list(s) for _, s in operands]
        along = [{d for d in range(ndim) if a.shape[d] > 1} for a in labels]
        size, merged = [1] * ndim, torch.full([1] * ndim, FREE)
        for a, of_a, own in sorted(
            zip(labels, sizes, along, strict=True), key=lambda t: -t[0].numel()
        ):
            varies = {d for d in range(ndim) if merged.shape[d] > 1}
            if varies and not any(of_a[d] > 1 for d in varies):
                if own and not any(size[d] > 1 for d in own):
                    self.joins.join(a, PINNED)
            else:
                self.joins.join(merged, a)
                merged = torch.where(merged == FREE, a, merged)
            size = [max(m, n) for m, n in zip(size, of_a, strict=True)]
        return merged


TORCH = os.path.dirname(torch.__file__)
FOLLOWS = ("labels", "channels", "comparing", "units")
HERE = tuple(os.path.join(os.path.dirname(__file__), f"{n}.py") for n in FOLLOWS)


def place_of(names: Mapping[int, str]) -> Place:
    """The call in the network's code that led here, through torch."""
    frame: Any = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((TORCH, *HERE)):
            name = names.get(id(frame.f_locals.get("self")), "")
            return file, frame.f_lineno, frame.f_lasti, name
        frame = frame.f_back
    return "", 0, 0, ""
