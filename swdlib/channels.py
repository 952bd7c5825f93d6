"""Channels: which slices of which parameters can only be removed together.

torch-pruning follows the graph that autograd records from a network's outputs back to its layers.
What it finds is joined here into disjoint units: a channel of one layer, and every slice of a
parameter that additions, concatenations, flattening, depthwise and grouped convolutions tie to it.
"""

import copy
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from swdlib import require_extra


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
    """The filters and channels of `model` that can be removed, a `Found` for each layer.

    Raises Untraceable, within half a minute, for a network that cannot be followed.
    """
    require_extra("swdlib.channels", "deploy")
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            twin = copy.deepcopy(model).requires_grad_(True)
            slots = _Slots(twin)
            slots.join(follow(twin, example))
            slots.join_what_only_training_runs(example)
    except Exception as error:  # torch-pruning and the network raise what they like
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
    """Every channel of every layer as a numbered slot; tied slots are joined into units.

    A slot is output i of a layer, its input j, or entry i of a normalisation. Slot 0 stands for all
    that cannot be removed: the network's output, what a layer normalisation averages over.
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
        # A parameter that layers share, or that is computed, cannot be cut for one layer alone.
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

    def slots_of(self, module: Any, side: str, indices: np.ndarray) -> np.ndarray:
        """The slots of `module` at `indices`; 0 if it cannot be cut."""
        if isinstance(module, _ConvNd) and module.groups > 1 and side == "in":
            each = module.in_channels // module.groups
            indices = indices // each * (module.out_channels // module.groups)
            side = "out"
        start = self.start.get((module, side))
        if start is None:
            return np.zeros_like(indices)
        size = dict(sides(module))[side]
        if indices.max(initial=0) >= size:  # the layer sees channels that were not followed
            self._hold(start, size)
            return np.zeros_like(indices)
        return start + indices

    def join(self, graph: Any) -> None:
        """Tie what the graph says must be removed together."""
        self.joined |= set(graph.module2node)
        covered = np.zeros(self.number, dtype=bool)
        for layer in self.names:
            if layer not in graph.module2node or not isinstance(layer, _ConvNd | nn.Linear):
                continue
            outputs = np.arange(dict(sides(layer)).get("out", 0))
            if covered[self.slots_of(layer, "out", outputs)].all():
                continue
            for module, side, indices, root in tied_to(graph, layer):
                mine = self.slots_of(module, side, indices)
                covered[mine] = True
                self.ties.append((mine, self.slots_of(layer, "out", root)))

    def join_what_only_training_runs(self, example: Tensor) -> None:
        """Tie auxiliary heads, if the network runs in training mode on the example."""
        layers = {module for module, _ in self.start} - self.joined
        if all(isinstance(layer, NonDynamicallyQuantizableLinear) for layer in layers):
            return  # the output projections of attention, which it runs without calling them
        twice = torch.cat([example, example])  # batch norm cannot train on a single image
        try:
            graph = follow(self.model, twice, training=True)
        except Exception:
            return
        self.join(graph)

    def layers(self, parameters: dict[str, nn.Parameter]) -> list[Found]:
        """The units that can be removed; those that own slices of the same parameters together."""
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
        """The unit of each slot, -1 for what cannot be removed."""
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
        """(parameter's name, dim, role, unit of each slice) for each side of each layer."""
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
            return None  # no layer computes these channels, or none reads them
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
    """The parameters on a side of a layer: name, dimension and role of their slices."""
    if isinstance(module, _NormBase):
        return [("weight", 0, "scale"), ("bias", 0, "shift")]
    if isinstance(module, nn.PReLU):
        return [("weight", 0, "shift")]
    flipped = isinstance(module, _ConvTransposeNd)  # weight: (in, out, ...)
    if side == "in":
        return [("weight", 0 if flipped else 1, "input")]
    return [("weight", 1 if flipped else 0, "weight"), ("bias", 0, "shift")]


# torch-pruning's graph, corrected where it overlooks that channels end ----------------------------

SECONDS = 12.0  # limit of the search; networks that can be followed take two or three
MOST = 2_000_000  # limit of the channels tied to one layer; no real network has as many
# Parts of the names, in autograd, of operations that mix or reorder channels.
OPAQUE = ("norm", "index", "flip", "roll", "shuffle", "bmm", "convolution")


def sides(module: nn.Module) -> list[tuple[str, int]]:
    """The sides, "out" and "in", on which a layer can be cut, and their numbers of channels."""
    if isinstance(module, _ConvTransposeNd) and module.groups > 1:
        return []
    if isinstance(module, _ConvNd):
        inputs = [] if module.groups > 1 else [("in", module.in_channels)]
        return [("out", module.out_channels), *inputs]
    if isinstance(module, nn.Linear):
        return [("out", module.out_features), ("in", module.in_features)]
    if isinstance(module, _NormBase) and module.affine:
        return [("out", module.num_features)]
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return [("out", module.num_parameters)]
    return []


def follow(model: nn.Module, example: Tensor, training: bool = False) -> Any:
    """torch-pruning's graph of `model`; TimeoutError where the search would take hours."""
    graph = _graph(time.monotonic() + SECONDS)
    has_maps_of_three = any(isinstance(module, nn.Conv1d) for module in model.modules())
    # The graph sees the input's channels only if they come from a parameter, so one is added.
    ranks = (2, 3, 4, 5) if has_maps_of_three else (2, 4, 5)
    has_channels = example.is_floating_point() and example.ndim in ranks
    stem = nn.Parameter(torch.zeros_like(example)) if has_channels else None
    graph.build_dependency(
        model,
        example,
        forward_fn=lambda net, x: net.train(training)(x if stem is None else x + stem),
        # Times 1, since the graph overlooks an output that is a layer's own.
        output_transform=lambda out: [t * 1 for t in tensors_of(out) if t.grad_fn is not None],
        unwrapped_parameters=[] if stem is None else [(stem, 1)],
        verbose=False,
    )
    for node in graph.module2node.values():
        node.type = None  # else torch-pruning infers all shapes again for each layer
        node.is_end = _ends(node, has_maps_of_three)
        on = graph.nowhere if node.is_end else graph.onward
        for dependency in node.dependencies:  # called at each step of the search for ties
            dependency.index_mapping.append(on)
    return graph


def _graph(deadline: float) -> Any:
    from torch_pruning import ops
    from torch_pruning.dependency import DependencyGraph

    class Graph(DependencyGraph):  # these methods are called at each step of the search
        def check_time(self) -> None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end after {SECONDS:g} seconds")

        def onward(self, indices: list[Any]) -> list[Any]:
            self.check_time()
            if len(indices) > MOST:
                raise OverflowError(f"a channel seems to lead to {len(indices)} others")
            return indices

        def nowhere(self, indices: list[Any]) -> list[Any]:
            return []

        def get_out_channels(self, node: Any) -> Any:
            self.check_time()
            return super().get_out_channels(node)

        def get_in_channels(self, node: Any) -> Any:
            self.check_time()
            known = super().get_in_channels(node)
            if isinstance(node.module, ops._ReshapeOp):
                before = _shapes(node.grad_fn)[0]
                if len(before) > 3:  # else it would forget channels that were concatenated before
                    return before[1]
            return known

    return Graph()


def tied_to(graph: Any, layer: nn.Module) -> Iterator[tuple[Any, str, np.ndarray, np.ndarray]]:
    """What is tied to the outputs of `layer`: module, side, indices there, outputs of `layer`.

    A module without sides is a place where channels end, so that they cannot be removed.
    """
    pruner = graph.get_pruner_of_module(layer)
    outputs = list(range(pruner.get_out_channels(layer)))
    for item in graph.get_pruning_group(layer, pruner.prune_out_channels, outputs):
        dependency, indices = item
        node = dependency.target
        if node.is_end or sides(node.module):
            side = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
            yield node.module, side, np.array(indices), np.array(item.root_idxs)


def _ends(node: Any, has_maps_of_three: bool) -> bool:
    """Whether channels cannot be followed, or removed, beyond this node, such as the output.

    Tensors of three dimensions may be (images, channels, positions), as a Conv1d reads them, or
    (images, positions, channels).
    """
    from torch_pruning import ops

    module = node.module
    if isinstance(module, ops._OutputOp | nn.Parameter):
        return True
    if isinstance(module, _NormBase) and not module.affine and module.track_running_stats:
        return True  # it has running statistics to cut, but no parameter to rank
    single = isinstance(module, nn.PReLU) and module.num_parameters == 1
    if sides(module) or single or isinstance(module, ops._ConcatOp) or _in_instance_norm(node):
        return False
    mixes = isinstance(module, ops._ElementWiseOp) and any(
        word in node.grad_fn.name().lower() for word in OPAQUE
    )
    cuts = isinstance(module, ops._ReshapeOp) and _cuts_up(node.grad_fn, has_maps_of_three)
    averages = isinstance(module, nn.LayerNorm | nn.GroupNorm)
    holds = any(True for _ in module.parameters())
    along = _along_channels(node.grad_fn, has_maps_of_three)
    return averages or holds or mixes or cuts or along


def _in_instance_norm(node: Any) -> bool:
    """Whether it is one of the two operations that make up an instance normalisation."""
    after = [*node.outputs, *(later for out in node.outputs for later in out.outputs)]
    steps = ("ViewBackward0", "NativeBatchNormBackward0", "CudnnBatchNormBackward0")
    is_step = node.grad_fn.name() in steps
    return is_step and any(isinstance(later.module, _InstanceNorm) for later in after)


def _shapes(operation: Any) -> tuple[list[int], list[int]]:
    """The shapes of an operation's first differentiable input and of its output."""
    before, number = next(edge for edge in operation.next_functions if edge[0] is not None)
    return before._input_metadata[number].shape, operation._input_metadata[0].shape


def _cuts_up(view: Any, has_maps_of_three: bool) -> bool:
    """Whether a view splits channels: it neither flattens maps nor folds the dimensions around."""
    before, after = _shapes(view)
    flattens = len(after) == 2 and before[0] == after[0]
    lowest = 2 if has_maps_of_three else 3
    folds = min(len(before), len(after)) <= lowest and before[-1] == after[-1]
    of_parameter = len(before) == 1
    return not (flattens or folds or of_parameter or before[1:2] == after[1:2])


def _along_channels(operation: Any, has_maps_of_three: bool) -> bool:
    """Whether an operation along a dimension (a sum, a softmax) is along the channels."""
    dims = getattr(operation, "_saved_dim", None)
    if dims is None or "queeze" in operation.name():
        return False
    rank = len(_shapes(operation)[0])
    signed = [d if d < rank else d - 2**64 for d in (dims if isinstance(dims, tuple) else (dims,))]
    unclear = (
        rank == 3 and not has_maps_of_three
    )  # either (images, channels, positions) or (images, positions, channels)
    return not unclear and any(d % rank == 1 for d in signed)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a network's output, however nested in dictionaries, lists and tuples."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    if not isinstance(output, dict | list | tuple):
        return []
    return [tensor for value in values for tensor in tensors_of(value)]
