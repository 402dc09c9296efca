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


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of the same tokens by trainer and engine, one list over all sequences."""

    expected: Sequence[float]
    got: Sequence[float]


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


def missing_step(before: Scores, now: Scores) -> MissingStep | None:
    """`before`: of a check that found nothing. `None` where the step moved no score, or something is no number.

    Ordinary least squares through the origin, with standard errors that allow for unequal variances (White 1980). The
    trainer's own rounding is on both sides of the regression and pulls the slope towards 1; by at most the variance of the
    differences of `before` over that of the step, which the limit adds.
    """
    step = [old - new for old, new in zip(before.expected, now.expected, strict=True)]
    off = [there - here for there, here in zip(now.got, now.expected, strict=True)]
    noise = sum((there - here) ** 2 for there, here in zip(before.got, before.expected, strict=True))
    size = sum(value * value for value in step)
    if not (size > 0 and math.isfinite(size) and math.isfinite(noise) and all(map(math.isfinite, off))):
        return None
    share = sum(x * y for x, y in zip(step, off, strict=True)) / size
    error = math.sqrt(sum((x * (y - share * x)) ** 2 for x, y in zip(step, off, strict=True))) / size
    return MissingStep(share, SIGMAS * error + LEAST + noise / size)
