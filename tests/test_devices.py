"""Devices and arithmetic: what is there, and clear words about what is not."""

import pytest
import torch

from swdlib.devices import find_device, is_main_process, make_accelerator

CPU = torch.device("cpu")


def test_the_cpu_is_always_there() -> None:
    assert find_device("cpu") == CPU
    assert find_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    assert is_main_process()


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
