"""A session of the kind `docker`: one container, one interpreter."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentloop.sandboxes.base import Limits, Result, SandboxError, Session, Status, lost_before
from agentloop.sandboxes.docker.channel import Gone
from agentloop.sandboxes.docker.container import Container
from agentloop.sandboxes.docker.pool import Pool
from agentloop.sandboxes.paths import inside

LANGUAGES = ("python", "sh", "bash")
_GRACE_S = 10.0
"""How long after a run's end the driver may take to say so; then its container is thrown away."""
_CANCEL_S = 3.0


class DockerSession(Session):
    def __init__(self, pool: Callable[[], Awaitable[Pool]], limits: Limits) -> None:
        """`pool`: gives the sandbox's pool, started."""
        self._started = pool
        self._limits = limits
        self._in: Pool | None = None
        self._lock = asyncio.Lock()
        self._untold = False
        """Its container was thrown away after a run that was cancelled, and nobody has been told."""
        self._place = -1
        self._container: Container | None = None
        self._runs = 0
        """Runs in this container."""
        self._closed = False

    async def open(self) -> None:
        if self._closed:
            raise SandboxError("docker: the session is closed")
        async with self._lock:
            if self._in is not None:
                return
            pool = await self._started()
            self._place = await pool.place()
            self._in = pool
            pool.sessions.add(self)
            try:
                await self._living()
            except BaseException:
                await self._give_up()
                raise

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
        return await self.run_once(code, language, stdin, files or {}, fetch, timeout, last=False)

    async def run_once(
        self,
        code: str,
        language: str,
        stdin: str,
        files: Mapping[str, str | bytes],
        fetch: Sequence[str],
        timeout: float | None,
        *,
        last: bool,
    ) -> Result:
        """As `run`; with `last` the interpreter ends after it as `python file.py` would."""
        if language not in LANGUAGES:
            raise ValueError(f"language {language!r}: known are {', '.join(LANGUAGES)}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout {timeout}: expected a number of seconds above 0")
        wanted = {str(inside(path)): _bytes(data) for path, data in files.items()}
        fetched = {path: str(inside(path)) for path in fetch}
        limits = self._limits
        limit_s = min(timeout or limits.timeout_s, limits.timeout_s)
        request: dict[str, Any] = {
            "code": code,
            "language": language,
            "stdin": stdin,
            "last": last,
            "timeout_s": limit_s,
            "cpu_s": limits.cpu_s or limit_s,
            "output_bytes": limits.output_bytes,
            "value_bytes": limits.value_bytes,
            "memory_mb": limits.memory_mb,
        }
        async with self._lock:
            began = time.monotonic()
            try:
                container = await self._living()
                async with asyncio.timeout(limit_s + _GRACE_S + (len(wanted) + len(fetched)) * _GRACE_S):
                    made = await self._exchange(container, request, wanted, fetched)
                untold, self._untold = self._untold, False
                return replace(made, state_lost=True, error=lost_before(made.error)) if untold else made
            except Gone:
                return await self._lost(began)
            except TimeoutError:
                await self._throw_away()
                error = f"docker: the driver did not answer within {_GRACE_S:g} s after the run should have ended"
                error += "; the session's variables and files are gone"
                return Result(Status.INFRA, error=error, state_lost=True, run_s=time.monotonic() - began)
            except SandboxError as error:
                return Result(Status.INFRA, error=str(error), state_lost=True, run_s=time.monotonic() - began)
            except asyncio.CancelledError:
                await self._stop()
                raise

    async def _exchange(
        self, container: Container, request: dict[str, Any], files: dict[str, bytes], fetch: dict[str, str]
    ) -> Result:
        for path, data in files.items():
            try:
                await container.put(path, data)
            except OSError as error:
                # In a folder that nothing has run in, what does not fit was too much from the start.
                status = Status.ERROR if self._runs else Status.INFRA
                return Result(status, error=f"file '{path}' cannot be written: {error.strerror}")
        self._runs += 1
        said, body = await container.channel.ask("run", **request)
        if "status" not in said:
            return Result(Status.INFRA, error=f"docker: the driver failed: {said.get('error')}")
        container.oom_before |= said["status"] == "oom"
        found: dict[str, bytes] = {}
        for name, path in fetch.items():
            try:
                found[name] = await container.get(path, _FETCH_BYTES)
            except OSError:
                continue
        return _result(said, body, found)

    async def put(self, path: str, data: str | bytes) -> None:
        name = str(inside(path))
        async with self._file(path) as container:
            await container.put(name, _bytes(data))

    async def get(self, path: str, *, max_bytes: int = 16 * 2**20) -> bytes:
        name = str(inside(path))
        async with self._file(path, max_bytes) as container:
            return await container.get(name, max_bytes)

    def _file(self, path: str, max_bytes: int = 0) -> _FileAccess:
        return _FileAccess(self, path, max_bytes)

    async def _living(self) -> Container:
        """The session's container; a new one if the last one was lost. Raises `SandboxError`."""
        if self._in is None:
            raise SandboxError("docker: the session is not open")
        if self._container is None:
            pool = self._in
            made = await pool.container(self._limits)
            if self._closed:
                await pool.discard(made)
                raise SandboxError("docker: the session was closed")
            self._container = made
            self._runs = 0
        return self._container

    async def _lost(self, began: float) -> Result:
        """What to say of a container that ended by itself, which is forgotten."""
        if self._container is None:
            return Result(Status.INFRA, error="docker: the session was closed", state_lost=True)
        oom, why = await self._container.why_gone()
        await self._throw_away()
        status = Status.OOM if oom else Status.INFRA
        error = f"{why}; the session's files are gone too"
        return Result(status, error=error, state_lost=True, run_s=time.monotonic() - began)

    async def _throw_away(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            await asyncio.shield(container.remove())

    async def _stop(self) -> None:
        """After a cancelled run: kill it and keep the files, or throw the container away if that does not work."""
        container = self._container
        if container is None:
            return
        try:
            async with asyncio.timeout(_CANCEL_S):
                await container.channel.tell("kill")
                await container.channel.ask("nothing")  # answered after the run's own answer
        except (Gone, TimeoutError, asyncio.CancelledError):
            self._untold = True
            await self._throw_away()

    async def close(self) -> None:
        self._closed = True
        await self._give_up()

    async def _give_up(self) -> None:
        pool, self._in = self._in, None
        if pool is None:
            return
        try:
            await self._throw_away()
        finally:
            pool.leave(self._place)
            pool.sessions.discard(self)

    def close_later(self) -> None:
        """`close`, without waiting for the engine to remove the container; what runs in it ends at once."""
        if self._in is not None:
            if self._container is not None:
                self._container.channel.hang_up()
            self._in.in_background(self.close())


class _FileAccess:
    """One `put` or `get`: the container for it, and its errors as the interface names them."""

    def __init__(self, session: DockerSession, path: str, max_bytes: int) -> None:
        self._session, self._path, self._max_bytes = session, path, max_bytes

    async def __aenter__(self) -> Container:
        await self._session._lock.acquire()
        try:
            return await self._session._living()
        except BaseException:
            self._session._lock.release()
            raise

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if isinstance(error, Gone):
                lost = await self._session._lost(time.monotonic())
                raise SandboxError(lost.error) from error
            if isinstance(error, asyncio.CancelledError):
                self._session._untold = True
                await self._session._throw_away()  # half an answer may be under way
            if isinstance(error, OSError):
                if error.errno == errno.EFBIG and self._max_bytes:
                    raise ValueError(f"file {self._path!r}: larger than {self._max_bytes} bytes") from error
                raise OSError(error.errno, error.strerror, self._path) from error
        finally:
            self._session._lock.release()


_FETCH_BYTES = 16 * 2**20


def _bytes(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data


def _result(said: dict[str, Any], body: bytes, files: dict[str, bytes]) -> Result:
    status = Status(said["status"])
    out, err = body[: said["stdout"]], body[said["stdout"] :]
    return Result(
        status,
        stdout=out.decode(errors="replace"),
        stderr=err.decode(errors="replace"),
        value=None if said["value"] is None else said["value"].encode(errors="replace").decode(),
        exit_code=said["exit"],
        error=said["error"],
        stdout_cut=said["stdout_cut"],
        stderr_cut=said["stderr_cut"],
        value_cut=said["value_cut"],
        state_lost=said["state_lost"],
        run_s=said["run_s"],
        cpu_s=said["cpu_s"],
        peak_memory_mb=said["peak_mb"],
        files=files,
    )
