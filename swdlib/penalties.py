"""Penalties: terms of the loss that prepare a network for pruning while it trains."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swdlib import joins
from swdlib.allocations import Allocation, together
from swdlib.criteria import Criterion, magnitude
from swdlib.masks import (
    Masks,
    apply_,
    are_single,
    check_reachable,
    check_sparsity,
    find_groups,
    fitted,
    parameters_of,
    prunable,
    removed_weights,
    select,
    select_units,
)
from swdlib.movement import Movement, fitted_units
from swdlib.radix import masks_without_waiting
from swdlib.schedules import Exponential, Schedule, as_schedule, check_not_negative
from swdlib.selection import Threshold, are_alike
from swdlib.structures import Structure, weights
from swdlib.updates import add_, add_compiled_, divide_

Update = Literal["gradient", "proximal"]

PUBLISHED = Exponential(0.1, 1e5)


class SelectiveWeightDecay(joins.Joined):
    """A weight decay that grows on the weights that would be pruned now (Tessier et al. 2022).

    The loss gains `a(t) * mu / 2 * ||w*||^2` (arXiv 2011.10520, equation 2): t is the share of
    `steps` that is done, a(t) the `strength`, mu the `weight_decay`, and w* the weights that
    pruning to `sparsity` would remove, chosen anew at every step. The optimizer's own weight decay,
    which acts on all weights, stays as it is.

    Args:
        model: any module; it is neither wrapped nor renamed.
        sparsity: fraction of prunable weights to remove, in [0, 1), or a schedule of it.
        steps: optimizer steps over which the strength grows, at least 1.
        weight_decay: mu.
        strength: a number or a schedule of a; the published one is Exponential(0.1, 1e5).
        structure: what is pruned together.
        criterion: what is pruned first: the lowest scores.
        allocation: how scores of different layers compare; by default as they are.
        update: "gradient" adds a*mu*w* to the gradients before the step, as published; "proximal"
            divides w* by 1 + lr*a*mu after the step, which no strength can make diverge.

    Raises ValueError or TypeError for an argument that is not allowed, and ValueError at a step at
    which a weight is NaN or infinite: on a CPU until `prune()`; on a GPU `report()` tells.
    """

    remedy = joins.BY_HAND

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float | Schedule,
        steps: int,
        weight_decay: float = 5e-4,
        strength: float | Schedule = PUBLISHED,
        structure: Structure = weights,
        criterion: Criterion = magnitude,
        allocation: Allocation = together,
        update: Update = "gradient",
    ) -> None:
        super().__init__(model)
        self.groups = find_groups(model, structure)
        self.parameters = parameters_of(self.groups)
        self.criterion = criterion
        self.allocation = allocation
        self._sparsity = as_schedule(sparsity, check_sparsity)
        self._strength = as_schedule(strength, _check_strength)
        self.steps = steps
        self.weight_decay = weight_decay
        self.update = update
        self.step = 0
        self._movement = Movement()
        self._threshold = Threshold()
        self._plain = criterion is magnitude and allocation is together and are_single(self.groups)
        self._owned: set[int] = set()
        self._check()

    def _check(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(
                f"steps must be a whole number of at least 1, not {self.steps!r}; "
                "usually epochs * len(loader)"
            )
        check_not_negative("weight_decay", self.weight_decay)
        for name, home in (("criterion", "criteria"), ("allocation", "allocations")):
            if not callable(value := getattr(self, name)):
                raise TypeError(f"{name} must be a function of swdlib.{home}, not {value!r}")
        if self.update not in get_args(Update):
            raise ValueError(f"update must be one of {get_args(Update)}, not {self.update!r}")
        for progress in (0.0, 1.0):  # a schedule's mistakes come to light before training starts
            check_sparsity(self._sparsity(progress))
            _check_strength(self._strength(progress))
        check_reachable(self.groups, self._sparsity(1.0), self.allocation)

    @property
    def progress(self) -> float:
        """The share of `steps` that is done, in [0, 1]."""
        return min(self.step / self.steps, 1.0)

    @property
    def sparsity(self) -> float:
        """The sparsity that w* is chosen for now."""
        return check_sparsity(self._sparsity(self.progress))

    @property
    def strength(self) -> float:
        """The strength a now."""
        return _check_strength(self._strength(self.progress))

    def penalty(self) -> Tensor:
        """The term that the loss gains, a * mu / 2 * ||w*||^2, through autograd.

        Slow and obvious: for reading, and for testing the fast path against. A loop that adds it to
        its loss calls `advance()` after each step instead of `attach(optimizer)`.
        """
        masks = self._select(self.sparsity)
        squares = [(p * ~masks[name]).square().sum() for name, p in self.parameters.items()]
        device = squares[0].device
        norm = torch.stack([square.to(device) for square in squares]).sum()
        return 0.5 * self.strength * self.weight_decay * norm

    def compile(self) -> None:
        """Use compiled code for single weights that rank by magnitude, on a CPU; it selects alike.

        It needs a C++ compiler, and at the first steps half a minute for a network like ResNet-50.
        """
        self._threshold.compiled = True

    def advance(self) -> None:
        """Count an optimizer step."""
        self.step += 1

    def attach(self, optimizer: Optimizer) -> None:
        """Join an optimizer: from now on each of its steps applies the penalty.

        It acts once a step, after gradients are accumulated, unscaled and clipped; a step that a
        GradScaler skips does not count. A weight that another optimizer steps is left alone.

        Raises TypeError for what is no optimizer, and for one that evaluates the loss several times
        a step (LBFGS), takes sparse gradients only or has sharded parameters; ValueError if it has
        none of the prunable parameters, if the penalty is attached already and, at the first step,
        if a fused optimizer is left to unscale its gradients itself.
        """
        super().attach(optimizer)

    def _require_fit(self, optimizer: Optimizer) -> None:
        joins.require_joinable(optimizer, self.update)
        self._owned = joins.owned_by(optimizer)
        if not any(id(parameter) in self._owned for parameter in self.parameters.values()):
            raise ValueError(
                f"the {type(optimizer).__name__} has none of the {len(self.parameters)} prunable "
                f"parameters of {type(self.model).__name__}; build it from model.parameters() "
                "(FSDP and DeepSpeed put others in their place: use DistributedDataParallel)"
            )

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._owned = joins.owned_by(optimizer)  # it may grow
        if self.masks or self.update != "gradient":
            return None
        joins.require_unscaled(optimizer)
        return joins.after_backward(args, kwargs, self._add_gradients, self.remedy)

    @torch.no_grad()
    def _add_gradients(self) -> None:
        scale = self.strength * self.weight_decay
        updates = [(_gradient(p), p, chosen) for p, chosen in self._selected()]
        if self._threshold.compiled:
            add_compiled_(updates, scale)
            return
        for gradient, parameter, chosen in updates:
            add_(gradient, parameter, chosen, scale)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        if self.masks:  # momentum and decay must not revive what was pruned
            apply_(self.model, self.masks)
        elif self.update == "proximal":
            self._shrink(optimizer)
        self.advance()

    def _shrink(self, optimizer: Optimizer) -> None:
        rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        scale = self.strength * self.weight_decay
        for parameter, chosen in self._selected():
            divide_(parameter, chosen, 1.0 + rates[id(parameter)] * scale)

    def _selected(self) -> list[tuple[nn.Parameter, Tensor | float]]:
        """Parameters and which of their weights are in w*, as `updates` takes it."""
        chosen = self._by_magnitude()
        if chosen is None:
            chosen = [*removed_weights(self.groups, self._units()).values()]
        pairs = zip(self.parameters.values(), chosen, strict=True)
        return [(p, c) for p, c in pairs if p.requires_grad and id(p) in self._owned]

    def _by_magnitude(self) -> Sequence[Tensor | float] | None:
        """w* of single weights that rank by magnitude, with no mask made; None for all else."""
        parameters = [*self.parameters.values()]
        count = round(self.sparsity * prunable(self.groups))
        if not (self._plain and count and are_alike(parameters)):
            return None
        if parameters[0].is_cuda:
            return masks_without_waiting(parameters, count)
        lowest = self._threshold.find(parameters, count)
        if lowest is None:  # a weight is NaN or infinite, and will be named
            return None
        return [lowest.chosen(i, parameter) for i, parameter in enumerate(parameters)]

    def _units(self) -> list[Tensor]:
        return select_units(self.groups, self.sparsity, self.criterion, self.allocation)

    def _select(self, sparsity: float) -> Masks:
        return select(self.groups, sparsity, self.criterion, self.allocation)

    def prune(self) -> Masks:
        """Set w* to zero at the final sparsity and return the masks, True where a weight stays.

        Weights stay zero through later steps of an attached optimizer; the penalty then rests. A
        criterion that reads gradients, as saliency does, finds the penalty in those of the last
        step: call `zero_grad()` and `backward()` once more before.
        """
        self.masks = self._select(self._sparsity(1.0))
        apply_(self.model, self.masks)
        return self.masks

    def report(self) -> dict[str, float]:
        """What a record keeps of the penalty now: strength, target and what moved in and out of w*.

        See `Movement.report`; movement counts from the report before.
        """
        moved = self._movement.report(self.groups, self._units())
        return {"strength": self.strength, "target": self.sparsity, **moved}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, the masks once pruned, the units last reported."""
        return {"step": self.step, "masks": dict(self.masks), "reported": self._movement.units}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError if it does not fit this penalty or model."""
        joins.require_state("a penalty", state, "step", "masks", "reported")
        masks, reported = state["masks"], state["reported"]
        if masks and set(masks) != set(self.parameters):
            raise ValueError(f"masks must be of {sorted(self.parameters)}, not of {sorted(masks)}")
        masks = fitted(masks, self.parameters)
        reported = fitted_units(self.groups, reported)
        self.step, self.masks = state["step"], masks
        self._movement.units = reported


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient, made if there is none or no sum fits in it."""
    if parameter.grad is None:  # the penalty alone gives a gradient, as in autograd
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:  # of nn.Embedding(sparse=True)
        parameter.grad = parameter.grad.to_dense()
    return parameter.grad


def _check_strength(strength: float) -> float:
    return check_not_negative("strength", strength)
