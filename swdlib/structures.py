"""Structures: what lives or dies together.

A structure is a function from a model to a list of groups of units. That one list decides what is
ranked, penalised, masked and counted, so these four can never disagree. `blocks`, `n_of_m` and
`filters`, which need settings or an example input, are functions that return a structure.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.weight_norm import WeightNorm

from swdlib.criteria import Criterion, score_of
from swdlib.schedules import check_count
from swdlib.units import Found, Held, Part, kept_of, removable


@dataclass(frozen=True)
class Group:
    """The prunable units of one parameter; unit i is row i of the parameter seen as rows of `size`.

    `name` is the parameter's key in `named_parameters()`.
    """

    name: str
    parameter: nn.Parameter
    size: int = 1

    # (groups, ranks, sparsity) -> the units to remove, a bool tensor for each group. None: the
    # fewest of the lowest ranks that hold enough weights, see `masks.select_units`.
    rule: ClassVar[Callable[..., list[Tensor]] | None] = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are counted, by name."""
        return {self.name: self.parameter}

    @property
    def units(self) -> int:
        """The number of units."""
        return self.parameter.numel() // self.size

    def sizes(self) -> Tensor:
        """The number of weights of each unit, shape (units,)."""
        return torch.full((self.units,), self.size)

    def scores(self, criterion: Criterion) -> Tensor:
        """One score a unit, shape (units,): the mean over its weights."""
        scores = score_of(criterion, self.name, self.parameter)
        return scores.flatten() if self.size == 1 else scores.reshape(self.units, -1).mean(1)

    def protect(self, scores: Tensor) -> Tensor:
        """Scores of shape (units,), infinite for units that must stay."""
        return scores

    def removed(self, units: Tensor) -> dict[str, Tensor]:
        """The weights of `units`, a bool tensor (units,): name -> bool tensor of its shape."""
        rows = units.unsqueeze(1).expand(self.units, self.size)
        return {self.name: rows.reshape(self.parameter.shape)}


@dataclass(frozen=True)
class Tiles(Group):
    """Units that are tiles of `height` x `width` of the parameter seen as a matrix.

    The matrix has a row for each output, and the other dimensions are its columns. A tile at the
    edge may be smaller.
    """

    height: int = 1
    width: int = 1

    @property
    def _grid(self) -> tuple[int, int]:
        rows, columns = self.parameter.shape[0], self.parameter[0].numel()
        return math.ceil(rows / self.height), math.ceil(columns / self.width)

    @property
    def units(self) -> int:
        """The number of tiles."""
        return math.prod(self._grid)

    def sizes(self) -> Tensor:
        """The number of weights of each tile, shape (units,)."""
        rows = torch.arange(self.parameter.shape[0]) // self.height
        columns = torch.arange(self.parameter[0].numel()) // self.width
        return torch.outer(rows.bincount(), columns.bincount()).flatten()

    def scores(self, criterion: Criterion) -> Tensor:
        """One score a tile, shape (units,): the mean over its weights."""
        scores = score_of(criterion, self.name, self.parameter)
        matrix = scores.reshape(1, len(scores), -1).float()
        # With ceil_mode, the mean of a tile at the edge is over the weights that it has.
        return avg_pool2d(matrix, (self.height, self.width), ceil_mode=True).flatten()

    def removed(self, units: Tensor) -> dict[str, Tensor]:
        """The weights of the tiles `units`: name -> bool tensor of the parameter's shape."""
        grid = units.reshape(self._grid)
        tall = grid.repeat_interleave(self.height, 0)[: self.parameter.shape[0]]
        wide = tall.repeat_interleave(self.width, 1)[:, : self.parameter[0].numel()]
        return {self.name: wide.reshape(self.parameter.shape)}


@dataclass(frozen=True)
class NofM(Group):
    """Single weights; of each `m` neighbours along the inputs, the best `n` must stay."""

    n: int = 2
    m: int = 4

    def protect(self, scores: Tensor) -> Tensor:
        """The scores, infinite for the best `n` of each `m`; of ties the last stay."""
        of_inputs = scores.reshape(self.parameter.shape).movedim(1, -1)
        rows = of_inputs.reshape(-1, self.m)
        best = rows.argsort(dim=1, stable=True)[:, self.m - self.n :]
        safe = rows.scatter(1, best, math.inf).reshape(of_inputs.shape)
        return safe.movedim(-1, 1).flatten()


def below_threshold(
    groups: Sequence["Single"], ranks: Sequence[Tensor], sparsity: float
) -> list[Tensor]:
    """The units whose rank lies below one threshold, a bool tensor for each group.

    Sorted, the ranks of the groups that are `ranked` have the threshold at place int(sparsity * n).
    """
    device = ranks[0].device
    ranked = torch.cat([r.to(device) for g, r in zip(groups, ranks, strict=True) if g.ranked])
    threshold = ranked.kthvalue(int(sparsity * len(ranked)) + 1).values
    return [rank < threshold.to(rank.device) for rank in ranks]


@dataclass(frozen=True)
class Single(Group):
    """Single weights that are removed below a threshold, to which only the `ranked` contribute."""

    rule = staticmethod(below_threshold)
    ranked: bool = True


@dataclass(frozen=True)
class Coupled(Group):
    """Units that reach through several parameters: a filter, its batch norm, whoever reads its map.

    `parameter` is the first of them. `network` holds all parameters of the model, since sparsity is
    here the fraction of all parameters that the shrunk network does not have.
    """

    parts: tuple[Part, ...] = ()
    network: dict[str, nn.Parameter] = field(default_factory=dict)
    count: int = 0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the model, by name."""
        return self.network

    @property
    def units(self) -> int:
        """The number of units."""
        return self.count

    def sizes(self) -> Tensor:
        """The number of weights that each unit alone would remove, shape (units,)."""
        total = torch.zeros(self.count, dtype=torch.long)
        for part in self.parts:
            slices = part.parameter.numel() // len(part.units)
            inside = part.units[part.units >= 0]
            total += slices * inside.bincount(minlength=self.count)
        return total

    def scores(self, criterion: Criterion) -> Tensor:
        """One score a unit, shape (units,): the mean over the parts that the criterion ranks."""
        role = getattr(criterion, "role", "weight")
        if role not in self._by_role:
            raise ValueError(
                f"{self.name} has no {role} that the criterion could rank; "
                "use another criterion, such as magnitude"
            )
        parts, weights = self._by_role[role]
        sums = torch.zeros(self.count, device=self.parameter.device)
        for part, inside, units in parts:
            scores = score_of(criterion, part.name, part.parameter).movedim(part.dim, 0).float()
            of_slices = scores.flatten(1).sum(1) if scores.ndim > 1 else scores
            sums.index_add_(0, units.to(sums.device), of_slices[inside.to(sums.device)])
        return sums / weights.to(sums.device)

    @cached_property
    def _by_role(self) -> dict[str, tuple[list[tuple[Part, Tensor, Tensor]], Tensor]]:
        """For each role: its parts, which of their slices belong to which unit; the units' sizes.

        Cached, since it does not change as weights do.
        """
        found: dict[str, tuple[list[tuple[Part, Tensor, Tensor]], Tensor]] = {}
        for part in self.parts:
            role = "weight" if part.role == "tied" else part.role
            parts, weights = found.setdefault(role, ([], torch.zeros(self.count)))
            inside = (part.units >= 0).nonzero().squeeze(1)
            units = part.units[inside]
            parts.append((part, inside, units))
            size = torch.full((len(inside),), part.parameter.numel() / len(part.units))
            weights.index_add_(0, units, size)
        return found

    @cached_property
    def slices(self) -> dict[tuple[str, int], int]:
        """(Parameter, dim) -> the number of slices that each unit owns."""
        owned: dict[tuple[str, int], int] = {}
        for part in self.parts:
            key = part.name, part.dim
            owned[key] = owned.get(key, 0) + int((part.units == 0).sum())
        return owned

    def protect(self, scores: Tensor) -> Tensor:
        """The scores, infinite for the best unit, since no layer can be empty."""
        return scores.index_fill(0, scores.argmax(), math.inf)

    def removed(self, units: Tensor) -> dict[str, Tensor]:
        """The weights of `units`: name -> bool tensor that broadcasts to the parameter's shape."""
        gone: dict[str, Tensor] = {}
        for part in self.parts:
            shape = [1] * part.parameter.ndim
            shape[part.dim] = -1
            slices = part.slices(units).reshape(shape)
            gone[part.name] = either(gone[part.name], slices) if part.name in gone else slices
        return gone


def either(a: Tensor, b: Tensor) -> Tensor:
    """As `a | b` of bool tensors, at which torch is slow on a CPU."""
    return (a.view(torch.uint8) | b.view(torch.uint8)).view(torch.bool)


Structure = Callable[[nn.Module], list[Group]]


def is_prunable(parameter: nn.Parameter) -> bool:
    """Whether its single weights are prunable: it is trained and has two or more dimensions."""
    return parameter.requires_grad and parameter.ndim >= 2


def _prunable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in _own_weights(model) if is_prunable(p)]


def _own_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that layers compute with, by name.

    Those of a weight norm are left out: its weight is a quotient, 0 / 0 once a row is zero. A
    parametrization that makes other numbers of zeros is a ValueError.
    """
    left_out: set[int] = set()
    for prefix, module in model.named_modules():
        if any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
            left_out |= {id(p) for n, p in module._parameters.items() if n.endswith(("_g", "_v"))}
        for name, chain in getattr(module, "parametrizations", {}).items():
            if not hasattr(chain, "original"):
                left_out |= {id(p) for p in chain.parameters()}
            elif not _keeps_zeros(chain):
                raise ValueError(
                    f"the {name} of {prefix or 'the model'} is computed from another parameter, of "
                    "which zeros are none in it, so that it cannot be pruned: first call "
                    "torch.nn.utils.parametrize.remove_parametrizations on that module"
                )
    # named_parameters() yields a shared parameter once, under its first name.
    return [(n, p) for n, p in model.named_parameters() if id(p) not in left_out]


@torch.no_grad()
def _keeps_zeros(chain: Any) -> bool:
    """Whether a weight is zero wherever the parameter that it is computed from is."""
    original, steps = chain.original, copy.deepcopy(chain).eval()
    zeros = torch.arange(original.numel(), device=original.device).reshape(original.shape) % 2 == 0
    computed = original.masked_fill(zeros, 0.0)
    for step in steps.children():
        computed = step(computed)
    return computed.shape == zeros.shape and not computed[zeros].any()


def weights(model: nn.Module) -> list[Group]:
    """Single weights: those of all trainable parameters of two or more dimensions.

    So biases and batch-norm scales are not pruned. Embeddings, position codes and scales of two or
    more dimensions (a layer scale, LayerNorm over several dimensions) are; write a structure of
    your own to leave them out. A parameter that several modules share is one group.
    """
    return [Group(name, parameter) for name, parameter in _prunable(model)]


def parameters(model: nn.Module, also: Sequence[nn.Module] = ()) -> list[Group]:
    """Single weights of all trainable parameters, by a threshold that the layers' weights give.

    Ranked are the weights and biases of convolutions and linear layers, and the parameters of the
    modules `also`. Below the threshold everything is removed, shifts and scales of norms included,
    so that the whole network is counted. The threshold is the magnitude at place int(sparsity * n)
    of the n ranked; where some tie with it, fewer are removed. Source: the authors' code beside
    arXiv 2011.10520.
    """
    layers = [m for m in model.modules() if isinstance(m, _ConvNd | nn.Linear)]
    ranked = {id(p) for module in [*layers, *also] for p in module.parameters(recurse=False)}
    trained = [(n, p) for n, p in _own_weights(model) if p.requires_grad and p.numel()]
    groups: list[Group] = [Single(n, p, ranked=id(p) in ranked) for n, p in trained]
    return groups if any(id(p) in ranked for _, p in trained) else []


def kernels(model: nn.Module) -> list[Group]:
    """Kernels of convolutions: a unit is the weights between one input and one output map."""
    convolved = {id(m.weight) for m in model.modules() if isinstance(m, _ConvNd)}
    return [
        Group(name, parameter, size=math.prod(parameter.shape[2:]))
        for name, parameter in _prunable(model)
        if id(parameter) in convolved and parameter.numel()
    ]


def blocks(height: int, width: int) -> Structure:
    """Blocks of `height` outputs x `width` weights of those outputs; smaller at the edges."""
    check_count("height", height)
    check_count("width", width)

    def blocks(model: nn.Module) -> list[Group]:
        found = [(n, p) for n, p in _prunable(model) if p.numel()]
        return [Tiles(n, p, height=height, width=width) for n, p in found]

    return blocks


def n_of_m(n: int, m: int) -> Structure:
    """Single weights, of which at least `n` of each `m` neighbouring inputs stay.

    GPUs speed up 2 of 4 (Mishra et al. 2021, arXiv 2104.08378). The sparsity can be at most
    1 - n / m. Parameters whose number of inputs is no multiple of `m` are not pruned.
    """
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= n < m):
        raise ValueError(f"n and m must be whole numbers with 1 <= n < m, not n={n!r}, m={m!r}")

    def n_of_m(model: nn.Module) -> list[Group]:
        return [NofM(k, p, n=n, m=m) for k, p in _prunable(model) if not p.shape[1] % m]

    return n_of_m


def filters(example: Any) -> Structure:
    """Filters of convolutions, each with everything that depends on it.

    With a filter go its bias and norm, the weights that read its map, and the filters to which
    residual additions, depthwise and grouped convolutions tie it. `example` is an input of the
    model: a tensor, a tuple of arguments, or a dict of keyword arguments; running it shows what is
    tied. The groups' `report` says how many layers they reach.
    """
    return _coupled(example, "filters", ("filter",))


def channels(example: Any) -> Structure:
    """Channels of linear layers inside the network, hidden units of recurrent ones, and heads.

    The channels that a layer normalisation averages over stay: without one, the mean would change.
    `example` as in `filters`.
    """
    return _coupled(example, "channels", ("channel", "head"))


def heads(example: Any) -> Structure:
    """Heads of attention; where several share keys and values, these together."""
    return _coupled(example, "heads", ("head",))


def filters_and_channels(example: Any) -> Structure:
    """The filters of convolutions, the channels of linear layers and the heads of attention."""
    return _coupled(example, "filters_and_channels", ("filter", "channel", "head"))


class Groups(list[Group]):
    """Groups of coupled units; `report` says how much of the network they reach, and what not."""

    report: str = ""


def _coupled(example: Any, name: str, kinds: Sequence[str]) -> Structure:
    def structure(model: nn.Module) -> list[Group]:
        network = dict(model.named_parameters())
        found = removable(model, example)
        groups = Groups()
        reached = []
        for f in found.found:
            owned = [p for p in f.parts if p.role != "buffer"]
            if f.kind in kinds and all(network[p.name].requires_grad for p in owned):
                reached.append(f)
                parts = tuple(replace(p, parameter=network[p.name]) for p in owned)
                groups.append(Coupled(f.name, network[parts[0].name], 1, parts, network, f.count))
        groups.report = _report(structure.__name__, reached, found.held, network)
        return groups

    structure.__name__ = name
    return structure


def _report(
    kind: str, found: Sequence[Found], held: Sequence[Held], network: dict[str, nn.Parameter]
) -> str:
    kept = kept_of(found, [torch.arange(f.count) > 0 for f in found])
    sizes = {name: list(parameter.shape) for name, parameter in network.items()}
    for (name, dim), stays in kept.items():
        if name in sizes:  # not a buffer
            sizes[name][dim] = int(stays.sum())
    left = sum(map(math.prod, sizes.values()))
    total = sum(p.numel() for p in network.values())
    made = {p.name for f in found for p in f.parts if p.role in ("weight", "tied")}
    layers = [n for n, p in network.items() if p.ndim > 1]
    text = (
        f"{kind}: units of {len(made)} of {len(layers)} layers; at most {1 - left / total:.1%} of "
        "the parameters can go."
    )
    return " ".join([text, *(f"Held: {h}." for h in held[:5])])


# By name, for the command line and for notebooks: a function of an example input.
STRUCTURES: dict[str, Callable[[Any], Structure]] = {
    "weights": lambda example: weights,
    "parameters": lambda example: parameters,
    "kernels": lambda example: kernels,
    "filters": filters,
    "channels": channels,
    "filters_and_channels": filters_and_channels,
    "blocks": lambda example: blocks(4, 4),
    "2_of_4": lambda example: n_of_m(2, 4),
}
