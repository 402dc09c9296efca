"""The sessions that clients hold."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from agentloop.sandboxes.base import Limits, Sandbox, Session
from agentloop.sandboxes.serve.admission import Refused

logger = logging.getLogger(__name__)


class NoSuchSession(Exception):
    """It was closed, or idled too long."""


@dataclass(eq=False, slots=True)
class _Held:
    session: Session
    limits: Limits
    last_used: float
    users: int = 0
    """Requests that are using it now."""


class Sessions:
    """Sessions by id. One that nobody has used for `idle_s` belongs to a client that is gone, and is closed."""

    def __init__(self, sandbox: Sandbox, most: int, idle_s: float) -> None:
        self._sandbox, self._most, self._idle_s = sandbox, most, idle_s
        self._held: dict[str, _Held] = {}
        self._opening = 0

    def __len__(self) -> int:
        return len(self._held)

    async def open(self, limits: Limits) -> str:
        """Its id. Raises `Refused` if there are too many, `SandboxError`."""
        if len(self._held) + self._opening >= self._most:
            raise Refused(429, f"{self._most} sessions are as many as it keeps", 5)
        self._opening += 1
        session = self._sandbox.session(limits)
        try:
            await session.open()
        except BaseException:
            await session.close()
            raise
        finally:
            self._opening -= 1
        name = secrets.token_urlsafe(16)
        self._held[name] = _Held(session, limits, time.monotonic())
        return name

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[tuple[Session, Limits]]:
        """Raises `NoSuchSession`."""
        held = self._held.get(name)
        if held is None:
            raise NoSuchSession
        held.users += 1
        try:
            yield held.session, held.limits
        finally:
            held.users -= 1
            held.last_used = time.monotonic()

    async def close(self, name: str) -> None:
        """Raises `NoSuchSession`."""
        held = self._held.pop(name, None)
        if held is None:
            raise NoSuchSession
        await held.session.close()

    async def close_idle(self) -> None:
        """For as long as the service runs."""
        while True:
            await asyncio.sleep(min(10.0, self._idle_s / 2))
            old = time.monotonic() - self._idle_s
            for name in [name for name, held in self._held.items() if not held.users and held.last_used < old]:
                logger.warning("session %s… was not used for %g s and is closed", name[:6], self._idle_s)
                with suppress(NoSuchSession):
                    await self.close(name)

    async def close_all(self) -> None:
        held, self._held = list(self._held.values()), {}
        await asyncio.gather(*(one.session.close() for one in held))
