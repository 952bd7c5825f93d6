"""What this project says of GPUs, checked and timed on one: `make gpu`, in at most nine minutes.

A line for each check; the status is 1 if one fails. In the time that is left it trains the
published ResNet-20 of 64 maps on CIFAR-10, from where the last call stopped, if `--data-root` has
the images. With `--device cpu` it does all that a CPU can, in miniature.
"""

import argparse
import copy
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from book.bench import in_turns, milliseconds, on_gpu
from swdlib.data.load import load_data
from swdlib.deploy.reports import sparse_linears
from swdlib.fast import lowest_on_gpu
from swdlib.masks import apply_
from swdlib.models import build_model
from swdlib.runs.config import Config
from swdlib.runs.training import sgd, train
from swdlib.swd import NotNeutral, SelectiveWeightDecay

MINUTES = 9.0
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Checks = dict[str, Callable[[], str]]


class Unfit(Exception):
    """A check that this device cannot do."""


def on_cuda(device: str) -> None:
    """Refuse a check that needs a GPU."""
    if device != "cuda":
        raise Unfit("needs a GPU")


def lowest_by_sorting(tensors: list[Tensor], count: int) -> list[Tensor]:
    """The oracle: masks of the `count` lowest magnitudes, of ties the first, sorted on the CPU."""
    flat = torch.cat([tensor.flatten().cpu() for tensor in tensors]).double().abs()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.argsort(stable=True)[:count]] = True
    parts = mask.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def selection(device: str, size: int) -> str:
    """Masks equal to the oracle's, with and without ties."""
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for dtype in DTYPES:
        for rounded in (False, True):
            numbers = torch.randn(size, generator=generator)
            numbers = (numbers * 4).round() / 4 if rounded else numbers
            tensors = [
                part.to(device, dtype) for part in numbers.split([size // 3, size - size // 3])
            ]
            for share in (0.001, 0.5, 0.98, 0.999):
                count = round(share * size)
                for found, wanted in zip(
                    lowest_on_gpu(tensors, count), lowest_by_sorting(tensors, count), strict=True
                ):
                    assert torch.equal(found.cpu(), wanted), (dtype, rounded, share)
                compared += 1
    return f"{compared} selections of {size:,} weights"


def many_tensors(device: str, number: int) -> str:
    """A network of many small layers, pruned exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(number))).to(device)
    optimizer = sgd(model.parameters())
    swd = SelectiveWeightDecay(model, sparsity=0.9, steps=3)
    swd.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6, device=device)).square().mean().backward()
        optimizer.step()
    weights = [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]
    wanted = lowest_by_sorting(weights, round(0.9 * 36 * number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotNeutral)  # after three steps
        pairs = zip(swd.prune().values(), wanted, strict=True)
    assert all(torch.equal(mask.cpu(), ~gone) for mask, gone in pairs)
    return f"{number:,} layers"


def stepping(device: str, update: Any) -> Callable[[], None]:
    """One step of a small network with SWD attached, its gradients in place."""
    model = build_model("resnet20", width=8).to(device)
    optimizer = sgd(model.parameters())
    swd = SelectiveWeightDecay(model, sparsity=0.9, steps=100, update=update)
    swd.attach(optimizer)
    images = torch.randn(16, 3, 32, 32, device=device)
    labels = torch.arange(16, device=device) % 10
    cross_entropy(model(images), labels).backward()
    optimizer.step()  # the first makes its buffers
    return optimizer.step


def no_wait(device: str) -> str:
    """A step during which torch raises if the CPU waits for the GPU."""
    on_cuda(device)
    for update in ("gradient", "proximal"):
        step = stepping(device, update)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "both updates"


def learned(model: nn.Module, network: Callable[..., Tensor], device: str) -> list[Tensor]:
    """The weights after five steps with SWD, of a model that `network` computes."""
    optimizer = sgd(model.parameters())
    SelectiveWeightDecay(model, sparsity=0.9, steps=5).attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        images = torch.randn(16, 3, 32, 32, generator=generator).to(device)
        optimizer.zero_grad()
        cross_entropy(network(images), torch.arange(16, device=device) % 10).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def alike(device: str, change: Callable[[nn.Module], Any]) -> str:
    """Five steps of a network and of a changed copy, the same but for rounding."""
    torch.manual_seed(0)
    model = build_model("resnet20", width=4).to(device)
    other = copy.deepcopy(model)
    changed = change(other)
    largest = 0.0
    for a, b in zip(learned(model, model, device), learned(other, changed, device), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
        largest = max(largest, float((a - b).abs().max()))
    return f"weights after five steps differ by {largest:.1e} at most"


def compiled(device: str) -> str:
    """torch.compile beside eager."""
    backend = "inductor" if device == "cuda" else "eager"
    return alike(device, lambda model: torch.compile(model, backend=backend))


def graphed(device: str) -> str:
    """Forward and backward passes as CUDA graphs, with the steps of SWD between them."""
    on_cuda(device)
    example = torch.randn(16, 3, 32, 32, device=device)
    return alike(device, lambda model: torch.cuda.make_graphed_callables(model, (example,)))


def precision(device: str, kind: str, epochs: int) -> str:
    """Training in 16 bits: the digits are learned, and the sparsity is exact."""
    if kind == "fp16":
        on_cuda(device)
    config = Config(epochs=epochs, precision=kind, device=device)
    data = load_data("digits", device=device)
    rows = train(config.build(data), data, config.phases(), **config.options(progress=False))
    assert abs(rows[-1]["sparsity"] - 0.9) < 1e-4
    assert rows[-1]["top1"] > (90 if epochs >= 10 else 15), rows[-1]["top1"]
    return f"Top-1 {rows[-1]['top1']:.1f} %"


def two_of_four(device: str) -> str:
    """A layer whose kernels skip two of four weights, beside the masked layer."""
    on_cuda(device)
    if torch.cuda.get_device_capability() < (8, 0):
        raise Unfit("needs compute capability 8.0")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096)).cuda().half()
    mask = torch.tensor([True, False, False, True]).repeat(4096, 1024).cuda()
    sparse = sparse_linears(model, {"0.weight": mask})
    apply_(model, {"0.weight": mask})
    batch = torch.randn(1024, 4096).cuda().half()
    with torch.no_grad():
        torch.testing.assert_close(sparse(batch), model(batch), rtol=1e-2, atol=1e-2)
        times = timed({"dense": lambda: model(batch), "sparse": lambda: sparse(batch)}, device)
    return f"{times['dense'] / times['sparse']:.2f} times as fast as dense"


def by_bisection(flat: Tensor, count: int) -> Tensor:
    """A threshold found by halving an interval thirty times."""
    low, high = flat.new_zeros(()), flat.max()
    for _ in range(30):
        middle = (low + high) / 2
        few = (flat <= middle).sum() < count
        low, high = torch.where(few, middle, low), torch.where(few, high, middle)
    return flat <= high


def timed(functions: Mapping[str, Callable[[], object]], device: str) -> dict[str, float]:
    """The median milliseconds of each function in seven rounds, in which they take turns."""
    done = partial(now, device)
    return in_turns({name: partial(milliseconds, f, done) for name, f in functions.items()}, 7)


def now(device: str) -> float:
    """The time once all work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def costs(device: str, size: int) -> str:
    """Milliseconds of a selection, beside other ways to make it and a copy of the weights."""
    weights = torch.randn(size, device=device)
    count = round(0.9 * size)
    ways = {
        "radix": lambda: lowest_on_gpu([weights], count),
        "sort": lambda: weights.abs().sort(),
        "topk": lambda: weights.abs().topk(size - count),
        "bisection": lambda: by_bisection(weights.abs(), count),
        "copy": lambda: weights.clone(),
    }
    return ", ".join(f"{name} {ms:.3g}" for name, ms in timed(ways, device).items()) + " ms"


def share(device: str) -> str:
    """What selection and update add to a step of ResNet-50."""
    on_cuda(device)
    [found] = on_gpu(7)
    return f"{found['value']:g} % of a step in bf16"


def checks_on(device: str) -> Checks:
    """The checks, largest on a GPU."""
    small = device != "cuda"
    sizes = (10**3,) if small else (10**5, 10**6, 10**7, 10**8)
    return {
        "selection is the oracle's": lambda: selection(device, 3000 if small else 10**6),
        "many tensors": lambda: many_tensors(device, 20 if small else 2000),
        "a step does not wait": lambda: no_wait(device),
        "torch.compile": lambda: compiled(device),
        "CUDA graphs": lambda: graphed(device),
        "bf16": lambda: precision(device, "bf16", 2 if small else 10),
        "fp16": lambda: precision(device, "fp16", 10),
        "two of four": lambda: two_of_four(device),
        **{f"selecting of {n:,}": lambda n=n: costs(device, n) for n in sizes},  # type: ignore[misc]
        "share of ResNet-50": lambda: share(device),
    }


def carried_out(checks: Checks) -> Iterator[tuple[str, str, str]]:
    """The name of each check, whether it holds, and what it found."""
    for name, check in checks.items():
        try:
            yield name, "holds", check()
        except Unfit as reason:
            yield name, "-", str(reason)
        except Exception as error:
            traceback.print_exc()
            yield name, "FAILS", repr(error).splitlines()[0]


def train_published(root: str, sparsity: float, seconds: float) -> str:
    """Train the published network for some seconds; the next call goes on from there."""
    run = ["run", "--profile", "paper", "--sparsity", str(sparsity), "--data-root", root]
    command = [sys.executable, "-m", "swdlib.cli", *run]
    try:
        done = subprocess.run(command, timeout=seconds, capture_output=True, text=True)
    except subprocess.TimeoutExpired as late:
        lines = (late.stderr or b"").decode().splitlines()
        return f"stopped; {lines[-1] if lines else 'no epoch is done yet'}"
    return (done.stdout or done.stderr).splitlines()[-1]


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each check; 1 if one fails."""
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    command.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    command.add_argument("--data-root", help="folder of CIFAR-10, to train the published network")
    command.add_argument("--sparsity", type=float, default=0.999)
    command.add_argument("--minutes", type=float, default=MINUTES, help="in all")
    options = command.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        command.error("there is no GPU here; --device cpu does what a CPU can, in miniature")
    start, failed = time.monotonic(), 0
    for name, verdict, found in carried_out(checks_on(options.device)):
        print(f"{name:28} {verdict:6} {found}", flush=True)
        failed += verdict == "FAILS"
    left = 60 * options.minutes - (time.monotonic() - start)
    if options.data_root and left > 0:
        found = train_published(options.data_root, options.sparsity, left)
        print(f"{'the published network':28} {'-':6} {found}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
