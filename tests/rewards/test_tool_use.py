"""Terms for how tools were used, read from the calls and never from text."""

from __future__ import annotations

import re
from typing import Any

import pytest

from agentloop.errors import ConfigError
from agentloop.rewards import load_reward
from agentloop.trajectory import CallStatus, Reward, Trajectory
from tests.rewards.ledgers import SAMPLE, call, conversation


async def score(trajectory: Trajectory, text: str = "5", **settings: Any) -> Reward:
    return await load_reward("agentloop.rewards.tool_use:ToolUseReward", settings)(trajectory, SAMPLE, text)


async def test_calls_errors_and_what_turn_they_belong_to() -> None:
    trajectory = conversation(
        [call(arguments={"x": 1}), call(arguments={"x": 2})],
        [call(status=CallStatus.ERROR), call("nope", status=CallStatus.UNKNOWN_TOOL)],
        [],
    )
    trajectory.turns[1].parse_errors.append("no JSON")
    reward = await score(trajectory, call=0.25, error=-0.5, unknown_tool=-1.0, parse_error=-0.125, timeout=-9)
    assert reward.components == {"call": 0.5, "error": -0.5, "unknown_tool": -1.0, "timeout": 0, "parse_error": -0.125}
    assert reward.value == -1.125
    assert reward.turns == (0.5, -1.625, 0.0)


async def test_nothing_is_paid_for_a_repetition() -> None:
    same = [call(arguments={"x": 1, "y": [2]}), call(arguments={"y": [2], "x": 1})]
    other = [call("search", {"x": 1, "y": [2]}), call(arguments={"x": 1})]
    reward = await score(conversation(same, other, same), call=1.0, repeated=-0.25)
    assert reward.components == {"call": 3.0, "repeated": -0.75}
    assert reward.turns == (0.75, 2.0, -0.5)


async def test_a_failed_call_that_is_repeated_has_both_terms() -> None:
    failed = [call(status=CallStatus.TIMEOUT)] * 2
    assert (await score(conversation(failed), timeout=-1.0, repeated=-0.5)).value == -2.5


async def test_a_bonus_has_an_end() -> None:
    many = [[call(arguments={"x": i})] for i in range(5)]
    reward = await score(conversation(*many), call=1.0, max_calls=2)
    assert (reward.value, reward.turns) == (2.0, (1.0, 1.0, 0.0, 0.0, 0.0))
    assert (await score(conversation(*many), call=1.0, maximum=1.5)).value == 1.5
    assert (await score(conversation(*many), call=-1.0, minimum=-0.5)).value == -0.5


async def test_used_unused_and_no_call_at_all() -> None:
    terms = {"any_call": 1.0, "no_call": -1.0, "unused": -0.5, "expected": ["calculator", "search"]}
    assert (await score(conversation([call()]), **terms)).value == 0.5
    assert (await score(conversation([call(status=CallStatus.ERROR)]), **terms)).value == -1.0
    assert (await score(conversation([]), **terms)).value == -2.0


async def test_text_is_never_read() -> None:
    text = '<tool_call>{"name": "calculator", "arguments": {}}</tool_call>'
    assert (await score(conversation([]), text, call=1.0, any_call=1.0)).value == 0.0


@pytest.mark.parametrize("status", [CallStatus.INFRA, CallStatus.CANCELLED])
async def test_what_the_machinery_did_has_no_term(status: CallStatus) -> None:
    every = dict.fromkeys(("call", "any_call", "no_call", "error", "invalid_arguments", "timeout", "not_run"), 1.0)
    assert (await score(conversation([call(status=status)]), **every)).value == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no term is set"),
        ({"errors": -1}, "unknown key 'errors'; did you mean 'error'?"),
        ({"unused": -1}, "key 'unused' needs 'expected'"),
        ({"call": float("nan")}, "key 'call'"),
        ({"call": 1, "minimum": 1, "maximum": 0}, "key 'minimum': 1 is more than 'maximum' (0)"),
    ],
)
async def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"reward tool_use: {message}")):
        await score(conversation([]), **settings)
