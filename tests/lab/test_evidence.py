"""Evidence: a lead is one only if the interval of paired differences excludes zero."""

import pandas as pd
import pytest

from swdlib.lab.evidence import chosen, finals, lead, verdict


def ends(**accuracy: list[float]) -> pd.DataFrame:
    rows = [
        {
            "run": f"{m}{s}",
            "recipe": m,
            "iterations": 1,
            "seed": s,
            "target_sparsity": 0.9,
            "top1": a,
        }
        for m, values in accuracy.items()
        for s, a in enumerate(values)
    ]
    return finals(pd.DataFrame(rows))


def test_interval_of_paired_differences_by_hand() -> None:
    found = lead(ends(swd=[62, 70, 81], zhu2017=[60, 69, 78]), "swd", "zhu2017").loc[0.9]
    assert (found["seeds"], found["lead"], found["verdict"]) == (3, 2.0, "level")
    assert found["half of interval"] == pytest.approx(4.3027 / 3**0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ([62, 70, 81], [59.9, 68, 78.9], "ahead"),
        ([59.9, 68, 78.9], [62, 70, 81], "behind"),
        ([62, 70], [60, 64, 9], "level"),
        ([62], [10, 64, 9], "one seed"),
    ],
)
def test_verdict(ours: list[float], theirs: list[float], says: str) -> None:
    found = lead(ends(swd=ours, zhu2017=theirs), "swd", "zhu2017")
    assert found["verdict"].tolist() == [says]


def test_zero_at_the_edge_is_no_lead() -> None:
    assert verdict(1.0, 1.0) == "level"


def test_recalibrated_accuracy_counts_where_it_was_measured() -> None:
    rows = pd.DataFrame(
        {"run": ["a", "a", "b"], "recipe": "swd", "iterations": 1, "top1": [1.0, 10.0, 20.0]}
    ).assign(renewed_top1=[float("nan"), 40.0, float("nan")])
    assert finals(rows)["accuracy"].tolist() == [40.0, 20.0]


def test_two_runs_of_a_seed_are_refused() -> None:
    both = pd.concat([ends(swd=[1], zhu2017=[1]), ends(swd=[2])])
    with pytest.raises(ValueError, match="one run a method, sparsity and seed, and"):
        lead(both, "swd", "zhu2017")


def tries(**accuracy: list[float]) -> pd.DataFrame:
    """One seed at the rates 0.1, 0.2, 0.4, ..., measured on held-out images."""
    found = ends(**accuracy)
    return found.assign(peak_lr=0.1 * 2 ** found["seed"], seed=0, holdout=0.1)


def test_the_best_setting_is_chosen_and_told_if_it_is_at_the_edge() -> None:
    found = chosen(tries(swd=[60, 65, 64], zhu2017=[60, 61, 62]))
    assert found["peak_lr"].tolist() == [0.2, 0.4]
    assert found["accuracy"].tolist() == [65, 62] and found["tries"].tolist() == [3, 3]
    assert found["edge"].tolist() == [False, True]


def test_seeds_are_averaged_before_a_setting_is_chosen() -> None:
    other = tries(swd=[60, 50, 64]).assign(seed=1)
    assert chosen(pd.concat([tries(swd=[60, 65, 54]), other]))["peak_lr"].tolist() == [0.1]


def test_unequal_effort_and_test_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unequal numbers of tries: .*'swd'"):
        chosen(tries(swd=[60, 65, 64], zhu2017=[60, 61]))
    with pytest.raises(ValueError, match="on held-out images, and some runs have holdout = 0"):
        chosen(tries(swd=[60, 65]).assign(holdout=[0.1, 0.0]))
