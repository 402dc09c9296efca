"""Weights from the trainer to replicas with resources of their own (`trainer.v1.trainer_mode=separate_async`), through Ray's
object store: `actor_rollout_ref.rollout.checkpoint_engine.backend=agentloop_ray`.

verl's own backends for this need accelerators (nccl, nixl, …), and it refuses `naive` there. The trainer's first rank puts
each bucket of weights into the object store once and sends the reference to every replica's `CheckpointEngineWorker`; the
servers read the buckets from shared memory. Importing this module (`checkpoint_engine.custom_backend_module`) registers the
backend and the rollout `agentloop_local`, which alone takes this wire format.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import ray
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from agentloop.engines.base import Weights
from agentloop.errors import EngineError
from agentloop.verl import replica as replica  # registers the rollout in the worker's process
from agentloop.verl.weights import BUCKETS, buckets, drain

BACKEND = "agentloop_ray"


@CheckpointEngineRegistry.register(BACKEND)
class RayCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """One end of the way. verl calls, in this order and on both sides: `prepare`, `build_topology` (once, in the driver),
    `init_process_group`, `send_weights` and `receive_weights` at the same time, `finalize`."""

    wire_format = BUCKETS

    def __init__(self, bucket_size: int, is_master: bool | None = None) -> None:
        """`bucket_size` in bytes. verl says `is_master` to the trainer's ranks and nothing to replicas' workers."""
        self._bucket_size = bucket_size
        self._is_master = is_master
        self._receivers: list[Any] = []
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()

    def prepare(self) -> Any:
        """The handle of this worker's actor on the replicas' side, `None` on the trainer's."""
        return ray.get_runtime_context().current_actor if self._is_master is None else None

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        receivers = metadata[actor_wg_world_size:]
        trainer = [receivers, *[[] for _ in range(actor_wg_world_size - 1)]]
        return {"receivers": trainer}, {"receivers": [[] for _ in range(rollout_world_size)]}

    def init_process_group(self, receivers: list[Any]) -> None:
        self._receivers = receivers
        self._inbox = asyncio.Queue()

    def finalize(self) -> None:
        self._receivers = []

    async def send_weights(self, weights: Weights, global_steps: int | None = None) -> None:
        """A collective: every rank of the trainer walks `weights`, the first one sends."""
        if not self._is_master:
            await drain(weights)
            return
        try:
            async for bucket in buckets(weights, self._bucket_size):
                await self._send(ray.put(bucket))
        except Exception as error:
            await self._send(EngineError(f"the trainer's weights did not arrive: {type(error).__name__}: {error}"))
            raise
        await self._send(None)

    async def _send(self, item: Any) -> None:
        # In a list, because Ray hands over the content of a reference that is an argument by itself. By the name of verl's
        # method: a worker's actor has no others.
        calls = [receiver.execute_checkpoint_engine.remote("deliver", [item]) for receiver in self._receivers]
        await asyncio.gather(*calls)

    def deliver(self, items: list[Any]) -> None:
        """Called by the trainer: references, `None` after the last, or the error that ended it."""
        for item in items:
            self._inbox.put_nowait(item)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[Any]:
        """References to buckets. Raises `EngineError` if the trainer failed on the way."""
        while (item := await self._inbox.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
