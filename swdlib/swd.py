"""Selective weight decay: the weights that pruning would remove decay more and more."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swdlib import hooks
from swdlib.criteria import Criterion, magnitude
from swdlib.fast import Selected, Threshold, add_, are_alike, divide_, lowest_on_gpu, radix_select
from swdlib.masks import Allocation, Masks, apply_, are_single, removed_weights, select, together
from swdlib.schedules import Exponential, Schedule, as_schedule, check_not_negative
from swdlib.structures import Single, Structure, weights


def penalty(
    weights: Sequence[Tensor],
    sparsity: float,
    strength: float,
    weight_decay: float,
    selected: Tensor | None = None,
) -> Tensor:
    """What SWD adds to the loss: a * mu / 2 * ||w*||^2, a 0-d tensor. This is the whole method.

    w* are the weights that pruning to `sparsity` would remove: over all `weights`, the smallest
    magnitudes, or what `selected` says, an index of all weights in a row. `strength` is a,
    `weight_decay` is mu. Training selects w* again, and raises a, at every step.
    Source: arXiv 2011.10520, equation 2.
    """
    flat = torch.cat([w.flatten() for w in weights])
    if selected is None:
        selected = flat.detach().abs().argsort(stable=True)[: round(sparsity * len(flat))]
    return 0.5 * strength * weight_decay * flat[selected].square().sum()


# The rest of this file makes that penalty fit any training loop, structure and criterion.

PUBLISHED = Exponential(0.1, 1e5)

# A cut is neutral if the norm of what it removes is at most this share of the norm of all weights.
# Runs with the published strengths end at 0.03 or less.
NEUTRAL = 0.1


class NotNeutral(UserWarning):
    """`SelectiveWeightDecay.prune()` cut weights that training had not made small."""


Update = Literal["gradient", "proximal"]


class SelectiveWeightDecay(hooks.SelectingMethod):
    """The penalty for a training loop: attach it to the optimizer, train, then `prune()`.

    The strength a(t) grows while training goes on, t being the share of `steps` that is done. The
    optimizer's own weight decay, which acts on all weights, stays as it is.

    Args:
        model: any module; it is neither wrapped nor renamed.
        sparsity: fraction of prunable weights to remove, in [0, 1), or a schedule of it.
        steps: optimizer steps over which the strength grows, at least 1.
        weight_decay: mu.
        strength: a number or a schedule of a; the published one is Exponential(0.1, 1e5).
        every: steps from one choice of w* to the next; published 1.
        structure: what is pruned together.
        criterion: what is pruned first: the lowest scores.
        allocation: how scores of different layers compare; by default as they are.
        update: "gradient" adds a*mu*w* to the gradients before the step, as published; "proximal"
            divides w* by 1 + lr*a*mu after the step, which no strength can make diverge.

    Raises ValueError or TypeError for an argument that is not allowed. A weight that is NaN or
    infinite raises ValueError at the next step on a CPU, and at `report()` or `prune()` on a GPU.
    """

    remedy = hooks.BY_HAND

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float | Schedule,
        steps: int,
        weight_decay: float = 5e-4,
        strength: float | Schedule = PUBLISHED,
        every: int = 1,
        structure: Structure = weights,
        criterion: Criterion = magnitude,
        allocation: Allocation = together,
        update: Update = "gradient",
    ) -> None:
        super().__init__(
            model,
            sparsity=sparsity,
            steps=steps,
            every=every,
            structure=structure,
            criterion=criterion,
            allocation=allocation,
        )
        if update not in get_args(Update):
            raise ValueError(f"update must be one of {get_args(Update)}, not {update!r}")
        self.update = update
        self.weight_decay = check_not_negative("weight_decay", weight_decay)
        self._strength = as_schedule(strength, _check_strength)
        self._threshold = Threshold()
        usual = criterion is magnitude and allocation is together and every == 1
        self._is_fast = usual and are_single(self.groups)
        singles = [group for group in self.groups if isinstance(group, Single)]
        self._ranked = [single.parameter for single in singles if usual and single.ranked]
        self._owned: set[int] = set()

    @property
    def strength(self) -> float:
        """The strength a now."""
        return _check_strength(self._strength(self.progress))

    def penalty(self) -> Tensor:
        """The penalty now, through autograd: the function `penalty`, with this structure's w*.

        Slow and obvious, it is what the fast path is tested against. A loop that adds it to its
        loss calls `advance()` after each step, in place of `attach(optimizer)`.
        """
        device = next(iter(self.parameters.values())).device
        parameters = [parameter.to(device) for parameter in self.parameters.values()]
        selected = torch.cat([mask.flatten().to(device) for mask in self._selected_masks()])
        return penalty(parameters, self.sparsity, self.strength, self.weight_decay, selected)

    def advance(self) -> None:
        """Count an optimizer step."""
        self.step += 1

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        hooks.require_hookable(optimizer, self.update)
        super()._check_optimizer(optimizer)
        self._owned = hooks.owned_by(optimizer)

    def _acts_on(self) -> Iterable[Tensor]:
        return self.parameters.values()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._owned = hooks.owned_by(optimizer)  # parameter groups may be added between steps
        if self.masks or self.update != "gradient":
            return None
        hooks.require_unscaled(optimizer)
        return hooks.after_backward(args, kwargs, self._add_gradients, self.remedy)

    @torch.no_grad()
    def _add_gradients(self) -> None:
        scale = self.strength * self.weight_decay
        for parameter, selected in self._selected_weights():
            add_(_gradient(parameter), parameter, selected, scale)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        if self.masks:  # momentum and decay must not revive what was pruned
            apply_(self.model, self.masks)
            if hasattr(optimizer, "eval"):  # schedule-free: it swaps the weights for an average
                hooks.hold_state(optimizer, self.model, self.masks)
        elif self.update == "proximal":
            rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
            scale = self.strength * self.weight_decay
            for parameter, selected in self._selected_weights():
                divide_(parameter, selected, 1.0 + rates[id(parameter)] * scale)
        if optimizer is self._optimizers[-1]:
            self.advance()

    def _selected_weights(self) -> list[tuple[nn.Parameter, Selected]]:
        """w* of each parameter that the optimizer steps, found in the fastest way there is."""
        selected = self._selected_fast() or self._selected_masks()
        pairs = zip(self.parameters.values(), selected, strict=True)
        return [(p, s) for p, s in pairs if p.requires_grad and id(p) in self._owned]

    def _selected_masks(self) -> list[Tensor]:
        """w* for any structure and criterion: a bool tensor for each parameter."""
        return [*removed_weights(self.groups, self.selected()).values()]

    def _selected_fast(self) -> Sequence[Selected] | None:
        """w* of single weights by magnitude, without making masks; None where that cannot be."""
        parameters = [*self.parameters.values()]
        if not ((self._is_fast or self._ranked) and are_alike(parameters)):
            return None
        if self._ranked:
            return self._below_threshold(parameters)
        count = round(self.sparsity * self.prunable)
        if not count:
            return None
        if parameters[0].is_cuda:
            return lowest_on_gpu(parameters, count)
        lowest = self._threshold.find(parameters, count)
        if lowest is None:  # the general way finds and names the weight that is not finite
            return None
        return [lowest.selected(i, parameter) for i, parameter in enumerate(parameters)]

    def _below_threshold(self, parameters: list[nn.Parameter]) -> Sequence[Selected] | None:
        """As `structures.below_threshold`; None if a ranked weight is not finite."""
        count = int(self.sparsity * sum(p.numel() for p in self._ranked)) + 1
        if parameters[0].is_cuda:
            threshold, _ = radix_select([p.detach().flatten() for p in self._ranked], count)
            return [parameter.detach().abs() < threshold for parameter in parameters]
        lowest = self._threshold.find(self._ranked, count)
        return [lowest.threshold] * len(parameters) if lowest else None

    def prune(self) -> Masks:
        """Set w* to zero at the final sparsity and return the masks, True where a weight stays.

        Weights stay zero through later steps of an attached optimizer; the penalty then rests. A
        criterion that reads gradients, such as saliency, finds the penalty in those of the last
        step: call `zero_grad()` and `backward()` once more before.

        Warns with `NotNeutral`, and says what may be the reason, if the cut removes weights that
        are not small. ValueError, and nothing is cut, if a parameter was replaced since this was
        made, or frozen while its weights were not small.
        """
        masks = select(self.groups, self._sparsity(1.0), self.criterion, self.allocation)
        self._check_cut(masks)
        apply_(self.model, masks)
        for optimizer in (*self._optimizers, *self._wrappers):
            hooks.hold_state(optimizer, self.model, masks)
        self.masks = masks
        return masks

    @torch.no_grad()
    def _check_cut(self, masks: Masks) -> None:
        """Refuse a cut where nothing was pressed; tell of one that is not neutral."""
        now = dict(self.model.named_parameters())
        if replaced := [n for n, p in self.parameters.items() if now.get(n) is not p]:
            raise ValueError(
                f"{', '.join(replaced[:3])} was replaced since this was made, so that nothing "
                "pressed it: change layers first, then make a new SelectiveWeightDecay and train"
            )
        weights = self.parameters.items()
        cut = {name: float((p * ~masks[name]).float().norm()) for name, p in weights}
        norm = math.hypot(*(float(p.detach().float().norm()) for _, p in weights))
        large = [name for name, of_cut in cut.items() if of_cut > NEUTRAL * norm]
        if frozen := [name for name in large if not now[name].requires_grad]:
            raise ValueError(
                f"{', '.join(frozen[:3])} was frozen before its weights were small, so that a cut "
                "would change the network: train it on, or freeze it first and make a new "
                "SelectiveWeightDecay, which leaves it alone"
            )
        if (of_all := math.hypot(*cut.values())) > NEUTRAL * norm:
            stepped = hooks.owned_by(*self._optimizers)
            alone = [name for name in large if id(now[name]) not in stepped]
            others = f", none of {', '.join(alone[:3])} by an attached optimizer" if alone else ""
            warnings.warn(
                f"prune() cuts weights that hold {of_all / norm:.0%} of the norm of all, so that "
                f"accuracy may fall: {self.step} of {self.steps} optimizer steps were counted"
                f"{others}, and the strength reached {self.strength:.3g}",
                NotNeutral,
                stacklevel=4,  # the caller of prune(); no_grad adds a frame
            )

    def report(self) -> dict[str, float]:
        """What a record keeps of the penalty now: its strength, and what its base reports."""
        return {"strength": self.strength, **super().report()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient, made or made dense if need be."""
    if parameter.grad is None:  # the penalty alone gives a gradient, as in autograd
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:  # of nn.Embedding(sparse=True)
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def _check_strength(strength: float) -> float:
    return check_not_negative("strength", strength)
