"""A thousand syncs: nothing grows, and no version is skipped."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import psutil
import pytest

from agentloop.weights import DiskPlan, MegatronSGLangShardingManager, SendPlan, TensorsPlan
from tests.weights.sync_support import ExactCheck, Trainer, answers, engine_of, served

GROWTH_BYTES = 24 << 20
"""Of the process, over hundreds of syncs of a model of 1.2 MB: one that kept its weights would grow by hundreds of MB."""


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "syncs"), [("tensors", 1000), ("disk", 60)])
async def test_syncs_leave_nothing_behind(plan: str, syncs: int, tmp_path: Path) -> None:
    trainer, engine = Trainer(), engine_of()
    way: SendPlan = TensorsPlan() if plan == "tensors" else DiskPlan(tmp_path / "sync", trainer.config)
    manager = MegatronSGLangShardingManager([engine], trainer.source, way, bucket_bytes=400_000, check=ExactCheck())
    process = psutil.Process()

    async def some(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            first = manager.version
            trainer.shards[0].tensors["embedding.word_embeddings.weight"].add_(0.001)
            async with manager:
                assert manager.version == first + 1
                if manager.version % 50 == 0:
                    assert await answers(manager.engine) == manager.version
        gc.collect()
        return process.memory_info().rss, process.num_fds(), threading.active_count()

    memory, files, threads = await some(syncs // 5)
    for _ in range(4):
        now = await some(syncs // 5)
        assert now[1] <= files
        assert now[2] <= threads
        assert now[0] - memory < GROWTH_BYTES
    assert manager.version == syncs
    assert served(engine) == manager.sent
    await engine.close()
