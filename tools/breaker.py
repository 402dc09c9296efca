"""The circuit breaker of one tool."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from agentloop.tools.policy import CircuitBreaker


class Breaker:
    """Counts a tool's infrastructure failures, over all trajectories of a process.

    Closed, every attempt goes through. After `failures` in a row it is open: nothing goes through for `open_s` seconds.
    Then one attempt does, the probe: its infrastructure failure opens it again, an answer of any kind closes it. A probe
    that ends in neither way (it timed out, it was cancelled) leaves its place to the next.
    """

    def __init__(self, settings: CircuitBreaker | None, clock: Callable[[], float] = monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._in_a_row = 0
        self._open_until: float | None = None
        self._probing = False

    def refusal(self) -> str | None:
        """Why an attempt may not begin now, as the rest of a sentence."""
        if self._settings is None or self._open_until is None:
            return None
        failed = f"it failed {self._in_a_row} times in a row"
        left = self._open_until - self._clock()
        if left > 0:
            return f"{failed} and is left alone for another {left:.1f} s"
        return f"{failed} and is being tried by another call" if self._probing else None

    def begin(self) -> bool:
        """An attempt begins, to which `refusal` did not object; whether it is the probe."""
        if self._open_until is None:
            return False
        self._probing = True
        return True

    def end(self, *, probe: bool, answered: bool = False, failed: bool = False) -> None:
        """How an attempt ended: with an answer, with an infrastructure failure, or in neither way."""
        if probe:
            self._probing = False
        if answered:
            self._in_a_row, self._open_until = 0, None
        if failed:
            self._in_a_row += 1
            if self._settings is not None and (probe or self._in_a_row >= self._settings.failures):
                self._open_until = self._clock() + self._settings.open_s
