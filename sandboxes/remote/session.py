"""A session of the kind `remote`: agentloop's own service keeps it, under `/sessions`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from agentloop.sandboxes.base import Limits, Result, SandboxError, Session, Status
from agentloop.sandboxes.paths import inside
from agentloop.sandboxes.remote.endpoints import Endpoint, Failed, Reply, StillThere, refusal

if TYPE_CHECKING:
    from agentloop.sandboxes.remote.sandbox import RemoteSandbox

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0
_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ValueError, FileNotFoundError, IsADirectoryError, PermissionError, OSError)
}


class RemoteSession(Session):
    """Stays with one endpoint. If that fails, the next run begins in a fresh session, wherever there is room."""

    def __init__(self, sandbox: RemoteSandbox, limits: Limits) -> None:
        self._sandbox, self._limits = sandbox, limits
        self._lock = asyncio.Lock()
        self._home: Endpoint | None = None
        self._path = ""
        self._opened = self._closed = False
        self._opening: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        """What `close` waits for."""

    async def open(self) -> None:
        async with self._lock:
            await self._living()
            self._opened = True

    async def _living(self) -> Endpoint:
        """The endpoint where it lives; opened anew if it lives nowhere. Raises `SandboxError`."""
        if self._closed:
            raise SandboxError("remote: the session is closed")
        if self._home is None:
            opening = self._opening = self._in_background(self._open())
            try:
                await asyncio.shield(opening)
            except asyncio.CancelledError:
                self._opening = None
                self._in_background(self._leave())  # if it was opened just now
                raise
            if self._home is None:
                raise SandboxError("remote: the session is closed")
        return self._home

    async def _open(self) -> None:
        """Open it somewhere, and end it there at once if nobody waits for it any more."""
        body = {"limits": self._limits.model_dump(exclude_none=True)}
        reply, endpoint = await self._sandbox.ask("POST", "/sessions", self._sandbox.config.overhead_s, json=body)
        if reply.status in (404, 405):
            hint = "only `agentloop sandbox serve` keeps them; run code without a session, or use another endpoint"
            raise SandboxError(f"{endpoint.url}: this service has no sessions; {hint}")
        if reply.status != 201:
            raise SandboxError(f"{endpoint.url}: it refuses a session ({reply.status}): {refusal(reply)}")
        path = f"/sessions/{reply.json()['session']}"
        if self._closed or self._opening is not asyncio.current_task():
            await self._end(endpoint, path)
        else:
            self._home, self._path = endpoint, path
            endpoint.running += 1

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def run(
        self,
        code: str,
        *,
        language: str = "python",
        stdin: str = "",
        files: Mapping[str, str | bytes] | None = None,
        fetch: Sequence[str] = (),
        timeout: float | None = None,
    ) -> Result:
        request = self._sandbox.request(code, language, stdin, files, fetch, timeout, self._limits)
        async with self._lock:
            if not self._opened:
                raise SandboxError("remote: the session is not open")
            try:
                home = await self._living()
                return await self._sandbox.exchange(f"{self._path}/run", request, self._limits, home)
            except StillThere as error:
                return Result(Status.INFRA, error=str(error))
            except SandboxError as error:
                await self._leave()
                return Result(Status.INFRA, error=f"{error}; the session's variables and files are gone", state_lost=True)

    async def put(self, path: str, data: str | bytes) -> None:
        name = str(inside(path))
        async with self._lock:
            await self._file("PUT", name, data=data.encode() if isinstance(data, str) else data)

    async def get(self, path: str, *, max_bytes: int = 16 * 2**20) -> bytes:
        name = str(inside(path))
        async with self._lock:
            return (await self._file("GET", name, query={"max_bytes": str(max_bytes)})).body

    async def _file(self, method: str, path: str, *, data: bytes | None = None, query: dict[str, str] | None = None) -> Reply:
        if not self._opened:
            raise SandboxError("remote: the session is not open")
        home = await self._living()
        seconds = self._sandbox.config.overhead_s
        reply, _ = await self._sandbox.ask(
            method, f"{self._path}/files/{quote(path)}", seconds, home=home, data=data, query=query
        )
        if reply.status < 300:
            return reply
        try:
            said = reply.json()
            kind, number, message = said["error"], said.get("errno"), said["message"]
        except (ValueError, KeyError, TypeError):
            kind, number, message = "", None, refusal(reply)
        if number:
            raise OSError(number, message, path)  # its subclass, by the number
        if kind in _ERRORS:
            raise _ERRORS[kind](message)
        await self._leave()
        raise SandboxError(f"{home.url}: {message}; the session's variables and files are gone")

    async def _leave(self) -> None:
        """End it at its endpoint, as far as that can be reached."""
        home, self._home = self._home, None
        if home is not None:
            home.running -= 1
            await self._end(home, self._path)

    async def _end(self, home: Endpoint, path: str) -> None:
        try:
            await self._sandbox.end(home, path, _CLOSE_S)
        except (Failed, SandboxError) as error:
            logger.warning("a session may be left behind until it has idled long enough: %s", error)

    async def close(self) -> None:
        self._closed = True
        await asyncio.shield(self._end_all())
        self._sandbox.forget(self)

    async def _end_all(self) -> None:
        await self._leave()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
                logger.warning("a session may be left behind until it has idled long enough: its service does not answer")
