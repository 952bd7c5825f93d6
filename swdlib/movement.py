"""Movement: what enters and leaves the set of units that would be pruned."""

from collections.abc import Sequence

import torch
from torch import Tensor

from swdlib.masks import parameters_of, removed_weights
from swdlib.structures import Group


class Movement:
    """Compares the selected units with those of the report before."""

    def __init__(self) -> None:
        self.units: list[Tensor] = []

    @torch.no_grad()
    def report(self, groups: Sequence[Group], units: Sequence[Tensor]) -> dict[str, float]:
        """Units `selected`, `entered` and `left` since the last report, and two norms.

        `norm_selected` is the L2 norm of the weights that the selected units own, `norm_kept` that
        of the others. The first report has nothing to compare with, and no `entered` and `left`.
        """
        parameters, gone = parameters_of(groups), removed_weights(groups, units)
        inside = sum(float((p * gone[n]).float().square().sum()) for n, p in parameters.items())
        outside = sum(float((p * ~gone[n]).float().square().sum()) for n, p in parameters.items())
        pairs = list(zip(units, self.units, strict=False))  # none at the first report
        moved = {
            "entered": sum(int((now & ~before.to(now.device)).sum()) for now, before in pairs),
            "left": sum(int((before.to(now.device) & ~now).sum()) for now, before in pairs),
        }
        self.units = [chosen.clone() for chosen in units]
        return {
            "selected": sum(int(chosen.sum()) for chosen in units),
            **(moved if pairs else {}),
            "norm_selected": inside**0.5,
            "norm_kept": outside**0.5,
        }


def fitted_units(groups: Sequence[Group], units: Sequence[Tensor]) -> list[Tensor]:
    """The units of a state on the devices of their groups: those of a checkpoint are on the CPU.

    ValueError unless `units` is empty or holds a bool tensor of shape (units,) a group.
    """
    if not units:
        return []
    given = [(tuple(chosen.shape), chosen.dtype) for chosen in units]
    wanted = [((group.units,), torch.bool) for group in groups]
    if given != wanted:
        raise ValueError(f"units must have shapes and types {wanted}, not {given}")
    pairs = zip(units, groups, strict=True)
    return [chosen.to(group.parameter.device) for chosen, group in pairs]
