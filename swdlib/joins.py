"""Joins: what a penalty has to know of the optimizer whose steps it joins."""

from collections.abc import Callable
from typing import Any, SupportsFloat

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.utils.hooks import RemovableHandle

BY_HAND = "add penalty() to the loss and call advance() after each step instead of attach()"


class Joined:
    """What joins an optimizer's steps: a subclass says what it does before or after each.

    `masks` are what it holds at zero now: name of a parameter -> bool tensor, True is kept.
    """

    remedy = "use another optimizer"  # for one whose steps cannot be joined

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.masks: dict[str, Tensor] = {}
        self._begun = False
        self._hooks: list[RemovableHandle] = []

    def attach(self, optimizer: Optimizer) -> None:
        """Join an optimizer: from now on this acts at each of its steps.

        ValueError if the optimizer has none of the model's parameters or this is attached already.
        """
        optimizer = stepping(optimizer)
        if self._hooks:
            raise ValueError(f"this {type(self).__name__} is attached already; call detach() first")
        self._require_fit(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Leave the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._begun = True
        return self._before(optimizer, args, kwargs)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        require_once(self._begun, optimizer, self.remedy)
        self._begun = False
        if not skips(optimizer):
            self._after(optimizer)

    def _require_fit(self, optimizer: Optimizer) -> None:
        owned = owned_by(optimizer)
        if not any(id(parameter) in owned for parameter in self.model.parameters()):
            raise ValueError(
                f"the {type(optimizer).__name__} has no parameter of {type(self.model).__name__}; "
                "build it from model.parameters()"
            )

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return None

    def _after(self, optimizer: Optimizer) -> None:
        pass


def require_state(owner: str, state: dict[str, Any], *keys: str) -> None:
    """ValueError unless a `state_dict()` has these keys and a whole number as "step"."""
    if set(state) != set(keys):
        listed = ", ".join(map(repr, keys[:-1])) + f" and {keys[-1]!r}"
        raise ValueError(f"{owner}'s state has keys {listed}, not {sorted(state)}")
    step = state["step"]
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{owner}'s step must be a whole number of 0 or more, not {step!r}")


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


def owned_by(optimizer: Optimizer) -> set[int]:
    """The id() of each parameter that the optimizer steps."""
    return {id(parameter) for parameter in parameters_of(optimizer)}


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
            "scaler.step(optimizer), or build the optimizer with fused=False"
        )


def require_once(begun: bool, optimizer: Optimizer, remedy: str) -> None:
    """TypeError if a step ends that has not `begun`: torch ran the hooks of one step twice."""
    if not begun:
        raise TypeError(
            f"the step() of {type(optimizer).__name__} calls the step() of the class it derives "
            f"from, and torch runs the hooks in both, so that all is done twice: {remedy}"
        )


def skips(optimizer: Optimizer) -> bool:
    """Whether a GradScaler found an overflow and told the optimizer to change nothing.

    Only a fused optimizer is told; of others, the step is not even called.
    """
    return bool(getattr(optimizer, "found_inf", False))


def after_backward(args: Any, kwargs: Any, act: Callable[[], None], remedy: str) -> Any:
    """Call `act` once the gradients are there: now, or when the closure of step() has run.

    `args`, which start with the optimizer, and `kwargs` are those of its step(); returns what a
    step pre-hook returns. Lightning's Trainer runs the backward pass in a closure. ValueError, with
    the `remedy`, for an optimizer that calls it more than once.
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
                f"the losses that it compares do not hold the penalty: {remedy}"
            )
        loss = closure()
        act()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": and_act}
    return (args[0], and_act, *args[2:]), kwargs
