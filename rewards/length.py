"""Rewards for length, in sampled tokens: what a tool answered does not count."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from agentloop.config import Strict, validate
from agentloop.errors import ConfigError
from agentloop.rewards.spec import RewardSpec, bind_tokenizer, close_all, named, plain
from agentloop.trajectory import Reward, Sample, Trajectory


class LengthSettings(Strict):
    """Settings of `LengthReward`."""

    shape: Literal["soft_overlong", "cosine"] = "soft_overlong"
    max_tokens: int = Field(ge=1)
    """Sampled tokens of all turns together at which the worst is reached."""
    buffer_tokens: int | None = Field(None, ge=1)
    """`soft_overlong`: the penalty begins this many tokens before `max_tokens`."""
    penalty: float = Field(1.0, ge=0, allow_inf_nan=False)
    """`soft_overlong`: its size at `max_tokens` and beyond."""
    correct: RewardSpec | None = None
    """`cosine`: the reward that says whether the answer is right."""
    threshold: float = Field(1.0, allow_inf_nan=False)
    """`cosine`: the value of `correct` from which on it is."""
    right: tuple[float, float] = (1.0, 0.5)
    """`cosine`: value of a right answer of no length, and of one of `max_tokens`."""
    wrong: tuple[float, float] = (-1.0, -0.5)
    """`cosine`: the same of a wrong answer: a longer try is punished less."""
    exceeded: float = Field(-1.0, allow_inf_nan=False)
    """`cosine`: value from `max_tokens` on, right or wrong."""


class LengthReward:
    """`soft_overlong`: 0 or less, to be added to another reward (`composite`). `cosine`: the value of an answer by its length,
    in place of the reward `correct`."""

    reads_trajectory = True

    def __init__(self, **settings: Any) -> None:
        """`settings` are those of `LengthSettings`. Raises `ConfigError`."""
        self.settings = validate(LengthSettings, plain(settings), "reward length")
        self._correct = None
        if self.settings.shape == "soft_overlong":
            buffer = self.settings.buffer_tokens
            if buffer is None:
                raise ConfigError("reward length: key 'buffer_tokens' is missing; shape 'soft_overlong' needs it")
            if buffer > self.settings.max_tokens:
                raise ConfigError(
                    f"reward length: key 'buffer_tokens': {buffer} is more than 'max_tokens' ({self.settings.max_tokens})"
                )
        elif self.settings.correct is None:
            raise ConfigError(
                "reward length: key 'correct' is missing; shape 'cosine' needs a reward that tells right from wrong"
            )
        else:
            self._correct = self.settings.correct.load("reward length: key 'correct'")

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        """Raises what the reward `correct` raises."""
        tokens, settings = trajectory.sampled_len, self.settings
        if self._correct is None:
            value = -settings.penalty * soft_overlong(tokens, settings.max_tokens, settings.buffer_tokens or 1)
            return Reward(value, {"penalty": value}, {"tokens": tokens})
        inner = await self._correct(trajectory, sample, text)
        components, info = named("correct", inner)
        if tokens >= settings.max_tokens:
            value = settings.exceeded
        else:
            ends = settings.right if inner.value >= settings.threshold else settings.wrong
            value = cosine(tokens, settings.max_tokens, *ends)
        return Reward(value, {"length": value, **components}, {"tokens": tokens, **info})

    def bind_tokenizer(self, tokenizer: Any) -> None:
        bind_tokenizer([self._correct], tokenizer)

    async def close(self) -> None:
        await close_all([self._correct])


def soft_overlong(tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """From 0 to 1: minus the «soft overlong punishment» of DAPO (arXiv 2503.14476, equation 13). With L = `max_tokens` and
    C = `buffer_tokens`: 0 up to L - C, then (tokens - (L - C)) / C, and 1 beyond L.

    >>> [soft_overlong(tokens, 100, 20) for tokens in (80, 85, 100, 200)]
    [0.0, 0.25, 1.0, 1.0]
    """
    return min(max((tokens - (max_tokens - buffer_tokens)) / buffer_tokens, 0.0), 1.0)


def cosine(tokens: int, max_tokens: int, at_zero: float, at_limit: float) -> float:
    """From `at_zero` to `at_limit` along half a cosine: at_limit + (at_zero - at_limit) (1 + cos(pi tokens / max_tokens)) / 2,
    the shape of the cosine reward of arXiv 2502.03373 (section 4).

    >>> [round(cosine(tokens, 100, 1.0, 0.5), 6) for tokens in (0, 50, 100)]
    [1.0, 0.75, 0.5]
    """
    return at_limit + (at_zero - at_limit) * (1 + math.cos(math.pi * tokens / max_tokens)) / 2
