"""Updates: by hand, and the same whether a mask or a bound tells what is chosen."""

import math

import pytest
import torch
from torch import Tensor

from swdlib import fast as updates
from swdlib.fast import add_, add_compiled_, divide_

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """One tensor in several layouts."""
    whole = torch.linspace(-1.0, 1.0, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)
    return {
        "contiguous": whole.clone(),
        "channels last": whole.contiguous(memory_format=torch.channels_last),
        "with gaps": whole.repeat_interleave(2, -1)[..., ::2],
        "empty": whole[:0].clone(),
        "scalar": whole[0, 0, 0, 0].clone(),
    }


def test_by_hand() -> None:
    weight, gradient = torch.tensor([1.0, -2.0, 3.0, -0.0]), torch.ones(4)
    add_(gradient, weight, 2.0, 0.5)
    assert gradient.tolist() == [1.5, 1.0, 1.0, 1.0]
    add_(gradient, weight, torch.tensor([False, True, False, False]), 0.5)
    assert gradient.tolist() == [1.5, 0.0, 1.0, 1.0]
    divide_(weight, math.nextafter(2.0, 3.0) + 1e-6, 4.0)
    assert weight.tolist() == [0.25, -0.5, 3.0, 0.0]
    divide_(weight, torch.tensor([False, False, True, False]), 2.0)
    assert weight.tolist() == [0.25, -0.5, 1.5, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", weights(torch.float32))
@pytest.mark.parametrize("gradient_layout", ["the weight's", "contiguous"])
def test_a_bound_does_what_its_mask_does(
    layout: str, gradient_layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "PIECE", 16)
    weight = weights(dtype)[layout]
    for bound in (0.0, 0.25, float(weight.abs().max()) if weight.numel() else 1.0, 2.0):
        mask = weight.abs().double() < bound
        first = torch.full_like(weight, 0.5)
        if gradient_layout == "contiguous":
            first = first.contiguous()
        second = first.clone()
        add_(first, weight, bound, 0.125)
        add_(second, weight, mask, 0.125)
        torch.testing.assert_close(first, second, rtol=torch.finfo(dtype).eps, atol=0)
        assert torch.equal(first == 0.5, second == 0.5)
        shrunk = weight.clone()
        divide_(shrunk, bound, 3.0)
        assert torch.equal(shrunk, torch.where(mask, weight / 3.0, weight))
        masked = weight.clone()
        divide_(masked, mask, 3.0)
        assert torch.equal(masked, shrunk)


@pytest.mark.slow
def test_compiled_code_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "LEAST", 16)
    tensors = list(weights(torch.float32).values())
    first, second = ([torch.full_like(t, 0.5) for t in tensors] for _ in range(2))
    chosen: list[Tensor | float] = [0.25] * len(tensors)
    for masked in (None, 0):  # what a mask tells needs nothing compiled anew
        if masked is not None:
            chosen[masked] = tensors[masked] > 0.5
        add_compiled_(list(zip(first, tensors, chosen, strict=True)), 0.125)
        for gradient, weight, which in zip(second, tensors, chosen, strict=True):
            add_(gradient, weight, which, 0.125)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a == 0.5, b == 0.5)
