"""Rewards of single turns: a part of the outcome, placed on the turns' last tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from agentloop.batch import to_rows, token_rewards
from agentloop.errors import ConfigError
from agentloop.rewards import load_reward
from agentloop.trajectory import Reward, Trajectory
from tests.rewards.ledgers import SAMPLE, call, conversation

OUTCOME = {"reward": "agentloop.rewards.boxed:BoxedNumber"}


async def score(trajectory: Trajectory, **settings: Any) -> Reward:
    reward = load_reward("agentloop.rewards.turns:TurnReward", {"outcome": OUTCOME, **settings})
    return await reward(trajectory, SAMPLE, r"\boxed{5}")


async def test_what_tools_gave_is_added_to_the_outcome() -> None:
    reward = await score(conversation([call(reward=0.5), call(reward=0.25)], [call(reward=-0.125)], []))
    assert reward.value == 1.625
    assert reward.turns == (0.75, -0.125, 0.0)
    assert reward.components == {"outcome": 1.0, "outcome/correct": 1.0, "turns": 0.625}


async def test_a_function_for_each_turn(tmp_path: Path) -> None:
    (tmp_path / "turns.py").write_text(
        "def length(turn, trajectory, sample):\n    return -(turn.end - turn.start) / 8\n"
        "async def later(turn, trajectory, sample):\n    return float(turn.index)\n"
        "def nothing(turn, trajectory, sample):\n    return float('nan')\n"
        "def other(turn):\n    return 0\n"
    )
    trajectory = conversation([call(reward=1.0)], [])
    assert (await score(trajectory, turn=f"{tmp_path}/turns.py:length")).turns == (0.5, -0.5)
    assert (await score(trajectory, turn=f"{tmp_path}/turns.py:later", tools=0.0, weight=0.5)).turns == (0.0, 0.5)
    assert (await score(trajectory, turn=f"{tmp_path}/turns.py:length", clip=[-0.25, 0.25])).turns == (0.25, -0.25)
    with pytest.raises(ValueError, match="turn 0 got nan"):
        await score(trajectory, turn=f"{tmp_path}/turns.py:nothing")
    for name, message in [("other", "cannot be called with"), ("lenght", "did you mean 'length'?")]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            await score(trajectory, turn=f"{tmp_path}/turns.py:{name}")


async def test_where_the_parts_stand_in_the_response_and_that_their_sum_is_the_value() -> None:
    trajectory = conversation([call(reward=0.5)], [call(reward=0.25)], [])
    trajectory.reward = await score(trajectory)
    # Turns of 4 tokens, each with calls followed by 3 tokens of a tool: last sampled tokens at 3, 10 and 17.
    assert token_rewards(trajectory) == [(3, 0.5), (10, 0.25), (17, 1.0)]
    fields, _ = to_rows(trajectory)
    assert fields["rm_scores"].sum().item() == trajectory.reward.value == 1.75
    assert [fields["response_mask"][place].item() for place in (3, 10, 17)] == [1, 1, 1]


async def test_without_turns_it_stands_on_the_last_token() -> None:
    trajectory = conversation([call()], [call()])
    trajectory.reward = Reward(0.5)
    assert token_rewards(trajectory) == [(13, 0.5)]
    trajectory.reward = Reward(0.5, turns=(0.25, 0.125))
    assert token_rewards(trajectory) == [(3, 0.25), (10, 0.125), (13, 0.125)]
    trajectory.masked = True
    assert token_rewards(trajectory) == []


async def test_tool_terms_by_turn_reach_the_batch_too() -> None:
    inner = {"reward": "agentloop.rewards.tool_use:ToolUseReward", "kwargs": {"call": 0.25}}
    trajectory = conversation([call()], [])
    reward = await load_reward("agentloop.rewards.turns:TurnReward", {"outcome": inner})(trajectory, SAMPLE, "")
    assert (reward.value, reward.turns) == (0.25, (0.25, 0.0))
