"""An engine that plays a script: for tests, for docs, and to measure what the loop itself costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from agentloop.engines.base import Engine, Generation, Sampling, Weights
from agentloop.errors import ConfigError, EngineError, nearest
from agentloop.iterate import each
from agentloop.trajectory import StopReason


@dataclass(frozen=True, slots=True)
class ScriptedTurn:
    """What one call of `generate` answers."""

    ids: Sequence[int] = ()
    text: str | None = None
    """Instead of `ids`; encoded by the engine's `encode`."""
    log_probs: Sequence[float] | None = None
    """One a token; `None`: the engine's constant."""
    stop_reason: StopReason = StopReason.STOP
    delay_s: float = 0.0
    """Seconds that the answer takes. The tokens count as sampled evenly over it, so an abort keeps the first of them."""
    error: str | None = None
    """Raise `EngineError` with this message, after the delay."""
    weight_version: int | None = None
    """`None`: the version of the last `update_weights`."""
    data: Any = None


Turn = ScriptedTurn | Sequence[int] | str
"""A turn, or its token ids alone, or its text alone."""
Script = Sequence[Turn] | Mapping[str, Sequence[Turn]] | Callable[[Sequence[int], Sampling, str], Turn]


@dataclass(frozen=True, slots=True)
class ScriptedCall:
    """One call of `generate`, as recorded."""

    trajectory_id: str
    turn: int
    input_length: int
    sampling: Sampling
    ids: tuple[int, ...] | None = None
    """The whole input, with `record="ids"` only."""


class ScriptedEngine(Engine):
    """Answers from a script, in constant time beside the tokens that it returns; the input is never copied.

    `script` is one of
    - a list of turns: every trajectory plays it from its beginning;
    - a mapping of trajectory ids to such lists;
    - a function `(ids, sampling, trajectory_id) -> turn`.

    An answer longer than `Sampling.max_tokens` is cut with `StopReason.LENGTH`. A call beyond the script's end raises
    `EngineError`. Stop tokens, stop strings and temperature do not change what a script says.
    """

    def __init__(
        self,
        script: Script,
        *,
        encode: Callable[[str], Sequence[int]] | None = None,
        log_prob: float = -1.0,
        weight_version: int | None = 0,
        record: Literal["lengths", "ids", "nothing"] = "lengths",
    ) -> None:
        """`encode` turns the text of turns into ids. `log_prob` is what every token gets whose turn gives none, and what
        `score` answers. Raises `ConfigError` for a text without `encode` and for log-probabilities that do not fit."""
        self._encode = encode
        self._log_prob = log_prob
        self._version = weight_version
        self._record = record
        self.calls: list[ScriptedCall] = []
        """What was asked, in order; see `record`."""
        self._function: Callable[[Sequence[int], Sampling, str], Turn] | None = None
        self._shared: list[ScriptedTurn] | None = None
        self._own: dict[str, list[ScriptedTurn]] = {}
        if callable(script):
            self._function = script
        elif isinstance(script, Mapping):
            self._own = {key: [self._turn(turn) for turn in turns] for key, turns in script.items()}
        else:
            self._shared = [self._turn(turn) for turn in script]
        self._progress: dict[str, tuple[int, int]] = {}  # trajectory -> turns played, tokens of its last input and output
        self._in_flight: set[asyncio.Future[None]] = set()
        self._paused = False
        self._resumed: set[asyncio.Future[None]] = set()
        self._asleep: set[str] = set()
        self._closed = False

    @property
    def weight_version(self) -> int | None:
        return self._version

    @property
    def in_flight(self) -> int:
        """Requests that wait or take their time now."""
        return len(self._in_flight) + len(self._resumed)

    def _turn(self, turn: Turn) -> ScriptedTurn:
        if isinstance(turn, str):
            turn = ScriptedTurn(text=turn)
        elif not isinstance(turn, ScriptedTurn):
            turn = ScriptedTurn(ids=turn)
        if turn.text is not None:
            if self._encode is None:
                raise ConfigError(f"ScriptedEngine: the turn {turn.text!r} is text, which needs `encode`")
            turn = replace(turn, ids=tuple(self._encode(turn.text)), text=None)
        if turn.log_probs is not None and len(turn.log_probs) != len(turn.ids):
            raise ConfigError(f"ScriptedEngine: a turn has {len(turn.ids)} ids and {len(turn.log_probs)} log_probs")
        return turn

    def _next(self, played: int, ids: Sequence[int], sampling: Sampling, trajectory_id: str) -> ScriptedTurn:
        if self._function is not None:
            return self._turn(self._function(ids, sampling, trajectory_id))
        turns = self._shared if self._shared is not None else self._own.get(trajectory_id)
        if turns is None:
            raise EngineError(f"no script for trajectory {trajectory_id!r}; {nearest(trajectory_id, self._own)}")
        if played >= len(turns):
            raise EngineError(f"the script of trajectory {trajectory_id!r} has only {len(turns)} turns")
        return turns[played]

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
        if self._asleep:
            raise EngineError(f"the engine sleeps ({', '.join(sorted(self._asleep))})")

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        self._check_open()
        if not len(ids):
            raise EngineError("the input is empty")
        if sampling.max_tokens < 1:
            raise EngineError(f"max_tokens is {sampling.max_tokens}; it must be at least 1")
        queue_s = 0.0
        if self._paused:
            loop = asyncio.get_running_loop()
            began = loop.time()
            if not await self._wait(self._resumed, None):
                return self._generation(ScriptedTurn(stop_reason=StopReason.ABORTED), 0, sampling, self._version, 0, 0.0)
            queue_s = loop.time() - began
        played, length = self._progress.get(trajectory_id, (0, 0))
        if self._record != "nothing":
            kept = tuple(ids) if self._record == "ids" else None
            self.calls.append(ScriptedCall(trajectory_id, played, len(ids), sampling, kept))
        turn = self._next(played, ids, sampling, trajectory_id)
        began_version = self._version
        count = min(len(turn.ids), sampling.max_tokens)
        if turn.delay_s > 0:
            began = asyncio.get_running_loop().time()
            if not await self._wait(self._in_flight, turn.delay_s):
                share = (asyncio.get_running_loop().time() - began) / turn.delay_s
                count = min(int(count * share), max(count - 1, 0))
                turn = replace(turn, stop_reason=StopReason.ABORTED)
        if turn.error is not None:
            raise EngineError(turn.error)
        self._progress[trajectory_id] = (played + 1, len(ids) + count)
        return self._generation(turn, count, sampling, began_version, min(length, len(ids) - 1), queue_s)

    def _generation(
        self, turn: ScriptedTurn, count: int, sampling: Sampling, began_version: int | None, cached: int, queue_s: float
    ) -> Generation:
        log_probs: list[float] | None = None
        if sampling.log_probs:
            log_probs = [self._log_prob] * count if turn.log_probs is None else list(turn.log_probs[:count])
        reason = turn.stop_reason
        if count < len(turn.ids) and reason is not StopReason.ABORTED:
            reason = StopReason.LENGTH
        fixed = turn.weight_version
        return Generation(
            ids=list(turn.ids[:count]),
            log_probs=log_probs,
            stop_reason=reason,
            weight_version=self._version if fixed is None else fixed,
            min_weight_version=began_version if fixed is None else fixed,
            cached_tokens=cached,
            queue_s=queue_s,
            data=turn.data,
        )

    async def _wait(self, group: set[asyncio.Future[None]], seconds: float | None) -> bool:
        """Wait as one of `group`; False if aborted, `EngineError` if closed."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        group.add(future)
        try:
            done, _ = await asyncio.wait([future], timeout=seconds)
            if self._closed:
                raise EngineError("the engine was closed")
            return not (done and future.cancelled())
        finally:
            group.discard(future)
            future.cancel()

    async def score(self, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        self._check_open()
        return [self._log_prob] * max(len(ids) - 1, 0)

    async def release(self, trajectory_id: str) -> None:
        """Forget how far the trajectory has come: the same id starts the script again."""
        self._progress.pop(trajectory_id, None)

    async def update_weights(self, weights: Weights, version: int) -> None:
        """There is no model: the tensors are consumed and only the version counts."""
        async for _ in each(weights):
            pass
        self._version = version

    async def abort_all(self) -> None:
        for future in [*self._in_flight, *self._resumed]:
            future.cancel()

    async def pause(self) -> None:
        self._paused = True

    async def resume(self) -> None:
        self._paused = False
        for future in self._resumed:
            if not future.done():
                future.set_result(None)

    async def sleep(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        await self.abort_all()
        self._asleep.update(tags)

    async def wake(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        self._asleep.difference_update(tags)

    async def close(self) -> None:
        self._closed = True
        await self.abort_all()
