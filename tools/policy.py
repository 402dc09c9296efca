"""The policies of a tool, and the gate that holds two of them: concurrency and rate."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Literal
from weakref import WeakKeyDictionary

from asyncio_throttle import Throttler
from pydantic import Field, field_validator

from agentloop.config import Strict
from agentloop.tools.threads import Slot

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
_RATE = re.compile(r"\s*(\d+)\s*/\s*(\d+(?:\.\d+)?)?\s*(s|sec|min|h)\s*")


class RateLimit(Strict):
    """At most `calls` starts in any `period` seconds."""

    calls: int = Field(ge=1)
    period: float = Field(1.0, gt=0)


class ToolPolicy(Strict):
    """How calls of one tool are run. A call is one request of the model; it may have several attempts."""

    timeout: float | None = Field(None, gt=0)
    """Seconds for one call: waiting for a place, running, and every retry. Also bounds `create`."""
    max_concurrency: int | None = Field(None, ge=1)
    """Calls of this tool that run at the same time, over all trajectories of this process."""
    rate_limit: RateLimit | None = None
    """Starts in a period, over all trajectories of this process: `{calls: 10, period: 1.0}`, `10/1s` or `600/min`."""
    retries: int | None = Field(None, ge=0)
    """Further attempts after `infra` or `timeout`, and with `on_error: retry` after any failure; the waits between them
    double from 0.1 s. By default 0, with `on_error: retry` 2."""
    on_error: Literal["observe", "retry", "drop_sample", "resample"] = "observe"
    """What follows if the tool fails: the model is told, the call is tried again (then the model is told), the trajectory
    is dropped, or it is started anew."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Longer answers lose their middle."""

    @field_validator("rate_limit", mode="before")
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


class Gate:
    """Where calls of one tool wait for their turn. One per tool and registry; each event loop has its own count."""

    def __init__(self, policy: ToolPolicy) -> None:
        self._policy = policy
        self._limits: WeakKeyDictionary[asyncio.AbstractEventLoop, _Limits] = WeakKeyDictionary()

    async def enter(self) -> Slot:
        """Wait for a place. It is free again after `let_go`, once all threads that the call started have ended."""
        loop = asyncio.get_running_loop()
        limits = self._limits.get(loop)
        if limits is None:
            limits = self._limits[loop] = _Limits(self._policy)
        if limits.semaphore is not None:
            await limits.semaphore.acquire()
        slot = Slot(loop, limits.semaphore)
        if limits.throttler is not None:
            try:
                async with limits.in_order:  # asyncio-throttle polls and keeps no order
                    await limits.throttler.acquire()
            except BaseException:
                slot.let_go()
                raise
        return slot


class _Limits:
    def __init__(self, policy: ToolPolicy) -> None:
        self.semaphore = asyncio.Semaphore(policy.max_concurrency) if policy.max_concurrency else None
        rate = policy.rate_limit
        self.throttler = None
        if rate:
            interval = min(0.05, rate.period / 10)
            self.throttler = Throttler(rate_limit=rate.calls, period=rate.period, retry_interval=interval)
        self.in_order = asyncio.Lock()
