"""Devices and arithmetic: what is there, and clear words about what is not."""

from importlib.util import find_spec

import pytest
import torch

from swdlib.devices import Tracker, check_tracker, find_device, is_main_process, make_accelerator

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
