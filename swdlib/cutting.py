"""Cutting: slices taken out of a network, and every module told its new sizes."""

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

# What a module calls the lengths of its parameters: attribute -> (parameter, dimension).
SIZES: tuple[tuple[type[nn.Module], dict[str, tuple[str, int]]], ...] = (
    (nn.Linear, {"out_features": ("weight", 0), "in_features": ("weight", 1)}),
    (nn.Embedding, {"embedding_dim": ("weight", 1)}),
    (nn.EmbeddingBag, {"embedding_dim": ("weight", 1)}),
    (_NormBase, {"num_features": ("weight", 0)}),
    (nn.GroupNorm, {"num_channels": ("weight", 0)}),
    (nn.PReLU, {"num_parameters": ("weight", 0)}),
    (nn.RNNBase, {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)}),
    (nn.RNNCellBase, {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)}),
)


def twin(model: nn.Module) -> nn.Module:
    """A copy of the model's modules that shares its parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def replace(model: nn.Module, changed: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers, wherever modules hold these."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    by_id = {id(held[name]): tensor for name, tensor in changed.items()}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if id(tensor) in by_id:
                    new = by_id[id(tensor)]
                    if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                        by_id[id(tensor)] = new
                    setattr(module, name, new)


@torch.no_grad()
def cut(model: nn.Module, kept: Mapping[tuple[str, int], Tensor]) -> None:
    """Cut parameters and buffers, in place, down to the slices kept along (name, dimension).

    ValueError for a module that cannot be cut so.
    """
    of_tensors: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (name, dim), stays in kept.items():
        if not stays.all():
            of_tensors[name][dim] = stays.nonzero().squeeze(1)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    changed = {name: _smaller(held[name], dims) for name, dims in of_tensors.items()}
    before = {
        module: {name: p.shape for name, p in module._parameters.items() if p is not None}
        for module in model.modules()
    }
    replace(model, changed)
    for module, shapes in before.items():
        now = {name: p.shape for name, p in module._parameters.items() if p is not None}
        if now != shapes:
            _tell(module, shapes)
    for module in list(before):
        if isinstance(module, nn.MultiheadAttention):
            _swap(model, module)


def _smaller(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    smaller = tensor.detach()
    for dim, slices in dims.items():
        smaller = smaller.index_select(dim, slices.to(tensor.device))
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return smaller.clone(memory_format=layout)


def _tell(module: Any, before: Mapping[str, torch.Size]) -> None:
    """Correct what a module says of its own sizes."""
    for kind, sizes in SIZES:
        if isinstance(module, kind):
            for attribute, (name, dim) in sizes.items():
                setattr(module, attribute, getattr(module, name).shape[dim])
    if isinstance(module, _ConvNd):
        weight, old = module.weight.shape, before["weight"]
        if module.groups > 1:  # only whole groups are removed
            module.groups = module.groups * weight[0] // old[0]
        sides = weight[0], weight[1] * module.groups
        flipped = isinstance(module, _ConvTransposeNd)
        module.out_channels, module.in_channels = sides[::-1] if flipped else sides
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * len(module.weight) // before["weight"][0]
    elif hasattr(module, "nf") and hasattr(module, "nx"):  # Conv1D of Hugging Face
        module.nx, module.nf = module.weight.shape


def _swap(model: nn.Module, attention: nn.MultiheadAttention) -> None:
    """Put an Attention wherever one that lost heads stands."""
    if attention.in_proj_weight is None or len(attention.in_proj_weight) == 3 * attention.embed_dim:
        return
    smaller = Attention(attention)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is attention:
                setattr(parent, name, smaller)
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # only its fused path takes these


class Attention(nn.Module):
    """A torch.nn.MultiheadAttention that has lost heads, called like the original.

    The original requires its heads together to be as wide as its input. Built from one whose
    weights are already cut, by whole heads.
    """

    # The fused path of torch.nn.TransformerEncoderLayer names it, and TorchScript reads all paths.
    merge_masks = nn.MultiheadAttention.merge_masks

    def __init__(self, cut: nn.MultiheadAttention) -> None:
        super().__init__()
        self._qkv_same_embed_dim = False  # keeps TransformerEncoderLayer off its fused path
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
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            shares = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = shares @ v
            weights = shares.mean(-3) if average_attn_weights else shares
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
            left = q[..., 0, 0].numel()
            if len(attn) != left:
                raise ValueError(
                    f"attn_mask has a mask for each of {len(attn)} heads of the batch, but "
                    f"{left} are left (batch size x num_heads): pass one of shape "
                    "(length, keys) for all heads, or drop those of the removed heads"
                )
            attn = attn.unflatten(0, heads)
        if padding is not None:
            padding = padding[..., None, None, :]
        total: Tensor | None = None
        for mask in (attn, padding):
            if mask is not None:
                if mask.dtype == torch.bool:
                    mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
                total = mask if total is None else total + mask
        return total
