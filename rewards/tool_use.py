"""Bonus and penalty terms for how tools were used."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pydantic import Field

from agentloop.config import Strict, validate
from agentloop.errors import ConfigError
from agentloop.rewards.spec import plain
from agentloop.trajectory import CallRecord, CallStatus, Reward, Sample, Trajectory

Term = Field(0.0, allow_inf_nan=False)


class ToolUseSettings(Strict):
    """Settings of `ToolUseReward`: what each thing adds, so bonuses are positive and penalties negative. All 0 by default."""

    call: float = Term
    """Each successful call that is no repetition."""
    max_calls: int | None = Field(None, ge=0)
    """Successful calls that `call` is given for; `None`: all."""
    any_call: float = Term
    """Once, if any call succeeded."""
    no_call: float = Term
    """Once, if none was made."""
    error: float = Term
    """Each call whose tool reported an error."""
    invalid_arguments: float = Term
    """Each call whose arguments do not fit the tool's schema."""
    unknown_tool: float = Term
    """Each call of a tool that is not there."""
    timeout: float = Term
    """Each call that ran out of time; for tools that run the model's code."""
    not_run: float = Term
    """Each call over the limit of a turn."""
    parse_error: float = Term
    """Each malformed call."""
    repeated: float = Term
    """Each call with the tool and the arguments of an earlier one, whatever came of it; beside the term of its status, but
    never with `call`."""
    unused: float = Term
    """Each of `expected` that had no successful call."""
    expected: tuple[str, ...] = ()
    """Names of tools."""
    minimum: float | None = Field(None, allow_inf_nan=False)
    maximum: float | None = Field(None, allow_inf_nan=False)
    """Bounds of the sum."""


_BY_STATUS = {
    CallStatus.ERROR: "error",
    CallStatus.INVALID_ARGUMENTS: "invalid_arguments",
    CallStatus.UNKNOWN_TOOL: "unknown_tool",
    CallStatus.TIMEOUT: "timeout",
    CallStatus.NOT_RUN: "not_run",
}


class ToolUseReward:
    """The sum of the terms. Reads the trajectory's `CallRecord`s and never text, so a call that is only written about counts
    for nothing. Failures of a tool's machinery and cancelled calls are nobody's doing and have no term.

    Components are the terms' sums by name, for the terms that are set. What belongs to a turn is in `Reward.turns`.
    """

    reads_trajectory = True

    def __init__(self, **settings: Any) -> None:
        """`settings` are those of `ToolUseSettings`. Raises `ConfigError`."""
        self.settings = validate(ToolUseSettings, plain(settings), "reward tool_use")
        fields = ToolUseSettings.model_fields.items()
        self._terms = {name: getattr(self.settings, name) for name, field in fields if field.annotation is float}
        if not any(self._terms.values()):
            raise ConfigError(f"reward tool_use: no term is set; known are: {', '.join(self._terms)}")
        if self.settings.unused and not self.settings.expected:
            raise ConfigError("reward tool_use: key 'unused' needs 'expected', the names of the tools")
        low, high = self.settings.minimum, self.settings.maximum
        if low is not None and high is not None and low > high:
            raise ConfigError(f"reward tool_use: key 'minimum': {low:g} is more than 'maximum' ({high:g})")

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        counts: Counter[str] = Counter()
        by_turn = []
        seen: set[str] = set()
        used: set[str] = set()
        for turn in trajectory.turns:
            own: Counter[str] = Counter(parse_error=len(turn.parse_errors))
            for record in turn.calls:
                own.update(self._of_call(record, seen, counts["call"] + own["call"]))
                if record.status is CallStatus.OK:
                    used.add(record.call.name)
            counts += own
            by_turn.append(self._sum(own))
        if used:
            counts["any_call"] = 1
        if not any(turn.calls or turn.parse_errors for turn in trajectory.turns):
            counts["no_call"] = 1
        counts["unused"] = len(set(self.settings.expected) - used)
        value = self._sum(counts)
        low, high = self.settings.minimum, self.settings.maximum
        value = value if low is None else max(value, low)
        value = value if high is None else min(value, high)
        components = {name: counts[name] * worth for name, worth in self._terms.items() if worth}
        return Reward(value, components, turns=tuple(by_turn) if any(by_turn) else ())

    def _of_call(self, record: CallRecord, seen: set[str], rewarded: int) -> list[str]:
        """The terms of one call; `rewarded` calls had `call` before it."""
        terms = []
        key = _key(record)
        if key in seen:
            terms.append("repeated")
        elif record.status is CallStatus.OK and (self.settings.max_calls is None or rewarded < self.settings.max_calls):
            terms.append("call")
        seen.add(key)
        if record.status in _BY_STATUS:
            terms.append(_BY_STATUS[record.status])
        return terms

    def _sum(self, counts: Counter[str]) -> float:
        return float(sum(counts[name] * worth for name, worth in self._terms.items()))


def _key(record: CallRecord) -> str:
    """The same for calls that ask for the same thing, whatever the order of the arguments."""
    return json.dumps([record.call.name, record.call.arguments], sort_keys=True, default=repr)
