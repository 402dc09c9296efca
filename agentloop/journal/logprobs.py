"""Trainer against rollout: how far apart their log-probabilities are, by the trainer's step and by turn."""

from __future__ import annotations

from typing import Any

import numpy as np

from agentloop.journal.reader import Run
from agentloop.journal.train_side import TrainedTrajectory


class Agreement:
    """Two sides' numbers for the same tokens, summed up as they come."""

    def __init__(self) -> None:
        self.tokens = 0
        self.not_compared = 0
        """Tokens for which one side has no finite number."""
        self._max = 0.0
        self._sum = 0.0
        self._mean: Any = np.zeros(2)
        self._moments: Any = np.zeros((2, 2))
        """Sums of products of deviations from the means."""

    def add(self, trainer: Any, rollout: Any) -> None:
        """Arrays of the same length."""
        both = np.stack([trainer, rollout]).astype(np.float64)
        finite = np.isfinite(both).all(axis=0)
        both = both[:, finite]
        count = both.shape[1]
        self.not_compared += len(finite) - count
        if not count:
            return
        apart = np.abs(both[0] - both[1])
        self._max = max(self._max, float(apart.max()))
        self._sum += float(apart.sum())
        # Two parts merged as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        # variances" (1979): no difference of large sums.
        mean = both.mean(axis=1)
        deviations, shift, total = both - mean[:, None], mean - self._mean, self.tokens + count
        self._moments += deviations @ deviations.T + np.outer(shift, shift) * self.tokens * count / total
        self._mean += shift * count / total
        self.tokens = total

    def figures(self) -> dict[str, Any]:
        """`tokens`, `not_compared`; `max_diff` and `mean_diff` of the absolute differences, `None` without tokens;
        `correlation`, Pearson's, `None` if one side does not vary."""
        scale = float(np.sqrt(self._moments[0, 0] * self._moments[1, 1]))
        return {
            "tokens": self.tokens,
            "not_compared": self.not_compared,
            "max_diff": self._max if self.tokens else None,
            "mean_diff": self._sum / self.tokens if self.tokens else None,
            "correlation": float(self._moments[0, 1]) / scale if scale > 0 else None,
        }


class _Step:
    """One step of the trainer."""

    def __init__(self) -> None:
        self.trajectories = 0
        self.not_recomputed = 0
        self.versions: list[int] = []
        self.turns: dict[int, Agreement] = {}
        self.all = Agreement()

    def figures(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "trajectories": self.trajectories,
            "not_recomputed": self.not_recomputed,
            "sampled_by": [min(self.versions), max(self.versions)] if self.versions else None,
            "turns": {str(index): self.turns[index].figures() for index in sorted(self.turns)},
            "all": self.all.figures(),
        }


def run_logprobs(run: Run, step: int | None = None) -> dict[str, Any]:
    """A run, or one step of its trainer, as JSON has it. Raises `JournalError` if something that is needed is damaged.

    - `expected`, `arrived`: training trajectories that verl is given, and those whose train side is there; `missing`: the
      difference, by the step under which the journal has them.
    - `steps`, by the trainer's step, whose weights have been updated in the steps before it:
      - `trajectories` that it trained on, and of them those that are not compared because the trainer took the rollout's
        log-probabilities as its own (`not_recomputed`);
      - `sampled_by`: lowest and highest weight version that sampled them; `None` if the engine did not tell;
      - `turns`, by turn index as text, and `all`: see `Agreement.figures`.
    """
    steps: dict[int, _Step] = {}
    expected = arrived = 0
    missing: dict[str, int] = {}
    for place in run.steps():
        if place.partition != "train":
            continue
        side = run.train_side(place.step)
        expected += side.expected
        arrived += side.arrived
        if side.arrived < side.expected:
            missing[str(place.step)] = side.expected - side.arrived
        if step is not None and step not in side.trained_steps:
            continue
        for trajectory in side:
            if step in (None, trajectory.trained_step):
                _add(steps.setdefault(trajectory.trained_step, _Step()), trajectory)
    figures = [steps[at].figures(at) for at in sorted(steps)]
    return {"expected": expected, "arrived": arrived, "missing": missing, "steps": figures}


def _add(step: _Step, trajectory: TrainedTrajectory) -> None:
    step.trajectories += 1
    if not trajectory.recomputed:
        step.not_recomputed += 1
        return
    for turn in trajectory.recorded.turns:
        step.versions += [version for version in (turn.min_weight_version, turn.weight_version) if version is not None]
    trainer, rollout = trajectory.old_log_probs, trajectory.rollout_log_probs
    for index, place in trajectory.turns():
        step.turns.setdefault(index, Agreement()).add(trainer[place], rollout[place])
        step.all.add(trainer[place], rollout[place])
