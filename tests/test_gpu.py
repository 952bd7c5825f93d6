"""What `make gpu` checks on a GPU, in miniature on a CPU."""

import pytest
import torch
from torch import Tensor

from swdlib.fast import lowest_on_gpu
from tests import gpu


@pytest.mark.slow
def test_all_that_a_cpu_can_do_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line[:28].strip(): line[29:35].strip() for line in lines}
    held = {name for name, verdict in verdicts.items() if verdict == "holds"}
    assert held == {
        *("selection is the oracle's", "many tensors", "torch.compile", "bf16"),
        "selecting of 1,000",
    }
    assert all(verdicts[name] == "-" for name in verdicts.keys() - held)


def test_a_check_that_fails_is_said_and_told_by_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> str:
        raise AssertionError("3 is not 4")

    monkeypatch.setattr(gpu, "checks_on", lambda device: {"sum": wrong})
    assert gpu.main(["--device", "cpu"]) == 1
    assert "FAILS  AssertionError('3 is not 4')" in capsys.readouterr().out


def test_a_wrong_selection_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_more(tensors: list[Tensor], count: int) -> list[Tensor]:
        return lowest_on_gpu(tensors, count + 1)

    monkeypatch.setattr(gpu, "lowest_on_gpu", one_more)
    with pytest.raises(AssertionError):
        gpu.selection("cpu", 300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no GPU here; --device cpu does" in capsys.readouterr().err
