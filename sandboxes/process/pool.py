"""The node's pool of places: one daemon, one zygote, and a launcher a place. Runs in `agentloop.sandboxes.node`.

A client asks for a place and sends one end of a socket along, which goes to the launcher: runs do not pass through here, and
what the client has written into its own end meanwhile is there when the launcher looks. Whatever happens to the client, the
socket's end tells the launcher to leave nothing; whatever happens to this process, the kernel ends the zygote and the launchers
with it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentloop.sandboxes.base import SandboxError
from agentloop.sandboxes.node import Client, Service, run_folder
from agentloop.sandboxes.process import bwrap, cgroups
from agentloop.sandboxes.process.layers import base_python, boot, check, probe

log = logging.getLogger(__name__)

UID_BASE, UIDS = 0x70000000, 4096
"""A pool's uids: `UIDS` from `UID_BASE` + its number times `UIDS`, above what distributions and systemd hand out."""
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
START_S = 60.0
SPARE_S = 30.0
"""Seconds after which a place beyond the warm ones is given up."""


@dataclass(eq=False)
class Place:
    number: int
    control: socket.socket
    pid: int = 0
    once: bool = False
    ready_since: float = 0.0
    ended: bool = False
    born: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Its launcher has said that it is ready."""

    @property
    def name(self) -> str:
        return f"place-{self.number}"


@dataclass(eq=False)
class Waiter:
    once: bool
    place: asyncio.Future[Place] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Pool(Service):
    """Settings: those of `ProcessSandbox.Config` that are the pool's."""

    async def start(self) -> None:
        self.bubblewrap = self.settings["kind"] == "bubblewrap"
        self.layers = await (bwrap.probe() if self.bubblewrap else probe())
        check(self.layers, self.settings["require"], self.settings["kind"])
        self.active = {layer.name for layer in self.layers if layer.active}
        self.number, self.lock = _number()
        tree = cgroups.find()
        ours = contextlib.nullcontext()
        await asyncio.to_thread(cgroups.sweep, tree, lambda number: ours if number == self.number else _lock(number))
        self.groups = cgroups.Groups(tree, self.number, self.settings["cpus"])
        self.places: dict[int, Place] = {}
        self.ready: deque[Place] = deque()
        self.waiters: deque[Waiter] = deque()
        self.growing = 0
        self.running_once = 0
        self.zygote: Zygote | None = None
        self.failure: SandboxError | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.starting = asyncio.Lock()
        await self._zygote()
        self._fill()
        self._spawn(self._trim())

    async def call_with_fds(self, client: Client, method: str, params: dict[str, Any], fds: list[int]) -> Any:
        if method == "open" and len(fds) == 1:
            return await self._open(params, socket.socket(fileno=fds[0]))
        return await super().call_with_fds(client, method, params, fds)

    async def call(self, client: Client, method: str, params: dict[str, Any]) -> Any:
        match method:
            case "layers":
                return [[layer.name, layer.active, layer.stops, layer.detail] for layer in self.layers]
            case "state":
                return {"places": len(self.places), "ready": len(self.ready), "waiting": len(self.waiters)}
        raise ValueError(f"the pool has no method {method!r}")

    async def stop(self) -> None:
        for task in tuple(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if self.zygote is not None:
            await self.zygote.stop()
        for place in self.places.values():
            place.control.close()
        self.groups.remove()
        self.lock.close()

    # --- places, handed out ---

    async def _open(self, params: dict[str, Any], session: socket.socket) -> dict[str, Any]:
        """Give `session`, the client's socket, to the launcher of a free place."""
        with session:
            return await self._give(params, session)

    async def _give(self, params: dict[str, Any], session: socket.socket) -> dict[str, Any]:
        began = time.monotonic()
        limits = params["limits"]
        waiter = Waiter(bool(params["once"]))
        self.waiters.append(waiter)
        self._dispatch()
        try:
            place = await waiter.place
        except asyncio.CancelledError:
            if waiter.place.done() and not waiter.place.cancelled() and waiter.place.exception() is None:
                self._back(waiter.place.result())
            raise
        finally:
            with contextlib.suppress(ValueError):
                self.waiters.remove(waiter)
        try:
            socket.send_fds(place.control, [json.dumps(limits).encode()], [session.fileno()])
        except OSError as error:
            self._lose(place)
            raise SandboxError(f"a place of the sandbox died: {error}") from None
        return {"queue_s": time.monotonic() - began}

    def _dispatch(self) -> None:
        """Hand ready places to whoever waits, first come first served; single runs only as many as `max_runs`."""
        for waiter in tuple(self.waiters):
            if not self.ready:
                break
            if waiter.place.done() or (waiter.once and self.running_once >= self.settings["max_runs"]):
                continue
            place = self.ready.popleft()
            place.once = waiter.once
            self.running_once += waiter.once
            self.waiters.remove(waiter)
            waiter.place.set_result(place)
        self._fill()

    def _back(self, place: Place) -> None:
        """A place is ready, again or for the first time."""
        self.running_once -= place.once
        place.once = False
        place.ready_since = time.monotonic()
        self.ready.append(place)
        self._dispatch()

    def _lose(self, place: Place) -> None:
        if place.ended:
            return
        place.ended = True
        if not place.born.done():
            place.born.set_exception(SandboxError(f"a place ended while it was made; see the log in {run_folder()}"))
            place.born.exception()  # seen, also where nobody waits yet
        with contextlib.suppress(Exception):
            asyncio.get_running_loop().remove_reader(place.control)
        place.control.close()
        with contextlib.suppress(ValueError):
            self.ready.remove(place)
        self.running_once -= place.once
        place.once = False

    def _fill(self) -> None:
        """Make places while somebody waits for one, or fewer than the warm ones are ready."""
        waiting = sum(not waiter.once for waiter in self.waiters)
        single = sum(waiter.once for waiter in self.waiters)
        waiting += min(single, max(0, self.settings["max_runs"] - self.running_once))
        wanted = max(waiting, self.settings["warm"]) - len(self.ready) - self.growing
        room = self.settings["max_sessions"] - len(self.places) - self.growing
        for _ in range(min(wanted, room, 4 - self.growing)):
            self.growing += 1
            self._spawn(self._grow())

    async def _grow(self) -> None:
        try:
            zygote = await self._zygote()
            place = await self._make(zygote)
        except (SandboxError, OSError, TimeoutError) as error:
            log.warning("no place could be made: %s", error)
            self.growing -= 1
            if not self.places:
                for waiter in self.waiters:
                    if not waiter.place.done():
                        waiter.place.set_exception(SandboxError(f"no place for code could be made: {error}"))
            await asyncio.sleep(0.2)
            if self.waiters:
                self._fill()
        else:
            self.growing -= 1
            self._back(place)

    async def _make(self, zygote: Zygote) -> Place:
        number = next(i for i in range(UIDS) if i not in self.places)
        ours, theirs = socket.socketpair()
        place = self.places[number] = Place(number, ours)
        try:
            fds = self.groups.make(place.name)
            plan = {
                "uid": UID_BASE + self.number * UIDS + number if "own uid" in self.active else None,
                "landlock": "landlock" in self.active,
                "seccomp": "seccomp" in self.active,
                "disk_mb": min(self.settings["limits"]["disk_mb"], self.settings["limits"]["memory_mb"]),
                "files": self.settings["limits"]["files"],
                "env": self._env(),
            }
            request = {"plan": plan, "group": self.groups.tree.version, "files": list(fds)}
            try:
                place.pid = await zygote.fork(request, [theirs.fileno(), *fds.values()], lambda: self._ended(place))
            finally:
                for fd in fds.values():
                    os.close(fd)
            ours.setblocking(False)
            if not place.ended:
                asyncio.get_running_loop().add_reader(ours, self._heard, place)
            async with asyncio.timeout(START_S):
                await place.born
            if place.ended:
                raise SandboxError(f"a place ended as soon as it was made; see the log in {run_folder()}")
        except BaseException:
            self._lose(place)
            if not place.pid:
                self._ended(place)
            raise
        finally:
            theirs.close()
        return place

    def _heard(self, place: Place) -> None:
        try:
            message = place.control.recv(64)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._lose(place)
        elif place.born.done():
            self._back(place)
        else:
            place.born.set_result(None)  # who makes it hands it out

    def _ended(self, place: Place) -> None:
        """Its launcher is dead, and with it every process of its namespace."""
        self._lose(place)
        if self.places.get(place.number) is place:
            self.groups.remove(place.name)
            del self.places[place.number]
        self._dispatch()

    async def _trim(self) -> None:
        while True:
            await asyncio.sleep(5.0)
            now = time.monotonic()
            spare = [place for place in self.ready if now - place.ready_since > SPARE_S]
            for place in spare[: max(0, len(self.ready) - self.settings["warm"])]:
                self._lose(place)  # the launcher sees the end of its control socket and leaves

    def _env(self) -> dict[str, str]:
        python = Path(base_python())
        return {
            "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": "/home/sandbox/work",
            "USER": "sandbox",
            "TMPDIR": "/tmp",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "PYTHONPATH": os.pathsep.join(_sites().values()),
            "PYTHONDONTWRITEBYTECODE": "1",
            **ONE_THREAD,
        }

    # --- the zygote ---

    async def _zygote(self) -> Zygote:
        async with self.starting:
            if self.zygote is None or self.zygote.dead:
                self.zygote = await Zygote.start(self._setup(), bubblewrap=self.bubblewrap)
            return self.zygote

    def _setup(self) -> dict[str, Any]:
        """What the zygote makes its root of."""
        etc = {
            "passwd": "root:x:0:0::/:/bin/sh\n",
            "group": "root:x:0:\n",
            "hosts": "127.0.0.1 localhost\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        }
        first = UID_BASE + self.number * UIDS
        for uid in [bwrap.UID] if self.bubblewrap else range(first, first + self.settings["max_sessions"]):
            etc["passwd"] += f"sandbox:x:{uid}:{uid}::/home/sandbox/work:/bin/sh\n"
            etc["group"] += f"sandbox:x:{uid}:\n"
        wanted = [*bwrap.SYSTEM, sys.base_prefix, sys.base_exec_prefix, *_sites(), *self.settings["readable"]]
        return {
            "readable": bwrap.existing(wanted, _sites()),
            "etc": etc,
            "sites": list(_sites().values()),
            "preload": self.settings["preload"],
            "root": str(run_folder()),
            "env": ONE_THREAD,
        }

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


class Zygote:
    """The pool's side of the zygote."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.process, self.sock = process, sock
        self.dead = False
        self._last = 0
        self._asked: dict[int, asyncio.Future[int]] = {}
        self._watched: dict[int, Any] = {}
        self._ends: dict[int, Any] = {}
        self._text = b""

    @classmethod
    async def start(cls, setup: dict[str, Any], *, bubblewrap: bool) -> Zygote:
        """Execute one and wait until it is loaded."""
        ours, theirs = socket.socketpair()
        etc: dict[str, int] = {}
        line = [*boot("zygote"), str(theirs.fileno())]
        if bubblewrap:
            etc = {name: _text_file(text) for name, text in setup["etc"].items()}
            line = bwrap.command(setup["readable"], etc, [*bwrap.inside("zygote"), str(theirs.fileno())])
            setup = {**setup, "root": None}
        process = subprocess.Popen(  # noqa: ASYNC220 - a light process starts a light process
            line,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            pass_fds=[theirs.fileno(), *etc.values()],
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        )
        theirs.close()
        for fd in etc.values():
            os.close(fd)
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        zygote = cls(process, ours)
        try:
            await loop.sock_sendall(ours, json.dumps(setup).encode() + b"\n")
            async with asyncio.timeout(START_S):
                answer = json.loads(await loop.sock_recv(ours, 1 << 16) or b'{"error": "it died"}')
        except (OSError, TimeoutError) as error:
            answer = {"error": str(error) or "it did not answer in time"}
        if "error" in answer:
            await zygote.stop()
            raise SandboxError(f"the sandbox's zygote did not start: {answer['error']}")
        loop.add_reader(ours, zygote._read)
        return zygote

    async def fork(self, request: dict[str, Any], fds: list[int], ended: Any) -> int:
        """A launcher; its PID. `ended` is called when it has ended."""
        if self.dead:
            raise SandboxError("the sandbox's zygote has died")
        self._last += 1
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked[self._last] = future
        self._ends[self._last] = ended
        socket.send_fds(self.sock, [json.dumps({**request, "id": self._last}).encode()], fds)
        return await future

    def _read(self) -> None:
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._die()
            return
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "ended" in message:
                ended = self._watched.pop(message["ended"], None)
                if ended is not None:
                    ended()
            else:
                self._watched[message["pid"]] = self._ends.pop(message["id"])
                future = self._asked.pop(message["id"])
                if not future.done():
                    future.set_result(message["pid"])

    def _die(self) -> None:
        if self.dead:
            return
        self.dead = True
        with contextlib.suppress(Exception):
            asyncio.get_running_loop().remove_reader(self.sock)
        self.sock.close()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(SandboxError("the sandbox's zygote has died"))
        self._asked.clear()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        watched, self._watched = self._watched, {}
        for ended in (*watched.values(), *self._ends.values()):
            ended()  # PDEATHSIG: they have been sent SIGKILL
        self._ends.clear()

    async def stop(self) -> None:
        self._die()


def _text_file(text: str) -> int:
    fd = os.memfd_create("etc")
    os.write(fd, text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _sites() -> dict[str, str]:
    """Where packages are, here and in there: a virtual environment below /tmp cannot be where it is."""
    found = [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and os.path.isdir(path)]
    return {path: f"/opt/packages-{i}" if bwrap.taken(path) else path for i, path in enumerate(found)}


def _number() -> tuple[int, socket.socket]:
    """The first number that no living pool of this machine has, and the socket that holds it."""
    for number in range(64):
        lock = _lock(number)
        if lock is not None:
            return number, lock
    raise SandboxError("64 pools of sandboxes run on this machine already")


def _lock(number: int) -> socket.socket | None:
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(f"\0{cgroups.PREFIX}{number}")
    except OSError:
        lock.close()
        return None
    return lock
