"""bubblewrap makes the zygote's namespaces where we are not root: its command line, and what a probe finds."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping

from agentloop.sandboxes.base import Layer
from agentloop.sandboxes.process import cgroups
from agentloop.sandboxes.process.jail.template import HOME
from agentloop.sandboxes.process.jail.zygote import DEVICES, LINKS
from agentloop.sandboxes.process.layers import FOLDER, STOPS, boot

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
"""What code may read of the host, beside Python and its packages."""
UID = 1000
"""Who code is inside; outside it is whoever started the pool."""
JAIL = "/.agentloop"
OWN = ("/tmp", "/dev", "/proc", HOME, JAIL)
"""Code has these to itself; nothing of the host can be there."""
NAMESPACES = ("user namespace", "mount namespace", "network namespace", "pid namespace", "ipc namespace")
BWRAP_STOPS = {"user namespace": "having any privilege outside", **{k: v for k, v in STOPS.items() if k != "own uid"}}
BWRAP_REQUIRED = (*NAMESPACES, "rlimits", "seccomp")
"""Without a group that may be written, memory and processes are counted 20 times a second instead of held by the kernel."""


def command(readable: list[tuple[str, str]], etc: dict[str, int], argument: list[str]) -> list[str]:
    """A command line that runs `argument` (of `inside`) as PID 1 of its own namespaces, in a root of read-only binds
    (`readable`: paths here and in there). `etc` are open files with the text of what is in /etc.

    It keeps CAP_SYS_ADMIN in its user namespace, for the namespaces and mounts of every place; what is forked to run code
    gives that up, enters a user namespace below, and is kept from making others by seccomp. That is why `--disable-userns`
    is not among the options: it would take the mounts away from the zygote as well.
    """
    words = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--uid", str(UID), "--gid", str(UID)]
    words += [
        "--as-pid-1",
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "CAP_SYS_ADMIN",
        "--clearenv",
    ]
    for path, target in readable:
        if os.path.islink(path) and os.path.dirname(path) == "/":
            words += ["--symlink", os.readlink(path), target]
        else:
            words += ["--ro-bind", path, target]
    words += ["--ro-bind", f"{FOLDER}/jail", f"{JAIL}/jail", "--dir", "/dev", "--dir", HOME, "--dir", "/etc"]
    for name, fd in etc.items():
        words += ["--ro-bind-data", str(fd), f"/etc/{name}"]
    for name in DEVICES:
        words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for path, target in LINKS.items():
        words += ["--symlink", target, path]
    return [*words, "--proc", "/proc", "--remount-ro", "/", "--", *argument]


def inside(module: str) -> list[str]:
    """As `boot`, from where the jail's folder is in there."""
    return [word.replace(FOLDER, JAIL) for word in boot(module)]


def existing(paths: Iterable[str], moved: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Those that there are, each once, outer ones first, with where they are in there: the same place, but for those in
    `moved`."""
    found = sorted({path for path in paths if os.path.exists(path)}, key=lambda path: (path.count("/"), path))
    return [(path, (moved or {}).get(path, path)) for path in found]


def taken(path: str) -> bool:
    """Whether code has something of its own at this place, so that the host's cannot be there."""
    return any(path == own or path.startswith(f"{own}/") for own in OWN)


async def probe() -> list[Layer]:
    """Every layer as this machine has it, tried in bubblewrap."""
    line = command(existing((*SYSTEM, sys.base_prefix)), {}, inside("probe"))
    reasons: dict[str, str] = {}
    try:
        process = await asyncio.create_subprocess_exec(
            *line, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        reason = err.decode(errors="replace").strip().splitlines()[-1:] if process.returncode else []
    except FileNotFoundError:
        out, reason = b"{}", ["bubblewrap (bwrap) is not installed: apt-get install bubblewrap"]
    if reason:
        reasons = {name: reason[0] for name in BWRAP_STOPS if not name.startswith("cgroup")}
    else:
        found = json.loads(out)
        reasons = {name: found.get(name, "") for name in BWRAP_STOPS if not name.startswith("cgroup")}
    details = dict.fromkeys(BWRAP_STOPS, "")
    tree = cgroups.find()
    for controller in ("memory", "pids", "cpu"):
        held = "counted 20 times a second instead" if controller != "cpu" else "not limited"
        missing = tree.missing.get(controller, "" if controller in tree.roots else "no such controller here")
        reasons[f"cgroup {controller}"] = missing and f"{missing}; {held}"
        details[f"cgroup {controller}"] = f"version {tree.version}"
    return [Layer(name, not reasons[name], stops, reasons[name] or details[name]) for name, stops in BWRAP_STOPS.items()]
