"""The torture of runs and files, in small; `make torture` does all of it."""

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests import torture


@pytest.mark.slow
def test_a_killed_run_ends_on_record_as_if_unbroken() -> None:
    counts = torture.kills(2, Random(0))
    assert counts["killed"] == 2 and counts["done and equal"] >= 1
    assert not any(counts[fault] for fault in torture.FAULTS)


@pytest.mark.parametrize("name", torture.FILES)
def test_a_flipped_bit_is_refused_or_harmless(name: str, tmp_path: Path) -> None:
    counts = torture.flips(torture.FILES[name](tmp_path), 20, Random(0))
    assert counts["refused"] + counts["harmless"] == 20 and counts["refused"] > 10


def test_made_up_input_is_accepted_or_refused_with_a_reason() -> None:
    for part in (torture.settings, torture.arguments, torture.texts):
        counts = part(60, Random(0))
        assert counts["accepted"] + counts["refused"] == 60 and counts["refused"] > 10


def test_runs_leave_nothing_behind() -> None:
    assert torture.runs(8) == {"done": 8}


def test_faults_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.flips(lambda changed: (b"whole", changed), 5, Random(0)) == {"silent": 5}

    def fail() -> Any:
        raise KeyError("step")

    counts: Counter[str] = Counter()
    torture.judged(counts, fail, "nothing")
    assert counts == {"foreign": 1} and "KeyError" in capsys.readouterr().err
