"""The processes behind `agentloop.sandboxes.killable`: a template, and the workers that are forked from it.

The template is executed, imports the function, calls it once to warm up, and then forks a worker for every socket that it is
handed over its control socket (SOCK_SEQPACKET, SCM_RIGHTS); it answers with the worker's pid and pidfd. It stays
single-threaded. A worker reads frames (big-endian u32 length, JSON payload) and answers frames of `{"status": "ok", "value"}`,
`{"status": "oom"}` or `{"status": "error", "error"}`.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Be killed when `parent` ends, which must be the parent process (and its calling thread live on)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def template() -> None:
    plan = json.loads(sys.stdin.buffer.read())
    die_with(plan["parent"])
    control = socket.socket(fileno=plan["fd"])
    control.setblocking(True)
    try:
        sys.path[:0] = plan["paths"]
        module, _, name = plan["target"].partition(":")
        function = getattr(importlib.import_module(module), name)
        if plan["warm_up"] is not None:
            function(plan["warm_up"])
        if threading.active_count() != 1:
            raise RuntimeError(f"importing {module} started threads, and a process with threads cannot be forked safely")
    except BaseException as error:
        control.send(f"{type(error).__name__}: {error}".encode()[:4096])
        return
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        ready = poll.poll(1000)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if ready and not _serve(control, function, plan):
            return


def _serve(control: socket.socket, function: Callable[[Any], Any], plan: dict[str, Any]) -> bool:
    """Fork one worker. False if the service is gone."""
    data, rights, _, _ = control.recvmsg(16, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    if not data:
        return False
    fds = array.array("i")
    fds.frombytes(rights[0][2])
    sock = socket.socket(fileno=fds[0])
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            die_with(parent)
            control.close()
            work(sock, function, plan["memory_mb"])
        finally:
            os._exit(0)
    sock.close()
    pidfd = os.pidfd_open(pid)
    control.sendmsg([struct.pack("!i", pid)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pidfd]))])
    os.close(pidfd)
    return True


def work(sock: socket.socket, function: Callable[[Any], Any], memory_mb: int) -> None:
    """Answer until the service closes the socket."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    limit = used + memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stream = sock.makefile("rwb")
    while True:
        head = stream.read(4)
        if len(head) < 4:
            return
        payload = stream.read(struct.unpack("!I", head)[0])
        try:
            reply = json.dumps({"status": "ok", "value": function(json.loads(payload))}).encode()
        except MemoryError:
            reply = b'{"status": "oom"}'
        except BaseException as error:
            reply = json.dumps({"status": "error", "error": f"{type(error).__name__}: {error}"[:2000]}).encode()
        stream.write(struct.pack("!I", len(reply)) + reply)
        stream.flush()


if __name__ == "__main__":
    importlib.import_module("agentloop.sandboxes.killable_worker").template()
