"""Rewards for length."""

from __future__ import annotations

import re
from typing import Any

import pytest

from agentloop.errors import ConfigError
from agentloop.rewards import load_reward
from agentloop.trajectory import Reward
from tests.rewards.ledgers import SAMPLE, call, conversation

RIGHT = {"reward": "agentloop.rewards.boxed:BoxedNumber"}


async def score(tokens: int, text: str = "", **settings: Any) -> Reward:
    """Of two turns of `tokens` tokens each with three tokens of a tool between them."""
    trajectory = conversation([call()], [], tokens=tokens)
    return await load_reward("agentloop.rewards.length:LengthReward", settings)(trajectory, SAMPLE, text)


@pytest.mark.parametrize(("tokens", "value"), [(1, 0.0), (40, 0.0), (42, -0.2), (45, -0.5), (50, -1.0), (80, -1.0)])
async def test_the_soft_overlong_punishment_of_dapo(tokens: int, value: float) -> None:
    """L = 100, C = 20: nothing up to 80 sampled tokens, all of it from 100 on."""
    reward = await score(tokens, max_tokens=100, buffer_tokens=20)
    assert reward == Reward(value, {"penalty": value}, {"tokens": 2 * tokens})
    assert (await score(tokens, max_tokens=100, buffer_tokens=20, penalty=0.5)).value == value / 2


async def test_it_is_verls_where_verl_has_one() -> None:
    """verl's DAPO manager: min(-exceed / buffer * factor, 0), for answers up to the limit."""
    for tokens in range(1, 51):
        exceeded = 2 * tokens - (100 - 20)
        assert (await score(tokens, max_tokens=100, buffer_tokens=20)).value == min(-exceeded / 20, 0)


async def test_the_cosine_of_an_answer() -> None:
    settings = {
        "shape": "cosine",
        "max_tokens": 100,
        "correct": RIGHT,
        "right": (2.0, 1.0),
        "wrong": (-10.0, 0.0),
        "exceeded": -10,
    }
    right, wrong = r"\boxed{5}", r"\boxed{6}"
    assert (await score(25, right, **settings)).value == pytest.approx(1.5)
    assert (await score(25, wrong, **settings)).value == pytest.approx(-5.0)
    assert (await score(50, right, **settings)).value == -10
    short, long = [(await score(n, right, **settings)).value for n in (1, 49)]
    assert 2.0 > short > long > 1.0
    reward = await score(25, right, **settings)
    assert reward.components["correct"] == 1.0
    assert reward.info == {"tokens": 50, "correct/answer": "5", "correct/expected": "5", "correct/verdict": "correct"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "key 'max_tokens' is missing"),
        ({"max_tokens": 10}, "key 'buffer_tokens' is missing"),
        ({"max_tokens": 10, "buffer_tokens": 11}, "key 'buffer_tokens': 11 is more than 'max_tokens' (10)"),
        ({"max_tokens": 10, "shape": "cosine"}, "key 'correct' is missing"),
        (
            {"max_tokens": 10, "shape": "cosine", "correct": {"reward": "agentloop.rewards.boxed:BoxedNumer"}},
            "key 'correct': reward 'agentloop.rewards.boxed:BoxedNumer': there is no 'BoxedNumer' in it; did you mean ",
        ),
        ({"max_tokns": 10}, "unknown key 'max_tokns'; did you mean 'max_tokens'?"),
    ],
)  # fmt: skip
async def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"reward length: {message}")):
        await score(1, **settings)
