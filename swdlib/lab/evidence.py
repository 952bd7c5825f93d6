"""Evidence: what records say of two methods, by runs that differ in the method alone."""

from typing import TYPE_CHECKING

from swdlib.lab.plots import interval, method_of
from swdlib.runs.records import final_accuracy, last_rows

if TYPE_CHECKING:
    import pandas as pd


def finals(rows: "pd.DataFrame") -> "pd.DataFrame":
    """The last row of each run that has a result, with its method in the column `method`.

    `accuracy` is that with recalibrated batch norm, or, where a network has none, that as trained.
    """
    ends = last_rows(rows).dropna(subset=["top1"])
    methods = [method_of(row) for _, row in ends.iterrows()]
    return ends.assign(method=methods, accuracy=final_accuracy(ends))


def chosen(ends: "pd.DataFrame", setting: str = "peak_lr") -> "pd.DataFrame":
    """The protocol of tuning: the value of `setting` of the best accuracy on held-out images.

    `ends` is what `finals` returns. A row a method and sparsity, with the value, the `accuracy`
    there (the mean over seeds), the number of `tries`, and whether the value is at an `edge` of
    those tried, beyond which a better one may lie. ValueError for runs that were measured on test
    images, and where methods had unequal numbers of tries, which is no fair comparison.
    """
    if not (ends["holdout"] > 0).all():
        raise ValueError("settings are chosen on held-out images, and some runs have holdout = 0")
    means = ends.groupby(["method", "target_sparsity", setting])["accuracy"].mean().reset_index()
    groups = means.groupby(["method", "target_sparsity"])
    best = means.loc[groups["accuracy"].idxmax()].set_index(["method", "target_sparsity"])
    best["tries"], tried = groups.size(), groups[setting].agg(["min", "max"])
    if best["tries"].nunique() > 1:
        raise ValueError(f"methods had unequal numbers of tries: {best['tries'].to_dict()}")
    return best.assign(edge=best[setting].eq(tried["min"]) | best[setting].eq(tried["max"]))


def lead(ends: "pd.DataFrame", method: str, rival: str) -> "pd.DataFrame":
    """By how many points `method` leads `rival` at each sparsity, over the seeds that both have.

    `ends` is what `finals` returns, with one run a method, sparsity and seed. The interval, of
    95 %, is that of the differences with equal seeds; `verdict` is "ahead" or "behind" if it
    excludes zero, "level" if it does not, and "one seed" if there is none.
    """
    import pandas as pd

    keys = ["method", "target_sparsity", "seed"]
    both = ends[ends["method"].isin([method, rival])]
    if both.duplicated(keys).any():
        raise ValueError("there must be one run a method, sparsity and seed, and there are several")
    pairs = both.set_index(keys)["accuracy"].unstack("method").dropna()
    found = {}
    for level, pair in pairs.groupby(level="target_sparsity"):
        differences = pair[method] - pair[rival]
        mean, half = interval(differences) if len(differences) > 1 else (differences.mean(), None)
        found[level] = {
            **{"seeds": len(differences), "lead": mean, "half of interval": half},
            "verdict": "one seed" if half is None else verdict(mean, half),
        }
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("sparsity")


def verdict(mean: float, half: float) -> str:
    """What an interval of differences, `mean` plus and minus `half`, says."""
    return "level" if abs(mean) <= half else "ahead" if mean > 0 else "behind"
