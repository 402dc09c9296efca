"""What happens to trainers, disks and checkpoints amid a sync: one sentence each, no half-updated engine, and a restart that
goes on."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentloop.engines.local import LocalEngine
from agentloop.weights import (
    CheckpointSource,
    DiskPlan,
    HfTensors,
    MegatronSGLangShardingManager,
    RestartPlan,
    SyncFailed,
    TensorsPlan,
    write_checkpoint,
)
from tests.engines.peers import ROOT
from tests.weights.sync_support import SMALL_BUCKET, Trainer, answers, engine_of, served, start_local

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Checkpoints


def checkpoint(trainer: Trainer, path: Path) -> Path:
    write_checkpoint(path, HfTensors(trainer.tensors()), trainer.shape, mtp=False)
    return path


def cut_short(path: Path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-5000])


def damaged(path: Path) -> None:
    """Its size is right, and what lies in the middle is not: noticed when half of the weights are on their way."""
    file = path / "__0_0.distcp"
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes(30_000) + whole[middle + 30_000 :])


def gone(path: Path) -> None:
    shutil.rmtree(path)


def of_another_architecture(path: Path) -> None:
    shutil.rmtree(path)
    checkpoint(Trainer("qwen3_moe"), path)


SPOILT = {
    cut_short: "__0_0.distcp: is cut short",
    damaged: "cannot be read at byte",
    gone: "is no folder",
    of_another_architecture: "deepseek_v3",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("plan", ["tensors", "disk"])
async def test_a_checkpoint_that_cannot_be_taken_is_named(plan: str, spoil: object, tmp_path: Path) -> None:
    trainer = Trainer()
    path = checkpoint(trainer, tmp_path / "checkpoint")
    engine = engine_of()
    manager = MegatronSGLangShardingManager(
        [engine],
        lambda: CheckpointSource(path, trainer.shape, mtp=False),
        TensorsPlan() if plan == "tensors" else DiskPlan(tmp_path / "sync", trainer.config),
        bucket_bytes=SMALL_BUCKET,
    )
    await manager.sync()
    assert served(engine) == trainer.checksums()
    trainer.step()
    shutil.rmtree(path)
    checkpoint(trainer, path)
    before = served(engine)
    spoil(path)  # type: ignore[operator]
    with pytest.raises(SyncFailed) as caught:
        await manager.sync()
    told = str(caught.value)
    assert SPOILT[spoil] in told  # type: ignore[index]
    assert told.startswith("the sync to version 2 failed: ")
    assert told.endswith("; version 1 goes on serving")
    assert str(path) in told
    assert "\n" not in told
    assert served(engine) == before
    assert await answers(manager.engine) == 1
    shutil.rmtree(path, ignore_errors=True)
    checkpoint(trainer, path)
    await manager.sync()
    assert served(engine) == trainer.checksums()
    assert await answers(manager.engine) == 2
    await engine.close()


# The disk


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """A disk that is full after so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("plan", ["disk", "restart"])
async def test_a_disk_that_fills(plan: str, tmp_path: Path) -> None:
    trainer, home = Trainer(), tmp_path / "sync"
    way = DiskPlan(home, trainer.config) if plan == "disk" else RestartPlan(home, trainer.config, start_local)
    manager = MegatronSGLangShardingManager([engine_of()], trainer.source, way, bucket_bytes=SMALL_BUCKET)
    await manager.sync()
    before = served(manager.engine.engine)
    trainer.step()
    for limit in (1_000, 39_000):
        with files_of_at_most(limit), pytest.raises(SyncFailed) as caught:
            await manager.sync()
        told = str(caught.value)
        assert f"{home / 'version-2'}: cannot be written (" in told
        assert "nothing was left there; version 1 goes on serving" in told
        assert "\n" not in told
        assert names_in(home) == ["version-1"]
        assert served(manager.engine.engine) == before
        assert await answers(manager.engine) == 1
    await manager.sync()
    assert served(manager.engine.engine) == trainer.checksums()
    assert (await answers(manager.engine), names_in(home)) == (2, ["version-2"])
    await manager.engine.close()


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    trainer = Trainer()
    (tmp_path / "file").write_text("")
    manager = MegatronSGLangShardingManager([engine_of()], trainer.source, DiskPlan(tmp_path / "file" / "sync", trainer.config))
    with pytest.raises(SyncFailed, match=r"cannot be written .*version 0 goes on serving"):
        await manager.sync()
    assert await answers(manager.engine) == 0
    await manager.engine.close()


# Killed trainers


@pytest.mark.parametrize(
    "reads", [60, pytest.param(2, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)], ids=str
)
async def test_a_trainer_that_is_killed_goes_on_from_the_last_whole_folder(reads: int, tmp_path: Path) -> None:
    home = tmp_path / "sync"
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "tests.weights.sync_killed_trainer", "disk", str(reads), str(home)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (ran.returncode, ran.stdout) == (-signal.SIGKILL, "1\n")
    left = names_in(home)
    assert len(left) == 2
    assert (left[0].endswith(".partial"), left[1]) == (True, "version-1")
    trainer = Trainer()
    engine = LocalEngine.load(str(home / "version-1"), max_slots=4, stop_token_ids=(), weight_version=1)
    assert served(engine) == trainer.checksums()
    trainer.step()
    manager = MegatronSGLangShardingManager([engine], trainer.source, DiskPlan(home, trainer.config), bucket_bytes=SMALL_BUCKET)
    await manager.sync()
    assert served(engine) == trainer.checksums()
    assert (await answers(manager.engine), names_in(home)) == (2, ["version-2"])
    await engine.close()


def ranks(dies: int, path: Path) -> list[list[str]]:
    """What the two ranks of a trainer printed."""
    path.mkdir(exist_ok=True)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.weights.sync_ranks", str(rank), str(path / "store"), str(dies)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        lines = [process.communicate(timeout=120)[0].splitlines() for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, process in enumerate(started):
        assert process.returncode == (-signal.SIGKILL if rank == dies else 0)
    return lines


def test_all_ranks_of_a_trainer_learn_how_a_sync_went(tmp_path: Path) -> None:
    first, second = ranks(1, tmp_path)
    unreadable = "the sync to version 2 failed: a tensor cannot be converted; version 1 goes on serving"
    engine = "engine '0' did not take the weights: a process of the engine died"
    broken = f"the sync to version 2 failed: {engine}; version 1 goes on serving"
    unscored = "the sync to version 2 failed: the trainer cannot score; version 1 goes on serving"
    shared = ["first: landed", f"unreadable: {unreadable}", f"engine: {broken}", f"unscored: {unscored}", "second: landed"]
    assert second == shared
    assert first[:10:2] == shared
    old, new = "serves {}, old weights", "serves {}, new weights"
    assert first[1:10:2] == [new.format(1), old.format(1), old.format(1), old.format(1), new.format(2)]
    assert first[10].startswith("killed: the sync to version 3 failed: ")
    assert first[10].endswith("; version 2 goes on serving")
    assert first[11] == old.format(2)


@pytest.mark.slow
def test_a_rank_whose_first_rank_was_killed_says_so(tmp_path: Path) -> None:
    _, second = ranks(0, tmp_path)
    assert second[-1].startswith("killed: the sync failed: ")
    assert " rank" in second[-1]
    assert " is gone (" in second[-1]
