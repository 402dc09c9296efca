"""The form of what was written, and patterns that no text can make slow."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentloop.errors import ConfigError
from agentloop.rewards import load_reward
from agentloop.rewards.linear_regex import LinearRegex
from agentloop.trajectory import Reward, Sample, StopReason, Trajectory, Turn

SAMPLE = Sample([{"role": "user", "content": "q"}])


async def form(text: str, trajectory: Trajectory | None = None, **settings: Any) -> Reward:
    reward = load_reward("agentloop.rewards.format:FormatReward", settings)
    return await reward(trajectory or Trajectory(SAMPLE), SAMPLE, text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<think>a</think><answer>b</answer>", ""),
        ("\n<think>\na\n</think>\n\n<answer>b</answer>\n", ""),
        ("<think>a</think><answer>b</answer> and", "there is text after the last tag"),
        ("so <think>a</think><answer>b</answer>", "there is text before <think>"),
        ("<think>a</think> so <answer>b</answer>", "there is text before <answer>"),
        ("<answer>b</answer><think>a</think>", "there is text before <think>"),
        ("<think>a</think>", "<answer> stands 0 times, expected 1"),
        ("<think>a</think><answer>b</answer><answer>b</answer>", "<answer> stands 2 times, expected 1"),
        ("<think>a<answer>b</answer></think>", "<answer> is out of order"),
        ("<think><think>a</think></think><answer>b</answer>", "<think> stands 2 times, expected 1"),
        ("<think> </think><answer>b</answer>", "<think> is empty"),
        ("</think>a<think><answer>b</answer>", "<think> is out of order"),
        ("</think><think><answer>b</answer>", "<think> is out of order"),
        ("", "<think> stands 0 times, expected 1"),
    ],
)
async def test_tags(text: str, problem: str) -> None:
    reward = await form(text, tags=["think", "answer"])
    assert reward == Reward(float(not problem), {"right": float(not problem)}, {"problem": problem})


async def test_what_follows_the_last_tag() -> None:
    assert (await form("<think>a</think> 5", tags=["think"], after="text")).value == 1.0
    assert (await form("<think>a</think> ", tags=["think"], after="text")).value == 0.0
    assert (await form("<think>a</think> 5", tags=["think"], after="nothing")).value == 0.0
    assert (await form("<think>a</think> ", tags=["think"], after="any", reward=0.2, penalty=-0.5)).value == 0.2
    assert (await form("5", tags=["think"], after="any", reward=0.2, penalty=-0.5)).value == -0.5


async def test_the_turns_as_they_were_sampled(tokenizer: Any) -> None:
    trajectory = Trajectory(SAMPLE)
    trajectory.append_prompt([5])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for index, text in enumerate(["<think>a</think>call", "no thoughts", "<think>b</think>5"]):
        ids = [*tokenizer.encode(text), end]
        trajectory.append_sampled(ids, None, Turn(index, len(trajectory), len(trajectory) + len(ids), StopReason.STOP))
    settings = {"tags": ["think"], "after": "text"}

    async def value(**more: Any) -> float:
        reward: Any = load_reward("agentloop.rewards.format:FormatReward", {**settings, **more})
        reward.bind_tokenizer(tokenizer)
        return float((await reward(trajectory, SAMPLE, "5")).value)

    assert await value(turns="last") == 1.0
    assert await value(turns="all") == 0.0
    assert await value(turns="all", score="fraction") == pytest.approx(2 / 3)
    assert await value() == 0.0  # the text alone has no reasoning
    with pytest.raises(ConfigError, match="'turns: all' needs 'tokenizer'"):
        await form("5", trajectory, **settings, turns="all")


PATTERNS = [
    "", "a", "ab|cd", "(a|b)*c", "a{2,4}", "(?:ab){1,2}c?", "[a-c]+", "[^a]b*", "a.b", "(?s)a.b", "(?i)AB[c]", r"\d+\.\d*",
    r"\w\s\S\W?\D", "a*?b+?", "^a$", "(?m)a\n^b$", r"\bab\b.*", r"a\Bb", r"\Aab\Z", "(a*)*b", "(a|aa)+", "((ab)*c)*",
    "(?i:a)b", "x{0}", "a$\n?", "[^a-c]{2}", r"[\d_]+", "(a|b|)c", "((a?)b?)*1",
]  # fmt: skip


@given(st.sampled_from(PATTERNS), st.text(alphabet="abcABC1. \nx_", max_size=12))
def test_it_matches_what_python_matches(pattern: str, text: str) -> None:
    assert LinearRegex(pattern).fullmatch(text) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a*)*b", "(.*)*x", "(a?){50}a{50}", r"(\w+\s?)*\.", ".*.*.*.*=.*"])
def test_no_pattern_is_slow(pattern: str) -> None:
    assert not LinearRegex(pattern).fullmatch("a" * 100_000)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "groupref cannot be matched in linear time"),
        (r"(?=a)a", "assert cannot be matched in linear time"),
        (r"(?<!a)b", "assert not cannot be matched in linear time"),
        (r"(?>a)", "atomic group cannot be matched in linear time"),
        (r"(", "not a regular expression"),
        (r"(a{1000}){1000}", "larger than 5000 states"),
    ],
)
async def test_what_cannot_be_linear_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"reward format: key 'pattern': .*{message}"):
        await form("", pattern=pattern)


async def test_settings_are_checked() -> None:
    for settings, message in [
        ({}, "give 'tags' or 'pattern'"),
        ({"tag": ["a"]}, "unknown key 'tag'; did you mean 'tags'?"),
        ({"tags": ["a b"]}, "'a b' is no name of a tag"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            await form("", **settings)  # type: ignore[arg-type]
