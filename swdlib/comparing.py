"""Comparing: whether two networks compute the same, on any kind of input, whatever they return."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from swdlib.labels import storage_of

# Outputs that differ by less, relative to the largest, are equal; else double precision decides.
CLOSE, CLOSE_IN_DOUBLE = 1e-5, 1e-9
NOT_DECIDED = 1e-4  # where a network runs in its own precision alone


class Differs(ValueError):
    """A smaller network computes something else than the masked one."""


# Running ------------------------------------------------------------------------------------------


@contextmanager
def plain(mode: TorchDispatchMode) -> Iterator[None]:
    """A context without gradients and fused kernels, with random numbers that repeat."""
    fast = torch.backends.mha.get_fastpath_enabled()
    onednn = torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), mode:
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """A context with the model in evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call(model: nn.Module, example: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if type(example) is tuple else model(example)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a network's output, however nested in containers and objects."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        values = list(output.values())
    elif isinstance(output, list | tuple | set | frozenset):
        values = list(output)
    elif is_dataclass(output) and not isinstance(output, type):
        values = [getattr(output, f.name) for f in fields(output)]
    else:
        values = (
            list(vars(output).values())
            if hasattr(output, "__dict__")
            and not isinstance(output, type | nn.Module)
            and not callable(output)
            else []
        )
    return [tensor for value in values for tensor in tensors_of(value)]


# Inputs -------------------------------------------------------------------------------------------


def inputs_like(example: Any, ranges: Mapping[int, int], count: int) -> list[Any]:
    """`count` random inputs of the example's kind.

    Numbers are drawn from the example's own, or uniformly if these are all alike; ids from the
    range of the embedding that reads them, in `ranges` by storage. Other integers stay.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.numel() == 0:
            return x
        if x.is_floating_point():
            if x.numel() > 1 and x.min() < x.max():
                picked = torch.randint(x.numel(), x.shape, generator=generator)
                return x.flatten()[picked.to(x.device)]
            return torch.rand(x.shape, generator=generator).to(x)
        limit = ranges.get(storage_of(x))
        if limit is None or x.dtype == torch.bool:
            return x
        return torch.randint(limit, x.shape, generator=generator).to(x)

    return [tree_map(drawn, example) for _ in range(count)]


# Comparing ----------------------------------------------------------------------------------------


class Decisions(TorchDispatchMode):
    """Records whole numbers and truth values that a network draws from real ones, or repeats them.

    A rounding may change which boxes are suppressed or which expert is chosen. The network that
    repeats another's decisions is compared by what it decides on.
    """

    def __init__(self, recorded: "Decisions | None" = None) -> None:
        super().__init__()
        self.recorded = recorded
        self.made: list[tuple[Any, list[Tensor], list[Tensor]]] = []
        self.difference = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves, tree = tree_flatten(out)
        whole = [x for x in leaves if isinstance(x, Tensor) and not x.is_floating_point()]
        whole = [x for x in whole if not x.is_complex()]
        real = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point()]
        if not (whole and real) or func._schema.is_mutable:
            return out
        step = len(self.made)
        self.made.append((func, [r.clone() for r in real], [w.clone() for w in whole]))
        if self.recorded is None:
            return out
        if step >= len(self.recorded.made) or self.recorded.made[step][0] is not func:
            raise Differs("it takes another way through its code")
        _, theirs, decided = self.recorded.made[step]
        if [r.shape for r in real] != [t.shape for t in theirs]:
            return out  # of units
        self.difference = max(self.difference, *map(_difference, real, theirs))
        given = iter(decided)
        leaves = [
            next(given).clone()
            if isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex()
            else x
            for x in leaves
        ]
        return tree_unflatten(leaves, tree)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest of `theirs` that is finite."""
    if ours.shape != theirs.shape:
        raise Differs(f"an output has shape {tuple(ours.shape)}, not {tuple(theirs.shape)}")
    if not theirs.numel():
        return 0.0
    if theirs.is_complex():
        ours, theirs = torch.view_as_real(ours), torch.view_as_real(theirs)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if bool(same.all()):
        return 0.0
    if not theirs.is_floating_point():
        return torch.inf
    ours, theirs = ours.double(), theirs.double()
    apart = float(torch.where(same, 0.0, (ours - theirs).abs()).max())
    size = float(torch.where(theirs.isfinite(), theirs.abs(), 0.0).max())
    return apart / size if apart <= torch.finfo(torch.float64).max and size else torch.inf


def difference(small: nn.Module, masked: nn.Module, example: Any) -> float:
    """How far the outputs of both are apart, each relative to its size."""
    record = Decisions()
    with in_eval(masked), plain(record):
        theirs = tensors_of(call(masked, example))
    repeat = Decisions(record)
    with in_eval(small), plain(repeat):
        ours = tensors_of(call(small, example))
    if len(ours) != len(theirs):
        raise Differs(f"it has {len(ours)} outputs, not {len(theirs)}")
    return max([repeat.difference, *map(_difference, ours, theirs)])


def require_equal(small: nn.Module, masked: nn.Module, examples: Sequence[Any]) -> None:
    """Raise Differs if the outputs differ by more than rounding on one of the examples."""
    norms = [m for m in small.modules() if isinstance(m, _InstanceNorm) and not m.affine]
    hooks = [norm.register_forward_pre_hook(_update_features) for norm in norms]
    try:
        apart = max(difference(small, masked, example) for example in examples)
        if apart <= CLOSE:
            return
        limit = CLOSE_IN_DOUBLE
        try:
            doubled = [copy.deepcopy(net).double() for net in (small, masked)]
            precise = [tree_map(_double, example) for example in examples]
            apart = max(difference(doubled[0], doubled[1], example) for example in precise)
        except Differs:
            raise
        except Exception:  # its code asks for one precision
            eps = max(torch.finfo(p.dtype).eps for p in small.parameters())
            limit = max(NOT_DECIDED, 4 * eps)
    finally:
        for hook in hooks:
            hook.remove()
    if not apart <= limit:
        raise Differs(f"outputs differ by {apart:.1g} of the largest")


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _update_features(norm: Any, inputs: tuple[Tensor, ...]) -> None:
    # An instance norm without parameters is not cut, but warns if its number of features is wrong.
    norm.num_features = inputs[0].shape[-norm._get_no_batch_dim()]
