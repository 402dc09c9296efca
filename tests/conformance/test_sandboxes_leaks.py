"""After thousands of runs, some of which crash, time out or leave daemons, nothing is left: no process, container, control
group, mount or open file."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentloop.sandboxes.base import Limits, Sandbox, Status
from tests.conformance.sandboxes import KINDS, available

PR_SET_CHILD_SUBREAPER = 36
CRASHES = (
    ("import os\nos._exit(3)", {Status.ERROR}),
    ("import os\nos.kill(os.getpid(), 9)", {Status.ERROR}),
    ("import ctypes\nctypes.string_at(0)", {Status.ERROR}),
    ("while True: pass", {Status.TIMEOUT}),
    ("import time\ntime.sleep(60)", {Status.TIMEOUT}),
    ("x = []\nwhile True: x.append(b'x' * (8 << 20))", {Status.OOM, Status.TIMEOUT}),
    ("while True: print('x' * 10000)", {Status.OUTPUT_LIMIT, Status.TIMEOUT}),
    (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
        "    os._exit(0)\nopen('left', 'w').close()",
        {Status.OK},
    ),
)
LIMITS = Limits(memory_mb=128)


def descendants() -> dict[int, str]:
    """Processes that come from this one, orphans among them, and what they are called. Takes the ends of orphans, as the
    machine's first process would."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = path.read_text().split(" (", 1)
            name, _, fields = rest.rpartition(") ")
            if fields[0] == "Z":
                if int(fields.split()[1]) == os.getpid():
                    os.waitpid(int(pid), os.WNOHANG)
            else:
                names[int(pid)] = name
                parents[int(pid)] = int(fields.split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found - {os.getpid()}}


def open_files(pid: int | str = "self") -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def dead_groups() -> set[str]:
    """Control groups of pools that live no more."""
    # `os.walk` passes over what vanishes meanwhile. A pool that has just started is in the second list.
    walk = os.walk("/sys/fs/cgroup")
    found = {os.path.join(folder, name) for folder, names, _ in walk for name in names if name.startswith("agentloop-sandbox-")}
    alive = set(re.findall(r"@agentloop-sandbox-(\d+)", Path("/proc/net/unix").read_text()))
    return {path for path in found if path.rpartition("-")[2] not in alive}


def mounts() -> set[str]:
    """Mount points of this name space, but those of containers."""
    points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return {point for point in points if not re.search(r"/(overlay2|overlayfs|containers|containerd)/", point)}


def containers(pid: int = os.getpid()) -> set[str]:
    """Containers that a process has started; `+` stands for an engine that has more roots mounted than containers."""
    import docker

    client = docker.from_env(timeout=30)
    try:
        folder = client.info()["DockerRootDir"]
        roots = [line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {folder}/overlay" in line]
        found = client.api.containers(all=True)
        ours = {entry["Id"] for entry in found if f"/{pid}/" in entry["Labels"].get("agentloop.owner", "")}
        return ours | ({"+"} if len(roots) > len(found) else set())
    finally:
        client.close()


@pytest.fixture
def subreaper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Orphans of this process's children become its own, so that none gets out of sight."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("AGENTLOOP_RUN_DIR", str(folder))
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    for pid in descendants():  # of a test that failed
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


async def many_runs(sandbox: Sandbox, count: int, callers: int) -> None:
    """5 % of them go wrong, two of three are single ones, the others share a session by tens; some are cancelled."""
    numbers = iter(range(count))

    async def caller() -> None:
        while (number := next(numbers, None)) is not None:
            code, expected = (f"{number} * 2", {Status.OK})
            if number % 20 == 7:
                code, expected = CRASHES[number // 20 % len(CRASHES)]
            if number % 3:
                result = await sandbox.run(code, timeout=1.0 if number % 20 == 7 else None, limits=LIMITS)
                assert result.status in expected, result
                continue
            async with sandbox.session(LIMITS) as session:
                result = await session.run(code, timeout=1.0 if number % 20 == 7 else None)
                assert result.status in expected, result
                for _ in range(0 if result.status is Status.OOM else 9):
                    if (number := next(numbers, None)) is None:
                        break
                    assert (await session.run(f"{number} * 2")).value == str(number * 2)
            if number is not None and number % 50 == 0:
                task = asyncio.create_task(sandbox.run("import time\ntime.sleep(60)", limits=LIMITS))
                await asyncio.sleep(0.05)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    await asyncio.gather(*(caller() for _ in range(callers)))


async def settled(read: Any, expected: Any, seconds: float = 15.0) -> Any:
    """What `read` gives once it is what is expected, or after a while."""
    for _ in range(int(seconds / 0.1)):
        if (found := read()) == expected:
            return found
        await asyncio.sleep(0.1)
    return read()


async def leaves_nothing(name: str, count: int, callers: int) -> None:
    kind = available(name)
    read_containers = containers if name == "docker" else set
    before = (descendants(), mounts(), read_containers(), dead_groups())
    async with kind.start():  # what the first use of a library opens and keeps is no leak
        pass
    files = open_files()
    async with kind.start() as sandbox:
        await many_runs(sandbox, max(40, count // 20), callers)
        await asyncio.sleep(1.0)
        servants = {pid: open_files(pid) for pid in descendants()}
        held = open_files()
        await many_runs(sandbox, count, callers)
        await asyncio.sleep(1.0)
        for pid in servants.keys() & descendants().keys():
            now = open_files(pid)
            assert now <= servants[pid] + 24, f"a servant went from {servants[pid]} to {now} open files"
        assert open_files() <= held + 8, "open files grow with the runs"
    assert await settled(descendants, before[0]) == before[0]
    assert await settled(mounts, before[1]) == before[1]
    assert await settled(read_containers, before[2]) == before[2]
    assert await settled(lambda: dead_groups() - before[3], set()) == set()
    assert await settled(lambda: open_files() <= files, True), f"{files} open files became {open_files()}"


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("subreaper")
async def test_a_few_hundred_runs_leave_nothing(name: str) -> None:
    await leaves_nothing(name, *((60, 4) if name == "docker" else (300, 4)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "count"), [("process", 10_000), ("bubblewrap", 2_000), ("docker", 1_000), ("remote", 1_000)])
@pytest.mark.usefixtures("subreaper")
async def test_thousands_of_runs_leave_nothing(name: str, count: int) -> None:
    await leaves_nothing(name, count, 4)


CLIENT = """
import asyncio, sys
from agentloop.sandboxes.load import load_sandbox

async def main():
    async with load_sandbox({"kind": sys.argv[1], "scope": "process"}) as sandbox, sandbox.session() as session:
        await session.run("x = 1")
        asyncio.create_task(sandbox.run("import time\\ntime.sleep(60)", timeout=9.0))
        asyncio.create_task(session.run("while True: pass", timeout=9.0))
        await asyncio.sleep(0.5)
        print("under way", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("name", ["process", "bubblewrap", "docker"])
@pytest.mark.usefixtures("subreaper")
async def test_a_client_that_is_killed_leaves_nothing(name: str) -> None:
    kind = available(name)
    before = (descendants(), mounts(), dead_groups())
    client = subprocess.Popen([sys.executable, "-c", CLIENT, name], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    assert client.stdout is not None
    try:
        assert client.stdout.readline() == "under way\n"
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
    async with kind.start() as sandbox:  # removes what a dead run has left
        assert (await sandbox.run("print(1)")).stdout == "1\n"
    assert await settled(descendants, before[0]) == before[0]
    assert await settled(mounts, before[1]) == before[1]
    assert await settled(lambda: dead_groups() - before[2], set()) == set()
    if name == "docker":
        assert await settled(lambda: containers(client.pid), set()) == set()
