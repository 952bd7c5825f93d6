import doctest
import importlib
import math
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import swdlib
from swdlib.schedules import (
    Alternating,
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    Piecewise,
    Schedule,
    Steps,
    as_schedule,
    growing,
)

RAMPS = (Linear, Exponential, Cosine, Cubic)
ramps = pytest.mark.parametrize("ramp", RAMPS)
values = st.floats(1e-100, 1e100)
progresses = st.floats(0.0, 1.0)


@pytest.mark.parametrize(
    ("schedule", "progress", "value"),
    [
        (Constant(0.3), 0.7, 0.3),
        (Linear(1.0, 3.0), 0.25, 1.5),
        (Linear(1.0, 3.0, begin=0.5), 0.75, 2.0),
        (Exponential(0.1, 1e5), 0.5, 100.0),
        (Exponential(8.0, 1.0), 2 / 3, 2.0),
        (Cosine(0.0, 2.0), 0.5, 1.0),
        (Cosine(1.0, 0.0), 1 / 3, 0.75),
        (Cubic(0.0, 0.8), 0.5, 0.7),
        (Cubic(0.0, 0.9, begin=0.2, finish=0.7), 0.45, 0.9 * 7 / 8),
        (Steps(0.1, 0.1, (1 / 3, 2 / 3)), 0.5, 0.01),
        (Piecewise(((0.0, 1.0), (0.2, 5.0), (1.0, 3.0))), 0.1, 3.0),
        (Piecewise(((0.0, 1.0), (0.2, 5.0), (1.0, 3.0))), 0.6, 4.0),
        (Alternating(0.9, 0.1, begin=0.2, finish=0.7), 0.19, 0.0),
        (Alternating(0.9, 0.1, begin=0.2, finish=0.7), 0.2, 0.9),
        (Alternating(0.9, 0.1, begin=0.2, finish=0.7), 0.1 + 0.2, 0.0),
        (Alternating(0.9, 0.1, begin=0.2, finish=0.7), 0.69, 0.9),
        (Alternating(0.9, 0.1, begin=0.2, finish=0.7), 0.75, 0.9),
    ],
)
def test_values_by_hand(schedule: Schedule, progress: float, value: float) -> None:
    assert schedule(progress) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((math.nan, 0.1, 0.2, 0.7), "value must be a finite number"),
        ((0.9, 0.0, 0.2, 0.7), r"turn must be in \(0, 1\], not 0.0"),
        ((0.9, 0.1, 0.8, 0.7), "0 <= begin <= finish <= 1, not begin=0.8"),
    ],
)
def test_turns_out_of_range_are_refused(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Alternating(*arguments)


@ramps
@given(start=values, end=values, begin=st.floats(0.0, 0.49), finish=st.floats(0.5, 1.0))
def test_ends_are_exact_and_flat_beyond(
    ramp: type, start: float, end: float, begin: float, finish: float
) -> None:
    schedule = ramp(start, end, begin, finish)
    assert schedule(0.0) == schedule(begin) == schedule(-1.0) == start
    assert schedule(1.0) == schedule(finish) == schedule(2.0) == end


@ramps
@given(start=values, end=values, places=st.tuples(progresses, progresses))
def test_ramps_are_monotone_and_stay_between_their_ends(
    ramp: type, start: float, end: float, places: tuple[float, float]
) -> None:
    early, late = (ramp(start, end)(place) for place in sorted(places))
    slack = 1e-9 * max(start, end)
    assert min(start, end) - slack <= early <= max(start, end) + slack
    assert (late - early) * math.copysign(1.0, end - start) >= -slack


def test_shapes_of_the_ramps() -> None:
    at = {ramp: [ramp(1.0, 2.0)(p) for p in (0.25, 0.75)] for ramp in RAMPS}
    assert at[Exponential][0] < at[Linear][0] < at[Cubic][0]
    assert at[Cosine][0] < at[Linear][0] and at[Cosine][1] > at[Linear][1]


def test_steps_change_at_their_milestones() -> None:
    schedule = Steps(1.0, 0.5, (0.25, 0.75))
    below = math.nextafter(0.25, 0.0)
    assert [schedule(p) for p in (0.0, below, 0.25, 0.74, 0.75, 1.0)] == [
        1,
        1,
        0.5,
        0.5,
        0.25,
        0.25,
    ]
    # A run of 300 epochs reaches a third at epoch 100, not 101.
    assert Steps(1.0, 0.5, (1 / 3,))(100 / 300) == 0.5


def test_piecewise_passes_through_its_points_and_is_flat_beyond() -> None:
    points = ((0.1, 1 / 3), (0.3, 0.7), (0.9, 0.1))
    schedule = Piecewise(points)
    assert [schedule(place) for place, _ in points] == [value for _, value in points]
    assert schedule(0.0) == 1 / 3 and schedule(1.0) == 0.1
    assert Piecewise(((0.5, 2.0),))(0.0) == Piecewise(((0.5, 2.0),))(1.0) == 2.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Constant(math.nan), "value must be a finite number, not nan"),
        (lambda: Constant("1"), "value must be a finite number, not '1'"),  # type: ignore[arg-type]
        (lambda: Constant(10**400), "value must be a finite number, not 1000"),
        (lambda: Cubic(0.0, 1.0, finish=torch.ones(3)), "finish=tensor"),  # type: ignore[arg-type]
        (lambda: Linear(math.inf, 1.0), "start must be a finite number, not inf"),
        (lambda: Linear(0.0, math.nan), "end must be a finite number, not nan"),
        (lambda: Linear(0.0, 1.0, begin=0.5, finish=0.5), "begin=0.5, finish=0.5"),
        (lambda: Cubic(0.0, 1.0, begin=-0.1), "begin=-0.1"),
        (lambda: Cosine(0.0, 1.0, finish=1.1), "finish=1.1"),
        (lambda: Cosine(0.0, 1.0, begin=math.nan), "begin=nan"),
        (lambda: Exponential(0.0, 1.0), "start=0.0.*use Linear"),
        (lambda: Exponential(1.0, -2.0), "end=-2.0.*use Linear"),
        (lambda: Steps(math.nan, 0.1, (0.5,)), "start must be a finite number"),
        (lambda: Steps(1.0, math.inf, (0.5,)), "factor must be a finite number"),
        (lambda: Steps(1.0, 0.1, (0.5, 30)), r"between 0 and 1, not \(0.5, 30\)"),
        (lambda: Steps(1.0, 0.1, (math.nan,)), "between 0 and 1"),
        (lambda: Piecewise(()), r"points .* not \(\)"),
        (lambda: Piecewise(((0.5, 1.0), (0.5, 2.0))), "rising progress"),
        (
            lambda: Piecewise(((0.0, 1.0), (1.0, math.nan))),
            "value must be a finite number, not nan",
        ),
        (lambda: Piecewise(((math.nan, 1.0), (1.0, 1.0))), "progress must be a finite number"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Schedule], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_schedules_compare_hash_and_print_as_what_they_are() -> None:
    assert Linear(0.0, 1.0) == Linear(0.0, 1.0, 0.0, 1.0)
    assert Linear(0.0, 1.0) != Cosine(0.0, 1.0)
    assert Linear(0.0, 1.0) != Linear(0.0, 1.0, begin=0.1)
    assert len({Exponential(1.0, 2.0), Exponential(1.0, 2.0), Cubic(1.0, 2.0)}) == 2
    assert repr(Cubic(0.0, 0.9)) == "Cubic(start=0.0, end=0.9, begin=0.0, finish=1.0)"
    with pytest.raises(AttributeError):
        Linear(0.0, 1.0).start = 2.0  # type: ignore[misc]


def test_a_number_or_any_function_serves_as_a_schedule() -> None:
    assert as_schedule(3.0, abs) == Constant(3.0)
    assert as_schedule(math.sqrt, abs) is math.sqrt
    assert as_schedule(-3.0, abs) == Constant(3.0)


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(swdlib.__path__)])
def test_examples_in_docstrings_run(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"swdlib.{module}"))
    assert not failed
    assert tried or module != "schedules"


def test_growths_by_hand() -> None:
    shapes: dict[Any, Any] = {"exponential": Exponential, "linear": Linear}
    shapes |= {"cosine": Cosine, "cubic": Cubic}
    for name, shape in shapes.items():
        assert growing(name, 2.0, 8.0, 0.5, Constant(0.1)) == shape(2.0, 8.0, 0.0, 0.5)
    lr = Linear(0.4, 0.1)
    strength = growing("per_step", 2.0, 8.0, 0.5, lr)
    # What a step takes, a times the rate, goes from 2 * 0.4 to 8 * 0.25, half-way its square root.
    assert [strength(t) for t in (0, 0.25, 0.5, 1)] == pytest.approx(
        [2.0, math.sqrt(0.8 * 2.0) / 0.325, 8.0, 8.0]
    )
