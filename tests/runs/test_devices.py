"""Devices and arithmetic: what is there, and clear words about what is not."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from swdlib.runs.devices import (
    Tracker,
    can_be_channels_last,
    check_tracker,
    find_device,
    is_main_process,
    make_accelerator,
)

CPU = torch.device("cpu")


def test_the_cpu_is_always_there() -> None:
    assert find_device("cpu") == CPU
    assert find_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    assert is_main_process()


def test_a_device_that_no_machine_has_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'gpu' is not available here"):
        find_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="device 'cuda' is not available here: use 'auto' or"):
        find_device("cuda")


def test_one_process_can_train_in_several_precisions() -> None:
    assert make_accelerator(CPU, "bf16").mixed_precision == "bf16"
    assert make_accelerator(CPU, "fp32").mixed_precision == "no"


@pytest.mark.parametrize(
    ("capability", "maps", "kernel", "stride", "groups", "right"),
    [
        ("AVX2", 7, 1, 2, 1, False),
        ("AVX2", 16, 1, (1, 2), 4, False),
        ("AVX2", 8, 1, 2, 1, True),
        ("AVX2", 7, 3, 2, 1, True),
        ("AVX2", 7, 1, 1, 1, True),
        ("AVX512", 7, 1, 2, 1, True),
    ],
)
def test_no_layout_that_the_processor_miscomputes(
    capability: str,
    maps: int,
    kernel: int,
    stride: Any,
    groups: int,
    right: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    conv = nn.Conv2d(maps, 8, kernel, stride, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, maps, 3), conv)
    assert can_be_channels_last(model, CPU) is right
    assert can_be_channels_last(model, torch.device("cuda"))


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="precision 'fp16' needs a GPU"):
        make_accelerator(CPU, "fp16")


def test_a_tracker_that_nobody_knows_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"tracker must be one of .*tensorboard, wandb, .*"):
        Tracker("magic")
    with pytest.raises(ValueError, match="not 'all'"):
        check_tracker("all")


@pytest.mark.skipif(find_spec("wandb") is not None, reason="it is installed")
def test_a_tracker_that_is_not_installed_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="tracker 'wandb' is not installed: pip install wandb"):
        check_tracker("wandb")
