"""Control groups: where a place's limits over all its processes are held, version 1 or 2.

Groups are made below the one that this process is in, so that the limits of a job or container hold for its sandboxes too.
All of them are in `agentloop-sandbox-<number>/<place>`; the number is a lock that the pool holds while it lives, so that
whoever starts next knows a folder whose number is free to be a dead pool's and removes it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

V1 = {
    "memory": {
        "memory": "memory.limit_in_bytes",
        "swap": "memory.memsw.limit_in_bytes",
        "peak": "memory.max_usage_in_bytes",
        "usage": "memory.usage_in_bytes",
        "events": "memory.oom_control",
    },
    "pids": {"pids": "pids.max"},
    "cpuacct": {"cpu": "cpuacct.usage"},
    "cpu": {},
}
V2 = {
    "memory": "memory.max",
    "swap": "memory.swap.max",
    "peak": "memory.peak",
    "usage": "memory.current",
    "events": "memory.events",
    "pids": "pids.max",
    "cpu": "cpu.stat",
}
PERIOD_US = 20_000
PREFIX = "agentloop-sandbox-"


@dataclass
class Tree:
    """The folders that groups can be made in, by controller; version 0 if there are none."""

    version: int
    roots: dict[str, Path]
    missing: dict[str, str] = field(default_factory=dict)
    """Controllers without one, and why."""

    def folders(self, name: str) -> dict[str, Path]:
        return {controller: root / name for controller, root in self.roots.items()}


def find(proc: Path = Path("/proc/self")) -> Tree:
    """Where this process may make groups, tried by making one."""
    mounts = _mounts(proc)
    own = {}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    roots, missing = {}, {}
    for controller in V1:
        if controller not in mounts or controller not in own:
            continue
        point, root = mounts[controller]
        folder = _below(point, root, own[controller])
        reason = _try(folder)
        if reason:
            missing[controller] = reason
        else:
            roots[controller] = folder
    if roots or missing:
        return Tree(1 if roots else 0, roots, missing)
    if "" in mounts and "" in own:
        return _find_v2(_below(*mounts[""], own[""]), mounts[""][0])
    return Tree(0, {}, dict.fromkeys(("memory", "pids", "cpu"), "no control groups are mounted"))


def _find_v2(folder: Path, top: Path) -> Tree:
    """The nearest group, from ours upwards, that hands memory and pids to its children."""
    wanted = ("memory", "pids", "cpu")
    reason = "no group above this process hands its controllers on (cgroup.subtree_control)"
    while True:
        with contextlib.suppress(OSError):
            available = (folder / "cgroup.controllers").read_text().split()
            for controller in wanted:
                if controller in available:
                    with contextlib.suppress(OSError):  # refused where the group has processes of its own
                        (folder / "cgroup.subtree_control").write_text(f"+{controller}")
            active = (folder / "cgroup.subtree_control").read_text().split()
            found = [controller for controller in wanted if controller in active]
            if "memory" in found and "pids" in found:
                refused = _try(folder)
                if not refused:
                    return Tree(2, dict.fromkeys(found, folder), {c: reason for c in wanted if c not in found})
                reason = refused
        if folder == top or folder == folder.parent:
            return Tree(0, {}, dict.fromkeys(wanted, reason))
        folder = folder.parent


def _mounts(proc: Path) -> dict[str, tuple[Path, str]]:
    """Mount point and root in the hierarchy, by v1 controller; "" for v2."""
    found: dict[str, tuple[Path, str]] = {}
    for line in (proc / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        words = before.split()
        place = (Path(words[4]), words[3])
        if kind == "cgroup2":
            found[""] = place
        elif kind == "cgroup":
            found.update({name: place for name in options.split(",") if name in V1})
    return found


def _below(point: Path, root: str, path: str) -> Path:
    inside = path[len(root) :] if root != "/" and path.startswith(root) else path
    folder = point / inside.lstrip("/")
    return folder if folder.is_dir() else point


def _try(folder: Path) -> str:
    """Why no group can be made in `folder`; empty if one can."""
    trial = folder / f"agentloop-probe-{os.getpid()}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


class Groups:
    """All groups of one pool."""

    def __init__(self, tree: Tree, number: int, cpus: float | None) -> None:
        self.tree, self.cpus = tree, cpus
        self.name = f"{PREFIX}{number}"
        self.remove()
        for folder in set(tree.folders(self.name).values()):
            folder.mkdir()
        if tree.version == 2:
            for controller, folder in tree.folders(self.name).items():
                (folder / "cgroup.subtree_control").write_text(f"+{controller}")

    def make(self, place: str) -> dict[str, int]:
        """A group; its files, open, by the names that `jail.group` knows."""
        fds = {}
        for at, top in enumerate(sorted(set(self.tree.folders(self.name).values()))):
            (top / place).mkdir(exist_ok=True)
            fds[f"procs{at}"] = os.open(top / place / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        for controller, top in self.tree.folders(self.name).items():
            folder = top / place
            if self.tree.version == 1:
                names = V1[controller]
            else:
                names = {name: file for name, file in V2.items() if file.startswith(f"{controller}.")}
            for name, file in names.items():
                with contextlib.suppress(OSError):  # the peak cannot be reset everywhere, swap may not be accounted
                    fds[name] = os.open(
                        folder / file, (os.O_RDONLY if name in ("usage", "events", "cpu") else os.O_RDWR) | os.O_CLOEXEC
                    )
                if name == "peak" and name not in fds:
                    with contextlib.suppress(OSError):
                        fds[name] = os.open(folder / file, os.O_RDONLY | os.O_CLOEXEC)
            if controller == "cpu" and self.cpus is not None:
                quota = int(self.cpus * PERIOD_US)
                if self.tree.version == 2:
                    (folder / "cpu.max").write_text(f"{quota} {PERIOD_US}")
                else:
                    (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                    (folder / "cpu.cfs_quota_us").write_text(str(quota))
        return fds

    def remove(self, place: str | None = None) -> None:
        """Remove one group, or all. Their processes are dead or dying, and the kernel may take a moment to notice."""
        until = time.monotonic() + (1.0 if place is not None else 10.0)
        for top in set(self.tree.folders(self.name).values()):
            for folder in [top / place] if place is not None else [*_children(top), top]:
                _rmdir(folder, until)


def sweep(tree: Tree, take: Callable[[int], AbstractContextManager[object] | None]) -> None:
    """Remove what pools left that were killed, wherever below the root of a hierarchy their group was: those whose number
    `take` can hold meanwhile."""
    for point in {_top(root) for root in tree.roots.values()}:
        for folder in _pools(point):
            number = folder.name.removeprefix(PREFIX)
            held = take(int(number)) if number.isdigit() else None
            if held is not None:
                with held:
                    for path in (*_children(folder), folder):
                        _rmdir(path, 0.0)


def _pools(point: Path) -> list[Path]:
    """The pools' folders. Others make and remove groups meanwhile, which `os.walk` passes over and `Path.rglob` fails at."""
    found = []
    for folder, names, _ in os.walk(point):
        ours = [name for name in names if name.startswith(PREFIX)]
        found += [Path(folder, name) for name in ours]
        names[:] = [name for name in names if name not in ours]
    return found


def _top(folder: Path) -> Path:
    """The mount point that `folder` is in."""
    while not folder.is_mount() and folder != folder.parent:
        folder = folder.parent
    return folder


def _children(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in folder.iterdir() if path.is_dir()]
    return []


def _rmdir(folder: Path, until: float) -> None:
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > until:
                return
            time.sleep(0.005)
        else:
            return
