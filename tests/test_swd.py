import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torchvision.models import get_model, list_models

from swdlib.criteria import magnitude
from swdlib.masks import ALLOCATIONS, NotFinite, prunable, sparsity_of
from swdlib.schedules import Constant, Cubic, Exponential, Linear
from swdlib.structures import STRUCTURES, Single, kernels, weights
from swdlib.swd import SelectiveWeightDecay, Update, penalty

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "adam": partial(Adam, lr=0.01),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(RMSprop, lr=0.01),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
updates = pytest.mark.parametrize("update", ["gradient", "proximal"])
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The loops here are too short for a neutral cut, which is not what they are about.
    pytest.mark.filterwarnings("ignore::swdlib.swd.NotNeutral"),
]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def cnn() -> nn.Module:
    torch.manual_seed(0)
    # No bias before batch norm: its gradient is rounding alone, which Adam would blow up.
    first, second = nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(4, 4, 2, bias=False)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    head = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(first, norms[0], nn.Tanh(), second, norms[1], head).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (6,), generator=generator),
        )
        for _ in range(count)
    ]


def penalty_of(model: nn.Module, **settings: Any) -> SelectiveWeightDecay:
    settings = {"sparsity": 0.7, "steps": 12, "strength": Exponential(1.0, 4e3), **settings}
    return SelectiveWeightDecay(model, **settings)


def attached(model: nn.Module, optimizer: Optimizer, **settings: Any) -> SelectiveWeightDecay:
    swd = penalty_of(model, **settings)
    swd.attach(optimizer)
    return swd


def train(model: nn.Module, optimizer: Optimizer, count: int = 12, skip: int = 0) -> None:
    for images, labels in batches(count)[skip:]:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()


def train_by_autograd(model: nn.Module, optimizer: Optimizer, **settings: Any) -> None:
    swd = penalty_of(model, **settings)
    for images, labels in batches(12):
        optimizer.zero_grad()
        (cross_entropy(model(images), labels) + swd.penalty()).backward()
        optimizer.step()
        swd.advance()


def assert_same(one: nn.Module, other: nn.Module, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=rtol, atol=atol)


# The method on one screen


def test_the_equation_by_hand() -> None:
    weights = [torch.tensor([0.1, -0.4], requires_grad=True), torch.tensor([-0.2, 0.3])]
    found = penalty(weights, sparsity=0.5, strength=4.0, weight_decay=0.5)
    assert found.item() == pytest.approx(4 * 0.5 / 2 * (0.1**2 + 0.2**2))
    found.backward()
    torch.testing.assert_close(weights[0].grad, torch.tensor([4 * 0.5 * 0.1, 0.0]))
    assert penalty(weights, 0.0, 4.0, 0.5).item() == 0.0
    chosen = penalty(weights, 0.5, 4.0, 0.5, selected=torch.tensor([1, 3]))
    assert chosen.item() == pytest.approx(0.4**2 + 0.3**2)


def test_of_ties_the_equation_selects_the_first() -> None:
    weights = [torch.tensor([[0.3, -0.1], [0.1, 2.0]]), torch.tensor([0.1, -5.0])]
    for weight in weights:
        weight.requires_grad_()
    penalty(weights, 1 / 3, 1.0, 1.0).backward()
    gradients = [w.grad.tolist() for w in weights if w.grad is not None]
    assert gradients == [[pytest.approx([0.0, -0.1]), pytest.approx([0.1, 0.0])], [0.0, 0.0]]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.99])
def test_class_and_fast_path_are_the_equation(sparsity: float) -> None:
    network, twin = cnn(), cnn()
    swd = penalty_of(network, sparsity=sparsity, steps=4, strength=Exponential(1.0, 81.0))
    optimizer = SGD(network.parameters(), lr=0.05)
    swd.attach(optimizer)
    for step, (images, labels) in enumerate(batches(4)):
        weights = [p for p in twin.parameters() if p.ndim >= 2]
        loss = cross_entropy(twin(images), labels)
        equation = penalty(weights, sparsity, 3.0**step, 5e-4)
        torch.testing.assert_close(swd.penalty(), equation, rtol=1e-12, atol=0)
        gradients = torch.autograd.grad(loss + equation, [*twin.parameters()])
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.05)
        pairs = zip(network.parameters(), twin.parameters(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in pairs)


# The penalty's value and gradient


def four_weights() -> nn.Linear:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[0.1, -0.4], [-0.2, 0.3]])
    return model


def test_penalty_by_hand() -> None:
    model = four_weights()
    swd = SelectiveWeightDecay(
        model, sparsity=0.5, steps=2, weight_decay=0.5, strength=Linear(4, 8)
    )
    penalty = swd.penalty()  # 4 * 0.5 / 2 * (0.1**2 + 0.2**2)
    assert penalty.item() == pytest.approx(0.05)
    penalty.backward()
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.2, 0.0], [-0.4, 0.0]]))
    swd.advance()
    assert swd.penalty().item() == pytest.approx(0.075)


def test_gradient_by_hand() -> None:
    model = four_weights()
    optimizer = SGD(model.parameters(), lr=0.25)
    swd = SelectiveWeightDecay(model, sparsity=0.5, steps=2, weight_decay=0.5, strength=4.0)
    swd.attach(optimizer)
    model.weight.grad = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    optimizer.step()
    # w - 0.25 * (grad + 2 * w*), where w* is 0.1 and -0.2.
    expected = torch.tensor([[0.05, -0.4], [-0.35, 0.55]])
    torch.testing.assert_close(model.weight.detach(), expected)
    assert swd.step == 1


@pytest.mark.parametrize("foreach", [False, True])
@optimizers
@pytest.mark.parametrize("build", [mlp, cnn])
def test_fast_path_equals_autograd(
    build: Callable[[], nn.Module], make: Callable[..., Optimizer], foreach: bool
) -> None:
    fast, slow, free = build(), build(), build()
    optimizer = make(fast.parameters(), foreach=foreach)
    swd = attached(fast, optimizer)
    train(fast, optimizer)
    train_by_autograd(slow, make(slow.parameters(), foreach=foreach))
    train(free, make(free.parameters(), foreach=foreach))
    assert_same(fast, slow)
    assert swd.step == 12
    assert_differ(fast, free)


def assert_differ(one: nn.Module, other: nn.Module) -> None:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"structure": kernels},
        {"sparsity": Cubic(0.0, 0.9), "strength": 100.0},
        {"criterion": lambda parameter: -parameter.detach().abs()},
    ],
)
def test_fast_path_equals_autograd_for_other_selections(settings: dict[str, Any]) -> None:
    fast, slow = cnn(), cnn()
    optimizer = SGD(fast.parameters(), lr=0.1, momentum=0.9)
    attached(fast, optimizer, **settings)
    train(fast, optimizer)
    train_by_autograd(slow, SGD(slow.parameters(), lr=0.1, momentum=0.9), **settings)
    assert_same(fast, slow)


def load_what_was_saved(into: tuple[Any, ...], out_of: tuple[Any, ...]) -> None:
    """Load the states of model, optimizer and penalty from a file that cannot run code."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in out_of], file)
    file.seek(0)
    for part, state in zip(into, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)


def mixture() -> nn.Module:
    """Return a network in which every structure finds something."""
    torch.manual_seed(0)
    # As in cnn(), no bias before batch norm, nor before the second convolution's own.
    maps = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 8, 2)
    return nn.Sequential(*maps, nn.Flatten(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


EXAMPLE = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
structures = pytest.mark.parametrize("structure", STRUCTURES)


@structures
def test_fast_path_equals_autograd_for_every_structure(structure: str) -> None:
    fast, slow, free = mixture(), mixture(), mixture()
    settings: dict[str, Any] = {"structure": STRUCTURES[structure](EXAMPLE), "sparsity": 0.2}
    optimizer = SGD(fast.parameters(), lr=0.1, momentum=0.9)
    attached(fast, optimizer, **settings)
    train(fast, optimizer)
    train_by_autograd(slow, SGD(slow.parameters(), lr=0.1, momentum=0.9), **settings)
    train(free, SGD(free.parameters(), lr=0.1, momentum=0.9))
    assert_same(fast, slow)
    assert_differ(fast, free)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_fast_path_equals_autograd_for_every_allocation(allocation: str) -> None:
    fast, slow = cnn(), cnn()
    settings = {"allocation": ALLOCATIONS[allocation]}
    optimizer = SGD(fast.parameters(), lr=0.1, momentum=0.9)
    attached(fast, optimizer, **settings)
    train(fast, optimizer)
    train_by_autograd(slow, SGD(slow.parameters(), lr=0.1, momentum=0.9), **settings)
    assert_same(fast, slow)


@updates
@structures
def test_every_structure_is_pruned_to_the_target_without_a_shock(
    structure: str, update: Update
) -> None:
    model = mixture()
    optimizer = SGD(model.parameters(), lr=0.1)
    swd = attached(
        model,
        optimizer,
        **{"structure": STRUCTURES[structure](EXAMPLE), "sparsity": 0.2, "update": update},
        strength=Exponential(1.0, 2e4),
    )
    train(model, optimizer, 40)
    images, labels = batches(1)[0]
    before = cross_entropy(model(images), labels).detach()
    selected = swd.report()
    assert selected["norm_selected"] < 0.05 * selected["norm_kept"]
    masks = swd.prune()
    if structure == "parameters":
        ranked = [masks[g.name].flatten() for g in swd.groups if isinstance(g, Single) and g.ranked]
        assert int((~torch.cat(ranked)).sum()) == int(0.2 * sum(map(len, ranked)))
    else:
        surplus = sparsity_of(masks) * prunable(swd.groups) - round(0.2 * prunable(swd.groups))
        assert -1e-6 < surplus < max(int(group.sizes().max()) for group in swd.groups)
    torch.testing.assert_close(
        cross_entropy(model(images), labels).detach(), before, atol=0.02, rtol=0
    )
    train(model, optimizer, 45, skip=40)
    assert all(not parameter[~masks[name]].any() for name, parameter in swd.parameters.items())


@updates
@structures
def test_a_run_with_any_structure_is_resumed_bit_for_bit(structure: str, update: Update) -> None:
    def start() -> tuple[nn.Module, Optimizer, SelectiveWeightDecay]:
        model = mixture()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        settings: dict[str, Any] = {"structure": STRUCTURES[structure](EXAMPLE), "update": update}
        return model, optimizer, attached(model, optimizer, sparsity=0.2, **settings)

    def go(run: tuple[nn.Module, Optimizer, SelectiveWeightDecay], begin: int, end: int) -> Any:
        for i in range(begin, end):
            train(run[0], run[1], i + 1, skip=i)
        return run[2].report()

    through, stopped, resumed = start(), start(), start()
    go(through, 0, 4)
    go(stopped, 0, 4)
    load_what_was_saved(resumed, stopped)
    reports = go(through, 4, 9), go(resumed, 4, 9)
    assert reports[0] == reports[1] and "entered" in reports[0]
    assert_same(through[0], resumed[0], rtol=0, atol=0)
    masks = through[2].prune(), resumed[2].prune()
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_frozen_layers_are_left_alone_by_coupled_units() -> None:
    model = mixture()
    frozen = [p for name, p in model.named_parameters() if name.startswith(("0.", "1."))]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in frozen]
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    structure = STRUCTURES["filters_and_channels"](EXAMPLE)
    swd = attached(model, optimizer, structure=structure, sparsity=0.3, strength=100.0)
    train(model, optimizer)
    masks = swd.prune()
    assert all(map(torch.equal, frozen, before))
    assert masks["0.weight"].all() and not masks["3.weight"].all()


def test_accumulated_gradients_get_the_penalty_once() -> None:
    fast, slow = mlp(), mlp()
    optimizer = SGD(fast.parameters(), lr=0.1)
    attached(fast, optimizer)
    for images, labels in batches(12):
        optimizer.zero_grad()
        for part in range(2):
            (cross_entropy(fast(images[part::2]), labels[part::2]) / 2).backward()
        optimizer.step()
    train_by_autograd(slow, SGD(slow.parameters(), lr=0.1))
    assert_same(fast, slow)


def test_penalty_comes_after_clipping() -> None:
    model, plain = mlp(), mlp()
    optimizer = SGD(model.parameters(), lr=1.0)
    swd = attached(model, optimizer, strength=1e3)
    parameters = list(plain.parameters())
    for network in (model, plain):
        images, labels = batches(1)[0]
        cross_entropy(network(images), labels).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1e-3)
    slow = penalty_of(plain, strength=1e3)
    unclipped = torch.autograd.grad(slow.penalty(), parameters, allow_unused=True)
    optimizer.step()
    for parameter, other, more in zip(model.parameters(), parameters, unclipped, strict=True):
        assert other.grad is not None
        expected = other - other.grad - (0.0 if more is None else more)
        torch.testing.assert_close(parameter, expected)
    assert swd.step == 1


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = mlp()
        self.unused = nn.Linear(8, 8).double()

    def forward(self, images: Tensor) -> Tensor:
        return self.used(images)


def test_weights_without_a_gradient_are_penalised_as_by_autograd() -> None:
    fast, slow = WithUnused(), WithUnused()
    slow.load_state_dict(fast.state_dict())
    optimizer = SGD(fast.parameters(), lr=0.1, momentum=0.9)
    attached(fast, optimizer)
    train(fast, optimizer)
    train_by_autograd(slow, SGD(slow.parameters(), lr=0.1, momentum=0.9))
    assert_same(fast, slow)
    assert fast.unused.weight.grad is not None and fast.unused.bias.grad is None


def test_sparse_gradients_are_penalised_as_by_autograd() -> None:
    torch.manual_seed(0)
    fast, slow = (nn.Embedding(6, 3, sparse=sparse) for sparse in (True, False))
    slow.load_state_dict(fast.state_dict())
    optimizer, other = SGD(fast.parameters(), lr=0.1), SGD(slow.parameters(), lr=0.1)
    attached(fast, optimizer)
    fast(torch.tensor([1, 4])).sum().backward()
    (slow(torch.tensor([1, 4])).sum() + penalty_of(slow).penalty()).backward()
    optimizer.step()
    other.step()
    assert_same(fast, slow)


# Optimizers


@pytest.mark.parametrize("by_keyword", [True, False])
def test_closure_gets_the_penalty(by_keyword: bool) -> None:
    fast, slow = mlp(), mlp()
    optimizer = SGD(fast.parameters(), lr=0.1, momentum=0.9)
    swd = attached(fast, optimizer)
    for images, labels in batches(12):

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(fast(images), labels)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert isinstance(loss, Tensor)
    train_by_autograd(slow, SGD(slow.parameters(), lr=0.1, momentum=0.9))
    assert_same(fast, slow)
    assert swd.step == 12


def test_wrapped_optimizer_of_accelerate() -> None:
    fast, slow = mlp(), mlp()
    wrapped = Accelerator(cpu=True).prepare(SGD(fast.parameters(), lr=0.1))
    swd = attached(fast, wrapped)
    train(fast, wrapped)
    train_by_autograd(slow, SGD(slow.parameters(), lr=0.1))
    assert_same(fast, slow)
    assert swd.step == 12


@updates
def test_weights_of_another_optimizer_are_left_alone(update: Update) -> None:
    model = mlp()
    first, last = (module for module in model.children() if isinstance(module, nn.Linear))
    optimizer = SGD(last.parameters(), lr=0.1)
    attached(model, optimizer, update=update, strength=100.0)
    before = first.weight.detach().clone(), last.weight.detach().clone()
    optimizer.step()
    assert first.weight.grad is None
    first.weight.grad = torch.ones_like(first.weight)
    optimizer.step()
    assert torch.equal(first.weight.grad, torch.ones_like(first.weight))
    assert torch.equal(first.weight, before[0])
    assert not torch.equal(last.weight, before[1])


@updates
def test_weights_frozen_later_stay_as_they_are(update: Update) -> None:
    model = mlp()
    first, last = (module for module in model.children() if isinstance(module, nn.Linear))
    optimizer = SGD(model.parameters(), lr=0.1)
    attached(model, optimizer, update=update, strength=100.0)
    first.requires_grad_(False)
    before = first.weight.detach().clone(), last.weight.detach().clone()
    train(model, optimizer)
    assert torch.equal(first.weight, before[0])
    assert not torch.equal(last.weight, before[1])


def test_detached_penalty_does_nothing() -> None:
    model, plain = mlp(), mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    swd = attached(model, optimizer)
    swd.detach()
    train(model, optimizer)
    train(plain, SGD(plain.parameters(), lr=0.1))
    assert_same(model, plain, rtol=0, atol=0)
    assert swd.step == 0
    swd.attach(optimizer)
    optimizer.step()
    assert swd.step == 1


# The proximal update and divergence


def test_proximal_update_by_hand() -> None:
    model = four_weights()
    optimizer = SGD(model.parameters(), lr=0.5)
    swd = SelectiveWeightDecay(
        model, sparsity=0.5, steps=1, weight_decay=0.5, strength=4.0, update="proximal"
    )
    swd.attach(optimizer)
    optimizer.step()  # no gradient: the two smallest by 1 + 0.5 * 4 * 0.5
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.05, -0.4], [-0.1, 0.3]]))
    assert model.weight.grad is None
    # After this step the weights are 0.55, -0.4, -0.1, -0.2: the two smallest are others now.
    model.weight.grad = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.55, -0.4], [-0.05, -0.1]]))


def test_proximal_update_takes_the_rate_of_each_parameter_group() -> None:
    model = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    for parameter in model.parameters():
        parameter.data.fill_(6.0)
    groups = [
        {"params": module.parameters(), "lr": lr}
        for module, lr in zip(model, (1.0, 0.5), strict=True)
    ]
    optimizer = SGD(groups)
    attached(model, optimizer, sparsity=0.99, strength=4.0, weight_decay=0.5, update="proximal")
    optimizer.step()
    assert [parameter.item() for parameter in model.parameters()] == [2.0, 3.0]


def test_no_strength_makes_the_proximal_update_diverge() -> None:
    def go(update: Update) -> float:
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        attached(model, optimizer, strength=1e8, update=update)
        train(model, optimizer)
        return max(float(p.detach().abs().max()) for p in model.parameters())

    assert go("proximal") < 3.0
    assert go("gradient") > 1e20


def test_divergence_is_an_error_once_weights_overflow() -> None:
    model = mlp().float()
    optimizer = SGD(model.parameters(), lr=0.1)
    attached(model, optimizer, strength=1e30)
    with pytest.raises(NotFinite, match="lower the learning rate or the penalty"):
        for _ in range(9):
            optimizer.step()


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, 2.0),
        ({"momentum": 0.9}, 2 * (1 + 0.9)),
        ({"momentum": 0.5}, 2 * (1 + 0.5)),
        ({"momentum": 0.9, "nesterov": True}, (2 + 2 * 0.9) / (1 + 2 * 0.9)),
        ({"momentum": 0.5, "nesterov": True}, (2 + 2 * 0.5) / (1 + 2 * 0.5)),
    ],
)
def test_bounds_of_the_gradient_form(settings: dict[str, Any], bound: float) -> None:
    def size_after(product: float) -> float:  # product: lr * a * mu
        model = nn.Linear(1, 1, bias=False).double()
        model.weight.data.fill_(1.0)
        optimizer = SGD(model.parameters(), lr=0.1, **settings)
        attached(model, optimizer, sparsity=0.9, strength=product * 10, weight_decay=1.0)
        for _ in range(1000):
            optimizer.step()
            optimizer.zero_grad()
        return abs(model.weight.item())

    assert size_after(0.99 * bound) < 1e-6
    assert size_after(1.01 * bound) > 1e6


# Pruning


class Transposed(nn.Module):
    """A parameter whose memory is not in order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4).t())
        self.strided = nn.Parameter(torch.randn(6, 8)[:, ::2])
        assert not self.weight.is_contiguous() and not self.strided.is_contiguous()


def tied() -> nn.Module:
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    return nn.Sequential(first, second)


def filled(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def mixed() -> nn.Module:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return nn.ModuleList([nn.Linear(7, 5).to(dtype) for dtype in dtypes])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "bf16": lambda: cnn().bfloat16(),
    "fp16": lambda: cnn().half(),
    "mixed dtypes": mixed,
    "frozen": lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 6)),
    "tied": tied,
    "equal scores": lambda: filled(-0.5),
    "one weight": lambda: nn.Linear(1, 1),
    "one-element tensors": lambda: nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 3)),
    "empty tensor": lambda: nn.ModuleList([nn.Linear(3, 4), nn.Embedding(0, 3)]),
    "channels last": lambda: cnn().to(memory_format=torch.channels_last),
    "not contiguous": Transposed,
    "embedding": lambda: nn.Embedding(9, 4, padding_idx=None),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "recurrent": lambda: nn.LSTM(3, 4),
}
networks = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())
sparsities = pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])


@sparsities
@networks
def test_prune_removes_exactly_so_many_and_touches_nothing_else(
    build: Callable[[], nn.Module], sparsity: float
) -> None:
    torch.manual_seed(0)
    model = build()
    swd = SelectiveWeightDecay(model, sparsity=sparsity, steps=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    masks = swd.prune()
    after = model.state_dict()
    assert list(after) == list(before)
    assert [id(parameter) for parameter in model.parameters()] == identities
    prunable = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    total = sum(p.numel() for p in prunable)
    assert sum(int((p == 0).sum()) for p in prunable) == round(sparsity * total)
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * total)
    aliases = {id(p): masks[n] for n, p in model.named_parameters() if n in masks}
    names = {n: aliases.get(id(p)) for n, p in model.named_parameters(remove_duplicate=False)}
    for name, value in after.items():
        mask = names.get(name)
        expected = before[name] if mask is None else before[name].masked_fill(~mask, 0.0)
        assert torch.equal(value, expected), name


@sparsities
def test_zeros_count_as_weights_removed_first(sparsity: float) -> None:
    model = nn.Sequential(filled(0.0), nn.Linear(3, 20))
    swd = SelectiveWeightDecay(model, sparsity=sparsity, steps=1)
    masks = swd.prune()
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * 110)
    zeros = int((~masks["0.0.weight"]).sum() + (~masks["0.1.weight"]).sum())
    assert zeros == min(round(sparsity * 110), 50)


def repeated(block: Tensor, like: Tensor) -> Tensor:
    """Values that repeat `block`: no zeros, many ties."""
    full, rest = divmod(like.numel(), len(block))
    return torch.cat([block] * full + [block[:rest]]).view(like.shape)


# Above 80 million parameters, each the larger twin of another one.
GIANTS = {
    *("convnext_base", "convnext_large", "efficientnet_v2_l", "regnet_x_32gf", "regnet_y_128gf"),
    *("regnet_y_16gf", "regnet_y_32gf", "resnext101_32x8d", "resnext101_64x4d", "swin_b"),
    *("swin_v2_b", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "vit_b_32"),
    *("vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*list_models(module=torchvision.models)} - GIANTS))
def test_classifiers_of_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("kaiming_uniform_", "kaiming_normal_", "normal_", "trunc_normal_", "uniform_"):
        monkeypatch.setattr(nn.init, function, lambda tensor, *args, **kwargs: tensor)
    settings = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = get_model(name, weights=None, **settings)
    block = torch.rand(2**20, generator=torch.Generator().manual_seed(0)) + 0.1
    if sum(p.numel() for p in model.parameters()) > 1e8:  # half the memory
        model, block = model.bfloat16(), block.bfloat16()
    keys = list(model.state_dict())
    for parameter in model.parameters():
        parameter.data.copy_(repeated(block, parameter))
    masks = SelectiveWeightDecay(model, sparsity=0.95, steps=1).prune()
    assert list(model.state_dict()) == keys
    prunable = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    zeros = sum(p.numel() - int(p.count_nonzero()) for p in model.parameters())
    assert zeros == round(0.95 * prunable)
    for name, parameter in model.named_parameters():
        expected = repeated(block, parameter)
        assert torch.equal(parameter, expected * masks[name] if name in masks else expected), name


@optimizers
@updates
def test_what_is_pruned_stays_zero(make: Callable[..., Optimizer], update: Update) -> None:
    model = cnn()
    optimizer = make(model.parameters(), weight_decay=0.1)
    swd = attached(model, optimizer, update=update)
    train(model, optimizer, 4)
    masks = swd.prune()
    kept = {n: p.detach()[masks[n]].clone() for n, p in model.named_parameters() if n in masks}
    train(model, optimizer, 8, skip=4)
    for name, parameter in model.named_parameters():
        if name in masks:
            assert (parameter[~masks[name]] == 0).all()
            assert (parameter[masks[name]] != kept[name]).all()
    assert swd.step == 8


def test_after_pruning_the_penalty_rests() -> None:
    model = four_weights()
    optimizer = SGD(model.parameters(), lr=1.0)
    swd = attached(model, optimizer, sparsity=0.5, strength=1e3)
    swd.prune()
    optimizer.step()
    assert model.weight.grad is None
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.0, -0.4], [0.0, 0.3]]))


def test_prune_cuts_to_the_final_sparsity() -> None:
    model = four_weights()
    swd = SelectiveWeightDecay(model, sparsity=Linear(0.0, 0.75), steps=100)
    assert swd.sparsity == 0.0
    assert int((swd.prune()["weight"] == 0).sum()) == 3


def test_largest_removed_is_no_larger_than_smallest_kept() -> None:
    model = cnn()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = SelectiveWeightDecay(model, sparsity=0.6, steps=1).prune()
    removed = torch.cat([before[name][~mask].abs() for name, mask in masks.items()])
    kept = torch.cat([before[name][mask].abs() for name, mask in masks.items()])
    assert 0 < removed.max() <= kept.min()


# What a run reports and resumes from


def test_progress_and_schedules() -> None:
    swd = SelectiveWeightDecay(
        four_weights(), sparsity=Linear(0.0, 0.8), steps=4, strength=Exponential(0.1, 1e5)
    )
    seen = []
    for _ in range(6):
        seen.append((swd.progress, {name: swd.report()[name] for name in ("strength", "target")}))
        swd.advance()
    assert [progress for progress, _ in seen] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert seen[0][1] == {"strength": 0.1, "target": 0.0}
    assert seen[2][1] == {"strength": pytest.approx(100.0), "target": pytest.approx(0.4)}
    assert seen[4][1] == seen[5][1] == {"strength": 1e5, "target": 0.8}


@updates
@pytest.mark.parametrize("prune_after", [2, 5, None])
def test_a_resumed_run_continues_bit_for_bit(update: Update, prune_after: int | None) -> None:
    def start() -> tuple[nn.Module, Optimizer, SelectiveWeightDecay]:
        model = cnn()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        return model, optimizer, attached(model, optimizer, update=update)

    def go(parts: tuple[nn.Module, Optimizer, SelectiveWeightDecay], begin: int, end: int) -> None:
        for i in range(begin, end):
            train(parts[0], parts[1], i + 1, skip=i)
            if i == prune_after:
                parts[2].prune()

    through, stopped, resumed = start(), start(), start()
    go(through, 0, 9)
    go(stopped, 0, 4)
    load_what_was_saved(resumed, stopped)
    go(resumed, 4, 9)
    assert_same(through[0], resumed[0], rtol=0, atol=0)
    assert resumed[2].step == through[2].step == 9
    assert resumed[2].masks.keys() == through[2].masks.keys()


def test_loaded_masks_are_a_copy() -> None:
    swd, other = penalty_of(four_weights()), penalty_of(four_weights())
    swd.prune()
    other.load_state_dict(swd.state_dict())
    swd.masks["weight"].fill_(True)
    assert other.masks["weight"].sum() == 1


GOOD = torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"lr": 1}, "keys step, masks, units, reported, not .*'lr'"),
        ({"reported": [GOOD[0]]}, "units must have shapes"),
        ({"step": -1, "masks": {}}, "step must be .* not -1"),
        ({"step": 1.5, "masks": {}}, "step must be .* not 1.5"),
        ({"step": "1", "masks": {}}, "step must be .* not '1'"),
        ({"step": 1, "masks": {"0.weight": GOOD}}, r"not of \['0.weight'\]"),
        ({"step": 1, "masks": {"0.weight": GOOD, "9.weight": GOOD}}, r"'9.weight'"),
        ({"step": 1, "masks": {"0.weight": GOOD, "1.weight": GOOD[0]}}, r"'1.weight' must be bool"),
        ({"step": 1, "masks": {"0.weight": GOOD, "1.weight": GOOD.float()}}, "torch.float32"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    state: dict[str, Any], words: str
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    swd = penalty_of(model)
    swd.advance()
    masks = swd.prune()
    with pytest.raises(ValueError, match=words):
        swd.load_state_dict({"step": 1, "masks": {}, "units": [], "reported": [], **state})
    with pytest.raises(ValueError, match="keys step, masks, units, reported, not"):
        swd.load_state_dict({})
    assert swd.step == 1 and swd.masks is masks


# What is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    for update in ("gradient", "proximal"):
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1)
        swd = attached(model, optimizer, update=update)
        model.get_parameter("3.weight").data[1, 2] = bad
        with pytest.raises(ValueError, match=r"^3\.weight holds NaN or infinite"):
            optimizer.step()
        with pytest.raises(ValueError, match=r"^3\.weight holds NaN or infinite"):
            swd.prune()
        with pytest.raises(ValueError, match=r"^3\.weight holds NaN or infinite"):
            swd.penalty()
        assert swd.masks == {} and swd.step == 0


ZERO_TO_ONE = r"sparsity .* must be in \[0, 1\), not "


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *[({"sparsity": s}, ZERO_TO_ONE) for s in (math.nan, 1.0, -0.1, 95, math.inf, "0.9", None)],
        ({"sparsity": Linear(0.0, 1.0)}, ZERO_TO_ONE + "1.0"),
        ({"sparsity": lambda progress: "0.9"}, ZERO_TO_ONE + "'0.9'"),
        *[({"strength": a}, "strength must be") for a in (-1.0, math.nan, math.inf, "1", None)],
        ({"strength": Linear(1.0, -1.0)}, r"strength must be .* 0 or more, not -1.0"),
        ({"strength": Constant(-2.0)}, r"strength must be .* not -2.0"),
        *[
            ({"steps": n}, f"steps must be .* at least 1, not {n!r}")
            for n in (0, -3, 2.0, True, "9")
        ],
        *[
            ({"weight_decay": w}, "weight_decay must be .* 0 or")
            for w in (-1e-4, math.nan, "0", None)
        ],
        *[
            ({"update": u}, r"update must be one of .*'gradient', 'proximal'")
            for u in ("sgd", None)
        ],
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        SelectiveWeightDecay(mlp(), **{"sparsity": 0.5, "steps": 1, **settings})
    (value,) = settings.values()
    assert callable(value) or str(error.value).count(repr(value)) >= 1


@pytest.mark.parametrize("model", ["resnet20", None, [nn.Linear(2, 2)], nn.Linear])
def test_what_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not "):
        SelectiveWeightDecay(model, sparsity=0.5, steps=1)


@pytest.mark.parametrize(
    "model", [nn.Identity(), nn.BatchNorm2d(3), nn.Linear(2, 2).requires_grad_(False)]
)
def test_a_model_with_nothing_to_prune_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"nothing that structure 'weights' can prune: .*requires"):
        SelectiveWeightDecay(model, sparsity=0.5, steps=1)


def test_an_optimizer_of_another_model_is_refused() -> None:
    swd = penalty_of(mlp())
    with pytest.raises(ValueError, match=r"SGD has none of the 2 .* model\.parameters\(\)"):
        swd.attach(SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, not 'sgd'"):
        swd.attach("sgd")  # type: ignore[arg-type]


def test_attaching_twice_is_refused() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    swd = attached(model, optimizer)
    for other in (optimizer, SGD(model.parameters(), lr=0.1)):
        with pytest.raises(ValueError, match=r"attached already to an optimizer of the same"):
            swd.attach(other)
    optimizer.step()
    assert swd.step == 1


def test_default_is_the_published_set_up() -> None:
    swd = SelectiveWeightDecay(four_weights(), sparsity=0.5, steps=2)
    assert swd.weight_decay == 5e-4 and swd.update == "gradient"
    assert [group.name for group in swd.groups] == [group.name for group in weights(swd.model)]
    assert swd.strength == 0.1
    swd.step = 2
    assert swd.strength == 1e5


def hostile_model(dtype: torch.dtype) -> nn.Module:
    """Many equal weights, zeros, and memory that is not in the order of the indices."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(3, 5)).to(dtype)
    for parameter in model.parameters():
        parameter.data = torch.randint(-4, 5, parameter.shape).to(dtype) / 4
    return model.to(memory_format=torch.channels_last)


@updates
@pytest.mark.parametrize("sparsity", [0.0, 0.004, 0.3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_needs_no_mask_is_what_masks_choose(
    dtype: torch.dtype, sparsity: float, update: Update
) -> None:
    def ranked_by_a_function(parameter: Tensor) -> Tensor:
        return parameter.detach().abs()

    results = []
    for criterion in (magnitude, ranked_by_a_function):
        model = hostile_model(dtype)
        optimizer = SGD(model.parameters(), lr=0.1)
        settings = {"sparsity": sparsity, "update": update, "criterion": criterion}
        attached(model, optimizer, strength=300.0, **settings)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.25)
            optimizer.step()
        results.append([*model.parameters()])
    assert all(map(torch.equal, *results))


# Selected every few steps


def row_of_four() -> nn.Linear:
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    return model


@torch.no_grad()
def test_what_is_chosen_rarely_is_penalised_until_the_next_choice() -> None:
    model = row_of_four()
    penalty = SelectiveWeightDecay(
        model, every=2, sparsity=0.5, steps=4, weight_decay=0.1, strength=1.0, update="proximal"
    )
    optimizer = SGD(model.parameters(), lr=10.0)
    penalty.attach(optimizer)
    model.weight.grad = torch.zeros(1, 4)
    optimizer.step()
    assert model.weight.tolist() == [[0.5, 1.0, 3.0, 4.0]]
    model.weight.copy_(torch.tensor([[8.0, 6.0, 1.0, 3.0]]))
    optimizer.step()  # the same two, which are now the largest
    assert model.weight.tolist() == [[4.0, 3.0, 1.0, 3.0]]
    optimizer.step()  # selected again; of ties the first
    assert model.weight.tolist() == [[4.0, 1.5, 0.5, 3.0]]


def test_a_rare_choice_survives_a_stop_and_what_does_not_fit_is_refused() -> None:
    model = nn.Linear(4, 2, bias=False)
    settings: dict[str, Any] = {"every": 5, "sparsity": 0.5, "steps": 10}
    penalty = SelectiveWeightDecay(model, **settings)
    chosen = penalty.report()["selected"]
    penalty.advance()
    with torch.no_grad():
        model.weight.neg_().add_(1.0)
    resumed = SelectiveWeightDecay(model, **settings)
    resumed.load_state_dict(penalty.state_dict())
    assert resumed.step == 1 and resumed.report()["left"] == 0
    assert resumed.report()["selected"] == chosen == 4
    with pytest.raises(ValueError, match="units must have shapes"):
        resumed.load_state_dict({**penalty.state_dict(), "units": [torch.ones(3).bool()]})
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, not 0"):
        SelectiveWeightDecay(model, **{**settings, "every": 0})
