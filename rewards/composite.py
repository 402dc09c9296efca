"""Several rewards as one: weights, gates, clipping."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import zip_longest
from typing import Annotated, Any

from pydantic import Field, field_validator

from agentloop.config import Strict, validate
from agentloop.errors import AgentloopError, ConfigError
from agentloop.rewards.spec import RewardSpec, bind_tokenizer, close_all, named, plain, reads_trajectory
from agentloop.trajectory import Reward, Sample, Trajectory

Bounds = tuple[Annotated[float, Field(allow_inf_nan=False)], Annotated[float, Field(allow_inf_nan=False)]]


class Part(RewardSpec):
    """One part of `CompositeReward`."""

    weight: float = Field(1.0, allow_inf_nan=False)
    """0: recorded, and without effect but for its gate."""
    gate: float | None = Field(None, allow_inf_nan=False)
    """What this part must reach (after its `clip`) for any other to count. If it does not, the value is its own alone,
    weighted; of several gates that are missed, theirs together."""
    clip: Bounds | None = None
    """Bounds of its value, before the weight."""

    @field_validator("clip")
    @classmethod
    def _ordered(cls, bounds: Bounds | None) -> Bounds | None:
        return _checked(bounds)


class CompositeSettings(Strict):
    """Settings of `CompositeReward`."""

    parts: dict[str, Part] = Field(min_length=1)
    """By name."""
    clip: Bounds | None = None
    """Bounds of the whole."""

    @field_validator("clip")
    @classmethod
    def _ordered(cls, bounds: Bounds | None) -> Bounds | None:
        return _checked(bounds)


class PartFailed(AgentloopError):
    """A part raised; the message names it. The whole is then no reward, whatever the others say."""


class CompositeReward:
    """The weighted sum of its parts, which run at the same time.

    Components: each part's value (after its `clip`, before its weight) under its name, and its own components as
    `name/component`; the parts' info is there as `name/key`. `Reward.turns` are the weighted sums of the parts' that count; a
    clip takes nothing from them, the difference is on the last token.
    """

    def __init__(self, *, parts: Mapping[str, Any], **settings: Any) -> None:
        """`parts` and `settings` are those of `CompositeSettings`. Raises `ConfigError`."""
        self.settings = validate(CompositeSettings, plain({"parts": parts, **settings}), "reward composite")
        for name in self.settings.parts:
            if not name or "/" in name:
                raise ConfigError(f"reward composite: key 'parts': {name!r} is no name of a part; it must not have a '/'")
        self._rewards = {name: part.load(f"reward composite: part '{name}'") for name, part in self.settings.parts.items()}
        self.reads_trajectory = any(map(reads_trajectory, self._rewards.values()))

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        """Raises `PartFailed`; parts that still run are then cancelled."""

        async def run(name: str) -> Reward:
            try:
                return await self._rewards[name](trajectory, sample, text)
            except Exception as error:
                raise PartFailed(f"part '{name}' failed: {type(error).__name__}: {error}") from error

        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {name: group.create_task(run(name)) for name in self._rewards}
        except* PartFailed as failed:
            failure = failed.exceptions[0]
        if failure is not None:
            raise failure from failure.__cause__
        return self._combine({name: task.result() for name, task in tasks.items()})

    def _combine(self, results: Mapping[str, Reward]) -> Reward:
        parts = self.settings.parts
        values = {name: _clip(reward.value, parts[name].clip) for name, reward in results.items()}
        missed = {name for name, part in parts.items() if part.gate is not None and values[name] < part.gate}
        counting = missed or set(parts)
        components: dict[str, float] = {}
        info: dict[str, Any] = {}
        turns: list[float] = []
        value = 0.0
        for name, reward in results.items():
            more, said = named(name, reward)
            components |= {**more, name: values[name]}
            info |= said
            if name in counting:
                weight = parts[name].weight
                value += weight * values[name]
                turns = [own + weight * other for own, other in zip_longest(turns, reward.turns, fillvalue=0.0)]
        return Reward(_clip(value, self.settings.clip), components, info, tuple(turns) if any(turns) else ())

    def bind_tokenizer(self, tokenizer: Any) -> None:
        bind_tokenizer(self._rewards.values(), tokenizer)

    async def close(self) -> None:
        await close_all(self._rewards.values())


def _clip(value: float, bounds: Bounds | None) -> float:
    return value if bounds is None else min(max(value, bounds[0]), bounds[1])


def _checked(bounds: Bounds | None) -> Bounds | None:
    if bounds is not None and bounds[0] > bounds[1]:
        raise ValueError("the lower bound comes first")
    return bounds
