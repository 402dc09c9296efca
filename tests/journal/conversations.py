"""Conversations put together by hand through the ledger, told to a recorder as the loop tells them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from agentloop.journal import Recorder
from agentloop.trajectory import (
    CallRecord,
    CallStatus,
    EndReason,
    Origin,
    Reward,
    Sample,
    State,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)

VOCABULARY = [bytes([byte]) for byte in range(256)] + ["été 🙂".encode(), b"\xf0\x9f", b"\x99\x82", b"<|im_end|>", b" the"]
"""The bytes of each token id: single bytes, and pieces that hold parts of characters."""


def decode(token_id: int) -> bytes:
    return VOCABULARY[token_id]


def conversation(
    recorder: Recorder,
    seed: int = 0,
    *,
    uid: str | None = None,
    step: int = 0,
    validate: bool = False,
    turns: int = 3,
    tokens: int = 30,
    log_probs: bool = True,
    reward: float | None = None,
    stop_after: str | None = None,
) -> Trajectory:
    """A conversation made up from `seed`; `stop_after` leaves it unfinished after `start`, `turn`, `tool` or
    `observation` of its first turn."""
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(len(VOCABULARY)) for _ in range(rng.randint(1, most))]

    sample = Sample(
        [{"role": "system", "content": "Use the tools."}, {"role": "user", "content": f"question {seed} 🙂"}],
        uid=uid if uid is not None else f"u{seed}",
        data_source="test",
        ground_truth={"answer": seed},
        tools=("calculator",),
        tools_kwargs={"calculator": {"create_kwargs": {"precision": 3}}},
        extra_info={"index": seed},
    )
    trajectory = Trajectory(sample, sibling=seed % 4, step=step, validate=validate)
    trajectory.append_prompt(ids(tokens))
    recorder.trajectory_start(trajectory)
    if stop_after == "start":
        return trajectory
    for index in range(turns):
        last = index == turns - 1
        sampled = ids(tokens)
        values = [-rng.expovariate(1.0) for _ in sampled] if log_probs else None
        stop = StopReason.LENGTH if last and seed % 3 == 0 else StopReason.STOP
        turn = Turn(index, len(trajectory), len(trajectory) + len(sampled), stop, 7 + index, 6 + index, 5, 0.25)
        trajectory.append_sampled(sampled, values, turn)
        recorder.turn(trajectory, turn)
        if stop_after == "turn":
            return trajectory
        if last:
            break
        for place in reversed(range(2)):  # the second call is back first
            call = ToolCall("calculator", {"expression": "1+1", "deep": [{"a": [1, {"b": None}]}]}, f"t{index}c{place}")
            record = CallRecord(
                call,
                CallStatus.OK if place else CallStatus.TIMEOUT,
                f"result {place}\n\x1b[31m🙂\u202e",
                reward=0.5 * place,
                metrics={"cells": 2.0},
                attempts=1 + place,
                queue_s=0.1,
                run_s=0.2,
            )
            turn.calls.append(record)
            recorder.tool(trajectory, turn, record)
            if stop_after == "tool":
                return trajectory
        turn.calls.reverse()
        turn.calls[0] = replace(turn.calls[0], cut_tokens=3)  # as the loop does when the answer has to be cut
        turn.tools_s = 0.5
        turn.parse_errors = ["the second call is not JSON"] if index == 1 else []
        for origin in (Origin.TEMPLATE, Origin.OBSERVATION, Origin.TEMPLATE):
            trajectory.append(origin, ids(5))
        recorder.observation(trajectory, turn)
        if stop_after == "observation":
            return trajectory
    finish(trajectory, recorder, reward=rng.random() if reward is None else reward)
    return trajectory


def finish(
    trajectory: Trajectory, recorder: Recorder, *, reward: float = 1.0, end_reason: EndReason = EndReason.FINAL_ANSWER
) -> None:
    trajectory.reward = Reward(reward, {"correct": reward, "tool/calculator": 0.5}, {"extracted": "4"}, turns=(0.5, -0.25))
    trajectory.end_reason, trajectory.state = end_reason, State.DONE
    trajectory.score_s, trajectory.total_s = 0.01, 1.5
    recorder.trajectory_end(trajectory)


def facts(trajectory: Trajectory) -> dict[str, Any]:
    """Everything that a record must give back; log-probabilities as float32."""
    import numpy as np

    values = trajectory.rollout_log_probs
    return {
        "id": trajectory.id,
        "input_ids": trajectory.input_ids,
        "response_mask": trajectory.response_mask,
        "rollout_log_probs": None if values is None else [float(np.float32(value)) for value in values],
        "segments": [(segment.origin, len(segment.ids), segment.turn) for segment in trajectory.segments],
        "turns": trajectory.turns,
        "reward": trajectory.reward,
        "end": (trajectory.end_reason, trajectory.state, trajectory.error, trajectory.masked),
        "times": (trajectory.score_s, trajectory.total_s),
        "sample": trajectory.sample,
        "place": (trajectory.step, trajectory.validate, trajectory.sibling, trajectory.attempt),
    }
