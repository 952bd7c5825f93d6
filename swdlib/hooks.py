"""Hooks: what all methods share: hooks on an optimizer's steps, a selection, a report, a state."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.utils.hooks import RemovableHandle

from swdlib.criteria import Criterion, magnitude
from swdlib.masks import (
    Allocation,
    Masks,
    check_reachable,
    check_sparsity,
    find_groups,
    fitted,
    kept,
    parameters_of,
    prunable,
    removed_weights,
    select_units,
    together,
)
from swdlib.schedules import Schedule, as_schedule, check_count
from swdlib.structures import Group, Structure, weights

BY_HAND = "add penalty() to the loss and call advance() after each step instead of attach()"


class Method:
    """Acts before and after each step of an optimizer; a subclass says what it does there.

    `masks` are what it holds at zero now: name of a parameter -> bool tensor, True where kept.
    """

    remedy = "use another optimizer"  # where the steps of one cannot be hooked

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.masks: Masks = {}
        self._in_step = False
        self._handles: list[RemovableHandle] = []
        self._optimizers: list[Optimizer] = []  # those that are hooked
        self._wrappers: list[Any] = []  # and what they came in, such as Lookahead

    def attach(self, optimizer: Optimizer) -> None:
        """Hook an optimizer: from now on this acts at each of its steps.

        It acts once a step, after gradients are accumulated, unscaled and clipped; a step that a
        GradScaler skips does not count. Where several optimizers share the model, attach each: a
        weight of one that is not attached is left alone, and a step counts when the last of them
        has taken it.

        Raises TypeError for what is no optimizer; ValueError if it has none of the parameters or
        some of an attached one and, at the first step of a method that adds to gradients, if a
        fused optimizer is left to unscale these itself. SWD raises TypeError as well for one that
        evaluates the loss several times a step (LBFGS), takes sparse gradients only or has sharded
        parameters.
        """
        chain = unwrapped(optimizer)
        optimizer = chain[-1]
        if owned_by(*self._optimizers) & owned_by(optimizer):
            raise ValueError(
                f"this {type(self).__name__} is attached already to an optimizer of the same "
                "parameters; call detach() first"
            )
        self._check_optimizer(optimizer)
        self._optimizers.append(optimizer)
        self._wrappers += chain[:-1]
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Remove the hooks from all optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers, self._wrappers = [], [], []

    def __getstate__(self) -> dict[str, Any]:
        if self._handles:
            raise TypeError(
                f"this {type(self).__name__} is attached, and a copy would not be: call detach() "
                "before it is copied or pickled and attach() after it, or keep its state_dict()"
            )
        return self.__dict__.copy()

    def report(self) -> dict[str, float]:
        """What a record keeps of the method now."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError if it does not fit."""
        if state:
            name = type(self).__name__
            raise ValueError(f"the state of {name} is empty, not of {sorted(state)}")

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._in_step = True
        return self._before(optimizer, args, kwargs)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._in_step:
            raise TypeError(
                f"the step() of {type(optimizer).__name__} calls the step() of its base class, and "
                f"torch runs the hooks in both, so everything would happen twice: {self.remedy}"
            )
        self._in_step = False
        # A GradScaler that found an overflow tells a fused optimizer to skip the step in this way;
        # it does not even call the step of any other.
        if not getattr(optimizer, "found_inf", False):
            self._after(optimizer)

    def _acts_on(self) -> Iterable[Tensor]:
        """The parameters of which an optimizer must have one at least."""
        return self.model.parameters()

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        owned, needed = owned_by(optimizer), list(self._acts_on())
        if not any(id(parameter) in owned for parameter in needed):
            raise ValueError(
                f"the {type(optimizer).__name__} has none of the {len(needed)} parameters of "
                f"{type(self.model).__name__} that {type(self).__name__} acts on; build it from "
                "model.parameters() (FSDP and DeepSpeed put others in their place: use "
                "DistributedDataParallel)"
            )

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return None

    def _after(self, optimizer: Optimizer) -> None:
        pass


class SelectingMethod(Method):
    """A method that ranks units and selects the lowest at each step, for a target that may rise.

    `swd.SelectiveWeightDecay` explains the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float | Schedule,
        steps: int,
        every: int = 1,
        structure: Structure = weights,
        criterion: Criterion = magnitude,
        allocation: Allocation = together,
    ) -> None:
        super().__init__(model)
        if not callable(criterion):
            raise TypeError(f"criterion must be a function of swdlib.criteria, not {criterion!r}")
        if not callable(allocation):
            raise TypeError(f"allocation must be a function of swdlib.masks, not {allocation!r}")
        self.groups = find_groups(model, structure)
        self.parameters = parameters_of(self.groups)
        self.prunable = prunable(self.groups)
        self.criterion, self.allocation = criterion, allocation
        self.steps = check_count("steps", steps, hint="; usually epochs * len(loader)")
        self.every = check_count("every", every)
        self.step = 0
        self.units: list[Tensor] = []  # as last selected, where they are held between selections
        self._reported: list[Tensor] = []
        self._sparsity = as_schedule(sparsity, check_sparsity)
        check_reachable(self.groups, self._sparsity(1.0), allocation)

    @property
    def progress(self) -> float:
        """The share of `steps` that is done, in [0, 1]."""
        return min(self.step / self.steps, 1.0)

    @property
    def sparsity(self) -> float:
        """The sparsity that units are selected for now."""
        return check_sparsity(self._sparsity(self.progress))

    def selected(self) -> list[Tensor]:
        """The units selected now, a bool tensor of shape (units,) for each group."""
        if self.every > 1 and self.step % self.every and self.units:
            return self.units
        units = self._select_units()
        self.units = units if self.every > 1 else []
        return units

    def _select_units(self) -> list[Tensor]:
        return select_units(self.groups, self.sparsity, self.criterion, self.allocation)

    def report(self) -> dict[str, float]:
        """What a record keeps now: the target, and units `selected`, `entered` and `left`.

        The last two count since the report before, so the first report has neither.
        `norm_selected` is the L2 norm of the weights in selected units, `norm_kept` of the others;
        `kept_weights` and `kept_parameters` count what a cut now would leave (see `masks.kept`).
        """
        units = self.selected()
        gone = removed_weights(self.groups, units) if units else {}
        moved = movement(units, self._reported) | norms(self.parameters, gone) if units else {}
        self._reported = [chosen.clone() for chosen in units]
        left = kept(self.model, {name: ~mask for name, mask in gone.items()})
        return {"target": self.sparsity, **moved, **left}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, masks, units held, and units last reported."""
        return {
            "step": self.step,
            "masks": dict(self.masks),
            "units": list(self.units),
            "reported": self._reported,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError if it does not fit this method or model."""
        keys = ("step", "masks", "units", "reported")
        if set(state) != set(keys):
            raise ValueError(f"the state must have the keys {', '.join(keys)}, not {sorted(state)}")
        step, masks = state["step"], state["masks"]
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be a whole number of 0 or more, not {step!r}")
        if masks and set(masks) != set(self.parameters):
            raise ValueError(f"masks must be of {sorted(self.parameters)}, not of {sorted(masks)}")
        masks = fitted(masks, self.parameters)
        units, reported = (fitted_units(self.groups, state[key]) for key in ("units", "reported"))
        self.step, self.masks, self.units, self._reported = step, masks, units, reported


def movement(units: Sequence[Tensor], before: Sequence[Tensor]) -> dict[str, float]:
    """Counts of the units `selected` and, if there is a `before`, of those `entered` and `left`."""
    counts: dict[str, float] = {"selected": sum(int(chosen.sum()) for chosen in units)}
    if pairs := [(now, then.to(now.device)) for now, then in zip(units, before, strict=False)]:
        counts["entered"] = sum(int((now & ~then).sum()) for now, then in pairs)
        counts["left"] = sum(int((then & ~now).sum()) for now, then in pairs)
    return counts


@torch.no_grad()
def norms(parameters: Mapping[str, Tensor], gone: Masks) -> dict[str, float]:
    """The L2 norms of the weights that are `gone`, and of the others."""
    inside = sum(float((p * gone[n]).float().square().sum()) for n, p in parameters.items())
    outside = sum(float((p * ~gone[n]).float().square().sum()) for n, p in parameters.items())
    return {"norm_selected": inside**0.5, "norm_kept": outside**0.5}


def fitted_units(groups: Sequence[Group], units: Sequence[Tensor]) -> list[Tensor]:
    """The units of a state on the devices of their groups, since a checkpoint's are on the CPU."""
    if not units:
        return []
    given = [(tuple(chosen.shape), chosen.dtype) for chosen in units]
    wanted = [((group.units,), torch.bool) for group in groups]
    if given != wanted:
        raise ValueError(f"units must have shapes and types {wanted}, not {given}")
    pairs = zip(units, groups, strict=True)
    return [chosen.to(group.parameter.device) for chosen, group in pairs]


# What a hook has to know of an optimizer ----------------------------------------------------------


def unwrapped(optimizer: Any) -> list[Any]:
    """The optimizer and what it wraps, the innermost last.

    Wrappers are those of accelerate, Lightning and Fabric, Lookahead, and SAM, whose base optimizer
    is the one that steps.
    """
    chain = [optimizer]
    while inner := getattr(chain[-1], "optimizer", getattr(chain[-1], "base_optimizer", None)):
        chain.append(inner)
    inner = chain[-1]
    if not isinstance(inner, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {optimizer!r}")
    if not hasattr(inner, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{type(inner).__name__} did not call Optimizer.__init__, so its steps have no hooks: "
            "give the optimizer that it wraps"
        )
    return chain


@torch.no_grad()
def hold_state(optimizer: Any, model: nn.Module, masks: Masks) -> None:
    """Zero what an optimizer, or a wrapper of one, remembers of weights that `masks` remove.

    Schedule-free optimizers and Lookahead keep copies of the weights, which would come back.
    """
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        for tensor in getattr(optimizer, "state", {}).get(parameter, {}).values():
            if isinstance(tensor, Tensor) and tensor.shape == mask.shape:
                tensor.masked_fill_(~mask.to(tensor.device), 0.0)


def _stepped_by(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def owned_by(*optimizers: Optimizer) -> set[int]:
    """The id() of each parameter that the optimizers step, whatever group it is in."""
    return {id(parameter) for one in optimizers for parameter in _stepped_by(one)}


def require_hookable(optimizer: Optimizer, update: str) -> None:
    """TypeError or ValueError, with a remedy, for an optimizer that a penalty cannot hook."""
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            f"{name} evaluates the loss several times a step and compares the values, which do not "
            f"include the penalty: {BY_HAND}"
        )
    if isinstance(optimizer, SparseAdam) and update == "gradient":
        raise TypeError(
            f"{name} takes sparse gradients only and the penalty's is dense: use "
            "update='proximal', or another optimizer"
        )
    if any(hasattr(parameter, "full_tensor") for parameter in _stepped_by(optimizer)):
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


def after_backward(args: Any, kwargs: Any, act: Callable[[], None], remedy: str) -> Any:
    """Call `act` once gradients are there: now, or at the end of the closure given to step().

    `args`, which start with the optimizer, and `kwargs` are those of its step(); returns what a
    step pre-hook returns. Lightning's Trainer runs the backward pass in a closure. The closure
    raises ValueError, with the `remedy`, when an optimizer calls it more than once.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        act()
        return None
    calls = 0

    def closure_and_act() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise ValueError(
                f"the {type(args[0]).__name__} calls the closure of step() more than once, and "
                f"the losses that it compares do not include the penalty: {remedy}"
            )
        loss = closure()
        act()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure_and_act}
    return (args[0], closure_and_act, *args[2:]), kwargs
