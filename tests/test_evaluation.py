"""Evaluation, by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from swdlib.data.images import Split
from swdlib.metrics import evaluate, recalibrated
from tests.runs.test_training import toy_data


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


def test_evaluation_leaves_every_mode_as_it_was() -> None:
    model = Scaled()
    model.norm.eval()  # frozen, as when one fine-tunes
    evaluate(model, toy_data())
    assert model.training and not model.norm.training

    def failing(*_: Tensor, **__: str) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        evaluate(model, toy_data(), loss=failing)
    assert model.training and not model.norm.training


class Scaled(nn.Module):
    """Batch norm of the first pixel, and a class for each sign."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, images: Tensor) -> Tensor:
        value = self.norm(images.flatten(1)[:, :1])
        return torch.cat([value, -value, torch.zeros_like(value)], dim=1)


def test_recalibrated_statistics_are_those_of_the_training_images() -> None:
    data, model = toy_data(), Scaled()
    model.norm.running_mean = torch.tensor([1e3])  # as if the weights had moved far
    fresh = recalibrated(model, data, batch_size=4)
    assert isinstance(fresh, Scaled) and not fresh.training
    batches = [images.flatten(1)[:, 0] for images, _ in data.train_batches(4, seed=0, epoch=0)]
    mean = torch.stack([batch.mean() for batch in batches]).mean()
    var = torch.stack([batch.var() for batch in batches]).mean()
    torch.testing.assert_close(fresh.norm.running_mean, mean[None])
    torch.testing.assert_close(fresh.norm.running_var, var[None])
    assert model.training and model.norm.running_mean == 1e3  # as it was
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True)
    )


def test_as_many_batches_are_read_as_asked() -> None:
    data, model = toy_data(), Scaled()
    fresh = recalibrated(model, data, batch_size=4, batches=1)
    first = next(data.train_batches(4, seed=0, epoch=0))[0].flatten(1)[:, 0]
    assert isinstance(fresh, Scaled)
    torch.testing.assert_close(fresh.norm.running_mean, first.mean()[None])


def test_without_batch_norm_there_is_nothing_to_recalibrate() -> None:
    assert recalibrated(nn.Linear(2, 3), toy_data()) is None
    assert recalibrated(nn.BatchNorm1d(1, track_running_stats=False), toy_data()) is None


def test_without_training_images_nothing_is_recalibrated() -> None:
    data = toy_data()
    nothing = replace(data, train=Split(data.train.images[:0], data.train.labels[:0]))
    with pytest.raises(ValueError, match="training images, and the data have none"):
        recalibrated(Scaled(), nothing)
