"""The graph: which channels of which layers live or die together.

What tracing finds is joined here into units that are disjoint: a channel of one layer, and all
slices of parameters that it is tied to by additions, concatenations, flattening, depthwise and
grouped convolutions.
"""

import copy
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from swdlib.tracing import follow, sides, tied_to


@dataclass(frozen=True)
class Part:
    """Slices of a parameter along `dim`; slice i belongs to unit `units[i]`, or to none if -1.

    `role` is "weight" for what makes a channel, "input" for what reads it, "scale" and "shift" for
    what normalises it or is added to it.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    units: Tensor
    role: str


@dataclass(frozen=True)
class Found:
    """`count` units of one kind ("filter", "channel" or "head") and the slices that they own."""

    name: str
    kind: str
    parts: tuple[Part, ...]
    count: int


class Untraceable(ValueError):
    """The channels of a network cannot be followed."""


def trace_units(model: nn.Module, example: Tensor) -> list[Found]:
    """The filters and channels of `model` that can be removed without a trace, a layer each.

    Raises Untraceable, within half a minute, for a network that cannot be followed.
    """
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            twin = copy.deepcopy(model).requires_grad_(True)
            slots = _Slots(twin)
            slots.join(follow(twin, example))
            slots.join_what_only_training_runs(example)
    except Exception as error:  # whatever a foreign search stumbles over
        raise Untraceable(
            f"the channels of {type(model).__name__} cannot be followed ({error!r}); structures "
            "that need no graph work on it: weights, kernels, blocks, n_of_m"
        ) from error
    return slots.layers(dict(model.named_parameters()))


def find_attentions(model: nn.Module) -> list[Found]:
    """The heads of each torch.nn.MultiheadAttention, as units."""
    found = []
    parameters = {id(p): (n, p) for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and _is_plain(module):
            head = torch.arange(module.embed_dim) // module.head_dim
            slices = [
                (module.in_proj_weight, 0, head.repeat(3), "weight"),
                (module.in_proj_bias, 0, head.repeat(3), "shift"),
                (module.out_proj.weight, 1, head, "input"),
            ]
            parts = tuple(
                Part(*parameters[id(p)], dim, units, role)
                for p, dim, units, role in slices
                if p is not None
            )
            found.append(Found(name or "attention", "head", parts, module.num_heads))
    return found


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    """Whether it projects queries, keys and values alike and appends nothing to them."""
    if type(attention) is not nn.MultiheadAttention or attention.in_proj_weight is None:
        return False
    appends = attention.bias_k is not None or attention.add_zero_attn
    return isinstance(attention.out_proj.weight, nn.Parameter) and not appends


class _Slots:
    """All places that a channel can own, numbered; those that are tied are joined into units.

    A place is output i of a layer, its input j, or entry i of a normalisation. Place 0 stands for
    all that cannot be removed: the network's output, what a layer normalisation averages over.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.start: dict[tuple[nn.Module, str], int] = {}
        self.number = 1
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.joined: set[Any] = set()
        for module in self.names:
            for side, size in sides(module):
                self.start[module, side] = self.number
                self.number += size
            if isinstance(module, _ConvNd) and module.groups > 1 and sides(module):
                self._tie_groups(module)
        self._hold_shared()

    def _hold_shared(self) -> None:
        # What several layers share, or one computes, cannot be cut in one place.
        uses = Counter(id(p) for module in self.names for p in module._parameters.values())
        for (module, side), start in self.start.items():
            own = [getattr(module, attribute) for attribute, _, _ in _attributes(module, side)]
            if any(p is not None and uses[id(p)] != 1 for p in own):
                self._hold(start, dict(sides(module))[side])

    def _hold(self, start: int, size: int) -> None:
        self.ties.append((start + np.arange(size), np.zeros(size, dtype=int)))

    def _tie_groups(self, conv: _ConvNd) -> None:
        # A channel of a grouped convolution can only leave with its whole group.
        outputs = np.arange(conv.out_channels)
        each = conv.out_channels // conv.groups
        start = self.start[conv, "out"]
        self.ties.append((start + outputs, start + outputs // each * each))

    def places(self, module: Any, side: str, indices: np.ndarray) -> np.ndarray:
        """The numbers of `module`'s places; 0 if it is nothing that can be cut."""
        if isinstance(module, _ConvNd) and module.groups > 1 and side == "in":
            each = module.in_channels // module.groups
            indices = indices // each * (module.out_channels // module.groups)
            side = "out"
        start = self.start.get((module, side))
        if start is None:
            return np.zeros_like(indices)
        size = dict(sides(module))[side]
        if indices.max(initial=0) >= size:  # something before it changes the number of channels
            self._hold(start, size)
            return np.zeros_like(indices)
        return start + indices

    def join(self, graph: Any) -> None:
        """Tie all that falls together in the graph."""
        self.joined |= set(graph.module2node)
        covered = np.zeros(self.number, dtype=bool)
        for layer in self.names:
            if layer not in graph.module2node or not isinstance(layer, _ConvNd | nn.Linear):
                continue
            outputs = np.arange(dict(sides(layer)).get("out", 0))
            if covered[self.places(layer, "out", outputs)].all():
                continue
            for module, side, indices, root in tied_to(graph, layer):
                mine = self.places(module, side, indices)
                covered[mine] = True
                self.ties.append((mine, self.places(layer, "out", root)))

    def join_what_only_training_runs(self, example: Tensor) -> None:
        """Tie auxiliary heads; a network that cannot run in training mode here is left as it is."""
        layers = {module for module, _ in self.start} - self.joined
        if all(isinstance(layer, NonDynamicallyQuantizableLinear) for layer in layers):
            return  # these belong to attention, which runs them
        twice = torch.cat([example, example])  # batch norm does not train on a single value
        try:
            graph = follow(self.model, twice, training=True)
        except Exception:
            return
        self.join(graph)

    def layers(self, parameters: dict[str, nn.Parameter]) -> list[Found]:
        """The units that can be removed, those that own like slices together."""
        unit = self._units()
        slices = [s for s in self._slices(unit) if (s[3] >= 0).any() and s[0] in parameters]
        owners: dict[int, list[tuple[int, int]]] = {}
        for i, (_, _, _, owner) in enumerate(slices):
            for u, held in zip(*np.unique(owner[owner >= 0], return_counts=True), strict=True):
                owners.setdefault(int(u), []).append((i, int(held)))
        alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for u, held in owners.items():
            alike.setdefault(tuple(held), []).append(u)
        found = [
            self._found(us, [slices[i] for i, _ in held], parameters) for held, us in alike.items()
        ]
        return [layer for layer in found if layer is not None]

    def _units(self) -> np.ndarray:
        """The unit of each place, -1 for what cannot be removed."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        left = np.concatenate([a for a, _ in self.ties] or [np.zeros(0, int)])
        right = np.concatenate([b for _, b in self.ties] or [np.zeros(0, int)])
        shape = (self.number, self.number)
        matrix = coo_matrix((np.ones(len(left), bool), (left, right)), shape=shape)
        unit = connected_components(matrix, directed=False)[1].astype(int)
        unit[unit == unit[0]] = -1
        return unit

    def _slices(self, unit: np.ndarray) -> list[tuple[str, int, str, np.ndarray]]:
        """(parameter's name, dim, role, unit of each slice) for every place."""
        found = []
        for (module, side), start in self.start.items():
            name = self.names[module] + "." if self.names[module] else ""
            owner = unit[start : start + dict(sides(module))[side]]
            for attribute, dim, role in _attributes(module, side):
                if getattr(module, attribute) is not None:
                    found.append((name + attribute, dim, role, owner))
        return found

    def _found(
        self,
        units: list[int],
        slices: list[tuple[str, int, str, np.ndarray]],
        parameters: dict[str, nn.Parameter],
    ) -> Found | None:
        made = [name for name, _, role, _ in slices if role == "weight"]
        if not made or not any(role == "input" for _, _, role, _ in slices):
            return None  # nothing makes these channels, or nothing reads them
        order = np.full(self.number, -1)
        order[units] = np.arange(len(units))
        parts = tuple(
            Part(
                name, parameters[name], dim, torch.from_numpy(np.where(o >= 0, order[o], -1)), role
            )
            for name, dim, role, o in slices
        )
        is_filter = any(parameters[name].ndim > 2 for name in made)
        return Found(made[0], "filter" if is_filter else "channel", parts, len(units))


def _attributes(module: nn.Module, side: str) -> list[tuple[str, int, str]]:
    """The parameters of a layer's side: name, dim and role of their slices."""
    if isinstance(module, _NormBase):
        return [("weight", 0, "scale"), ("bias", 0, "shift")]
    if isinstance(module, nn.PReLU):
        return [("weight", 0, "shift")]
    flipped = isinstance(module, _ConvTransposeNd)  # weight: (in, out, ...)
    if side == "in":
        return [("weight", 0 if flipped else 1, "input")]
    return [("weight", 1 if flipped else 0, "weight"), ("bias", 0, "shift")]
