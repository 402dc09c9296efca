"""One place: PID 1 of its own namespaces, which runs the code of one session or one run after another.

It is the trusted side. It holds the pipes, the clock and the control group; the interpreter it forks has another uid, has its
privileges and descriptors taken away, and can at most end itself. Everything that a lease started is gone before the place is
given to the next: `kill(-1)` from PID 1 reaches every process of the namespace, and the folder in memory is unmounted.

Requests on a session's socket are `wire` frames with `op`: run, put, get; `kill` at any time. The socket's end ends the lease.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any

from . import driver, files, kernel, wire
from .group import Group

HOME = "/home/sandbox"
"""Where the folder in memory is mounted; `/tmp` and `/dev/shm` are links into it."""
WORK = f"{HOME}/work"
FENCED = b"+"
"""What a child says once it has given everything up, before any code."""
FENCE_S = 20.0
INODES = 8
"""Of the folder's own: itself, `work`, `tmp`, `shm`."""
TICK_S = 0.05
NO_RESULT: dict[str, Any] = {
    **{"status": "error", "error": "", "exit_code": None, "value": False, "files": [], "state_lost": False},
    **{"stdout_cut": 0, "stderr_cut": 0, "value_cut": 0, "run_s": 0.0, "cpu_s": None, "peak_mb": None},
}
SHELLS = {"sh": "/bin/sh", "bash": "/bin/bash"}


@dataclass
class Plan:
    """How a place is held; from the pool, as JSON."""

    uid: int | None
    """Who the code is; `None`: whoever the launcher is, as there is no other in an unprivileged user namespace."""
    landlock: bool
    seccomp: bool
    disk_mb: int
    """The size and inodes that the folder has before a lease says otherwise."""
    files: int
    env: dict[str, str]


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
    """A process that runs code, and the launcher's ends of its pipes."""

    pid: int
    out: int
    err: int
    channel: socket.socket | None
    exited: int | None = None
    """Its exit code, once it was reaped; negative: the signal."""

    def close(self) -> None:
        os.close(self.out)
        os.close(self.err)
        if self.channel is not None:
            self.channel.close()


class Broken(Exception):
    """A child could not be fenced in: it has run no code."""


class Gone(Exception):
    """The client has closed the session, or has died."""


class Place:
    """What one launcher does."""

    def __init__(self, plan: Plan, group: Group, control: socket.socket | None) -> None:
        self.plan, self.group, self.control = plan, group, control
        self.interpreter: Child | None = None
        self.children: dict[int, Child] = {}
        self.id = 0
        self.session: socket.socket | None = None
        self.unpacker = wire.Unpacker()
        self.requests: list[tuple[dict[str, Any], list[bytes]]] = []
        self.limits: dict[str, Any] = {}
        self.program = kernel.seccomp_program() if plan.seccomp else b""
        self.ruleset = kernel.landlock_ruleset(os.path.dirname(HOME)) if plan.landlock else -1
        self.wake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # PID 1 is out of its children's reach but for what it handles
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    # --- the pool's side ---

    def prepare(self) -> None:
        """A fresh folder, fresh shared memory and an interpreter that waits for code."""
        kernel.unshare(kernel.CLONE_NEWIPC)
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
        if self.control is not None:
            poll.register(self.control, 0)  # only its end
        for fd, events in (extra or {}).items():
            poll.register(fd, events)
        ready = {fd for fd, _ in poll.poll(None if wait_s is None else max(0, int(wait_s * 1000) + 1))}
        if self.control is not None and self.control.fileno() in ready:
            os._exit(0)
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

    def _fork(self, command: list[str] | None = None, limits: dict[str, Any] | None = None, stdin: bytes = b"") -> Child:
        """An interpreter, or `command`. This process has one thread, or it would fork what another one holds locked."""
        if len(os.listdir("/proc/self/task")) != 1:
            print("a preloaded module has started threads; take it out of `preload`", flush=True)
            os._exit(4)
        out, out_end = os.pipe2(os.O_CLOEXEC)
        err, err_end = os.pipe2(os.O_CLOEXEC)
        channel, channel_end = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                self._become(out_end, err_end, channel_end)
                if command is None:
                    os.write(driver.CHANNEL_FD, FENCED)
                    driver.serve(driver.CHANNEL_FD)
                assert command is not None and limits is not None
                driver.set_limits(limits, whole=True)
                driver.set_stdin(stdin)
                os.write(driver.CHANNEL_FD, FENCED)
                os.execve(command[0], command, dict(os.environ))
            except BaseException as error:
                with contextlib.suppress(BaseException):
                    os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                os._exit(127)
        os.close(out_end)
        os.close(err_end)
        os.set_blocking(out, False)
        os.set_blocking(err, False)
        channel_end.close()
        channel.settimeout(FENCE_S)
        child = self.children[pid] = Child(pid, out, err, channel)
        try:
            fenced = channel.recv(1)
        except TimeoutError:
            fenced = b""
        if fenced != FENCED:
            why = Kept(err, 1000)
            why.read()
            raise Broken(f"a process could not be fenced in: {why.data.decode(errors='replace').strip() or 'it ended'}")
        channel.setblocking(False)
        if command is not None:
            channel.close()
            child.channel = None
        return child

    def _become(self, out: int, err: int, channel: socket.socket) -> None:
        """Give everything up, for good: in the new child, before it sees any code."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
            f.write("1000")
        if self.plan.uid is not None:
            os.setgroups([])
            os.setresgid(self.plan.uid, self.plan.uid, self.plan.uid)
            os.setresuid(self.plan.uid, self.plan.uid, self.plan.uid)
        else:
            kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # its own /proc is root's otherwise
            kernel.own_user_namespace()
        kernel.drop_capabilities()
        os.chdir(WORK)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        if self.ruleset >= 0:
            kernel.landlock_restrict(self.ruleset)
        if self.program:
            kernel.seccomp_restrict(self.program)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or it could not open its own /dev/stdin
        os.environ.clear()
        os.environ.update(self.plan.env)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.dup2(channel.fileno(), driver.CHANNEL_FD, inheritable=False)
        os.closerange(3, driver.CHANNEL_FD)
        os.closerange(driver.CHANNEL_FD + 1, 1 << 20)

    def _reap(self, block: bool = False) -> None:
        """Take the ends of children, and of orphans, which are PID 1's."""
        while True:
            try:
                pid, status = os.waitpid(-1, 0 if block else os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self.children.pop(pid, None)
            if child is not None:
                child.exited = os.waitstatus_to_exitcode(status)

    def _kill_all(self) -> None:
        """End every process of the place. A fork cannot slip through: the kernel refuses one to a process that is killed."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
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
        if python:
            child = self.interpreter = self.interpreter or self._fork()
            job = wire.pack({"once": once, "limits": limits, "value_bytes": limits["value_bytes"]}, [code, stdin])
        else:
            child = self._fork([SHELLS[head["language"]], "-c", code.decode("utf-8", "replace")], limits, stdin)
            job = b""
        run = Run(self, child, job, limits, began + head["timeout"], cpu)
        end = run.go()
        oom = self.group.kills() > kills
        killed = end not in ("report", "exit")
        had_state = self.interpreter is not None and (killed or (python and child.exited is not None))
        lost = had_state and not once
        if once or killed:
            self._kill_all()
        elif python and child.exited is not None:
            child.close()
            self.interpreter = None
        if not python:
            child.close()
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

    def __init__(self, place: Place, child: Child, job: bytes, limits: dict[str, Any], until: float, cpu: float | None) -> None:
        self.place, self.child, self.limits, self.until, self.cpu = place, child, limits, until, cpu
        self.job = memoryview(job)
        cap = limits["output_bytes"]
        self.out, self.err = Kept(child.out, cap), Kept(child.err, cap)
        self.report = bytearray()
        self.value: bytes | None = None
        self.outcome, self.left, self.length = driver.RAISED, 1, 0
        if child.channel is not None:  # a report that nobody asked for
            with contextlib.suppress(OSError):
                while child.channel.recv(1 << 16):
                    pass

    def go(self) -> str:
        """Until it is over: `report` or `exit`, or what it is to be killed for: `timeout`, `cpu`, `memory`, `processes`,
        `output`, `cancelled`, or `garbled` for a report that is none. Raises `Gone`."""
        tick = time.monotonic() + TICK_S
        while True:
            over = self._step(min(self.until, tick))
            if over:
                return over
            now = time.monotonic()
            if now >= self.until:
                self._drain()
                return "timeout"
            if now >= tick:
                tick = now + TICK_S
                spent = self.place.group.cpu_s()
                if spent is not None and self.cpu is not None and spent - self.cpu > self.limits["cpu_s"]:
                    return "cpu"
                excess = self.place.group.excess(self.limits["memory_mb"], self.limits["processes"], HOME)
                if excess:
                    return excess

    def _step(self, until: float) -> str:
        channel = self.child.channel
        watched = {kept.fd: int(select.POLLIN) for kept in (self.out, self.err) if kept.open}
        if channel is not None and self.child.exited is None:
            watched[channel.fileno()] = select.POLLIN | (select.POLLOUT if self.job else 0)
        elif self.child.exited is not None:
            watched, until = {}, 0.0
        ready = self.place._listen(until - time.monotonic(), watched)
        for at, (request, _) in enumerate(self.place.requests):
            if request["op"] == "kill" and request["id"] == self.place.id:
                del self.place.requests[: at + 1]
                self._drain()
                return "cancelled"
        over = ""
        if channel is not None and channel.fileno() in ready:
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
        if not data:  # it closed the channel: it is ending, or has made itself deaf
            return self._ended()
        self.report += data
        if len(self.report) < driver.REPORT.size:
            return ""
        outcome, has, left, self.length, size = driver.REPORT.unpack_from(self.report)
        if outcome > driver.LEFT or has > 1 or size > driver.MAX_VALUE:
            return "garbled"
        if len(self.report) < driver.REPORT.size + size:
            return ""
        self.outcome, self.left = outcome, left & 0xFF
        self.value = bytes(self.report[driver.REPORT.size :][:size]) if has else None
        return "report"

    def _ended(self) -> str:
        patience = time.monotonic() + 1.0
        while self.child.exited is None and time.monotonic() < min(patience, self.until):
            self.place._listen(TICK_S)
            self.place._reap()
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


def main(plan: Plan, group: Group, control: socket.socket) -> None:
    """Serve leases from the pool until it has gone. Messages from it are JSON lines with a session's socket."""
    group.enter()
    place = Place(plan, group, control)
    first = True
    while True:
        try:
            place.prepare()
        except Broken as error:
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
