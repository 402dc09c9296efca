"""Permits that all processes of a Ray cluster share: `cluster_concurrency` and `cluster_rate_limit`.

One named Ray actor, the `PermitBook`, knows who runs what. A permit is a lease: whoever holds one renews it, and that of a
process that has died comes back when it runs out. The actor belongs to the process that needed it first and ends with it;
the next to need it makes another, which learns of the permits that are still held when they are renewed. Where Ray is not
initialised the book is the process's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from agentloop.errors import ToolInfraError
from agentloop.tools.policy import RateLimit

logger = logging.getLogger(__name__)

ACTOR, NAMESPACE = "agentloop-permits", "agentloop"
LEASE_S = 15.0
"""After this long without renewal a permit is free again."""
POLL_S = 2.0
"""How long one request waits at the book; it keeps its place in the queue if the next follows at once."""
_GONE_S = 5.0  # after which one that waited and has not asked again has lost its place


@dataclass(slots=True)
class _Counter:
    """One tool."""

    held: dict[str, float] = field(default_factory=dict)
    """By lease, when it runs out."""
    starts: deque[float] = field(default_factory=deque)
    waiting: dict[str, float] = field(default_factory=dict)
    """By lease, in order of arrival: until when it is believed to wait."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class PermitBook:
    """Counts permits by key, for any number of processes. Times are those of its own clock. For one event loop."""

    def __init__(self) -> None:
        self._counters: dict[str, _Counter] = {}

    async def take(
        self, key: str, lease: str, concurrency: int | None, rate: tuple[int, float] | None, lease_s: float, wait_s: float
    ) -> bool:
        """A permit, first come first served; whether there was one within `wait_s`. Ask again with the same `lease` to keep
        the place in the queue. At most `concurrency` are out, and `rate[0]` are given in any `rate[1]` seconds."""
        counter = self._counters.setdefault(key, _Counter())
        until = monotonic() + wait_s
        counter.waiting[lease] = until + _GONE_S
        while True:
            now = monotonic()
            gone = [other for other, seen in counter.waiting.items() if seen < now]
            for other in gone:
                del counter.waiting[other]
            if lease not in counter.waiting:  # given back meanwhile: whoever asked was cancelled
                return False
            pause = _pause(counter, concurrency, rate, now)
            if next(iter(counter.waiting)) != lease:
                pause = POLL_S
            elif pause <= 0:
                del counter.waiting[lease]
                if concurrency is not None:
                    counter.held[lease] = now + lease_s
                if rate is not None:
                    counter.starts.append(now)
                counter.wake()
                return True
            if now >= until:
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(pause, until - now)):  # `wait_for` may swallow a cancellation
                    await counter.changed.wait()

    async def renew(self, held: Mapping[str, Sequence[str]], lease_s: float) -> None:
        """`held`: leases by key. One that the book does not know is noted too: it is held."""
        now = monotonic()
        for key, leases in held.items():
            self._counters.setdefault(key, _Counter()).held.update(dict.fromkeys(leases, now + lease_s))

    async def give_back(self, key: str, lease: str) -> None:
        """The lease is not held, or not waited for, any more."""
        counter = self._counters.get(key)
        if counter is not None:
            counter.held.pop(lease, None)
            counter.waiting.pop(lease, None)
            counter.wake()

    async def out(self, key: str) -> int:
        """Permits that are out."""
        counter = self._counters.get(key)
        return sum(end > monotonic() for end in counter.held.values()) if counter else 0


def _pause(counter: _Counter, concurrency: int | None, rate: tuple[int, float] | None, now: float) -> float:
    """Seconds until something may have changed; 0 if there is a permit now."""
    pause = 0.0
    if concurrency is not None:
        for lease in [lease for lease, end in counter.held.items() if end <= now]:
            del counter.held[lease]
        if len(counter.held) >= concurrency:
            pause = min(counter.held.values()) - now
    if rate is not None:
        calls, period = rate
        while counter.starts and counter.starts[0] <= now - period:
            counter.starts.popleft()
        if len(counter.starts) >= calls:
            pause = max(pause, counter.starts[-calls] + period - now)
    return pause


class _Member:
    """This process (one event loop of it) as the book's customer."""

    def __init__(self) -> None:
        self._book: Any = None
        self._held: dict[str, set[str]] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._returns: set[asyncio.Task[Any]] = set()

    async def ask(self, method: str, *args: Any) -> Any:
        """One call of the book, a second time with a new one if it is gone. Raises `ToolInfraError`."""
        try:
            return await self._ask(method, args)
        except Exception as error:
            logger.warning("the cluster's permits: %s: %s; asking again", type(error).__name__, error)
        try:
            return await self._ask(method, args)
        except Exception as error:
            raise ToolInfraError(f"the cluster's permits cannot be reached: {type(error).__name__}: {error}") from error

    async def _ask(self, method: str, args: tuple[Any, ...]) -> Any:
        book = self._book
        if book is None:
            book = self._book = await asyncio.to_thread(_ray_book) if _ray() else PermitBook()
        try:
            if isinstance(book, PermitBook):
                return await getattr(book, method)(*args)
            return await getattr(book, method).remote(*args)
        except Exception:
            if self._book is book:
                self._book = None
            raise

    async def take(self, key: str, concurrency: int | None, rate: tuple[int, float] | None) -> Callable[[], None]:
        """Waits for a permit; what gives it back, on the event loop's thread."""
        lease = uuid4().hex
        try:
            while not await self.ask("take", key, lease, concurrency, rate, LEASE_S, POLL_S):
                pass
        except BaseException:
            self._return(key, lease)
            raise
        if concurrency is None:
            return lambda: None
        self._held.setdefault(key, set()).add(lease)
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.get_running_loop().create_task(self._renew())

        def give_back() -> None:
            self._held[key].discard(lease)
            self._return(key, lease)

        return give_back

    def _return(self, key: str, lease: str) -> None:
        if self._book is not None:
            task = asyncio.get_running_loop().create_task(self.ask("give_back", key, lease))
            self._returns.add(task)
            task.add_done_callback(self._returned)

    def _returned(self, task: asyncio.Task[Any]) -> None:
        self._returns.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("the cluster's permits: one could not be given back and runs out: %s", task.exception())

    async def _renew(self) -> None:
        """For as long as any permit is held."""
        while True:
            await asyncio.sleep(LEASE_S / 3)
            held = {key: list(leases) for key, leases in self._held.items() if leases}
            if not held:
                return
            try:
                await self.ask("renew", held, LEASE_S)
            except ToolInfraError as error:
                logger.warning("%s", error)


_members: WeakKeyDictionary[asyncio.AbstractEventLoop, _Member] = WeakKeyDictionary()


class ClusterLimit:
    """The cluster's limits of one tool, for one event loop."""

    def __init__(self, name: str, concurrency: int | None, rate: RateLimit | None) -> None:
        self._name = name
        self._concurrency = concurrency
        self._rate = (rate.calls, rate.period) if rate else None
        self._in_order = asyncio.Lock()

    async def take(self) -> Callable[[], None]:
        """Waits for a permit; what gives it back. One request a process and tool is at the book at a time. Raises
        `ToolInfraError` if the book cannot be reached."""
        member = _members.setdefault(asyncio.get_running_loop(), _Member())
        async with self._in_order:
            return await member.take(self._name, self._concurrency, self._rate)


def _ray() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _ray_book() -> Any:
    """The cluster's book, made if there is none."""
    import ray

    options = {"name": ACTOR, "namespace": NAMESPACE, "get_if_exists": True, "num_cpus": 0, "max_concurrency": 10_000}
    return ray.remote(PermitBook).options(**options).remote()
