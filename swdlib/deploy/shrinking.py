"""Shrinking: from a masked network to one that is physically smaller and computes the same."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from swdlib.comparing import inputs_like, require_equal
from swdlib.masks import Masks, apply_
from swdlib.units import Found, removable


def shrink(model: nn.Module, masks: Masks, example: Any) -> nn.Module:
    """A smaller copy of `model`, without the channels and heads that nothing reads once masked.

    `example` is an input of the model: a tensor, a tuple of arguments, or a dict of keyword
    arguments. Any masks will do: of filters, or of single weights if they empty whole channels. The
    outputs in evaluation mode are those of the masked model, which is checked on `example` and on
    random inputs of its kind. A layer keeps at least one channel. Raises Untraceable for a model
    whose channels cannot be followed, and ValueError if the smaller one would compute something
    else.
    """
    masked = copy.deepcopy(model)
    apply_(masked, masks)
    channels = removable(model, example)
    small = copy.deepcopy(masked)
    channels.cut(small, _find_kept(masked, channels.found))
    inputs = [example, *inputs_like(example, channels.units.labels.ranges, 2)]
    try:
        require_equal(small, masked, inputs)
    except Exception as error:
        raise ValueError(
            f"without its masked channels {type(masked).__name__} computes something else or does "
            f"not run ({error}); leave the layers concerned out of the masks"
        ) from error
    return small


Kept = dict[tuple[str, int], Tensor]


def _find_kept(model: nn.Module, layers: list[Found]) -> Kept:
    """Which slices stay: those of units that something reads."""
    parts = [part for layer in layers for part in layer.parts]
    kept: Kept = {(p.name, p.dim): torch.ones(len(p.units), dtype=torch.bool) for p in parts}
    used = {
        p.name: (model.get_parameter(p.name).detach() != 0).cpu()
        for p in parts
        if p.role in ("input", "tied")
    }
    # A unit that goes reads nothing any more, so that others may lose their last reader.
    while sum(_drop(layer, kept, used) for layer in layers):  # any() would skip layers
        pass
    return kept


def _drop(layer: Found, kept: Kept, used: dict[str, Tensor]) -> bool:
    """Drop the layer's units that nothing reads; return whether there was one."""
    read = torch.zeros(layer.count, dtype=torch.bool)
    alive = torch.zeros(layer.count, dtype=torch.bool)
    for part in layer.parts:
        inside = part.units >= 0
        alive[part.units[inside & kept[part.name, part.dim]]] = True
        if part.role in ("input", "tied"):
            weights = used[part.name]
            for dim in range(weights.ndim):
                if dim != part.dim and (stays := kept.get((part.name, dim))) is not None:
                    weights = weights[(slice(None),) * dim + (stays,)]
            nonzero = weights.movedim(part.dim, 0).flatten(1).any(1)
            read[part.units[inside & nonzero]] = True
    if not (alive & read).any():
        read[alive.nonzero()[0]] = True  # a layer without units cannot run: its first one stays
    dropped = alive & ~read
    for part in layer.parts:
        kept[part.name, part.dim] = kept[part.name, part.dim] & ~part.slices(dropped)
    return bool(dropped.any())
