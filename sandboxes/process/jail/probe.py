"""Which fences this machine has: tried, each in a process of its own that ends at once. Prints JSON, name to reason; an empty
reason means that it works."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from . import kernel

UID = 0x7FFF0000


def _mounts() -> None:
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("none", "/dev", "tmpfs", kernel.MS_NOSUID, "size=1m,nr_inodes=16")


def _pids() -> None:
    kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS)
    pid = os.fork()
    if pid == 0:
        try:
            kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
            kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID, "hidepid=2")
            os._exit(0 if os.getpid() == 1 else 1)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise OSError(1, "a /proc of its own cannot be mounted")


def _uid() -> None:
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)


def _landlock() -> None:
    if not kernel.landlock_abi():
        raise OSError(95, "this kernel has no landlock (Linux 5.13)")
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.landlock_restrict(kernel.landlock_ruleset("/dev"))


def _seccomp() -> None:
    if not kernel.seccomp_known():
        raise OSError(95, "this kernel or processor has no filter for system calls here")
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.seccomp_restrict(kernel.seccomp_program())
    try:
        kernel.unshare(kernel.CLONE_NEWUTS)
    except PermissionError:
        return
    raise OSError(1, "the filter does not hold")


TRIALS: dict[str, Callable[[], None]] = {
    "mount namespace": _mounts,
    "network namespace": lambda: kernel.unshare(kernel.CLONE_NEWNET),
    "pid namespace": _pids,
    "ipc namespace": lambda: kernel.unshare(kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS),
    "own uid": _uid,
    "landlock": _landlock,
    "seccomp": _seccomp,
}


def tried(trial: Callable[[], None]) -> str:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            trial()
            os._exit(0)
        except BaseException as error:
            os.write(write, str(getattr(error, "strerror", None) or error or type(error).__name__).encode())
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as f:
        reason = f.read().decode()
    status = os.waitpid(pid, 0)[1]
    return reason or ("" if status == 0 else "it could not be tried")


def main() -> None:
    print(json.dumps({name: tried(trial) for name, trial in TRIALS.items()}))
