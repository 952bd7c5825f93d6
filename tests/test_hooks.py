"""SWD in training code that knows nothing of it: each loop reaches the sparsity exactly.

Wherever arithmetic allows, the loop also ends at the weights of a plain one (`plain`), which is
held against the penalty through autograd.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, SparseAdam
from torch.utils.data import DataLoader, TensorDataset

from swdlib.baselines import GradualPruning
from swdlib.hooks import after_backward, fitted_units, movement, norms
from swdlib.masks import parameters_of, removed_weights
from swdlib.schedules import Exponential
from swdlib.structures import Group, kernels
from swdlib.swd import SelectiveWeightDecay, Update

STEPS = 8
SPARSITY = 0.9
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adam": partial(Adam, lr=0.01),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
}
sgd = OPTIMIZERS["sgd"]
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
updates = pytest.mark.parametrize("update", ["gradient", "proximal"])
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The loops here are too short for a neutral cut, which is not what they are about.
    pytest.mark.filterwarnings("ignore::swdlib.swd.NotNeutral"),
]

Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def new_accelerate() -> Iterator[None]:
    """accelerate, and with it Hugging Face's Trainer, keeps its settings for a whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def batches(count: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator))
        for _ in range(count)
    ]


def dataset() -> TensorDataset:
    inputs, labels = zip(*batches(), strict=True)
    return TensorDataset(torch.cat(inputs), torch.cat(labels))


def penalty_of(model: nn.Module, **settings: Any) -> SelectiveWeightDecay:
    # So strong at the end that its part in a step is far above rounding, and still stable.
    settings = {"sparsity": SPARSITY, "steps": STEPS, "strength": Exponential(1, 4e3), **settings}
    return SelectiveWeightDecay(model, **settings)


def attached(model: nn.Module, optimizer: Any, **settings: Any) -> SelectiveWeightDecay:
    swd = penalty_of(model, **settings)
    swd.attach(optimizer)
    return swd


def plain(
    make: Callable[..., Optimizer] = sgd,
    data: list[Batch] | None = None,
    clip: float | None = None,
    autocast: Any = None,
    **settings: Any,
) -> nn.Module:
    """Train a network in a plain loop and prune it."""
    model = network()
    optimizer = make(model.parameters())
    swd = attached(model, optimizer, **settings)
    for inputs, labels in data or batches():
        optimizer.zero_grad()
        with autocast or nullcontext():
            loss = cross_entropy(model(inputs), labels)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    swd.prune()
    return model


def by_autograd(make: Callable[..., Optimizer] = sgd, autocast: Any = None) -> nn.Module:
    """The same with the penalty in the loss."""
    model = network()
    optimizer = make(model.parameters())
    swd = penalty_of(model)
    for inputs, labels in batches():
        optimizer.zero_grad()
        with autocast or nullcontext():
            loss = cross_entropy(model(inputs), labels)
        (loss + swd.penalty()).backward()
        optimizer.step()
        swd.advance()
    swd.prune()
    return model


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.ndim >= 2)


def assert_exact(model: nn.Module, sparsity: float = SPARSITY) -> None:
    total = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert zeros(model) == round(sparsity * total)


def assert_same(one: nn.Module, other: nn.Module, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(
        dict(one.named_parameters()), dict(other.named_parameters()), rtol=rtol, atol=atol
    )


def distance(one: nn.Module, other: nn.Module) -> float:
    """Relative, over prunable weights: in half precision, one near the edge of w* may flip."""

    def vector(model: nn.Module) -> Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim >= 2])

    return float((vector(one) - vector(other)).norm() / vector(other).norm())


# Plain PyTorch


@optimizers
def test_plain_loop_equals_autograd(make: Callable[..., Optimizer]) -> None:
    model = plain(make)
    assert_exact(model)
    assert_same(model, by_autograd(make), rtol=1e-4, atol=1e-6)
    weak = plain(make, strength=0.0)
    pairs = zip(model.parameters(), weak.parameters(), strict=True)
    assert max(float((p - q).detach().abs().max()) for p, q in pairs) > 1e-3


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}])
@optimizers
@updates
def test_fused_and_foreach_equal_one_tensor_at_a_time(
    make: Callable[..., Optimizer], kind: dict[str, bool], update: Update
) -> None:
    model = plain(partial(make, **kind), update=update)
    assert_exact(model)
    assert_same(model, plain(partial(make, foreach=False), update=update), rtol=1e-4, atol=1e-6)


def test_bf16_autocast_equals_autograd() -> None:
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    model = plain(autocast=autocast)
    assert_exact(model)
    assert_same(model, by_autograd(autocast=autocast), rtol=1e-3, atol=1e-4)


def test_accumulation_and_clipping_come_first() -> None:
    fast, slow = network(), network()
    optimizer, other = sgd(fast.parameters()), sgd(slow.parameters())
    swd, term = attached(fast, optimizer), penalty_of(slow)
    for inputs, labels in batches():
        for model in (fast, slow):
            model.zero_grad()
            for part in range(2):
                (cross_entropy(model(inputs[part::2]), labels[part::2]) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        term.penalty().backward()  # once, on top of what was clipped
        term.advance()
        optimizer.step()
        other.step()
    assert swd.step == STEPS
    swd.prune()
    term.prune()
    assert_exact(fast)
    assert_same(fast, slow)


def test_parameter_groups_keep_their_settings() -> None:
    def grouped(model: nn.Module) -> Optimizer:
        first, last = linears(model)
        groups = [
            {"params": first.parameters(), "lr": 0.05, "weight_decay": 0.0},
            {"params": [last.weight], "momentum": 0.5},
            {"params": [last.bias]},
        ]
        return sgd(groups)

    fast, slow = network(), network()
    optimizer, other = grouped(fast), grouped(slow)
    swd, term = attached(fast, optimizer), penalty_of(slow)
    for inputs, labels in batches():
        for model in (fast, slow):
            model.zero_grad()
            cross_entropy(model(inputs), labels).backward()
        term.penalty().backward()
        term.advance()
        optimizer.step()
        other.step()
    swd.prune()
    term.prune()
    assert_exact(fast)
    assert_same(fast, slow)


@updates
def test_a_group_added_later_is_penalised(update: Update) -> None:
    model = network()
    first, last = linears(model)
    optimizer = SGD(last.parameters(), lr=0.1)
    attached(model, optimizer, update=update, strength=100.0)
    before = first.weight.detach().clone()
    optimizer.step()
    assert torch.equal(first.weight, before)
    optimizer.add_param_group({"params": list(first.parameters())})
    optimizer.step()
    assert not torch.equal(first.weight, before)


def test_two_optimizers_take_a_penalty_each() -> None:
    model = network()
    first, last = linears(model)
    steps = [sgd(first.parameters()), AdamW(last.parameters(), lr=0.01)]
    penalties = [attached(model, optimizer) for optimizer in steps]
    for inputs, labels in batches():
        model.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        for optimizer in steps:
            optimizer.step()
    masks, same = (swd.prune() for swd in penalties)
    assert all(torch.equal(masks[name], same[name]) for name in masks)
    for optimizer in steps:
        optimizer.step()
    assert_exact(model)


@pytest.mark.slow
def test_compiled_model_and_step_equal_eager_ones() -> None:
    # What torch generates is torch's to test, and takes a minute; that SWD can be traced is ours.
    compile = partial(torch.compile, backend="aot_eager")
    model = network()
    compiled = compile(model)
    optimizer = sgd(model.parameters())
    swd = attached(model, optimizer)
    step = compile(optimizer.step)
    for inputs, labels in batches():
        optimizer.zero_grad()
        cross_entropy(compiled(inputs), labels).backward()
        step()
    assert swd.step == STEPS
    swd.prune()
    assert_exact(model)
    assert_same(model, plain(), rtol=1e-4, atol=1e-6)


# GradScaler


def scaled(
    make: Callable[..., Optimizer] = sgd,
    unscale: bool = False,
    overflow: int | None = None,
    autocast: Any = None,
    **settings: Any,
) -> tuple[nn.Module, SelectiveWeightDecay]:
    """Train and prune with gradients scaled by 2**10; at step `overflow` they are infinite."""
    model = network()
    optimizer = make(model.parameters())
    scaler = GradScaler("cpu", init_scale=2.0**10)
    swd = attached(model, optimizer, **settings)
    for step, (inputs, labels) in enumerate(batches()):
        optimizer.zero_grad()
        with autocast or nullcontext():
            loss = cross_entropy(model(inputs), labels)
        scaler.scale(loss * (torch.inf if step == overflow else 1)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        before, done = [p.detach().clone() for p in model.parameters()], swd.step
        scaler.step(optimizer)
        scaler.update()
        moved = not all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        assert moved == (step != overflow) == (swd.step == done + 1)
    swd.prune()
    return model, swd


def without(step: int) -> list[Batch]:
    data = batches()
    return data[:step] + data[step + 1 :]


@pytest.mark.parametrize("unscale", [False, True])
@optimizers
@updates
def test_grad_scaler_changes_nothing(
    make: Callable[..., Optimizer], unscale: bool, update: Update
) -> None:
    model, swd = scaled(make, unscale, update=update)
    assert swd.step == STEPS
    assert_exact(model)
    assert_same(model, plain(make, update=update), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unscale", [False, True])
@optimizers
@updates
def test_a_step_skipped_for_an_overflow_does_not_count(
    make: Callable[..., Optimizer], unscale: bool, update: Update
) -> None:
    model, swd = scaled(make, unscale, overflow=3, update=update)
    assert swd.step == STEPS - 1
    assert_exact(model)
    assert_same(model, plain(make, without(3), update=update), rtol=1e-4, atol=1e-6)


def test_fp16_autocast_with_a_grad_scaler() -> None:
    autocast = torch.autocast("cpu", dtype=torch.float16)
    model, swd = scaled(overflow=3, autocast=autocast)
    assert swd.step == STEPS - 1
    assert_exact(model)
    other = plain(data=without(3), autocast=autocast)  # which loses tiny gradients
    assert distance(model, other) < 0.1


@pytest.mark.parametrize("overflow", [None, 3])
@optimizers
@updates
def test_fused_optimizer_with_a_grad_scaler_works_once_unscaled(
    make: Callable[..., Optimizer], overflow: int | None, update: Update
) -> None:
    model, _ = scaled(partial(make, fused=True), True, overflow, update=update)
    data = batches() if overflow is None else without(overflow)
    assert_exact(model)
    assert_same(model, plain(make, data, update=update), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("overflow", [None, 3])
def test_fused_optimizer_that_unscales_by_itself_takes_the_proximal_update(
    overflow: int | None,
) -> None:
    model, _ = scaled(partial(sgd, fused=True), False, overflow, update="proximal")
    data = batches() if overflow is None else without(overflow)
    assert_exact(model)
    assert_same(model, plain(data=data, update="proximal"), rtol=1e-4, atol=1e-6)


@optimizers
def test_fused_optimizer_that_unscales_by_itself_is_refused(make: Callable[..., Optimizer]) -> None:
    words = r"a fused \w+ .*scaler\.unscale_\(optimizer\) .*fused=False"
    with pytest.raises(ValueError, match=words):
        scaled(partial(make, fused=True))


# accelerate, Lightning, Hugging Face


def test_accelerate_accumulates_and_clips() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    wrapped, optimizer = accelerator.prepare(model, sgd(model.parameters()))
    swd = attached(model, optimizer)
    for inputs, labels in batches():
        for part in range(2):
            with accelerator.accumulate(wrapped):
                accelerator.backward(cross_entropy(wrapped(inputs[part::2]), labels[part::2]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    assert swd.step == STEPS
    swd.prune()
    assert_exact(model)
    assert_same(model, plain(clip=0.1))


def test_accelerate_with_a_grad_scaler() -> None:
    model = network()
    Accelerator(cpu=True)
    optimizer = AcceleratedOptimizer(sgd(model.parameters()), scaler=GradScaler("cpu"))
    swd = attached(model, optimizer)
    for step, (inputs, labels) in enumerate(batches()):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels) * (torch.inf if step == 3 else 1)
        optimizer.scaler.scale(loss).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == (step == 3)
    assert swd.step == STEPS - 1
    swd.prune()
    assert_exact(model)
    assert_same(model, plain(data=without(3)))


def lightning(test: Callable[..., None]) -> Callable[..., None]:
    """Let pass what Lightning warns of on small data and of its own use of torch."""
    for message in ("LeafSpec.*is deprecated:FutureWarning", "does not have many workers"):
        test = pytest.mark.filterwarnings(f"ignore:.*{message}")(test)
    return test


def for_lightning(base: type) -> Any:
    """A LightningModule (`base`) as users write it."""

    class Module(base):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Batch, index: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return sgd(self.parameters())

    return Module


def in_module() -> tuple[Any, list[Any]]:
    """SWD in the module itself."""
    from lightning import LightningModule

    base: Any = for_lightning(LightningModule)

    class Module(base):
        def configure_optimizers(self) -> Optimizer:
            optimizer = super().configure_optimizers()
            self.swd = penalty_of(self, steps=self.trainer.estimated_stepping_batches)
            self.swd.attach(optimizer)
            return optimizer

        def on_train_end(self) -> None:
            self.swd.prune()

    return Module(), []


def in_callback() -> tuple[Any, list[Any]]:
    """SWD beside a module that stays as it is."""
    from lightning import Callback, LightningModule, Trainer

    class Pruning(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            module.swd = penalty_of(module, steps=trainer.estimated_stepping_batches)
            module.swd.attach(trainer.optimizers[0])

        def on_train_end(self, trainer: Trainer, module: Any) -> None:
            module.swd.prune()

    return for_lightning(LightningModule)(), [Pruning()]


def by_hand() -> tuple[Any, list[Any]]:
    """SWD in a module with a loop of its own and Lightning's wrapped optimizer."""
    from lightning import LightningModule

    base: Any = for_lightning(LightningModule)

    class Module(base):
        automatic_optimization = False

        def on_train_start(self) -> None:
            self.swd = attached(self, self.optimizers())

        def training_step(self, batch: Batch, index: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, index))
            self.optimizers().step()

        def on_train_end(self) -> None:
            self.swd.prune()

    return Module(), []


def fit(module: Any, callbacks: list[Any], folder: Path, batch_size: int = 8, **how: Any) -> None:
    from lightning import Trainer

    quiet = ("logger", "checkpointing", "progress_bar", "model_summary")
    trainer = Trainer(
        **{name if name == "logger" else f"enable_{name}": False for name in quiet},
        **{"max_epochs": 1, "accelerator": "cpu", "devices": 1, **how},
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(module, DataLoader(dataset(), batch_size=batch_size))
    assert module.swd.step == module.swd.steps == STEPS


@lightning
@pytest.mark.parametrize("build", [in_module, in_callback, by_hand])
def test_lightning(build: Callable[[], tuple[Any, list[Any]]], tmp_path: Path) -> None:
    module, callbacks = build()
    fit(module, callbacks, tmp_path)
    assert_exact(module)
    assert_same(module.net, plain())


@lightning
@pytest.mark.parametrize("build", [in_module, in_callback])
def test_lightning_accumulates_and_clips(
    build: Callable[[], tuple[Any, list[Any]]], tmp_path: Path
) -> None:
    module, callbacks = build()
    how = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    fit(module, callbacks, tmp_path, batch_size=4, **how)
    assert_exact(module)
    assert_same(module.net, plain(clip=0.1))


@lightning
def test_lightning_in_bf16(tmp_path: Path) -> None:
    module, callbacks = in_module()
    fit(module, callbacks, tmp_path, precision="bf16-mixed")
    assert_exact(module)
    assert_same(module.net, plain(autocast=torch.autocast("cpu", dtype=torch.bfloat16)))


@lightning
def test_fabric() -> None:
    from lightning import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model = network()
    wrapped, optimizer = fabric.setup(model, sgd(model.parameters()))
    swd = attached(model, optimizer)
    for inputs, labels in batches():
        optimizer.zero_grad()
        fabric.backward(cross_entropy(wrapped(inputs), labels))
        optimizer.step()
    swd.prune()
    assert_exact(model)
    assert_same(model, plain())


SEQUENCES = torch.randint(16, (8, 12), generator=torch.Generator().manual_seed(2))
# Nothing predicts the first token, and the Trainer takes the mean over all that have a label.
LABELS = torch.cat([torch.full((8, 1), -100), SEQUENCES[:, 1:]], dim=1)


def transformer() -> Any:
    """A network of transformers whose first and last layer share a weight, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12, "vocab_size": 16}
    rates = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(**sizes, **rates, use_cache=False, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).double()


def by_optimizers(model: Any) -> tuple[SelectiveWeightDecay, dict[str, Any]]:
    """SWD through the optimizer that the Trainer is given."""
    optimizer = sgd(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return attached(model, optimizer), {"optimizers": (optimizer, scheduler)}


def by_callback(model: Any) -> tuple[SelectiveWeightDecay, dict[str, Any]]:
    """SWD beside a Trainer that makes its own optimizer."""
    from transformers import TrainerCallback

    class Pruning(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **now: Any) -> None:
            swd.steps = state.max_steps
            swd.attach(now["optimizer"])

    swd = penalty_of(model, steps=1)
    return swd, {"callbacks": [Pruning()]}


def fit_transformer(
    model: Any, how: dict[str, Any], folder: Path, parts: int = 1, **settings: Any
) -> None:
    """Train with Hugging Face's Trainer, with all sequences in each step."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=STEPS,
        per_device_train_batch_size=8 // parts,
        gradient_accumulation_steps=parts,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    data = [{"input_ids": r, "labels": t} for r, t in zip(SEQUENCES, LABELS, strict=True)]
    Trainer(model=model, args=arguments, train_dataset=data, **how).train()


def plain_transformer(
    model: Any, make: Callable[..., Optimizer], clip: float, autocast: Any = None
) -> Any:
    optimizer = make(model.parameters())
    swd = attached(model, optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with autocast or nullcontext():
            loss = model(input_ids=SEQUENCES, labels=LABELS).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    swd.prune()
    return model


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("attach", "make"), [(by_optimizers, sgd), (by_callback, partial(SGD, lr=0.1))]
)
def test_hugging_face(
    attach: Callable[..., Any], make: Callable[..., Optimizer], parts: int, tmp_path: Path
) -> None:
    model = transformer()
    swd, how = attach(model)
    fit_transformer(model, how, tmp_path, parts, max_grad_norm=0.5)
    assert swd.step == swd.steps == STEPS
    swd.prune()
    assert_exact(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same(model, plain_transformer(transformer(), make, 0.5), rtol=1e-4, atol=1e-6)


def test_hugging_face_in_bf16(tmp_path: Path) -> None:
    model = transformer().float()
    swd, how = by_callback(model)
    fit_transformer(model, how, tmp_path, bf16=True)
    assert swd.step == STEPS
    swd.prune()
    assert_exact(model)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    other = plain_transformer(transformer().float(), partial(SGD, lr=0.1), 1.0, autocast)
    assert distance(model, other) < 0.1


# Several processes


def in_two_processes(rank: int, folder: Path) -> None:
    """Train as a process of two on half of each batch; save weights and masks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = sgd(model.parameters())
    swd = attached(model, optimizer)
    for inputs, labels in batches():
        optimizer.zero_grad()
        cross_entropy(wrapped(inputs[rank::2]), labels[rank::2]).backward()
        optimizer.step()
    masks = swd.prune()
    torch.save({"weights": model.state_dict(), "masks": masks}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_choose_the_same_masks_and_train_as_one(tmp_path: Path) -> None:
    spawn(in_two_processes, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    model = network()
    model.load_state_dict(first["weights"])
    assert_exact(model)
    assert_same(model, plain(), rtol=1e-4, atol=1e-6)


# What cannot be joined


def refused(make: Callable[[list[nn.Parameter]], Any], words: str, update: Update) -> None:
    model = network()
    optimizer = make(list(model.parameters()))
    swd = penalty_of(model, update=update)
    for _ in range(2):  # nothing is left behind by the first try
        with pytest.raises(TypeError, match=words):
            swd.attach(optimizer)


@updates
def test_lbfgs_is_refused(update: Update) -> None:
    words = (
        r"LBFGS evaluates the loss several times .* add penalty\(\) to the loss and call advance"
    )
    refused(LBFGS, words, update)


def test_lbfgs_works_with_the_penalty_in_the_loss() -> None:
    model = network()
    optimizer = LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    swd = penalty_of(model, strength=1e3)
    [(inputs, labels)] = batches(1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels) + swd.penalty()
        loss.backward()
        return float(loss.detach())

    losses = []
    for _ in range(STEPS):
        losses.append(float(optimizer.step(closure)))
        swd.advance()
    assert losses[-1] < losses[0]
    swd.prune()
    assert_exact(model)


class Twice(SGD):
    """Calls the closure of step() twice."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return closure()


def test_an_optimizer_that_calls_its_closure_twice_is_refused_when_it_does() -> None:
    model = network()
    optimizer = Twice(model.parameters(), lr=0.1)
    swd = attached(model, optimizer)
    [(inputs, labels)] = batches(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    with pytest.raises(
        ValueError, match=r"Twice calls the closure of step\(\) more than once.* add"
    ):
        optimizer.step(closure)
    assert swd.step == 0
    swd.prune()  # from now on there is no penalty that the losses could lack
    assert optimizer.step(closure) is not None


class Nested(SGD):
    """Its step() is that of SGD, by way of super()."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_step_that_runs_its_hooks_twice_is_refused() -> None:
    SGD(network().parameters(), lr=0.1)  # torch adds the hooks to a class at its first instance
    model = network()
    optimizer = Nested(model.parameters(), lr=0.1)
    attached(model, optimizer)
    with pytest.raises(
        TypeError, match=r"step\(\) of Nested calls the step\(\) of its base class.* add p"
    ):
        optimizer.step()


def test_what_has_no_penalty_to_add_by_hand_says_to_use_another_optimizer() -> None:
    model = network()
    optimizer = Nested(model.parameters(), lr=0.1)
    GradualPruning(model, sparsity=0.5, steps=1).attach(optimizer)
    with pytest.raises(TypeError, match=r"Nested calls .* twice: use another optimizer"):
        optimizer.step()


class Wrapper(Optimizer):
    """Passes on all calls, and is no optimizer by itself."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups


@updates
def test_a_wrapper_without_hooks_is_refused(update: Update) -> None:
    words = "Wrapper did not call Optimizer.__init__, .* give the optimizer that it wraps"
    refused(lambda parameters: Wrapper(SGD(parameters, lr=0.1)), words, update)


@updates
def test_what_is_no_optimizer_is_refused(update: Update) -> None:
    refused(lambda parameters: parameters, r"must be a torch\.optim\.Optimizer, not \[", update)


@updates
def test_sharded_parameters_are_refused(update: Update) -> None:
    class Sharded(nn.Parameter):
        """As much of a DTensor as can be made without a process group."""

        def full_tensor(self) -> Tensor:
            return self.data

    words = r"of the SGD are sharded \(DTensor\).* train with DistributedDataParallel"
    refused(lambda parameters: SGD([Sharded(torch.ones(2, 2))], lr=0.1), words, update)


def test_sparse_adam_is_refused_unless_the_update_is_proximal() -> None:
    words = "SparseAdam takes sparse gradients only .* update='proximal'"
    refused(SparseAdam, words, "gradient")
    torch.manual_seed(0)
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = SparseAdam(model.parameters(), lr=0.1)
    swd = attached(model, optimizer, update="proximal")
    for step in range(STEPS):
        optimizer.zero_grad()
        model(torch.tensor([step, 9])).square().sum().backward()
        optimizer.step()
    assert swd.step == STEPS
    swd.prune()
    optimizer.step()
    assert_exact(model)


@pytest.mark.parametrize("rate", [None, "absent"])
def test_proximal_update_needs_a_learning_rate(rate: str | None) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    if rate is None:  # transformers' Adafactor finds its own
        optimizer.param_groups[0]["lr"] = None
    else:
        del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=r"needs a number 'lr' .* of the SGD are \[None\]: set it"):
        attached(model, optimizer, update="proximal")
    assert attached(model, optimizer)


def test_learning_rate_may_be_a_tensor() -> None:
    make = partial(Adam, lr=torch.tensor(0.01), foreach=False)
    assert_same(plain(make, update="proximal"), plain(OPTIMIZERS["adam"], update="proximal"))


@pytest.mark.parametrize("by_keyword", [False, True])
def test_what_else_is_given_to_a_step_stays(by_keyword: bool) -> None:
    calls = []

    def closure() -> str:
        calls.append("backward")
        return "loss"

    args = ("optimizer", "grads") if by_keyword else ("optimizer", closure, "grads")
    kwargs = {"scale": 2, "closure": closure} if by_keyword else {"scale": 2}
    after, also = after_backward(args, kwargs, lambda: calls.append("penalty"), "none")
    new = also.pop("closure") if by_keyword else after[1]
    expected = ("optimizer", "grads") if by_keyword else ("optimizer", new, "grads")
    assert after == expected
    assert also == {"scale": 2} and calls == []
    assert new() == "loss" and calls == ["backward", "penalty"]


# What a report says of the selection -------------------------------------------------------------


def of(*chosen: bool) -> list[torch.Tensor]:
    return [torch.tensor(chosen)]


def test_movement_by_hand() -> None:
    assert movement(of(True, True, False, False), []) == {"selected": 2}
    second = movement(of(True, False, True, True), of(True, True, False, False))
    assert second == {"selected": 3, "entered": 2, "left": 1}
    third = movement(of(True, False, True, True), of(True, False, True, True))
    assert (third["entered"], third["left"]) == (0, 0)


def norms_of(group: Group, *chosen: bool) -> dict[str, float]:
    return norms(parameters_of([group]), removed_weights([group], of(*chosen)))


def test_norms_by_hand() -> None:
    group = Group("w", nn.Parameter(torch.tensor([3.0, 4.0, 12.0, 5.0])))
    assert norms_of(group, True, True, False, False) == {"norm_selected": 5.0, "norm_kept": 13.0}
    assert norms_of(group, True, False, True, True)["norm_kept"] == 4.0


def test_units_of_several_weights_count_once() -> None:
    convolution = nn.Conv2d(1, 2, 3)
    convolution.weight.data[:] = 1.0
    [group] = kernels(convolution)
    assert movement(of(False, True), of(True, False)) == {"selected": 1, "entered": 1, "left": 1}
    assert norms_of(group, False, True) == {"norm_selected": 3.0, "norm_kept": 3.0}


def test_units_that_do_not_fit_are_refused() -> None:
    groups = [Group("w", nn.Parameter(torch.ones(2)))]
    fitted_units(groups, [])
    fitted_units(groups, of(True, False))
    wrong = (of(True), [torch.ones(2)], [*of(True, False), *of(True, False)])
    for units in wrong:
        with pytest.raises(ValueError, match="units must have shapes and types"):
            fitted_units(groups, units)


def test_norms_of_half_precision_do_not_overflow() -> None:
    group = Group("w", nn.Parameter(torch.full((2,), 300.0, dtype=torch.float16)))
    assert norms_of(group, True, False) == {"norm_selected": 300.0, "norm_kept": 300.0}
