"""Trainer against rollout: how far apart their log-probabilities are, turn by turn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from agentloop.journal.reader import Run


def step_logprobs(run: Run, step: int) -> dict[str, Any]:
    """One step of the journal, as JSON has it. Raises `JournalError` if a file of its train side is damaged.

    - `expected`, `arrived`: trajectories of the step that verl is given, and those whose train side is there.
    - `sampled_by`: lowest and highest weight version that sampled the compared tokens; `None` if the engine did not tell.
    - `trained_at`: first and last step of the trainer at which these trajectories were trained, or `None`. At the trainer's
      step s its weights have been updated in s - 1 steps.
    - `turns`: by turn index (as text), and `all`: see `agreement`.
    - `not_recomputed`: trajectories that are left out of it because the trainer took the rollout's log-probabilities.
    """
    side = run.train_side(step)
    turns: dict[int, list[tuple[Any, Any]]] = {}
    versions: list[int] = []
    trained: list[int] = []
    not_recomputed = 0
    for trajectory in side:
        trained.append(trajectory.trained_step)
        if not trajectory.recomputed:
            not_recomputed += 1
            continue
        trainer, rollout, version = trajectory.old_log_probs, trajectory.rollout_log_probs, trajectory.weight_version
        for index, place in trajectory.turns():
            turns.setdefault(index, []).append((trainer[place], rollout[place]))
            known = version[place][version[place] >= 0]
            versions += [int(known.min()), int(known.max())] if len(known) else []
    return {
        "step": step,
        "expected": side.expected,
        "arrived": side.arrived,
        "not_recomputed": not_recomputed,
        "sampled_by": [min(versions), max(versions)] if versions else None,
        "trained_at": [min(trained), max(trained)] if trained else None,
        "turns": {str(index): agreement(turns[index]) for index in sorted(turns)},
        "all": agreement([pair for pairs in turns.values() for pair in pairs]),
    }


def run_logprobs(run: Run, step: int | None = None) -> Iterator[dict[str, Any]]:
    """Every step of the training, or one of them."""
    for place in run.steps():
        if place.partition == "train" and step in (None, place.step):
            yield step_logprobs(run, place.step)


def agreement(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Of arrays of the trainer's and the rollout's log-probabilities of the same tokens:

    `tokens` compared, `max_diff` and `mean_diff` (of the absolute differences), `correlation` (Pearson's; `None` if one side
    does not vary), and `not_compared`: tokens for which one side has no finite number.
    """
    trainer, rollout = (np.concatenate([np.empty(0), *(pair[side] for pair in pairs)]) for side in (0, 1))  # float64
    finite = np.isfinite(trainer) & np.isfinite(rollout)
    trainer, rollout = trainer[finite], rollout[finite]
    apart = np.abs(trainer - rollout)
    return {
        "tokens": len(apart),
        "not_compared": int(len(finite) - len(apart)),
        "max_diff": float(apart.max()) if len(apart) else None,
        "mean_diff": float(apart.mean()) if len(apart) else None,
        "correlation": _correlation(trainer, rollout),
    }


def _correlation(a: Any, b: Any) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    value = float(np.corrcoef(a, b)[0, 1])
    return value if math.isfinite(value) else None
