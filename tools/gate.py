"""Where the calls of one tool wait for their turn: concurrency and rate, of the process and of the cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from time import monotonic
from typing import TypeVar
from weakref import WeakKeyDictionary

from asyncio_throttle import Throttler

from agentloop.tools.permits import ClusterLimit
from agentloop.tools.policy import ToolPolicy
from agentloop.tools.threads import Slot

T = TypeVar("T")


class Gate:
    """One per tool and registry; each event loop has its own count."""

    def __init__(self, name: str, policy: ToolPolicy) -> None:
        """`name` is that under which the cluster counts."""
        self._name = name
        self._policy = policy
        self._limits: WeakKeyDictionary[asyncio.AbstractEventLoop, _Limits] = WeakKeyDictionary()

    async def enter(self) -> Slot:
        """Wait for a place. It is free again after `let_go`, once all threads that the call started have ended. Raises
        `ToolInfraError` if the cluster's permits cannot be reached."""
        loop = asyncio.get_running_loop()
        limits = self._limits.get(loop)
        if limits is None:
            limits = self._limits[loop] = _Limits(self._name, self._policy)
        slot = Slot(loop)
        try:
            if limits.semaphore is not None:
                await limits.semaphore.acquire()
                slot.frees(limits.semaphore.release)
            if limits.cluster is not None:
                slot.frees(await _timed(limits.cluster.take(), slot, "cluster_wait_s"))
            if limits.throttler is not None:
                await _timed(limits.pass_throttler(limits.throttler), slot, "rate_wait_s")
        except BaseException:
            slot.let_go()
            raise
        return slot


async def _timed(waiting: Awaitable[T], slot: Slot, what: str) -> T:
    started = monotonic()
    try:
        return await waiting
    finally:
        slot.waits[what] = monotonic() - started


class _Limits:
    def __init__(self, name: str, policy: ToolPolicy) -> None:
        self.semaphore = asyncio.Semaphore(policy.max_concurrency) if policy.max_concurrency else None
        self.cluster: ClusterLimit | None = None
        if policy.cluster_concurrency or policy.cluster_rate_limit:
            self.cluster = ClusterLimit(name, policy.cluster_concurrency, policy.cluster_rate_limit)
        rate = policy.rate_limit
        self.throttler: Throttler | None = None
        if rate:
            interval = min(0.05, rate.period / 10)
            self.throttler = Throttler(rate_limit=rate.calls, period=rate.period, retry_interval=interval)
        self._in_order = asyncio.Lock()

    async def pass_throttler(self, throttler: Throttler) -> None:
        async with self._in_order:  # asyncio-throttle polls and keeps no order
            await throttler.acquire()
