"""Baselines: what the methods that SWD is compared with attach to an optimizer."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from swdlib import joins
from swdlib.allocations import Allocation, together
from swdlib.criteria import Criterion, batch_norm_scale, magnitude
from swdlib.masks import (
    Masks,
    apply_,
    check_reachable,
    check_sparsity,
    find_groups,
    fitted,
    removed_weights,
    select_units,
)
from swdlib.movement import Movement, fitted_units
from swdlib.penalties import SelectiveWeightDecay
from swdlib.schedules import Schedule, as_schedule, check_not_negative
from swdlib.structures import Coupled, Group, Structure, weights


class GradualPruning(joins.Joined):
    """Sets the lowest-scored weights to zero while a network trains (Zhu & Gupta 2017).

    After every `every` steps, and after the last, the masks are chosen anew at the sparsity that
    the schedule has then. Between, what is masked stays zero (arXiv 1710.01878). With `soft` it is
    trained on and may return (He et al. 2018, arXiv 1808.06866): of a filter only its own weights
    are then set to zero, as it could not return without its batch norm.

    Args:
        model: any module; it is neither wrapped nor renamed.
        sparsity: fraction of prunable weights to remove, in [0, 1), or a schedule of it.
        steps: optimizer steps over which the schedule runs, at least 1.
        every: steps from one choice of masks to the next, at least 1.
        structure: what is pruned together.
        criterion: what is pruned first: the lowest scores.
        allocation: how scores of different layers compare; by default as they are.
        soft: whether pruned weights may return.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float | Schedule,
        steps: int,
        every: int = 100,
        structure: Structure = weights,
        criterion: Criterion = magnitude,
        allocation: Allocation = together,
        soft: bool = False,
    ) -> None:
        super().__init__(model)
        self.groups = find_groups(model, structure)
        self.criterion, self.allocation = criterion, allocation
        self._sparsity = as_schedule(sparsity, check_sparsity)
        self.steps, self.every = _count("steps", steps), _count("every", every)
        self.soft = soft
        self.step = 0
        self._chosen: list[Tensor] = []  # the units of the masks
        self._movement = Movement()
        for progress in (0.0, 1.0):  # a schedule's mistakes come to light before training starts
            check_sparsity(self._sparsity(progress))
        check_reachable(self.groups, self._sparsity(1.0), allocation)

    @property
    def sparsity(self) -> float:
        """The sparsity that masks are chosen for now."""
        return check_sparsity(self._sparsity(min(self.step / self.steps, 1.0)))

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        self.step += 1
        if self.soft:
            self.masks = {}
        else:  # first: the step has moved what is masked, which must not rank by that
            apply_(self.model, self.masks)
        if self.step % self.every == 0 or self.step == self.steps:
            self.masks = self._choose()
            apply_(self.model, self.masks)

    def _choose(self) -> Masks:
        units = select_units(self.groups, self.sparsity, self.criterion, self.allocation)
        self._chosen = units
        cut = [_own_weights(group) for group in self.groups] if self.soft else self.groups
        return {name: ~gone for name, gone in removed_weights(cut, units).items()}

    def report(self) -> dict[str, float]:
        """What a record keeps of it now: the target, and what moved in and out of the masks.

        See `Movement.report`; movement counts from the report before.
        """
        moved = self._movement.report(self.groups, self._chosen) if self._chosen else {}
        return {"target": self.sparsity, **moved}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, the masks, their units and those last reported."""
        return {
            "step": self.step,
            "masks": dict(self.masks),
            "chosen": self._chosen,
            "reported": self._movement.units,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError if it does not fit the model."""
        joins.require_state("a pruner", state, "step", "masks", "chosen", "reported")
        masks = fitted(state["masks"], dict(self.model.named_parameters()))
        chosen, reported = (fitted_units(self.groups, state[k]) for k in ("chosen", "reported"))
        self.step, self.masks = state["step"], masks
        self._chosen, self._movement.units = chosen, reported


class RareSelection(SelectiveWeightDecay):
    """SWD that chooses w* anew only every `every` steps and penalises the same weights between.

    What is done to save the cost of choosing; beside SWD, which chooses at every step, it shows
    what that loses.
    """

    def __init__(self, model: nn.Module, *, every: int, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self.every = _count("every", every)
        self._held: list[Tensor] = []

    def _units(self) -> list[Tensor]:
        if self.step % self.every == 0 or not self._held:
            self._held = super()._units()
        return self._held

    def _by_magnitude(self) -> None:
        return None  # the fast way keeps no units

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: also the units that are penalised now."""
        return {**super().state_dict(), "held": list(self._held)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError if it does not fit this penalty or model."""
        own = {name: value for name, value in state.items() if name != "held"}
        held = fitted_units(self.groups, state.get("held", []))
        super().load_state_dict(own)
        self._held = held


def _own_weights(group: Group) -> Group:
    if not isinstance(group, Coupled):
        return group
    return replace(group, parts=tuple(part for part in group.parts if part.role == "weight"))


class BatchNormL1(joins.Joined):
    """An L1 penalty on the scales of batch normalisation (Liu et al. 2017, arXiv 1708.06519).

    The gradient of every scale gains `l1` times the scale's sign, so that the scales of channels
    that matter little go to zero.

    Args:
        model: a module with batch-norm layers that have scales.
        l1: strength of the penalty; published 1e-4 (VGG-19) and 1e-5 (ResNet-164).
        structure: what the scales will be used to rank; ValueError if its units have none.
    """

    def __init__(self, model: nn.Module, *, l1: float = 1e-4, structure: Structure) -> None:
        super().__init__(model)
        self.l1 = check_not_negative("l1", l1)
        self.scales = _scales(model)
        for group in find_groups(model, structure):
            group.scores(batch_norm_scale)  # so that a mistake is told before training starts

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        joins.require_unscaled(optimizer)
        add = partial(self._add_gradients, joins.owned_by(optimizer))
        return joins.after_backward(args, kwargs, add, self.remedy)

    @torch.no_grad()
    def _add_gradients(self, owned: set[int]) -> None:
        for scale in self.scales:
            if scale.grad is not None and id(scale) in owned:
                scale.grad.add_(scale.sign(), alpha=self.l1)

    def report(self) -> dict[str, float]:
        """What a record keeps of it: the mean size of a scale."""
        return {"mean_scale": float(torch.cat([s.detach().abs() for s in self.scales]).mean())}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError if it holds anything."""
        if state:
            raise ValueError(f"the state of an L1 penalty is empty, not of {sorted(state)}")


def _scales(model: nn.Module) -> list[nn.Parameter]:
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.affine]
    scales = [layer.weight for layer in layers if layer.weight.requires_grad]
    if not scales:
        raise ValueError(
            f"{type(model).__name__} has no trainable batch-norm scales to penalise: use a network "
            "with batch normalisation (affine=True), or another method"
        )
    return scales


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value
