"""One service a node: what all processes of one user on one machine share, such as a pool of sandboxes or of graders.

A training job runs several agent workers on a node. Limits that each of them kept for itself would add up, so the pool lives
in a daemon of its own, and every worker is a client of it:

    class Pool(Service):                                   # in agentloop/sandboxes/some_room.py
        async def call(self, client, method, params):
            return {"answer": params["question"][::-1]}

    node = await connect("agentloop.sandboxes.some_room:Pool", {"size": 4})
    await node.call("ask", {"question": "abc"})            # {"answer": "cba"}
    await node.close()

- There is one daemon per (user, service, settings, version of agentloop). The first client starts it; a file lock decides
  between several. It is freshly executed, never forked from a process that may hold Ray, torch or CUDA, and imports no more
  than this module and the service's.
- It listens on a unix socket in a folder that only its user may enter (`/tmp/agentloop-<uid>`, or `AGENTLOOP_RUN_DIR`).
- What a client held is freed when its connection ends, however the client ended: `Service.disconnected`.
- It ends itself when nobody has been connected for `idle_s` seconds. If it dies, calls under way raise `SandboxError`, and
  the next call starts a new one.
- Cancelling a call cancels its handler. Neither side reads on while the other is slow: `call` waits while much is unsent, and
  the daemon takes no more than `MAX_PENDING` requests of one connection at once.

Wire format: frames of a big-endian u32 length and a JSON object: `{"id", "method", "params"}` and `{"id", "cancel"}` to the
daemon, `{"id", "result", "fds"}` and `{"id", "error", "kind"}` back; `fds` file descriptors travel with the frame (SCM_RIGHTS).
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import hashlib
import importlib
import json
import logging
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import agentloop
from agentloop.errors import ConfigError
from agentloop.sandboxes.base import SandboxError

log = logging.getLogger(__name__)

MAX_FRAME = 64 * 2**20
MAX_PENDING = 256
"""Requests of one connection that the daemon works on at once."""
HIGH_WATER = 2**20
"""Unsent bytes above which a sender waits."""
START_S = 60.0
"""Seconds that a daemon may take to answer its first call."""
ERRORS: dict[str, type[Exception]] = {"SandboxError": SandboxError, "ConfigError": ConfigError, "ValueError": ValueError}
"""What a service may raise and a client then sees; anything else is logged and becomes a `SandboxError`."""

Scope = Literal["node", "process"]


# --- what a service is ---------------------------------------------------------------------------------------------------


class Client:
    """One connection, as a service sees it: hashable, and `gone` once it has ended."""

    def __init__(self) -> None:
        self.gone = False


@dataclass(frozen=True, slots=True)
class Reply:
    """A result with open file descriptors, which are handed over: they are closed here once they are sent."""

    result: Any
    fds: tuple[int, ...] = ()


class Service(ABC):
    """What runs in the daemon. Made with the settings that the clients gave, which are JSON."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    async def start(self) -> None:  # noqa: B027 - nothing to do is a fair default
        """Make ready, before the first call. What it raises becomes the answer to every call, and the daemon ends."""

    @abstractmethod
    async def call(self, client: Client, method: str, params: dict[str, Any]) -> Any:
        """Answer one call: JSON or a `Reply`. Cancelled if the caller is cancelled or gone."""

    async def call_with_fds(self, client: Client, method: str, params: dict[str, Any], fds: list[int]) -> Any:
        """As `call`, with the file descriptors that came along, which are this method's to close."""
        _close_all(fds)
        return await self.call(client, method, params)

    async def disconnected(self, client: Client) -> None:  # noqa: B027
        """Free what `client` held. Its calls have been cancelled and have ended."""

    async def stop(self) -> None:  # noqa: B027
        """End everything; the daemon exits next."""


# --- frames --------------------------------------------------------------------------------------------------------------


class Channel:
    """Frames over a connected, non-blocking unix socket, with file descriptors. Belongs to the running event loop."""

    def __init__(
        self, sock: socket.socket, on_frame: Callable[[dict[str, Any], list[int]], None], on_end: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self.sock, self.on_frame, self.on_end = sock, on_frame, on_end
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self.unsent = 0
        self._out: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._in = bytearray()
        self._fds: deque[int] = deque()
        self._drained = asyncio.Event()
        self._drained.set()
        self._reading = False
        self.resume()

    def send(self, frame: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Queue a frame; `fds` are closed once sent. Never blocks: `drained` is for that."""
        if self.closed:
            _close_all(fds)
            return
        data = json.dumps(frame if not fds else {**frame, "fds": len(fds)}, separators=(",", ":")).encode()
        if len(data) > MAX_FRAME:
            _close_all(fds)
            raise ValueError(f"a message of {len(data)} bytes to a node's service: the limit is {MAX_FRAME}")
        self._out.append((memoryview(struct.pack("!I", len(data)) + data), fds))
        self.unsent += len(data) + 4
        if len(self._out) == 1:
            self._write()

    async def drained(self) -> None:
        """Wait until the other side has taken most of what was sent."""
        await self._drained.wait()

    def pause(self) -> None:
        if self._reading:
            self.loop.remove_reader(self.sock)
            self._reading = False

    def resume(self) -> None:
        if not self._reading and not self.closed:
            self.loop.add_reader(self.sock, self._read)
            self._reading = True

    def _write(self) -> None:
        try:
            while self._out:
                data, fds = self._out[0]
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self.sock.sendmsg([data], rights)
                _close_all(fds)
                self.unsent -= sent
                if sent < len(data):
                    self._out[0] = (data[sent:], ())
                    continue
                self._out.popleft()
            self.loop.remove_writer(self.sock)
        except BlockingIOError:
            self.loop.add_writer(self.sock, self._write)
        except OSError:
            self.close()
        if self.unsent < HIGH_WATER:
            self._drained.set()
        else:
            self._drained.clear()

    def _read(self) -> None:
        try:
            data, rights, _, _ = self.sock.recvmsg(256 * 1024, socket.CMSG_SPACE(16 * 4), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        for level, kind, raw in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.extend(array.array("i", raw[: len(raw) - len(raw) % 4]))
        if not data:
            self.close()
            return
        self._in += data
        try:
            while not self.closed and len(self._in) >= 4:
                (size,) = struct.unpack_from("!I", self._in)
                if size > MAX_FRAME:
                    raise ValueError(f"a frame of {size} bytes")
                if len(self._in) < 4 + size:
                    break
                frame = json.loads(bytes(self._in[4 : 4 + size]))
                del self._in[: 4 + size]
                self.on_frame(frame, [self._fds.popleft() for _ in range(int(frame.get("fds", 0)))])
        except (ValueError, IndexError, AttributeError) as error:
            log.warning("a connection sent what is no frame and is closed: %s", error)
            self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.pause()
        with contextlib.suppress(Exception):
            self.loop.remove_writer(self.sock)
        self.sock.close()
        for _, fds in self._out:
            _close_all(fds)
        self._out.clear()
        _close_all(tuple(self._fds))
        self._fds.clear()
        self._drained.set()
        self.on_end()


def _close_all(fds: tuple[int, ...] | list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


# --- the client ----------------------------------------------------------------------------------------------------------


async def connect(
    service: str,
    settings: Mapping[str, Any] | None = None,
    *,
    scope: Scope = "node",
    idle_s: float = 10.0,
    env: Mapping[str, str] | None = None,
) -> Node:
    """A connection to `service` («module:Class», a `Service`), started if this node does not run it yet.

    `settings` (JSON) are given to the class; clients with the same share one daemon. `scope="process"` starts one for this
    connection alone. `env` is added to the daemon's environment, which is otherwise a minimal one. Raises `SandboxError` if
    it cannot be started, and what `Service.start` raised.
    """
    node = Node(service, dict(settings or {}), scope=scope, idle_s=idle_s, env=dict(env or {}))
    await node.start()
    return node


class _Ended(SandboxError):
    """The connection ended before the answer came."""


class Node:
    """A connection to a node's service. Calls may be made concurrently, from one event loop."""

    def __init__(self, service: str, settings: dict[str, Any], *, scope: Scope, idle_s: float, env: dict[str, str]) -> None:
        private = uuid.uuid4().hex if scope == "process" else ""
        self._plan = {"service": service, "settings": settings, "idle_s": idle_s, "private": private}
        text = json.dumps([self._plan, env, _version(), sys.executable], sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:20]
        self._env = env
        self._channel: Channel | None = None
        self._connecting: asyncio.Lock = asyncio.Lock()
        self._waiting: dict[int, asyncio.Future[tuple[Any, list[int]]]] = {}
        self._last = 0
        self._closed = False

    async def start(self) -> None:
        """Connect and wait until the service is ready."""
        await self._connected()

    async def call(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        """The service's answer. Raises what it raised of `ERRORS`, and `SandboxError` if the daemon is gone: the call may
        or may not have been carried out. Cancelling it cancels it there."""
        result, fds = await self.call_with_fds(method, params)
        _close_all(fds)
        return result

    async def call_with_fds(
        self, method: str, params: Mapping[str, Any] | None = None, fds: tuple[int, ...] = ()
    ) -> tuple[Any, list[int]]:
        """As `call`, with the file descriptors of the answer, which are the caller's to close. `fds` are handed over."""
        if not method:
            raise ValueError("a call needs a method")
        return await self._request(method, params or {}, fds)

    async def close(self) -> None:
        """End the connection; the service frees what it held for it."""
        self._closed = True
        if self._channel is not None:
            self._channel.close()

    def drop(self) -> None:
        """End the connection where its event loop is closed already."""
        self._closed = True
        if self._channel is not None:
            self._channel.closed = True
            self._channel.sock.close()

    async def _request(self, method: str, params: Mapping[str, Any], fds: tuple[int, ...]) -> tuple[Any, list[int]]:
        try:
            channel = await self._connected()
        except BaseException:
            _close_all(fds)
            raise
        return await self._request_on(channel, method, params, fds)

    async def _request_on(
        self, channel: Channel, method: str, params: Mapping[str, Any], fds: tuple[int, ...] = ()
    ) -> tuple[Any, list[int]]:
        self._last += 1
        number = self._last
        future: asyncio.Future[tuple[Any, list[int]]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            channel.send({"id": number, "method": method, "params": params}, fds)
            if channel.unsent > HIGH_WATER:
                await channel.drained()
            return await future
        except asyncio.CancelledError:
            channel.send({"id": number, "cancel": True})
            if future.done() and not future.cancelled() and future.exception() is None:
                _close_all(future.result()[1])
            raise
        finally:
            self._waiting.pop(number, None)

    async def _connected(self) -> Channel:
        if self._closed:
            raise SandboxError("the connection to this node's service is closed")
        if self._channel is None or self._channel.closed:
            async with self._connecting:
                if self._channel is None or self._channel.closed:
                    self._channel = await self._dial()
        return self._channel

    async def _dial(self) -> Channel:
        """A connection to the daemon, started if there is none, once its service is ready."""
        folder = run_folder()
        path = folder / f"{self.digest}.sock"
        until = time.monotonic() + START_S
        while True:
            sock = _connect(path)
            if sock is not None:
                channel = Channel(sock, self._on_frame, self._on_end)
                try:
                    await self._request_on(channel, "", {})
                except _Ended:  # a daemon that was just ending itself
                    pass
                except BaseException:
                    channel.close()
                    raise
                else:
                    return channel
            else:
                await self._spawn(folder)
            if time.monotonic() > until:
                raise SandboxError(
                    f"the node's service did not start within {START_S:.0f} s: {_tail(path.with_suffix('.log'))}"
                )
            await asyncio.sleep(0.01)

    async def _spawn(self, folder: Path) -> None:
        """Start a daemon. It listens when this returns, unless another one has the lock."""
        process = self._popen(folder)
        while process.poll() is None:  # noqa: ASYNC110 - a loop of the caller's may have no child watcher
            await asyncio.sleep(0.005)
        if process.returncode:
            raise SandboxError(f"the node's service did not start: {_tail(folder / f'{self.digest}.log')}")

    def _popen(self, folder: Path) -> subprocess.Popen[bytes]:
        root = str(Path(agentloop.__file__).resolve().parent.parent)
        env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "AGENTLOOP_RUN_DIR") if name in os.environ}
        env |= {
            "PYTHONPATH": root,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **self._env,
        }
        with open(folder / f"{self.digest}.log", "ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-m", "agentloop.sandboxes.node", str(folder), self.digest],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                cwd="/",
                env=env,
                start_new_session=True,
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps(self._plan).encode())
        return process

    def _on_frame(self, frame: dict[str, Any], fds: list[int]) -> None:
        future = self._waiting.get(frame.get("id", 0))
        if future is None or future.done():
            _close_all(fds)
        elif "error" in frame:
            future.set_exception(ERRORS.get(frame.get("kind", ""), SandboxError)(frame["error"]))
        else:
            future.set_result((frame.get("result"), fds))

    def _on_end(self) -> None:
        reason = "the connection to this node's service was closed" if self._closed else "this node's service died"
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_Ended(f"{reason} during the call"))


def run_folder() -> Path:
    """The folder of this user's sockets and locks on this node, made if it is not there. `SandboxError` if others may enter."""
    folder = Path(os.environ.get("AGENTLOOP_RUN_DIR") or f"/tmp/agentloop-{os.geteuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise SandboxError(f"{folder}: must be a folder of this user that nobody else may enter (mode 0700); remove it")
    return folder


def _connect(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        return None
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid != os.geteuid():
        sock.close()
        raise SandboxError(f"{path}: belongs to user {uid}")
    return sock


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it said nothing"


def _version() -> list[Any]:
    """agentloop's version, and its sandboxes' source: a daemon of an older source does not serve a newer client."""
    root = Path(__file__).resolve().parent
    return [agentloop.__version__, *(sorted((str(p), p.stat().st_mtime_ns) for p in root.rglob("*.py")))]


# --- the daemon ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Served:
    """One connection of the daemon."""

    client: Client = field(default_factory=Client)
    channel: Channel | None = None
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)


class Daemon:
    """Serves one service until nobody has been connected for `idle_s`."""

    def __init__(self, listener: socket.socket, path: Path, plan: dict[str, Any]) -> None:
        self.listener, self.path, self.plan = listener, path, plan
        self.served: set[_Served] = set()
        self.farewells: set[asyncio.Task[None]] = set()
        self.idle_since = time.monotonic()
        self.ready: asyncio.Future[Service] = asyncio.get_running_loop().create_future()
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.stopping.set)
        self.listener.setblocking(False)
        loop.add_reader(self.listener, self._accept)
        starting = asyncio.create_task(self._start())
        with contextlib.suppress(asyncio.CancelledError):
            await self._until_idle()
        loop.remove_reader(self.listener)
        self.path.unlink(missing_ok=True)
        self.listener.close()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        for served in tuple(self.served):
            if served.channel is not None:
                served.channel.close()
        await asyncio.gather(*self.farewells, return_exceptions=True)
        if self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None:
            await self.ready.result().stop()

    async def _until_idle(self) -> None:
        idle_s = 0.2 if self.plan["private"] else float(self.plan["idle_s"])
        grace = time.monotonic() + 5.0  # whoever started this daemon has not connected yet
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), min(idle_s, 1.0))
            now = time.monotonic()
            failed = self.ready.done() and self.ready.exception() is not None
            if self.served:
                grace = 0.0
            if self.stopping.is_set() or (not self.served and now > grace and (failed or now - self.idle_since >= idle_s)):
                return

    async def _start(self) -> None:
        try:
            module, _, name = self.plan["service"].partition(":")
            service = cast(Service, getattr(importlib.import_module(module), name)(self.plan["settings"]))
            await service.start()
        except Exception as error:
            log.warning("the service does not start: %s", error, exc_info=not isinstance(error, (SandboxError, ConfigError)))
            if not isinstance(error, tuple(ERRORS.values())):
                error = SandboxError(f"{type(error).__name__}: {error}")
            self.ready.set_exception(error)
            self.ready.exception()  # seen
        else:
            self.ready.set_result(service)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            sock, _ = self.listener.accept()
            served = _Served()
            self.served.add(served)
            served.channel = Channel(sock, lambda frame, fds: self._on_frame(served, frame, fds), lambda: self._on_end(served))

    def _on_frame(self, served: _Served, frame: dict[str, Any], fds: list[int]) -> None:
        number = int(frame["id"]) if "id" in frame else 0
        if "cancel" in frame:
            _close_all(fds)
            if number in served.tasks:
                served.tasks[number].cancel()
            return
        call = self._answer(served, number, str(frame.get("method", "")), frame.get("params") or {}, fds)
        task = asyncio.create_task(call)
        task.add_done_callback(lambda _: self._answered(served, number, fds))  # a task that never began has no `finally`
        served.tasks[number] = task
        if len(served.tasks) >= MAX_PENDING and served.channel is not None:
            served.channel.pause()

    async def _answer(self, served: _Served, number: int, method: str, params: dict[str, Any], fds: list[int]) -> None:
        channel = served.channel
        assert channel is not None
        try:
            service = await asyncio.shield(self.ready)
            given = fds.copy()
            fds.clear()
            reply = await service.call_with_fds(served.client, method, params, given) if method else None
            if not isinstance(reply, Reply):
                reply = Reply(reply)
            channel.send({"id": number, "result": reply.result}, reply.fds)
            if channel.unsent > HIGH_WATER:
                await channel.drained()
        except asyncio.CancelledError:
            pass
        except tuple(ERRORS.values()) as error:
            kind = next(name for name, known in ERRORS.items() if isinstance(error, known))
            channel.send({"id": number, "error": str(error), "kind": kind})
        except Exception as error:
            log.exception("a call of %r failed", method)
            channel.send({"id": number, "error": f"{type(error).__name__}: {error}", "kind": "SandboxError"})

    def _answered(self, served: _Served, number: int, fds: list[int]) -> None:
        _close_all(fds)
        served.tasks.pop(number, None)
        if len(served.tasks) < MAX_PENDING and served.channel is not None:
            served.channel.resume()

    def _on_end(self, served: _Served) -> None:
        farewell = asyncio.create_task(self._farewell(served))
        self.farewells.add(farewell)
        farewell.add_done_callback(self.farewells.discard)

    async def _farewell(self, served: _Served) -> None:
        served.client.gone = True
        tasks = list(served.tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            if self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None:
                await self.ready.result().disconnected(served.client)
        except Exception:
            log.exception("what a client held was not all freed")
        finally:
            self.served.discard(served)
            self.idle_since = time.monotonic()


def main(folder: str, digest: str) -> int:
    """Listen, and serve in a process of its own. Returns 0 once it listens, and where another one has the lock, for then
    that one serves."""
    plan = json.loads(sys.stdin.buffer.read())
    path = Path(folder) / f"{digest}.sock"
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path.with_suffix(".lock")).st_ino != os.fstat(lock).st_ino:
            return 0  # of a daemon that has just ended; the client tries again
    except (BlockingIOError, FileNotFoundError):
        return 0
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1024)
    if os.fork():  # whoever started this waits for it, and should not have to wait for the daemon
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)

    async def run() -> None:
        await Daemon(listener, path, plan).run()

    try:
        asyncio.run(run())
    finally:
        for suffix in (".log", ".lock"):
            path.with_suffix(suffix).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    # As the module that services import, not a second copy of it under the name `__main__`.
    sys.exit(importlib.import_module("agentloop.sandboxes.node").main(*sys.argv[1:]))
