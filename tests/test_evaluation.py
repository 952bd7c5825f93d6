"""Evaluation, by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from swdlib.evaluation import evaluate
from tests.test_training import toy_data


def test_evaluate_by_hand() -> None:
    class Fixed(nn.Module):
        """Says class 0 for every image."""

        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([2.0, 0.0, 0.0]).expand(len(images), 3)

    model = Fixed()
    measured = evaluate(model, toy_data(), batch_size=4)  # 11 images: the last batch has 3
    share = 4 / 11  # labels are 0, 1, 2, 0, ... of 11 images
    assert measured["top1"] == pytest.approx(100 * share)
    assert measured["top5"] == 100  # of three classes
    hit = math.log(math.exp(2) + 2) - 2
    miss = math.log(math.exp(2) + 2)
    assert measured["loss"] == pytest.approx(share * hit + (1 - share) * miss)
    assert model.training
