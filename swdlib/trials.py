"""Trials: which units a network's own code lets go, found by taking them out and comparing."""

import copy
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from swdlib.channels import (
    ATTEMPTS, PINNED, TORCH, Found, Labels, Place, Untraceable, call, in_eval, plain, tensors_of, trace, units
)
from swdlib.cutting import cut, replace, twin

# Outputs that differ by less, relative to the largest, are equal; by more, double precision decides.
CLOSE, CLOSE_IN_DOUBLE = 1e-5, 1e-9
NOT_DECIDED = 1e-4  # where a network runs in its own precision alone


class Differs(ValueError):
    """A smaller network computes something else than the masked one."""


@dataclass(frozen=True)
class Held:
    """Units that stay: their groups, the reason, and the line of code that it comes from."""

    names: tuple[str, ...]
    reason: str
    place: Place | None = None

    def __str__(self) -> str:
        where = f" ({self.place[0]}:{self.place[1]})" if self.place else ""
        names = ", ".join(self.names[:3]) + (" and others" if len(self.names) > 3 else "")
        return f"{names}: {self.reason}{where}"


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
        limit = ranges.get(Labels._key(x))
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


# Trials -------------------------------------------------------------------------------------------


@torch.no_grad()
def telling(model: nn.Module) -> nn.Module:
    """A twin of the model that hides nothing: what is constant, such as zeros, is drawn at random."""
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        statistic = name.endswith(("running_mean", "running_var"))
        if not tensor.is_floating_point() or not tensor.numel() or tensor.min() != tensor.max():
            continue
        if isinstance(tensor, nn.Parameter) or statistic:
            if tensor.numel() == 1 and tensor.item() != 0:
                continue
            drawn = torch.rand(tensor.shape, generator=generator)
            few = 0.5 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
            zero = tensor.flatten()[0] == 0
            changed[name] = ((2 * drawn - 1) * few if zero else drawn + 0.5).to(tensor)
    other = twin(model)
    replace(other, changed)
    return other


def removable(model: nn.Module, example: Any) -> tuple[list[Found], list[Held]]:
    """The units of `model` that can be removed, and what has to stay though labels let it go.

    `example` is an input: a tensor, a tuple of arguments, or a dict of keyword arguments. Each
    group has lost either half of its units on a copy, and the outputs were those of the masked
    network. Raises Untraceable for a network that does not run on the example.
    """
    return _Trials(model, example).run()


class _Trials:
    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = telling(model).eval()
        try:
            example = self._few(example)
            self.labels = trace(self.model, [example])
            self.examples = inputs_like(example, self.labels.ranges, 4)
            if self.labels.steered:
                self.labels = trace(self.model, [example, *self.examples])
        except Exception as error:  # the network raises what it likes
            raise Untraceable(
                f"the channels of {type(model).__name__} cannot be followed, since it does not run "
                f"on the example ({error!r}); give the model an example that it takes, or use "
                "structures that need none: weights, kernels, blocks, n_of_m"
            ) from error
        self.choice: dict[Place, int] = {}
        self.held: list[Held] = []
        self._hold_unseen(example)

    def _few(self, example: Any) -> Any:
        """Two images are enough, if the network takes them."""
        if isinstance(example, Tensor) and example.ndim and len(example) > 2:
            try:
                with plain(Decisions()):
                    call(self.model, example[:2])
                return example[:2]
            except Exception:
                pass
        return example

    def _hold_unseen(self, example: Any) -> None:
        """Follow what only training runs; hold what neither runs, and all that may feed it."""
        def unseen() -> list[Any]:
            owners = self.labels.owners.values()
            return [o for o in owners if not o.seen and isinstance(o.tensor, nn.Parameter)]

        if unseen():
            trained = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()}).train()
            self.labels.watch(trained)
            double = tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim else x, example)
            try:
                with plain(self.labels):
                    output = call(trained, double)
                for tensor in tensors_of(output):
                    self.labels.joins.join(self.labels.of(tensor), PINNED)
            except Exception:
                pass
        if missed := unseen():
            widths = {n for o in missed for n in o.tensor.shape[:2] if n > 1}
            joins = self.labels.joins
            for owner in self.labels.owners.values():
                for dim in owner.long:
                    if owner in missed or any(w % owner.tensor.shape[dim] == 0 for w in widths):
                        joins.join(owner.labels(dim), PINNED)
            self.held.append(Held(
                tuple(o.name for o in missed),
                "the example does not run it, so that nothing tells what it reads, and layers of "
                "its width stay: give an example that runs it, or remove it",
            ))

    def run(self) -> tuple[list[Found], list[Held]]:
        found = units(self.labels, self.choice)
        while (failure := self.failure(found)) is not None:
            bad, failure = self._narrowed(found, failure)
            found = self._without(found, bad, failure)
        return found, self.held

    def _narrowed(self, found: Sequence[Found], failure: "Failure") -> tuple[Found, "Failure"]:
        """A group without which the trial would not have failed like this."""
        good, rest = [], list(found)
        while len(rest) > 1:
            half = rest[: len(rest) // 2]
            error = self.failure([*good, *half])
            if error is None:
                good, rest = [*good, *half], rest[len(half) :]
            else:
                rest, failure = half, error
        return rest[0], failure

    def _without(self, found: list[Found], bad: Found, failure: "Failure") -> list[Found]:
        """The units once the code's size is read in another way, or the group is held."""
        places = {failure.place} if failure.holds_size and failure.place in bad.places else set()
        places = places or {p for p in bad.places if p in self._options()}
        while any(self.choice.get(p, 0) < ATTEMPTS - 1 for p in places):
            for place in places:
                self.choice[place] = self.choice.get(place, 0) + 1
            now = units(self.labels, self.choice)
            if [(f.name, f.count) for f in now] != [(f.name, f.count) for f in found]:
                return now
        if failure.holds_size and failure.place in bad.places:
            self.choice[failure.place] = ATTEMPTS
            now = units(self.labels, self.choice)
            left = {f.name for f in now}
            names = tuple(f.name for f in found if f.name not in left)
            if bad.name in names:
                self.held.append(Held(names, failure.reason, failure.place))
                return now
        for part in bad.parts:
            owner = self.labels.owners[part.name]
            self.labels.joins.join(owner.labels(part.dim)[part.units >= 0], PINNED)
        self.held.append(Held((bad.name,), failure.reason, failure.place))
        return units(self.labels, self.choice)

    def _options(self) -> set[Place]:
        """Lines whose size can be read in several ways."""
        several = {place for _, place in self.labels.splits}
        for seen, places in self.labels.patterns.values():
            if sum(n > 1 for n in seen.shape) > 1:
                several |= places
        return several

    def failure(self, found: Sequence[Found]) -> "Failure | None":
        """What goes wrong if one half of each group's units is removed, or the other."""
        for half in (0, 1):
            gone = {}
            for group in found:
                if group.count > 1:
                    drawn = torch.randperm(group.count, generator=torch.Generator().manual_seed(1))
                    gone[group.name, group.kind] = (drawn < group.count // 2) == (half == 0)
            if not gone:
                return None
            kept = kept_of(found, [gone.get((g.name, g.kind), torch.zeros(g.count, dtype=torch.bool)) for g in found])
            small, masked = twin(self.model), twin(self.model)
            try:
                mask(masked, kept)
                cut(small, kept)
                require_equal(small, masked, self.examples[half::2][:1])
            except Exception as error:
                return Failure.of(error)
        return None


def kept_of(found: Sequence[Found], gone: Sequence[Tensor]) -> dict[tuple[str, int], Tensor]:
    """(Name, dimension) -> which slices stay, if the units `gone` of each group go."""
    kept: dict[tuple[str, int], Tensor] = {}
    for group, units in zip(found, gone, strict=True):
        extended = torch.cat([units, units.new_zeros(1)])
        for part in group.parts:
            key = part.name, part.dim
            kept[key] = kept.get(key, torch.ones(len(part.units), dtype=torch.bool))
            kept[key] = kept[key] & ~extended[part.units]
    return kept


@torch.no_grad()
def mask(model: nn.Module, kept: Mapping[tuple[str, int], Tensor]) -> None:
    """Put zeros, in copies of the parameters, where `cut` would remove slices."""
    parameters = dict(model.named_parameters())
    changed: dict[str, Tensor] = {}
    for (name, dim), stays in kept.items():
        if name in parameters and not stays.all():
            if name not in changed:
                changed[name] = parameters[name].detach().clone()
            gone = (~stays).nonzero().squeeze(1).to(changed[name].device)
            changed[name].index_fill_(dim, gone, 0)
    replace(model, changed)


@dataclass(frozen=True)
class Failure:
    """Why a smaller network is not the masked one, and where its code says so."""

    reason: str
    place: Place | None
    holds_size: bool

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        if isinstance(error, Differs):
            return cls(f"without them the network computes something else: {error}", None, False)
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not f.filename.startswith(TORCH) and "swdlib" not in f.filename]
        place = (own[-1].filename, own[-1].lineno or 0) if own else None
        said = " ".join(str(error).split())[:150]
        holds = re.search(r"shape '|split|view|expand|chunk|unflatten|size", said) is not None
        return cls(f"the code holds their number: {said}", place, holds)
