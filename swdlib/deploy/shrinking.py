"""Shrinking: from a masked network to one that is physically smaller and computes the same."""

import copy
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from swdlib.channels import Found, find_attentions, tensors_of, trace_units
from swdlib.masks import Masks, apply_
from swdlib.metrics import in_eval

# How far the outputs of both networks may differ, relative to the largest; four roundings in half
# precision. Outputs below LEAST count as that, since rounding may be a larger share of them.
TOLERANCE = 1e-4
LEAST = 1e-2

REMEDY = (
    "leave the layers concerned out of the masks, or rewrite what depends on their channels, such "
    "as a mean over channels or their number"
)

# (parameter, dim) -> a bool tensor, True for each slice that stays.
Kept = dict[tuple[str, int], Tensor]


def shrink(model: nn.Module, masks: Masks, example: Tensor) -> nn.Module:
    """A smaller copy of `model`, without the channels and heads that nothing reads once masked.

    `example` is an input of the model. Any masks will do: of filters, or of single weights if they
    empty whole channels. The outputs in evaluation mode are those of the masked model, which is
    checked on `example`, or on noise of its shape if it is constant. A layer keeps at least one
    channel. Raises Untraceable for a model whose channels cannot be followed, and ValueError if
    the smaller one would compute something else.
    """
    masked = copy.deepcopy(model)
    apply_(masked, masks)
    layers = [*trace_units(masked, example), *find_attentions(masked)]
    small = copy.deepcopy(masked)
    _cut(small, _find_kept(masked, layers))
    _require_equal(small, masked, example)
    return small


def _find_kept(model: nn.Module, layers: list[Found]) -> Kept:
    parts = [part for layer in layers for part in layer.parts]
    kept: Kept = {(p.name, p.dim): torch.ones(len(p.units), dtype=torch.bool) for p in parts}
    # Where an output reads nothing of an input, shape (outputs, inputs).
    unread: dict[str, Tensor] = {}
    for part in parts:
        if part.role == "input":
            weight = model.get_parameter(part.name).detach()
            zero = (weight.reshape(*weight.shape[:2], -1) == 0).all(2).cpu()
            unread[part.name] = zero if part.dim == 1 else zero.T
    # A unit that goes reads nothing any more, so that others may lose their last reader.
    while sum(_drop(layer, kept, unread) for layer in layers):  # any() would skip layers
        pass
    return kept


def _drop(layer: Found, kept: Kept, unread: dict[str, Tensor]) -> bool:
    """Drop the layer's units that nothing reads; return whether there was one."""
    read = torch.zeros(layer.count, dtype=torch.bool)
    alive = torch.zeros(layer.count, dtype=torch.bool)
    for part in layer.parts:
        inside = part.units >= 0
        alive[part.units[inside & kept[part.name, part.dim]]] = True
        if part.role == "input":
            rows = kept.get((part.name, 1 - part.dim))
            zero = unread[part.name] if rows is None else unread[part.name][rows]
            read[part.units[inside & ~zero.all(0)]] = True
    if not (alive & read).any():
        read[alive.nonzero()[0]] = True  # a layer without units cannot run: its first one stays
    dropped = alive & ~read
    for part in layer.parts:
        gone = torch.cat([dropped, dropped.new_zeros(1)])[part.units]  # unit -1 is none: it stays
        kept[part.name, part.dim] = kept[part.name, part.dim] & ~gone
    return bool(dropped.any())


def _cut(model: nn.Module, kept: Kept) -> None:
    """Cut every parameter down to its kept slices, and its layer with it."""
    of_modules: dict[str, dict[tuple[str, int], Tensor]] = defaultdict(dict)
    for (name, dim), stays in kept.items():
        owner, _, attribute = name.rpartition(".")
        of_modules[owner][attribute, dim] = stays.nonzero().squeeze(1)
    for owner, cuts in of_modules.items():
        module = model.get_submodule(owner)
        outputs_before = len(module.weight) if isinstance(module, _ConvNd) else 0
        for (attribute, dim), slices in cuts.items():
            _cut_tensor(module, attribute, dim, slices)
        if isinstance(module, _NormBase):
            for buffer in ("running_mean", "running_var"):
                if getattr(module, buffer) is not None:
                    _cut_tensor(module, buffer, 0, cuts["weight", 0])
        if isinstance(module, nn.MultiheadAttention):
            _replace(model, module)
        _update_sizes(module, outputs_before)


def _cut_tensor(module: nn.Module, name: str, dim: int, slices: Tensor) -> None:
    tensor = getattr(module, name)
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    smaller = tensor.detach().index_select(dim, slices.to(tensor.device))
    smaller = smaller.clone(memory_format=layout)
    if isinstance(tensor, nn.Parameter):
        smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
    setattr(module, name, smaller)


def _update_sizes(module: nn.Module, outputs_before: int) -> None:
    """Correct what a layer says of its own shape."""
    if isinstance(module, _ConvTransposeNd) and module.groups == 1:
        module.in_channels, module.out_channels = module.weight.shape[:2]
    elif isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        if module.groups > 1:  # only whole groups are removed
            module.groups = module.groups * len(module.weight) // outputs_before
        module.out_channels = len(module.weight)
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        module.num_features = len(module.weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _replace(model: nn.Module, attention: nn.MultiheadAttention) -> None:
    """Put an Attention wherever one that lost heads stands."""
    if len(attention.in_proj_weight) == 3 * attention.embed_dim:
        return
    smaller = Attention(attention)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is attention:
                setattr(parent, name, smaller)
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # only its fused path takes these


@torch.no_grad()
def _require_equal(small: nn.Module, masked: nn.Module, example: Tensor) -> None:
    if example.is_floating_point() and example.min() == example.max():
        # A constant may leave much of a network at zero.
        noise = torch.rand(example.shape, generator=torch.Generator().manual_seed(0))
        example = noise.to(example)
    plain = [m for m in small.modules() if isinstance(m, _InstanceNorm) and not m.affine]
    hooks = [module.register_forward_pre_hook(_update_features) for module in plain]
    try:
        with in_eval(small), in_eval(masked):
            difference, limit = _difference(small, masked, example)
    except Exception as error:  # the network's own code may rely on a size that has changed
        raise ValueError(
            f"{type(masked).__name__} does not run once its channels are removed: {error}; {REMEDY}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not difference <= limit:
        raise ValueError(
            f"without its masked channels {type(masked).__name__} computes something else: outputs "
            f"differ by {difference:g}, where {limit:g} would be rounding; an operation uses "
            f"channels in a way that its graph does not show: {REMEDY}"
        )


def _update_features(norm: Any, inputs: tuple[Tensor, ...]) -> None:
    # An instance norm without parameters is not cut, but warns if its number of features is wrong.
    norm.num_features = inputs[0].shape[-norm._get_no_batch_dim()]


def _difference(small: nn.Module, masked: nn.Module, example: Tensor) -> tuple[float, float]:
    """The largest difference between the outputs, and how large rounding may make it."""
    ours, theirs = (tensors_of(network(example)) for network in (small, masked))
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ValueError("its outputs have other shapes")
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b.is_floating_point()]
    differences = [float((a - b).abs().max()) for a, b in pairs if b.numel()]
    sizes = [float(b.abs().max()) for _, b in pairs if b.numel()]
    roundings = [4 * torch.finfo(b.dtype).eps for _, b in pairs]
    limit = max([TOLERANCE, *roundings]) * max([LEAST, *sizes])
    return float(torch.tensor([0.0, *differences]).max()), limit  # NaN if there is one


class Attention(nn.Module):
    """A torch.nn.MultiheadAttention that has lost heads, called like the original.

    The original requires its heads together to be as wide as its input. Built from one whose
    weights are already cut, by whole heads.
    """

    _qkv_same_embed_dim = False  # keeps torch.nn.TransformerEncoderLayer off its fused path

    def __init__(self, cut: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.head_dim = cut.embed_dim, cut.head_dim
        self.dropout, self.batch_first = cut.dropout, cut.batch_first
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
        """The attended values and, if asked for, the attention weights, like the original.

        ValueError for an `attn_mask` of another number of heads, and for `is_causal` without one.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is missing: give it too")
        length_first = query.ndim == 3 and not self.batch_first
        inputs = [x.transpose(0, 1) if length_first else x for x in (query, key, value)]
        q, k, v = (self._heads(x, third) for third, x in enumerate(inputs))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(heads.transpose(-3, -2).flatten(-2))
        return out.transpose(0, 1) if length_first else out, weights

    def _heads(self, x: Tensor, third: int) -> Tensor:
        """The query, key or value of each head, shape (..., heads, length, head_dim)."""
        weight = self.in_proj_weight.chunk(3)[third]
        bias = None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[third]
        heads = F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(-3, -2)

    def _mask(self, attn: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, shape (..., heads or 1, length or 1, keys)."""
        if attn is not None and attn.ndim == 3:
            heads = q.shape[:-2]
            if len(attn) != heads.numel():
                raise ValueError(
                    f"attn_mask has a mask for each of {len(attn)} heads of the batch, but "
                    f"{heads.numel()} are left (batch size x num_heads): pass one of shape "
                    "(length, keys) for all heads, or drop those of the removed heads"
                )
            attn = attn.unflatten(0, heads)
        if padding is not None:
            padding = padding[..., None, None, :]
        total = None
        for mask in (attn, padding):
            if mask is not None:
                if mask.dtype == torch.bool:
                    mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
                total = mask if total is None else total + mask
        return total
