"""Scoring through verl's own reward managers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agentloop.trajectory import Trajectory
from agentloop.verl.reward import VerlReward
from tests.verl.support import verl_output, verl_worker

Build = Callable[..., Trajectory]


async def test_the_score_is_verls(build: Build, tokenizer: Any, handle: Any) -> None:
    trajectory = build(turns=((5, 3), (4, 0)))
    reward = await VerlReward([handle])(trajectory, trajectory.sample, "unused")
    assert trajectory.sample.fields["extra_info"] == {"index": 3}  # what verl's manager writes into it stays outside

    worker = verl_worker(tokenizer, 12, 24)
    worker.reward_loop_worker_handles = [handle]
    output = verl_output(trajectory)
    await worker._compute_score([output], {**trajectory.sample.fields, "uid": "g0", "session_id": 0, "global_steps": 2})
    assert reward.value == output.reward_score
    assert reward.info == output.extra_fields["reward_extra_info"]
    assert reward.components == {"score": reward.value, "acc": 1.0, "turns": 4.0, "index": 3.0, "rewards": 1.0}

    ours, verls = handle.seen
    assert set(ours.batch.keys()) == set(verls.batch.keys())
    for name in verls.batch.keys():  # noqa: SIM118  a TensorDict iterates over rows
        assert ours.batch[name].tolist() == verls.batch[name].tolist()
    assert set(ours.non_tensor_batch) == set(verls.non_tensor_batch)


async def test_a_reward_that_raises_is_not_a_reward_of_zero(build: Build, handle: Any) -> None:
    trajectory = build()
    trajectory.sample.fields["reward_model"] = {"ground_truth": "boom"}
    with pytest.raises(ValueError, match="the reward is broken"):
        await VerlReward([handle])(trajectory, trajectory.sample, "")
    await asyncio.sleep(0)
