"""The `process` kind's lines of defence: what they stop, which this machine has, and which may be missing."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from agentloop.sandboxes.base import Layer, SandboxError
from agentloop.sandboxes.process import cgroups

FOLDER = str(Path(__file__).resolve().parent)
STOPS = {
    "mount namespace": "reading and writing the host's files; filling its disk",
    "network namespace": "reaching the network, the host's loopback and its abstract unix sockets",
    "pid namespace": "seeing and signalling other processes; daemons that outlive their session",
    "ipc namespace": "shared memory and message queues of others",
    "own uid": "tracing and signalling the launcher; sharing limits with another sandbox",
    "rlimits": "memory and CPU time of one process, open files, core dumps",
    "seccomp": "nested namespaces, ptrace, keys, io_uring, bpf and other parts of the kernel that code does not need",
    "landlock": "writing outside the working folder, once more, whatever is mounted",
    "cgroup memory": "memory over all processes together",
    "cgroup pids": "fork bombs",
    "cgroup cpu": "taking more processors than `cpus`",
}
REQUIRED = tuple(name for name in STOPS if name not in ("landlock", "cgroup cpu"))
"""Without one of these an attack would succeed; the other two are a second fence and a matter of fairness."""


NEEDS = {
    "process": ("root, and control groups that it may write", "'bubblewrap' or 'docker'"),
    "bubblewrap": ("the program bwrap, and unprivileged user namespaces", "'docker' or 'remote'"),
}
"""By kind: what it needs, and what to take instead."""


def boot(module: str) -> list[str]:
    """A command that runs `jail.<module>`'s `main` in the interpreter below any virtual environment, on nothing of ours
    but the jail's own folder. Its arguments are integers."""
    code = f"import sys; sys.path.insert(0, {FOLDER!r}); import jail.{module} as m; m.main(*map(int, sys.argv[1:]))"
    return [base_python(), "-I", "-S", "-c", code]


def base_python() -> str:
    return str(Path(getattr(sys, "_base_executable", None) or sys.executable).resolve())


async def probe() -> list[Layer]:
    """Every layer as this machine has it. Tries each one in a process that ends at once."""
    process = await asyncio.create_subprocess_exec(
        *boot("probe"), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={}
    )
    out, err = await process.communicate()
    if process.returncode:
        raise SandboxError(f"the probe of this machine's sandbox layers failed: {err.decode(errors='replace').strip()[-300:]}")
    reasons: dict[str, str] = {**json.loads(out), "rlimits": ""}
    details = dict.fromkeys(reasons, "")
    tree = cgroups.find()
    for controller in ("memory", "pids", "cpu"):
        reasons[f"cgroup {controller}"] = tree.missing.get(
            controller, "" if controller in tree.roots else "no such controller here"
        )
        details[f"cgroup {controller}"] = f"version {tree.version}"
    return [Layer(name, not reasons[name], stops, reasons[name] or details[name]) for name, stops in STOPS.items()]


def check(layers: list[Layer], required: list[str], kind: str) -> None:
    """`SandboxError` unless all that are required are active."""
    missing = [layer for layer in layers if layer.name in required and not layer.active]
    if missing:
        named = "; ".join(f"{layer.name} ({layer.detail})" for layer in missing)
        needs, other = NEEDS[kind]
        raise SandboxError(
            f"the sandbox kind '{kind}' cannot start: missing is {named}. It needs {needs}; "
            f"take the kind {other}, or leave out of `require` what you can do without"
        )
