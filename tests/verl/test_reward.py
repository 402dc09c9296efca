"""Scoring through verl's own reward managers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentloop.trajectory import Trajectory
from agentloop.verl.reward import VerlReward
from tests.verl.support import verl_config, verl_output, verl_worker

Build = Callable[..., Trajectory]

FUNCTION = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kw):
    if ground_truth == "boom":
        raise ValueError("the reward is broken")
    return {"score": len(solution_str) / 100, "acc": 1, "source": data_source, "truth": ground_truth,
            "turns": int(extra_info["num_turns"]), "index": extra_info["index"], "rewards": len(extra_info["tool_rewards"])}
"""


@pytest.fixture
def handle(tokenizer: Any, tmp_path: Path) -> Any:
    """verl's reward loop with a custom function, called in this process as a Ray actor would be."""
    from verl.trainer.ppo.reward import load_reward_manager

    (tmp_path / "reward.py").write_text(FUNCTION)
    config = verl_config(**{"reward.custom_reward_function.path": str(tmp_path / "reward.py")})

    class Handle:
        def __init__(self) -> None:
            self.seen: list[Any] = []

            async def compute_score(data: Any) -> Any:
                self.seen.append(data)
                return await load_reward_manager(config, tokenizer).run_single(data)

            self.compute_score = SimpleNamespace(remote=compute_score)

    return Handle()


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
