"""What the consistency report costs: for a long run, and in a step of a running trainer.

`python -m benchmarks.consistency [--tokens 10000000]`

The tokens are made up (noise as bfloat16 leaves it). Timed is all that the report does with them once they are in memory,
and for the rows of a trainer also making its table of them.
"""

from __future__ import annotations

import argparse
import resource
import sys
from time import perf_counter
from typing import Any

import numpy as np

from agentloop.consistency import Drift, consistency
from agentloop.consistency.report import report_of
from agentloop.consistency.tokens import COLUMNS, Place, Tokens
from agentloop.journal.train_side import TrainerRow
from benchmarks.report import report

LENGTH = 1_000
"""Sampled tokens of a trajectory, in turns of `TURN`."""
TURN = 200
ROWS = 256


def long_run(tokens: int) -> Tokens:
    """Trajectories of five turns, a hundred a step."""
    rng = np.random.default_rng(0)
    count = tokens // LENGTH
    position = np.tile(np.arange(LENGTH), count)
    rollout = -rng.exponential(0.5, count * LENGTH)
    turn = position // TURN
    trajectory: Any = np.repeat(np.arange(count), LENGTH)
    columns = {
        "trainer": rollout + rng.normal(0, 0.01, len(rollout)),
        "rollout": rollout,
        "trajectory": trajectory,
        "turn": turn,
        "position": position,
        "in_turn": position % TURN,
        "origin": turn > 0,
        "staleness": trajectory % 3,
    }
    places = [
        Place(f"g{index}_0", "train", index // 100, index // 100, 0, True, 100, (0, 2), lambda _: (1, None))
        for index in range(count)
    ]
    return Tokens({name: columns[name].astype(kind) for name, kind in COLUMNS.items()}, places)


def batch(tokens: int) -> list[TrainerRow]:
    """`ROWS` rows, of whose response tokens two thirds are sampled."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(ROWS):
        n = tokens // ROWS
        sampled = np.arange(n) % (TURN * 3 // 2) < TURN
        rollout = np.where(sampled, -rng.exponential(0.5, n), 0).astype(np.float32)
        columns = {
            "old_log_probs": rollout + rng.normal(0, 0.01, n).astype(np.float32),
            "rollout_log_probs": rollout,
            "response_mask": sampled.astype(np.int64),
        }
        rows.append(TrainerRow(1, f"g{index // 8}", index % 8, np.zeros(n, np.int64), columns, (0, 0)))
    return rows


def measure(tokens: int) -> dict[str, Any]:
    rows = batch(1_840_000)
    began = perf_counter()
    step = consistency(rows, step=1)
    step_s = perf_counter() - began
    small = batch(8_000)
    began = perf_counter()
    consistency(small, step=1)
    small_s = perf_counter() - began
    table = long_run(tokens)
    began = perf_counter()
    whole = report_of(table)
    whole_s = perf_counter() - began
    began = perf_counter()
    Drift(table["trainer"], table["rollout"]).by((np.zeros(len(table), np.uint8), 1))
    figures_s = perf_counter() - began
    return {
        "tokens": whole.all.tokens,
        "steps": len(whole.steps),
        "whole_s": round(whole_s, 2),
        "one_group_s": round(figures_s, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "step_response_tokens": ROWS * (1_840_000 // ROWS),
        "step_sampled_tokens": step.all.tokens,
        "step_s": round(step_s, 3),
        "quickstart_step_s": round(small_s, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What the consistency report costs.")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="sampled tokens of the long run")
    report("consistency", measure(parser.parse_args().tokens), [])
    return 0


if __name__ == "__main__":
    sys.exit(main())
