"""Joins: what a penalty has to know of the optimizer whose steps it joins."""

from collections.abc import Callable
from typing import Any, SupportsFloat

from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

BY_HAND = "add penalty() to the loss and call advance() after each step instead of attach()"


def stepping(optimizer: Any) -> Optimizer:
    """The optimizer that takes the steps: that of accelerate, Lightning and Fabric wraps it."""
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {optimizer!r}")
    if not hasattr(inner, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{type(inner).__name__} did not call Optimizer.__init__, so its steps cannot be "
            "joined: give the optimizer that it wraps"
        )
    return inner


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All that the optimizer steps, whatever group it is in."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def require_joinable(optimizer: Optimizer, update: str) -> None:
    """TypeError or ValueError, with the remedy, for an optimizer whose steps cannot be joined."""
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            f"{name} evaluates the loss several times a step and compares the values, which do not "
            f"hold the penalty: {BY_HAND}"
        )
    if isinstance(optimizer, SparseAdam) and update == "gradient":
        raise TypeError(
            f"{name} takes sparse gradients only and the penalty's is dense: use "
            "update='proximal', or another optimizer"
        )
    if any(hasattr(parameter, "full_tensor") for parameter in parameters_of(optimizer)):
        raise TypeError(
            f"the parameters of the {name} are sharded (DTensor), so that no process can rank all "
            "weights: train with DistributedDataParallel, not with FSDP or tensor parallelism"
        )
    rates = [group.get("lr") for group in optimizer.param_groups]
    if update == "proximal" and not all(isinstance(rate, SupportsFloat) for rate in rates):
        raise ValueError(
            f"update='proximal' needs a number 'lr' in each parameter group, and those of the "
            f"{name} are {rates}: set it, or use update='gradient'"
        )


def require_unscaled(optimizer: Optimizer) -> None:
    """ValueError if a GradScaler left it to the optimizer to unscale its gradients."""
    if getattr(optimizer, "grad_scale", None) is not None:
        raise ValueError(
            f"gradients are still scaled when a fused {type(optimizer).__name__} starts its step, "
            "so the penalty does not fit them: call scaler.unscale_(optimizer) before "
            "scaler.step(optimizer), build the optimizer with fused=False, or use update='proximal'"
        )


def require_once(begun: bool, optimizer: Optimizer) -> None:
    """TypeError if a step ends that has not `begun`: torch ran the hooks of one step twice."""
    if not begun:
        raise TypeError(
            f"the step() of {type(optimizer).__name__} calls the step() of the class it derives "
            f"from, and torch runs the hooks in both, so the penalty counts twice: {BY_HAND}"
        )


def skips(optimizer: Optimizer) -> bool:
    """Whether a GradScaler found an overflow and told the optimizer to change nothing.

    Only a fused optimizer is told; of others, the step is not even called.
    """
    return bool(getattr(optimizer, "found_inf", False))


def after_backward(args: Any, kwargs: Any, act: Callable[[], None]) -> Any:
    """Call `act` once the gradients are there: now, or when the closure of step() has run.

    `args`, which start with the optimizer, and `kwargs` are those of its step(); returns what a
    step pre-hook returns. Lightning's Trainer runs the backward pass in a closure.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        act()
        return None
    calls = 0

    def and_act() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise ValueError(
                f"the {type(args[0]).__name__} calls the closure of step() more than once, and "
                f"the losses that it compares do not hold the penalty: {BY_HAND}"
            )
        loss = closure()
        act()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": and_act}
    return (args[0], and_act, *args[2:]), kwargs
