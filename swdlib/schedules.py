"""Schedules: how a number changes while a network trains.

A schedule is a function from progress, in [0, 1], to a value: the strength of a penalty, a rising
sparsity, a learning rate. Those here are frozen dataclasses, which can be compared and printed; any
function of progress will do.

>>> Exponential(0.1, 1e5)(0.5)
100.0
>>> Cubic(0.0, 0.9, begin=0.2, finish=0.7)(0.1)
0.0
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, SupportsFloat

Schedule = Callable[[float], float]
Growth = Literal["exponential", "linear", "cosine", "cubic", "per_step"]


def as_number(value: Any) -> float:
    """The value in double precision, whatever its type; NaN for what is no single number."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # such as an array of several
        return math.nan


def _require_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(as_number(value)):
            raise ValueError(f"{name} must be a finite number, not {value!r}")


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __post_init__(self) -> None:
        _require_finite(value=self.value)

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class _Ramp:
    """From `start` to `end` while progress goes from `begin` to `finish`; flat before and after."""

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        _require_finite(start=self.start, end=self.end)
        if not 0.0 <= as_number(self.begin) < as_number(self.finish) <= 1.0:
            raise ValueError(
                f"begin and finish must satisfy 0 <= begin < finish <= 1, "
                f"not begin={self.begin!r}, finish={self.finish!r}"
            )

    def __call__(self, progress: float) -> float:
        # The ends are returned as given: rounding must not turn a target of 0.98 into 0.98 - 1e-17.
        if progress <= self.begin:
            return self.start
        if progress >= self.finish:
            return self.end
        return self._between((progress - self.begin) / (self.finish - self.begin))

    def _between(self, u: float) -> float:
        """The value at `u`, the share of the ramp that is done, in (0, 1)."""
        raise NotImplementedError


class Linear(_Ramp):
    """A straight line from `start` to `end`."""

    def _between(self, u: float) -> float:
        return self.start + (self.end - self.start) * u


class Exponential(_Ramp):
    """A constant ratio from one step to the next: start * (end / start) ** u.

    This is the published growth of SWD's penalty (Tessier et al. 2022, arXiv 2011.10520).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start <= 0 or self.end <= 0:
            raise ValueError(
                f"an exponential schedule needs start and end above 0, "
                f"not start={self.start!r}, end={self.end!r}; use Linear to reach 0"
            )

    def _between(self, u: float) -> float:
        return float(self.start * (self.end / self.start) ** u)


class Cosine(_Ramp):
    """Half a cosine from `start` to `end`: slow, fast, slow (Loshchilov & Hutter 2017)."""

    def _between(self, u: float) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * u)) / 2


class Cubic(_Ramp):
    """Fast at first, then ever slower: end + (start - end) * (1 - u) ** 3.

    The sparsity of gradual pruning (Zhu & Gupta 2017, arXiv 1710.01878, equation 1).
    """

    def _between(self, u: float) -> float:
        return float(self.end + (self.start - self.end) * (1 - u) ** 3)


@dataclass(frozen=True)
class Steps:
    """`start`, multiplied by `factor` at each milestone, a progress in (0, 1)."""

    start: float
    factor: float
    milestones: tuple[float, ...]

    def __post_init__(self) -> None:
        _require_finite(start=self.start, factor=self.factor)
        if not all(0.0 < milestone < 1.0 for milestone in self.milestones):
            raise ValueError(f"milestones must lie between 0 and 1, not {self.milestones!r}")

    def __call__(self, progress: float) -> float:
        return self.start * self.factor ** sum(progress >= m for m in self.milestones)


@dataclass(frozen=True)
class Piecewise:
    """Straight lines through (progress, value) points: a warm-up, a triangle, any polyline."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        positions = [position for position, _ in self.points]
        if not positions or any(b <= a for a, b in pairwise(positions)):
            raise ValueError(f"points must be in order of rising progress, not {self.points!r}")
        for position, value in self.points:
            _require_finite(progress=position, value=value)

    def __call__(self, progress: float) -> float:
        if progress <= self.points[0][0]:
            return self.points[0][1]
        for (left, low), (right, high) in pairwise(self.points):
            if progress < right:
                return low + (high - low) * (progress - left) / (right - left)
        return self.points[-1][1]


@dataclass(frozen=True)
class Alternating:
    """`value` and 0 in turns of length `turn`, from `begin`; `value` alone from `finish` on."""

    value: float
    turn: float
    begin: float
    finish: float

    def __post_init__(self) -> None:
        _require_finite(value=self.value)
        if not 0.0 < as_number(self.turn) <= 1.0:
            raise ValueError(f"turn must be in (0, 1], not {self.turn!r}")
        if not 0.0 <= as_number(self.begin) <= as_number(self.finish) <= 1.0:
            raise ValueError(
                f"begin and finish must satisfy 0 <= begin <= finish <= 1, "
                f"not begin={self.begin!r}, finish={self.finish!r}"
            )

    def __call__(self, progress: float) -> float:
        if progress < self.begin:
            return 0.0
        turns = math.floor((progress - self.begin) / self.turn + 1e-9)  # 0.1 + 0.2 is above 0.3
        return self.value if progress >= self.finish or turns % 2 == 0 else 0.0


def growing(growth: Growth, a_min: float, a_max: float, end: float, lr: Schedule) -> Schedule:
    """The strength of SWD, from `a_min` at the start to `a_max` at the share `end` of training.

    "exponential", as published, grows by a constant factor a step; "per_step" does so with a times
    the learning rate `lr`, the share of a weight that a step takes off; "linear", "cosine" and
    "cubic" are what they say. ValueError if `end` is not in (0, 1].
    """
    if not 0 < end <= 1:
        raise ValueError(f"growth_end must be above 0 and at most 1, not {end!r}")
    shapes = {"exponential": Exponential, "linear": Linear, "cosine": Cosine, "cubic": Cubic}
    if growth != "per_step":
        return shapes[growth](a_min, a_max, finish=end)
    taken = Exponential(a_min * lr(0.0), a_max * lr(end), finish=end)
    return lambda progress: taken(progress) / lr(min(progress, end))


def check_not_negative(name: str, value: float) -> float:
    """The value as given, if it is a finite number of 0 or more; ValueError otherwise."""
    if not 0 <= as_number(value) < math.inf:
        raise ValueError(f"{name} must be a finite number of 0 or more, not {value!r}")
    return value


def check_count(name: str, value: Any, hint: str = "") -> int:
    """The value as an int, if it is a whole number of at least 1; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}{hint}")
    return int(value)


def as_schedule(value: float | Schedule, check: Callable[[float], float]) -> Schedule:
    """A schedule as it is, or a number as `Constant`; `check` sees its values at both ends."""
    schedule = value if callable(value) else Constant(check(value))
    for progress in (0.0, 1.0):  # so that a wrong schedule is an error before training
        check(schedule(progress))
    return schedule
