import math

import pytest
import torch
from torch import nn

from swdlib.deploy import shrink
from swdlib.masks import find_groups, select
from swdlib.models import MODELS, BasicBlock, TessierBlock, build_model
from swdlib.structures import filters


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def convolutions(model: nn.Module, size: int) -> dict[str, nn.Conv2d]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (size, size)
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (3, 32, 7)])
def test_contract_of_models(name: str, channels: int, size: int, classes: int) -> None:
    torch.manual_seed(0)
    model = build_model(name, channels=channels, size=size, classes=classes, width=4)
    scores = model(torch.randn(5, channels, size, size))
    assert scores.shape == (5, classes)
    nn.functional.cross_entropy(scores, torch.arange(5)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    wider = build_model(name, channels=channels, size=size, classes=classes, width=8)
    assert parameters(wider) > parameters(model)


@pytest.mark.parametrize("name", MODELS)
def test_weights_follow_the_seed(name: str) -> None:
    torch.manual_seed(1)
    one = build_model(name).state_dict()
    torch.manual_seed(1)
    other = build_model(name).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("name", "settings", "total", "kinds"),
    [
        ("tessier_resnet20", {"width": 64}, 4_330_442, (4_318_912, 4_480, 4_480, 2_570)),
        ("tessier_resnet20", {"width": 8}, 69_122, (67_672, 560, 560, 330)),
        ("tessier_resnet50", {"size": 224, "classes": 1000}, 25_587_240, None),
    ],
)
def test_parameters_of_the_published_networks(
    name: str, settings: dict[str, int], total: int, kinds: tuple[int, ...] | None
) -> None:
    model = build_model(name, **settings)
    modules = [*model.modules()]
    norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
    found = (
        sum(parameters(m) for m in modules if isinstance(m, nn.Conv2d)),
        sum(m.weight.numel() for m in norms),
        sum(m.bias.numel() for m in norms),
        sum(parameters(m) for m in modules if isinstance(m, nn.Linear)),
    )
    assert parameters(model) == sum(found) == total
    assert kinds is None or found == kinds


def test_a_block_of_the_published_networks_by_hand() -> None:
    torch.manual_seed(0)
    block = TessierBlock(4, 8, stride=2, bottleneck=False)
    maps = torch.randn(6, 4, 8, 8)
    assert all(conv.bias is None for conv in [*block.convs, block.get_submodule("shortcut.0")])
    with torch.no_grad():
        block.last.weight.uniform_(0.5, 2.0)
    (conv1, conv2), (bn1, bn2) = block.convs, block.norms
    inside = bn2(conv2(bn1(conv1(maps)).relu()))
    expected = block.last(inside + block.shortcut(maps)).relu()
    torch.testing.assert_close(block(maps), expected)
    assert expected.shape == (6, 8, 4, 4)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *(("tessier_resnet20", 20), ("tessier_resnet44", 44), ("tessier_resnet110", 110)),
        *(("tessier_resnet18", 18), ("tessier_resnet34", 34), ("tessier_resnet50", 50)),
    ],
)
def test_depth_of_the_published_networks(name: str, layers: int) -> None:
    model = build_model(name, width=2)
    blocks = [m for m in model.modules() if isinstance(m, TessierBlock)]
    assert 1 + sum(len(block.convs) for block in blocks) + 1 == layers
    strided = [b for b in blocks if any(conv.stride == (2, 2) for conv in b.convs)]
    assert len(strided) == (3 if layers in (18, 34, 50) else 2)


def test_the_stem_of_the_published_networks_fits_the_images() -> None:
    small, large = (build_model("tessier_resnet18", size=s, width=4) for s in (32, 224))
    assert small.get_submodule("0")(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 32, 32)
    assert large.get_submodule("0")(torch.zeros(1, 3, 224, 224)).shape == (1, 4, 56, 56)


def test_weights_of_the_published_networks_are_torchs_default() -> None:
    torch.manual_seed(3)
    model = build_model("tessier_resnet20", width=4)
    torch.manual_seed(3)
    stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    assert torch.equal(model.get_parameter("0.0.weight"), stem.weight)


@pytest.mark.parametrize("name", ["tessier_resnet20", "tessier_resnet50"])
def test_filters_of_the_published_networks_can_be_removed(name: str) -> None:
    torch.manual_seed(0)
    model, example = build_model(name, width=4), torch.randn(2, 3, 32, 32)
    masks = select(find_groups(model, filters(example)), 0.5)
    small = shrink(model, masks, example)  # which compares the outputs
    assert 0.45 * parameters(model) < parameters(small) <= 0.5 * parameters(model)


def test_prunable_weights_of_the_narrow_resnet() -> None:
    model = build_model("resnet20", width=8)
    assert sum(p.numel() for p in model.parameters() if p.ndim >= 2) == 67_992


def test_parameters_by_hand() -> None:
    # Weights and biases of 12 -> 5, 5 -> 5, 5 -> 3.
    assert parameters(build_model("mlp", size=2, classes=3, width=5)) == 65 + 30 + 18
    # Convolutions 3 -> 2, 2 -> 4, 4 -> 8, two numbers a map of batch norm, linear 8 -> 3.
    assert parameters(build_model("cnn", classes=3, width=2)) == 54 + 72 + 288 + 28 + 27


@pytest.mark.parametrize(("name", "depth"), [("resnet20", 20), ("resnet32", 32), ("resnet56", 56)])
def test_depth_counts_the_layers_with_weights(name: str, depth: int) -> None:
    model = build_model(name, width=2)
    assert len(convolutions(model, 3)) + 1 == depth  # and the linear layer
    assert [*convolutions(model, 1)] == ["stage2.0.shortcut.0", "stage3.0.shortcut.0"]


def test_biases_before_batch_norm() -> None:
    model = build_model("resnet20", width=64)
    biased = {n: m.bias for n, m in convolutions(model, 3).items() if m.bias is not None}
    assert convolutions(model, 3).keys() - biased.keys() == {"conv"}
    assert sum(bias.numel() for bias in biased.values()) == 6 * (64 + 128 + 256) == 2_688
    assert all(module.bias is None for module in convolutions(model, 1).values())


def test_biases_before_batch_norm_change_nothing() -> None:
    torch.manual_seed(0)
    block = BasicBlock(4, 8, stride=2)
    maps = torch.randn(6, 4, 8, 8)
    before = block(maps)
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            assert conv.bias is not None
            conv.bias += 1.0
    torch.testing.assert_close(block(maps), before, atol=1e-5, rtol=1e-5)


def test_stages_halve_the_size_and_double_the_maps() -> None:
    model = build_model("resnet20", width=4)
    shapes = []
    for stage in (model.stage1, model.stage2, model.stage3):
        assert isinstance(stage, nn.Sequential) and len(stage) == 3
        stage.register_forward_hook(lambda _, __, maps: shapes.append(tuple(maps.shape[1:])))
    model(torch.randn(2, 3, 32, 32))
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]


def test_a_block_adds_what_it_computes_to_its_shortcut() -> None:
    maps = torch.randn(3, 4, 6, 6)
    same, wider = BasicBlock(4, 4, stride=1), BasicBlock(4, 8, stride=1)
    for block in (same, wider, BasicBlock(4, 4, stride=2)):
        nn.init.zeros_(block.bn2.weight)
        torch.testing.assert_close(block(maps), block.shortcut(maps).relu())
    torch.testing.assert_close(same(maps), maps.relu())
    nn.init.constant_(same.bn2.bias, 2.0)
    torch.testing.assert_close(same(maps), (maps + 2.0).relu())


def test_convolutions_start_as_he_et_al() -> None:
    torch.manual_seed(0)
    model = build_model("resnet20", width=32)
    for name, conv in (convolutions(model, 3) | convolutions(model, 1)).items():
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert float(conv.weight.detach().std()) == pytest.approx(
            math.sqrt(2 / fan_out), rel=0.1
        ), name
        assert conv.bias is None or not conv.bias.any()


def test_classifiers_of_torchvision() -> None:
    model = build_model("mobilenet_v3_small", classes=7).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 96)])
def test_no_auxiliary_outputs(name: str, size: int) -> None:
    model = build_model(name, classes=7).train()
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_bad_names() -> None:
    with pytest.raises(ValueError, match=r"mlp, cnn, .* or any torchvision .* not 'rsnet20'; did"):
        build_model("rsnet20")
    with pytest.raises(ValueError, match=r"did you mean .*resnet50"):
        build_model("resnet-50")
    with pytest.raises(ValueError, match=r"not 'zzz'$"):
        build_model("zzz")
    with pytest.raises(ValueError, match="any torchvision classifier"):  # a detector is not one
        build_model("fasterrcnn_resnet50_fpn")


def test_torchvision_has_no_width_and_three_channels() -> None:
    with pytest.raises(ValueError, match="width must be None for torchvision's resnet18"):
        build_model("resnet18", width=16)
    with pytest.raises(ValueError, match="channels must be 3 for torchvision's resnet18, not 1"):
        build_model("resnet18", channels=1)


@pytest.mark.parametrize("argument", ["channels", "size", "classes", "width"])
def test_sizes_are_whole_and_positive(argument: str) -> None:
    for wrong in (0, -1, 1.5, "8", True):
        message = f"{argument} must be a whole number of at least 1, not {wrong!r}"
        with pytest.raises(ValueError, match=message):
            build_model("cnn", **{argument: wrong})  # type: ignore[arg-type]
