"""One place: PID 1 of its own namespaces, which runs the code of one session or one run after another.

It is the trusted side. It holds the pipes, the clock and the control group; the interpreters, which its template forks, have
another uid, have their privileges and descriptors taken away, and can at most end themselves. Whatever a lease started is
gone before the place is given to the next: `kill(-1)` from PID 1 reaches every process of the namespace, and the folder in
memory is unmounted.

Requests on a session's socket are `wire` frames with `op`: run, put, get; `kill` at any time. The socket's end ends the lease.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import stat
import time
from dataclasses import dataclass
from typing import Any

from . import driver, files, kernel, wire
from .group import Group
from .template import FENCED, HOME, MESSAGE, WORK, Plan

NO_RESULT: dict[str, Any] = {
    **{"status": "error", "error": "", "exit_code": None, "value": False, "files": [], "state_lost": False},
    **{"stdout_cut": 0, "stderr_cut": 0, "value_cut": 0, "run_s": 0.0, "cpu_s": None, "peak_mb": None},
}
SHELLS = {"sh": "/bin/sh", "bash": "/bin/bash"}
FENCE_S = 20.0
INODES = 8
"""Of the folder's own: itself, `work`, `tmp`, `shm`."""
TICK_S = 0.05


class Kept:
    """What is kept of one stream: at most `cap` bytes, its beginning and its end."""

    def __init__(self, fd: int, cap: int) -> None:
        self.fd, self.cap, self.data, self.open = fd, cap, bytearray(), True

    def read(self) -> bool:
        """Read once; False once there is nothing to read for now, or for ever."""
        try:
            data = os.read(self.fd, 1 << 18)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.data += data
        self.open = bool(data)
        return self.open and not self.over

    @property
    def over(self) -> bool:
        return len(self.data) > self.cap

    def result(self) -> tuple[bytes, int]:
        """What is kept, and how many bytes are not."""
        if not self.over:
            return bytes(self.data), 0
        tail = self.cap // 2
        head = self.cap - tail
        return bytes(self.data[:head] + self.data[len(self.data) - tail :]), len(self.data) - self.cap


@dataclass
class Child:
    """A process that runs code, by the template's number, and the launcher's ends of its pipes."""

    number: int
    out: int
    err: int
    channel: socket.socket
    exited: int | None = None
    """Its exit code, once it was reaped; negative: the signal."""

    def close(self) -> None:
        os.close(self.out)
        os.close(self.err)
        self.channel.close()


class Full(Exception):
    """No process can be started: the session has as many as it may."""


class Broken(Exception):
    """A child could not be fenced in: it has run no code."""


class Gone(Exception):
    """The client has closed the session, or has died."""


class Place:
    """What one launcher does."""

    def __init__(self, plan: Plan, group: Group, control: socket.socket, template: socket.socket) -> None:
        self.plan, self.group, self.control, self.template = plan, group, control, template
        self.interpreter: Child | None = None
        self.children: dict[int, Child] = {}
        self.id = 0
        self.session: socket.socket | None = None
        self.unpacker = wire.Unpacker()
        self.requests: list[tuple[dict[str, Any], list[bytes]]] = []
        self.limits: dict[str, Any] = {}
        self.lost = False
        """The interpreter was ended between two runs."""
        self.wake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # PID 1 is out of its children's reach but for what it handles
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    # --- the pool's side ---

    def prepare(self) -> None:
        """A fresh folder and an interpreter that waits for code."""
        options = f"size={self.plan.disk_mb}m,nr_inodes={self.plan.files + INODES},mode=755"
        kernel.mount("tmpfs", HOME, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
        for name in ("work", "tmp", "shm"):
            os.mkdir(f"{HOME}/{name}", 0o700)
            if self.plan.uid is not None:
                os.chown(f"{HOME}/{name}", self.plan.uid, self.plan.uid)
        self.interpreter = self._fork()

    def lease(self, session: socket.socket, limits: dict[str, Any]) -> None:
        """Serve one session to its end, then leave nothing of it."""
        self.session, self.limits, self.unpacker, self.requests = session, limits, wire.Unpacker(), []
        try:
            if (limits["disk_mb"], limits["files"]) != (self.plan.disk_mb, self.plan.files):
                options = f"size={limits['disk_mb']}m,nr_inodes={limits['files'] + INODES}"
                kernel.mount("tmpfs", HOME, None, kernel.MS_REMOUNT | kernel.MS_NOSUID | kernel.MS_NODEV, options)
            self.group.limit(limits["memory_mb"], limits["processes"])
            while True:
                head, blobs = self._request()
                self._answer(head, blobs)
        except (Gone, Broken, OSError, ValueError, KeyError) as error:  # a client that breaks off, or sends what is no request
            if not isinstance(error, (Gone, ConnectionError)):
                print(f"a lease ended early: {type(error).__name__}: {error}", flush=True)
        finally:
            session.close()
            self.session = None
            self._kill_all()
            kernel.umount(HOME, kernel.MNT_DETACH)

    def _request(self) -> tuple[dict[str, Any], list[bytes]]:
        while not self.requests:
            self._listen(None)
        return self.requests.pop(0)

    def _listen(self, wait_s: float | None, extra: dict[int, int] | None = None) -> set[int]:
        """Wait for the client, the pool, a child's end or `extra` descriptors (with poll's events); those that are ready.
        Raises `Gone`; leaves the process if the pool has gone."""
        assert self.session is not None
        poll = select.poll()
        poll.register(self.session, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        poll.register(self.template, select.POLLIN)
        poll.register(self.control, 0)  # only its end
        for fd, events in (extra or {}).items():
            poll.register(fd, events)
        ready = {fd for fd, _ in poll.poll(None if wait_s is None else max(0, int(wait_s * 1000) + 1))}
        if self.control.fileno() in ready:
            os._exit(0)
        if self.template.fileno() in ready:
            self._hear()
        if self.wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self.wake, 4096)
            self._reap()
        if self.session.fileno() in ready:
            data = self.session.recv(1 << 20)
            if not data:
                raise Gone
            self.requests.extend(self.unpacker.feed(data))
        return ready

    def _answer(self, head: dict[str, Any], blobs: list[bytes]) -> None:
        self.id = head["id"]
        match head["op"]:
            case "run":
                try:
                    answer, parts = self._run(head, blobs)
                except Broken as error:
                    answer, parts = {"status": "infra", "error": str(error)}, [b""] * 3
                self._send({**NO_RESULT, **answer}, parts)
            case "put":
                try:
                    files.write(WORK, head["path"], blobs[0], self.plan.uid)
                    self._send({"ok": True})
                except OSError as error:
                    self._send({"errno": error.errno, "error": error.strerror})
            case "get":
                try:
                    self._send({"ok": True}, [files.read(WORK, head["path"], head["max_bytes"])])
                except OSError as error:
                    self._send({"errno": error.errno, "error": error.strerror})
            case "kill":
                pass  # of a run that has just ended
            case other:
                raise ValueError(f"there is no request {other!r}")

    def _send(self, head: dict[str, Any], blobs: list[bytes] | None = None) -> None:
        assert self.session is not None
        self.session.sendall(wire.pack({**head, "id": self.id}, blobs or []))

    # --- processes ---

    def _fork(self) -> Child:
        """A new process that waits for its first job, fenced in. Raises `Full` and `Broken`.

        If it fails, what the session has left may be to blame: a process that kills all others, a folder that nobody may enter.
        That is ended and mended once, so that the code cannot pass its own failure for the machinery's."""
        try:
            return self._fork_once()
        except Broken:
            self.lost = self.lost or self.interpreter is not None
            self._kill_all()
            self._mend()
            return self._fork_once()

    def _mend(self) -> None:
        """Make the working folder one that can be entered; what took its place, where code can do that, is removed."""
        try:
            os.chmod(HOME, 0o755)
            if not stat.S_ISDIR(os.lstat(WORK).st_mode):
                os.unlink(WORK)
        except FileNotFoundError:
            pass
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(WORK)
            os.chmod(WORK, 0o700)
        except OSError as error:
            raise Full(f"its working folder is gone: {error.strerror}") from None

    def _fork_once(self) -> Child:
        self.template.send(b"f")
        heard = self._hear()
        while heard is None:
            heard = self._hear()
        channel = heard.channel
        channel.settimeout(FENCE_S)
        try:
            fenced = channel.recv(1)
        except OSError:
            fenced = b""
        if fenced != FENCED:
            why = Kept(heard.err, 1000)
            why.read()
            heard.close()
            raise Broken(f"a process could not be fenced in: {why.data.decode(errors='replace').strip() or 'it ended'}")
        channel.setblocking(False)
        return heard

    def _hear(self) -> Child | None:
        """A message of the template: the child that it has forked, or nothing but an end that is noted."""
        message, fds, _, _ = socket.recv_fds(self.template, MESSAGE.size, 3, socket.MSG_CMSG_CLOEXEC)
        if not message:
            os._exit(0)
        kind, number, code, micros = MESSAGE.unpack(message)
        if kind == b"X":
            self.children.pop(number).exited = code
            self.group.ended_us += micros
            return None
        if kind == b"E":
            raise Full(os.strerror(number))
        child = self.children[number] = Child(number, fds[0], fds[1], socket.socket(fileno=fds[2]))
        return child

    def _reap(self, block: bool = False) -> None:
        """Take the ends of orphans, which are PID 1's."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0 if block else os.WNOHANG)[0]:
                pass

    def _kill(self) -> None:
        """A fork cannot slip through: the kernel refuses one to a process that is killed."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)

    def _kill_all(self) -> None:
        """End every process of the place, and wait until it has ended."""
        self._kill()
        while self.children:
            self._hear()
        self._reap(block=True)
        if self.interpreter is not None:
            self.interpreter.close()
            self.interpreter = None

    # --- one run ---

    def _run(self, head: dict[str, Any], blobs: list[bytes]) -> tuple[dict[str, Any], list[bytes]]:
        began = time.monotonic()
        code, stdin, *contents = blobs
        once, limits = bool(head["once"]), self.limits
        self._reap()
        python = head["language"] == "python"
        if python and self.interpreter is not None and self.interpreter.exited is not None:
            self.interpreter.close()
            self.interpreter = None
            gone = "the interpreter has ended since the last run; its variables are gone"
            return {"error": gone, "state_lost": True}, [b""] * 3
        for path, data in zip(head["files"], contents, strict=True):
            try:
                files.write(WORK, path, data, self.plan.uid)
            except OSError as error:
                return {"error": f"{path} could not be written: {error.strerror}"}, [b""] * 3
        cpu, kills = self.group.cpu_s(), self.group.kills()
        try:
            child = self.interpreter if python and self.interpreter is not None else self._fork()
        except Full as error:
            return {"error": f"no process could be started: {error}"}, [b""] * 3
        except Broken:
            if self.group.kills() > kills:
                return {"status": "oom", "error": "what the session left in memory leaves no room for a process"}, [b""] * 3
            raise
        if python:
            self.interpreter = child
        job = {"once": once or not python, "limits": limits, "value_bytes": limits["value_bytes"]}
        job["shell"] = "" if python else SHELLS[head["language"]]
        run = Run(self, child, wire.pack(job, [code, stdin]), limits, began + head["timeout"], cpu, shell=not python)
        end = run.go()
        oom = self.group.kills() > kills
        killed = end not in ("report", "exit")
        had_state = self.interpreter is not None and (killed or (python and child.exited is not None))
        lost = (had_state or self.lost) and not once
        self.lost = end == "cancelled" and lost  # nobody reads this answer, so the next one tells it
        if once and end == "report":
            self._kill()  # none of it runs on; it is waited for when the lease ends
        elif once or killed:
            self._kill_all()
        elif python and child.exited is not None:
            child.close()
            self.interpreter = None
        if not python:
            child.close()  # it has ended
        answer = run.verdict(end, oom)
        answer |= {"state_lost": lost, "run_s": time.monotonic() - began, "peak_mb": self.group.peak_mb()}
        now = self.group.cpu_s()
        answer["cpu_s"] = None if cpu is None or now is None else max(0.0, now - cpu)
        out, answer["stdout_cut"] = run.out.result()
        err, answer["stderr_cut"] = run.err.result()
        fetched = self._fetch(head["fetch"])
        answer["files"] = list(fetched)
        answer["value"] = run.value is not None
        return answer, [out, err, run.value or b"", *fetched.values()]

    def _fetch(self, paths: list[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        room = wire.MAX_FRAME // 2
        for path in paths:
            with contextlib.suppress(OSError):
                found[path] = files.read(WORK, path, min(16 * 2**20, room))
                room -= len(found[path])
        return found


class Run:
    """One run of a child, watched."""

    def __init__(
        self, place: Place, child: Child, job: bytes, limits: dict[str, Any], until: float, cpu: float | None, *, shell: bool
    ) -> None:
        self.place, self.child, self.limits, self.until, self.cpu = place, child, limits, until, cpu
        self.shell, self.listening = shell, True
        self.job = memoryview(job)
        cap = limits["output_bytes"]
        self.out, self.err = Kept(child.out, cap), Kept(child.err, cap)
        self.report = bytearray()
        self.value: bytes | None = None
        self.outcome, self.left, self.length = driver.RAISED, 1, 0
        with contextlib.suppress(OSError):  # reports that nobody asked for
            for _ in range(64):  # somebody may go on and on
                if not child.channel.recv(1 << 16):
                    break

    def go(self) -> str:
        """Until it is over: `report` or `exit`, or what it is to be killed for: `timeout`, `cpu`, `memory`, `processes`,
        `output`, `cancelled`, or `garbled` for a report that is none. Raises `Gone`."""
        tick = time.monotonic() + TICK_S
        while True:
            over = self._step(min(self.until, tick))
            if over:
                return (self._excess() if over in ("report", "exit") else "") or over  # it may have been quicker than a tick
            now = time.monotonic()
            if now >= self.until:
                self._drain()
                return "timeout"
            if now >= tick:
                tick = now + TICK_S
                spent = self.place.group.cpu_s()
                if spent is not None and self.cpu is not None and spent - self.cpu > self.limits["cpu_s"]:
                    return "cpu"
                if excess := self._excess():
                    return excess

    def _excess(self) -> str:
        return self.place.group.excess(self.limits["memory_mb"], self.limits["processes"], HOME)

    def _step(self, until: float) -> str:
        channel = self.child.channel
        watched = {kept.fd: int(select.POLLIN) for kept in (self.out, self.err) if kept.open}
        if self.child.exited is None and self.listening:
            watched[channel.fileno()] = select.POLLIN | (select.POLLOUT if self.job else 0)
        if self.child.exited is not None:
            watched, until = {}, 0.0
        ready = self.place._listen(until - time.monotonic(), watched)
        for at, (request, _) in enumerate(self.place.requests):
            if request["op"] == "kill" and request["id"] == self.place.id:
                del self.place.requests[: at + 1]
                self._drain()
                return "cancelled"
        over = ""
        if self.listening and channel.fileno() in ready:
            over = self._talk(channel)
        if self.child.exited is not None:
            over = over or "exit"
        for kept in (self.out, self.err):
            if over or kept.fd in ready:
                while kept.read() and over:
                    pass
                if kept.over:
                    return "output"
        return over

    def _drain(self) -> None:
        for kept in (self.out, self.err):
            while kept.read():
                pass

    def _talk(self, channel: socket.socket) -> str:
        try:
            if self.job:
                self.job = self.job[channel.send(self.job, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            pass
        except OSError:
            self.job = memoryview(b"")
        try:
            data = channel.recv(1 << 18)
        except BlockingIOError:
            return ""
        except OSError:
            data = b""
        if not data:  # it is a shell now, or it is ending, or it has made itself deaf
            self.listening = False
            return "" if self.shell else self._ended()
        self.report += data
        if len(self.report) < driver.REPORT.size:
            return ""
        outcome, has, left, self.length, size = driver.REPORT.unpack_from(self.report)
        if outcome > driver.EXHAUSTED or has > 1 or size > driver.MAX_VALUE:
            return "garbled"
        if len(self.report) < driver.REPORT.size + size:
            return ""
        if outcome == driver.EXHAUSTED:
            self.outcome = driver.MEMORY
            return self._ended()
        self.outcome, self.left = outcome, left & 0xFF
        self.value = bytes(self.report[driver.REPORT.size :][:size]) if has else None
        return "report"

    def _ended(self) -> str:
        patience = time.monotonic() + 1.0
        while self.child.exited is None and time.monotonic() < min(patience, self.until):
            self.place._listen(TICK_S)
        return "exit" if self.child.exited is not None else "garbled"

    def verdict(self, end: str, oom: bool) -> dict[str, Any]:
        """Status, exit code and the sentence, the first that applies from the top."""
        limits = self.limits
        code = self.left if end == "report" else self.child.exited if end == "exit" else None
        value_cut = 0
        if self.value is not None:
            self.value = self.value[: limits["value_bytes"]]
            value_cut = max(0, self.length - len(self.value))
        if end == "timeout":
            status, error = "timeout", "its time ran out and it was killed"
        elif end == "cpu":
            status, error = "timeout", f"it used more than {limits['cpu_s']:g} s of CPU time and was killed"
        elif oom or end == "memory" or self.outcome == driver.MEMORY:
            status, error = "oom", f"it asked for more than {limits['memory_mb']} MiB of memory"
        elif end == "output":
            status, error = "output_limit", f"it wrote more than {limits['output_bytes']} bytes and was killed"
        elif end == "processes":
            status, error = "error", f"it started more than {limits['processes']} processes and was killed"
        elif end == "garbled":
            status, error = "error", "the code broke the interpreter's connection"
        elif end == "cancelled":
            status, error = "error", "it was cancelled"
        elif code:
            ended = f"it was ended by signal {-code}" if code < 0 else f"it exited with status {code}"
            raised = end == "report" and self.outcome == driver.RAISED
            status, error = "error", "it raised an exception" if raised else ended
        else:
            status, error = "ok", ""
        return {"status": status, "error": error, "exit_code": code, "value_cut": value_cut}


def warm_up(plan: Plan) -> None:
    """Serve a few runs in the zygote, of an interpreter that is not there: what Python writes into code that runs for the
    first times is then shared by all launchers."""
    wakeup, ignored = signal.set_wakeup_fd(-1), signal.getsignal(signal.SIGINT)
    (control, _c), (template, _t), (session, client), (channel, answers) = (socket.socketpair() for _ in range(4))
    out, err = os.pipe2(os.O_NONBLOCK), os.pipe2(os.O_NONBLOCK)
    place = Place(plan, Group(), control, template)
    place.session = session
    place.limits = {"value_bytes": 1, "output_bytes": 1, "memory_mb": 1, "processes": 1, "cpu_s": 1.0}
    place.interpreter = Child(1, out[0], err[0], channel)
    channel.setblocking(False)
    head = {"op": "run", "id": 1, "once": False, "language": "python", "files": [], "fetch": [], "timeout": 5.0}
    replies = wire.Unpacker()
    report = driver.REPORT.pack(driver.OK, 1, 0, 1, 1) + b"1"
    for _ in range(24):
        client.send(wire.pack(head, [b"1", b""]))
        _, blobs = place._request()
        run = Run(place, place.interpreter, wire.pack(head, blobs), place.limits, time.monotonic() + 5, None, shell=False)
        answers.send(report)
        os.write(out[1], b"x")
        place._send({**NO_RESULT, **run.verdict(run.go(), False)}, [run.out.result()[0], run.value or b""])
        list(replies.feed(client.recv(1 << 16)))
        answers.recv(1 << 16)
    for end in (control, _c, template, _t, session, client, channel, answers):
        end.close()
    for fd in (*out, *err, place.wake):
        os.close(fd)
    os.close(signal.set_wakeup_fd(wakeup))
    signal.signal(signal.SIGINT, ignored)


def main(plan: Plan, group: Group, control: socket.socket, template: socket.socket) -> None:
    """Serve leases from the pool until it has gone. Messages from it are JSON lines with a session's socket."""
    place = Place(plan, group, control, template)
    first = True
    while True:
        try:
            place.prepare()
        except (Broken, Full) as error:
            print(error, flush=True)
            os._exit(5)
        if first:
            group.settle()
            first = False
        control.sendall(b"ready\n")
        message, fds, _, _ = socket.recv_fds(control, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
        if not message or not fds:
            os._exit(0)
        place.lease(socket.socket(fileno=fds[0]), json.loads(message))
