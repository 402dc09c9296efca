"""Advantages against the formulas that make one number of a trajectory's reward and its group's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-6
"""Added to the standard deviation, as in verl's `compute_grpo_outcome_advantage`."""
_TOLERANCE = 2e-3
"""Absolute and relative, for sums in float32."""
_TIE = 1e-4
"""Spread of a group's scores below which float error alone makes an advantage."""


ESTIMATORS = ("grpo", "grpo without std", "rloo")
"""The names of `formulas`."""


class Odd(NamedTuple):
    """A row whose advantage is not the formula's."""

    row: int
    found: float
    expected: float
    formula: str


def formulas(scores: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What the estimators that verl has give to each of one group's scores, (n,), by name.

    `grpo`: (r - mean) / (std + 1e-6), the unbiased standard deviation (arXiv 2402.03300, as verl computes it); `grpo without
    std` (Dr. GRPO, arXiv 2503.20783); `rloo`: r less the mean of the others. A group of one keeps its score.
    """
    n = len(scores)
    if n == 1:
        return {"grpo": scores, "grpo without std": scores, "rloo": scores}
    centred = scores - scores.mean()
    return {
        "grpo": centred / (scores.std(ddof=1) + EPSILON),
        "grpo without std": centred,
        "rloo": centred * n / (n - 1),
    }


def odd_ones(
    groups: Sequence[Hashable], scores: NDArray[np.float64], advantages: NDArray[np.float64], estimator: str | None = None
) -> list[Odd] | None:
    """Rows whose advantage, (B,), is not that of `estimator` (a name of `formulas`), by default of the one that most rows
    have; `None` if fewer than half of them have any, which is what another estimator looks like."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    wrong: dict[str, list[Odd]] = {name: [] for name in ESTIMATORS}
    for rows in members.values():
        own = scores[rows]
        most = max(1.0, float(np.abs(own).max()))
        tie = len(rows) > 1 and float(np.ptp(own)) < _TIE * most
        for name, values in formulas(own).items():
            expected = np.zeros(len(rows)) if tie else values
            # A standard deviation of rounding errors makes something of nothing.
            slack = 0.2 * most if tie and name == "grpo" else _TOLERANCE
            apart = np.abs(advantages[rows] - expected) > slack + _TOLERANCE * np.abs(expected)
            wrong[name] += [
                Odd(rows[i], float(advantages[rows[i]]), float(expected[i]), name) for i in np.flatnonzero(apart).tolist()
            ]
    best = estimator if estimator in wrong else min(wrong, key=lambda name: len(wrong[name]))
    return wrong[best] if estimator in wrong or 2 * len(wrong[best]) <= len(groups) else None
