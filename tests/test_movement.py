"""Movement: by hand."""

import pytest
import torch
from torch import nn

from swdlib.hooks import Movement, fitted_units
from swdlib.structures import Group, kernels


def of(*chosen: bool) -> list[torch.Tensor]:
    return [torch.tensor(chosen)]


def test_movement_by_hand() -> None:
    groups = [Group("w", nn.Parameter(torch.tensor([3.0, 4.0, 12.0, 5.0])))]
    movement = Movement()
    first = movement.report(groups, of(True, True, False, False))
    assert first == {"selected": 2, "norm_selected": 5.0, "norm_kept": 13.0}
    second = movement.report(groups, of(True, False, True, True))
    assert (second["entered"], second["left"], second["selected"]) == (2, 1, 3)
    assert second["norm_kept"] == 4.0
    third = movement.report(groups, of(True, False, True, True))
    assert (third["entered"], third["left"]) == (0, 0)


def test_units_of_several_weights_count_once() -> None:
    convolution = nn.Conv2d(1, 2, 3)
    convolution.weight.data[:] = 1.0
    movement = Movement()
    movement.report(kernels(convolution), of(True, False))
    report = movement.report(kernels(convolution), of(False, True))
    assert (report["entered"], report["left"], report["selected"]) == (1, 1, 1)
    assert report["norm_selected"] == report["norm_kept"] == 3.0


def test_what_is_kept_is_a_copy() -> None:
    units = of(True, False)
    movement = Movement()
    movement.report([Group("w", nn.Parameter(torch.ones(2)))], units)
    units[0].fill_(False)
    assert movement.units[0].tolist() == [True, False]


def test_units_that_do_not_fit_are_refused() -> None:
    groups = [Group("w", nn.Parameter(torch.ones(2)))]
    fitted_units(groups, [])
    fitted_units(groups, of(True, False))
    wrong = (of(True), [torch.ones(2)], [*of(True, False), *of(True, False)])
    for units in wrong:
        with pytest.raises(ValueError, match="units must have shapes and types"):
            fitted_units(groups, units)


def test_norms_of_half_precision_do_not_overflow() -> None:
    groups = [Group("w", nn.Parameter(torch.full((2,), 300.0, dtype=torch.float16)))]
    report = Movement().report(groups, of(True, False))
    assert report["norm_selected"] == report["norm_kept"] == 300.0
