"""The loop: rows, exact resume, precision, accumulation, several processes."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from swdlib.data.images import Dataset, Split
from swdlib.masks import NotFinite, Unreachable
from swdlib.metrics import evaluate
from swdlib.recipes import (
    Phase,
    Prune,
    Train,
    han2015,
    liu2017,
    one_shot,
    random_pruning,
    soft,
    swd,
    zhu2017,
)
from swdlib.runs.devices import Tracker
from swdlib.runs.training import Options, _in_words, train
from swdlib.schedules import Constant, Linear, growing
from swdlib.structures import blocks, filters, kernels, n_of_m, weights
from swdlib.swd import SelectiveWeightDecay

BATCH = 8
STEPS = 5  # batches in an epoch of `toy_data`


def toy_data(images: int = STEPS * BATCH, padding: int = 1) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        pixels = torch.randint(256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count) % 3
        pixels[:, 0, 0, 0] = (labels * 100).to(torch.uint8)  # something to learn
        return Split(pixels, labels)

    return Dataset(
        name="toy",
        source="made up",
        train=split(images),
        test=split(11),
        classes=3,
        mean=(0.5,),
        std=(0.5,),
        padding=padding,
        flip=True,
        fingerprint="",
    )


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(96, 3),
    )


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def swd_phases(epochs: int = 2) -> list[Phase]:
    return swd(epochs, Linear(0.1, 0.01), 0.8, weights, 5e-4, 0.1, 1e5, "gradient")


def han_phases() -> list[Phase]:
    return han2015(4, Constant(0.05), 0.8, weights, finetune_epochs=2, iterations=2)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


run_quietly = partial(train, batch_size=BATCH, progress=False)


def test_a_row_for_each_epoch_and_cut() -> None:
    rows = run_quietly(network(), toy_data(), swd_phases(epochs=2))
    assert [row["kind"] for row in rows] == ["train", "train", "prune"]
    assert [row["epoch"] for row in rows] == [1, 2, 2]
    assert [row["step"] for row in rows] == [STEPS, 2 * STEPS, 2 * STEPS]
    assert [row["sparsity"] for row in rows[:2]] == [0, 0]
    prunable = 6 * 9 + 96 * 3
    assert rows[-1]["sparsity"] == round(0.8 * prunable) / prunable
    total = prunable + 6 + 12 + 3
    assert [row["parameters"] for row in rows] == [total, total, total - round(0.8 * prunable)]
    assert rows[-1]["weights"]["zeros"] == round(0.8 * prunable)
    assert sum(rows[-1]["weights"]["counts"]) == prunable - round(0.8 * prunable)


def test_the_learning_rate_of_a_row_is_that_of_its_last_step() -> None:
    rows = run_quietly(perceptron(), toy_data(), [Train(2, Linear(1.0, 0.0))])
    assert [row["lr"] for row in rows] == pytest.approx([1 - 4 / 10, 1 - 9 / 10])


def test_training_learns() -> None:
    rows = run_quietly(perceptron(), toy_data(padding=0), [Train(30, Constant(0.05))])
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]


def test_what_is_cut_stays_zero_through_momentum_and_decay() -> None:
    model = network()
    rows = run_quietly(model, toy_data(), han_phases())
    assert [row["kind"] for row in rows] == ["train", "train", "prune", "train", "prune", "train"]
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim >= 2)
    assert zeros == round(0.8 * 342)
    kept = [row["sparsity"] for row in rows]
    assert kept == sorted(kept)


def test_a_later_cut_revives_nothing_of_an_earlier_one() -> None:
    model, phases = network(), han_phases()
    on = Train(1, Constant(0.05))
    phases += [Prune(0.3, kernels), on, Prune(0.5, weights), on]
    rows = run_quietly(model, toy_data(), phases)
    kept = [row["sparsity"] for row in rows]
    assert kept == sorted(kept)
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim >= 2)
    assert zeros >= round(0.8 * 342)


def test_a_sparsity_that_cannot_be_reached_is_refused_before_training() -> None:
    steps = Stopping(at=0)  # a step would raise
    phases: list[Phase] = [Train(1, Constant(0.05)), Prune(0.9, n_of_m(2, 4))]
    with pytest.raises(Unreachable, match=r"sparsity 0\.9"):
        run_quietly(perceptron(), toy_data(), phases, optimizer=steps)


class Stopped(Exception):
    """Stands for a run that is ended from outside."""


@dataclass
class Stopping:
    """Makes optimizers the steps of which are counted together; raises at step `at`."""

    at: float = math.inf
    taken: int = 0

    def __call__(self, parameters: Any) -> Optimizer:
        optimizer = SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
        optimizer.register_step_pre_hook(self._count)
        return optimizer

    def _count(self, *_: Any) -> None:
        if self.taken == self.at:
            raise Stopped
        self.taken += 1


def zhu_phases() -> list[Phase]:
    return zhu2017(3, Constant(0.05), 0.8, weights, ramp_begin=0.1, ramp_end=0.8, every=4)


def soft_phases() -> list[Phase]:
    return soft(3, Constant(0.05), 0.8, weights)


def random_phases() -> list[Phase]:
    return random_pruning(4, Constant(0.05), 0.8, weights, finetune_epochs=2, iterations=2)


@pytest.mark.parametrize("phases", [swd_phases, han_phases, zhu_phases, soft_phases, random_phases])
@pytest.mark.parametrize("save_every", [1, 3])
def test_a_run_stopped_at_any_step_resumes_bit_for_bit(
    phases: Any, save_every: int, tmp_path: Path
) -> None:
    assert_resumes(network, toy_data(), phases, tmp_path, stride=2, save_every=save_every)


def assert_resumes(
    build: Callable[[int], nn.Module],
    data: Dataset,
    phases: Callable[[], list[Phase]],
    folder: Path,
    *,
    stride: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """Stop at every `stride`-th step and go on; it must come to the same rows, which it returns."""
    counted, whole = Stopping(), build(0)
    run = partial(run_quietly, **options)
    expected = run(whole, data, phases(), optimizer=counted)
    for stop in range(1, counted.taken, stride):
        file = folder / f"{stop}.pt"
        with pytest.raises(Stopped):
            run(build(0), data, phases(), checkpoint=file, optimizer=Stopping(at=stop))
        kept = stop // options["save_every"] * options["save_every"]
        assert file.exists() == (kept > 0), stop
        # Everything must come from the checkpoint, once there is one.
        resumed, again = build(1 if kept else 0), Stopping()
        rows = run(resumed, data, phases(), checkpoint=file, optimizer=again)
        assert again.taken == counted.taken - kept, stop
        assert untimed(rows) == untimed(expected), stop
        assert_same(state_of(resumed), state_of(whole))
    return expected


def test_a_damaged_checkpoint_is_refused_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"run\.pt is no readable checkpoint; delete it"):
        run_quietly(perceptron(), toy_data(), swd_phases(), checkpoint=file)


def test_settings_that_a_function_holds_are_told_in_words() -> None:
    rate = Linear(0.1, 0.01)
    slim, slimmer = (liu2017(2, rate, 0.5, kernels, 1, l1=l1)[0] for l1 in (1e-4, 1e-3))
    assert "l1=0.0001" in _in_words(slim) and "l1=0.001" in _in_words(slimmer)
    grown = [growing("per_step", 0.1, a_max, 1.0, rate) for a_max in (1e4, 1e5)]
    assert _in_words(grown[0]) != _in_words(grown[1])
    assert _in_words(grown[0]) == _in_words(growing("per_step", 0.1, 1e4, 1.0, rate))
    assert _in_words(filters(torch.zeros(1))) == "filters"
    assert _in_words(object()) == "<object object>"


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 7},
        {"batch_size": 4},
        {"phases": swd_phases(3)},
        {"phases": [Train(2, Constant(0.5)), Prune(0.8, weights)]},
        {"phases": [*swd_phases()[:1], Prune(0.7, weights)]},
        {"phases": [*swd_phases()[:1], Prune(0.8, blocks(2, 2))]},
        {"phases": one_shot(2, Linear(0.1, 0.01), 0.8, weights)},
        {"phases": swd(2, Linear(0.1, 0.01), 0.8, weights, 5e-4, 0.1, 1e4, "gradient")},
        {"phases": swd(2, Linear(0.1, 0.01), 0.8, weights, 5e-4, 0.1, 1e5, "proximal")},
        {"phases": swd(2, Linear(0.1, 0.02), 0.8, weights, 5e-4, 0.1, 1e5, "gradient")},
        {"clip": 1.0},
        {"precision": "bf16"},
        {"identity": "other"},
        {"accumulate": 3},
    ],
)
def test_the_checkpoint_of_another_run_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    with pytest.raises(Stopped):
        run_quietly(
            network(),
            toy_data(),
            swd_phases(),
            checkpoint=file,
            save_every=1,
            optimizer=Stopping(3),
        )
    model = network(1)
    before = state_of(model)
    arguments = {"phases": swd_phases(), "checkpoint": file, **other}
    with pytest.raises(ValueError, match=r"run\.pt is the checkpoint of another run"):
        run_quietly(model, toy_data(), **arguments)
    assert_same(state_of(model), before)


def watch(model: nn.Module, layer: int, look: Callable[[Tensor], Any]) -> list[Any]:
    """Fill the list that is returned with what `look` finds of a layer's inputs in training."""
    seen = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if module.training:
            seen.append(look(inputs[0]))

    model.get_submodule(str(layer)).register_forward_pre_hook(note)
    return seen


def test_accumulated_parts_give_the_step_of_the_whole_batch() -> None:
    states = []
    for parts, largest in ((1, BATCH), (3, 3)):
        model = perceptron()
        seen = watch(model, 1, len)
        run_quietly(model, toy_data(), swd_phases(), accumulate=parts)
        assert max(seen) == largest
        states.append(state_of(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_step() -> None:
    model = perceptron()
    before = state_of(model)
    data = toy_data(images=BATCH)
    plain = partial(SGD, lr=1.0)
    run_quietly(model, data, [Train(1, Constant(1.0))], optimizer=plain, clip=1e-3)
    moved = [(model.state_dict()[name] - value).square().sum() for name, value in before.items()]
    assert 0 < math.sqrt(sum(moved)) <= 1e-3 * (1 + 1e-4)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}])
def test_other_arithmetic_and_layout_train_alike(options: dict[str, Any]) -> None:
    def look(maps: Tensor) -> dict[str, Any]:
        last = maps.is_contiguous(memory_format=torch.channels_last)
        precision = "bf16" if maps.dtype == torch.bfloat16 else "fp32"
        return {"precision": precision, "channels_last": last}

    plain, other = network(), network()
    seen = watch(other, 1, look)
    expected = run_quietly(plain, toy_data(), swd_phases(), channels_last=False)
    rows = run_quietly(other, toy_data(), swd_phases(), **{"channels_last": False, **options})
    usual = {"precision": "fp32", "channels_last": False}
    assert len(seen) == 2 * STEPS and all(found == usual | options for found in seen)
    assert rows[-1]["sparsity"] == expected[-1]["sparsity"]
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.05)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert other.eval()(torch.ones(2, 1, 4, 4)).dtype == torch.float32
    assert "_original_forward" not in vars(other)  # accelerate's wrapping is gone


def test_a_layout_that_would_be_miscomputed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    strided = nn.Conv2d(1, 6, kernel_size=1, stride=2)
    model = nn.Sequential(strided, nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 3))
    seen = watch(model, 1, lambda maps: maps.is_contiguous(memory_format=torch.channels_last))
    run_quietly(model, toy_data(), swd_phases(), channels_last=True)
    assert seen and not any(seen)


def test_a_compiled_run_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    # What torch.compile generates is torch's to test, and takes a minute; its call is ours.
    given: list[nn.Module] = []
    original = torch.compile

    def eager(module: nn.Module) -> Any:
        given.append(module)
        return original(module, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    plain, compiled = perceptron(), perceptron()
    expected = run_quietly(plain, toy_data(), swd_phases())
    assert not given
    rows = run_quietly(compiled, toy_data(), swd_phases(), compile=True)
    assert given == [compiled]
    assert rows[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_a_tracker_gets_the_numbers_of_each_row_and_changes_nothing(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain, tracked = network(), network()
    expected = run_quietly(plain, toy_data(), swd_phases())
    log_to = Tracker("tensorboard", tmp_path, "a run", {"lr": 0.1, "clip": None})
    rows = run_quietly(tracked, toy_data(), swd_phases(), log_to=log_to)
    assert untimed(rows) == untimed(expected)
    assert_same(state_of(tracked), state_of(plain))
    events = EventAccumulator(str(tmp_path / "a run" / "swdlib")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/top1")]
    assert found == [(row["step"], pytest.approx(row["top1"])) for row in rows[:2]]
    [cut] = events.Scalars("prune/parameters")
    assert (cut.step, cut.value) == (rows[-1]["step"], rows[-1]["parameters"])
    assert not any(tag.endswith("/weights") for tag in events.Tags()["scalars"])


def test_any_optimizer_and_loss() -> None:
    seen, made = set(), []

    def squared(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        seen.add(torch.is_grad_enabled())
        return (logits - nn.functional.one_hot(labels, 3)).square().sum()

    def adam(parameters: Any) -> Optimizer:
        made.append(Adam(parameters, lr=0.01))
        return made[-1]

    model = perceptron()
    rows = run_quietly(model, toy_data(), swd_phases(), optimizer=adam, loss=squared)
    assert seen == {True, False}  # trained and measured with it
    assert rows[-1]["loss"] == pytest.approx(evaluate(model, toy_data(), loss=squared)["loss"])
    assert len(made) == 1 and made[0].state  # which has stepped


def test_a_run_that_diverges_says_so() -> None:
    with pytest.raises(NotFinite, match=r"diverged; lower the learning rate"):
        run_quietly(perceptron(), toy_data(), [Train(3, Constant(1e30))])


def test_a_run_whose_last_step_loses_a_weight_says_so() -> None:
    def steep(*args: Any, **kwargs: Any) -> Tensor:
        return 100 * cross_entropy(*args, **kwargs)

    with pytest.raises(NotFinite, match=r"after epoch 1 a weight is not finite: .*diverged"):
        run_quietly(perceptron(), toy_data(BATCH), [Train(1, Constant(3e38))], loss=steep)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("batch_size", 0, "batch_size must be a whole number of at least 1, not 0"),
        ("accumulate", 0, "accumulate must be a whole number of at least 1, not 0"),
        ("precision", "fp8", "precision must be one of"),
        ("clip", -1.0, "clip is a gradient norm above 0, or None, not -1.0"),
    ],
)
def test_impossible_options_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**{option: value})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "lr",
            r"train has no option 'lr' \(the phases set lr\); the options are optimizer, loss, ",
        ),
        ("epochs", r"no option 'epochs' \(the phases set epochs\)"),
        ("batchsize", r"no option 'batchsize' \(did you mean batch_size\?\); the options are "),
        ("momentum", r"no option 'momentum'; the options are optimizer, .*, progress, log_to$"),
    ],
)
def test_unknown_options_are_refused(option: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        train(perceptron(), toy_data(), swd_phases(), **{option: 3})


@pytest.mark.parametrize("data", [None, [], torch.zeros(2, 1, 4, 4)])
def test_data_that_is_no_dataset_is_refused(data: Any) -> None:
    with pytest.raises(
        TypeError, match=r"data must be a dataset such as load_data .*device, steps"
    ):
        train(perceptron(), data, swd_phases())


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="'fp16' needs a GPU"):
        run_quietly(perceptron(), toy_data(), swd_phases(), precision="fp16")


def test_a_penalty_sees_as_many_steps_as_the_phase_has() -> None:
    seen = []

    def penalty(model: nn.Module, *, steps: int) -> SelectiveWeightDecay:
        seen.append(SelectiveWeightDecay(model, sparsity=0.5, steps=steps))
        return seen[-1]

    run_quietly(perceptron(), toy_data(), [Train(3, Constant(0.01), penalty), Prune(0.5, weights)])
    assert [(p.step, p.steps) for p in seen] == [(3 * STEPS, 3 * STEPS)]


MIXES: dict[str, Callable[[], list[Phase]]] = {
    "penalty": lambda: swd_phases() + han_phases()[1:],
    "gradual": lambda: zhu_phases() + random_phases(),
}


def work(folder: Path, mix: str, stop: float = math.inf) -> None:
    """Train as one process or as one of several; write what came of it unless stopped at a step."""
    model = perceptron()
    try:
        rows = run_quietly(
            model,
            toy_data(images=44),
            MIXES[mix](),
            optimizer=Stopping(stop),
            checkpoint=folder / "run.ckpt",
            save_every=3,
        )
    except Stopped:
        return
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    trained = [row.get("train_loss", 0.0) for row in rows]
    found = {"model": model.state_dict(), "losses": [r["loss"] for r in rows], "train": trained}
    torch.save(found, folder / f"{rank}.pt")


WORKER = """
import sys
from pathlib import Path
import torch
from tests.runs.test_training import work

torch.set_num_threads(1)
work(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
"""


def launch(folder: Path, processes: int, mix: str, stop: float = math.inf) -> list[dict[str, Any]]:
    """Let one process or several do `work`, and return what each came to."""
    folder.mkdir(exist_ok=True)
    if processes == 1:
        work(folder, mix, stop)
    else:
        script = folder / "worker.py"
        script.write_text(WORKER)
        root = str(Path(__file__).resolve().parents[2])
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [
            *torchrun,
            f"--nproc-per-node={processes}",
            str(script),
            str(folder),
            mix,
            str(stop),
        ]
        environment = {**os.environ, "PYTHONPATH": root, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    ranks = range(processes if stop == math.inf else 0)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_two_processes_do_what_one_does(mix: str, tmp_path: Path) -> None:
    (one,) = launch(tmp_path / "one", 1, mix)
    assert_alike(launch(tmp_path / "two", 2, mix), one)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(
    before: int, after: int, tmp_path: Path
) -> None:
    (whole,) = launch(tmp_path / "whole", 1, "penalty")
    folder = tmp_path / "stopped"
    # In the middle of an epoch, with sums of it in the checkpoint.
    assert not launch(folder, before, "penalty", stop=8)
    assert (folder / "run.ckpt").exists()
    assert_alike(launch(folder, after, "penalty"), whole)


def assert_alike(ranks: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Check that all processes end with the same weights, and as one process but for rounding."""
    for rank in ranks:
        assert_same(rank["model"], ranks[0]["model"])
        for name, value in one["model"].items():
            assert torch.equal(rank["model"][name] == 0, value == 0), name  # the same masks
            torch.testing.assert_close(rank["model"][name], value, rtol=1e-3, atol=1e-5)
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert rank["train"] == pytest.approx(one["train"], rel=1e-4)
