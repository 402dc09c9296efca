"""Servers over the local engine as processes of their own, to be killed, stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "quickstart" / "model"


class Peer:
    """`python -m agentloop.engines.serve_local` on a port of its own, which it keeps when it is started again."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._port = 0
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def launch(self) -> None:
        """Start the process; `ready` waits until it listens."""
        command = [sys.executable, "-m", "agentloop.engines.serve_local", "--model-path", str(MODEL), "--threads", "1"]
        self._process = subprocess.Popen(
            [*command, "--port", str(self._port), *self._arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ready(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        assert "ready at" in line, f"the server did not start: {line!r}"
        self.url = line.split()[-1]
        self._port = int(self.url.rpartition(":")[2])

    def start(self) -> None:
        self.launch()
        self.ready()

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait()


@contextmanager
def running(count: int, *arguments: str) -> Iterator[Sequence[Peer]]:
    """Several, started side by side."""
    peers = [Peer(*arguments) for _ in range(count)]
    try:
        for peer in peers:
            peer.launch()
        for peer in peers:
            peer.ready()
        yield peers
    finally:
        for peer in peers:
            peer.kill()
