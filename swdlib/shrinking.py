"""Shrinking: from a masked network to one that is physically smaller and computes the same."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from swdlib.graph import Found, find_attentions, trace_units
from swdlib.masks import Masks, apply_

TOLERANCE = 1e-4


def shrink(model: nn.Module, masks: Masks, example: Tensor) -> nn.Module:
    """A smaller copy of `model`, without the channels and heads that nothing reads once masked.

    `example` is an input of the model. Any masks will do: of filters, or of single weights, of
    which enough must be gone. The outputs in evaluation mode are those of the masked model, which
    is checked on `example`. A layer keeps at least one channel. Raises Untraceable for a model that
    cannot be followed, and ValueError if the smaller one would compute something else.
    """
    masked = copy.deepcopy(model)
    apply_(masked, masks)
    layers = [*trace_units(masked, example), *find_attentions(masked)]
    kept = _kept(masked, layers)
    small = copy.deepcopy(masked)
    _cut(small, kept)
    _require_equal(small, masked, example)
    return small


def _kept(model: nn.Module, layers: list[Found]) -> dict[tuple[str, int], Tensor]:
    """(parameter, dim) -> a bool tensor, True for each slice that stays."""
    kept: dict[tuple[str, int], Tensor] = {}
    for layer in layers:
        for part in layer.parts:
            whole = torch.ones(len(part.units), dtype=torch.bool)
            kept.setdefault((part.name, part.dim), whole)
    parameters = dict(model.named_parameters())
    unread = {name: _zero_slices(parameters[name], dim) for name, dim in kept if dim == 1}
    settled = False
    while not settled:  # what goes no longer reads: further channels may lose their last reader
        dropped = [_drop(layer, parameters, kept, unread) for layer in layers]  # each has its turn
        settled = not any(dropped)
    return kept


def _zero_slices(parameter: Tensor, dim: int) -> Tensor:
    """Which rows of each input are zero altogether, shape (outputs, inputs)."""
    matrix = (
        parameter.detach().flatten(2) if parameter.ndim > 2 else parameter.detach().unsqueeze(2)
    )
    return (matrix == 0).all(2).cpu()


def _drop(
    layer: Found,
    parameters: dict[str, nn.Parameter],
    kept: dict[tuple[str, int], Tensor],
    unread: dict[str, Tensor],
) -> bool:
    """Drop the layer's units that nothing reads; whether there was one."""
    read = torch.zeros(layer.count, dtype=torch.bool)
    alive = torch.zeros(layer.count, dtype=torch.bool)
    for part in layer.parts:
        inside = part.units >= 0
        alive[part.units[inside & kept[part.name, part.dim]]] = True
        if part.role == "input":
            rows = kept.get((part.name, 1 - part.dim))
            zero = unread[part.name] if part.dim == 1 else _zero_slices(parameters[part.name], 0).T
            zero = zero if rows is None else zero[rows]
            read[part.units[inside & ~zero.all(0)]] = True
    if not (alive & read).any():
        read[alive.nonzero()[0]] = True  # a layer of nothing cannot run: its first unit stays
    dropped = alive & ~read
    for part in layer.parts:
        gone = torch.cat([dropped, dropped.new_zeros(1)])[part.units]
        kept[part.name, part.dim] = kept[part.name, part.dim] & ~gone
    return bool(dropped.any())


def _cut(model: nn.Module, kept: dict[tuple[str, int], Tensor]) -> None:
    """Cut every parameter down to its kept slices, and the layers with them."""
    for name, module in list(model.named_modules()):
        prefix = name + "." if name else ""
        mine = {
            (key[len(prefix) :], dim): slices.nonzero().squeeze(1)
            for (key, dim), slices in kept.items()
            if key.startswith(prefix) and "." not in key[len(prefix) :]
        }
        before = len(module.weight) if isinstance(module, _ConvNd) else 0
        for (attribute, dim), slices in mine.items():
            _cut_tensor(module, attribute, dim, slices)
        if isinstance(module, _NormBase) and mine:
            for buffer in ("running_mean", "running_var"):
                if getattr(module, buffer) is not None:
                    _cut_tensor(module, buffer, 0, mine["weight", 0])
        if isinstance(module, nn.MultiheadAttention) and mine:
            _replace(model, name, Attention(module))
        _tell_sizes(module, before)


def _cut_tensor(module: nn.Module, name: str, dim: int, slices: Tensor) -> None:
    tensor = getattr(module, name)
    smaller = tensor.detach().index_select(dim, slices.to(tensor.device)).clone()
    if isinstance(tensor, nn.Parameter):
        smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    setattr(module, name, smaller)


def _tell_sizes(module: nn.Module, outputs_before: int) -> None:
    """Set the numbers that a layer keeps of its own shape."""
    if isinstance(module, _ConvTransposeNd) and module.groups == 1:
        module.in_channels, module.out_channels = module.weight.shape[:2]
    elif isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        if module.groups > 1:  # whole groups leave
            module.groups = module.groups * len(module.weight) // outputs_before
        module.out_channels = len(module.weight)
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase) and module.weight is not None:
        module.num_features = len(module.weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@torch.no_grad()
def _require_equal(small: nn.Module, masked: nn.Module, example: Tensor) -> None:
    modes = {module: module.training for net in (small, masked) for module in net.modules()}
    try:
        difference, size = _difference(small.eval(), masked.eval(), example)
    except Exception as error:  # the network's own code may rely on a size that has changed
        raise ValueError(
            f"{type(masked).__name__} does not run once its channels are removed: {error}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if not difference <= TOLERANCE * max(1.0, size):
        raise ValueError(
            f"without its masked channels {type(masked).__name__} computes something else: outputs "
            f"of up to {size:g} differ by {difference:g}; it does something to channels that its "
            "graph does not show"
        )


def _difference(small: nn.Module, masked: nn.Module, example: Tensor) -> tuple[float, float]:
    ours, theirs = (_tensors(network(example)) for network in (small, masked))
    differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    return max(differences), max(float(t.abs().max()) for t in theirs)


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [v for v in values if isinstance(v, Tensor)]  # type: ignore[attr-defined]


class Attention(nn.Module):
    """What is left of a torch.nn.MultiheadAttention some of whose heads were removed.

    It is called like the original; there the width of all heads together has to be the input's.
    """

    _qkv_same_embed_dim = False  # keeps torch.nn.TransformerEncoderLayer off its fused path

    def __init__(self, cut: nn.MultiheadAttention) -> None:
        super().__init__()
        self.head_dim, self.dropout, self.batch_first = cut.head_dim, cut.dropout, cut.batch_first
        self.num_heads = len(cut.in_proj_weight) // (3 * cut.head_dim)
        self.in_proj_weight, self.in_proj_bias = cut.in_proj_weight, cut.in_proj_bias
        self.out_proj = cut.out_proj
        self.training = cut.training

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values and, if wanted, the weights of attention, as the original's."""
        inputs = [query, key, value]
        if query.ndim == 3 and not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = (self._heads(x, i) for i, x in enumerate(inputs))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        for mask in (attn_mask, key_padding_mask):
            if mask is not None:
                scores = scores + self._added(mask, scores, keys=mask is key_padding_mask)
        attention = F.dropout(scores.softmax(-1), self.dropout, self.training)
        out = self.out_proj((attention @ v).transpose(-3, -2).flatten(-2))
        if query.ndim == 3 and not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, attention.mean(-3) if average_attn_weights else attention

    def _heads(self, x: Tensor, third: int) -> Tensor:
        """The query, key or value of each head, shape (..., heads, length, head_dim)."""
        weight = self.in_proj_weight.chunk(3)[third]
        bias = None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[third]
        heads = F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(-3, -2)

    def _added(self, mask: Tensor, scores: Tensor, keys: bool) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -math.inf)
        if keys:
            return mask[..., None, None, :]
        # A mask a head is not told which heads are left: one for all of them is.
        return mask if mask.ndim == 2 else mask.unflatten(0, (-1, self.num_heads))
