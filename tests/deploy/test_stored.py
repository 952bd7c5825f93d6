"""Sparse files: small, bit for bit what was saved, and no way in for a damaged or hostile one."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from swdlib.criteria import magnitude
from swdlib.deploy.stored import BLOCK, load_sparse, save_sparse
from swdlib.masks import Masks, apply_, find_groups, select
from swdlib.models import build_model
from swdlib.structures import weights

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
quick = settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))


class OneTensor(nn.Module):
    """A model whose only tensor is a parameter."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor.clone())


def bits_of(model: nn.Module) -> dict[str, bytes]:
    """Return every tensor of the model as its bytes."""
    return {
        name: bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, t in model.state_dict().items()
    }


def entries(path: Path) -> dict[str, Tensor]:
    """Return what a file stores."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118


def forge(path: Path, stored: dict[str, Tensor], **metadata: str) -> None:
    """Write a file whose digest is right, whatever it holds."""
    digest = hashlib.sha256()
    for key in sorted(stored):
        tensor = stored[key]
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(bytes(tensor.reshape(-1).view(torch.uint8).numpy()))
    right = {"format": "swdlib.sparse", "version": "1", "sha256": digest.hexdigest()}
    save_file(stored, path, metadata=right | metadata)


def pruned(name: str = "resnet20", sparsity: float = 0.9) -> tuple[nn.Module, Masks]:
    torch.manual_seed(0)
    model = build_model(name, size=8, width=4)
    masks = select(find_groups(model, weights), sparsity, magnitude)
    apply_(model, masks)
    return model, masks


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet20"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_a_network_comes_back_bit_for_bit(name: str, sparsity: float, tmp_path: Path) -> None:
    model, masks = pruned(name, sparsity)
    save_sparse(model, masks, tmp_path / "new folder" / "net.safetensors")
    again = build_model(name, size=8, width=4)
    loaded = load_sparse(again, str(tmp_path / "new folder" / "net.safetensors"))
    assert bits_of(again) == bits_of(model)
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[key], masks[key]) for key in masks)
    assert [file.name for file in (tmp_path / "new folder").iterdir()] == ["net.safetensors"]


def test_masks_may_cover_scales_and_biases(tmp_path: Path) -> None:
    model, _ = pruned("cnn")
    masks = {"1.weight": torch.tensor([True, False, True, True]), "1.bias": torch.zeros(4).bool()}
    apply_(model, masks)
    save_sparse(model, masks, tmp_path / "net")
    again = build_model("cnn", size=8, width=4)
    loaded = load_sparse(again, tmp_path / "net")
    assert bits_of(again) == bits_of(model)
    assert loaded["1.weight"].tolist() == [True, False, True, True]
    assert loaded["1.bias"].tolist() == [False] * 4


def test_a_thousandth_of_four_million_weights_takes_less_than_40_kb(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OneTensor(torch.randn(2, 2_165_221))
    masks = select(find_groups(model, weights), 0.999, magnitude)
    apply_(model, masks)
    save_sparse(model, masks, tmp_path / "net")
    kept = int(masks["weight"].sum())
    size = (tmp_path / "net").stat().st_size
    assert kept == 4330
    assert 6 * kept < size < 6 * kept + 1024 < 40_000


@pytest.mark.parametrize(("kept", "kind"), [(1, "low"), (29, "low"), (30, "bits"), (511, "bits")])
def test_positions_take_the_smaller_code(kept: int, kind: str, tmp_path: Path) -> None:
    # 512 weights: 64 bytes of bits, or 2 bytes a weight kept and the 4 bytes of one count.
    mask = torch.arange(512) < kept
    save_sparse(OneTensor(mask.float()), {"weight": mask}, tmp_path / "net")
    found = entries(tmp_path / "net")
    assert {key.partition(":")[0] for key in found} - {"values", "counts"} == {kind}
    assert found["values:weight"].shape == (kept,)


def test_codes_by_hand(tmp_path: Path) -> None:
    size = 2 * BLOCK + 5
    mask = torch.zeros(size, dtype=torch.bool)
    mask[[0, BLOCK - 1, 2 * BLOCK + 4]] = True
    save_sparse(OneTensor(mask * torch.arange(1.0, size + 1)), {"weight": mask}, tmp_path / "net")
    found = entries(tmp_path / "net")
    assert found["values:weight"].tolist() == [1, BLOCK, size]
    assert found["low:weight"].tolist() == [0, BLOCK - 1, 4]
    assert found["counts:weight"].tolist() == [2, 0, 1]
    few = torch.tensor([True, False, False, True, False, False, False, False, True])
    save_sparse(OneTensor(few.float()), {"weight": few}, tmp_path / "net")
    assert entries(tmp_path / "net")["bits:weight"].tolist() == [0b10010000, 0b10000000]


def test_a_full_mask_is_stored_as_no_more_than_the_tensor(tmp_path: Path) -> None:
    model = OneTensor(torch.arange(6.0).reshape(2, 3))
    full = {"weight": torch.ones(2, 3, dtype=torch.bool)}
    save_sparse(model, full, tmp_path / "net")
    assert {key: t.tolist() for key, t in entries(tmp_path / "net").items()} == {
        "full:weight": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    }
    assert torch.equal(load_sparse(model, tmp_path / "net")["weight"], full["weight"])
    save_sparse(model, {}, tmp_path / "net")
    assert list(entries(tmp_path / "net")) == ["dense:weight"]
    assert load_sparse(model, tmp_path / "net") == {}


def tied(tie: bool = True) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    if tie:
        model[2].weight = model[0].weight
    return model


def test_a_tied_parameter_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    model = tied()
    masks = {"0.weight": torch.eye(4, dtype=torch.bool)}
    apply_(model, masks)
    save_sparse(model, masks, tmp_path / "net")
    assert {key.partition(":")[2] for key in entries(tmp_path / "net")} == {"0.weight"}
    again = tied()
    load_sparse(again, tmp_path / "net")
    assert again[2].weight is again[0].weight
    assert bits_of(again) == bits_of(model)
    with pytest.raises(ValueError, match=r"it lacks \['2.weight'\] and holds \[\] besides"):
        load_sparse(tied(False), tmp_path / "net")


def test_views_and_memory_formats_do_not_matter(tmp_path: Path) -> None:
    memory = torch.randn(40)
    model = nn.Module()
    model.a, model.b = nn.Parameter(memory[:20]), nn.Parameter(memory[10:30])
    model.c = nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))
    masks = {"c": torch.rand(2, 3, 2, 2) < 0.5}
    apply_(model, masks)
    save_sparse(model, masks, tmp_path / "net")
    again = nn.Module()
    again.a, again.b = nn.Parameter(torch.zeros(20)), nn.Parameter(torch.zeros(20))
    again.c = nn.Parameter(torch.zeros(2, 3, 2, 2))
    load_sparse(again, tmp_path / "net")
    assert bits_of(again) == bits_of(model)


@pytest.mark.parametrize("lost", [0.5, -0.0, float("nan")])
def test_a_removed_weight_that_would_be_lost_is_refused(lost: float, tmp_path: Path) -> None:
    model = OneTensor(torch.tensor([1.0, lost]))
    with pytest.raises(ValueError, match=r"^weight holds weights .* call masks\.apply_"):
        save_sparse(model, {"weight": torch.tensor([True, False])}, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = OneTensor(torch.zeros(2))
    with pytest.raises(ValueError, match="mask 'other' fits no parameter"):
        save_sparse(model, {"other": torch.zeros(2).bool()}, tmp_path / "net")
    with pytest.raises(ValueError, match="the mask of 'weight' must be bool of shape"):
        save_sparse(model, {"weight": torch.zeros(3).bool()}, tmp_path / "net")


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class WithText(nn.Linear):
        def get_extra_state(self) -> Any:
            return "text"

    with pytest.raises(ValueError, match="only ordinary tensors can be stored, and '_extra_state'"):
        save_sparse(WithText(2, 2), {}, tmp_path / "net")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    model, masks = pruned("mlp")
    save_sparse(model, masks, tmp_path / "net")
    before = (tmp_path / "net").read_bytes()

    def fail(stored: Any, file: Any, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("swdlib.deploy.stored.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_sparse(model, {}, tmp_path / "net")
    assert (tmp_path / "net").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["net"]


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_sparse(OneTensor(torch.zeros(1)), tmp_path / "net")


# What a file may hold, as it should be and hostile. Eight weights, three of them kept.

MASK = torch.tensor([True, False, False, True, False, False, False, True])


def eight() -> OneTensor:
    return OneTensor(torch.full((8,), 7.0))


def low_code(low: list[int], counts: list[int], values: int = 3) -> dict[str, Tensor]:
    return {
        "values:weight": torch.ones(values),
        "low:weight": torch.tensor(low, dtype=torch.uint16),
        "counts:weight": torch.tensor(counts, dtype=torch.uint32),
    }


def bit_code(*bits: int, values: int = 3) -> dict[str, Tensor]:
    return {
        "values:weight": torch.ones(values),
        "bits:weight": torch.tensor(bits, dtype=torch.uint8),
    }


@pytest.mark.parametrize("stored", [bit_code(0b10010001), low_code([0, 3, 7], [3])])
def test_either_code_is_read(stored: dict[str, Tensor], tmp_path: Path) -> None:
    forge(tmp_path / "net", stored)
    model = eight()
    assert torch.equal(load_sparse(model, tmp_path / "net")["weight"], MASK)
    assert torch.equal(model.weight, MASK.float())


HOSTILE: list[tuple[dict[str, Tensor], str]] = [
    (low_code([3, 0, 7], [3]), "low:weight is out of order"),
    (low_code([0, 3, 3], [3]), "low:weight is out of order"),
    (low_code([0, 3, 8], [3]), "beyond the last weight, 8"),
    (low_code([0, 3, 7], [2]), r"low:weight must be torch.uint16 of shape \(2,\)"),
    (low_code([0, 3, 7], [2**32 - 1]), r"low:weight must be torch.uint16 of shape \(4294967295,\)"),
    (low_code([0, 3, 7], [3, 0]), r"counts:weight must be torch.uint32 of shape \(1,\)"),
    (low_code([0, 3, 7], [3], values=2), r"values:weight must be torch.float32 of shape \(3,\)"),
    (bit_code(0b10010001, values=4), r"values:weight must be torch.float32 of shape \(3,\)"),
    (bit_code(0b10010001, 0), r"bits:weight must be torch.uint8 of shape \(1,\)"),
    ({"dense:weight": torch.ones(9)}, r"of shape \(8,\), not torch.float32 of \(9,\)"),
    ({"dense:weight": torch.ones(2, 4)}, r"of shape \(8,\), not torch.float32 of \(2, 4\)"),
    ({"dense:weight": torch.ones(8).half()}, r"must be torch.float32 .* not torch.float16"),
    ({"dense:weight": torch.ones(8).int()}, r"must be torch.float32 .* not torch.int32"),
    ({"full:weight": torch.ones(7)}, r"full:weight must be torch.float32 of shape \(8,\)"),
    ({"dense:other": torch.ones(8)}, r"lacks \['weight'\] and holds \['other'\]"),
    ({"weight": torch.ones(8)}, r"lacks \['weight'\]"),
    ({}, r"lacks \['weight'\] and holds \[\]"),
    ({"values:weight": torch.ones(3)}, r"holds 'weight' as \['values'\]"),
    ({"bits:weight": torch.ones(1).byte()}, r"holds 'weight' as \['bits'\]"),
    ({"odd:weight": torch.ones(8)}, r"holds 'weight' as \['odd'\]"),
    (bit_code(0b10010001) | low_code([0, 3, 7], [3]), "holds 'weight' as"),
]


@pytest.mark.parametrize(("stored", "reason"), HOSTILE)
def test_a_hostile_file_is_refused(stored: dict[str, Tensor], reason: str, tmp_path: Path) -> None:
    forge(tmp_path / "net", stored)
    model = eight()
    with pytest.raises(ValueError, match=reason) as caught:
        load_sparse(model, tmp_path / "net")
    assert str(caught.value).startswith(f"{tmp_path / 'net'} is no sparse file of this OneTensor: ")
    assert torch.equal(model.weight, torch.full((8,), 7.0))


def test_bits_beyond_the_last_weight_are_refused(tmp_path: Path) -> None:
    forge(tmp_path / "net", bit_code(0b10010001))
    with pytest.raises(ValueError, match="keeps weights beyond the last, which is 7"):
        load_sparse(OneTensor(torch.zeros(7)), tmp_path / "net")


def test_a_masked_buffer_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(8))
    forge(tmp_path / "net", bit_code(0b10010001))
    with pytest.raises(ValueError, match=r"holds 'weight' as \['bits', 'values'\]"):
        load_sparse(model, tmp_path / "net")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "its format is"),
        ({"version": "2"}, "its format is"),
        ({"sha256": "0" * 64}, "it is damaged"),
    ],
)
def test_another_format_version_or_digest_is_refused(
    metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    forge(tmp_path / "net", {"dense:weight": torch.ones(8)}, **metadata)
    with pytest.raises(ValueError, match=message):
        load_sparse(eight(), tmp_path / "net")


def test_an_ordinary_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(8)}, tmp_path / "net")
    with pytest.raises(ValueError, match="its format is"):
        load_sparse(eight(), tmp_path / "net")


@pytest.mark.parametrize("header", [2**63, 10**8, 4096])
def test_a_header_or_file_too_large_for_the_model_is_not_even_read(
    header: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the file was read")

    monkeypatch.setattr("swdlib.deploy.stored.safe_open", never)
    (tmp_path / "net").write_bytes(header.to_bytes(8, "little") + b"{" * 3000)
    with pytest.raises(ValueError, match="are its header; more than"):
        load_sparse(eight(), tmp_path / "net")
    (tmp_path / "net").write_bytes((8).to_bytes(8, "little") + b"{}      " + bytes(10_000))
    with pytest.raises(ValueError, match="it has 10,016 bytes"):
        load_sparse(eight(), tmp_path / "net")


def test_a_model_is_filled_whole_or_not_at_all(tmp_path: Path) -> None:
    model, masks = pruned("resnet20")
    save_sparse(model, masks, tmp_path / "net")
    stored = entries(tmp_path / "net")
    stored["dense:linear.bias"] = torch.zeros(11)  # the last tensor
    forge(tmp_path / "net", stored)
    again = build_model("resnet20", size=8, width=4)
    before = bits_of(again)
    with pytest.raises(ValueError, match=r"dense:linear\.bias must be"):
        load_sparse(again, tmp_path / "net")
    assert bits_of(again) == before


# Properties.


@st.composite
def masked_tensors(draw: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """Return a tensor of any bits (-0.0, NaN payloads, denormals) and a mask of its shape."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 7), max_size=3).map(tuple))
    count = int(np.prod(shape))
    kept = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    size = count * dtype.itemsize
    content = bytearray(draw(st.binary(min_size=size, max_size=size)))
    flat = torch.frombuffer(content, dtype=dtype) if size else torch.zeros(0, dtype=dtype)
    return flat.reshape(shape).clone(), torch.tensor(kept, dtype=torch.bool).reshape(shape)


@quick
@given(masked_tensors())
@example((torch.tensor([0x7D00, 0], dtype=torch.int16).view(torch.float16), torch.arange(2) < 1))
def test_any_bits_come_back(tmp_path: Path, drawn: tuple[Tensor, Tensor]) -> None:
    tensor, mask = drawn
    model = OneTensor(tensor)
    apply_(model, {"weight": mask})
    save_sparse(model, {"weight": mask}, tmp_path / "net")
    again = OneTensor(torch.full_like(tensor, 3.0))
    assert torch.equal(load_sparse(again, tmp_path / "net")["weight"], mask)
    assert bits_of(again) == bits_of(model)


@quick
@given(st.sets(st.integers(0, 3 * BLOCK + 9), max_size=40), st.integers(1, 10))
def test_any_positions_come_back(tmp_path: Path, kept: set[int], rest: int) -> None:
    mask = torch.zeros(3 * BLOCK + rest, dtype=torch.bool)
    mask[[position for position in kept if position < len(mask)]] = True
    model = OneTensor(mask * torch.arange(1.0, len(mask) + 1))
    save_sparse(model, {"weight": mask}, tmp_path / "net")
    again = OneTensor(torch.zeros(len(mask)))
    assert torch.equal(load_sparse(again, tmp_path / "net")["weight"], mask)
    assert torch.equal(again.weight, model.weight)


@quick
@given(
    st.lists(st.integers(0, 2**16 - 1), max_size=6),
    st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 4), min_size=1, max_size=3),
    st.integers(0, 6),
)
def test_any_code_is_refused_or_adds_up(
    tmp_path: Path, low: list[int], counts: list[int], values: int
) -> None:
    forge(tmp_path / "net", low_code(low, counts, values))
    model = OneTensor(torch.full((BLOCK + 8,), 7.0))
    try:
        masks = load_sparse(model, tmp_path / "net")
    except ValueError:
        assert torch.equal(model.weight, torch.full((BLOCK + 8,), 7.0))
    else:
        assert int(masks["weight"].sum()) == len(low) == sum(counts) == values
        assert torch.equal(model.weight, masks["weight"].float())


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 300, bias=False))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[bytes, nn.Module]]:
    """Give a file with every kind of entry, as bytes, and what it was made of."""
    torch.manual_seed(0)
    model = small()
    masks = {
        "0.weight": torch.rand(5, 6) < 0.5,
        "1.weight": torch.ones(5, dtype=torch.bool),
        "2.weight": torch.arange(1500).reshape(300, 5) % 500 == 0,
    }
    apply_(model, masks)
    path = tmp_path_factory.mktemp("saved") / "net"
    save_sparse(model, masks, path)
    kinds = {key.partition(":")[0] for key in entries(path)}
    assert kinds == {"dense", "full", "values", "bits", "low", "counts"}
    yield path.read_bytes(), model


def refused_or_the_same(path: Path, model: nn.Module) -> bool:
    """Load into a new model; return whether that was refused, and check what came of it."""
    again = small()
    before = bits_of(again)
    try:
        load_sparse(again, path)
    except ValueError:
        assert bits_of(again) == before
        return True
    assert bits_of(again) == bits_of(model)
    return False


@settings(quick, max_examples=300)
@given(st.data())
def test_changed_bytes_are_refused_or_mean_the_same(
    tmp_path: Path, saved: tuple[bytes, nn.Module], data: st.DataObject
) -> None:
    content, model = bytearray(saved[0]), saved[1]
    header = 8 + int.from_bytes(content[:8], "little")
    where = st.integers(0, header - 1) | st.integers(header, len(content) - 1)
    changes = data.draw(st.dictionaries(where, st.integers(1, 255), min_size=1, max_size=3))
    for position, change in changes.items():
        content[position] ^= change
    (tmp_path / "net").write_bytes(content)
    refused = refused_or_the_same(tmp_path / "net", model)
    assert refused or max(changes) < header  # such as another blank in the padding of the header


@quick
@given(st.data())
def test_cut_and_lengthened_files_are_refused(
    tmp_path: Path, saved: tuple[bytes, nn.Module], data: st.DataObject
) -> None:
    content, model = saved
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    (tmp_path / "net").write_bytes(data.draw(st.sampled_from([cut, content + cut[:9] + b"0"])))
    assert refused_or_the_same(tmp_path / "net", model)


@quick
@given(st.binary(max_size=200))
def test_anything_else_is_refused(
    tmp_path: Path, saved: tuple[bytes, nn.Module], content: bytes
) -> None:
    header = len(content).to_bytes(8, "little")
    for start in (b"", header):
        (tmp_path / "net").write_bytes(start + content)
        assert refused_or_the_same(tmp_path / "net", saved[1])
