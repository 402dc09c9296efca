"""Several rewards as one."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from agentloop.batch import reward_extra_info
from agentloop.errors import ConfigError
from agentloop.rewards import load_reward
from agentloop.rewards.composite import PartFailed
from agentloop.trajectory import Reward
from tests.rewards.ledgers import SAMPLE, call, conversation

PARTS = """
import asyncio
from agentloop.trajectory import Reward

started = []

class Fixed:
    def __init__(self, value, turns=(), wait=0):
        self.value, self.turns, self.wait = value, tuple(turns), wait

    async def __call__(self, trajectory, sample, text):
        started.append(self.value)
        while len(started) < self.wait:
            await asyncio.sleep(0.001)
        return Reward(self.value, {"part": self.value / 2}, {"said": text}, self.turns)

class Broken:
    async def __call__(self, trajectory, sample, text):
        raise OSError("the service is down")

class Hanging:
    ended = []

    async def __call__(self, trajectory, sample, text):
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append(1)
"""


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    path = tmp_path / "parts.py"
    path.write_text(PARTS)
    return path


def fixed(path: Path, value: float, *, turns: Any = (), wait: int = 0, **part: Any) -> dict[str, Any]:
    return {"reward": f"{path}:Fixed", "kwargs": {"value": value, "turns": turns, "wait": wait}, **part}


async def score(parts: Any, **settings: Any) -> Reward:
    reward = load_reward("agentloop.rewards.composite:CompositeReward", {"parts": parts, **settings})
    return await reward(conversation([call()], []), SAMPLE, "text")


async def test_weights_and_every_component(parts: Path) -> None:
    reward = await score({"a": fixed(parts, 1.0, weight=0.5), "b": fixed(parts, -2.0), "c": fixed(parts, 8.0, weight=0)})
    assert reward.value == -1.5
    assert reward.components == {"a": 1.0, "a/part": 0.5, "b": -2.0, "b/part": -1.0, "c": 8.0, "c/part": 4.0}
    assert reward.info == {"a/said": "text", "b/said": "text", "c/said": "text"}
    trajectory = conversation([])
    trajectory.reward = reward
    assert reward_extra_info(trajectory) == {**reward.info, **reward.components}


@pytest.mark.parametrize(("gate", "other", "value"), [(1.0, 1.0, 1.2), (0.9, 1.0, 0.9), (0.0, 1.0, 0.0)])
async def test_a_missed_gate_leaves_nothing_but_itself(parts: Path, gate: float, other: float, value: float) -> None:
    reward = await score({"gate": fixed(parts, gate, gate=1.0), "other": fixed(parts, other, weight=0.2)})
    assert reward.value == pytest.approx(value)
    assert reward.components["other"] == other


async def test_two_gates(parts: Path) -> None:
    both = {"a": fixed(parts, -1.0, gate=0.0), "b": fixed(parts, -2.0, gate=0.0), "c": fixed(parts, 5.0)}
    assert (await score(both)).value == -3.0
    assert (await score({**both, "a": fixed(parts, 1.0, gate=0.0)})).value == -2.0


async def test_clipping_of_parts_and_of_the_whole(parts: Path) -> None:
    two = {"a": fixed(parts, 5.0, clip=[0, 1]), "b": fixed(parts, -5.0, clip=[-0.5, 1], weight=4)}
    reward = await score(two)
    assert reward.value == -1.0
    assert (reward.components["a"], reward.components["b"], reward.components["a/part"]) == (1.0, -0.5, 2.5)
    assert (await score(two, clip=[-0.25, 1])).value == -0.25


async def test_what_turns_brought_is_weighted_with_its_part(parts: Path) -> None:
    reward = await score(
        {"a": fixed(parts, 3.0, turns=[1, 2], weight=0.5), "b": fixed(parts, 1.0, turns=[1]), "c": fixed(parts, 1.0)}
    )
    assert reward.turns == (1.5, 1.0)


async def test_parts_run_at_the_same_time(parts: Path) -> None:
    async with asyncio.timeout(20):
        await score({name: fixed(parts, 1.0, wait=3) for name in "abc"})


async def test_one_broken_part_is_no_reward_at_all(parts: Path) -> None:
    with pytest.raises(PartFailed, match="part 'judge' failed: OSError: the service is down"):
        await score({"a": fixed(parts, 1.0), "judge": {"reward": f"{parts}:Broken"}, "slow": {"reward": f"{parts}:Hanging"}})
    from agentloop.rewards.function import load_object

    assert load_object(f"{parts}:Hanging").ended == [1]


async def test_it_may_be_nested_and_written_in_yaml() -> None:
    config = OmegaConf.create("""
      parts:
        answer:
          reward: agentloop.rewards.composite:CompositeReward
          kwargs: {parts: {box: {reward: "agentloop.rewards.boxed:BoxedNumber"}}}
          gate: 1.0
        tools:
          reward: agentloop.rewards.tool_use:ToolUseReward
          kwargs: {call: 0.5}
          weight: 0.5
      clip: [0, 1]
    """)
    reward: Any = load_reward("agentloop.rewards.composite:CompositeReward", config)
    assert reward.reads_trajectory
    given = await reward(conversation([call()], []), SAMPLE, r"\boxed{5}")
    assert given.value == 1.0
    assert given.components == {"answer": 1.0, "answer/box": 1.0, "answer/box/correct": 1.0, "tools": 0.5, "tools/call": 0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": {}}, "reward composite: key 'parts'"),
        ({"parts": {"a": {"reward": "x:y", "wieght": 1}}}, "unknown key 'parts.a.wieght'; did you mean 'weight'?"),
        ({"parts": {"a": {"kwargs": {}}}}, "reward composite: key 'parts.a.reward' is missing"),
        ({"parts": {"a": {"reward": "agentloop.rewards.boxd:X"}}}, "reward composite: part 'a': reward "
         "'agentloop.rewards.boxd:X': there is no module 'agentloop.rewards.boxd'; did you mean 'agentloop.rewards.boxed'?"),
        ({"parts": {"a/b": {"reward": "agentloop.rewards.boxed:BoxedNumber"}}}, "'a/b' is no name of a part"),
        ({"parts": {"a": {"reward": "x:y", "clip": [1, 0]}}}, "the lower bound comes first"),
        ({"parts": {"a": {"reward": "x:y", "weight": float("inf")}}}, "key 'parts.a.weight'"),
    ],
)  # fmt: skip
async def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_reward("agentloop.rewards.composite:CompositeReward", settings)
