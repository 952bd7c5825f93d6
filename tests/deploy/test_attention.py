"""Attention: the same as torch.nn.MultiheadAttention, called in every way."""

from typing import Any

import pytest
import torch
from torch import nn

from swdlib.comparing import Attention


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


UNBATCHED: list[dict[str, Any]] = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": torch.ones(5, 7).triu(1).bool()},
    {"attn_mask": torch.rand(4, 5, 7)},
    {"attn_mask": torch.rand(4, 5, 7), "need_weights": False},
    {"key_padding_mask": torch.tensor([False] * 5 + [True] * 2)},
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", UNBATCHED)
def test_unbatched_attention_to_another_sequence(options: dict[str, Any], bias: bool) -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(12, 4, bias=bias).eval()
    inputs = torch.randn(5, 12), *[torch.randn(7, 12)] * 2
    ours, theirs = Attention(original)(*inputs, **options), original(*inputs, **options)
    assert [None if t is None else t.shape for t in ours] == [
        None if t is None else t.shape for t in theirs
    ]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_causal_hint_changes_nothing(need_weights: bool) -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(12, 4, batch_first=True).eval()
    x, mask = torch.randn(2, 5, 12), torch.ones(5, 5).triu(1).bool()
    options: dict[str, Any] = {"attn_mask": mask, "need_weights": need_weights}
    ours = Attention(original)(x, x, x, is_causal=True, **options)
    torch.testing.assert_close(ours, original(x, x, x, is_causal=True, **options))


def test_a_sequence_that_is_all_padding_is_as_in_the_original() -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(12, 4, batch_first=True)
    x, padding = torch.randn(2, 5, 12), torch.tensor([[False] * 5, [True] * 5])
    options: dict[str, Any] = {"key_padding_mask": padding, "need_weights": False}
    torch.testing.assert_close(
        Attention(original)(x, x, x, **options), original(x, x, x, **options), equal_nan=True
    )


def test_masks_that_do_not_fit_are_refused() -> None:
    attention = Attention(nn.MultiheadAttention(12, 4, batch_first=True))
    x = torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match="a mask for each of 6 heads of the batch, but 8 are left"):
        attention(x, x, x, attn_mask=torch.zeros(6, 5, 5))
    with pytest.raises(ValueError, match="is_causal is a hint about attn_mask, which is missing"):
        attention(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_in_training_only(need_weights: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(nn.MultiheadAttention(12, 4, dropout=0.5, batch_first=True))
    x = torch.randn(2, 5, 12)

    def twice() -> bool:
        one, other = (attention(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        return torch.equal(one, other)

    assert not twice()
    attention.eval()
    assert twice()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchscript_reads_an_encoder_without_heads(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=batch_first).eval()
    layer.self_attn = Attention(layer.self_attn)  # type: ignore[assignment]
    scripted, x = torch.jit.script(layer), torch.rand(3, 5, 12)
    padding = torch.zeros((3, 5) if batch_first else (5, 3), dtype=torch.bool)
    padding[:, -1] = True
    for options in ({}, {"src_key_padding_mask": padding}, {"src_mask": torch.rand(5, 5) < 0.5}):
        if not batch_first and "src_mask" in options:
            options = {"src_mask": torch.zeros(3, 3, dtype=torch.bool)}
        torch.testing.assert_close(scripted(x, **options), layer(x, **options))
