"""The one that forks: every process of a place that runs code is a copy of this one.

It never sees what a lease brings, neither code nor files nor output, so that no copy can find another's in its memory. It
stands outside the PID namespace of its place; its first child is the launcher, PID 1 in there, which alone talks to clients
and asks for the others.

Messages, one packet each: `f` from the launcher; back `MESSAGE` with kind `F` (a number, and the ends of stdout, stderr and the
channel as descriptors), `E` (an errno: none could be forked) or `X` (a number has ended: its exit code, CPU microseconds).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
from dataclasses import dataclass

from . import driver, kernel

HOME = "/home/sandbox"
"""Where the folder in memory is mounted; `/tmp` and `/dev/shm` are links into it."""
WORK = f"{HOME}/work"
MESSAGE = struct.Struct("!ciiq")
FENCED = b"+"
"""What a child says on its channel once it has given everything up, before any code."""


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


class Template:
    def __init__(self, plan: Plan, launcher: socket.socket, pid: int, threads: int) -> None:
        """`pid`: the launcher's. `threads`: this process's folder of threads, open."""
        self.plan, self.launcher, self.pid, self.threads = plan, launcher, pid, threads
        self.numbers: dict[int, int] = {}
        self.last = 0
        self.program = kernel.seccomp_program() if plan.seccomp else b""
        self.ruleset = kernel.landlock_ruleset(os.path.dirname(HOME)) if plan.landlock else -1
        self.wake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def serve(self) -> None:
        """Until the launcher has gone."""
        poll = select.poll()
        poll.register(self.launcher, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self.wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wake, 4096)
                self._reap()
            if self.launcher.fileno() in ready:
                if not self.launcher.recv(1):
                    return
                self._fork()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, used = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self.pid:
                    os._exit(0)  # and with it everything in its namespace
                number = self.numbers.pop(pid, None)
                if number is None:
                    continue
                micros = int((used.ru_utime + used.ru_stime) * 1e6)
                self.launcher.send(MESSAGE.pack(b"X", number, os.waitstatus_to_exitcode(status), micros))

    def _fork(self) -> None:
        """This process has one thread, or it would fork what another one holds locked."""
        if len(os.listdir(self.threads)) != 1:
            print("a preloaded module has started threads; take it out of `preload`", flush=True)
            os._exit(4)
        out, out_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        err, err_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        channel, channel_end = socket.socketpair()
        try:
            pid = os.fork()
        except OSError as error:
            self.launcher.send(MESSAGE.pack(b"E", error.errno or 0, 0, 0))
        else:
            if pid == 0:
                self._become(out_end, err_end, channel_end)
            self.last += 1
            self.numbers[pid] = self.last
            socket.send_fds(self.launcher, [MESSAGE.pack(b"F", self.last, 0, 0)], [out, err, channel.fileno()])
        for fd in (out, out_end, err, err_end):
            os.close(fd)
        channel.close()
        channel_end.close()

    def _become(self, out: int, err: int, channel: socket.socket) -> None:
        """In the new child: give everything up, for good, then wait for code. Never returns."""
        try:
            for fd in (out, err):
                os.set_blocking(fd, True)
            self._fence()
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.dup2(channel.fileno(), driver.CHANNEL_FD, inheritable=False)
            os.closerange(3, driver.CHANNEL_FD)
            os.closerange(driver.CHANNEL_FD + 1, 1 << 20)
            os.write(driver.CHANNEL_FD, FENCED)
            driver.serve(driver.CHANNEL_FD)
        except BaseException as error:
            with contextlib.suppress(BaseException):
                os.write(err, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(127)

    def _fence(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        kernel.unshare(kernel.CLONE_NEWIPC)
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
