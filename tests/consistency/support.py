"""Runs and batches with a known drift between trainer and rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.journal import JournalWriter, Run
from agentloop.journal.train_side import TrainerRow, write_update
from agentloop.trajectory import Trajectory
from tests.journal.conversations import conversation, decode

Change = Callable[[Trajectory, TrainerRow], None]
"""Changes the trainer's side of a trajectory in place."""


def noisy(rng: np.random.Generator, scale: float = 0.01) -> Change:
    """As bfloat16 leaves it."""

    def change(trajectory: Trajectory, row: TrainerRow) -> None:
        old = row.columns["old_log_probs"]
        old += rng.normal(scale=scale, size=len(old)).astype(np.float32)

    return change


def trainer_side(trajectory: Trajectory) -> TrainerRow:
    """The rollout's numbers, as the trainer would have them; tool output and glue have some too."""
    rollout = np.concatenate([np.array(s.log_probs or [-3.0] * len(s.ids), np.float32) for s in trajectory.segments[1:]])
    mask = np.array(trajectory.response_mask)
    columns = {"old_log_probs": rollout, "advantages": mask.astype(np.float32), "response_mask": mask}
    return TrainerRow(trajectory.step, trajectory.sample.uid, trajectory.sibling, np.array(trajectory.response_ids), columns)


def recorded(
    folder: Path, *changes: Change, trajectories: int = 12, steps: Sequence[int] = (1,), recomputed: bool = True, **kwargs: Any
) -> tuple[Run, list[Trajectory]]:
    """A run whose conversations begin with weight version 6 and go on with 7, 8, …"""
    told = []
    with JournalWriter(folder, decode=decode) as writer:
        for step in steps:
            own = [conversation(writer, seed, step=step, **kwargs) for seed in range(trajectories)]
            told += own
            rows = [trainer_side(trajectory) for trajectory in own]
            for trajectory, row in zip(own, rows, strict=True):
                for change in changes:
                    change(trajectory, row)
            write_update(folder, rows, step=step, update=0, generation=writer.generation, recomputed=recomputed)
    return Run(folder), told


def span(trajectory: Trajectory, turn: int) -> slice:
    """Where a turn's tokens are in the response."""
    found = trajectory.turns[turn]
    return slice(found.start - trajectory.prompt_len, found.end - trajectory.prompt_len)


def batch(
    rng: np.random.Generator, rows: int, *, drift: Callable[[np.random.Generator, int], Any], tokens: int = 120
) -> list[TrainerRow]:
    """Rows as a trainer has them: two turns with a tool's answer between, sampled by versions 0 to 0."""
    made = []
    for place in range(rows):
        sampled = rng.random(tokens) < 2
        sampled[tokens // 3 : tokens // 2] = False
        rollout = np.where(sampled, -rng.exponential(0.5, tokens), 0).astype(np.float32)
        columns = {
            "old_log_probs": (rollout + drift(rng, tokens)).astype(np.float32),
            "rollout_log_probs": rollout,
            "response_mask": sampled.astype(np.int64),
            "sampled": sampled,
        }
        ids = rng.integers(0, 1000, tokens)
        made.append(TrainerRow(1, f"g{place // 4}", place % 4, ids, columns, (0, 0)))
    return made
