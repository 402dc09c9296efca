"""Sandboxes: runs without a session, calls of a REPL, and the memory of 256 sessions, beside what else one might use.

Everything runs the same code in the same minutes, in turns, so that a noisy machine slows all of them: compare within one
result. Stateless: `import numpy, sympy` and a print, in a place of its own that is gone afterwards; the `process` kind has both
modules preloaded and all its layers on. A REPL call adds one to a variable and shows it. `python -m benchmarks.sandboxes
--quick` does a tenth of it and
keeps no result.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from agentloop.sandboxes.base import Sandbox, SandboxError
from agentloop.sandboxes.load import load_sandbox
from benchmarks.report import Aim, report

CODE = "import numpy, sympy\nprint(1)"
CALL = "x += 1\nx"
ROUNDS = 5
"""Each figure is taken in so many turns with the others."""
SESSIONS = 256
PR_SET_CHILD_SUBREAPER = 36

Run = Callable[[], Awaitable[str]]
"""One run of `CODE`, or one call of a REPL: what it printed or showed."""


def quantiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds, and how many were measured."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"p50_ms": round(statistics.median(ordered) * 1e3, 3), "p99_ms": round(p99 * 1e3, 3), "n": len(ordered)}


async def timed(run: Run, count: int, callers: int, expected: str | None) -> tuple[list[float], float]:
    """Seconds of each of `count` runs, shared by so many callers, and of all of them together."""
    left = iter(range(count))
    each: list[float] = []

    async def caller() -> None:
        for _ in left:
            began = perf_counter()
            said = await run()
            each.append(perf_counter() - began)
            assert expected is None or said.strip() == expected, f"a run said {said!r}"

    began = perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return each, perf_counter() - began


class Contest:
    """Contenders for one figure, measured in turns."""

    def __init__(self, callers: int, expected: str | None = None) -> None:
        self.callers = callers
        self.expected = expected
        self.entries: dict[str, tuple[Run, int]] = {}

    def add(self, name: str, run: Run, count: int) -> None:
        """`count`: runs in all its turns together."""
        self.entries[name] = (run, max(1, count // ROUNDS))

    async def figures(self) -> dict[str, dict[str, float]]:
        each: dict[str, list[float]] = {name: [] for name in self.entries}
        spent = dict.fromkeys(self.entries, 0.0)
        for run, _ in self.entries.values():
            await timed(run, self.callers, self.callers, self.expected)
        for _ in range(ROUNDS):
            for name, (run, count) in self.entries.items():
                seconds, total = await timed(run, count, self.callers, self.expected)
                each[name] += seconds
                spent[name] += total
        return {name: {"per_s": round(len(each[name]) / spent[name], 1), **quantiles(each[name])} for name in self.entries}


def command(*words: str) -> Run:
    """A command of its own for every run."""

    async def run() -> str:
        process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
        return out.decode()

    return run


def bubblewrap() -> list[str]:
    """bubblewrap as people write it: the system read-only, nothing shared."""
    folders = sorted({"/usr", "/bin", "/lib", "/lib64", "/etc", sys.prefix, sys.base_prefix})
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"]
    for folder in folders:
        if os.path.exists(folder):
            words += ["--ro-bind", folder, folder]
    return [*words, "--"]


@asynccontextmanager
async def kernel() -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """An ipykernel: it runs code and gives what that printed or showed."""
    from jupyter_client.manager import AsyncKernelManager

    manager = AsyncKernelManager(kernel_name="python3")
    await manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=60)

        async def run(code: str) -> str:
            said: list[str] = []

            def hear(message: dict[str, Any]) -> None:
                content = message["content"]
                if message["msg_type"] == "stream":
                    said.append(content["text"])
                elif message["msg_type"] == "execute_result":
                    said.append(content["data"]["text/plain"])

            await client.execute_interactive(code, output_hook=hear)
            return "".join(said)

        yield run
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


async def usable(sandbox: Sandbox, stack: AsyncExitStack) -> str | None:
    """Start it; why it cannot be had here."""
    try:
        await stack.enter_async_context(sandbox)
    except SandboxError as error:
        return str(error)
    return None


async def stateless(callers: int, scale: float) -> dict[str, Any]:
    contest = Contest(callers, expected="1")
    skipped: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        for kind, count in (("process", 1500), ("bubblewrap", 1000), ("docker", 20)):
            sandbox = load_sandbox({"kind": kind, "scope": "process"})
            if reason := await usable(sandbox, stack):
                skipped[kind] = reason
                continue

            async def run(sandbox: Sandbox = sandbox) -> str:
                return (await sandbox.run(CODE)).stdout

            contest.add(kind, run, int(count * scale))
        contest.add("plain subprocess, nothing imported", command(sys.executable, "-c", "print(1)"), int(200 * scale))
        contest.add("plain subprocess", command(sys.executable, "-c", CODE), int(50 * scale))
        if shutil.which("bwrap"):
            contest.add("bubblewrap and import", command(*bubblewrap(), sys.executable, "-c", CODE), int(50 * scale))
        kernels = [await stack.enter_async_context(kernel()) for _ in range(callers)]
        free = kernels.copy()

        async def in_kernel() -> str:
            one = free.pop()
            try:
                return await one(CODE)
            finally:
                free.append(one)

        contest.add("ipykernel, which keeps its state", in_kernel, int(300 * scale))
        figures: dict[str, Any] = {**await contest.figures()}
    return {**figures, "skipped": skipped or None}


async def repl(scale: float) -> dict[str, Any]:
    """One session each: p50 and p99 of a call."""
    contest = Contest(callers=1)
    skipped: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        for kind in ("process", "bubblewrap", "docker"):
            sandbox = load_sandbox({"kind": kind, "scope": "process"})
            if reason := await usable(sandbox, stack):
                skipped[kind] = reason
                continue
            session = await stack.enter_async_context(sandbox.session())
            await session.run("x = 0")

            async def run(session: Any = session) -> str:
                result = await session.run(CALL)
                assert result.ok, result
                return str(result.value)

            contest.add(kind, run, int(3000 * scale))
        in_kernel = await stack.enter_async_context(kernel())
        await in_kernel("x = 0")
        contest.add("ipykernel", lambda: in_kernel(CALL), int(1000 * scale))
        figures: dict[str, Any] = {**await contest.figures()}
    return {**figures, "skipped": skipped or None}


def descendants() -> list[int]:
    """Processes that come from this one; orphans among them, as it is their subreaper."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = path.read_text()
            parents[int(text.split(" ", 1)[0])] = int(text.rpartition(") ")[2].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def proportional_mib(pids: list[int]) -> float:
    """Their proportional set size, MiB."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1024


async def many_sessions(scale: float) -> dict[str, Any]:
    """Memory of sessions that are all open and have each run something, their servants included."""
    count = max(8, int(SESSIONS * scale))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = set(descendants())
    async with AsyncExitStack() as stack:
        sandbox = load_sandbox({"kind": "process", "scope": "process", "max_sessions": SESSIONS})
        if reason := await usable(sandbox, stack):
            return {"skipped": reason}
        began = perf_counter()
        sessions = await asyncio.gather(*(stack.enter_async_context(sandbox.session()) for _ in range(count)))
        opened = perf_counter() - began
        results = await asyncio.gather(*(session.run(f"import sympy\nx = {n}\nx") for n, session in enumerate(sessions)))
        assert [result.value for result in results] == [str(n) for n in range(count)]
        processes = [pid for pid in descendants() if pid not in before]
        mib = proportional_mib(processes)
        return {"sessions": count, "processes": len(processes), "pss_mib": round(mib, 1), "open_s": round(opened, 2)}


def aims(figures: dict[str, Any]) -> list[Aim]:
    """The aims whose parts could be measured here."""
    found: list[Aim] = []
    one, two, calls, sessions = (figures[key] for key in ("stateless_1", "stateless_2", "repl", "sessions"))
    if "process" in one:
        process = one["process"]
        if "bubblewrap and import" in one:
            ratio = process["per_s"] / one["bubblewrap and import"]["per_s"]
            found.append(
                Aim("process, stateless: throughput over bubblewrap + import, 1 caller", ratio, "at least 40", ratio >= 40)
            )
        found.append(Aim("process, stateless: p99 ms, 1 caller", process["p99_ms"], "under 15", process["p99_ms"] < 15))
        rate = two["process"]["per_s"]
        found.append(Aim("process, stateless: runs per second, 2 callers", rate, "at least 120", rate >= 120))
    for kind, most in (("process", 1), ("docker", 2)):
        if kind in calls:
            p50 = calls[kind]["p50_ms"]
            found.append(Aim(f"{kind}: p50 ms of a REPL call", p50, f"under {most}", p50 < most))
    if sessions.get("sessions") == SESSIONS:
        mib = sessions["pss_mib"]
        found.append(
            Aim(f"{SESSIONS} process sessions at once: MiB (PSS, servants included)", mib, "at most 2048", mib <= 2048)
        )
    return found


async def measure(scale: float) -> dict[str, Any]:
    return {
        "stateless_1": await stateless(1, scale),
        "stateless_2": await stateless(2, scale),
        "repl": await repl(scale),
        "sessions": await many_sessions(scale),
    }


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    figures = asyncio.run(measure(0.1 if quick else 1.0))
    if quick:
        print(json.dumps({"figures": figures, "aims": [asdict(aim) for aim in aims(figures)]}))
    else:
        report("sandboxes", figures, aims(figures))


if __name__ == "__main__":
    main()
