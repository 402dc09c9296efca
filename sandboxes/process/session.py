"""A session over a socket whose other end is a launcher: what the `process` and the `bubblewrap` kind have in common."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentloop.errors import nearest
from agentloop.sandboxes.base import Limits, Result, SandboxError, Session, Status, lost_before
from agentloop.sandboxes.paths import inside
from agentloop.sandboxes.process.jail import wire

log = logging.getLogger(__name__)

LANGUAGES = ("python", "sh", "bash")
GRACE_S = 30.0
"""Seconds beyond a run's own after which its launcher counts as dead: it kills on time, but the machine may be busy."""
FETCH_BYTES = 16 * 2**20


class Wire:
    """Requests to a launcher, one after the other, and its answers. Belongs to the running event loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self._unpacker = wire.Unpacker()
        self._last = 0
        self._answer: asyncio.Future[tuple[dict[str, Any], list[bytes]]] | None = None
        self.loop.add_reader(sock, self._read)

    async def ask(
        self, head: dict[str, Any], blobs: Sequence[bytes], wait_s: float, ready: Awaitable[None] | None = None
    ) -> tuple[dict[str, Any], list[bytes]]:
        """The answer. Cancelling it ends what it asked for. Raises `SandboxError` if the other end dies, or is silent for
        `wait_s` after `ready`, and then it counts as dead. The request may be under way before `ready`."""
        if self.closed:
            raise SandboxError("the sandbox's place died")
        self._last += 1
        data = wire.pack({**head, "id": self._last}, blobs)
        self._answer = self.loop.create_future()
        timer: asyncio.TimerHandle | None = None
        sent = 0
        try:
            with contextlib.suppress(BlockingIOError):
                sent = self.sock.send(data)
            if ready is not None:
                await ready
            timer = self.loop.call_later(wait_s, self.close, f"the sandbox's place did not answer within {wait_s:.0f} s")
            if sent < len(data):
                await self.loop.sock_sendall(self.sock, memoryview(data)[sent:])
                sent = len(data)
            return await self._answer
        except OSError as error:
            self.close()
            raise SandboxError(f"the sandbox's place died: {error.strerror}") from None
        except asyncio.CancelledError:
            kill = wire.pack({"op": "kill", "id": self._last})
            try:
                whole = sent == len(data) and self.sock.send(kill) == len(kill)
            except OSError:
                whole = False
            if not whole:
                self.close()  # after half a request nothing can follow
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if self._answer.done() and not self._answer.cancelled():
                self._answer.exception()  # seen, whatever else is raised
            self._answer = None

    def close(self, reason: str = "the sandbox's place died") -> None:
        """End the connection, and with it everything that runs at the other end."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(Exception):
            self.loop.remove_reader(self.sock)
        self.sock.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(SandboxError(reason))

    def _read(self) -> None:
        try:
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            for head, blobs in self._unpacker.feed(data):
                if head.get("id") == self._last and self._answer is not None and not self._answer.done():
                    self._answer.set_result((head, blobs))  # any other is of a run that was cancelled
        except (ValueError, KeyError, TypeError) as error:
            log.warning("a sandbox's place sent what is no answer and is given up: %s", error)
            self.close()


class WireSession(Session):
    """A session whose place `take` gets: it hands a socket to a launcher, and returns the seconds that it waited for one."""

    def __init__(self, take: Callable[[socket.socket, Limits, bool], Awaitable[float]], limits: Limits, *, once: bool) -> None:
        self._take, self.limits, self._once = take, limits, once
        self._wire: Wire | None = None
        self._queue_s = 0.0
        self._lost = False
        """Its place was given up with a run that was cancelled, and nobody has been told."""
        self._turn = asyncio.Lock()
        self._closed = False
        self.begun: Callable[[], None] | None = None
        """Called when it has its place."""

    async def open(self) -> None:
        if self._closed:
            raise SandboxError("the session is closed")
        if self._wire is None or self._wire.closed:
            await self._placed(self._connect())

    def _connect(self) -> socket.socket:
        """A new connection; its other end, for a launcher."""
        ours, theirs = socket.socketpair()
        self._wire = Wire(ours)
        return theirs

    async def _placed(self, theirs: socket.socket) -> None:
        assert self._wire is not None
        try:
            with theirs:
                self._queue_s = await self._take(theirs, self.limits, self._once)
        except BaseException:
            self._wire.close("the sandbox has no place")
            raise
        if self._closed:
            self._wire.close("the session was closed")
            raise SandboxError("the session is closed")
        if self.begun is not None:
            self.begun()

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
        if language not in LANGUAGES:
            raise ValueError(f"there is no language {language!r} in this sandbox; {nearest(language, LANGUAGES)}")
        if timeout is not None and timeout <= 0:
            raise ValueError(f"timeout {timeout}: expected more than 0 seconds")
        seconds = min(timeout or self.limits.timeout_s, self.limits.timeout_s)
        written = {str(inside(path)): _bytes(data) for path, data in (files or {}).items()}
        head = {
            "op": "run",
            "language": language,
            "files": list(written),
            "fetch": [str(inside(path)) for path in fetch],
            "timeout": seconds,
            "once": self._once,
        }
        blobs = [_bytes(code), _bytes(stdin), *written.values()]
        async with self._turn:
            try:
                ready = None
                if self._once and self._wire is None and not self._closed:
                    ready = self._placed(self._connect())
                else:
                    await self.open()
                assert self._wire is not None
                answer, parts = await self._wire.ask(head, blobs, seconds + GRACE_S, ready)
                queue_s, self._queue_s = self._queue_s, 0.0
                lost, self._lost = self._lost, False
                made = result(answer, parts, queue_s)
                return replace(made, state_lost=True, error=lost_before(made.error)) if lost else made
            except asyncio.CancelledError:
                self._lost = self._lost or (not self._once and self._wire is not None and self._wire.closed)
                raise
            except SandboxError as error:
                lost, self._lost = not self._once, False
                more = "; the session's variables and files are gone" if lost else ""
                return Result(Status.INFRA, error=f"{error}{more}", state_lost=lost)

    async def put(self, path: str, data: str | bytes) -> None:
        await self._file({"op": "put", "path": str(inside(path))}, [_bytes(data)], path)

    async def get(self, path: str, *, max_bytes: int = FETCH_BYTES) -> bytes:
        most = min(max_bytes, wire.MAX_FRAME - 4096)
        (data,) = await self._file({"op": "get", "path": str(inside(path)), "max_bytes": most}, [], path)
        return data

    async def _file(self, head: dict[str, Any], blobs: list[bytes], path: str) -> list[bytes]:
        async with self._turn:
            await self.open()
            assert self._wire is not None
            try:
                answer, parts = await self._wire.ask(head, blobs, GRACE_S)
            except asyncio.CancelledError:
                self._lost = self._lost or self._wire.closed
                raise
        number = answer.get("errno")
        if number in (errno.EFBIG, errno.EINVAL):
            raise ValueError(f"path {path!r}: {answer['error']}")
        if number is not None:
            raise OSError(number, answer["error"], path)  # its subclass, by the number
        return parts

    async def close(self) -> None:
        self._closed = True
        if self._wire is not None:
            self._wire.close("the session was closed")


def result(head: dict[str, Any], parts: list[bytes], queue_s: float) -> Result:
    """A launcher's answer. `SandboxError` if it is none."""
    try:
        out, err, value, *contents = parts
        return Result(
            Status(head["status"]),
            stdout=out.decode("utf-8", "replace"),
            stderr=err.decode("utf-8", "replace"),
            value=value.decode("utf-8", "replace") if head["value"] else None,
            exit_code=head["exit_code"],
            error=head["error"],
            stdout_cut=head["stdout_cut"],
            stderr_cut=head["stderr_cut"],
            value_cut=head["value_cut"],
            state_lost=head["state_lost"],
            queue_s=queue_s,
            run_s=head["run_s"],
            cpu_s=head["cpu_s"],
            peak_memory_mb=head["peak_mb"],
            files=dict(zip(head["files"], contents, strict=True)),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise SandboxError(f"the sandbox's place answered with what is no result: {error!r}") from None


def _bytes(data: str | bytes) -> bytes:
    return data.encode("utf-8", "replace") if isinstance(data, str) else bytes(data)


def wire_limits(limits: Limits) -> dict[str, Any]:
    """As a launcher takes them. Files are in memory, so there is no more room for them than for everything: what they fill is
    not freed by killing, and must leave some for the next interpreter."""
    return {
        **limits.model_dump(),
        "cpu_s": limits.cpu_s or limits.timeout_s,
        "disk_mb": min(limits.disk_mb, limits.memory_mb),
    }
