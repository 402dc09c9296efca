"""Weights over a process group between a trainer and servers in processes of their own, which are killed now and then."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agentloop.engines.local import LocalEngine
from agentloop.engines.sglang_server import SGLangServerEngine
from agentloop.errors import ConfigError
from agentloop.weights import (
    Bucket,
    DistributedPlan,
    MegatronSGLangShardingManager,
    SyncFailed,
    WeightsRefused,
    write_folder,
)
from tests.engines.peers import ROOT, Peer, running
from tests.weights.models import TOKENS
from tests.weights.sync_support import SMALL_BUCKET, FailingSource, Trainer, answers, engine_of

SETTINGS: dict[str, Any] = {
    "probe_interval_s": 0.2,
    "connect_timeout_s": 2.0,
    "control_timeout_s": 20.0,
    "unavailable_s": 20.0,
    "abort_timeout_s": 2.0,
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[Peer]]:
    """Two servers of the untrained model."""
    trainer = Trainer()
    folder = tmp_path_factory.mktemp("model") / "hf"
    write_folder(folder, [Bucket(tuple(trainer.tensors().items()))], trainer.config)
    with running(2, "--model-path", str(folder), "--weight-version", "0", "--max-running-requests", "4") as peers:
        yield peers


@pytest.fixture
async def engines(peers: Sequence[Peer]) -> AsyncIterator[list[SGLangServerEngine]]:
    made = [SGLangServerEngine({"urls": peer.url, "vocab_size": 250, **SETTINGS}) for peer in peers]
    yield made
    for engine in made:
        await engine.close()


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


def manager_of(trainer: Trainer, engines: Sequence[Any]) -> MegatronSGLangShardingManager:
    plan = DistributedPlan(backend="gloo", timeout_s=20.0)
    return MegatronSGLangShardingManager(engines, trainer.source, plan, bucket_bytes=SMALL_BUCKET)


async def is_the_trainers(manager: MegatronSGLangShardingManager, trainer: Trainer) -> None:
    """Every engine scores as a local one does that has the trainer's weights, and answers with the manager's version."""
    reference = engine_of(trainer.name)
    await reference.update_weights(trainer.tensors().items(), 1)
    wanted = await reference.score(TOKENS[0])
    await reference.close()
    for guard in manager.engines.values():
        assert await guard.score(TOKENS[0]) == pytest.approx(wanted, abs=1e-5)
        assert await answers(guard) == manager.version == guard.engine.weight_version


async def generates(url: str) -> bool:
    """Whether a server answers somebody who comes around the manager."""
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1}}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.5)) as session,
            session.post(f"{url}/generate", json=body) as response,
        ):
            return response.status == 200
    except TimeoutError:
        return False


async def test_servers_have_the_trainers_weights(engines: list[SGLangServerEngine], trainer: Trainer) -> None:
    manager = manager_of(trainer, engines)
    first = manager.version
    for number in (1, 2, 3):
        trainer.step()
        report = await manager.sync()
        assert report is not None
        assert (report.version, report.plan) == (first + number, "distributed")
        assert report.buckets > 3
        await is_the_trainers(manager, trainer)
    await manager.close()


async def test_a_source_that_fails_before_anything_was_sent_leaves_the_old_version(
    engines: list[SGLangServerEngine], trainer: Trainer
) -> None:
    manager = manager_of(trainer, engines)
    await manager.sync()
    other = Trainer()
    other.step()
    broken = FailingSource(other.source(), 1, ConfigError("no such file"))
    with pytest.raises(SyncFailed, match=rf"no such file; version {manager.version} goes on serving$"):
        await manager.sync(source=lambda: broken)
    await is_the_trainers(manager, trainer)
    await manager.close()


async def test_a_source_that_fails_half_way_leaves_engines_that_answer_nobody(
    engines: list[SGLangServerEngine], trainer: Trainer
) -> None:
    manager = manager_of(trainer, engines)
    await manager.sync()
    before = manager.version
    trainer.step()
    broken = FailingSource(trainer.source(), 60, ConfigError("cut short"))
    with pytest.raises(SyncFailed, match="cut short; no engine serves until a sync lands"):
        await manager.sync(source=lambda: broken)
    assert len(broken.reads) == len(broken.items)
    for guard, engine in zip(manager.engines.values(), engines, strict=True):
        with pytest.raises(WeightsRefused, match="cut short"):
            await answers(guard)
        assert not await generates(engine.config.urls[0])
    await manager.sync()
    assert manager.version == before + 1
    await is_the_trainers(manager, trainer)
    await manager.close()


@pytest.mark.slow
async def test_a_server_that_is_killed_amid_a_sync(
    peers: Sequence[Peer], engines: list[SGLangServerEngine], trainer: Trainer
) -> None:
    """The others' weights are of both, so none answers; when it is back, a sync brings all to one version."""
    manager = manager_of(trainer, engines)
    await manager.sync()
    before = manager.version
    trainer.step()

    class Killing(FailingSource):
        def read(self, item: Any) -> Any:
            if len(self.reads) == 60:
                peers[1].kill()
            return super().read(item)

    with pytest.raises(SyncFailed, match="no engine serves until a sync lands"):
        await manager.sync(source=lambda: Killing(trainer.source(), -1, ConfigError("")))
    for guard in manager.engines.values():
        with pytest.raises(WeightsRefused):
            await answers(guard)
    assert not await generates(engines[0].config.urls[0])
    with pytest.raises(SyncFailed, match="the sync to version"):
        await manager.sync()  # it is still gone
    await asyncio.to_thread(peers[1].start)
    await manager.sync()
    assert manager.version == before + 1
    await is_the_trainers(manager, trainer)
    await manager.close()


@pytest.mark.slow
async def test_a_trainer_that_is_killed_amid_a_sync(engines: list[SGLangServerEngine], trainer: Trainer) -> None:
    """Servers with half of an update answer nobody; the trainer that is started again goes on with the next version."""
    urls = [engine.config.urls[0] for engine in engines]
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "tests.weights.sync_killed_trainer", "distributed", "60", *urls],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ran.returncode == -signal.SIGKILL
    served = int(ran.stdout.split()[-1])
    assert [await generates(url) for url in urls] == [False, False]
    trainer.step()
    manager = manager_of(trainer, engines)
    await manager.sync()
    assert manager.version == served + 1
    await is_the_trainers(manager, trainer)
    await manager.close()


async def test_engines_that_cannot_are_named(trainer: Trainer, tmp_path: Path) -> None:
    engine = engine_of()
    manager = manager_of(trainer, [engine])
    with pytest.raises(
        SyncFailed, match=r"engine '0' \(LocalEngine\) takes no weights over a process group.*version 0 goes on"
    ):
        await manager.sync()
    assert await answers(manager.engine) == 0
    with pytest.raises(ConfigError, match="'mpi' carries no weights"):
        DistributedPlan(backend="mpi")
    assert isinstance(manager.engine.engine, LocalEngine)
    await engine.close()
