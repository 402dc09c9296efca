"""A pool of worker processes that can be killed: for trusted code on untrusted data, such as graders.

    pool = WorkerPool("agentloop.rewards.math.worker:work", workers=2, limit_s=2.0)
    value = await pool.call({"gold": "1/2", "answer": "0.5"})

`9**9**9` in a thread holds the interpreter's lock until it is done, and no timeout of the same process can end it. So the
function runs in processes of its own, which are killed at their limit (SIGKILL) and replaced by a spare that is already warm:
a bomb costs its caller alone.

- The pool is a service of the node (`agentloop.sandboxes.node`): all processes of one user that ask for the same pool share
  it. With `scope="process"` each process has one of its own. Nothing but a socket lives in the calling process.
- Workers are forked from a template: a freshly executed, single-threaded process that has imported the function's module and
  called it with `warm_up`. A worker is ready in a few milliseconds and shares the template's memory.
- Everything dies with its parent (PR_SET_PDEATHSIG): workers with the template, the template with the service.
- `limit_s` covers the call's own run, not the wait for a worker. Where an overloaded machine gave the worker less than half of
  it in CPU, it is waited for again, nine times at most. The caller's deadline (`asyncio.timeout`) covers everything, and a
  cancelled call is killed. At most 256 calls of one connection wait in the service, the others with their callers.
- Payload and value are JSON.
"""

from __future__ import annotations

import array
import asyncio
import concurrent.futures
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from agentloop.sandboxes.base import SandboxError
from agentloop.sandboxes.node import Client, Node, Scope, Service

T = TypeVar("T")

SPARES = 1
"""Workers beyond those that may be busy, so that a killed one is replaced at once."""
PATIENCE = 10
"""Times its limit that a call may last while it has had less than half of one in CPU: on a machine that is overloaded."""
TEMPLATE_S = 60.0
"""Seconds that the template may take to import and warm up."""


class WorkerTimeout(Exception):
    """The call ran into `limit_s` and its worker was killed."""

    def __init__(self, message: str, cpu_s: float | None = None) -> None:
        super().__init__(message)
        self.cpu_s = cpu_s
        """CPU seconds that the worker used for the call; much less than the limit on a machine that is overloaded."""


class WorkerOutOfMemory(Exception):
    """The call asked for more than `memory_mb`."""


class WorkerCrash(SandboxError):
    """The worker died of itself, or the function raised: a failure of the machinery."""


# -- the caller's side ----------------------------------------------------------------------------------------------------


class WorkerPool:
    """A pool, as its callers see it. Starts at the first call; safe to use from several event loops and threads."""

    def __init__(
        self,
        target: str,
        *,
        workers: int = 2,
        limit_s: float = 5.0,
        memory_mb: int = 512,
        recycle: int = 2000,
        warm_up: Any = None,
        scope: Scope = "node",
        paths: Sequence[str] = (),
    ) -> None:
        """`target` is `package.module:function`, called with one payload; `recycle`: calls after which a worker is replaced;
        `memory_mb`: what a worker may take beyond what the template has; `paths`: further folders to import from."""
        self.limit_s = limit_s
        settings: dict[str, Any] = {
            "target": target,
            "workers": workers,
            "limit_s": limit_s,
            "memory_mb": memory_mb,
            "recycle": recycle,
            "warm_up": warm_up,
            "paths": [os.path.abspath(path) for path in paths],
        }
        if scope == "process":  # one for this process, however many event loops it has
            settings["owner"] = [os.getpid(), time.monotonic_ns()]
        self._settings = settings
        self._idle_s = 0.5 if scope == "process" else 10.0
        self._nodes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Node] = weakref.WeakKeyDictionary()

    async def call(self, payload: Any) -> Any:
        """The function's value for `payload`. Raises `WorkerTimeout`, `WorkerOutOfMemory`, or `SandboxError` where the
        machinery failed (`WorkerCrash`: the worker died, twice)."""
        for last in (False, True):
            try:
                answer = await self._node().call("call", {"payload": payload})
            except SandboxError:
                if last:
                    raise
                continue  # the service died; the function has no effects, so that asking again is safe
            status = answer["status"]
            if status == "ok":
                return answer["value"]
            if status == "timeout":
                raise WorkerTimeout(f"killed after {self.limit_s:g} s", answer.get("cpu_s"))
            if status == "oom":
                raise WorkerOutOfMemory(f"it asked for more than {self._settings['memory_mb']} MiB")
            if status in ("crash", "error"):
                raise WorkerCrash(f"{self._settings['target']}: {answer['error']}")
        raise AssertionError("unreachable")

    def call_blocking(self, payload: Any, timeout: float | None = None) -> Any:
        """The same for callers without an event loop; must not be called on an event loop's thread, which it would block.
        Raises `TimeoutError` after `timeout` seconds, the wait for a worker included."""
        return run_blocking(self.call(payload), timeout)

    async def start(self) -> None:
        """Make the pool ready; the first call does it otherwise. Raises `SandboxError`."""
        await self._node().call("start")

    async def pids(self) -> list[int]:
        """Process ids of the workers, busy ones first."""
        found = await self._node().call("pids")
        return [int(pid) for pid in found]

    async def close(self) -> None:
        """End this event loop's connection; the pool ends when its last caller is gone."""
        node = self._nodes.pop(asyncio.get_running_loop(), None)
        if node is not None:
            await node.close()

    def _node(self) -> Node:
        loop = asyncio.get_running_loop()
        for other in [other for other in self._nodes if other.is_closed()]:  # its connection would keep the pool alive
            self._nodes.pop(other).drop()
        if loop not in self._nodes:
            service = "agentloop.sandboxes.killable:PoolService"
            self._nodes[loop] = Node(service, self._settings, scope="node", idle_s=self._idle_s, env={})
        return self._nodes[loop]


_side: asyncio.AbstractEventLoop | None = None
_side_lock = threading.Lock()


def run_blocking(coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """Run a coroutine on an event loop of a thread of its own, which lives as long as the process, and wait for it."""
    global _side
    with _side_lock:
        if _side is None or not _side.is_running():
            _side = asyncio.new_event_loop()
            threading.Thread(target=_side.run_forever, name="agentloop-graders", daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(coroutine, _side)
    try:
        return future.result(timeout)
    except concurrent.futures.TimeoutError:
        future.cancel()
        raise


def _forget_side() -> None:
    global _side, _side_lock
    _side, _side_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_side)


# -- the service ----------------------------------------------------------------------------------------------------------


class _Worker:
    """One worker process, seen from the service: a socket, a pid and a pidfd (which no other process can come to be)."""

    def __init__(self, sock: socket.socket, pid: int, pidfd: int) -> None:
        self.sock, self.pid, self.pidfd = sock, pid, pidfd
        self.calls = 0

    def kill(self) -> None:
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            os.close(self.pidfd)
            self.pidfd = -1
        self.sock.close()

    def alive(self) -> bool:
        looking = select.poll()  # `select.select` knows no descriptor above 1023
        looking.register(self.pidfd, select.POLLIN)
        return not looking.poll(0)

    def cpu_s(self) -> float | None:
        try:
            return time.clock_gettime((~self.pid << 3) | 2)  # the process's CPU clock, as clock_getcpuclockid(3) makes it
        except OSError:
            return None

    async def ask(self, payload: bytes) -> bytes:
        """Raises `ConnectionError` if the worker is gone."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.sock, struct.pack("!I", len(payload)) + payload)
        (size,) = struct.unpack("!I", await self._read(4))
        return await self._read(size)

    async def _read(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        parts: list[bytes] = []
        while size > 0:
            part = await loop.sock_recv(self.sock, min(size, 2**18))
            if not part:
                raise ConnectionError("the worker is gone")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class PoolService(Service):
    """The pool itself, in the node's service process."""

    async def start(self) -> None:
        self._free = asyncio.Semaphore(int(self.settings["workers"]))
        self._size = int(self.settings["workers"]) + SPARES
        self._idle: deque[_Worker] = deque()
        self._busy: set[_Worker] = set()
        self._forking = asyncio.Lock()
        self._template: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._refilling: asyncio.Task[None] | None = None
        self._stopped = False
        self._idle.append(await self._fork())
        self._refill()

    async def call(self, client: Client, method: str, params: dict[str, Any]) -> Any:
        if method == "start":
            return None
        if method == "pids":
            return [worker.pid for worker in (*self._busy, *self._idle)]
        if method != "call":
            raise ValueError(f"a pool of workers has no method {method!r}")
        payload = json.dumps(params["payload"]).encode()
        async with self._free:
            answer = await self._ask_one(await self._take(), payload)
            if answer["status"] == "crash":  # it may have been dying before it was asked; one that was just forked was not
                answer = await self._ask_one(await self._fork(), payload)
            return answer

    async def _ask_one(self, worker: _Worker, payload: bytes) -> dict[str, Any]:
        self._busy.add(worker)
        try:
            return await self._ask(worker, payload)
        finally:
            self._busy.discard(worker)
            if worker.pidfd >= 0 and worker.calls < int(self.settings["recycle"]):
                self._idle.append(worker)
            else:
                worker.kill()
                self._refill()

    async def _take(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()  # the one that was used last: its caches are warm
            if worker.alive():
                return worker
            worker.kill()
        return await self._fork()

    async def _ask(self, worker: _Worker, payload: bytes) -> dict[str, Any]:
        worker.calls += 1
        before = worker.cpu_s() or 0.0
        done = False
        limit_s = float(self.settings["limit_s"])
        try:
            asking = asyncio.ensure_future(worker.ask(payload))
            try:
                for _ in range(PATIENCE):
                    await asyncio.wait([asking], timeout=limit_s)
                    if asking.done() or ((worker.cpu_s() or limit_s) - before) >= limit_s / 2:
                        break
            finally:
                if not asking.done():
                    asking.cancel()
            if not asking.done() or asking.cancelled():
                raise TimeoutError
            answer: dict[str, Any] = json.loads(asking.result())
            done = answer["status"] != "oom"  # a worker that ran out of memory once is not used again
            return answer
        except TimeoutError:
            cpu_s = worker.cpu_s()
            return {"status": "timeout", "cpu_s": None if cpu_s is None else cpu_s - before}
        except (ConnectionError, ValueError) as error:
            return {"status": "crash", "error": f"its worker died: {error}"}
        finally:
            if not done:
                worker.kill()

    async def stop(self) -> None:
        self._stopped = True
        if self._refilling is not None:
            self._refilling.cancel()
        for worker in (*self._busy, *self._idle):
            worker.kill()
        if self._control is not None:
            self._control.close()
        if self._template is not None:
            self._template.kill()
            self._template.wait()

    # -- making workers --

    def _refill(self) -> None:
        if self._refilling is None or self._refilling.done():
            self._refilling = asyncio.create_task(self._fill())

    async def _fill(self) -> None:
        while len(self._idle) + len(self._busy) < self._size:
            try:
                self._idle.appendleft(await self._fork())  # taken last: it is cold
            except SandboxError:
                return  # the next call tries again, and tells its caller

    async def _fork(self) -> _Worker:
        """A new worker. Raises `SandboxError` if the template cannot be started or does not answer. Cancelled meanwhile, the
        template's answer is read all the same, or the next one that asks would get it."""
        forking = asyncio.ensure_future(self._fork_one())
        try:
            return await asyncio.shield(forking)
        except asyncio.CancelledError:
            forking.add_done_callback(self._keep)
            raise

    def _keep(self, forking: asyncio.Future[_Worker]) -> None:
        if not forking.cancelled() and forking.exception() is None:
            self._idle.append(forking.result()) if not self._stopped else forking.result().kill()

    async def _fork_one(self) -> _Worker:
        async with self._forking:
            for last in (False, True):
                if self._stopped:
                    raise SandboxError("the pool has ended")
                control = self._control if self._alive() else await self._start_template()
                assert control is not None
                ours, theirs = socket.socketpair()
                try:
                    control.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))])
                    data, rights = await _receive(control, TEMPLATE_S)
                    (pid,) = struct.unpack("!i", data)
                    ours.setblocking(False)
                    return _Worker(ours, pid, rights[0])
                except (OSError, struct.error, IndexError, TimeoutError) as error:
                    ours.close()
                    self._end_template()
                    if last:
                        raise SandboxError(f"the template of {self.settings['target']} died: {error}") from error
                finally:
                    theirs.close()
        raise AssertionError("unreachable")

    def _alive(self) -> bool:
        return self._template is not None and self._template.poll() is None

    def _end_template(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._template is not None:
            self._template.kill()
            self._template.wait()
        self._template = self._control = None

    async def _start_template(self) -> socket.socket:
        self._end_template()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plan = {**self.settings, "parent": os.getpid(), "fd": theirs.fileno()}
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(  # noqa: ASYNC220 - it returns once the new process is executed
            [sys.executable, "-s", "-P", "-m", "agentloop.sandboxes.killable_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=None,  # the service's log
            pass_fds=[theirs.fileno()],
            env=env,
        )
        theirs.close()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps(plan).encode())
        ours.setblocking(False)
        try:
            ready, _ = await _receive(ours, TEMPLATE_S)
        except (OSError, TimeoutError) as error:
            ready = str(error).encode()
        if ready != b"ready":
            process.kill()
            process.wait()
            ours.close()
            raise SandboxError(f"the workers of {self.settings['target']} cannot start: {ready.decode(errors='replace')}")
        self._template, self._control = process, ours
        return ours


async def _receive(sock: socket.socket, timeout_s: float) -> tuple[bytes, list[int]]:
    """One packet and the file descriptors with it."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        async with asyncio.timeout(timeout_s):
            await readable.wait()
    finally:
        loop.remove_reader(sock)
    data, rights, _, _ = sock.recvmsg(65536, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise ConnectionError("it ended without a word")
    fds = array.array("i")
    for level, kind, raw in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(raw)
    return data, list(fds)
