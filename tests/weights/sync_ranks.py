"""One of two trainer ranks whose weights are gathered for a sync: `python -m tests.weights.sync_ranks RANK STORE DIES`. DIES is
the rank that kills itself at the end, amid a sync. Prints what happened, a line each."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from agentloop.errors import ConfigError, EngineError
from agentloop.weights import GatheredSource, Item, MegatronSGLangShardingManager, Source, SyncFailed, TensorsPlan
from tests.weights.sync_support import LAYOUT, SMALL_BUCKET, Breaking, Report, Trainer, answers, engine_of, served


class Dying:
    """A gathered source of which one rank kills itself, or cannot read a tensor."""

    def __init__(self, source: Source, *, kill_at: int = -1, fail_at: int = -1) -> None:
        self.shape, self.items, self.origin = source.shape, source.items, source.origin
        self._source, self._kill_at, self._fail_at, self._reads = source, kill_at, fail_at, 0

    def read(self, item: Item) -> Any:
        self._reads += 1
        if self._reads == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        tensor = self._source.read(item)
        if self._reads == self._fail_at:
            raise ConfigError("a tensor cannot be converted")
        return tensor


class Asking:
    """A check for which the trainer's ranks add something up, and which the first one fails at when it is told to."""

    def __init__(self, rank: int) -> None:
        self.rank, self.fails = rank, False

    async def expected(self) -> int:
        box: list[Any] = [None, None]
        dist.all_gather_object(box, self.rank)
        if self.fails and self.rank == 0:
            raise EngineError("the trainer cannot score")
        return sum(box)

    async def check(self, engine: Any, version: int, sent: Any, *, expected: int) -> Report:
        return Report(expected == 1, f"it is {expected}")


async def main(rank: int, store: str, dies: int) -> None:
    dist.init_process_group("gloo", f"file://{store}", world_size=2, rank=rank, timeout=timedelta(seconds=30))
    trainer = Trainer()
    shards = [shard for shard in trainer.shards if shard.at.pp == rank]
    engine = Breaking(engine_of(), 10**6, mixes=False)

    def source(**dying: int) -> Source:
        return Dying(GatheredSource(shards, LAYOUT, trainer.shape), **dying)

    manager = MegatronSGLangShardingManager(
        [engine] if rank == 0 else [],
        source,
        TensorsPlan(),
        bucket_bytes=SMALL_BUCKET,
        group=dist.group.WORLD,
        check=(check := Asking(rank)),
    )

    async def sync(what: str, **dying: int) -> None:
        trainer.step()
        try:
            await manager.sync(source=lambda: source(**dying))
        except SyncFailed as error:
            print(f"{what}: {error}", flush=True)
        else:
            print(f"{what}: landed", flush=True)
        if rank == 0:
            same = served(engine.inner) == trainer.checksums()
            print(f"serves {await answers(manager.engine)}, {'new' if same else 'old'} weights", flush=True)

    await sync("first")
    await sync("unreadable", fail_at=40 if rank == 0 else -1)
    engine.after = 10
    await sync("engine")
    engine.after = 10**6
    check.fails = True
    await sync("unscored")
    check.fails = False
    await sync("second")
    if dies >= 0:
        await sync("killed", kill_at=40 if rank == dies else -1)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
