"""Plain `subprocess`, as root, with a timeout: what every attack must succeed against to count.

It does what people write: a driver that runs the code and reports the last expression's value as a line of JSON on a pipe,
`communicate` with a timeout, `kill`, files read and written by their paths. What that leaves on this machine is swept up by
`Host.sweep`; what could hold up the tests is given up after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from tests.conformance.attacks.base import GRACE_S, Outcome

DRIVER = """
import ast, json, os, sys, traceback
result = os.fdopen(int(sys.argv[1]), "w")
space = {"__name__": "__main__"}
try:
    tree = ast.parse(open(sys.argv[2]).read())
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<code>", "exec"), space)
    value = eval(compile(ast.Expression(last.value), "<code>", "eval"), space) if last else None
    report = {"status": "ok", "value": None if value is None else repr(value)}
except BaseException:
    traceback.print_exc()
    report = {"status": "error", "value": None}
result.write(json.dumps(report) + "\\n")
"""
DAEMON_MARK = "AGENTLOOP_ATTACK"

T = TypeVar("T")


async def in_thread(act: Callable[[], T], seconds: float) -> T:
    """`act` in a thread that may hang: `TimeoutError` then, and nobody waits for it at the end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def report(outcome: T | None, error: BaseException | None) -> None:
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(outcome)  # type: ignore[arg-type]

    def work() -> None:
        try:
            outcome, error = act(), None
        except Exception as raised:
            outcome, error = None, raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(report, outcome, error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wait_for(future, seconds)


class PlainPlace:
    """A folder, and a new interpreter for every run."""

    def __init__(self) -> None:
        self.outer = Path(tempfile.mkdtemp(prefix="agentloop-plain-"))
        self.folder = self.outer / "work"
        self.folder.mkdir()
        self.mark = f"{DAEMON_MARK}={self.outer.name}"

    async def run(
        self, code: str, *, timeout: float, fetch: tuple[str, ...] = (), files: Mapping[str, str] | None = None
    ) -> Outcome:
        for path, data in (files or {}).items():
            await self.put(path, data)
        try:
            outcome = await in_thread(lambda: self._run(code, timeout), timeout + GRACE_S)
        except TimeoutError:
            self.sweep()
            return Outcome(status="timeout", hung=True)
        finally:
            if not fetch:
                self._cap()
        for path in fetch:
            with contextlib.suppress(OSError):
                outcome.files[path] = await self.get(path)
        return outcome

    def _run(self, code: str, timeout: float) -> Outcome:
        script = self.outer / "code.py"
        script.write_text(code)
        reading, writing = os.pipe()
        environment = {**os.environ, **dict([self.mark.split("=")])}
        command = [sys.executable, "-c", DRIVER, str(writing), str(script)]
        with subprocess.Popen(
            command,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[writing],
            env=environment,
        ) as process:
            os.close(writing)
            said: list[bytes] = []
            reader = threading.Thread(target=lambda: said.append(read_all(reading)), daemon=True)
            reader.start()
            status = ""
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
                status = "timeout"
            reader.join()
            os.close(reading)
        value = None
        if not status:
            try:
                result = json.loads(said[0].decode().splitlines()[0])
                status, value = result["status"], result["value"]
            except (ValueError, IndexError, KeyError, TypeError):
                status = "infra"  # it sees no result, and cannot know why
        return Outcome(status, stdout.decode(errors="replace"), stderr.decode(errors="replace"), value)

    async def put(self, path: str, data: str) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(data)

    async def get(self, path: str) -> bytes:
        """Reads by path; a FIFO holds it up for a while."""
        target = self.folder / path
        try:
            return await in_thread(target.read_bytes, GRACE_S)
        except TimeoutError:
            with contextlib.suppress(OSError):
                os.close(os.open(target, os.O_WRONLY | os.O_NONBLOCK))
            return b""

    def _cap(self) -> None:
        """A flooded folder is not kept while the next attack runs."""
        for path in self.folder.glob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_size > 1 << 26:
                path.unlink()

    def sweep(self) -> None:
        """End every process that was started here, by what its environment says."""
        for _ in range(200):
            found = []
            for path in Path("/proc").iterdir():
                if path.name.isdigit() and int(path.name) != os.getpid():
                    with contextlib.suppress(OSError):
                        if self.mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                            found.append(int(path.name))
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not found:
                break


def read_all(fd: int) -> bytes:
    """What comes until the pipe is closed; of a flood its beginning."""
    kept: list[bytes] = []
    while data := os.read(fd, 1 << 20):
        if len(kept) < 1 << 12:
            kept.append(data)
    return b"".join(kept)


class Plain:
    """Plain `subprocess` as a target."""

    name = "plain subprocess"

    def __init__(self) -> None:
        self._places: list[PlainPlace] = []

    @asynccontextmanager
    async def place(self, limits: Mapping[str, Any], *, lasting: bool) -> AsyncIterator[PlainPlace]:
        place = PlainPlace()
        self._places.append(place)
        yield place

    def clean(self) -> None:
        """End and remove what is left of its places: it stays until here, since an attack is judged by what it leaves."""
        while self._places:
            place = self._places.pop()
            place.sweep()
            shutil.rmtree(place.outer, ignore_errors=True)
