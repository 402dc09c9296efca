"""What a side asked of the engine, how long the engine had nothing to do, and how busy the GPU was."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

from agentloop.engines.base import Engine, Generation, Sampling


@dataclass
class Meter:
    """Counts requests from any side, between `start` and `stop`."""

    requests: int = 0
    input_tokens: int = 0
    sampled_tokens: int = 0
    cached_tokens: int = 0
    idle_s: float = 0.0
    """With no request in the engine."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of this process, the model's own processes not among it."""
    most: int = 0
    """Requests at once."""
    token_ms: list[float] = field(default_factory=list)
    """For each answer its milliseconds a token, waiting and prefill included."""
    _in_flight: int = 0
    _since: float = 0.0
    _began: float = 0.0
    _cpu: float = 0.0

    def start(self) -> None:
        self._began = self._since = perf_counter()
        self._cpu = process_time()

    def stop(self) -> None:
        now = perf_counter()
        if not self._in_flight:
            self.idle_s += now - self._since
        self.wall_s = now - self._began
        self.cpu_s = process_time() - self._cpu

    @property
    def in_flight(self) -> int:
        """Requests that were asked and have neither been answered nor given up."""
        return self._in_flight

    @contextlib.contextmanager
    def request(self, tokens: int) -> Iterator[None]:
        if not self._in_flight:
            self.idle_s += perf_counter() - self._since
        self._in_flight += 1
        self.most = max(self.most, self._in_flight)
        self.requests += 1
        self.input_tokens += tokens
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._since = perf_counter()

    def answered(self, sampled: int, cached: int, seconds: float) -> None:
        self.sampled_tokens += sampled
        self.cached_tokens += cached
        self.token_ms.append(1000 * seconds / max(1, sampled))

    def figures(self) -> dict[str, Any]:
        return {
            "wall_s": round(self.wall_s, 3),
            "tokens_per_s": round(self.sampled_tokens / self.wall_s, 1),
            "requests": self.requests,
            "sampled_tokens": self.sampled_tokens,
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "engine_idle_share": round(self.idle_s / self.wall_s, 4),
            "engine_process_cpu_s": round(self.cpu_s, 3),
            "most_requests_at_once": self.most,
            "ms_a_token": {"p50": quantile(self.token_ms, 0.5), "p90": quantile(self.token_ms, 0.9)},
        }


def quantile(values: Sequence[float], share: float) -> float | None:
    ordered = sorted(values)
    return round(ordered[int(share * (len(ordered) - 1))], 2) if ordered else None


class MeteredEngine(Engine):
    """An engine whose requests are counted by `meter`, which changes from side to side."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.meter = Meter()

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        meter, began = self.meter, perf_counter()
        with meter.request(len(ids)):
            answer = await self.engine.generate(ids, sampling, trajectory_id=trajectory_id)
        meter.answered(len(answer.ids), answer.cached_tokens, perf_counter() - began)
        return answer

    async def release(self, trajectory_id: str) -> None:
        await self.engine.release(trajectory_id)


class GpuWatch:
    """Samples the GPU's utilisation, as NVML gives it: the share of the last moments in which a kernel ran."""

    EVERY_S = 0.2

    def __init__(self) -> None:
        self._handle: Any = None
        self._samples: list[float] = []
        self._stop = threading.Event()
        with contextlib.suppress(Exception):  # no NVML, no GPU: nothing to watch
            import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

            pynvml.nvmlInit()
            self._handle, self._nvml = pynvml.nvmlDeviceGetHandleByIndex(0), pynvml
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(self.EVERY_S):
            with contextlib.suppress(Exception):
                self._samples.append(float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100)

    def start(self) -> None:
        self._samples.clear()

    def idle_share(self) -> float | None:
        """Since `start`; `None` without NVML."""
        samples = list(self._samples)
        return round(1 - sum(samples) / len(samples), 4) if samples else None

    def close(self) -> None:
        self._stop.set()
