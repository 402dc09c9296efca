"""The policies of a tool, as the tools file gives them."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from agentloop.config import Strict

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
_RATE = re.compile(r"\s*(\d+)\s*/\s*(\d+(?:\.\d+)?)?\s*(s|sec|min|h)\s*")


class RateLimit(Strict):
    """At most `calls` starts in any `period` seconds."""

    calls: int = Field(ge=1)
    period: float = Field(1.0, gt=0)


class CircuitBreaker(Strict):
    """A tool that is down is left alone for a while."""

    failures: int = Field(5, ge=1)
    """Infrastructure failures in a row after which calls are answered at once, as `infra`, without the tool."""
    open_s: float = Field(30.0, gt=0)
    """Seconds until one call is let through to see whether the tool is back; the others still are not."""


class ToolPolicy(Strict):
    """How calls of one tool are run. A call is one request of the model; it may have several attempts."""

    timeout: float | None = Field(None, gt=0)
    """Seconds that the tool may run, in each attempt; waiting for a place is not in it. Bounds `create` and `calc_reward`
    too."""
    deadline: float | None = Field(None, gt=0)
    """Seconds for one call with everything in it: waiting for a place, every attempt, and the waits between them. Bounds
    `create` with its retries too."""
    max_concurrency: int | None = Field(None, ge=1)
    """Calls of this tool that run at the same time, over all trajectories of this process."""
    cluster_concurrency: int | None = Field(None, ge=1)
    """The same over all processes of the Ray cluster that have a tool of this name; of this process where there is no Ray."""
    rate_limit: RateLimit | None = None
    """Starts in a period, over all trajectories of this process: `{calls: 10, period: 1.0}`, `10/1s` or `600/min`."""
    cluster_rate_limit: RateLimit | None = None
    """The same over all processes of the Ray cluster that have a tool of this name; of this process where there is no Ray."""
    retries: int | None = Field(None, ge=0)
    """Further attempts after an infrastructure failure, and with `on_error: retry` after any; the waits between them double
    from 0.1 s, with jitter. By default 0, with `on_error: retry` 2."""
    circuit_breaker: CircuitBreaker | None = None
    """For a tool that is down; of this process."""
    parallel: bool | None = None
    """Whether several calls of one turn may run at the same time. By default what the tool says, which mostly is yes."""
    on_error: Literal["observe", "retry", "drop_sample", "resample"] = "observe"
    """What follows if the tool fails: the model is told, the call is tried again (then the model is told), the trajectory
    is dropped, or it is started anew."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Longer answers lose their middle."""

    @field_validator("rate_limit", "cluster_rate_limit", mode="before")
    @classmethod
    def _parse_rate(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = _RATE.fullmatch(value)
        if not match:
            raise ValueError("expected '10/1s', '600/min' or {calls: 10, period: 1.0}")
        return {"calls": int(match[1]), "period": float(match[2] or 1) * _UNITS[match[3]]}

    @property
    def extra_attempts(self) -> int:
        if self.retries is not None:
            return self.retries
        return 2 if self.on_error == "retry" else 0
