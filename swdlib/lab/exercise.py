"""Exercises: check what a reader wrote, a function or a pruned network, and say what is missing."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from swdlib.deploy.stored import load_sparse, save_sparse
from swdlib.masks import Masks, check_mask, check_sparsity, find_groups
from swdlib.metrics import bytes_on_disk
from swdlib.structures import weights


@dataclass(frozen=True)
class Check:
    """A property that a pruned network should have, what was found, and a remedy if it failed."""

    name: str
    passed: bool
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        sign, remedy = ("✓", "") if self.passed else ("✗", f"\n    {self.remedy}")
        return f"{sign} {self.name}: {self.found}{remedy}"


def check_answer(attempt: Callable[..., Any], solution: Callable[..., Any], *cases: Any) -> Check:
    """Check that `attempt` returns what `solution` does, to rounding, for each of the `cases`.

    A case is the tuple of arguments; each call gets a copy. Whatever `attempt` does, a failed check
    says for which arguments it went wrong and raises nothing.
    """
    for case in cases:
        wanted, asked = solution(*copy.deepcopy(case)), f"for {', '.join(map(_short, case))}"
        try:
            found = attempt(*copy.deepcopy(case))
            if found is None:
                return Check(attempt.__name__, False, "it returns None: fill in the blank")
            torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted))
        except AssertionError:
            remedy = f"{asked}, the answer is {_short(wanted)}"
            return Check(attempt.__name__, False, f"it returns {_short(found)}", remedy)
        except Exception as error:  # a reader's code may raise anything
            return Check(attempt.__name__, False, f"it raises {error!r}", asked)
    return Check(attempt.__name__, True, f"right in all {len(cases)} cases")


def _short(value: Any) -> str:
    shown = str(value.tolist() if isinstance(value, torch.Tensor) else value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def check_pruned(
    model: Any,
    masks: Any,
    dense: nn.Module,
    *,
    sparsity: float,
    accuracy: Callable[[nn.Module], float],
    points: float = 1.0,
) -> list[Check]:
    """Check `model`, a pruned copy of `dense` from which single weights were removed.

    `masks` are what `SelectiveWeightDecay.prune` returned, True where a weight stays. `accuracy`
    returns a network's accuracy in percent, which may fall by `points`. Whatever `model` and
    `masks` are, a failed check says why and raises nothing; checks that depend on it are skipped.
    """
    check_sparsity(sparsity)
    checks = [_names(model, dense)]
    if checks[0].passed:
        checks += [_accuracy(accuracy, model, dense, points), _masks(masks, dense)]
        if checks[-1].passed:
            checks += [_sparsity(masks, sparsity), _zeros(model, masks)]
            if checks[-1].passed:
                checks.append(_file(model, masks, dense))
    return checks


def _names(model: Any, dense: nn.Module) -> Check:
    remedy = "return the network itself: it need not be wrapped, renamed or rebuilt"
    if not isinstance(model, nn.Module):
        return Check("names", False, f"got {type(model).__name__}, not a network", remedy)
    before, after = _content(dense), _content(model)
    differ = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    found = f"{', '.join(differ[:3])} differ" if differ else f"all {len(before)} are as before"
    return Check("names", not differ, f"{found} in state_dict()", remedy)


def _content(network: nn.Module) -> dict[str, tuple[Any, ...]]:
    """For each name of the state_dict: shape, dtype, and whether it is a parameter."""
    trained = dict(network.named_parameters())
    return {n: (t.shape, t.dtype, n in trained) for n, t in network.state_dict().items()}


def _accuracy(
    accuracy: Callable[[nn.Module], float], model: nn.Module, dense: nn.Module, points: float
) -> Check:
    before = accuracy(dense)
    try:
        after = accuracy(model)
    except Exception as error:  # the network's own code may raise anything
        remedy = "return a network that is called in the same way as the one you were given"
        return Check("accuracy", False, f"it does not run: {error!r}", remedy)
    found = f"{after:.1f} % after {before:.1f} %, and {points:g} may be lost"
    remedy = "let the strength reach its end before you prune (`steps`), or train longer"
    return Check("accuracy", after >= before - points - 1e-9, found, remedy)


def _masks(masks: Any, dense: nn.Module) -> Check:
    remedy = "return what swd.prune() returns: a mask for each pruned parameter"
    wanted = {group.name: group.parameter for group in find_groups(dense, weights)}
    if not isinstance(masks, dict) or masks.keys() != wanted.keys():
        found = f"{len(masks)} entries" if isinstance(masks, dict) else type(masks).__name__
        return Check("masks", False, f"got {found}, not masks of {len(wanted)} layers", remedy)
    try:
        for name, mask in masks.items():
            check_mask(name, mask, wanted)
            if mask.is_meta:
                raise ValueError(f"the mask of {name!r} is on the meta device: it has no values")
    except (ValueError, AttributeError) as error:
        return Check("masks", False, str(error), remedy)
    return Check("masks", True, f"of {len(wanted)} layers")


def _sparsity(masks: Masks, sparsity: float) -> Check:
    total = sum(mask.numel() for mask in masks.values())
    removed = total - sum(int(mask.sum()) for mask in masks.values())
    wanted = round(sparsity * total)
    found = f"{removed:,} of {total:,} weights removed, {wanted:,} wanted"
    return Check("sparsity", removed == wanted, found, f"ask for sparsity={sparsity:g}")


def _zeros(model: nn.Module, masks: Masks) -> Check:
    parameters = dict(model.named_parameters())
    removed = [parameters[n].detach()[~m.to(parameters[n].device)] for n, m in masks.items()]
    alive = sum(int(((w != 0) | w.signbit()).sum()) for w in removed)  # -0.0 counts as well
    found = f"{alive:,} of the removed weights are not zero" if alive else "all are exact"
    remedy = "prune last; if training goes on, call masks.apply_ after every step"
    if alive and not any(int(w.count_nonzero()) for w in removed):
        remedy = "they are -0.0: masks.apply_ writes 0.0, unlike multiplication by a mask"
    return Check("zeros", not alive, found, remedy)


def _file(model: nn.Module, masks: Masks, dense: nn.Module) -> Check:
    before = bytes_on_disk(lambda path: save_sparse(dense, {}, path))
    with TemporaryDirectory() as folder:
        path = Path(folder, "pruned.safetensors.zlib")
        save_sparse(model, masks, path)
        after, again = path.stat().st_size, copy.deepcopy(dense)
        load_sparse(again, path)
    written, read = model.state_dict(), again.state_dict()
    same = all(torch.equal(read[name].cpu(), tensor.cpu()) for name, tensor in written.items())
    found = f"{after:,} bytes, {after / before:.0%} of {before:,}; read back bit for bit"
    if not same:
        found = "it reads back as another network"
    return Check("file", same and after < before, found, "remove more weights")
