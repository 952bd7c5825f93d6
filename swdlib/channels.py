"""Channels: which slices of which parameters can only be removed together.

One forward pass on an example shows it. Beside every tensor lies a tensor of labels of its shape:
the number of the unit whose removal takes the element away. Parameters bring the labels in, one for
each slice along each dimension; operations carry them on and join those that must go together, by
the rules in RULES. What no rule knows pins its labels: a missing rule costs units, never exactness.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# The label of what is never removed, and of constants, which take any size. Units count from 1.
PINNED, FREE = 0, -1
ATTEMPTS = 3  # ways to read a line of code that holds a size, before its units are pinned

Place = tuple[str, int]  # a file and a line of the network's code


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
class _Owner:
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
    owner: _Owner | None = None


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
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


class Labels(TorchDispatchMode):
    """Follows the labels of a model's parameters through all operations that run under it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.joins = Joins()
        self.beside: dict[int, _Beside] = {}
        self.owners: dict[str, _Owner] = {}
        # What parameters meet element by element: joined at the end, along dimensions in which the
        # other still varies. A weight for each of a head's features does not tie the heads.
        self.later: list[tuple[Tensor, Tensor, Sequence[int]]] = []
        self.patterns: dict[tuple[Any, ...], tuple[Tensor, set[Place]]] = {}
        self.splits: list[tuple[Tensor, Place]] = []  # (pieces, ...) of one size
        self.heads: list[Tensor] = []
        self.filters: set[str] = set()
        self.ranges: dict[int, int] = {}  # of ids, by the storage that embeddings read them from
        self.steered = False  # whether a value decided which way the code took
        self.watch(model)

    # Tensors and their labels ---------------------------------------------------------------------

    def watch(self, model: nn.Module) -> None:
        """Label the slices of all parameters and buffers of `model`."""
        buffers = {f"{n}": b for n, b in model.named_buffers() if b is not None}
        for name, tensor in [*model.named_parameters(), *buffers.items()]:
            owner = self.owners.get(name)
            if owner is None:
                slices = [self.joins.add(size) for size in tensor.shape]
                owner = self.owners[name] = _Owner(name, tensor, slices)
            key, shared = self._key(tensor), self.beside.get(self._key(tensor))
            if shared and shared.owner is not owner:  # two in one storage, or an odd layout
                self._pin(owner)
            elif key:
                alive = StorageWeakRef(tensor.untyped_storage())
                geometry = _geometry(tensor)
                self.beside[key] = _Beside(alive, geometry, None, loose=True, owner=owner)

    @staticmethod
    def _key(tensor: Tensor) -> int:
        strided = tensor.layout == torch.strided and tensor.device.type != "meta"
        return tensor.untyped_storage()._cdata if strided else 0

    def of(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor, of size 1 along dimensions along which they do not vary."""
        beside = self.beside.get(self._key(tensor))
        if beside is None or tensor.numel() == 0:  # a tensor that no operation made
            fixed = tensor.is_floating_point() and tensor.numel() > 1
            return torch.full([1] * tensor.ndim, PINNED if fixed else FREE)
        if beside.owner and beside.labels is None:
            beside.owner.seen = True
            beside.labels = self._of_elements(beside.owner)
        if beside.labels is not None and beside.geometry == _geometry(tensor):
            return beside.labels
        flat, size = self._flat(beside), beside.geometry[3]
        if tensor.element_size() > size:  # real numbers seen as complex ones
            pairs = flat.reshape(-1, tensor.element_size() // size)
            flat = self.joins.collapse(pairs, [1]).squeeze(1)
        elif tensor.element_size() < size:
            flat = flat.repeat_interleave(size // tensor.element_size())
        view = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return compressed(view)

    def _flat(self, beside: _Beside) -> Tensor:
        if beside.flat is None:
            shape, stride, offset, _, length = beside.geometry
            beside.flat = torch.full([length], FREE)
            assert beside.labels is not None
            beside.flat.as_strided(shape, stride, offset).copy_(beside.labels.expand(shape))
        return beside.flat

    def _of_elements(self, owner: _Owner) -> Tensor:
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
        key, labels = self._key(tensor), compressed(labels)
        if labels.numel() == 1 and int(labels) > 0 and not loose:  # a unit that is all of a tensor
            self.joins.join(labels, PINNED)
            labels = torch.full_like(labels, PINNED)
        beside = self.beside.get(key)
        if beside is None or beside.owner is None and beside.geometry == _geometry(tensor):
            if key:
                alive = StorageWeakRef(tensor.untyped_storage())
                self.beside[key] = _Beside(alive, _geometry(tensor), labels, loose=loose)
        elif beside.owner:  # statistics are written to in training
            self.joins.join(labels, self.of(tensor))
        else:
            view = self._flat(beside).as_strided(
                tensor.shape, tensor.stride(), tensor.storage_offset()
            )
            view.copy_(labels.expand(tensor.shape))
            beside.labels, beside.loose = None, beside.loose and loose
        self._record(labels)

    def _record(self, labels: Tensor) -> None:
        if labels.numel() > 1 or bool((labels > 0).all()):
            key = (labels.shape, labels.contiguous().numpy().tobytes())
            self.patterns.setdefault(key, (labels, set()))[1].add(place_of(sys._getframe()))

    def _loose(self, tensor: Tensor) -> bool:
        beside = self.beside.get(self._key(tensor))
        return beside is not None and beside.loose

    def _pin(self, owner: _Owner) -> None:
        for dim in owner.long:
            self.joins.join(owner.labels(dim), PINNED)

    def axes(self, tensor: Tensor) -> tuple[_Owner, list[tuple[Tensor, int]]] | None:
        """Of a parameter, or of what was cut from it or moved: its owner and, for each dimension,
        the labels of the slices and their dimension in the owner. None of anything else.
        """
        beside = self.beside.get(self._key(tensor))
        if beside is None or not beside.loose or tensor.element_size() != beside.geometry[3]:
            return None
        starts = [torch.arange(n) for n in tensor.shape]
        if owner := beside.owner:
            if not isinstance(owner.tensor, nn.Parameter):
                return None
            strides = [max(s, 1) for s in owner.tensor.stride()]
            first = tensor.storage_offset() - owner.tensor.storage_offset()
            lines = [first + i * s for i, s in zip(starts, tensor.stride(), strict=True)]
        else:
            labels = self.of(tensor).expand(tensor.shape)
            low = int(labels.min())
            found = [o for o in self.owners.values() if 0 < o.elements <= low]
            owner = max(found, key=lambda o: o.elements, default=None)
            if owner is None or int(labels.max()) >= owner.elements + owner.tensor.numel():
                return None
            strides = [prod(owner.tensor.shape[d + 1 :]) for d in range(owner.tensor.ndim)]
            lines = [labels[(0,) * d][(slice(None), *(0,) * (tensor.ndim - d - 1))]
                     for d in range(tensor.ndim)]
            lines = [line - owner.elements for line in lines]
            first = int(labels.flatten()[0]) - owner.elements
            offsets = sum(
                (line - first).reshape([-1] + [1] * (tensor.ndim - 1 - d))
                for d, line in enumerate(lines)
            )
            if not torch.equal(labels - owner.elements, (offsets + first).expand(tensor.shape)):
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

    # Operations -----------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        arguments = func._schema.arguments
        bound = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._schema.name.split("::")[-1]
        if name == "_local_scalar_dense":
            self.steered |= bool((self.of(args[0]) != FREE).all())
            return out
        if not func._schema.is_mutable and all(self._key(t) in self.beside for t in made):
            self._see(name, bound, made)
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        plain = [i for i in inputs if not self._loose(i)]
        loose = len(plain) < len(inputs) and all(bool((self.of(i) == FREE).all()) for i in plain)
        weighty = any(self._loose(i) for i in inputs)
        if not weighty and not any(bool((self.of(i) > 0).any()) for i in plain):
            fixed = any(bool((self.of(i) == PINNED).any()) for i in plain)
            found = [torch.full([1] * t.ndim, PINNED if fixed else FREE) for t in made]
        else:
            name = name.removesuffix("_") if func._schema.is_mutable else name
            pointwise = torch.Tag.pointwise in func.tags
            rule = RULES.get(name, Labels._pointwise if pointwise else Labels._unknown)
            given = rule(self, _Operation(func, name, bound, inputs, made))
            loose &= rule in (Labels._pointwise, Labels._move)
            found = given if isinstance(given, list) else [given] * len(made)
        for tensor, labels in zip(made, found, strict=False):
            if labels.ndim != tensor.ndim:  # a second output, such as statistics
                labels = torch.full([1] * tensor.ndim, PINNED)
            self.put(tensor, labels, loose)
        return out

    def _see(self, name: str, bound: Mapping[str, Any], views: list[Tensor]) -> None:
        """Note how a view arranges labels, and pieces of one size, which code may rely on."""
        if self.beside[self._key(views[0])].owner if views else True:
            return
        for view in views[:8]:
            self._record(self.of(view))
        labels, dim = [self.of(v) for v in views], bound.get("dim", 0)
        if "split" in name and len({v.shape for v in views}) == 1 and labels[0].shape[dim] > 1:
            self.splits.append((torch.stack(labels), place_of(sys._getframe())))
        elif name == "slice" and labels[0].shape[dim] > 1:
            whole, count = bound["self"].shape[dim], views[0].shape[dim]
            if count < whole and whole % count == 0 and bound.get("step", 1) == 1:
                pieces = self.of(bound["self"]).unflatten(dim, (whole // count, count))
                self.splits.append((pieces.movedim(dim, 0), place_of(sys._getframe())))

    def _merge(self, operands: Sequence[tuple[Tensor, Sequence[int]]], ndim: int) -> Tensor:
        """Join what meets element by element; what is broadcast over units joins nothing."""
        labels = [a.reshape([1] * (ndim - a.ndim) + list(a.shape)) for a, _ in operands]
        sizes = [[1] * (ndim - len(s)) + list(s) for _, s in operands]
        varying = [d for d in range(ndim) if any(a.shape[d] > 1 for a in labels)]
        merged = torch.full([1] * ndim, FREE)
        for a, size in zip(labels, sizes, strict=True):
            if not varying or any(size[d] > 1 for d in varying):
                self.joins.join(merged, a)
                merged = torch.where(merged == FREE, a, merged)
        return merged

    def meet(self, tensors: Sequence[Tensor | None], ndim: int, at: int | None = None) -> Tensor:
        """The labels of operands that meet element by element, a vector along dimension `at`."""
        units, others = [], []
        for tensor in tensors:
            if tensor is None or (labels := self.of(tensor)).eq(FREE).all():
                continue
            size = list(tensor.shape)
            if at is not None and tensor.ndim == 1:
                behind = [1] * (ndim - 1 - at)
                labels, size = labels.reshape(-1, *behind), [*size, *behind]
            fixed = self._loose(tensor) or not (labels > 0).any()
            (others if fixed else units).append((labels, size))
        if not units:
            return self._merge(others, ndim)
        merged = self._merge(units, ndim)
        self.later += [(merged, labels, size) for labels, size in others]
        return merged

    def _pointwise(self, op: "_Operation") -> Tensor:
        inputs = [i for i in op.inputs if i is not op.bound.get("out")]
        return self.meet(inputs, op.made[0].ndim)

    def _copy(self, op: "_Operation") -> Tensor:
        return self.of(op.inputs[1])

    def _fill(self, op: "_Operation") -> Tensor:
        return self.of(op.inputs[0])

    def _unknown(self, op: "_Operation") -> list[Tensor]:
        for tensor in op.inputs:
            beside = self.beside.get(self._key(tensor))
            if beside is not None and beside.owner:
                beside.owner.seen = True
                self._pin(beside.owner)
            else:
                self.joins.join(self.of(tensor), PINNED)
        return [torch.full([1] * t.ndim, PINNED) for t in op.made]

    def _move(self, op: "_Operation") -> Tensor:
        """Data movement: the labels are moved as the elements are."""
        data = op.bound["self"]
        labels = self.of(data)
        if op.name in ("index", "index_select", "gather") and not self._loose(data):
            dims = [op.bound["dim"]] if "dim" in op.bound else [
                d for d, i in enumerate(op.bound["indices"]) if i is not None
            ]
            if any(labels.shape[d] > 1 for d in dims):  # the code holds positions
                self.joins.join(labels, PINNED)
        if op.name == "index" and any(i is not None and i.numel() == 0 for i in op.bound["indices"]):
            return torch.full([1] * op.made[0].ndim, PINNED)
        labels = labels.expand(data.shape)
        rest = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x,
                        {k: v for k, v in op.bound.items() if k != "self"})
        try:
            return op.func(labels, **rest)
        except RuntimeError:  # not for whole numbers; what is padded becomes FREE
            return (op.func((labels + 2).double(), **rest) - 2).long().clamp(min=FREE)

    def _joined(self, op: "_Operation") -> Tensor:
        """Concatenation; where no units lie along its dimension, the pieces meet."""
        tensors = [t for t in op.bound["tensors"] if t.numel()]
        dim = op.bound.get("dim", 0) % op.made[0].ndim
        if op.name == "stack":
            labels = [self.of(t).unsqueeze(dim) for t in tensors]
            sizes = [t.unsqueeze(dim).shape for t in tensors]
        else:
            labels, sizes = [self.of(t) for t in tensors], [t.shape for t in tensors]
        if all(a.shape[dim] == 1 for a in labels):
            flat = [[1 if d == dim else n for d, n in enumerate(size)] for size in sizes]
            return self._merge(list(zip(labels, flat, strict=True)), op.made[0].ndim)
        # Constants beside units have a size of their own.
        full = [a.masked_fill(a == FREE, PINNED) for a in labels]
        return torch.cat([a.expand(s) for a, s in zip(full, sizes, strict=True)], dim)

    def _padded(self, op: "_Operation") -> Tensor:
        labels, pad = self.of(op.bound["self"]), op.bound["pad"]
        for i in range(len(pad) // 2):
            dim = labels.ndim - 1 - i
            if labels.shape[dim] > 1:
                before, after = pad[2 * i], pad[2 * i + 1]
                labels = nn.functional.pad(labels, [0, 0] * i + [before, after], value=PINNED)
        return labels

    def _reduced(self, op: "_Operation") -> list[Tensor]:
        """What is reduced, sorted or normalised together goes together."""
        tensor = op.bound["self"]
        dims = op.bound.get("dim")
        if dims is None or dims == []:
            dims = range(tensor.ndim)
        dims = [dims] if isinstance(dims, int) else list(dims)
        dims = [d % max(tensor.ndim, 1) for d in dims]
        labels = self.joins.collapse(self.of(tensor), dims)
        less = [i for i in range(tensor.ndim) if i not in dims]
        return [
            labels if t.ndim == tensor.ndim else labels.permute(*less, *dims).reshape(
                [labels.shape[i] for i in less])
            for t in op.made
        ]

    def _spatial(self, op: "_Operation") -> Tensor:
        """Pooling, resizing: places mix, channels do not."""
        tensor = op.inputs[0]
        places = next((int(c) for c in op.name if c.isdigit()), tensor.ndim - 2)
        return self.joins.collapse(self.of(tensor), range(tensor.ndim)[-places:])

    def _regions(self, op: "_Operation") -> Tensor:
        return self.joins.collapse(self.of(op.inputs[0]), [0, 2, 3])

    def _scattered(self, op: "_Operation") -> Tensor:
        target = op.bound["self"]
        source = op.bound.get("src", op.bound.get("source", op.bound.get("values")))
        if "indices" in op.bound:
            dims = [d for d, i in enumerate(op.bound["indices"]) if i is not None]
            if dims != list(range(len(dims))):
                return self._unknown(op)[0]
        else:
            dims = [op.bound["dim"] % target.ndim]
        labels = self.joins.collapse(self.of(target), dims)
        if isinstance(source, Tensor):
            given = self.of(source)
            if "indices" in op.bound:
                keep = target.ndim - len(dims)
                given = self.joins.collapse(given, range(given.ndim - keep))
                given = given.reshape(given.shape[given.ndim - keep :])
            else:
                given = self.joins.collapse(given, dims)
            self.joins.join(labels, given)
            labels = torch.where(labels == FREE, given, labels)
        return labels

    def _gated(self, op: "_Operation") -> Tensor:
        dim = op.bound.get("dim", -1)
        labels = self.of(op.bound["self"])
        if labels.shape[dim] == 1:
            return labels
        one, other = labels.chunk(2, dim)
        self.joins.join(one, other)
        return one

    def _layer_norm(self, op: "_Operation") -> list[Tensor]:
        x = op.bound["input"]
        over = range(x.ndim)[-len(op.bound["normalized_shape"]) :]
        labels = self.joins.collapse(self.of(x), over)
        return self._normed(op, labels, None)

    def _batch_norm(self, op: "_Operation") -> list[Tensor]:
        x, labels = op.bound["input"], self.of(op.bound["input"])
        if op.bound.get("training", "running_mean" not in op.bound):
            labels = self.joins.collapse(labels, [d for d in range(x.ndim) if d != 1])
        return self._normed(op, labels, 1)

    def _group_norm(self, op: "_Operation") -> list[Tensor]:
        x, groups = op.bound["input"], op.bound["group"]
        labels = self.joins.collapse(self.of(x), range(2, x.ndim))
        if labels.shape[1] > 1:
            labels = labels.unflatten(1, (groups, -1))
            size = labels.shape[2]
            labels = self.joins.collapse(labels, [2]).repeat_interleave(size, 2).flatten(1, 2)
        return self._normed(op, labels, 1)

    def _normed(self, op: "_Operation", labels: Tensor, at: int | None) -> list[Tensor]:
        x = op.bound["input"]
        for name in ("weight", "bias", "running_mean", "running_var"):
            if (p := op.bound.get(name)) is not None:
                beside = self.beside.get(self._key(p))
                if name == "weight" and beside and beside.owner:
                    beside.owner.roles[p.ndim - 1].add("scale")
                self._beside_units(labels, p, x.ndim, at)
        return [labels]

    def _beside_units(self, labels: Tensor, vector: Tensor, ndim: int, at: int | None) -> None:
        """A vector meets, along dimension `at`, a tensor with these labels."""
        own, size = self.of(vector), list(vector.shape)
        if at is not None and vector.ndim == 1:
            behind = [1] * (ndim - 1 - at)
            own, size = own.reshape(-1, *behind), [*size, *behind]
        if self._loose(vector) or not (own > 0).any():
            self.later.append((labels, own, size))
        else:
            self._merge([(labels, labels.shape), (own, size)], ndim)

    def _reads(self, weight: tuple[_Owner, list[tuple[Tensor, int]]], dim: int, role: str) -> Tensor:
        labels, own = weight[1][dim]
        if own >= 0:
            weight[0].roles[own].add(role)
        return labels

    def _convolution(self, op: "_Operation") -> Tensor:
        x, w, groups = op.bound["input"], op.bound["weight"], op.bound["groups"]
        weight = self.axes(w)
        if weight is None:
            return self._unknown(op)[0]
        self.filters.add(weight[0].name)
        flipped = bool(op.bound["transposed"])
        labels = self.joins.collapse(self.of(x), [d for d in range(x.ndim) if d != 1])
        labels = labels.flatten()
        if groups == 1:
            self.joins.join(labels, self._reads(weight, 0 if flipped else 1, "input"))
            out = self._reads(weight, 1 if flipped else 0, "weight")
        else:
            rows = self._reads(weight, 0, "weight")
            self.joins.join(weight[1][1][0], PINNED)
            each = rows.reshape(groups, -1)
            one = self.joins.collapse(each, [1])
            self.joins.join(labels.expand(x.shape[1]).reshape(groups, -1), one)
            out = one.expand(groups, op.made[0].shape[1] // groups).flatten()
            out = out if flipped else rows
        out = out.reshape(1, -1, *[1] * (x.ndim - 2))
        if (bias := op.bound.get("bias")) is not None:
            self._beside_units(out, bias, x.ndim, 1)
        return out

    def _product(self, op: "_Operation") -> Tensor:
        """Of matrices (..., m, k) and (..., k, n), and of a vector."""
        a, b = [op.bound[n] for n in PRODUCTS[op.name]]
        vector = b.ndim == 1
        b = b.unsqueeze(1) if vector else b
        out = self._multiply(a, b)
        out = out.squeeze(-1) if vector else out
        if op.name in ("addmm", "baddbmm", "addmv"):
            added = op.bound["self"]
            if self._loose(added):
                self._beside_units(out, added, out.ndim, None)
            else:
                return self._merge([(out, op.made[0].shape), (self.of(added), added.shape)], out.ndim)
        return out

    def _multiply(self, a: Tensor, b: Tensor) -> Tensor:
        if (weight := self.axes(b)) is not None:
            return self._applied(self.of(a), weight, -2, -1)
        if (weight := self.axes(a)) is not None:
            return self._applied(self.of(b).mT, weight, -1, -2).mT
        left, right = (self._data(t) for t in (a, b))
        if left.shape[-1] > 1 or right.shape[-2] > 1:  # units are summed over: these make a head
            left = self.joins.collapse(left, [left.ndim - 1, left.ndim - 2])
            right = self.joins.collapse(right, [right.ndim - 1, right.ndim - 2])
            self.heads.append(torch.cat([left.flatten(), right.flatten()]))
        units = (left > 0) & (right > 0)
        self.joins.join(left.where(units, FREE), right.where(units, FREE))
        return torch.maximum(left, right)

    def _data(self, tensor: Tensor) -> Tensor:
        """The labels of a factor that is no weight; a buffer, such as frequencies, stays."""
        labels = self.of(tensor)
        if self._loose(tensor):
            self.joins.join(labels, PINNED)
            labels = torch.full([1] * tensor.ndim, PINNED)
        return labels

    def _applied(self, labels: Tensor, weight: Any, k: int, n: int) -> Tensor:
        """Of rows with these labels (..., m, k) and a weight, whose dims k and n are given."""
        for dim in range(len(weight[1]) - 2):
            self.joins.join(weight[1][dim][0], PINNED)
        read, made = self._reads(weight, k, "input"), self._reads(weight, n, "weight")
        if labels.shape[-1] == 1 and bool((labels > 0).any()):  # rows are units, such as heads
            self.joins.join(read, PINNED)
            self.joins.join(made, PINNED)
            return labels
        self.joins.join(labels, read)
        return made.reshape([1] * (labels.ndim - 1) + [-1])

    def _embedding(self, op: "_Operation") -> Tensor:
        weight, ids = self.axes(op.bound["weight"]), op.bound["indices"]
        if weight is None:
            return self._unknown(op)[0]
        key = self._key(ids)
        self.ranges[key] = min(self.ranges.get(key, 2**62), len(op.bound["weight"]))
        self.joins.join(weight[1][0][0], PINNED)
        return self._reads(weight, 1, "weight").reshape([1] * ids.ndim + [-1])


@dataclass
class _Operation:
    func: Any
    name: str
    bound: dict[str, Any]
    inputs: list[Tensor]
    made: list[Tensor]


PRODUCTS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addmv": ("mat", "vec"),
}
# The rules, by the names of ATen's operations. Views need none, since labels lie beside storages.
RULES: dict[str, Callable[[Labels, _Operation], Any]] = {
    name: rule
    for names, rule in (
        ("mm bmm mv addmm baddbmm addmv", Labels._product),
        ("convolution", Labels._convolution),
        ("embedding", Labels._embedding),
        ("native_layer_norm", Labels._layer_norm),
        ("native_group_norm", Labels._group_norm),
        (
            "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
            "_native_batch_norm_legit_no_training _batch_norm_with_update",
            Labels._batch_norm,
        ),
        (
            "flip roll repeat index index_select gather pixel_shuffle pixel_unshuffle im2col "
            "native_channel_shuffle channel_shuffle _reshape_copy view_copy unfold_copy diag_embed",
            Labels._move,
        ),
        ("cat stack", Labels._joined),
        ("constant_pad_nd", Labels._padded),
        ("copy", Labels._copy),
        ("fill zero uniform normal bernoulli", Labels._fill),
        (
            "sum mean amax amin max min prod any all argmax argmin var var_mean std std_mean norm "
            "linalg_vector_norm logsumexp median nansum _softmax _log_softmax _safe_softmax cumsum "
            "cumprod sort topk argsort",
            Labels._reduced,
        ),
        (
            "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d avg_pool1d "
            "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d "
            "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
            "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d "
            "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
            "_upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d "
            "replication_pad1d replication_pad2d replication_pad3d grid_sampler_2d grid_sampler_3d",
            Labels._spatial,
        ),
        ("roi_align roi_pool", Labels._regions),
        ("scatter scatter_add scatter_reduce index_add index_put index_copy", Labels._scattered),
        ("glu", Labels._gated),
        (
            "_prelu_kernel native_dropout masked_fill tril triu where addcmul addcdiv lerp "
            "_conj_physical rrelu_with_noise",
            Labels._pointwise,
        ),
    )
    for name in names.split()
}

TORCH = os.path.dirname(torch.__file__)


def place_of(frame: Any) -> Place:
    """The line of the network's code that called, through torch, the function of this frame."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith(TORCH):
            return name, frame.f_lineno
        frame = frame.f_back
    return "", 0


# From labels to units -----------------------------------------------------------------------------


def units(labels: Labels, choice: Mapping[Place, int] | None = None) -> list[Found]:
    """The units that can be removed, those that own slices of the same parameters together.

    `choice` says, of lines that hold a size, which way to read them; ATTEMPTS pins their units.
    """
    choice = choice or {}
    joins = Joins(labels.joins.parent.clone())
    for pieces, place in labels.splits:
        if choice.get(place, 0) == 1:
            joins.collapse(pieces, [0])
    for owner in labels.owners.values():
        if owner.elements:
            labels._record(labels._of_elements(owner))
    before = None
    while before is None or not torch.equal(before, joins.parent):
        before = joins.parent.clone()
        for seen, places in labels.patterns.values():
            _square(joins, compressed(joins.find(seen)), max(choice.get(p, 0) for p in places))
        for one, other, size in labels.later:
            _meet(joins, compressed(joins.find(one)), other, size)
        for owner in labels.owners.values():
            if owner.elements:
                _slice(joins, owner)
    return list(_grouped(labels, joins))


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
    size = index.bincount(minlength=len(values)) if index.ndim == 1 else index.flatten().bincount(
        minlength=len(values))
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


def _slice(joins: Joins, owner: _Owner) -> None:
    """Join the slices of a parameter whose elements are used one by one with the elements."""
    shape = owner.tensor.shape
    elements = joins.find(owner.elements + torch.arange(prod(shape))).reshape(shape)
    for dim in owner.long:
        along = elements.movedim(dim, 0).flatten(1)
        alike = (along == along[:, :1]).all(1)
        joins.join(owner.labels(dim), torch.where(alike, along[:, 0], PINNED))
        owner.roles[dim].add("shift")


def _grouped(labels: Labels, joins: Joins) -> Iterator[Found]:
    heads = set(joins.find(torch.cat([*labels.heads, torch.zeros(1).long()])).tolist())
    owned: dict[int, list[tuple[int, int]]] = {}
    slices = []
    for owner in labels.owners.values():
        for dim in owner.long:
            role = _role(owner, dim)
            unit = joins.find(owner.labels(dim))
            if role and bool((unit > 0).any()):
                for u, held in zip(*(v.tolist() for v in unit.unique(return_counts=True))):
                    if u > 0:
                        owned.setdefault(u, []).append((len(slices), held))
                slices.append((owner, dim, role, unit))
    seen: dict[int, set[Place]] = defaultdict(set)
    for pattern, places in labels.patterns.values():
        for u in joins.find(pattern).unique().tolist():
            seen[u] |= places
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for u, parts in owned.items():
        alike.setdefault(tuple(parts), []).append(u)
    for held, us in alike.items():
        roles = {slices[i][2] for i, _ in held}
        if not ("tied" in roles or {"weight", "input"} <= roles):
            continue  # nothing computes these channels, or nothing reads them
        us = sorted(us)
        order = torch.full([len(joins.parent)], -1)
        order[torch.tensor(us)] = torch.arange(len(us))
        parts = tuple(
            Part(o.name, o.tensor, dim, order[unit], role)
            for o, dim, role, unit in (slices[i] for i, _ in held)
        )
        made = [p.name for p in parts if p.role in ("weight", "tied")]
        kind = "filter" if labels.filters & set(made) else "channel"
        kind = "head" if heads & set(us) else kind
        name = made[0].removesuffix(".in_proj_weight")
        places = frozenset(p for u in us for p in seen[u])
        yield Found(name, kind, parts, len(us), places)


def _role(owner: _Owner, dim: int) -> str:
    roles = owner.roles.get(dim, set())
    if not isinstance(owner.tensor, nn.Parameter):
        return "buffer" if owner.seen and len(owner.long) == 1 else ""
    if {"weight", "input"} <= roles:
        return "tied"
    known = [r for r in ("weight", "input", "scale", "shift") if r in roles]
    return known[0] if known else "shift" if owner.seen and len(owner.long) == 1 else ""


def trace(model: nn.Module, examples: Sequence[Any]) -> Labels:
    """The labels of a model after a pass of each of the examples, in evaluation mode."""
    labels = Labels(model)
    for module in model.modules():  # its layers have one number of hidden units
        if isinstance(module, nn.RNNBase):
            names = [n for n in module._flat_weights_names if "weight_hh" in n]
            owners = {id(o.tensor): o for o in labels.owners.values()}
            first, *rest = (owners[id(getattr(module, n))] for n in names)
            for other in rest:
                labels.joins.join(first.labels(1), other.labels(1))
    for example in examples:
        for tensor in tensors_of(example):
            labels.put(tensor, labels.of(tensor))
        with plain(labels):
            output = call(model, example)
        for tensor in tensors_of(output):
            labels.joins.join(labels.of(tensor), PINNED)
        if not labels.steered:
            break
    return labels


@contextmanager
def plain(mode: TorchDispatchMode) -> Iterator[None]:
    """A context without gradients and fused kernels, with random numbers that repeat."""
    fast = torch.backends.mha.get_fastpath_enabled()
    onednn = torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), mode:
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """A context with the model in evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call(model: nn.Module, example: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if type(example) is tuple else model(example)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a network's output, however nested in containers and objects."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        values = list(output.values())
    elif isinstance(output, list | tuple | set | frozenset):
        values = list(output)
    elif is_dataclass(output) and not isinstance(output, type):
        values = [getattr(output, f.name) for f in fields(output)]
    else:
        values = list(vars(output).values()) if hasattr(output, "__dict__") and not isinstance(
            output, type | nn.Module) and not callable(output) else []
    return [tensor for value in values for tensor in tensors_of(value)]
