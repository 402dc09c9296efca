"""Estimators of how far two sides' log-probabilities of the same tokens are apart, for many groups of tokens at once.

With d = trainer − rollout, log-probabilities in nats, and the ratio r = exp(d). The names are the field's; verl has the same in
`verl/trainer/ppo/rollout_corr_helper.py` and `verl/utils/debug/metrics.py`. Tokens were drawn by the rollout, so that

- `k1` = mean(−d), `k2` = mean(d²/2), `k3` = mean(r − 1 − d) estimate KL(rollout ‖ trainer): J. Schulman, "Approximating KL
  Divergence" (2020). `k1` is unbiased and may be negative; `k3` never is and varies less. verl: `rollout_corr/kl`, `k3_kl`.
- `ess`, the effective sample size as a share of the tokens: mean(w)² / mean(w²) with w = min(r, upper end of the clip range).
  verl: `rollout_corr/rollout_is_eff_sample_size`.
- `chi2` = mean(r²) − 1. verl: `rollout_corr/chi2_token`.

As in verl, d is kept within ±20 before it is exponentiated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

SAFETY_BOUND = 20.0
PERCENTILES = {"p0.1": 0.001, "p1": 0.01, "p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
_CHUNK = 1 << 15
"""Tokens worked on at a time, so that their columns stay in the cache."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one group of tokens. `None` where there is no token; a correlation is it also where one side does not vary."""

    tokens: int
    """Compared: sampled, and with a finite number on both sides."""
    not_recorded: int
    """Sampled tokens of which one side has no number."""
    infinite: int
    """Sampled tokens that one side calls impossible (−inf). They are in no mean."""
    max_abs: float | None
    mean: float | None
    """Of d, with its sign."""
    mean_abs: float | None
    k1: float | None
    k2: float | None
    k3: float | None
    correlation: float | None
    """Pearson's, of the log-probabilities."""
    ratio: dict[str, float] | None
    """`min`, `p0.1`, …, `p99.9`, `max`, interpolated linearly as `numpy.percentile` does."""
    ratio_outside: float | None
    """Share of the tokens whose ratio is outside of the clip range: `ratio_high` above it, `ratio_low` below it."""
    ratio_high: float | None
    ratio_low: float | None
    ess: float | None
    chi2: float | None
    probs_max_abs: float | None
    """Of probabilities, not of their logarithms; verl's `training/rollout_probs_diff_max`, as the next two."""
    probs_mean_abs: float | None
    probs_correlation: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Drift:
    """Both sides of N tokens, made ready for `by`."""

    def __init__(self, trainer: Any, rollout: Any, clip: tuple[float, float] = (0.5, 2.0)) -> None:
        """Log-probabilities, (N,). NaN is «not recorded»."""
        trainer, rollout = np.asarray(trainer), np.asarray(rollout)
        self.clip = clip
        self.recorded = ~(np.isnan(trainer) | np.isnan(rollout))
        self.finite = np.isfinite(trainer) & np.isfinite(rollout)
        self.trainer = trainer[self.finite].astype(np.float64)
        self.rollout = rollout[self.finite].astype(np.float64)
        self.diff = self.trainer - self.rollout
        """(M,), of the finite ones."""
        self._order = np.argsort(self.diff)
        # Moments are taken about the middle of some tokens, so that little cancels in correlations.
        sides = self.trainer[:_CHUNK], self.rollout[:_CHUNK]
        self._centres = [float(side.mean()) for side in (*sides, *map(np.exp, sides))] if len(self.diff) else [0.0] * 4

    def by(self, *groupings: tuple[Any, int]) -> list[list[Figures]]:
        """For each grouping, (label of each of the N tokens, number of groups), the figures of its groups."""
        kept = [(_small(labels, n)[self.finite], n) for labels, n in groupings]
        sums = self._sums(kept)
        result = []
        for (labels, n), (given, _), (totals, largest) in zip(kept, groupings, sums, strict=True):
            missing = np.bincount(given[~self.recorded], minlength=n)
            infinite = np.bincount(given[self.recorded & ~self.finite], minlength=n)
            ratios = self._ratios(labels, n)
            result.append(
                [
                    self._figures(totals[:, group], largest[group], ratios[group], int(missing[group]), int(infinite[group]))
                    for group in range(n)
                ]
            )
        return result

    def _sums(self, groupings: list[tuple[Any, int]]) -> list[tuple[Any, Any]]:
        """For each grouping the sums of the columns, (columns, groups), and the largest difference of probabilities, (groups,).

        Neighbours have most labels in common, so runs of tokens with the same labels are summed up first."""
        found = [(np.zeros((len(_SUMS), n)), np.zeros(n)) for _, n in groupings]
        for start in range(0, len(self.diff), _CHUNK):
            part = slice(start, start + _CHUNK)
            columns, apart = self._columns(part)
            begins: Any = np.ones(len(apart), bool)
            begins[1:] = False
            for labels, n in groupings:
                if n > 1:
                    begins[1:] |= labels[part][1:] != labels[part][:-1]
            runs = np.flatnonzero(begins)
            summed = [np.add.reduceat(column, runs) for column in columns]
            most = np.maximum.reduceat(apart, runs)
            for (labels, n), (totals, largest) in zip(groupings, found, strict=True):
                own = labels[part][runs].astype(np.intp)
                for index, column in enumerate(summed):
                    totals[index] += np.bincount(own, column, minlength=n)
                np.maximum.at(largest, own, most)
        return found

    def _columns(self, part: slice) -> tuple[list[Any], Any]:
        """What is summed up, in the order of `_SUMS`, and the differences of probabilities."""
        d, low, high = self.diff[part], *self.clip
        x, y = self.trainer[part] - self._centres[0], self.rollout[part] - self._centres[1]
        bounded = np.clip(d, -SAFETY_BOUND, SAFETY_BOUND)
        grown = np.expm1(bounded)
        ratio = grown + 1.0
        weight = np.minimum(ratio, high)
        p, q = np.exp(self.trainer[part]), np.exp(self.rollout[part])
        apart = np.abs(p - q)
        p, q = p - self._centres[2], q - self._centres[3]
        columns = [
            *(np.ones(len(d)), d, np.abs(d), d * d, grown - bounded, ratio * ratio, weight, weight * weight),
            *((ratio > high).astype(np.float64), (ratio < low).astype(np.float64)),
            *(x, y, x * x, y * y, x * y, p, q, p * p, q * q, p * q, apart),
        ]
        return columns, apart

    def _ratios(self, labels: Any, n: int) -> list[tuple[dict[str, float], float] | None]:
        """By group, percentiles of the ratio and the largest difference: the order by difference is found once, and then sorted
        by label, stably."""
        by_label = self._order if n == 1 else self._order[np.argsort(labels[self._order], kind="stable")]
        counts = np.bincount(labels, minlength=n)
        starts = np.cumsum(counts) - counts
        found: list[tuple[dict[str, float], float] | None] = []
        shares: Any = np.array([0.0, *PERCENTILES.values(), 1.0])
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            if not count:
                found.append(None)
                continue
            places = shares * (count - 1)
            low = np.floor(places).astype(np.int64)
            high = np.minimum(low + 1, count - 1)
            below, above = (self._ratio(by_label[start + at]) for at in (low, high))
            values = below + (above - below) * (places - low)
            largest = float(np.abs(self.diff[by_label[[start, start + count - 1]]]).max())
            found.append((dict(zip(("min", *PERCENTILES, "max"), values.tolist(), strict=True)), largest))
        return found

    def _ratio(self, at: Any) -> Any:
        return np.exp(np.clip(self.diff[at], -SAFETY_BOUND, SAFETY_BOUND))

    def _figures(
        self, totals: Any, probs_max: float, sorted_: tuple[dict[str, float], float] | None, missing: int, infinite: int
    ) -> Figures:
        if sorted_ is None:
            return Figures(0, missing, infinite, *[None] * (len(fields(Figures)) - 3))
        n = int(totals[0])
        mean = dict(zip(_SUMS, (totals / n).tolist(), strict=True))
        return Figures(
            tokens=n,
            not_recorded=missing,
            infinite=infinite,
            max_abs=sorted_[1],
            mean=mean["d"],
            mean_abs=mean["abs"],
            k1=-mean["d"],
            k2=mean["d2"] / 2,
            k3=mean["k3"],
            correlation=_pearson(*(mean[name] for name in ("x", "y", "xx", "yy", "xy")), *self._centres[:2]),
            ratio=sorted_[0],
            ratio_outside=mean["high"] + mean["low"],
            ratio_high=mean["high"],
            ratio_low=mean["low"],
            ess=mean["w"] ** 2 / mean["ww"] if mean["ww"] else None,
            chi2=mean["r2"] - 1.0,
            probs_max_abs=float(probs_max),
            probs_mean_abs=mean["apart"],
            probs_correlation=_pearson(*(mean[name] for name in ("p", "q", "pp", "qq", "pq")), *self._centres[2:]),
        )


_SUMS = ("n", "d", "abs", "d2", "k3", "r2", "w", "ww", "high", "low", "x", "y", "xx", "yy", "xy", "p", "q", "pp", "qq", "pq",
         "apart")  # fmt: skip


def _pearson(x: float, y: float, xx: float, yy: float, xy: float, x_centre: float, y_centre: float) -> float | None:
    """From means about the centres; `None` if a variance is no more than what rounding leaves of equal numbers."""
    variances = xx - x * x, yy - y * y
    noise = 1e-13 * xx + 1e-28 * x_centre**2, 1e-13 * yy + 1e-28 * y_centre**2
    if variances[0] <= noise[0] or variances[1] <= noise[1]:
        return None
    return float((xy - x * y) / np.sqrt(variances[0] * variances[1]))


def _small(labels: Any, n: int) -> Any:
    """Sorting stably is quick for few bits."""
    return np.asarray(labels).astype(np.uint8 if n <= 1 << 8 else np.uint16 if n <= 1 << 16 else np.int64, copy=False)
