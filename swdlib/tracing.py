"""Tracing: torch-pruning's graph of a network, told where channels end.

It follows autograd from the outputs back. Left alone it overlooks outputs that are a layer's own,
the network's input, and operations that mix channels.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

SECONDS = 12.0  # that a search may take: networks that can be followed need two or three
MOST = 2_000_000  # places that one operation may lead to: all that a network has are fewer
# Operations, by parts of their names in autograd, that mix channels or change their order.
OPAQUE = ("norm", "index", "flip", "roll", "shuffle", "bmm", "convolution")


def sides(module: nn.Module) -> list[tuple[str, int]]:
    """The sides of a layer on which channels can be cut, and their numbers of channels."""
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
    """The graph of `model`; on some networks the search would take hours: TimeoutError."""
    graph = _graph(time.monotonic() + SECONDS)
    has_maps_of_three = any(isinstance(module, nn.Conv1d) for module in model.modules())
    # Channels of the input, if the graph is to see them, have to come from a parameter.
    ranks = (2, 3, 4, 5) if has_maps_of_three else (2, 4, 5)
    has_channels = example.is_floating_point() and example.ndim in ranks
    stem = nn.Parameter(torch.zeros_like(example)) if has_channels else None
    graph.build_dependency(
        model,
        example,
        forward_fn=lambda net, x: net.train(training)(x if stem is None else x + stem),
        # An operation more, so that no output is also a layer's.
        output_transform=lambda out: [t * 1 for t in tensors_of(out) if t.grad_fn is not None],
        unwrapped_parameters=[] if stem is None else [(stem, 1)],
        verbose=False,
    )
    for node in graph.module2node.values():
        node.type = None  # else the shapes would be inferred anew for every layer
        node.is_end = _ends(node, has_maps_of_three)
        on = graph.nowhere if node.is_end else graph.onward
        for dependency in node.dependencies:  # the search for what is tied passes here
            dependency.index_mapping.append(on)
    return graph


def _graph(deadline: float) -> Any:
    from torch_pruning import ops
    from torch_pruning.dependency import DependencyGraph

    class Graph(DependencyGraph):  # the search for shapes passes here, at every step
        def check_time(self) -> None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end after {SECONDS:g} seconds")

        def onward(self, indices: list[Any]) -> list[Any]:
            self.check_time()
            if len(indices) > MOST:
                raise OverflowError(f"a channel seems to lead to {len(indices)} places")
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
                if len(before) > 3:  # else channels that were concatenated before would be lost
                    return before[1]
            return known

    return Graph()


def tied_to(graph: Any, layer: nn.Module) -> Iterator[tuple[Any, str, np.ndarray, np.ndarray]]:
    """What falls with the outputs of `layer`: module, its side, indices there, outputs of `layer`.

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
    """Whether channels cannot be followed, or removed, any further: at the output, say.

    Tensors of three dimensions may be (images, channels, places), as a Conv1d reads them, or
    (images, places, channels).
    """
    from torch_pruning import ops

    module = node.module
    if isinstance(module, ops._OutputOp | nn.Parameter):
        return True
    if isinstance(module, _NormBase) and not module.affine and module.track_running_stats:
        return True  # its statistics would have to be cut by a name that no parameter has
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
    """Whether it is one of the two steps by which an instance normalisation is computed."""
    after = [*node.outputs, *(later for out in node.outputs for later in out.outputs)]
    steps = ("ViewBackward0", "NativeBatchNormBackward0", "CudnnBatchNormBackward0")
    is_step = node.grad_fn.name() in steps
    return is_step and any(isinstance(later.module, _InstanceNorm) for later in after)


def _shapes(operation: Any) -> tuple[list[int], list[int]]:
    """The shapes of an operation's first input that is followed, and of its output."""
    before, number = next(edge for edge in operation.next_functions if edge[0] is not None)
    return before._input_metadata[number].shape, operation._input_metadata[0].shape


def _cuts_up(view: Any, has_maps_of_three: bool) -> bool:
    """Whether a view cuts channels up: it neither flattens maps nor folds what is around them."""
    before, after = _shapes(view)
    flattens = len(after) == 2 and before[0] == after[0]
    lowest = 2 if has_maps_of_three else 3
    folds = min(len(before), len(after)) <= lowest and before[-1] == after[-1]
    of_parameter = len(before) == 1
    return not (flattens or folds or of_parameter or before[1:2] == after[1:2])


def _along_channels(operation: Any, has_maps_of_three: bool) -> bool:
    """Whether an operation along a dimension, a sum or a softmax, is along that of the channels."""
    dims = getattr(operation, "_saved_dim", None)
    if dims is None or "queeze" in operation.name():
        return False
    rank = len(_shapes(operation)[0])
    signed = [d if d < rank else d - 2**64 for d in (dims if isinstance(dims, tuple) else (dims,))]
    unclear = rank == 3 and not has_maps_of_three  # then it may be any
    return not unclear and any(d % rank == 1 for d in signed)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a network's output, which may nest them in dictionaries, lists and tuples."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    if not isinstance(output, dict | list | tuple):
        return []
    return [tensor for value in values for tensor in tensors_of(value)]
