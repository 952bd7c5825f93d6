"""Shrinking: the smaller network computes what the masked one does, or is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from swdlib.comparing import Attention, tensors_of
from swdlib.deploy.shrinking import shrink
from swdlib.masks import Masks, apply_, find_groups, removed_weights, select, sparsity_of, uniform
from swdlib.models import build_model
from swdlib.structures import channels, filters, filters_and_channels, weights
from swdlib.units import Untraceable, removable
from tests import toys


def randomised(model: nn.Module) -> nn.Module:
    """Return the model with batch norms and biases as training leaves them: nowhere 0 or 1."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    twin = copy.deepcopy(model)
    apply_(twin, masks)
    return twin


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def assert_equal_outputs(small: nn.Module, reference: nn.Module, example: Tensor) -> None:
    ours, theirs = small(example), reference(example)
    assert theirs.abs().max() > 0
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


class Split(nn.Module):
    """Depthwise, grouped and transposed convolutions, a concatenation, a gate, an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8))
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 12, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(28)
        self.gate = nn.Sequential(nn.Conv2d(28, 5, 1), nn.ReLU(), nn.Conv2d(5, 28, 1))
        self.up = nn.ConvTranspose2d(28, 6, 2, stride=2)
        self.side = nn.Conv2d(3, 6, 3, stride=1, padding=1)
        self.instance = nn.InstanceNorm2d(6, affine=True)
        self.linear = nn.Linear(6 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.depthwise(self.stem(x))
        both = self.norm(torch.cat([deep, self.grouped(deep)], 1))
        gate = torch.sigmoid(self.gate(F.adaptive_avg_pool2d(both, 1)))
        up = F.avg_pool2d(self.up(both * gate), 2) + self.side(x)
        return self.linear(F.adaptive_avg_pool2d(self.instance(up).relu(), 4).flatten(1))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Linear(12, 16), layer, nn.LayerNorm(16), nn.Linear(16, 5))


TOYS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: build_model("mlp", channels=1, size=8, width=16), (2, 1, 8, 8)),
    "cnn": (lambda: build_model("cnn", channels=1, size=8, width=8), (2, 1, 8, 8)),
    "resnet20": (lambda: build_model("resnet20", width=4), (2, 3, 16, 16)),
    "split": (Split, (2, 3, 8, 8)),
    "transformer": (transformer, (2, 7, 12)),
}


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_outputs_and_count_are_those_of_the_masked_network(name: str, sparsity: float) -> None:
    build, shape = TOYS[name]
    model, example = randomised(build()), torch.randn(shape)
    before = copy.deepcopy(model.state_dict())
    groups = find_groups(model, filters_and_channels(example))
    masks = select(groups, sparsity)
    small = shrink(model, masks, example)
    assert size(small) == sum(int(mask.sum()) for mask in masks.values())
    assert sparsity_of(masks) >= sparsity
    assert_equal_outputs(small, masked(model, masks), example)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", TOYS)
def test_a_shrunk_network_trains(name: str) -> None:
    build, shape = TOYS[name]
    model, example = randomised(build()), torch.randn(shape)
    masks = select(find_groups(model, filters_and_channels(example)), 0.5)
    small = shrink(model, masks, example).train()
    small(example).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_the_target_is_met_by_the_fewest_units() -> None:
    """One unit fewer would leave more parameters than the target allows."""
    model, example = randomised(build_model("resnet20", width=4)), torch.zeros(1, 3, 16, 16)
    groups = find_groups(model, filters(example))
    for sparsity in (0.1, 0.5, 0.8, 0.9):
        allowed = size(model) - round(sparsity * size(model))
        small = shrink(model, select(groups, sparsity), example)
        assert allowed - max(int(g.sizes().max()) for g in groups) < size(small) <= allowed


def test_single_weights_shrink_what_nothing_reads() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    masks = select(weights(model), 0.0)
    masks["4.weight"][:, 2] = False  # nothing reads hidden unit 2 of the second layer,
    masks["2.weight"][[0, 1, 3, 4], 1] = False  # which alone still reads unit 1 of the first
    small = shrink(model, masks, torch.randn(2, 4))
    shapes = [tuple(p.shape) for p in small.parameters()]
    assert shapes == [(5, 4), (5,), (4, 5), (4,), (3, 4), (3,)]
    example = torch.randn(7, 4)
    assert_equal_outputs(small, masked(model, masks), example)


def test_a_layer_of_which_nothing_is_read_keeps_one_channel() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    masks = {"2.weight": torch.zeros(3, 6, dtype=torch.bool)}
    small = shrink(model, masks, torch.randn(2, 4))
    assert [tuple(p.shape) for p in small.parameters()] == [(1, 4), (1,), (3, 1), (3,)]


def test_weights_stay_channels_last() -> None:
    example = torch.randn(2, 3, 8, 8)
    model = randomised(build_model("cnn", width=8)).to(memory_format=torch.channels_last)
    masks = select(find_groups(model, filters(example)), 0.6)
    small = shrink(model, masks, example)
    convolutions = [p for p in small.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    assert_equal_outputs(small, masked(model, masks), example)


def test_every_module_keeps_its_mode() -> None:
    model = randomised(build_model("cnn", channels=1, size=8, width=4)).train()
    model.get_submodule("1").eval()
    modes = [module.training for module in model.modules()]
    example = torch.randn(2, 1, 8, 8)
    small = shrink(model, select(find_groups(model, filters(example)), 0.5), example)
    assert [module.training for module in small.modules()] == modes
    assert [module.training for module in model.modules()] == modes


class Shuffle(nn.Module):
    """Mixes the order of channels in a way that no layer shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.first(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.second(maps).mean((2, 3))


def test_a_network_that_hides_its_channels_is_refused_or_equal_but_never_wrong() -> None:
    model, example = Shuffle().eval(), torch.randn(2, 3, 4, 4)
    masks = select(weights(model), 0.0)
    masks["second.weight"][:, 1] = False  # reads channel 4 of the first, not channel 1
    try:
        small = shrink(model, masks, example)
    except ValueError:
        return
    assert_equal_outputs(small, masked(model, masks), example)


def test_heads_are_removed() -> None:
    model, example = randomised(transformer()), torch.randn(2, 7, 12)
    groups = [g for g in find_groups(model, channels(example)) if "attn" in g.name]
    assert [g.units for g in groups] == [4]
    masks = select(groups, 0.2)
    small = shrink(model, masks, example)
    attention = small.get_submodule("1.self_attn")
    assert isinstance(attention, Attention) and attention.num_heads < 4
    assert_equal_outputs(small, masked(model, masks), torch.randn(3, 9, 12))


def halved(model: nn.Module, example: Tensor) -> Masks:
    """Return masks that remove half of the units of each layer, drawn at random."""
    masks = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    for layer in removable(model, example).found:
        gone = torch.randperm(layer.count) < layer.count // 2
        for part in (p for p in layer.parts if p.role != "buffer"):
            slices = torch.cat([gone, torch.zeros(1, dtype=torch.bool)])[part.units]
            masks[part.name].movedim(part.dim, 0)[slices] = False
    return masks


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", toys.TOYS)
@torch.no_grad()
def test_toys_shrink_by_any_of_their_units(name: str, dtype: torch.dtype, near: float) -> None:
    model, example = toys.build(name, dtype)
    masks = halved(model, example)
    small = shrink(model, masks, example)
    assert size(small) == sum(int(mask.sum()) for mask in masks.values())
    assert (size(small) < size(model)) == bool(toys.TOYS[name].units)
    more = torch.randn(3, *example.shape[1:], dtype=dtype)
    pairs = zip(*(tensors_of(net(more)) for net in (small, masked(model, masks))), strict=True)
    for ours, theirs in pairs:
        assert float(theirs.std()) > 0
        assert float((ours - theirs).abs().max()) <= near * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("name", toys.TOYS)
def test_shrunk_toys_train(name: str) -> None:
    model, example = toys.build(name)
    small = shrink(model, halved(model, example), example).train()
    torch.stack([t.square().mean() for t in tensors_of(small(example))]).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in small.parameters())
    assert any(p.grad is not None for p in small.parameters())
    names = [name for name, _ in small.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    assert small.state_dict().keys() == model.state_dict().keys()


FORBIDDEN: dict[str, Callable[[], nn.Module]] = {
    "they see each other's mean": lambda: toys.features(
        lambda net, x: x + x.mean(1, keepdim=True).detach()
    ),
    "their number is a factor": lambda: toys.features(lambda net, x: x * x.shape[1]),
    "not a number if one is missing": lambda: toys.features(
        lambda net, x: x + (0.0 if x.shape[1] == 8 else torch.nan)
    ),
}


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("name", FORBIDDEN)
def test_units_that_the_code_forbids_are_neither_offered_nor_cut(name: str, scale: float) -> None:
    torch.manual_seed(0)
    model, example = FORBIDDEN[name]().eval(), torch.randn(2, 3)
    model.get_parameter("c.weight").data *= scale
    groups = find_groups(model, channels(example))
    assert [group.name for group in groups] == ["b.weight"]
    masks = select(weights(model), 0.0)
    masks["b.weight"][:, 1] = False
    small = shrink(model, masks, example)
    assert size(small) == size(model)
    assert_equal_outputs(small, masked(model, masks), example)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_but_shrinks(dtype: torch.dtype) -> None:
    model, example = toys.build("residual", dtype)
    masks = halved(model, example)
    small = shrink(model, masks, example)
    assert {p.dtype for p in small.parameters()} == {dtype}
    torch.testing.assert_close(small(example), masked(model, masks)(example), atol=0.02, rtol=0.02)


def test_frozen_parameters_stay_frozen() -> None:
    model, example = toys.build("maps")
    masks = halved(model, example)
    model.get_parameter("b.weight").requires_grad_(False)
    small = shrink(model, masks, example)
    frozen = [name for name, p in small.named_parameters() if not p.requires_grad]
    assert frozen == ["b.weight"]


def encoder(layers: int = 2) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)
    return nn.TransformerEncoder(layer, layers).eval(), torch.randn(2, 6, 8)


def without_heads(model: nn.Module, example: Tensor) -> Masks:
    heads = [g for g in find_groups(model, channels(example)) if g.units == 4]
    chosen = [torch.tensor([True, False, True, False]) for _ in heads]
    return {name: ~gone for name, gone in removed_weights(heads, chosen).items()}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which packs the padded
@pytest.mark.parametrize("padded", [True, False])
def test_encoders_run_on_without_their_fused_path(padded: bool) -> None:
    """In evaluation torch reads the weights of a whole layer, and packs what is not padded."""
    model, example = encoder()
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if padded else None
    masks = without_heads(model, example)
    small = shrink(model, masks, example)
    assert all(small.get_submodule(f"layers.{i}.self_attn").num_heads == 2 for i in range(2))
    ours = small(example, src_key_padding_mask=padding)
    theirs = masked(model, masks)(example, src_key_padding_mask=padding)
    kept = torch.ones(2, 6, dtype=torch.bool) if padding is None else ~padding
    torch.testing.assert_close(ours[kept], theirs[kept])


def test_an_attention_that_keeps_all_heads_stays_as_it_is() -> None:
    model, example = encoder(1)
    masks = select([g for g in find_groups(model, channels(example)) if g.units == 12], 0.2)
    attention = shrink(model, masks, example).get_submodule("layers.0.self_attn")
    assert type(attention) is nn.MultiheadAttention


def test_a_mask_for_heads_that_are_gone_is_refused() -> None:
    model, example = encoder(1)
    small = shrink(model, without_heads(model, example), example)
    with pytest.raises(ValueError, match=r"each of 8 heads of the batch, but 4 are left"):
        small(example, mask=torch.zeros(8, 6, 6))


def test_an_attention_used_in_two_places_is_replaced_in_both() -> None:
    layer = nn.MultiheadAttention(8, 4, batch_first=True)
    model = toys.Net(
        lambda net, x: net.second(*[net.first(x, x, x)[0]] * 3)[0], first=layer, second=layer
    ).eval()
    example = torch.randn(2, 5, 8)
    masks = without_heads(model, example)
    small = shrink(model, masks, example)
    assert small.get_submodule("first") is small.get_submodule("second")
    assert_equal_outputs(small, masked(model, masks), example)


NETWORKS = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
    *("densenet121", "googlenet", "googlenet with auxiliary heads", "regnet_y_400mf"),
    *("convnext_tiny", "vgg11_bn", "vit_b_16", "shufflenet_v2_x1_0"),
)


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network of torchvision whose outputs depend on what is put in, and an example."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": 64} if name == "vit_b_16" else {}
    if name == "vgg11_bn":
        options = {"num_classes": 10}
    if "googlenet" in name:
        options = {"init_weights": False, "aux_logits": name != "googlenet"}
    model = torchvision.models.get_model(name.split()[0], weights=None, **options)
    # Most of two networks repeats what the rest shows, and takes minutes.
    if name == "vgg11_bn":
        model.classifier[0], model.classifier[3] = nn.Linear(25_088, 64), nn.Linear(64, 64)
        model.classifier[6] = nn.Linear(64, 10)
    if name == "vit_b_16":
        del model.encoder.layers[4:]
    model = randomised(model)
    for key, parameter in model.named_parameters():
        if key.endswith("layer_scale"):  # nearly zero to begin with
            nn.init.constant_(parameter, 0.5)
        if key == "heads.head.weight":  # zero to begin with
            nn.init.normal_(parameter)
    example = torch.randn(2, 3, 64, 64)
    return with_statistics_of(model, example), example


@torch.no_grad()
def with_statistics_of(model: nn.Module, example: Tensor) -> nn.Module:
    """Return the model with batch norms that have seen the example and nothing else."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(example)
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var.clamp_(min=0.01)  # else some channels would be all rounding
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_networks_shrink(name: str) -> None:
    model, example = network(name)
    groups = find_groups(model, filters_and_channels(example))
    for sparsity in (0.3, 0.6, 0.9):
        masks = select(groups, sparsity, allocation=uniform)
        small = shrink(model, masks, example)
        kept = sum(int(mask.sum()) for mask in masks.values())
        assert size(small) == kept <= (1 - sparsity) * size(model) + 0.5
        reference = masked(model, masks)
        assert_equal_outputs(small, reference, example)
        if sparsity == 0.3:  # what is put in comes out: the outputs of two images differ
            with torch.no_grad():
                one, other = reference(example)
            assert (one - other).abs().max() > 3e-5 * max(1.0, float(one.abs().max()))


@pytest.mark.slow
def test_a_shrunk_network_trains_its_auxiliary_heads() -> None:
    model, example = network("googlenet with auxiliary heads")
    small = shrink(
        model, select(find_groups(model, filters_and_channels(example)), 0.9), example
    ).train()
    outputs = tensors_of(small(example))
    assert len(outputs) == 3
    torch.stack([t.square().mean() for t in outputs]).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pixels"), [("swin_t", 64), ("maxvit_t", 224)])
def test_networks_of_windows_are_refused_in_time_or_shrink(name: str, pixels: int) -> None:
    model = randomised(torchvision.models.get_model(name, weights=None))
    example = torch.randn(1, 3, pixels, pixels)
    try:
        groups = find_groups(model, filters_and_channels(example))
    except Untraceable as error:
        assert "structures that need no graph work on it" in str(error)
        return
    masks = select(groups, 0.1)
    assert_equal_outputs(shrink(model, masks, example), masked(model, masks), example)
