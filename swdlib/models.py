"""Networks: small ones to start with, ResNets for CIFAR, and torchvision's classifiers."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from swdlib.schedules import check_count


def build_model(
    name: str, *, channels: int = 3, size: int = 32, classes: int = 10, width: int | None = None
) -> nn.Module:
    """Return a new network for images of shape (channels, size, size), with random weights.

    `name` is a key of `MODELS` or any classifier of torchvision, such as "resnet50". `width` scales
    a network of `MODELS` (see its builder; None is the builder's default); torchvision's have none.
    Call `torch.manual_seed` first for weights that can be reproduced.
    """
    for what, number in {"channels": channels, "size": size, "classes": classes}.items():
        check_count(what, number)
    if width is not None:
        check_count("width", width)
    if name not in MODELS:
        return _from_torchvision(name, channels, classes, width)
    options = {} if width is None else {"width": width}
    return MODELS[name](channels=channels, size=size, classes=classes, **options)


def mlp(*, channels: int, size: int, classes: int, width: int = 128) -> nn.Module:
    """Two hidden layers of `width` units on the flattened image."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size * size, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def cnn(*, channels: int, size: int, classes: int, width: int = 16) -> nn.Module:
    """Three 3x3 convolutions of `width`, 2 `width` and 4 `width` maps; images of any size."""
    layers: list[nn.Module] = []
    shapes = ((channels, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
    for before, after, stride in shapes:
        layers += [_conv(before, after, stride), nn.BatchNorm2d(after), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)]
    return _initialise(nn.Sequential(*layers, *head))


def resnet(*, depth: int, channels: int, size: int, classes: int, width: int = 16) -> nn.Module:
    """The ResNet for CIFAR of He et al. (2016, arXiv 1512.03385), with two differences.

    Its convolutions have biases before batch norm, and its shortcuts are convolutions where the
    shape changes. `depth` is 6n + 2 layers: a stem, three stages of n blocks, a linear layer.
    `width` is the number of maps of the first stage, 16 in that paper. Images may have any size.
    """
    return _initialise(ResNet((depth - 2) // 6, channels, classes, width))


class ResNet(nn.Module):
    """A 3x3 stem, three stages of `blocks` residual blocks, global average pooling, a linear layer.

    The stages have `width`, 2 `width` and 4 `width` maps, the second and third at half the size of
    the one before.
    """

    def __init__(self, blocks: int, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.conv = _conv(channels, width)
        self.bn = nn.BatchNorm2d(width)
        self.stage1 = _stage(blocks, width, width, stride=1)
        self.stage2 = _stage(blocks, width, 2 * width, stride=2)
        self.stage3 = _stage(blocks, 2 * width, 4 * width, stride=2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.bn(self.conv(images)))
        maps = self.stage3(self.stage2(self.stage1(maps)))
        return self.linear(maps.mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        # He's network has no biases before batch norm, which subtracts them again. This one has
        # them, and keeps them so that the results on record can be reproduced.
        self.conv1 = _conv(before, after, stride, bias=True)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = _conv(after, after, bias=True)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            project = _conv(before, after, stride, kernel=1)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(after))

    def forward(self, maps: Tensor) -> Tensor:
        inside = F.relu(self.bn1(self.conv1(maps)))
        return F.relu(self.bn2(self.conv2(inside)) + self.shortcut(maps))


def tessier_resnet(
    *,
    blocks: tuple[int, ...],
    bottleneck: bool = False,
    channels: int,
    size: int,
    classes: int,
    width: int = 64,
) -> nn.Module:
    """The ResNets on which Selective Weight Decay was published, as in its authors' code.

    No convolution has a bias, and every block ends with one more batch norm, after its addition.
    There is a stage for each number of `blocks`, of `width`, 2 `width` ... maps, each but the first
    at half the size of the one before; a `bottleneck` block has four times as many outputs. Images
    of more than 64 pixels, such as ImageNet's, meet a 7x7 stem and max-pooling. The weights are
    PyTorch's default ones. Source: the code beside arXiv 2011.10520 (HugoTessier-lab/SWD).
    """
    stem: list[nn.Module] = [_conv(channels, width), nn.BatchNorm2d(width), nn.ReLU()]
    if size > 64:
        stem[0] = nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        stem.append(nn.MaxPool2d(kernel_size=3, stride=2, padding=1))
    stages, before = [], width
    for stage, number in enumerate(blocks):
        inside, layers = width << stage, nn.Sequential()
        for block in range(number):
            stride = 2 if stage and not block else 1
            layers.append(TessierBlock(before, inside, stride, bottleneck))
            before = inside * (4 if bottleneck else 1)
        stages.append(layers)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)]
    return nn.Sequential(nn.Sequential(*stem), *stages, *head)


class TessierBlock(nn.Module):
    """Convolutions beside a shortcut, and a batch norm after their addition.

    Two 3x3 convolutions or, in a bottleneck, 1x1 to `inside` maps, 3x3, and 1x1 to four times as
    many. The shortcut is a 1x1 convolution and its batch norm where the shape changes.
    """

    def __init__(self, before: int, inside: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        after = inside * (4 if bottleneck else 1)
        if bottleneck:
            convs = [_conv(before, inside, 1, kernel=1), _conv(inside, inside, stride)]
            convs.append(_conv(inside, after, 1, kernel=1))
        else:
            convs = [_conv(before, inside, stride), _conv(inside, after)]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in convs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                _conv(before, after, stride, kernel=1), nn.BatchNorm2d(after)
            )
        self.last = nn.BatchNorm2d(after)

    def forward(self, maps: Tensor) -> Tensor:
        inside = maps
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            inside = norm(conv(F.relu(inside) if i else inside))
        return F.relu(self.last(inside + self.shortcut(maps)))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet20": partial(resnet, depth=20),
    "resnet32": partial(resnet, depth=32),
    "resnet56": partial(resnet, depth=56),
    "tessier_resnet20": partial(tessier_resnet, blocks=(3,) * 3),
    "tessier_resnet32": partial(tessier_resnet, blocks=(5,) * 3),
    "tessier_resnet44": partial(tessier_resnet, blocks=(7,) * 3),
    "tessier_resnet56": partial(tessier_resnet, blocks=(9,) * 3),
    "tessier_resnet110": partial(tessier_resnet, blocks=(18,) * 3),
    "tessier_resnet18": partial(tessier_resnet, blocks=(2, 2, 2, 2)),
    "tessier_resnet34": partial(tessier_resnet, blocks=(3, 4, 6, 3)),
    "tessier_resnet50": partial(tessier_resnet, blocks=(3, 4, 6, 3), bottleneck=True),
}


def _stage(blocks: int, before: int, after: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(after, after, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(before, after, stride), *rest)


def _conv(
    before: int, after: int, stride: int = 1, bias: bool = False, kernel: int = 3
) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=bias)


def _initialise(model: nn.Module) -> nn.Module:
    """Draw the convolutions as He et al. (2015, arXiv 1502.01852); the linear layer is torch's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def check_model(name: str, width: int | None) -> None:
    """ValueError unless `build_model` knows the name and, if `width` is given, has a use for it."""
    if name in MODELS:
        return
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        near = difflib.get_close_matches(str(name), [*MODELS, *names])
        raise ValueError(
            f"model must be one of {', '.join(MODELS)} or any torchvision classifier, not {name!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    if width is not None:
        raise ValueError(
            f"width must be None for torchvision's {name}, which has none, not {width}"
        )


def _from_torchvision(name: str, channels: int, classes: int, width: int | None) -> nn.Module:
    from torchvision import models

    check_model(name, width)
    if channels != 3:
        raise ValueError(f"channels must be 3 for torchvision's {name}, not {channels}")
    # In training mode these two would return the outputs of auxiliary classifiers as well.
    plain = {"aux_logits": False, "init_weights": True}
    options: dict[str, Any] = plain if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=classes, **options)
