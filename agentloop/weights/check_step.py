"""How much of an update's step an engine has made, read off scores before and after it.

A step of training is often smaller than rounding: engine and trainer then differ no more with the old weights than with the
new ones, and no tolerance tells them apart. But the direction is known. Regressed on what the step did to the trainer's scores,
the differences of an engine with the old weights have slope 1, of one that made the step twice -1, of a right one 0, and
rounding, which knows nothing of the step, averages out over the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SIGMAS = 6.0
LEAST = 0.05


FEWEST = 4
"""Sequences; of fewer nothing is said."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of the same sequences by trainer and engine."""

    expected: Sequence[Sequence[float]]
    got: Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class MissingStep:
    """The share of the step that the engine has not made: 0 all is there, 1 nothing, -1 it was made twice."""

    share: float
    limit: float
    """What its absolute value may be, in the same unit: `SIGMAS` standard errors and `LEAST`, and what noise of the trainer
    itself may feign. 1 and more: the step was too small to tell."""

    @property
    def beyond(self) -> bool:
        return abs(self.share) > self.limit


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of one sequence's tokens, or of many's."""

    step_step: float = 0.0
    step_off: float = 0.0
    noise: float = 0.0
    weights: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of step² off², step³ off and step⁴: the standard error's."""

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.step_step + other.step_step,
            self.step_off + other.step_off,
            self.noise + other.noise,
            (
                self.weights[0] + other.weights[0],
                self.weights[1] + other.weights[1],
                self.weights[2] + other.weights[2],
            ),
        )

    def estimate(self) -> MissingStep:
        share = self.step_off / self.step_step
        square = self.weights[0] - 2 * share * self.weights[1] + share * share * self.weights[2]
        error = math.sqrt(max(square, 0.0)) / self.step_step
        return MissingStep(share, SIGMAS * error + LEAST + self.noise / self.step_step)


def missing_step(before: Scores, now: Scores) -> MissingStep | None:
    """`before`: of a check that found nothing. `None` where there are fewer than `FEWEST` sequences, the step moved no score,
    or something is no number.

    Ordinary least squares through the origin, with standard errors that allow for unequal variances (White 1980). One token
    that a mixture routes otherwise can carry such an estimate away, so it is made with each sequence left out in turn, and the
    one that gives least alarm is answered. The trainer's own rounding is on both sides of the regression and pulls the slope
    towards 1; by at most the variance of the differences of `before` over that of the step, which the limit adds.
    """
    parts = [_sums(*rows) for rows in zip(before.expected, before.got, now.expected, now.got, strict=True)]
    if len(parts) < FEWEST or not all(math.isfinite(part.step_step + part.noise + sum(part.weights)) for part in parts):
        return None
    others = [sum((part for part in parts if part is not left_out), _Sums()) for left_out in parts]
    if any(other.step_step <= 0 for other in others):
        return None
    return min((other.estimate() for other in others), key=lambda found: abs(found.share) / found.limit)


def _sums(
    expected_before: Sequence[float], got_before: Sequence[float], expected: Sequence[float], got: Sequence[float]
) -> _Sums:
    step = [old - new for old, new in zip(expected_before, expected, strict=True)]
    off = [there - here for there, here in zip(got, expected, strict=True)]
    noise = [there - here for there, here in zip(got_before, expected_before, strict=True)]
    pairs = list(zip(step, off, strict=True))
    return _Sums(
        sum(x * x for x in step),
        sum(x * y for x, y in pairs),
        sum(y * y for y in noise),
        (sum((x * y) ** 2 for x, y in pairs), sum(x**3 * y for x, y in pairs), sum(x**4 for x in step)),
    )
