"""The weight sync into a worker group of rollout workers: real Ray actors, of which one is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from agentloop.errors import ConfigError, EngineError
from agentloop.verl.worker_group_engine import WorkerGroupEngine
from agentloop.weights import (
    Coordinates,
    HfFolder,
    Layout,
    MegatronSGLangShardingManager,
    Shard,
    ShardSource,
    SyncFailed,
    TensorsPlan,
    WeightsRefused,
    read_shape,
    to_shard,
)
from agentloop.weights.check import Canary
from agentloop.weights.check_transformers import published, reference
from tests.verl.assets import QUICKSTART
from tests.verl.test_rollout_worker import cluster, conversations, start
from tests.weights.sync_support import FailingSource, Report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
__all__ = ["cluster", "start"]
TEXTS = [[ids % 200 for ids in range(seed, 24 * 7 + seed, 7)] for seed in range(3)]


class Trainer:
    """The quickstart's model in two pipeline stages, and as transformers has it."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        self.shape, self.layout = read_shape(QUICKSTART), Layout(tp=2)
        weights = HfFolder(QUICKSTART)
        places = [Coordinates(tp=rank) for rank in range(2)]
        self.shards = [
            Shard(at, {k: t.clone() for k, t in to_shard(weights, self.layout, at, self.shape).items()}) for at in places
        ]
        self.model = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype="float32").eval()
        self.score = reference(self.model)

    def step(self) -> None:
        for shard in self.shards:
            for tensor in shard.tensors.values():
                tensor.mul_(1.01)
        seen = set()
        for _, tensor in published(self.model):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                tensor.mul_(1.01)

    def source(self) -> ShardSource:
        return ShardSource(self.shards, self.layout, self.shape)


class Refusing(Canary):
    """The canary, which is made to refuse once."""

    refuse = False

    async def check(self, *args: Any, **more: Any) -> Any:
        report = await super().check(*args, **more)
        if self.refuse:
            self.refuse = False
            return Report(False, "planted")
        return report


@pytest.fixture
def group(start: Any) -> Iterator[Any]:
    group = start(2, tensor_model_parallel_size=1)
    group.init_model()
    yield group
    start.free()


def test_rollout_workers_have_the_trainers_weights_or_refuse(group: Any, start: Any) -> None:
    trainer = Trainer()
    canary = Refusing(TEXTS, trainer.score, tolerance="float32")
    manager = MegatronSGLangShardingManager([WorkerGroupEngine(group)], trainer.source, TensorsPlan(), check=canary)
    for version in (1, 2):
        trainer.step()
        with manager:
            output = group.generate_sequences(conversations())
            assert {*output.non_tensor_batch["max_global_steps"]} == {version}

    trainer.step()

    def broken() -> FailingSource:
        return FailingSource(trainer.source(), 9, ConfigError("cut short"))

    with pytest.raises(SyncFailed, match=r"cut short; version 2 goes on serving$"):
        manager.run(manager.sync(source=broken))
    assert {*group.generate_sequences(conversations()).non_tensor_batch["max_global_steps"]} == {2}

    canary.refuse = True
    with pytest.raises(WeightsRefused, match="planted"):
        manager.run(manager.sync())
    for _ in range(2):
        with pytest.raises(EngineError, match="not those that the trainer has"):
            group.generate_sequences(conversations())
        with pytest.raises(SyncFailed, match="cut short"):
            manager.run(manager.sync(source=broken))
    with manager:
        assert {*group.generate_sequences(conversations()).non_tensor_batch["max_global_steps"]} == {3}

    os.kill(group.where()[1].pid, signal.SIGKILL)
    with pytest.raises(SyncFailed, match=r"rollout rank 1 of 2 is dead.*no engine serves") as caught:
        manager.run(manager.sync())
    assert "\n" not in str(caught.value)
    group.shutdown()
    start.free()
    new = start(2, tensor_model_parallel_size=1)
    new.init_model()
    manager.replace("0", WorkerGroupEngine(new))
    with manager:
        assert {*new.generate_sequences(conversations()).non_tensor_batch["max_global_steps"]} == {4}
    manager.run(manager.close())
