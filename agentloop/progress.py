"""A live display of a rollout: trajectories, turns, tokens per second, tool calls, failures by kind.

It is a `Recorder`, told by the loop what happens. On a terminal it is one panel that is redrawn; elsewhere it prints a plain
line now and then. One that serves a whole training run, step after step, counts anew when a step begins and nothing runs any
more; steps that overlap are counted together. Tokens per second are those of the time in which something ran.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from time import monotonic
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from agentloop.trajectory import CallRecord, CallStatus, EndReason, Trajectory, Turn


class Progress:
    """Counts what a rollout does and shows it.

    `total` is the number of trajectories expected, if known. `every_s` is the least time between two plain lines.
    """

    def __init__(
        self, title: str = "rollout", *, total: int | None = None, stream: TextIO | None = None, every_s: float = 10.0
    ) -> None:
        self.title = title
        self.total = total
        self.every_s = every_s
        self._steps: set[tuple[bool, int]] = set()
        self._reset()
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._live: Live | None = None
        self._last = monotonic()
        self._lock = threading.Lock()

    def _reset(self) -> None:
        self.started = self.ended = self.turns = self.sampled = self.calls = 0
        self.ends: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        """Calls that did not end as `ok`, by status, and malformed ones."""
        self.rewards: list[float] = []
        self._steps.clear()
        self._busy_s = 0.0
        self._busy_since: float | None = None

    # -- Recorder ---------------------------------------------------------------------------------------------------

    def trajectory_start(self, trajectory: Trajectory) -> None:
        step = (trajectory.validate, trajectory.step)
        if self.started == self.ended:
            if self.total is None and self._steps and step not in self._steps:
                self._show()  # the step that is over: of the new one there is nothing to tell yet
                self._reset()
            self._busy_since = monotonic()
        self._steps.add(step)
        self.started += 1
        self._show()

    def turn(self, trajectory: Trajectory, turn: Turn) -> None:
        self.turns += 1
        self.sampled += turn.end - turn.start
        self._show()

    def tool(self, trajectory: Trajectory, turn: Turn, record: CallRecord) -> None:
        self.calls += 1
        if record.status is not CallStatus.OK:
            self.failures[record.status.value] += 1

    def observation(self, trajectory: Trajectory, turn: Turn) -> None:
        if turn.parse_errors:
            self.failures["malformed call"] += 1

    def trajectory_end(self, trajectory: Trajectory) -> None:
        self.ended += 1
        self.ends[trajectory.end_reason.value if trajectory.end_reason else "error"] += 1
        if trajectory.reward is not None:
            self.rewards.append(trajectory.reward.value)
        if self.started == self.ended:
            self._busy_s = self._busy()
            self._busy_since = None
        self._show()

    def _busy(self) -> float:
        """Seconds in which at least one trajectory ran."""
        return self._busy_s + (0.0 if self._busy_since is None else monotonic() - self._busy_since)

    # -- showing ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Progress:
        self._last = monotonic()
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._console.print(self.line(), markup=False, soft_wrap=True)

    def line(self) -> str:
        """All counts in one plain line."""
        seconds = max(self._busy(), 1e-6)
        of = f"/{self.total}" if self.total is not None else ""
        parts = [
            f"{self.ended}{of} trajectories",
            f"{self.turns} turns",
            f"{self.sampled / seconds:.0f} tokens/s",
            f"{self.calls} tool calls",
        ]
        if self.rewards:
            parts.append(f"reward {sum(self.rewards) / len(self.rewards):.3f}")
        unfinished = {kind: n for kind, n in self.ends.items() if kind != EndReason.FINAL_ANSWER.value}
        parts += [f"{kind} {count}" for kind, count in sorted(unfinished.items())]
        parts += [f"failed calls: {kind} {count}" for kind, count in sorted(self.failures.items())]
        return f"{self.title}: " + ", ".join(parts)

    def _show(self) -> None:
        with self._lock:
            now = monotonic()
            wait = 0.25 if self._live is not None else self.every_s
            if now - self._last < wait:
                return
            self._last = now
        if self._live is not None:
            self._live.update(self._table())
        else:
            self._console.print(self.line(), markup=False, soft_wrap=True)

    def _table(self) -> Table:
        seconds = max(self._busy(), 1e-6)
        table = Table(title=self.title, show_header=False, box=None, title_justify="left")
        of = f" of {self.total}" if self.total is not None else ""
        table.add_row("trajectories", f"{self.ended}{of} ended, {self.started - self.ended} running")
        table.add_row("turns", str(self.turns))
        table.add_row("tokens/s", f"{self.sampled / seconds:.0f}")
        table.add_row("tool calls", str(self.calls))
        if self.rewards:
            table.add_row("mean reward", f"{sum(self.rewards) / len(self.rewards):.3f}")
        for label, counts in (("ended by", self.ends), ("failures", self.failures)):
            if counts:
                table.add_row(label, ", ".join(f"{kind} {count}" for kind, count in counts.most_common()))
        return table
