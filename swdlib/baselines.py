"""Baselines: what the methods that SWD is compared with do at an optimizer's steps."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from swdlib import hooks
from swdlib.criteria import batch_norm_scale
from swdlib.masks import apply_, find_groups, removed_weights
from swdlib.schedules import check_not_negative
from swdlib.structures import Coupled, Group, Structure


class _Masking(hooks.SelectingMethod):
    """A method that chooses masks after every `every` steps, and after the last."""

    def selected(self) -> list[Tensor]:
        """The units that the masks remove; none before the first choice."""
        return self.units

    def _choose(self) -> bool:
        """Count a step and, if it is time, choose masks; whether it was."""
        self.step += 1
        if self.step % self.every and self.step != self.steps:
            return False
        self.units = self._select_units()
        gone = removed_weights(self._masked(), self.units)
        self.masks = {name: ~weights for name, weights in gone.items()}
        return True

    def _masked(self) -> list[Group]:
        """The groups whose weights the masks are of."""
        return self.groups


class GradualPruning(_Masking):
    """Sets the lowest-scored weights to zero while a network trains (Zhu & Gupta 2017).

    After every `every` steps, and after the last, it selects new masks at the sparsity that the
    schedule has then. In between, masked weights stay zero (arXiv 1710.01878). With `soft` they are
    trained on and may return (He et al. 2018, arXiv 1808.06866); of a filter, only its own weights
    are then set to zero, since it could not return without its batch norm.

    The arguments that choose what is removed, and when, are those of `swd.SelectiveWeightDecay`.
    """

    def __init__(
        self, model: nn.Module, *, every: int = 100, soft: bool = False, **arguments: Any
    ) -> None:
        super().__init__(model, every=every, **arguments)
        self.soft = soft

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        if self.soft:
            self.masks = {}
        else:  # first, since the step has moved masked weights, which must not change their rank
            apply_(self.model, self.masks)
        if optimizer is self._optimizers[-1] and self._choose():
            apply_(self.model, self.masks)

    def _masked(self) -> list[Group]:
        return [_own_weights(group) for group in self.groups] if self.soft else self.groups


class DenseFeedback(_Masking):
    """Trains dense weights with the gradients of the pruned network (Lin et al. 2020).

    Between steps the model holds the pruned weights, so that loss and gradients are theirs. Each
    step is applied to the dense weights, and after every `every` steps, and after the last, the
    mask is chosen from them: what was pruned may return (arXiv 2006.07253).

    The arguments that choose what is removed, and when, are those of `swd.SelectiveWeightDecay`.
    """

    def __init__(self, model: nn.Module, *, every: int = 16, **arguments: Any) -> None:
        super().__init__(model, every=every, **arguments)
        self.dense: dict[str, Tensor] = {}  # what the next step starts from; empty before the first

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return hooks.after_backward(args, kwargs, self._restore, self.remedy)

    @torch.no_grad()
    def _restore(self) -> None:
        for name, weights in self.dense.items():
            self.parameters[name].copy_(weights)
        self.dense = {}  # where several optimizers step in turn, the first restores

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        if optimizer is not self._optimizers[-1]:
            return
        self._choose()
        self.dense = {name: p.detach().clone() for name, p in self.parameters.items()}
        apply_(self.model, self.masks)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the dense weights too."""
        return {**super().state_dict(), "dense": dict(self.dense)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError if it does not fit this method or model."""
        dense = state.get("dense", {})
        super().load_state_dict({name: held for name, held in state.items() if name != "dense"})
        wanted = {name: p.shape for name, p in self.parameters.items()}
        if dense and {name: weights.shape for name, weights in dense.items()} != wanted:
            raise ValueError(f"dense weights must be of {sorted(wanted)}, in their shapes")
        device = {name: p.device for name, p in self.parameters.items()}
        self.dense = {name: w.to(device[name], copy=True) for name, w in dense.items()}


def _own_weights(group: Group) -> Group:
    if not isinstance(group, Coupled):
        return group
    return replace(group, parts=tuple(part for part in group.parts if part.role == "weight"))


class BatchNormL1(hooks.Method):
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
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.affine]
        self.scales = [norm.weight for norm in norms if norm.weight.requires_grad]
        if not self.scales:
            raise ValueError(
                f"{type(model).__name__} has no trainable batch-norm scales to penalise: use a "
                "network with batch normalisation (affine=True), or another method"
            )
        self.groups = find_groups(model, structure)
        for group in self.groups:
            group.scores(batch_norm_scale)  # ValueError now and not once training has ended

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        hooks.require_unscaled(optimizer)
        add = partial(self._add_gradients, hooks.owned_by(optimizer))
        return hooks.after_backward(args, kwargs, add, self.remedy)

    @torch.no_grad()
    def _add_gradients(self, owned: set[int]) -> None:
        for scale in self.scales:
            if scale.grad is not None and id(scale) in owned:
                scale.grad.add_(self.slope(scale), alpha=self.l1)

    def slope(self, scale: Tensor) -> Tensor:
        """The derivative of the penalty by a scale, without `l1`."""
        return scale.sign()

    def report(self) -> dict[str, float]:
        """What a record keeps of it: the mean size of a scale."""
        return {"mean_scale": float(torch.cat([s.detach().abs() for s in self.scales]).mean())}
