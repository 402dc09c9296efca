"""A trainer that syncs once, prints the version that serves, and kills itself amid the second sync:
`python -m tests.weights.sync_killed_trainer distributed READS URL…` or `… disk READS FOLDER`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from agentloop.engines.base import Engine
from agentloop.engines.sglang_server import SGLangServerEngine
from agentloop.errors import ConfigError
from agentloop.weights import DiskPlan, DistributedPlan, MegatronSGLangShardingManager, SendPlan, ShardSource
from tests.weights.sync_support import SMALL_BUCKET, FailingSource, Trainer, engine_of


class Killing(FailingSource):
    def __init__(self, source: ShardSource, at: int) -> None:
        super().__init__(source, -1, ConfigError(""))
        self._kill_at = at

    def read(self, item: Any) -> Any:
        if len(self.reads) == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(item)


async def main(way: str, reads: int, *places: str) -> None:
    trainer = Trainer()
    engines: list[Engine]
    plan: SendPlan
    if way == "distributed":
        engines = [SGLangServerEngine({"urls": url, "vocab_size": 250}) for url in places]
        plan = DistributedPlan(backend="gloo", timeout_s=20.0)
        for engine in engines:
            await engine.start()  # type: ignore[attr-defined]
    else:
        engines, plan = [engine_of()], DiskPlan(places[0], trainer.config)
    manager = MegatronSGLangShardingManager(engines, trainer.source, plan, bucket_bytes=SMALL_BUCKET)
    await manager.sync()
    print(manager.version, flush=True)
    trainer.step()
    await manager.sync(source=lambda: Killing(trainer.source(), reads))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
