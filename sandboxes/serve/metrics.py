"""What the service tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from agentloop.sandboxes.base import Result

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """A registry of its own, so that two services in one process do not meet."""

    def __init__(self, running: Callable[[], float], waiting: Callable[[], float], sessions: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._runs = self._counter("runs", "Runs by how they ended.", "status")
        self._refused = self._counter("refused", "Requests that were not admitted, by HTTP status.", "code")
        self._run_s = self._histogram("run_seconds", "Wall-clock time of runs.")
        self._queue_s = self._histogram("queue_seconds", "Time that runs waited for a place.")
        for name, text, function in (
            ("running", "Runs under way.", running),
            ("waiting", "Runs that wait for a place.", waiting),
            ("sessions", "Sessions that are open.", sessions),
        ):
            Gauge(f"agentloop_sandbox_{name}", text, registry=self._registry).set_function(function)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"agentloop_sandbox_{name}", text, [label], registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"agentloop_sandbox_{name}", text, buckets=_SECONDS, registry=self._registry)

    def ran(self, result: Result, queue_s: float) -> None:
        self._runs.labels(result.status.value).inc()
        self._run_s.observe(result.run_s)
        self._queue_s.observe(queue_s)

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
