"""How many runs there are at once, how many wait, and who is sent away."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Refused(Exception):
    """Not now. `retry_after_s`: when it may be worth to ask again, whole seconds."""

    def __init__(self, status: int, why: str, retry_after_s: int) -> None:
        super().__init__(why)
        self.status, self.retry_after_s = status, retry_after_s


class Admission:
    """At most `places` at once and `queue` waiting, in the order that they came."""

    def __init__(self, places: int, queue: int) -> None:
        self._places, self._queue = places, queue
        self._free = asyncio.Semaphore(places)
        self._usual_s = 1.0
        """How long a run takes, as a moving average."""
        self.running = 0
        self.waiting = 0
        self.draining = False

    @asynccontextmanager
    async def place(self) -> AsyncIterator[float]:
        """A place for one run; how many seconds it took to get it. Raises `Refused`."""
        if self.draining:
            raise Refused(503, "this service is stopping", 5)
        if self._free.locked() and self.waiting >= self._queue:
            raise Refused(429, f"{self.running} runs and {self.waiting} waiting are as many as it takes", self.patience_s())
        came = time.monotonic()
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        began = time.monotonic()
        self.running += 1
        try:
            yield began - came
        finally:
            self.running -= 1
            self._free.release()
            self._usual_s += 0.1 * (time.monotonic() - began - self._usual_s)

    def patience_s(self) -> int:
        """About how long until half of the queue is gone."""
        return min(30, max(1, math.ceil(self._usual_s * (self.waiting + 1) / self._places / 2)))

    async def drained(self, seconds: float) -> bool:
        """Take nobody any more, and wait until all are done; whether they were in time."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.running or self.waiting:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True
