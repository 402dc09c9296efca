"""The process that every place is forked from: its modules are loaded, its root is empty but for what code may read.

Freshly executed, it has one thread and nothing of whoever started it: no environment, no descriptors but the socket to the
pool. It makes a root of read-only binds, moves into it, imports what is to be preloaded, and then forks a launcher for every
place that the pool asks for: a JSON line with a `Plan`, and the place's control socket and control group files with it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from typing import Any

from . import driver, kernel, launcher
from .group import Group
from .template import HOME, Plan, Template

DEVICES = ("null", "zero", "full", "random", "urandom")
LINKS = {
    "/tmp": f"{HOME}/tmp",
    "/dev/shm": f"{HOME}/shm",
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}


def make_root(new: str, readable: list[list[str]], etc: dict[str, str]) -> None:
    """Mount a new root at `new`, in a namespace of our own, and move into it. `readable`: paths here and in there."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("sandbox", new, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=8m,mode=755")
    bound: list[str] = []
    for path, inside in readable:
        _bind_read_only(new, path, inside, bound)
    for name in ("/dev", "/proc", "/etc", HOME):
        os.makedirs(new + name, exist_ok=True)
    for name in DEVICES:
        with open(f"{new}/dev/{name}", "x"):
            pass
        kernel.mount(f"/dev/{name}", f"{new}/dev/{name}", None, kernel.MS_BIND)
    for path, target in LINKS.items():
        os.symlink(target, new + path)
    for name, text in etc.items():
        with open(f"{new}/etc/{name}", "w") as f:
            f.write(text)
    os.chdir(new)
    kernel.pivot_root(".", ".")
    kernel.umount(".", kernel.MNT_DETACH)
    os.chdir("/")
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV)


def _bind_read_only(new: str, path: str, inside: str, bound: list[str]) -> None:
    target = new + inside
    if os.path.islink(path) and os.path.dirname(path) == "/":  # /bin -> usr/bin
        os.symlink(os.readlink(path), target)
        return
    if not any(inside.startswith(f"{above}/") for above in bound):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            with open(target, "x"):
                pass
    kernel.mount(path, target, None, kernel.MS_BIND)
    flags = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("none", target, None, flags)
    bound.append(inside)


def preload(modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    driver.warm_up()
    launcher.warm_up(Plan(None, False, False, 1, 1, {}))
    gc.collect()
    gc.freeze()  # what is shared stays shared: no collection writes to it
    gc.disable()


def become_place(plan: Plan, group: Group, control: socket.socket, zygote: int, proc: int) -> None:
    """In the new child: the template of a place, with the launcher as its first child. Never returns.

    `zygote` is the parent's pidfd, `proc` the open /proc of our own PID namespace.
    """
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([zygote], [], [], 0)[0]:
        os._exit(0)
    threads = os.open(f"{os.getpid()}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc)
    at = 3
    for fd in sorted({control.fileno(), threads, *group.fds.values()}):
        os.closerange(at, fd)
        at = fd + 1
    os.closerange(at, 1 << 20)
    group.enter()
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWPID)
    kernel.sethostname(b"sandbox")
    for capability in range(64):
        with contextlib.suppress(OSError):
            kernel.prctl(kernel.PR_CAPBSET_DROP, capability)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    me = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid == 0:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([me], [], [], 0)[0]:
            os._exit(0)
        ours.close()
        mount_proc()
        launcher.main(plan, group, control, theirs)
    theirs.close()
    control.close()
    for fd in (me, *group.fds.values()):
        os.close(fd)
    Template(plan, ours, pid, threads).serve()


def mount_proc() -> None:
    """/proc of this PID namespace: of processes alone, and only one's own where the kernel can."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    try:
        kernel.mount("proc", "/proc", "proc", flags, "hidepid=2,subset=pid")
    except OSError:  # before Linux 5.8
        kernel.mount("proc", "/proc", "proc", flags, "hidepid=2")


class Zygote:
    def __init__(self, pool: socket.socket) -> None:
        self.pool = pool
        self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.threads = os.open("/proc/self/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.pidfd = os.pidfd_open(os.getpid())
        self.wake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def fork(self, request: dict[str, Any], fds: list[int]) -> int:
        """A new place; its PID as the pool sees it."""
        if len(os.listdir(self.threads)) != 1:
            raise RuntimeError("a preloaded module has started threads; take it out of `preload`")
        control = socket.socket(fileno=fds[0])
        group = Group(request["group"], dict(zip(request["files"], fds[1:], strict=True)))
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                become_place(Plan(**request["plan"]), group, control, self.pidfd, self.proc)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        control.close()
        for fd in fds[1:]:
            os.close(fd)
        return pid

    def serve(self) -> None:
        while True:
            poll = select.poll()
            poll.register(self.pool, select.POLLIN)
            poll.register(self.wake, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if self.wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wake, 4096)
                self._reap()
            if self.pool.fileno() in ready:
                message, fds, _, _ = socket.recv_fds(self.pool, 1 << 16, 16, socket.MSG_CMSG_CLOEXEC)
                if not message:
                    os._exit(0)
                request = json.loads(message)
                self._tell({"id": request["id"], "pid": self.fork(request, fds)})

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._tell({"ended": pid, "exit": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: dict[str, Any]) -> None:
        self.pool.sendall(json.dumps(message).encode() + b"\n")


def main(pool_fd: int) -> None:
    """Set up as the first message says, answer `ready`, serve until the pool has gone."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    pool = socket.socket(fileno=pool_fd)
    message = b""
    while not message.endswith(b"\n"):
        message += pool.recv(1 << 16) or os._exit(0)
    setup = json.loads(message)
    os.environ.update(setup["env"])
    folder = sys.path[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    zygote = Zygote(pool)
    try:
        if setup["root"]:  # otherwise this is a root already
            kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS)
            make_root(setup["root"], setup["readable"], setup["etc"])
        sys.path[:] = ["", *(path for path in sys.path if path != folder), *setup["sites"]]
        sys.argv = [""]
        sys.dont_write_bytecode = True
        preload(setup["preload"])
    except Exception as error:
        traceback.print_exc()
        zygote._tell({"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    zygote._tell({"ready": True})
    zygote.serve()
