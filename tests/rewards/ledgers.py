"""Trajectories built by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentloop.trajectory import CallRecord, CallStatus, Origin, Sample, StopReason, ToolCall, Trajectory, Turn

SAMPLE = Sample([{"role": "user", "content": "What is 2 + 3?"}], ground_truth="5")


def call(
    name: str = "calculator", arguments: Any = None, status: CallStatus = CallStatus.OK, reward: float = 0.0
) -> CallRecord:
    return CallRecord(ToolCall(name, {} if arguments is None else arguments), status, "answer", reward=reward)


def conversation(*turns: Sequence[CallRecord], tokens: int = 4, sample: Sample = SAMPLE) -> Trajectory:
    """One turn of `tokens` tokens for each list of calls, with an answer of 3 tokens after those that have any."""
    trajectory = Trajectory(sample)
    trajectory.append_prompt([1, 2, 3])
    for index, calls in enumerate(turns):
        start = len(trajectory)
        turn = Turn(index, start, start + tokens, StopReason.STOP, calls=list(calls))
        trajectory.append_sampled([7] * tokens, [-0.5] * tokens, turn)
        if calls:
            trajectory.append(Origin.OBSERVATION, [8, 8, 8])
    return trajectory
