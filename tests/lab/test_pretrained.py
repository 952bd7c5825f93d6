"""ImageNet in folders, the trained network, and the measurements on record."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swdlib import deploy, masks, structures
from swdlib.criteria import CRITERIA
from swdlib.data.images import normalise
from swdlib.lab.pretrained import efficientnet_lite0, load_imagenet
from swdlib.masks import ALLOCATIONS
from swdlib.metrics import count_macs, evaluate, parameters
from swdlib.runs.run import provenance

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "book" / "measurements" / "efficientnet-lite0.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of 1,000 classes, of which the last four have an image, of one grey each."""
    for number in range(1000):
        (tmp_path / "val" / f"n{number:08}").mkdir(parents=True)
    for label in range(996, 1000):
        save(tmp_path, label, np.full((300, 260, 3), label - 990, np.uint8))
    return tmp_path


def save(folder: Path, label: int, pixels: Any, name: str = "a.png") -> Path:
    path = folder / "val" / f"n{label:08}" / name
    Image.fromarray(pixels).save(path)
    return path


def test_a_label_is_the_place_of_its_class(folder: Path) -> None:
    data = load_imagenet(folder)
    assert data.test.labels.tolist() == [996, 997, 998, 999]
    assert data.test.images.shape == (4, 3, 224, 224)
    assert data.test.images[:, 0, 0, 0].tolist() == [6, 7, 8, 9]
    assert (data.classes, len(data.train)) == (1000, 0)


def test_pixels_are_less_127_over_128(folder: Path) -> None:
    (images, _), *_ = load_imagenet(folder).test_batches(1)
    torch.testing.assert_close(images, torch.full((1, 3, 224, 224), (6 - 127) / 128))


def test_images_are_evenly_spaced(folder: Path) -> None:
    assert load_imagenet(folder, 2).test.labels.tolist() == [996, 998]
    assert load_imagenet(folder, 3).test.labels.tolist() == [996, 997, 998]
    assert load_imagenet(folder, 9).test.labels.tolist() == [996, 997, 998, 999]


def test_the_folder_of_classes_will_do(folder: Path) -> None:
    assert load_imagenet(folder / "val").fingerprint == load_imagenet(folder).fingerprint


def test_the_centre_is_seen_pixel_by_pixel_where_nothing_is_to_be_scaled(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(256, 301, 3), dtype=np.uint8)
    save(folder, 0, pixels)
    seen = load_imagenet(folder).test.images[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(seen, pixels[16:240, 38:262])


@pytest.mark.parametrize("shape", [(512, 700), (100, 128), (7, 5000)])
def test_other_sizes_are_scaled(folder: Path, shape: tuple[int, int]) -> None:
    pixels = np.zeros((*shape, 3), np.uint8)
    pixels[:, shape[1] // 2 :] = 200
    save(folder, 0, pixels)
    row = load_imagenet(folder).test.images[0, 0, 112]
    assert row[:40].max() == 0 and row[-40:].min() == 200


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_images_of_other_modes_are_read(folder: Path, mode: str) -> None:
    path = folder / "val" / f"n{0:08}" / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (256, 256), (200, 200, 200)).convert(mode).save(path)
    seen = load_imagenet(folder).test.images[0].float()
    assert seen.mean((1, 2)).tolist() == pytest.approx([200] * 3, abs=4)  # a palette is coarse


def test_what_is_not_imagenet_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="images must be a whole number of at least 1, not 0"):
        load_imagenet(folder, 0)
    with pytest.raises(FileNotFoundError, match="must be a folder with ImageNet's images"):
        load_imagenet(folder / "elsewhere")
    for label in range(996, 1000):
        (folder / "val" / f"n{label:08}" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="hold no JPEG or PNG"):
        load_imagenet(folder)
    (folder / "val" / f"n{7:08}").rmdir()
    with pytest.raises(ValueError, match=r"1000 classes, or labels would be wrong; it has 999"):
        load_imagenet(folder)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 1,000 classes without images."""
    folder = tmp_path_factory.mktemp("broken")
    for number in range(1000):
        (folder / f"n{number:08}").mkdir()
    return folder


@settings(max_examples=40, deadline=None)
@given(start=st.sampled_from(["", "png", "jpeg"]), noise=st.binary(max_size=40))
def test_a_damaged_file_is_named(broken: Path, start: str, noise: bytes) -> None:
    file = broken / f"n{3:08}" / "a.jpg"
    if start:
        Image.new("RGB", (256, 256)).save(file, start)
    whole = file.read_bytes() if start else b""
    file.write_bytes(whole[: len(whole) // 2] + noise)
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image"):
        load_imagenet(broken)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_too_large_to_decode_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        load_imagenet(folder)


def test_missing_packages_are_named_with_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch"):
        efficientnet_lite0()


# The trained network, on real images


def choose(model: torch.nn.Module, example: torch.Tensor, cut: dict[str, Any]) -> masks.Masks:
    """Return the masks of a row of the record."""
    groups = masks.find_groups(model, structures.STRUCTURES[cut["structure"]](example))
    criterion, allocation = CRITERIA[cut["criterion"]], ALLOCATIONS[cut["allocation"]]
    return masks.select(groups, cut["sparsity"], criterion, allocation)


@torch.no_grad()
def test_first_layer_computes_what_its_batch_norm_recorded(imagenet_folder: Path) -> None:
    model, data = efficientnet_lite0(), load_imagenet(imagenet_folder, 40)
    assert not model.training
    stem: Any = model.get_submodule("_conv_stem")
    norm = model.get_submodule("_bn0")
    assert isinstance(norm, torch.nn.BatchNorm2d) and norm.running_var is not None
    variance = stem(normalise(data.test.images, data.mean, data.std)).var((0, 2, 3))
    assert 0.75 < (variance / norm.running_var).nanmedian() < 1.33


@pytest.mark.slow
@torch.no_grad()
def test_the_record_is_reproduced_on_some_of_its_images(imagenet_folder: Path) -> None:
    every = 25
    model, data = efficientnet_lite0(), load_imagenet(imagenet_folder, 1000 // every)
    logits = torch.cat([model(x) for x, _ in data.test_batches(8)])
    right = (logits.argmax(1) == data.test.labels).tolist()
    recorded = [bit == "1" for bit in record()["dense"]["right"][::every]]
    assert len(right) == len(recorded) == 40
    # Where two classes are nearly equal, another processor may round to the other one.
    assert sum(a != b for a, b in zip(right, recorded, strict=True)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 9, 14, 17])
@torch.no_grad()
def test_a_cut_on_record_is_made_again_and_shrinks(number: int, imagenet_folder: Path) -> None:
    model, data = efficientnet_lite0(), load_imagenet(imagenet_folder, 8)
    [(images, _)] = data.test_batches(8)
    cut = record()["cuts"][number]
    kept = choose(model, images, cut)
    small = deploy.shrink(model, kept, images[:2])
    assert parameters(model, kept) == cut["parameters"]
    assert count_macs(small, images[:1]) == cut["macs"]
    masks.apply_(model, kept)
    expected = model(images)
    assert (small(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    if cut["structure"] == "filters":
        assert parameters(small) == cut["parameters"]
    accuracy = evaluate(small, data, batch_size=8)
    assert accuracy == pytest.approx(evaluate(model, data, batch_size=8), rel=1e-4)


# The measurements on record


def record() -> Any:
    """Return the measurements that come with the book."""
    return json.loads(RECORD.read_text("utf-8"))


def test_the_record_agrees_with_itself() -> None:
    found = record()
    dense, facts = found["dense"], found["provenance"]
    assert facts["dataset"]["test_images"] == len(dense["right"]) == 1000
    assert dense["top1"] == pytest.approx(dense["right"].count("1") / 10)
    for cut in found["cuts"]:
        removed = 1 - cut["parameters"] / dense["parameters"]
        # Single weights: of those that can be pruned, which biases and batch norms are not.
        assert removed == pytest.approx(cut["sparsity"], rel=0.02, abs=1e-3)
        assert 0 <= cut["top1"] <= cut["top5"] <= 100
        assert cut["macs"] <= dense["macs"]
    shrunk = next(cut for cut in found["cuts"] if cut["sparsity"] == 0.2)
    masked = found["masked, a fifth removed"]
    assert (masked["top1"], masked["top5"]) == (shrunk["top1"], shrunk["top5"])
    assert found["speed, a fifth removed"]["table"]["shrunk"]["parameters"] == shrunk["parameters"]


def test_the_record_says_with_what_it_was_made(imagenet_folder: Path) -> None:
    facts = record()["provenance"]
    today = provenance(load_imagenet(imagenet_folder, 1))
    assert set(facts) == set(today)
    assert set(facts["versions"]) > set(today["versions"])


@pytest.mark.slow
def test_the_record_is_of_the_images_at_hand(imagenet_folder: Path) -> None:
    recorded = record()["provenance"]["dataset"]
    assert load_imagenet(imagenet_folder).fingerprint == recorded["fingerprint"]
