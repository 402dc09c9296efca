"""Runs verl's command: its output to a log, what matters of it to the terminal, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any
from uuid import uuid4

RUN_ID = "AGENTLOOP_TRAIN_ID"
"""An environment variable that every process of a run inherits, so that what outlives the run can be found."""
INTERRUPT_S = 15.0
TERMINATE_S = 5.0
TAIL_LINES = 40

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(r"^\((?P<actor>\w+) pid=\d+[^)]*\)\s?")
_ERROR = re.compile(r"[\w.]*(Error|Exception): ")
_STEP = re.compile(r"^step:(?P<step>\d+) - ")
_NOISE = re.compile(r"transfer_queue|blocking ray\.get|^(INFO|WARNING|DEBUG):|target_num_threads")
_STAGES = {
    "Started a local Ray instance": "Ray has started",
    "train and validate dataloader initialized": "data loaded",
    "actor and ref model engine initialized": "trainer ready",
    "LLMServerManager:": "rollout servers ready",
    "all initialize finished": "starting the rollout workers",
}
_SHOWN = {
    "critic/score/mean": "score",
    "num_turns/mean": "turns",
    "response_length/mean": "response tokens",
    "actor/entropy": "entropy",
    "actor/grad_norm": "grad norm",
    "timing_s/step": "seconds",
}


class Screen:
    """What the user sees of verl's output: the stages of the start, a line a step, and agentloop's own lines."""

    def __init__(self, show: Callable[[str], None], *, total_steps: int | None = None) -> None:
        self._show = show
        self._total = total_steps
        self._start = monotonic()
        self._stages = dict(_STAGES)
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        """The last lines, for a run that fails."""

    def line(self, raw: str) -> None:
        text = _ANSI.sub("", raw).rstrip()
        if not text:
            return
        self.tail.append(text)
        prefix = _PREFIX.match(text)
        body = text[prefix.end() :] if prefix else text
        if match := _STEP.match(body):
            self._step(int(match["step"]), body)
        elif prefix and prefix["actor"].endswith("RolloutActor") and not _NOISE.search(body):
            self._show(body)
        else:
            for marker in [marker for marker in self._stages if marker in body]:
                self._show(f"[{monotonic() - self._start:5.1f} s] {self._stages.pop(marker)}")

    def _step(self, step: int, body: str) -> None:
        metrics = parse_metrics(body)
        of = f"/{self._total}" if self._total else ""
        parts = []
        for key, label in _SHOWN.items():
            found = next((value for name, value in metrics.items() if name.endswith(key)), None)
            if found is not None:
                parts.append(f"{label} {found:.3g}")
        parts += [f"{name.removeprefix('val-core/')} {value:.3f}" for name, value in metrics.items() if "val-core/" in name]
        self._show(f"[{monotonic() - self._start:5.1f} s] step {step}{of}: " + ", ".join(parts))


def parse_metrics(line: str) -> dict[str, float]:
    """verl's console line, `step:3 - name:value - name:value`, as numbers; values that are none are left out."""
    metrics: dict[str, float] = {}
    for part in line.split(" - "):
        name, _, value = part.rpartition(":")
        number = re.fullmatch(r"(?:np\.\w+\()?([-+0-9.einfa]+)\)?", value.strip())
        if name and number:
            with suppress(ValueError):
                metrics[name.strip()] = float(number[1])
    return metrics


def run(
    command: Sequence[str], env: Mapping[str, str], log: Path, *, total_steps: int | None = None, verbose: bool = False
) -> int:
    """Run `command` in a process group of its own and return its exit status, 130 after Ctrl-C, SIGTERM or SIGHUP.

    Everything it prints goes to `log`; the terminal gets the gist, or with `verbose` everything. Whatever way it ends, no
    process of it is left."""
    log.parent.mkdir(parents=True, exist_ok=True)
    marker = uuid4().hex
    screen = Screen(lambda text: print(text, flush=True), total_steps=total_steps)
    # A terminal that is closed sends SIGHUP; the run is in a session of its own and would go on unseen.
    stopping = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _interrupt) for number in stopping}
    child = subprocess.Popen(
        list(command),
        env={**os.environ, **env, RUN_ID: marker},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=_read, args=(child, log, screen, verbose), daemon=True)
    try:
        reader.start()
        status = child.wait()
        # What outlives the command may hold its output open, so it goes before the reader is waited for.
        _sweep(marker)
        reader.join()
        if status != 0:
            if not verbose:
                print("\n".join(screen.tail), file=sys.stderr)
            reason = next((f": {line}" for line in reversed(screen.tail) if _ERROR.match(line)), "")
            print(f"agentloop: verl ended with status {status}{reason} (all that it printed: {log})", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print(f"agentloop: interrupted; stopping verl (its output is in {log})", file=sys.stderr)
        _stop(child)
        return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if child.poll() is None:
            _stop(child)
        _sweep(marker)
        if reader.is_alive():
            reader.join(TERMINATE_S)


def _read(child: subprocess.Popen[str], log: Path, screen: Screen, verbose: bool) -> None:
    assert child.stdout is not None
    with log.open("w", encoding="utf-8") as file:
        for line in child.stdout:
            file.write(line)
            file.flush()
            screen.line(line)
            if verbose:
                print(line, end="", flush=True)


def _interrupt(_signal: int, _frame: FrameType | None) -> Any:
    raise KeyboardInterrupt


def _stop(child: subprocess.Popen[str]) -> None:
    """SIGINT, then SIGTERM, then SIGKILL to the child's group, each with its time."""
    for number, patience in ((signal.SIGINT, INTERRUPT_S), (signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, TERMINATE_S)):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience)
            return


def _sweep(marker: str, patience: float = 3.0) -> None:
    """End processes of this run that outlived it: Ray puts its own in groups of their own. Linux only."""
    deadline = monotonic() + patience
    while left := _processes(marker):
        number = signal.SIGTERM if monotonic() < deadline else signal.SIGKILL
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        if number == signal.SIGKILL and monotonic() > deadline + patience:
            return
        sleep(0.1)


def _processes(marker: str) -> list[int]:
    needle = f"{RUN_ID}={marker}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(entry.name) != os.getpid() and needle in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found
