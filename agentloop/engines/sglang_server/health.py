"""Health checks in the background: finding replicas that hang, and taking back those that returned."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from agentloop.engines.sglang_server.config import SGLangServerConfig
from agentloop.engines.sglang_server.flights import Sender
from agentloop.engines.sglang_server.http import Http, ServerLost, ServerRefused
from agentloop.engines.sglang_server.replicas import Replica, Replicas
from agentloop.engines.sglang_server.workers import rank, router_workers, version
from agentloop.errors import EngineError

logger = logging.getLogger(__name__)


class Prober:
    """Asks every replica every few seconds.

    `/model_info` shows that the HTTP process answers, and tells the weight version. `/health` (of a router: `/readiness`) shows
    that the scheduler behind it generates; it is left out while the servers sleep, since it does so by generating a token.
    """

    def __init__(
        self,
        config: SGLangServerConfig,
        http: Http,
        replicas: Replicas,
        sender: Sender,
        *,
        resting: Callable[[], bool],
        changing: Callable[[], bool],
        catch_up: Callable[[str, str], Awaitable[str]],
    ) -> None:
        """`resting`: the servers generate nothing now. `changing`: their weights are being updated, leave them alone.
        `catch_up(worker, version)`: bring a worker that reports `version` to the weights that the others have; what it has
        then."""
        self._config = config
        self._http = http
        self._replicas = replicas
        self._sender = sender
        self._resting = resting
        self._changing = changing
        self._catch_up = catch_up
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start checking, in the running event loop. Idempotent."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._watch(replica)) for replica in self._replicas.all]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, replica: Replica) -> None:
        while True:
            if not self._changing():
                try:
                    await self.probe(replica)
                except Exception:
                    logger.exception("the health check of %s failed", replica.url)
            await asyncio.sleep(self._config.probe_interval_s)

    async def probe(self, replica: Replica) -> bool:
        """Check one replica once; whether it is up afterwards."""
        try:
            await self._check(replica)
        except (ServerLost, ServerRefused) as error:
            why = error.why if isinstance(error, ServerLost) else str(error)
            self._replicas.failed(replica, why, decisive=isinstance(error, ServerLost) and error.refused)
        except EngineError as error:  # it could not catch up
            self._replicas.failed(replica, str(error), decisive=True)
        else:
            self._replicas.succeeded(replica)
            if not replica.up:
                self._replicas.returned(replica)
        return replica.up

    async def _check(self, replica: Replica) -> None:
        http, config = self._http, self._config
        await self.identify(replica)
        if replica.is_router:
            await http.get(replica.url, "/readiness", timeout_s=config.probe_timeout_s)
            replica.workers = await router_workers(http, replica.url, config.probe_timeout_s) or replica.workers
        versions = await self._versions(replica)
        if not replica.is_router and not self._resting():
            await http.get(replica.url, "/health", timeout_s=config.health_timeout_s)
            versions = await self._versions(replica)  # `/health` waits while generation is paused, for a whole update maybe
        if self._changing():  # an update began meanwhile: what was read may be of before
            return
        told = [
            await self._catch_up(worker, value)
            for worker, value in zip(replica.workers, versions, strict=True)
            if value is not None
        ]
        replica.version = min(told, key=rank) if told else None
        if replica.orphans and not self._resting():  # while generation is paused an abort may do nothing
            orphans, replica.orphans = replica.orphans, []
            if not await self._sender.abort(replica.workers, orphans):
                replica.orphans = orphans + replica.orphans

    async def _versions(self, replica: Replica) -> list[str | None]:
        return await asyncio.gather(*(self._version(worker, alone=not replica.is_router) for worker in replica.workers))

    async def _version(self, worker: str, *, alone: bool) -> str | None:
        try:
            return await version(self._http, worker, self._config.probe_timeout_s)
        except (ServerLost, ServerRefused):
            if alone:
                raise
            return None  # a router goes round a worker that is gone

    async def identify(self, replica: Replica) -> None:
        """Find out whether it is a router, once. Raises `ServerLost`."""
        if replica.is_router is None:
            workers = await router_workers(self._http, replica.url, self._config.probe_timeout_s)
            replica.is_router = workers is not None
            replica.workers = workers or (replica.url,)
