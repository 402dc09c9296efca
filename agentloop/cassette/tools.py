"""Tools and rewards that answer from a run's record."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agentloop.cassette.tape import Cassette, Tape, cassette_of
from agentloop.engines.cassette import Latency, wait
from agentloop.errors import ConfigError, ToolInfraError, nearest
from agentloop.journal.reader import Run
from agentloop.tools.session import ToolSession, ToolSessions
from agentloop.trajectory import CallRecord, EndReason, Reward, Sample, ToolCall, Trajectory

_FAILED = re.compile(r"the reward failed: (\w+): (.*)", re.DOTALL)


class CassetteTools(ToolSessions):
    """Plays what the tools answered, found by trajectory and call. `tools` say what the model is told of them (schemas, which
    ones take the final answer), and are neither created nor called."""

    def __init__(
        self,
        source: Cassette | Run | str | Path,
        tools: ToolSessions,
        *,
        latency: Latency = 0.0,
        rewards: bool = False,
    ) -> None:
        """`rewards`: say what the tools' own rewards were; for a reward function that is asked anew."""
        self.cassette = cassette_of(source)
        self.tools = tools
        self._latency = latency
        self._rewards = rewards

    def session(self, sample: Sample, trajectory_id: str) -> ToolSession:
        told = self.tools.session(sample, trajectory_id)
        return _Session(self.cassette, trajectory_id, told, self._latency, self._rewards)


class _Session(ToolSession):
    def __init__(self, cassette: Cassette, key: str, told: ToolSession, latency: Latency, rewards: bool) -> None:
        self._cassette = cassette
        self._key = key
        self._told = told
        self._latency = latency
        self._with_rewards = rewards
        self._tape: Tape | None = None

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return self._told.schemas

    @property
    def final(self) -> frozenset[str]:
        return self._told.final

    async def open(self) -> None:
        self._tape = await self._cassette.tape(self._key)
        row = self._tape.row
        if row.complete and not row.turns and row.end_reason == EndReason.TOOL_FAILURE:
            raise ToolInfraError(row.error or "a tool could not be created")

    async def call(self, call: ToolCall, *, deadline: float) -> CallRecord:
        assert self._tape is not None
        record = self._tape.played(call)
        await wait(self._latency, record.queue_s + record.run_s)
        return record

    async def rewards(self) -> dict[str, float]:
        assert self._tape is not None
        return tool_rewards(self._tape) if self._with_rewards else {}

    async def close(self) -> None:
        self._tape = None


def tool_rewards(tape: Tape) -> dict[str, float]:
    """What the tools themselves gave, as `ToolSession.rewards`. Of a trajectory that was not scored: what their calls gave."""
    if tape.recorded.reward is not None:
        return {name: value for name, value in tape.recorded.reward.components.items() if name.startswith("tool/")}
    total: dict[str, float] = {}
    for turn in tape.turns:
        for record in turn.calls:
            name = f"tool/{record.call.name}"
            total[name] = total.get(name, 0.0) + record.reward
    return {name: value for name, value in total.items() if value}


class RecordedTools(ToolSessions):
    """What the record says of a run's tools (`run.json`): enough to play them back where they cannot be loaded."""

    def __init__(self, schemas: Iterable[dict[str, Any]], final: Iterable[str] = ()) -> None:
        self._schemas = {schema["function"]["name"]: schema for schema in schemas}
        self._final = frozenset(final)

    def session(self, sample: Sample, trajectory_id: str) -> ToolSession:
        names: Sequence[str] = list(self._schemas) if sample.tools is None else sample.tools
        for name in names:
            if name not in self._schemas:
                raise ConfigError(f"tool_selection: no tool '{name}' is recorded; {nearest(name, self._schemas)}")
        return _Described([schema for name, schema in self._schemas.items() if name in names], self._final.intersection(names))


class _Described(ToolSession):
    def __init__(self, schemas: list[dict[str, Any]], final: frozenset[str]) -> None:
        self._schemas, self._final = schemas, final

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return self._schemas

    @property
    def final(self) -> frozenset[str]:
        return self._final

    async def open(self) -> None:
        raise ToolInfraError("the tools of a record can be played back and not be called")

    async def call(self, call: ToolCall, *, deadline: float) -> CallRecord:
        raise ToolInfraError("the tools of a record can be played back and not be called")

    async def rewards(self) -> dict[str, float]:
        return {}

    async def close(self) -> None:
        return


class CassetteReward:
    """A `RewardFunction` that says what was recorded, the tools' own rewards included; where scoring failed, it fails again."""

    def __init__(self, source: Cassette | Run | str | Path) -> None:
        self.cassette = cassette_of(source)

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        part = "val" if trajectory.validate else "train"
        tape = await self.cassette.tape(f"{part}-{trajectory.step}-{trajectory.id}")
        if tape.recorded.reward is not None:
            return tape.recorded.reward
        failed = _FAILED.fullmatch(tape.row.error or "")
        if failed is None:
            raise LookupError("no reward is recorded")
        await asyncio.sleep(0)
        raise type(failed[1], (Exception,), {})(failed[2])
