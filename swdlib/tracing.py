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
from torch.nn.modules.instancenorm import _InstanceNorm

SECONDS = 12.0  # that a search may take: networks that can be followed need two or three
# Operations, by parts of their names in autograd, that mix channels or change their number.
OPAQUE = ("norm", "softmax", "glu", "index", "flip", "roll", "shuffle", "bmm", "convolution")


def follow(model: nn.Module, example: Tensor, training: bool = False) -> Any:
    """The graph of `model`; on some networks the search would take hours: TimeoutError."""
    graph = _graph(time.monotonic() + SECONDS)
    # Channels of the input, if the graph is to see them, have to come from a parameter.
    has_channels = example.is_floating_point() and example.ndim in (2, 4, 5)
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
        for dependency in node.dependencies:  # the search for a group passes here
            dependency.index_mapping.append(graph.in_time)
    return graph


def _graph(deadline: float) -> Any:
    from torch_pruning import ops
    from torch_pruning.dependency import DependencyGraph

    class Graph(DependencyGraph):  # the search for shapes passes here, at every step
        def in_time(self, indices: Any) -> Any:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no end after {SECONDS:g} seconds")
            return indices

        def get_out_channels(self, node: Any) -> Any:
            return super().get_out_channels(self.in_time(node))

        def get_in_channels(self, node: Any) -> Any:
            shape = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
            if isinstance(node.module, ops._ReshapeOp) and len(shape) == 4:
                return shape[1]  # without it, what is concatenated before it is flattened is lost
            return super().get_in_channels(self.in_time(node))

    return Graph()


def tied_to(graph: Any, layer: nn.Module) -> Iterator[tuple[Any, str, np.ndarray, np.ndarray]]:
    """What falls with the outputs of `layer`: module, its side, indices there, outputs of `layer`.

    A module that is none of the network's layers is a place where channels cannot be removed.
    """
    pruner = graph.get_pruner_of_module(layer)
    outputs = list(range(pruner.get_out_channels(layer)))
    for item in graph.get_pruning_group(layer, pruner.prune_out_channels, outputs):
        dependency, indices = item
        if not _is_transparent(dependency.target):
            side = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
            yield dependency.target.module, side, np.array(indices), np.array(item.root_idxs)


def _is_transparent(node: Any) -> bool:
    """Whether channels pass: an operation without parameters, other than the network's output."""
    from torch_pruning import ops

    module = node.module
    if isinstance(module, ops._OutputOp | ops._SplitOp | ops._UnbindOp | nn.Parameter):
        return False
    if isinstance(module, ops._ElementWiseOp):
        name = str(module._grad_fn).lower()
        inside = any(isinstance(after.module, _InstanceNorm) for after in node.outputs)
        return inside or not any(word in name for word in OPAQUE)
    if isinstance(module, ops._SliceOp):  # a cut along a map's height or width
        return module.dim in (2, 3) and len(module.grad_fn._saved_self_sym_sizes) == 4
    if isinstance(module, _NormBase) and not module.affine and module.track_running_stats:
        return False  # its statistics would have to be cut by a name that no parameter has
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1
    return not isinstance(module, nn.LayerNorm | nn.GroupNorm) and not any(
        True for _ in module.parameters()
    )


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a network's output, which may nest them in dictionaries, lists and tuples."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    if not isinstance(output, dict | list | tuple):
        return []
    return [tensor for value in values for tensor in tensors_of(value)]
