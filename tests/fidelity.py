"""The published system, read literally and slowly, beside the library: `make fidelity`.

What the authors' code does (beside arXiv 2011.10520), in the words of its specification, for the
networks `tessier_resnet` of basic blocks. It shares no code with the library but the network.
"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from swdlib import published
from swdlib.masks import kept
from swdlib.models import build_model
from swdlib.recipes import Phase, Train
from swdlib.recipes import swd as swd_recipe
from swdlib.runs.training import train
from swdlib.schedules import Steps
from swdlib.swd import SelectiveWeightDecay

EPOCHS, TUNE, BATCHES, DECAY, RATE = 5, 3, 10, 5e-4, 0.1
Masks = dict[str, Tensor]  # 1 where a parameter stays, 0 where it goes


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(10, (8,), generator=generator)


# The specification --------------------------------------------------------------------------------


def of_norm(name: str) -> bool:
    """Whether the authors' name of the parameter holds "bn": not so in a shortcut."""
    return name.startswith("0.1.") or ".norms." in name or ".last." in name


def of_prunable(name: str) -> bool:
    """The stem's batch norm, the first of each block, and the one after its addition."""
    return name.startswith("0.1.") or ".norms.0." in name or ".last." in name


def unstructured(model: nn.Module, target: float) -> Masks:
    named = dict(model.named_parameters())
    ranked = torch.cat([p.abs().flatten() for n, p in named.items() if not of_norm(n)])
    threshold = ranked.sort().values[int(target / 1000 * len(ranked))]
    return {name: (p.abs() >= threshold).double() for name, p in named.items()}


def estimate(model: nn.Module, threshold: Tensor | float) -> int:
    """Parameters of the network with the scales above the threshold."""
    above = {n: int((p.abs() > threshold).sum()) for n, p in model.named_parameters()}
    s = f = above["0.1.weight"]
    count = 27 * s + 2 * s
    for name in above:
        if name.endswith(".norms.0.weight"):
            block = name.removesuffix("norms.0.weight")
            b, o = above[name], above[f"{block}last.weight"]
            count += 9 * f * b + 2 * b + 9 * b * o + 4 * o
            if f"{block}shortcut.0.weight" in above:
                count += f * o + 2 * o
            f = o
    return count + 10 * f + 10


def threshold_of(model: nn.Module, target: float) -> Tensor:
    named = model.named_parameters()
    scales = [p.abs() for n, p in named if of_prunable(n) and n.endswith("weight")]
    candidates = torch.cat(scales).sort().values
    goal = int(sum(p.numel() for p in model.parameters()) * (1 - target / 1000))
    lowest, highest = 0, len(candidates)
    while True:
        place = (lowest + highest) // 2
        found = estimate(model, candidates[place])
        if found == goal:
            return candidates[place]
        if found < goal:
            highest = place
        else:
            lowest = place
        if highest - lowest <= 1:
            return candidates[place]


def structured(model: nn.Module, target: float, filters: bool = False) -> Masks:
    threshold, named = threshold_of(model, target), dict(model.named_parameters())
    stays = {n: (p.abs() >= threshold).double() for n, p in named.items() if of_prunable(n)}
    masks = {name: torch.ones_like(p) for name, p in named.items()}
    for name in stays:
        masks[name] = stays[name.replace("bias", "weight")]
    if filters:
        before = stays["0.1.weight"]
        masks["0.0.weight"] = before.reshape(-1, 1, 1, 1) * masks["0.0.weight"]
        for name in named:
            if name.endswith(".norms.0.weight"):
                block = name.removesuffix("norms.0.weight")
                inside, after = stays[name], stays[f"{block}last.weight"]
                around = {"convs.0": (before, inside), "convs.1": (inside, after)}
                around["shortcut.0"] = (before, after)
                for conv, (read, written) in around.items():
                    if f"{block}{conv}.weight" in masks:
                        mask = written.reshape(-1, 1, 1, 1) * read.reshape(1, -1, 1, 1)
                        masks[f"{block}{conv}.weight"] = mask * masks[f"{block}{conv}.weight"]
                before = after
    return masks


def selective(model: nn.Module, masks: Masks, a: float) -> Tensor:
    squares = [(p * (1 - masks[n])).square().sum() for n, p in named(model)]
    return DECAY * a / 2 * torch.stack(squares).sum()


def smooth_l1(model: nn.Module, strength: float) -> Tensor:
    x = torch.cat([p[:] for n, p in named(model) if of_prunable(n) and n.endswith("weight")])
    return strength * (x[x.abs() <= 1].square().sum() + x[x.abs() > 1].sum())


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


@torch.no_grad()
def cut(model: nn.Module, masks: Masks) -> None:
    for name, parameter in model.named_parameters():
        parameter.mul_(masks[name])


def rate(epoch: int, epochs: int) -> float:
    return RATE * 0.1 ** ((epoch >= epochs // 3) + (epoch >= 2 * epochs // 3))


class Reference:
    """The authors' training loop; `wanted` makes masks for a target in thousandths."""

    def __init__(self, model: nn.Module, wanted: Callable[[nn.Module, float], Masks]) -> None:
        self.model, self.wanted, self.epoch = model, wanted, 0
        self.selected: list[Masks] = []  # the masks of SWD at each step
        self.new_optimizer()

    def new_optimizer(self) -> None:
        self.optimizer = SGD(self.model.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY)

    def train(
        self,
        epochs: int,
        rates: Callable[[int], float],
        penalty: Callable[[int], Tensor | float] = lambda step: 0.0,
        masks: Masks | None = None,
        soft: float | None = None,
    ) -> None:
        for epoch in range(epochs):
            self.optimizer.param_groups[0]["lr"] = rates(epoch)
            if soft is not None:
                cut(self.model, self.wanted(self.model, soft))
            for i in range(BATCHES):
                if masks:
                    cut(self.model, masks)
                images, labels = batch(self.epoch * BATCHES + i)
                self.optimizer.zero_grad()
                loss = cross_entropy(self.model(images), labels)
                (loss + penalty(epoch * BATCHES + i)).backward()
                self.optimizer.step()
            if masks:
                cut(self.model, masks)
            self.epoch += 1

    def swd(self, target: float) -> None:
        def penalty(step: int) -> Tensor:
            self.selected.append(self.wanted(self.model, target))
            a = 0.1 * math.exp(step * math.log(1e5 / 0.1) / (EPOCHS * BATCHES))
            return selective(self.model, self.selected[-1], a)

        self.train(EPOCHS, partial(rate, epochs=EPOCHS), penalty)
        cut(self.model, self.wanted(self.model, target))

    def cuts(self, target: float, iterations: int, l1: float = 0.0, rewind: bool = False) -> None:
        def penalty(step: int) -> Tensor:
            return smooth_l1(self.model, l1)

        self.train(EPOCHS, partial(rate, epochs=EPOCHS), penalty)
        for i in range(iterations):
            rates = partial(rate, epochs=TUNE) if rewind and not i else lambda epoch: RATE / 100
            if rewind and not i:
                self.new_optimizer()
            masks = self.wanted(self.model, int((i + 1) * (target / iterations)))
            again = penalty if i + 1 < iterations else lambda step: 0.0
            self.train(TUNE, rates, again, masks)

    def soft(self, target: float) -> None:
        self.train(EPOCHS, partial(rate, epochs=EPOCHS), soft=target)
        cut(self.model, self.wanted(self.model, target))


# The library, on the same images ------------------------------------------------------------------


class Batches:
    """The images of `batch` as a dataset."""

    device = torch.device("cpu")

    def steps(self, batch_size: int, *, world: int = 1) -> int:
        return BATCHES

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, **share: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return (batch(epoch * BATCHES + i) for i in range(start, BATCHES))

    def test_batches(self, batch_size: int, **share: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield batch(-1)


class Recording(SelectiveWeightDecay):
    """SWD that keeps what it selected at each step, by its fast way."""

    def _selected_weights(self) -> list[Any]:
        found = super()._selected_weights()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        seen = [
            (names[id(p)], s if isinstance(s, Tensor) else p.detach().abs() < s) for p, s in found
        ]
        history.append({name: chosen.clone() for name, chosen in seen})
        return found


history: list[Masks] = []
STRUCTURES: dict[str, Callable[[nn.Module, float], Masks]] = {
    "tessier_parameters": unstructured,
    "tessier_scales": structured,
    "tessier_filters": partial(structured, filters=True),
}


def phases(method: str, structure: str, sparsity: float) -> list[Phase]:
    of, lr = published.STRUCTURES[structure](None), Steps(RATE, 0.1, (1 / 3, 2 / 3))
    if method == "swd":
        at = (EPOCHS // 3 / EPOCHS, 2 * EPOCHS // 3 / EPOCHS)
        first, last = swd_recipe(EPOCHS, Steps(RATE, 0.1, at), sparsity, of)
        assert isinstance(first, Train) and isinstance(first.penalty, partial)
        recording = partial(Recording, **first.penalty.keywords)
        return [Train(first.epochs, first.lr, recording), last]
    if method == "soft":
        return published.soft(EPOCHS, lr, sparsity, of)
    more = {"l1": 1e-2} if method != "han2015" else {}
    return published.REFERENCES[method](EPOCHS, lr, sparsity, of, TUNE, 2, **more)


def compare(method: str, structure: str, width: int, sparsity: float = 0.9) -> dict[str, float]:
    """How far the library and the reference differ, and what both keep."""
    torch.manual_seed(0)
    model = build_model("tessier_resnet20", width=width, size=8).double()
    reference = Reference(copy.deepcopy(model), STRUCTURES[structure])
    target = round(1000 * sparsity, 9)
    if method == "swd":
        reference.swd(target)
    elif method == "soft":
        reference.soft(target)
    else:
        by_scale = structure != "tessier_parameters"
        l1 = 1e-2 if method == "liu2017" or (method == "renda2020" and by_scale) else 0.0
        reference.cuts(target, 2, l1, rewind=method == "renda2020")
    history.clear()
    train(model, Batches(), phases(method, structure, sparsity), progress=False)
    pairs = zip(model.parameters(), reference.model.parameters(), strict=True)
    theirs, ours = reference.selected, history
    return {
        "steps with another w*": sum(_differ(t, o) for t, o in zip(theirs, ours, strict=True)),
        "weights differ by": max(float((a - b).abs().max().detach()) for a, b in pairs),
        "masks differ in": sum(
            int(((a != 0) != (b != 0)).sum())
            for a, b in zip(model.parameters(), reference.model.parameters(), strict=True)
        ),
        "kept, reference": kept(reference.model)["kept_parameters"],
        "kept, library": kept(model)["kept_parameters"],
        "estimate, reference": estimate(reference.model, 0.0),
        "estimate, library": published.published_count(
            model, [int((g.parameter != 0).sum()) for g in published.tessier_scales(model)]
        ),
    }


def _differ(stays: Masks, selected: Masks) -> bool:
    return any(bool((selected[n] != (stays[n] == 0)).any()) for n in selected)


CASES = [
    *(("swd", structure) for structure in STRUCTURES),
    *((method, "tessier_parameters") for method in ("han2015", "renda2020", "soft")),
    *((method, "tessier_scales") for method in published.REFERENCES),
]


def main() -> None:
    for width in (4, 8):
        for method, structure in CASES:
            found = compare(method, structure, width)
            print(f"{method} of {structure}, {width} maps")
            for name, value in found.items():
                print(f"    {name:24} {value:,.3g}" if value < 1 else f"    {name:24} {value:,}")


if __name__ == "__main__":
    main()
