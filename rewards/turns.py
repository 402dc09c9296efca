"""Rewards of single turns, added to the reward of the outcome."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from pydantic import Field, field_validator

from agentloop.config import Strict, validate
from agentloop.errors import ConfigError
from agentloop.rewards.function import load_object
from agentloop.rewards.spec import RewardSpec, bind_tokenizer, close_all, named, plain
from agentloop.tools.threads import run_blocking
from agentloop.trajectory import Reward, Sample, Trajectory, Turn


class TurnSettings(Strict):
    """Settings of `TurnReward`."""

    outcome: RewardSpec
    """The reward of the whole trajectory."""
    tools: float = Field(1.0, allow_inf_nan=False)
    """Weight of what the tools gave each call (`CallRecord.reward`), in the turn of the call. Leave the loop's
    `tool_rewards` at `record` then, or it counts twice."""
    turn: str | None = None
    """A function `(turn, trajectory, sample)` that answers a number, `package.module:name` or `path/to/file.py:name`. It may
    be a coroutine function; a plain one runs in a thread of its own."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Of all that turns bring."""
    clip: tuple[float, float] | None = None
    """Bounds of what one turn brings, before `weight`."""

    @field_validator("clip")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not bounds[0] <= bounds[1]:
            raise ValueError("the lower bound comes first")
        return bounds


class TurnReward:
    """The outcome's value plus the sum of what the turns bring. The sum is part of the value because verl's GRPO adds up all
    rewards of a response; each turn's own share is in `Reward.turns`, which puts it on the turn's last token."""

    reads_trajectory = True

    def __init__(self, **settings: Any) -> None:
        """`settings` are those of `TurnSettings`. Raises `ConfigError`."""
        self.settings = validate(TurnSettings, plain(settings), "reward turns")
        self._outcome = self.settings.outcome.load("reward turns: key 'outcome'")
        self._score = None if self.settings.turn is None else _turn_function(self.settings.turn)

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        """Raises what the outcome's reward and the function raise, `ValueError` if a turn's value is no finite number."""
        outcome = await self._outcome(trajectory, sample, text)
        turns = [await self._of_turn(turn, trajectory, sample) for turn in trajectory.turns]
        total = sum(turns)
        components, info = named("outcome", outcome)
        both = [ours + theirs for ours, theirs in zip_longest(turns, outcome.turns, fillvalue=0.0)]
        components["turns"] = total
        return Reward(outcome.value + total, components, info, tuple(both) if any(both) else ())

    async def _of_turn(self, turn: Turn, trajectory: Trajectory, sample: Sample) -> float:
        value = self.settings.tools * sum(record.reward for record in turn.calls)
        if self._score is not None:
            if inspect.iscoroutinefunction(self._score):
                own = await self._score(turn, trajectory, sample)
            else:
                own = await run_blocking(self._score, turn, trajectory, sample)
            value += float(own)
        if not math.isfinite(value):
            raise ValueError(f"reward turns: turn {turn.index} got {value}, expected a finite number")
        if self.settings.clip is not None:
            value = min(max(value, self.settings.clip[0]), self.settings.clip[1])
        return self.settings.weight * value

    def bind_tokenizer(self, tokenizer: Any) -> None:
        bind_tokenizer([self._outcome], tokenizer)

    async def close(self) -> None:
        await close_all([self._outcome])


def _turn_function(spec: str) -> Callable[..., Any]:
    try:
        found = load_object(spec)
    except ConfigError as error:
        raise ConfigError(f"reward turns: key 'turn': {error}") from error
    try:
        inspect.signature(found).bind(None, None, None)
    except TypeError as error:
        raise ConfigError(f"reward turns: key 'turn': '{spec}' cannot be called with (turn, trajectory, sample)") from error
    return found  # type: ignore[no-any-return]
