"""Small networks, each with one thing that a graph of channels has to get right."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase


class Net(nn.Module):
    """Modules by name, and a function of them and the input."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@dataclass(frozen=True)
class Toy:
    """A network, the shape of its input, and how many units of which layers can be removed."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    units: dict[str, int]


IMAGE = (2, 3, 8, 8)
POINTS = (4, 3)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2, **options})


def maps(operation: Callable[[Any, Tensor], Tensor], inputs: int = 8, **modules: Any) -> nn.Module:
    """Convolution a, an operation on its 8 maps, convolution b of `inputs`, a linear layer."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.fc(F.relu(net.b(operation(net, net.a(x)))).mean((2, 3)))

    outputs = modules.pop("outputs", 8)
    return Net(run, a=conv(3, outputs), b=conv(inputs, 6), fc=nn.Linear(6, 5), **modules)


def features(
    operation: Callable[[Any, Tensor], Tensor], inputs: int = 8, **modules: Any
) -> nn.Module:
    """Linear layer a, an operation on its 8 features, linear layers b of `inputs` and c."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.c(F.relu(net.b(operation(net, net.a(x)))))

    layers = {"a": nn.Linear(3, 8), "b": nn.Linear(inputs, 6), "c": nn.Linear(6, 5)}
    return Net(run, **layers, **modules)


class Auxiliary(nn.Module):
    """A second head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = conv(3, 8), conv(8, 6), conv(8, 4)
        self.norm = nn.BatchNorm2d(8)
        self.last, self.last_aux = nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        shared = F.relu(self.norm(self.a(x)))
        main = self.last(F.relu(self.b(shared)).mean((2, 3)))
        return (main, self.last_aux(self.aux(shared).mean((2, 3)))) if self.training else main


def tied() -> nn.Module:
    """Return linear layers of which the second and third share a weight."""
    second, third = nn.Linear(8, 8), nn.Linear(8, 8)
    third.weight = second.weight
    return nn.Sequential(nn.Linear(3, 8), second, nn.ReLU(), third, nn.ReLU(), nn.Linear(8, 5))


def residual(net: Any, x: Tensor) -> Tensor:
    hidden = F.relu(net.norm(net.a(x)))
    return net.fc((hidden + net.c(F.relu(net.b(hidden)))).mean((2, 3)))


def concatenated(net: Any, x: Tensor) -> Tensor:
    return net.fc(net.c(torch.cat([net.a(x), net.b(x)], 1)).mean((2, 3)))


def gated(net: Any, x: Tensor) -> Tensor:
    hidden = F.relu(net.a(x))
    gate = net.up(F.relu(net.down(hidden.mean((2, 3)))))
    return net.fc((hidden * gate.sigmoid()[..., None, None]).mean((2, 3)))


def transformer(**options: Any) -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.fc(net.layer(net.embed(x)).mean(1))

    layer = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True, **options)
    return Net(run, embed=nn.Linear(3, 8), layer=layer, fc=nn.Linear(8, 5))


BOTH = {"a.weight": 8, "b.weight": 6}  # of `maps` and `features`, if channels pass between a and b
AFTER = {"b.weight": 6}  # if they do not

TOYS: dict[str, Toy] = {
    "maps": Toy(lambda: maps(lambda net, x: F.relu(x)), IMAGE, BOTH),
    "features": Toy(lambda: features(lambda net, x: F.relu(x)), POINTS, BOTH),
    "sequences": Toy(lambda: features(lambda net, x: F.relu(x)), (4, 7, 3), BOTH),
    "batch norm": Toy(
        lambda: maps(lambda net, x: F.relu(net.norm(x)), norm=nn.BatchNorm2d(8)), IMAGE, BOTH
    ),
    "batch norm without parameters": Toy(
        lambda: maps(lambda net, x: net.norm(x), norm=nn.BatchNorm2d(8, affine=False)),
        IMAGE,
        BOTH,
    ),
    "batch norm without statistics": Toy(
        lambda: maps(lambda net, x: net.norm(x), norm=nn.BatchNorm2d(8, track_running_stats=False)),
        IMAGE,
        BOTH,
    ),
    "instance norm": Toy(
        lambda: maps(lambda net, x: net.norm(x), norm=nn.InstanceNorm2d(8, affine=True)),
        IMAGE,
        BOTH,
    ),
    "instance norm without parameters": Toy(
        lambda: maps(lambda net, x: net.norm(x), norm=nn.InstanceNorm2d(8)), IMAGE, BOTH
    ),
    "instance norm with statistics": Toy(
        lambda: maps(
            lambda net, x: net.norm(x),
            norm=nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        ),
        IMAGE,
        BOTH,
    ),
    "group norm": Toy(
        lambda: maps(lambda net, x: net.norm(x), norm=nn.GroupNorm(2, 8)),
        IMAGE,
        {"a.weight": 2, "b.weight": 6},
    ),
    "layer norm": Toy(
        lambda: features(lambda net, x: net.norm(x), norm=nn.LayerNorm(8)), POINTS, AFTER
    ),
    "rms norm": Toy(
        lambda: features(lambda net, x: net.norm(x), norm=nn.RMSNorm(8)), POINTS, AFTER
    ),
    "functional layer norm": Toy(
        lambda: features(lambda net, x: F.layer_norm(x, (8,))), POINTS, AFTER
    ),
    "functional group norm": Toy(lambda: maps(lambda net, x: F.group_norm(x, 2)), IMAGE, AFTER),
    "prelu of every channel": Toy(
        lambda: maps(lambda net, x: net.act(x), act=nn.PReLU(8)), IMAGE, BOTH
    ),
    "prelu of all channels": Toy(
        lambda: maps(lambda net, x: net.act(x), act=nn.PReLU()), IMAGE, BOTH
    ),
    "depthwise": Toy(lambda: maps(lambda net, x: net.d(x), d=conv(8, 8, groups=8)), IMAGE, BOTH),
    "depthwise that multiplies": Toy(
        lambda: maps(lambda net, x: net.d(x), 16, d=conv(8, 16, groups=8)), IMAGE, BOTH
    ),
    "grouped": Toy(
        lambda: maps(lambda net, x: net.d(x), 12, d=conv(8, 12, groups=4)),
        IMAGE,
        {"a.weight": 4, "b.weight": 6},
    ),
    "transposed": Toy(
        lambda: maps(lambda net, x: net.d(x), 4, d=nn.ConvTranspose2d(8, 4, 2, stride=2)),
        IMAGE,
        {**BOTH, "d.weight": 4},
    ),
    "grouped and transposed": Toy(
        lambda: maps(lambda net, x: net.d(x), 4, d=nn.ConvTranspose2d(8, 4, 2, groups=2)),
        IMAGE,
        {"a.weight": 2, "b.weight": 6},
    ),
    "residual": Toy(
        lambda: Net(
            residual,
            **{"a": conv(3, 8), "norm": nn.BatchNorm2d(8), "b": conv(8, 6), "c": conv(6, 8)},
            fc=nn.Linear(8, 5),
        ),
        IMAGE,
        BOTH,
    ),
    "residual with the input": Toy(
        lambda: Net(
            lambda net, x: net.c(x + net.b(F.relu(net.a(x)))),
            **{"a": nn.Linear(3, 8), "b": nn.Linear(8, 3), "c": nn.Linear(3, 5)},
        ),
        POINTS,
        {"a.weight": 8},
    ),
    "concatenated": Toy(
        lambda: Net(concatenated, a=conv(3, 8), b=conv(3, 4), c=conv(12, 6), fc=nn.Linear(6, 5)),
        IMAGE,
        {"a.weight": 8, "b.weight": 4, "c.weight": 6},
    ),
    "concatenated with the input": Toy(
        lambda: Net(
            lambda net, x: net.fc(net.b(torch.cat([x, net.a(x)], 1)).mean((2, 3))),
            **{"a": conv(3, 8), "b": conv(11, 6), "fc": nn.Linear(6, 5)},
        ),
        IMAGE,
        BOTH,
    ),
    "concatenated and flattened": Toy(
        lambda: Net(
            lambda net, x: net.fc(torch.cat([net.a(x), net.b(x)], 1).flatten(1)),
            **{"a": conv(3, 8), "b": conv(3, 4), "fc": nn.Linear(12 * 64, 5)},
        ),
        IMAGE,
        {"a.weight": 8, "b.weight": 4},
    ),
    "flattened": Toy(
        lambda: Net(
            lambda net, x: net.fc(net.norm(net.a(x).flatten(1))),
            **{"a": conv(3, 8), "norm": nn.BatchNorm1d(512), "fc": nn.Linear(512, 5)},
        ),
        IMAGE,
        {"a.weight": 8},
    ),
    "gated": Toy(
        lambda: Net(
            gated,
            **{"a": conv(3, 8), "down": nn.Linear(8, 4), "up": nn.Linear(4, 8)},
            fc=nn.Linear(8, 5),
        ),
        IMAGE,
        {"a.weight": 8, "down.weight": 4},
    ),
    "one dimension": Toy(
        lambda: Net(
            lambda net, x: net.fc(net.b(F.relu(net.norm(net.a(x)))).flatten(1)),
            **{"a": nn.Conv1d(3, 8, 3), "norm": nn.BatchNorm1d(8), "b": nn.Conv1d(8, 6, 3)},
            fc=nn.Linear(24, 5),
        ),
        (2, 3, 8),
        BOTH,
    ),
    "three dimensions": Toy(
        lambda: Net(
            lambda net, x: net.fc(net.b(F.relu(net.norm(net.a(x)))).flatten(1)),
            **{"a": nn.Conv3d(3, 8, 3), "norm": nn.BatchNorm3d(8), "b": nn.Conv3d(8, 6, 3)},
            fc=nn.Linear(6, 5),
        ),
        (2, 3, 5, 5, 5),
        BOTH,
    ),
    "used twice": Toy(
        lambda: features(lambda net, x: net.d(F.relu(net.d(x))), d=nn.Linear(8, 8)), POINTS, BOTH
    ),
    "shared weight": Toy(tied, POINTS, {"0.weight": 8}),
    "two outputs": Toy(
        lambda: Net(
            lambda net, x: {"deep": [net.b(net.a(x))], "shallow": net.a(x)},
            **{"a": nn.Linear(3, 8), "b": nn.Linear(8, 5)},
        ),
        POINTS,
        {},
    ),
    "auxiliary head": Toy(Auxiliary, IMAGE, {**BOTH, "aux.weight": 4}),
    "weight norm": Toy(
        lambda: Net(
            lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x))))) + net.d(net.a(x)),
            a=nn.Linear(3, 8),
            b=nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)),
            **{"c": nn.Linear(6, 5), "d": nn.Linear(8, 5)},
        ),
        POINTS,
        {},
    ),
    "attention": Toy(transformer, (2, 6, 3), {"layer.self_attn": 4, "layer.linear1.weight": 12}),
    "attention by hand": Toy(
        lambda: features(lambda net, x: (x @ x.mT).softmax(-1) @ x), (2, 4, 3), AFTER
    ),
    "shuffled by a view": Toy(
        lambda: maps(lambda net, x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)),
        IMAGE,
        AFTER,
    ),
    "indexed": Toy(lambda: maps(lambda net, x: x[:, [3, 1, 0, 2, 7, 6, 4, 5]]), IMAGE, AFTER),
    "flipped": Toy(lambda: maps(lambda net, x: x.flip(1)), IMAGE, BOTH),
    "sliced": Toy(lambda: maps(lambda net, x: x[:, :4] + x[:, 4:], 4), IMAGE, AFTER),
    "split": Toy(
        lambda: maps(lambda net, x: torch.mul(*x.chunk(2, 1)), 4),
        IMAGE,
        {"a.weight": 4, "b.weight": 6},
    ),
    "linear gate": Toy(
        lambda: maps(lambda net, x: F.glu(x, 1), 4), IMAGE, {"a.weight": 4, "b.weight": 6}
    ),
    "pixel shuffle": Toy(
        lambda: maps(lambda net, x: F.pixel_shuffle(x, 2), 2), IMAGE, {"a.weight": 2, "b.weight": 6}
    ),
    "softmax": Toy(lambda: maps(lambda net, x: x.softmax(-3)), IMAGE, AFTER),
    "mean of channels": Toy(lambda: maps(lambda net, x: x * x.mean(1, keepdim=True)), IMAGE, AFTER),
    "parameter of its own": Toy(
        lambda: maps(
            lambda net, x: x * net.scale[0],
            scale=nn.ParameterList([nn.Parameter(torch.rand(8, 1, 1))]),
        ),
        IMAGE,
        BOTH,
    ),
    "weight of a layer that does not run": Toy(
        lambda: features(lambda net, x: F.linear(x, net.d.weight), 6, d=nn.Linear(8, 6)),
        POINTS,
        {"a.weight": 8},
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Return a toy, its norms as training leaves them, and an example of its input."""
    torch.manual_seed(0)
    model = TOYS[name].build().to(dtype)
    for module in model.modules():
        if isinstance(module, _NormBase):
            for value in (module.weight, module.running_var):
                if value is not None:
                    nn.init.uniform_(value, 0.5, 1.5)
            for value in (module.bias, module.running_mean):
                if value is not None:
                    nn.init.normal_(value)
    return model.eval(), torch.randn(TOYS[name].shape, dtype=dtype)
