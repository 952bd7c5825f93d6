"""Deployment: every network of a report computes the same, and the text says what stays slow."""

import importlib.util
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import swdlib
from swdlib import deploy
from swdlib.deploy import Report, report
from swdlib.masks import Masks, find_groups, kept, select
from swdlib.metrics import count_macs, parameters
from swdlib.models import build_model
from swdlib.structures import Structure, channels, filters, weights

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
COUNTS = ["parameters", "kept_weights", "kept_parameters"]
COLUMNS = [*COUNTS, "macs", "bytes", "latency_ms", "images_per_s", "difference"]


def pruned(
    name: str, structure: Structure, sparsity: float, width: int = 8
) -> tuple[nn.Module, Masks]:
    torch.manual_seed(0)
    model = build_model(name, size=8, width=width)
    model(torch.randn(64, 3, 8, 8))  # so that batch norm has statistics of its own
    return model, select(find_groups(model, structure), sparsity)


def rows(result: Report) -> dict[Any, dict[Any, Any]]:
    """Return the table as network -> column -> value."""
    return result.table.to_dict("index")


@pytest.fixture(scope="module")
def of_filters() -> tuple[nn.Module, Masks, Report]:
    model, masks = pruned("cnn", filters(IMAGES), 0.6)
    return model, masks, report(model, masks, IMAGES, rounds=1)


def test_a_row_for_each_network(of_filters: tuple[nn.Module, Masks, Report]) -> None:
    table = of_filters[2].table
    assert list(table.index) == ["dense", "masked", "shrunk", "onnxruntime"]
    assert list(table.columns) == COLUMNS
    assert (table[["latency_ms", "images_per_s", "bytes"]] > 0).all().all()


def test_filters_leave_in_fact(of_filters: tuple[nn.Module, Masks, Report]) -> None:
    model, masks, result = of_filters
    dense, masked, shrunk, onnx = rows(result).values()
    assert dense["parameters"] == parameters(model)
    assert masked["parameters"] == shrunk["parameters"] == parameters(model, masks)
    assert onnx["parameters"] == shrunk["parameters"] < 0.4 * dense["parameters"]
    assert dense["macs"] == masked["macs"] == count_macs(model, IMAGES[:1])
    assert masked["kept_parameters"] == kept(model, masks)["kept_parameters"]
    assert dense["kept_weights"] == kept(model)["kept_weights"] > masked["kept_weights"]
    assert onnx["macs"] == shrunk["macs"] < dense["macs"]
    assert 4 * dense["parameters"] < dense["bytes"] < 4 * dense["parameters"] + 4096
    assert shrunk["bytes"] < 0.5 * dense["bytes"] and masked["bytes"] < 0.5 * dense["bytes"]


def test_differences_are_from_the_masked_network(
    of_filters: tuple[nn.Module, Masks, Report],
) -> None:
    of = {name: row["difference"] for name, row in rows(of_filters[2]).items()}
    assert of["masked"] == 0.0
    assert max(of["shrunk"], of["onnxruntime"]) <= 1e-5
    assert of["dense"] > 1e-2


def test_the_text_says_what_shrinking_gave(of_filters: tuple[nn.Module, Masks, Report]) -> None:
    text = of_filters[2].text
    assert "throughput at batch size 4" in text
    assert "Shrinking leaves 3" in text  # 39 % or a little less of the parameters
    assert "cannot make it faster" not in text
    assert "No layer can use torch's sparse kernels" in text


def test_what_is_printed_holds_both(of_filters: tuple[nn.Module, Masks, Report]) -> None:
    result = of_filters[2]
    printed = str(result)
    assert printed.endswith(result.text)
    assert f"{rows(result)['dense']['parameters']:,}" in printed
    assert all(word in printed for word in [*COLUMNS, *result.table.index])


def test_the_model_is_left_as_it_was() -> None:
    model, masks = pruned("mlp", channels(IMAGES), 0.5)
    model[2].eval()  # type: ignore[index]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    report(model, masks, IMAGES, rounds=1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_networks_that_are_harder_to_follow_give_equal_outputs() -> None:
    residual, of_residual = pruned("resnet20", filters(IMAGES), 0.5, width=4)
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 16, "mlp_dim": 32, "num_classes": 10}
    transformer = VisionTransformer(image_size=8, patch_size=4, **sizes)
    nn.init.normal_(transformer.heads.head.weight)
    of_heads = select(find_groups(transformer, channels(IMAGES)), 0.3)
    for model, masks in ((residual, of_residual), (transformer, of_heads)):
        of = rows(report(model, masks, IMAGES, rounds=1))
        assert of["shrunk"]["parameters"] < of["dense"]["parameters"]
        assert max(of["shrunk"]["difference"], of["onnxruntime"]["difference"]) <= 1e-5


def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = ("onnx", "onnxscript", "onnxruntime")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )


def test_scattered_zeros_make_nothing_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    without_onnx(monkeypatch)
    model, masks = pruned("cnn", weights, 0.5)
    result = report(model, masks, IMAGES, rounds=1)
    dense, masked, shrunk = rows(result).values()
    assert shrunk["parameters"] == dense["parameters"]
    assert "Nothing can be taken out" in result.text
    assert "50.0% of the weights in the shrunk network are zero and cannot make it" in result.text
    assert masked["bytes"] < 0.7 * shrunk["bytes"]


def test_what_is_left_out_for_want_of_packages_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    without_onnx(monkeypatch)
    model, masks = pruned("mlp", weights, 0.5)
    text = report(model, masks, IMAGES, rounds=1).text
    assert "onnxruntime is left out" in text
    assert "pip install 'swdlib[onnx]'" in text


def test_a_report_without_pandas_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pandas" else find(name)
    )
    with pytest.raises(ImportError, match=r"^deploy\.report needs pandas: pip install 'swdlib\["):
        report(nn.Linear(2, 2), {}, torch.zeros(1, 2))


def test_a_network_in_double_precision_has_no_row_of_onnxruntime() -> None:
    model, masks = pruned("mlp", weights, 0.5)
    result = report(model.double(), masks, IMAGES.double(), rounds=1)
    assert "onnxruntime" not in result.table.index


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL")
def test_sparse_kernels_have_their_row_where_they_can_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_onnx(monkeypatch)
    model, masks = pruned("mlp", weights, 0.98)
    result = report(model, masks, IMAGES, rounds=1)
    sparse, masked = rows(result)["sparse kernels"], rows(result)["masked"]
    assert sparse["parameters"] == masked["parameters"] and sparse["difference"] < 1e-5
    assert sparse["macs"] < 0.1 * masked["macs"]
    assert "sparse kernels, in linear layers only, leave out 9" in result.text


def test_two_of_four_is_said_to_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    without_onnx(monkeypatch)
    model, _ = pruned("mlp", weights, 0.5)
    masks = {"3.weight": torch.tensor([True, False, True, False]).repeat(8, 2)}
    assert "2:4 sparsity is faster only" in report(model, masks, IMAGES, rounds=1).text


def test_a_model_of_several_outputs_is_refused() -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    model = Two(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(TypeError, match="the model must return one tensor, not tuple"):
        report(model, {}, IMAGES, rounds=1)


def test_an_empty_example_is_refused() -> None:
    model, masks = pruned("mlp", weights, 0.5)
    with pytest.raises(ValueError, match="example must be a batch of at least one image"):
        report(model, masks, IMAGES[:0])


def test_the_public_names_are_there() -> None:
    assert swdlib.deploy is deploy
    for name in ("shrink", "save_sparse", "load_sparse", "to_onnx", "report", "sparse_linears"):
        assert callable(getattr(deploy, name)) and name in deploy.__all__


def test_a_report_is_a_table_and_a_text() -> None:
    table = pd.DataFrame([dict.fromkeys(COLUMNS, 1234.5678)], index=["dense"])
    lines = str(Report(table, "Why.")).splitlines()
    assert lines[1].split() == ["dense", *["1,235"] * 7, "1.2e+03"]
    assert lines[-2:] == ["", "Why."]
