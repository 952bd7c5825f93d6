"""Attention: what is left of torch.nn.MultiheadAttention once heads are removed."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """A torch.nn.MultiheadAttention of any number of heads, called like the original.

    There the width of all heads together has to be that of the input; here it need not be. Built
    from an attention whose weights are cut already, by whole heads.
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
        """The attended values and, if wanted, the weights of attention, as the original's.

        ValueError for an `attn_mask` of another number of heads and, as it is no more than a hint,
        for `is_causal` without a mask.
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
                    f"{heads.numel()} are left (batch size x num_heads): give one of shape "
                    "(length, keys) for all heads, or leave out those of the removed heads"
                )
            attn = attn.unflatten(0, heads)
        if padding is not None:
            padding = padding[..., None, None, :]
        masks = [_additive(mask, q.dtype) for mask in (attn, padding) if mask is not None]
        return sum(masks[1:], start=masks[0]) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus infinity where a bool mask is True; any other mask as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
