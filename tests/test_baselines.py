"""What the baselines attach to an optimizer: hand-computed steps, exactness, state."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW

from swdlib.baselines import BatchNormL1, DenseFeedback, GradualPruning
from swdlib.criteria import Random
from swdlib.hooks import SelectingMethod
from swdlib.masks import select, sparsity_of
from swdlib.schedules import Cubic, Linear
from swdlib.structures import filters, kernels, weights
from swdlib.swd import SelectiveWeightDecay

EXAMPLE = torch.zeros(1, 1, 4, 4)


def four_weights() -> nn.Linear:
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    return layer


def normed() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = torch.randn(8, 1, 4, 4, generator=generator)
        labels = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def after_each_step(pruner: SelectingMethod, gradient: list[float]) -> list[list[float]]:
    """The four weights after each of four steps of plain SGD at a constant gradient."""
    optimizer = SGD(pruner.model.parameters(), lr=1.0)
    pruner.attach(optimizer)
    [parameter] = pruner.model.parameters()
    found = []
    for _ in range(4):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        found.append(parameter[0].tolist())
    return found


def test_dense_feedback_by_hand() -> None:
    # The dense weights are 5 5 3 4, 9 8 3 4 and so on; the two lowest are masked between steps.
    pruner = DenseFeedback(four_weights(), sparsity=0.5, steps=4, every=1)
    assert after_each_step(pruner, [-4.0, -3.0, 0.0, 0.0]) == [
        [5, 5, 0, 0],
        [9, 8, 0, 0],
        [13, 11, 0, 0],
        [17, 14, 0, 0],
    ]
    assert pruner.dense["weight"].tolist() == [[17, 14, 3, 4]]
    assert pruner.masks["weight"].tolist() == [[True, True, False, False]]


def test_dense_feedback_holds_its_masks_between_choices() -> None:
    pruner = DenseFeedback(four_weights(), sparsity=0.5, steps=4, every=2)
    assert after_each_step(pruner, [-4.0, -3.0, 0.0, 0.0]) == [
        [5, 5, 3, 4],
        [9, 8, 0, 0],
        [13, 11, 0, 0],
        [17, 14, 0, 0],
    ]


def test_gradients_of_dense_feedback_are_those_of_the_pruned_network() -> None:
    model = four_weights()
    pruner = DenseFeedback(model, sparsity=0.5, steps=2, every=1)
    optimizer = SGD(model.parameters(), lr=0.25)
    pruner.attach(optimizer)

    def step() -> None:
        def loss() -> Tensor:
            optimizer.zero_grad()
            found = model(torch.ones(1, 4)).square().sum()
            found.backward()
            return found

        optimizer.step(loss)

    step()  # the output is 10, each gradient 20: the dense weights become -4 -3 -2 -1
    assert model.weight.tolist() == [[-4, -3, 0, 0]]
    step()  # the output is -7, each gradient -14
    assert pruner.dense["weight"].tolist() == [[-0.5, 0.5, 1.5, 2.5]]


def test_state_of_dense_feedback_with_other_weights_is_refused() -> None:
    pruner = DenseFeedback(four_weights(), sparsity=0.5, steps=4)
    state = {**pruner.state_dict(), "dense": {"weight": torch.zeros(2, 2)}}
    with pytest.raises(ValueError, match=r"dense weights must be of \['weight'\]"):
        pruner.load_state_dict(state)


def test_gradual_pruning_by_hand() -> None:
    rising = Linear(0.0, 0.5)  # a quarter of the weights after two steps, half after four
    pruner = GradualPruning(four_weights(), sparsity=rising, steps=4, every=2)
    assert after_each_step(pruner, [-1.0] * 4) == [
        [2, 3, 4, 5],
        [0, 4, 5, 6],
        [0, 5, 6, 7],
        [0, 0, 7, 8],
    ]
    assert pruner.masks["weight"].tolist() == [[False, False, True, True]]
    assert pruner.report() == {
        "target": 0.5,
        "selected": 2,
        "norm_selected": 0.0,
        "norm_kept": pytest.approx((7**2 + 8**2) ** 0.5),
        "kept_weights": 2,
        "kept_parameters": 2,
    }


def test_what_hard_pruning_cuts_does_not_return_however_large_its_gradient() -> None:
    model = four_weights()
    pruner = GradualPruning(model, sparsity=Linear(0.0, 0.5), steps=4, every=1)
    optimizer = SGD(model.parameters(), lr=1.0, momentum=0.9)
    pruner.attach(optimizer)
    for step in range(1, 9):
        model.weight.grad = torch.tensor([[-1e3, 0.0, 0.0, 0.0]] if step > 2 else [[0.0] * 4])
        optimizer.step()
        assert step < 2 or not pruner.masks["weight"][0, 0]
    assert model.weight.tolist() == [[0, 0, 3, 4]]


def test_what_soft_pruning_cuts_may_return() -> None:
    rising = Linear(0.0, 0.5)
    pruner = GradualPruning(four_weights(), sparsity=rising, steps=4, every=2, soft=True)
    assert after_each_step(pruner, [-10.0, -1.0, -1.0, 0.0]) == [
        [11, 3, 4, 4],
        [21, 0, 5, 4],
        [31, 1, 6, 4],
        [41, 0, 7, 0],
    ]


def test_between_two_cuts_soft_pruning_holds_nothing() -> None:
    pruner = GradualPruning(four_weights(), sparsity=0.5, steps=4, every=2, soft=True)
    optimizer = SGD(pruner.model.parameters(), lr=0.0)
    pruner.attach(optimizer)
    held = []
    for _ in range(4):
        pruner.model(torch.ones(4)).backward()
        optimizer.step()
        held.append(sparsity_of(pruner.masks))
    assert held == [0.0, 0.5, 0.0, 0.5]


def test_a_filter_that_was_softly_cut_returns_through_its_batch_norm() -> None:
    model = normed()
    nn.init.ones_(model[4].bias)  # so that ReLU lets gradients pass
    options: dict[str, Any] = {"steps": 20, "every": 5, "structure": filters(EXAMPLE)}
    pruner = GradualPruning(model, sparsity=0.5, soft=True, **options)
    optimizer = SGD(model.parameters(), lr=0.1)  # without momentum, which alone would move them
    pruner.attach(optimizer)
    train(model, optimizer, 5)
    gone = (model[3].weight == 0).flatten(1).all(1)
    assert 0 < gone.sum() < 4
    assert (model[4].weight != 0).all()
    train(model, optimizer, 1)
    assert not (model[3].weight == 0).flatten(1).all(1).any()


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_momentum_and_decay_revive_nothing(make: Any) -> None:
    model = normed()
    options = {"momentum": 0.9} if make is SGD else {}
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    pruner = GradualPruning(model, sparsity=Cubic(0.0, 0.9, 0.2, 0.7), steps=20, every=3)
    pruner.attach(optimizer)
    gone: dict[str, Tensor] = {}
    for _ in range(20):
        train(model, optimizer, 1, seed=pruner.step)
        parameters = dict(model.named_parameters())
        assert all((parameters[name][~mask] == 0).all() for name, mask in pruner.masks.items())
        for name, cut in gone.items():  # the masks are nested
            assert not (pruner.masks[name] & cut).any()
        gone = {name: ~mask for name, mask in pruner.masks.items()}
    total = 54 + 216 + 48
    assert sum(int(cut.sum()) for cut in gone.values()) == round(0.9 * total)


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 12),
    every=st.integers(1, 15),
    sparsity=st.floats(0.0, 0.99),
    soft=st.booleans(),
)
def test_the_target_is_reached_at_the_last_step_whatever_the_interval(
    steps: int, every: int, sparsity: float, soft: bool
) -> None:
    model = nn.Linear(9, 7)
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = GradualPruning(
        model, sparsity=Linear(0.0, sparsity), steps=steps, every=every, soft=soft
    )
    pruner.attach(optimizer)
    for _ in range(steps):
        model(torch.ones(2, 9)).sum().backward()
        optimizer.step()
    assert int((~pruner.masks["weight"]).sum()) == round(sparsity * 63)
    assert int((model.weight == 0).sum()) == round(sparsity * 63)


def test_structure_and_criterion_are_those_given() -> None:
    model = normed()
    pruner = GradualPruning(model, sparsity=0.5, steps=1, structure=kernels, criterion=Random(3))
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    train(model, optimizer, 1)
    expected = select(kernels(model), 0.5, Random(3))  # whatever the weights have become
    assert pruner.masks.keys() == expected.keys()
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("soft", [False, True])
def test_a_run_goes_on_from_a_state_as_if_it_had_not_stopped(soft: bool) -> None:
    options: dict[str, Any] = {"sparsity": Cubic(0.0, 0.8), "steps": 12, "every": 5, "soft": soft}
    model, twin = normed(), normed()
    optimizer, other = (SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin))
    first, second = GradualPruning(model, **options), GradualPruning(twin, **options)
    first.attach(optimizer)
    second.attach(other)
    train(model, optimizer, 7)
    for old, new in ((first, second), (model, twin), (optimizer, other)):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 5, seed=1)
    assert first.step == second.step == 12
    for mine, others in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, others)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"lr": 1}, "keys step, masks, units, reported, not .*'lr'"),
        ({"units": [torch.ones(3, dtype=torch.bool)]}, "units must have shapes"),
        ({"reported": [torch.ones(4)]}, "units must have shapes"),
        ({"step": -1, "masks": {}}, "step must be a whole number of 0 or more, not -1"),
        ({"step": 1.5, "masks": {}}, "not 1.5"),
        (
            {"step": 1, "masks": {"x": torch.ones(1)}},
            r"masks must be of \[\'weight\'\], not of \[\'x\'\]",
        ),
        ({"step": 1, "masks": {"weight": torch.ones(1, 4)}}, "must be bool of shape"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, Any], message: str) -> None:
    pruner = GradualPruning(four_weights(), sparsity=0.5, steps=4)
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict({"step": 1, "masks": {}, "units": [], "reported": [], **state})
    assert pruner.state_dict() == {"step": 0, "masks": {}, "units": [], "reported": []}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"steps": True}, "steps must be a whole number of at least 1, not True"),
        ({"every": 0}, "every must be a whole number of at least 1, not 0"),
        ({"every": 2.0}, "every must be a whole number of at least 1, not 2.0"),
        ({"sparsity": 1.0}, r"must be in \[0, 1\), not 1.0"),
        ({"sparsity": Linear(0.0, 1.5)}, r"must be in \[0, 1\), not 1.5"),
        ({"structure": kernels}, "nothing that structure 'kernels' can prune"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualPruning(four_weights(), **{"sparsity": 0.5, "steps": 4, **options})


def test_it_joins_the_right_optimizer_once() -> None:
    model = four_weights()
    pruner = GradualPruning(model, sparsity=0.5, steps=1)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, not 'sgd'"):
        pruner.attach("sgd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the SGD has none of the 1 parameters of Linear"):
        pruner.attach(SGD(four_weights().parameters(), lr=0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    with pytest.raises(ValueError, match="attached already"):
        pruner.attach(optimizer)
    pruner.detach()
    model(torch.ones(4)).backward()
    optimizer.step()
    assert pruner.step == 0
    pruner.attach(optimizer)
    optimizer.step()
    assert pruner.step == 1


def test_a_step_that_overflows_is_no_step() -> None:
    model = four_weights()
    pruner = GradualPruning(model, sparsity=0.5, steps=4, every=1)
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    scaler = GradScaler("cpu")
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * model(torch.ones(4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert pruner.step == 1


def test_l1_on_scales_by_hand() -> None:
    model: Any = nn.Sequential(nn.Linear(1, 3, bias=False), nn.BatchNorm1d(3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.0]))
    penalty = BatchNormL1(model, l1=0.5, structure=_scales)
    optimizer = SGD(model.parameters(), lr=1.0)
    penalty.attach(optimizer)
    assert penalty.report() == {"mean_scale": 1.0}
    before = model[0].weight.clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model[1].weight.tolist() == [0.5, -1.5, 0.0]
    assert torch.equal(model[0].weight, before)
    assert model[1].bias.tolist() == [0, 0, 0]
    assert penalty.masks == {}
    penalty.load_state_dict(penalty.state_dict())
    with pytest.raises(ValueError, match=r"is empty, not of \['step'\]"):
        penalty.load_state_dict({"step": 1})


def _scales(model: nn.Module) -> list[Any]:
    """A structure of single scales."""
    from swdlib.structures import Group

    named = dict(model.named_parameters())
    return [Group(n, p) for n, p in named.items() if n in ("1.weight", "4.weight")]


def with_l1_in_the_loss(model: Any, l1: float, steps: int) -> dict[str, Tensor]:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randn(8, 1, 4, 4, generator=generator)
        labels = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        sizes = sum(layer.weight.abs().sum() for layer in (model[1], model[4]))
        (nn.functional.cross_entropy(model(images), labels) + l1 * sizes).backward()
        optimizer.step()
    return model.state_dict()


def test_l1_is_what_autograd_makes_of_the_term() -> None:
    model = normed()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    BatchNormL1(model, l1=0.02, structure=filters(EXAMPLE)).attach(optimizer)
    train(model, optimizer, 6)
    for name, value in with_l1_in_the_loss(normed(), 0.02, 6).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_l1_acts_on_unscaled_gradients() -> None:
    models = [normed(), normed()]
    for model, scaler in zip(models, (None, GradScaler("cpu", init_scale=1024.0)), strict=True):
        optimizer = SGD(model.parameters(), lr=0.1)
        BatchNormL1(model, l1=0.1, structure=filters(EXAMPLE)).attach(optimizer)
        loss = model(torch.ones(2, 1, 4, 4)).square().sum()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


def test_l1_refuses_a_fused_optimizer_that_unscales_gradients_itself() -> None:
    model = normed()
    optimizer = SGD(model.parameters(), lr=0.1, fused=True)
    BatchNormL1(model, structure=filters(EXAMPLE)).attach(optimizer)
    scaler = GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 1, 4, 4)).sum()).backward()
    with pytest.raises(ValueError, match="gradients are still scaled"):
        scaler.step(optimizer)


def test_l1_leaves_the_scales_of_other_optimizers_alone() -> None:
    model = normed()
    mine = SGD(model[:3].parameters(), lr=0.0)
    BatchNormL1(model, l1=0.5, structure=filters(EXAMPLE)).attach(mine)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    mine.step()
    assert model[1].weight.grad.tolist() == [0.5] * 6
    assert model[4].weight.grad.tolist() == [0.0] * 4


@pytest.mark.parametrize("l1", [-1e-4, float("nan"), "strong"])
def test_an_impossible_l1_is_refused(l1: Any) -> None:
    with pytest.raises(ValueError, match=f"l1 must be a finite number of 0 or more, not {l1!r}"):
        BatchNormL1(normed(), l1=l1, structure=filters(EXAMPLE))


def test_a_network_without_scales_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ValueError, match="Sequential has no trainable batch-norm scales"):
        BatchNormL1(model, structure=filters(EXAMPLE))


def test_a_structure_without_scales_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="use a structure whose units have scales"):
        BatchNormL1(normed(), structure=weights)


@pytest.mark.parametrize("make", [GradualPruning, SelectiveWeightDecay])
def test_units_of_a_checkpoint_go_to_the_device_of_the_model(make: Any) -> None:
    model = nn.Linear(4, 4)
    first, second = (make(model, sparsity=0.5, steps=4, every=2) for _ in range(2))
    optimizer = SGD(model.parameters(), lr=0.1)
    first.attach(optimizer)
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    state = first.state_dict()
    model.to("meta")  # stands for a GPU: the state is elsewhere
    for group in second.groups:
        object.__setattr__(group, "parameter", model.weight)
    second.load_state_dict({**state, "masks": {}})
    [units] = second.units
    assert units.device.type == "meta"
