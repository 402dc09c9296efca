"""How many containers there may be at once, and those that are kept ready."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from agentloop.sandboxes.base import Limits, SandboxError, Session
from agentloop.sandboxes.docker.config import DockerConfig
from agentloop.sandboxes.docker.container import Container
from agentloop.sandboxes.docker.engine import Engine
from agentloop.sandboxes.node import run_folder

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_SHAPE = ("memory_mb", "processes", "disk_mb", "files", "open_files")
"""The limits that a container is made with; the others are told with each run."""


def node_folder(address: str) -> Path:
    """Where all processes of this user on this machine that use the engine at `address` keep their lock files."""
    return run_folder() / f"docker-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


class Places:
    """At most `count` at once in this process; with a folder, in all processes that use it.

    A place of the node is a locked file. The kernel unlocks it when its process ends, however it ends.
    """

    def __init__(self, count: int, folder: Path | None) -> None:
        self._count, self._folder = count, folder
        self._here = asyncio.Semaphore(count)
        self._turn = asyncio.Lock()

    async def take(self) -> int:
        """Wait for a place; what to give to `give_back`. Raises `SandboxError` if the folder cannot be used."""
        await self._here.acquire()
        try:
            if self._folder is None:
                return -1
            async with self._turn:
                while True:
                    fd = self._lock_one(self._folder)
                    if fd is not None:
                        return fd
                    await asyncio.sleep(_POLL_S)
        except BaseException:
            self._here.release()
            raise

    def give_back(self, place: int) -> None:
        if place >= 0:
            os.close(place)
        self._here.release()

    def _lock_one(self, folder: Path) -> int | None:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            for number in range(self._count):
                fd = os.open(folder / f"place-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(fd)
                    continue
                return fd
        except OSError as error:
            raise SandboxError(f"docker: {folder} cannot hold lock files ({error.strerror}); set `scope: process`") from error
        return None


class Pool:
    """Containers for sessions, some of them started before anyone asks."""

    def __init__(self, config: DockerConfig, engine: Engine) -> None:
        self._config, self._engine = config, engine
        self._places = Places(config.max_containers, node_folder(engine.address) if config.scope == "node" else None)
        self.sessions: set[Session] = set()
        """Those that are open."""
        self._spares: list[Container] = []
        self._making = 0
        self._tasks: set[asyncio.Future[Any]] = set()
        """What `close` waits for."""
        self._closed = False

    async def place(self) -> int:
        return await self._places.take()

    def leave(self, place: int) -> None:
        self._places.give_back(place)

    async def container(self, limits: Limits) -> Container:
        """A fresh container of this shape: a spare, or one made now. Raises `SandboxError`."""
        if self._closed:
            raise SandboxError("docker: the sandbox is closed")
        if _shape(limits) == _shape(self._config.limits):
            while self._spares:
                spare = self._spares.pop(0)
                self.refill()
                if spare.alive:
                    spare.limits = limits
                    return spare
                self.in_background(spare.remove())
        self.refill()
        return await self._make(limits)

    async def _make(self, limits: Limits) -> Container:
        """A container made now; if the pool was closed meanwhile, it is removed before `close` returns."""
        making: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks.add(making)
        try:
            made = await Container.make(self._engine, self._config, limits)
            if self._closed:
                await self.discard(made)
                raise SandboxError("docker: the sandbox is closed")
            return made
        finally:
            self._tasks.discard(making)
            making.cancel()

    async def discard(self, container: Container) -> None:
        """Remove it, also if the caller is cancelled."""
        await asyncio.shield(self.in_background(container.remove()))

    def keep(self, container: Container) -> None:
        """A container that nothing has run in yet becomes a spare."""
        self._spares.append(container)
        self.refill()

    def refill(self) -> None:
        """Start as many spares as are missing."""
        while not self._closed and len(self._spares) + self._making < self._config.spares:
            self._making += 1
            self.in_background(self._make_spare())

    async def _make_spare(self) -> None:
        try:
            spare = await Container.make(self._engine, self._config, self._config.limits)
        except SandboxError as error:  # whoever needs one meets it again, and is told
            logger.warning("no spare container: %s", error)
            return
        finally:
            self._making -= 1
        if self._closed:
            await spare.remove()
        else:
            self._spares.append(spare)

    def in_background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Do `work` while others go on; `close` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """End everything: sessions, spares, and what goes on in the background."""
        self._closed = True
        await asyncio.gather(*(session.close() for session in list(self.sessions)))
        spares, self._spares = self._spares, []
        await asyncio.gather(*(spare.remove() for spare in spares))
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)


def _shape(limits: Limits) -> tuple[int, ...]:
    return tuple(getattr(limits, name) for name in _SHAPE)
