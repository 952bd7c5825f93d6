"""Attention: the same as torch.nn.MultiheadAttention, called in every way."""

from typing import Any

import pytest
import torch
from torch import nn

from swdlib.attention import Attention


def calls() -> list[dict[str, Any]]:
    causal = torch.ones(5, 5).triu(1).bool()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return [
        {"need_weights": False},
        {"need_weights": True},
        {"average_attn_weights": False},
        {"attn_mask": causal},
        {"attn_mask": torch.randn(5, 5)},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(8, 5, 5), "key_padding_mask": padding.float()},
    ]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", range(7))
def test_attention_is_called_like_the_original(batch_first: bool, call: int) -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(12, 4, batch_first=batch_first).eval()
    inputs = [torch.randn((2, 5, 12) if batch_first else (5, 2, 12)) for _ in range(3)]
    options: dict[str, Any] = calls()[call]
    ours, our_weights = Attention(original)(*inputs, **options)
    theirs, their_weights = original(*inputs, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_weights, their_weights)


def test_unbatched_attention() -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(12, 4).eval()
    x = torch.randn(5, 12)
    torch.testing.assert_close(Attention(original)(x, x, x), original(x, x, x))


def test_masks_that_do_not_fit_are_refused() -> None:
    attention = Attention(nn.MultiheadAttention(12, 4, batch_first=True))
    x = torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match="a mask for each of 6 heads of the batch, but 8 are left"):
        attention(x, x, x, attn_mask=torch.zeros(6, 5, 5))
    with pytest.raises(ValueError, match="is_causal is a hint about attn_mask, which is missing"):
        attention(x, x, x, is_causal=True)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    attention = Attention(nn.MultiheadAttention(12, 4, dropout=0.5, batch_first=True))
    x = torch.randn(2, 5, 12)
    assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    attention.eval()
    assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
