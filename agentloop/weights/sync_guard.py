"""The engines of a weight sync, as rollouts use them: no answers while weights change, or where they cannot be trusted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from enum import Enum

from agentloop.engines.base import Engine, Generation, Sampling, Weights
from agentloop.errors import EngineError
from agentloop.trajectory import StopReason


class SyncFailed(EngineError):
    """A weight sync did not land. The message says why, and which version goes on serving or that none does."""


class WeightsRefused(EngineError):
    """The engine's weights cannot be trusted, so it answers no rollout until a sync has passed."""


class Holds(Enum):
    """What an engine holds while a sync is under way."""

    OLD = "the weights of before, whole"
    NEW = "the new weights, whole"
    UNKNOWN = "perhaps some of both"


class GuardedEngine(Engine):
    """An engine whose weights a sharding manager changes.

    While they change, new requests wait; after a failure that left no whole weights, and after a check that did not pass, they
    raise `WeightsRefused`. The version is raised by the manager alone, once everything has landed on every engine.
    """

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self.engine = engine
        """The engine behind it; another one after a restart."""
        self.holds = Holds.OLD
        self.refusal: str | None = None
        self._version: int | None = None
        self._changing = False
        self._waiting: set[asyncio.Future[bool]] = set()
        self._paused = False
        self._held_back = False

    @property
    def weight_version(self) -> int | None:
        """Of the last sync that landed; before it, the engine's own."""
        return self.engine.weight_version if self._version is None else self._version

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        if not await self._passed():
            version = self.weight_version
            return Generation([], [] if sampling.log_probs else None, StopReason.ABORTED, version, version)
        began = self._version
        answer = await self.engine.generate(ids, sampling, trajectory_id=trajectory_id)
        if None not in (began, answer.weight_version) and answer.weight_version != began:
            raise EngineError(f"engine '{self.name}' answered with weights of version {answer.weight_version}, not {began}")
        return answer

    async def score(self, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        if not await self._passed():
            raise EngineError("the request was aborted while the weights were updated")
        return await self.engine.score(ids, temperature=temperature)

    async def release(self, trajectory_id: str) -> None:
        await self.engine.release(trajectory_id)

    async def weight_checksums(self, names: Sequence[str] | None = None) -> dict[str, int]:
        return await self.engine.weight_checksums(names)

    async def weight_fingerprints(self) -> dict[str, str]:
        return await self.engine.weight_fingerprints()

    async def update_weights(self, weights: Weights, version: int) -> None:
        raise EngineError("the weights of this engine are its sharding manager's to change: call its sync()")

    async def abort_all(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(False)
        await self.engine.abort_all()

    async def pause(self) -> None:
        self._paused = True
        await self.engine.pause()

    async def resume(self) -> None:
        self._paused = False
        if not self._held_back:
            await self.engine.resume()

    async def sleep(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        await self.engine.sleep(tags)

    async def wake(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        await self.engine.wake(tags)

    async def close(self) -> None:
        self.refuse("the engine was closed")
        await self.engine.close()

    # -- for the manager ----------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Let no request in."""
        self._changing = True

    def serve(self, version: int | None) -> None:
        """Let requests in, under `version`; None: under what it was."""
        if version is not None:
            self._version = version
        self.refusal = None
        self._open()

    def refuse(self, why: str) -> None:
        """Raise `WeightsRefused` for every request from now on, those that wait included."""
        self.refusal = why
        self._open()

    async def hold_back(self, on: bool) -> None:
        """Pause the engine itself as long as it is refused, and no longer than it was paused by others."""
        if on == self._held_back:
            return
        self._held_back = on
        with contextlib.suppress(EngineError):  # one that is gone answers nobody
            if on:
                await self.engine.abort_all()
                await self.engine.pause()
            elif not self._paused:
                await self.engine.resume()

    def _open(self) -> None:
        self._changing = False
        for future in self._waiting:
            if not future.done():
                future.set_result(True)

    async def _passed(self) -> bool:
        """Wait until the weights are not being changed; False if the request was aborted meanwhile."""
        while self._changing:
            future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._waiting.add(future)
            try:
                if not await future:
                    return False
            finally:
                self._waiting.discard(future)
        if self.refusal is not None:
            raise WeightsRefused(self.refusal)
        return True
