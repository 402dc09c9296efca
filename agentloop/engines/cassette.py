"""An engine that answers from a run's record: no model, the tokens as they were sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from agentloop.cassette.tape import Cassette, Decode, Tape, cassette_of
from agentloop.engines.base import Engine, Generation, Sampling
from agentloop.errors import EngineError
from agentloop.journal.reader import Run

Latency = float | Callable[[float], float]
"""What to wait instead of so many recorded seconds: a factor (0: nothing, 1: as recorded), or a function of them."""


async def wait(latency: Latency, seconds: float) -> None:
    """Let `seconds` of the record pass."""
    await asyncio.sleep(max(0.0, latency(seconds) if callable(latency) else latency * seconds))


class CassetteEngine(Engine):
    """Plays the answers of recorded trajectories, found by the trajectory's name and the turn, in whatever order they are asked
    for.

    What it is asked for must be what was recorded, token for token and with the same sampling settings; else `generate` raises
    `CassetteMismatch`. Where the record ends because an engine failed it raises the same `EngineError` again; where it ends for
    another reason than the conversation's, `EndOfRecord`. Both others are no `EngineError`s: the loop does not make data of
    them, they come out of it.
    """

    def __init__(self, source: Cassette | Run | str | Path, *, decode: Decode | None = None, latency: Latency = 0.0) -> None:
        """`decode` (a renderer's) is for the text of a mismatch. Raises `ConfigError` if there is no run."""
        self.cassette = cassette_of(source)
        self._decode = decode
        self._latency = latency
        self._progress: dict[str, tuple[Tape, int]] = {}
        self._closed = False

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        if self._closed:
            raise EngineError("the engine is closed")
        if trajectory_id not in self._progress:
            self._progress[trajectory_id] = (await self.cassette.tape(trajectory_id), 0)
        tape, turn = self._progress[trajectory_id]
        tape.check_input(turn, ids, self._decode)
        if turn >= len(tape.turns):
            raise tape.end(turn)
        tape.check_sampling(turn, sampling)
        await wait(self._latency, tape.turns[turn].generate_s)
        self._progress[trajectory_id] = (tape, turn + 1)
        return tape.generation(turn)

    async def release(self, trajectory_id: str) -> None:
        """Forget how far the trajectory has come: the same name starts its tape again."""
        self._progress.pop(trajectory_id, None)

    async def close(self) -> None:
        self._closed = True
        self._progress.clear()
