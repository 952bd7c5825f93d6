"""Sparse files: small, bit for bit what was saved, and no way in for a damaged or hostile one."""

import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swdlib.criteria import magnitude
from swdlib.deploy.stored import MAGIC, is_stored, load_sparse, save_sparse
from swdlib.masks import Masks, apply_, find_groups, select
from swdlib.models import build_model
from swdlib.structures import weights

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
quick = settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))


class OneTensor(nn.Module):
    """A model whose only tensor is a parameter."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point())


def bits_of(model: nn.Module) -> dict[str, bytes]:
    """Return every tensor of the model as its bytes."""
    return {
        name: bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, t in model.state_dict().items()
    }


def content(path: Path) -> bytes:
    """Return the safetensors of a file, read as anyone could."""
    return zlib.decompress(path.read_bytes()[24:])


def entries(path: Path) -> dict[str, Tensor]:
    """Return what a file stores."""
    return safetensors.torch.load(content(path))


def implied(path: Path) -> list[str]:
    """Return the names whose mask follows from the zeros."""
    raw = content(path)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"].keys() == {"masks"}
    return json.loads(header["__metadata__"]["masks"])


def pack(path: Path, raw: bytes, size: int | None = None) -> None:
    """Write a file of these inflated bytes, with the size that is said."""
    said = len(raw) if size is None else size
    path.write_bytes(MAGIC + said.to_bytes(8, "little") + zlib.compress(raw))


def forge(path: Path, tensors: dict[str, Tensor], masks: str = "[]") -> None:
    """Write a file that is sound as a file, whatever it holds."""
    pack(path, safetensors.torch.save(tensors, {"masks": masks}))


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
    path = tmp_path / "new folder" / "net.safetensors.zlib"
    save_sparse(model, masks, path)
    again = build_model(name, size=8, width=4)
    loaded = load_sparse(again, str(path))
    assert bits_of(again) == bits_of(model)
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[key], masks[key]) for key in masks)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_zlib_and_safetensors_alone_can_read_a_file(tmp_path: Path) -> None:
    model, masks = pruned()
    save_sparse(model, masks, tmp_path / "net")
    raw = (tmp_path / "net").read_bytes()
    assert raw[:16] == b"swdlib.sparse 2\n"
    assert int.from_bytes(raw[16:24], "little") == len(content(tmp_path / "net"))
    again = build_model("resnet20", size=8, width=4)
    again.load_state_dict(entries(tmp_path / "net"))  # has the names of state_dict() and no other
    assert bits_of(again) == bits_of(model)
    assert implied(tmp_path / "net") == sorted(masks)


def test_the_same_network_makes_the_same_file(tmp_path: Path) -> None:
    model, masks = pruned()
    save_sparse(model, masks, tmp_path / "one")
    save_sparse(model, dict(reversed(masks.items())), tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


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


def test_a_thousandth_of_four_million_weights_takes_less_than_60_kb(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OneTensor(torch.randn(2, 2_165_221))
    masks = select(find_groups(model, weights), 0.999, magnitude)
    apply_(model, masks)
    save_sparse(model, masks, tmp_path / "net")
    assert int(masks["weight"].sum()) == 4330
    assert (tmp_path / "net").stat().st_size < 60_000


def test_only_a_mask_that_keeps_zeros_is_stored(tmp_path: Path) -> None:
    model = OneTensor(torch.tensor([[0.0, 1.0, -0.0], [0.0, 4.0, 5.0]]))
    full = {"weight": torch.ones(2, 3, dtype=torch.bool)}
    tight = {"weight": torch.tensor([[False, True, True], [False, True, True]])}
    for masks, keys in ((full, [".mask.weight", "weight"]), (tight, ["weight"]), ({}, ["weight"])):
        save_sparse(model, masks, tmp_path / "net")
        assert sorted(entries(tmp_path / "net")) == keys
        assert implied(tmp_path / "net") == (["weight"] if masks is tight else [])
        again = OneTensor(torch.ones(2, 3))
        loaded = load_sparse(again, tmp_path / "net")
        assert loaded.keys() == masks.keys()
        assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())
        assert bits_of(again) == bits_of(model)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.uint16, torch.complex64, torch.float8_e4m3fn]
)
def test_any_dtype_is_masked_and_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = OneTensor(torch.tensor([0, 1, 0, 1]).to(dtype))
    mask = torch.tensor([False, True, True, True])
    save_sparse(model, {"weight": mask}, tmp_path / "net")
    again = OneTensor(torch.ones(4).to(dtype))
    assert torch.equal(load_sparse(again, tmp_path / "net")["weight"], mask)
    assert bits_of(again) == bits_of(model)


def test_what_is_stored_by_hand() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, float("nan"), 1e-45])
    assert is_stored(values).tolist() == [False, True, True, True, True]
    assert is_stored(values.reshape(5, 1).expand(5, 2).T).tolist() == [[False, *[True] * 4]] * 2
    assert is_stored(torch.tensor(0.0)).tolist() is False
    assert is_stored(torch.zeros(0, 3)).shape == (0, 3)
    torch.set_flush_denormal(True)
    try:
        assert is_stored(values)[4]
    finally:
        torch.set_flush_denormal(False)


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
    assert entries(tmp_path / "net").keys() == {"0.weight"}
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
    masks = {"c": (torch.rand(2, 2, 2, 3) < 0.5).permute(0, 3, 1, 2)}
    apply_(model, masks)
    masks["c"] |= torch.rand(2, 3, 2, 2) < 0.2  # keeps zeros, so that it is stored
    save_sparse(model, masks, tmp_path / "net")
    again = nn.Module()
    again.a, again.b = nn.Parameter(torch.zeros(20)), nn.Parameter(torch.zeros(20))
    again.c = nn.Parameter(torch.zeros(2, 3, 2, 2))
    assert torch.equal(load_sparse(again, tmp_path / "net")["c"], masks["c"])
    assert bits_of(again) == bits_of(model)


@pytest.mark.parametrize("lost", [0.5, -0.0, 1e-45, float("nan")])
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


def test_state_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    class WithText(nn.Linear):
        def get_extra_state(self) -> Any:
            return "text"

    with pytest.raises(ValueError, match="only ordinary tensors can be stored, and '_extra_state'"):
        save_sparse(WithText(2, 2), {}, tmp_path / "net")
    model = nn.Module()
    model.register_buffer("__metadata__", torch.zeros(2))  # which safetensors takes for its own
    with pytest.raises(ValueError, match="only ordinary tensors can be stored, and '__metadata__'"):
        save_sparse(model, {}, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_a_name_that_a_mask_would_have_is_refused(tmp_path: Path) -> None:
    class Renamed(OneTensor):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {".mask.weight": super().state_dict(*args, **kwargs)["weight"]}

    with pytest.raises(ValueError, match=r"can be stored, and '\.mask\.weight' is none"):
        save_sparse(Renamed(torch.zeros(2)), {}, tmp_path / "net")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    model, masks = pruned("mlp")
    save_sparse(model, masks, tmp_path / "net")
    before = (tmp_path / "net").read_bytes()

    def fail(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
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


def refuse(path: Path, reason: str) -> None:
    """Load a file that must be refused for this reason, and leave the model as it was."""
    model = eight()
    with pytest.raises(ValueError, match=reason) as caught:
        load_sparse(model, path)
    assert str(caught.value).startswith(f"{path} is no sparse file of this OneTensor: ")
    assert torch.equal(model.weight, torch.full((8,), 7.0))


@pytest.mark.parametrize("listed", [True, False])
def test_a_mask_is_listed_or_stored(listed: bool, tmp_path: Path) -> None:
    if listed:
        forge(tmp_path / "net", {"weight": MASK.float()}, '["weight"]')
    else:
        forge(tmp_path / "net", {"weight": MASK.float(), ".mask.weight": MASK})
    model = eight()
    assert torch.equal(load_sparse(model, tmp_path / "net")["weight"], MASK)
    assert torch.equal(model.weight, MASK.float())


ONES = torch.ones(8)
HOSTILE: list[tuple[dict[str, Tensor], str, str]] = [
    ({"weight": torch.ones(9)}, "[]", r"of shape \(8,\), not torch.float32 of \(9,\)"),
    ({"weight": torch.ones(2, 4)}, "[]", r"of shape \(8,\), not torch.float32 of \(2, 4\)"),
    ({"weight": ONES.half()}, "[]", r"must be torch.float32 .* not torch.float16"),
    ({"weight": ONES.int()}, "[]", r"must be torch.float32 .* not torch.int32"),
    ({"other": ONES}, "[]", r"lacks \['weight'\] and holds \['other'\]"),
    ({"weight": ONES, "other": torch.ones(1)}, "[]", r"lacks \[\] and holds \['other'\]"),
    ({}, "[]", r"lacks \['weight'\] and holds \[\]"),
    ({}, '["weight"]', r"lacks \['weight'\] and holds \[\]"),
    ({"weight": ONES}, '["other"]', r"lacks \[\] and holds \['other'\]"),
    ({"weight": ONES, ".mask.other": MASK}, "[]", "mask 'other' fits no parameter"),
    ({"weight": ONES, ".mask.weight": MASK}, "[]", "weight holds weights that its mask removes"),
    ({"weight": ONES, ".mask.weight": MASK[:4].clone()}, "[]", "'weight' must be bool of shape"),
    ({"weight": ONES, ".mask.weight": MASK.byte()}, "[]", "'weight' must be bool of shape"),
    ({"weight": ONES}, "[0]", r"lacks \[\] and holds \[0\]"),
    ({"weight": ONES}, "0", "TypeError"),
    ({"weight": ONES}, "[[]]", "TypeError"),
    ({"weight": ONES}, "{", "Expecting property name"),
    ({"weight": ONES}, "[" * 150, "Expecting value"),
]


@pytest.mark.parametrize(("tensors", "masks", "reason"), HOSTILE)
def test_a_hostile_file_is_refused(
    tensors: dict[str, Tensor], masks: str, reason: str, tmp_path: Path
) -> None:
    forge(tmp_path / "net", tensors, masks)
    refuse(tmp_path / "net", reason)


def test_a_masked_buffer_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(8))
    for tensors, masks in (({}, '["weight"]'), ({".mask.weight": MASK}, "[]")):
        forge(tmp_path / "net", {"weight": MASK.float(), **tensors}, masks)
        with pytest.raises(ValueError, match="mask 'weight' fits no parameter"):
            load_sparse(model, tmp_path / "net")


def test_other_files_are_refused_by_their_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "net"
    safetensors.torch.save_file({"weight": ONES}, path)
    refuse(path, r"it starts with b.*, not with b'swdlib\.sparse 2\\n'")
    for start in (b"", MAGIC[:-1], b"swdlib.sparse 3\n"):
        path.write_bytes(start)
        refuse(path, "it starts with")
    pack(path, safetensors.torch.save({"weight": ONES}))
    refuse(path, "__metadata__")


def test_a_file_of_an_older_version_is_named_as_such(tmp_path: Path) -> None:
    metadata = {"format": "swdlib.sparse", "version": "1", "sha256": "0" * 64}
    safetensors.torch.save_file({"dense:weight": ONES}, tmp_path / "net", metadata)
    refuse(tmp_path / "net", "an older version of swdlib wrote it: load and save it with")


def test_a_size_too_large_for_the_model_is_refused_before_anything_is_inflated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> None:
        raise AssertionError("it was inflated")

    monkeypatch.setattr("swdlib.deploy.stored.zlib.decompressobj", never)
    for size in (2**64 - 1, 10**9, 2000):
        pack(tmp_path / "net", bytes(100), size)
        refuse(tmp_path / "net", f"it says that it holds {size:,} bytes; the model needs ")


@pytest.mark.parametrize("said", [500, 0])
def test_a_bomb_takes_no_memory(said: int, tmp_path: Path) -> None:
    pack(tmp_path / "net", bytes(10**6), said)
    assert (tmp_path / "net").stat().st_size < 1100  # so that the whole of it is read
    pack(tmp_path / "large", bytes(10**7), said)
    for name in ("net", "large"):
        tracemalloc.start()
        refuse(tmp_path / name, "it is damaged")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 300_000  # what is inflated, and the traceback


def test_only_as_much_is_read_as_the_model_can_need(tmp_path: Path) -> None:
    forge(tmp_path / "net", {"weight": ONES})
    with (tmp_path / "net").open("ab") as file:
        file.truncate(10**12)  # of which the file system stores nothing
    refuse(tmp_path / "net", "it is damaged")


def test_a_header_too_large_for_the_model_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: bytes) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr("safetensors.torch.load", never)
    for header in (2**63, 10**9, 600):
        pack(tmp_path / "net", header.to_bytes(8, "little") + b"{" * 600)
        refuse(tmp_path / "net", f"its header has {header:,} bytes; the model needs ")


@pytest.mark.parametrize("name", ["a", "ä" * 50, '"' * 50, "\\\n" * 50])
@pytest.mark.parametrize("shape", [(), (1,) * 30])
def test_any_name_and_shape_is_within_the_limits(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    def made() -> nn.Module:
        return nn.ParameterDict({name + str(i): torch.ones(shape) for i in range(20)})

    masks = {name + str(i): torch.ones(shape).bool() for i in range(20)}
    save_sparse(made(), masks, tmp_path / "net")
    assert load_sparse(made(), tmp_path / "net").keys() == masks.keys()
    zeros = made()
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    save_sparse(zeros, masks, tmp_path / "net")  # these are stored as tensors
    assert load_sparse(made(), tmp_path / "net").keys() == masks.keys()


def test_noise_that_cannot_be_compressed_is_within_the_limits(tmp_path: Path) -> None:
    noise = torch.randint(256, (300_000,), dtype=torch.uint8)
    save_sparse(OneTensor(noise), {}, tmp_path / "net")
    assert (tmp_path / "net").stat().st_size > 300_000
    model = OneTensor(torch.zeros_like(noise))
    load_sparse(model, tmp_path / "net")
    assert torch.equal(model.weight, noise)


def test_a_model_is_filled_whole_or_not_at_all(tmp_path: Path) -> None:
    model, masks = pruned("resnet20")
    save_sparse(model, masks, tmp_path / "net")
    forge(tmp_path / "net", entries(tmp_path / "net") | {"linear.bias": torch.zeros(11)})
    again = build_model("resnet20", size=8, width=4)
    before = bits_of(again)
    with pytest.raises(ValueError, match=r"linear\.bias must be"):  # the last tensor
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
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    flat = torch.frombuffer(raw, dtype=dtype) if size else torch.zeros(0, dtype=dtype)
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


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 30, bias=False))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[bytes, nn.Module]]:
    """Give a file with both kinds of masks, as bytes, and what it was made of."""
    torch.manual_seed(0)
    model = small()
    masks = {
        "0.weight": torch.rand(5, 6) < 0.5,
        "1.weight": torch.ones(5, dtype=torch.bool),
        "2.weight": torch.arange(150).reshape(30, 5) % 50 == 0,
    }
    apply_(model, masks)
    masks["2.weight"][0] = True
    path = tmp_path_factory.mktemp("saved") / "net"
    save_sparse(model, masks, path)
    assert implied(path) == ["0.weight", "1.weight"] and ".mask.2.weight" in entries(path)
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


@pytest.mark.parametrize("stored", [True, False])
def test_every_bit_of_a_file_is_checked(stored: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask, path = torch.rand(24) < 0.5, tmp_path / "net"
    model = OneTensor(torch.randn(24) * mask)
    apply_(model, {"weight": mask})  # in place of -0.0
    if stored:
        mask[~mask & (torch.rand(24) < 0.5)] = True
    save_sparse(model, {"weight": mask}, path)
    whole, again = path.read_bytes(), OneTensor(torch.ones(24))
    refused = 0
    for position in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            load_sparse(again, path)
        except ValueError:
            refused += 1
        else:  # another stream of the same content, such as a match with other zeros
            assert zlib.decompress(flipped[24:]) == zlib.decompress(whole[24:])
    assert refused > 0.98 * 8 * len(whole)


@settings(quick, max_examples=300)
@given(st.data())
def test_changed_bytes_are_refused_or_mean_the_same(
    tmp_path: Path, saved: tuple[bytes, nn.Module], data: st.DataObject
) -> None:
    changed, model = bytearray(saved[0]), saved[1]
    where = st.integers(0, len(changed) - 1)
    changes = data.draw(st.dictionaries(where, st.integers(1, 255), min_size=1, max_size=3))
    for position, change in changes.items():
        changed[position] ^= change
    (tmp_path / "net").write_bytes(changed)
    refused_or_the_same(tmp_path / "net", model)


@quick
@given(st.data())
def test_changed_contents_are_refused(
    tmp_path: Path, saved: tuple[bytes, nn.Module], data: st.DataObject
) -> None:
    """Whatever a deflated stream is turned into, its checksum is that of what was written."""
    raw, model = bytearray(zlib.decompress(saved[0][24:])), saved[1]
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    stream = zlib.compress(raw)[:-4] + saved[0][-4:]
    (tmp_path / "net").write_bytes(saved[0][:24] + stream)
    assert refused_or_the_same(tmp_path / "net", model)


@quick
@given(st.data())
def test_cut_and_lengthened_files_are_refused(
    tmp_path: Path, saved: tuple[bytes, nn.Module], data: st.DataObject
) -> None:
    whole, model = saved
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    longer = whole + data.draw(st.binary(min_size=1, max_size=9))
    (tmp_path / "net").write_bytes(data.draw(st.sampled_from([cut, longer])))
    assert refused_or_the_same(tmp_path / "net", model)


@quick
@given(st.binary(max_size=200))
def test_anything_else_is_refused(
    tmp_path: Path, saved: tuple[bytes, nn.Module], anything: bytes
) -> None:
    (tmp_path / "net").write_bytes(anything)
    assert refused_or_the_same(tmp_path / "net", saved[1])
    (tmp_path / "net").write_bytes(saved[0][:24] + anything)
    assert refused_or_the_same(tmp_path / "net", saved[1])
    for start in (b"", len(anything).to_bytes(8, "little")):
        pack(tmp_path / "net", start + anything)
        assert refused_or_the_same(tmp_path / "net", saved[1])
