"""A worker group of `SGLangRolloutWorker`s as one engine of a weight sync (`agentloop.weights.MegatronSGLangShardingManager`).

    manager = MegatronSGLangShardingManager([WorkerGroupEngine(group)], source, TensorsPlan(), check=canary)
    with manager:
        output = group.generate_sequences(prompts)

Rollouts go to the group as ever. Its ranks answer while whole and checked weights serve, and raise `EngineError` otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from agentloop.engines.base import Engine, Generation, Sampling, Weights
from agentloop.errors import EngineError
from agentloop.iterate import each

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class WorkerGroupEngine(Engine):
    """All engines of a group, which is up (`init_model` has passed). Calls of the group block, so they run in a thread."""

    def __init__(self, group: Any, *, agree: float = 0.1) -> None:
        """`agree`: how far apart the scores of two of its engines may be in the mean, in nats, for one sequence."""
        self._group, self._agree = group, agree
        told: list[int] = [version for version in group.weight_version() if version is not None]
        self._engines, self._version = len(told), max(told)
        self._refused: str | None = None

    @property
    def weight_version(self) -> int:
        return self._version

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        raise EngineError("rollouts of a worker group go through its generate_sequences")

    async def probe(self) -> None:
        """Raise `EngineError` unless every engine of the group answers."""
        await self.score([0, 0])

    async def score(self, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        """By every engine of the group; the first one's. Raises `EngineError` where they disagree."""
        import torch
        from verl.protocol import DataProto

        tokens = torch.tensor([list(ids)] * self._engines)
        tensors = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "responses": tokens[:, 1:]}
        batch = DataProto.from_dict(tensors=tensors, meta_info={"temperature": temperature})
        answer = await self._call(lambda: self._group.compute_log_prob(batch))
        found = answer.batch["log_probs"]
        apart = float((found - found[:1]).abs().mean(dim=1).max())
        if not apart <= self._agree:
            raise EngineError(f"the engines of the group disagree by {apart:.3g} in the mean: they serve different weights")
        scores: list[float] = found[0].tolist()
        return scores

    async def update_weights(self, weights: Weights, version: int) -> None:
        loop = asyncio.get_running_loop()
        stream = each(weights)
        await self._update(lambda: self._group.update_weights(_blocking(stream, loop), version), version)

    async def update_weights_from_disk(self, path: str, version: int) -> None:
        """`path`: a folder that every engine's node sees."""
        await self._update(lambda: self._group.update_weights(path, version), version)

    async def _update(self, update: Callable[[], int], version: int) -> None:
        try:
            self._version = await self._call(update)
        except EngineError:
            if self._refused is not None:  # the group goes on with what it has, which was refused
                await self._refuse(self._refused)
            raise
        self._refused = None
        if self._version != version:
            raise EngineError(f"the group serves version {self._version}, not {version}")

    async def pause(self) -> None:
        """Have the group refuse rollouts, until an update has landed."""
        await self._refuse("its weights are not those that the trainer has")

    async def _refuse(self, why: str) -> None:
        self._refused = why
        await self._call(lambda: self._group.refuse(why))

    async def sleep(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        await self._call(lambda: self._group.sleep(tags))

    async def wake(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        await self._call(lambda: self._group.wake(tags))

    async def close(self) -> None:
        await self._call(self._group.shutdown)

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.to_thread(function)


def _blocking(
    stream: AsyncIterator[tuple[str, torch.Tensor]], loop: asyncio.AbstractEventLoop
) -> Iterator[tuple[str, torch.Tensor]]:
    """A stream of the event loop's, for a thread."""

    async def following() -> tuple[str, torch.Tensor] | None:
        async for named in stream:
            return named
        return None

    while (named := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not None:
        yield named
