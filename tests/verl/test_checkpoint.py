"""Weights through Ray's object store, from two ranks of a trainer in this process to replicas' workers in actors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from agentloop.verl.checkpoint import RayCheckpointEngine
from agentloop.verl.weights import BUCKETS


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Any]]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False)

    class Worker:
        """As `CheckpointEngineWorker`: an asynchronous actor that calls its engine by a method's name."""

        def __init__(self) -> None:
            self.engine = RayCheckpointEngine(bucket_size=1 << 20)

        def execute_checkpoint_engine(self, method: str, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.engine, method)(*args, **kwargs)

        async def receive(self) -> dict[str, list[float]]:
            assert self.engine.wire_format == BUCKETS
            refs = [ref async for ref in self.engine.receive_weights()]
            named = [pair for ref in refs for pair in (await ref).tensors()]
            return {"buckets": [len(refs)], **{name: tensor.tolist() for name, tensor in named}}

    yield [ray.remote(Worker).options(num_cpus=0).remote() for _ in range(2)]
    ray.shutdown()


def connect(workers: list[Any]) -> tuple[RayCheckpointEngine, RayCheckpointEngine]:
    """Two ranks of the trainer, connected as verl's `CheckpointEngineManager` does it."""
    ranks = RayCheckpointEngine(bucket_size=1024, is_master=True), RayCheckpointEngine(bucket_size=1024, is_master=False)
    metadata = [rank.prepare() for rank in ranks]
    metadata += ray.get([worker.execute_checkpoint_engine.remote("prepare") for worker in workers])
    trainer, replicas = RayCheckpointEngine.build_topology(2, len(workers), metadata)
    for rank, receivers in zip(ranks, trainer["receivers"], strict=True):
        rank.init_process_group(receivers)
    ray.get(
        [
            worker.execute_checkpoint_engine.remote("init_process_group", receivers=receivers)
            for worker, receivers in zip(workers, replicas["receivers"], strict=True)
        ]
    )
    return ranks


async def test_every_replica_gets_every_weight_once(workers: list[Any]) -> None:
    weights = {name: torch.full((200,), float(index)) for index, name in enumerate("abc")}
    seen: list[str] = []

    def walk() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights.items():
            seen.append(name)
            yield name, tensor

    for _ in range(2):  # verl connects anew for each update
        first, second = connect(workers)
        calls = [worker.receive.remote() for worker in workers]
        await second.send_weights(walk())
        await first.send_weights(walk())
        for got in [await call for call in calls]:
            assert got.pop("buckets") == [3]  # 800 bytes each
            assert got == {name: tensor.tolist() for name, tensor in weights.items()}
        first.finalize()
    assert seen == list("abcabc") * 2  # walking is a collective: also the rank that sends nothing does


async def test_a_trainer_that_fails_on_the_way_is_an_error_at_the_replicas(workers: list[Any]) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(400)
        raise MemoryError("no room for b")

    first, _ = connect(workers)
    call = workers[0].receive.remote()
    with pytest.raises(MemoryError):
        await first.send_weights(broken())
    with pytest.raises(ray.exceptions.RayTaskError, match="did not arrive: MemoryError: no room for b"):
        await call
