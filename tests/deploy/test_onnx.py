"""ONNX files: onnxruntime computes what torch does, for batches of any size."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swdlib.deploy.reports import report
from swdlib.deploy.stored import in_onnxruntime, to_onnx
from swdlib.masks import apply_, select
from swdlib.models import build_model
from swdlib.structures import weights


@pytest.mark.parametrize("name", ["mlp", "cnn", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_onnxruntime_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(name, size=8, width=4)
    model(torch.randn(64, 3, 8, 8))  # so that batch norm has statistics of its own
    to_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "new folder" / "net.onnx")
    assert [file.name for file in (tmp_path / "new folder").iterdir()] == ["net.onnx"]
    run = in_onnxruntime(tmp_path / "new folder" / "net.onnx")
    assert all(module.training for module in model.modules())
    model.eval()
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(run(images), model(images).detach(), rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    """Attention whose one weight holds three: splitting it is what the exporter would remark on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values = (tokens @ part.T for part in self.weight.chunk(3))
        return ((queries @ keys.mT).softmax(-1) @ values).mean(1)


def test_attention_is_exported_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    to_onnx(model, torch.randn(1, 5, 8), tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    tokens = torch.randn(3, 5, 8)
    output = in_onnxruntime(tmp_path / "net.onnx")(tokens)
    torch.testing.assert_close(output, model(tokens).detach(), rtol=1e-5, atol=1e-5)


def test_the_file_says_nothing_of_where_it_was_made(tmp_path: Path) -> None:
    to_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "net.onnx")
    content = (tmp_path / "net.onnx").read_bytes()
    assert b"input" in content
    assert b".py" not in content and b"stack_trace" not in content


class FailsInEval(nn.Sequential):
    def forward(self, x: Any) -> Any:
        if not self.training:
            raise RuntimeError("cannot run")
        return super().forward(x)


def test_a_failed_export_leaves_mode_and_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"before")
    model = FailsInEval(nn.Linear(2, 2), nn.Dropout().eval())
    with pytest.raises(ValueError, match=r"^FailsInEval cannot be written as ONNX: cannot run"):
        to_onnx(model, torch.zeros(1, 2), path)
    assert [module.training for module in model.modules()] == [True, True, False]
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_missing_packages_are_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = r"pip install 'swdlib\[onnx\]'"
    needs = f"needs onnx, onnxruntime, onnxscript: {line}$"
    with pytest.raises(ImportError, match=rf"^deploy\.to_onnx {needs}"):
        to_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "net.onnx")
    with pytest.raises(ImportError, match=rf"^deploy\.in_onnxruntime {needs}"):
        in_onnxruntime(tmp_path / "net.onnx")


@pytest.mark.parametrize("example", [torch.zeros(()), torch.zeros(0, 2)])
def test_an_example_without_an_image_is_refused(example: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"example must be a batch .* not of shape \("):
        to_onnx(nn.Linear(2, 2), example, tmp_path / "net.onnx")


def test_an_example_must_be_a_tensor(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="example must be a tensor, a batch of images, not 3"):
        to_onnx(nn.Linear(2, 2), 3, tmp_path / "net.onnx")  # type: ignore[arg-type]


class FixedBatch(nn.Linear):
    """The exporter takes len(x) as a number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(len(x), -1))


def test_a_network_that_fixes_the_batch_size_is_refused_and_left_out(tmp_path: Path) -> None:
    model, example = FixedBatch(64, 3), torch.rand(4, 8, 8)
    with pytest.raises(ValueError, match=r"FixedBatch cannot .* any size: .* fixes the batch size"):
        to_onnx(model, example, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    masks = select(weights(model), 0.3)
    apply_(model, masks)
    found = report(model, masks, example, rounds=1)
    assert "onnxruntime" not in found.table.index and "can write" in found.text
