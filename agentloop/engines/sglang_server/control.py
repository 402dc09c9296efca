"""What concerns all servers at once: pausing, weights, memory, the prefix cache."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agentloop.engines import sglang_protocol as protocol
from agentloop.engines.sglang_server.config import SGLangServerConfig, UpdateMode
from agentloop.engines.sglang_server.http import Http, ServerLost, ServerRefused
from agentloop.engines.sglang_server.replicas import Replica, Replicas
from agentloop.engines.sglang_server.workers import rank
from agentloop.errors import EngineError
from agentloop.waiting import to_the_end

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """The weights that every server should have."""

    path: str
    version: int
    load_format: str | None = None


class Control:
    """Requests to every worker of every replica that is up.

    A worker that cannot be reached is ejected with its replica and catches up when it comes back. One that refuses is an
    `EngineError`.
    """

    def __init__(
        self, config: SGLangServerConfig, http: Http, replicas: Replicas, identify: Callable[[Replica], Awaitable[None]]
    ) -> None:
        self._config = config
        self._http = http
        self._replicas = replicas
        self._identify = identify
        self.target: Target | None = None
        """Set by the first update; before it servers keep the weights that they were started with."""
        self.changing = False
        """Weights are being updated."""

    async def flush_cache(self) -> None:
        """Drop the prefix caches. Raises `EngineError` if a server has requests: SGLang flushes none then."""
        await self._each(lambda worker: self._post(worker, "/flush_cache"), "flushing the cache")

    async def pause_generation(self, mode: UpdateMode) -> None:
        await self._each(lambda worker: self._post(worker, "/pause_generation", {"mode": mode}), "pausing")

    async def continue_generation(self) -> None:
        await self._each(lambda worker: self._post(worker, "/continue_generation"), "going on")

    async def release_memory(self, tags: Sequence[str], *, rested: bool) -> None:
        """Generation is paused first, and stays so: others' requests and health checks would end a server that sleeps.
        `rested`: it is paused already."""

        async def release(worker: str) -> None:
            if not rested:
                await self._quieten(worker)
            await self._post(worker, "/release_memory_occupation", {"tags": list(tags)})

        await self._each(release, "freeing memory")

    async def resume_memory(self, tags: Sequence[str], *, awake: bool) -> None:
        await self._each(lambda worker: self._post(worker, "/resume_memory_occupation", {"tags": list(tags)}), "taking memory")
        if awake:
            await self.continue_generation()

    async def update_weights_from_disk(self, target: Target, *, asleep: bool) -> None:
        """Bring all servers to `target`. Afterwards it holds for those that come back, too.

        Raises `EngineError` if no server took it (all keep what they have) or some refused it (those get no more requests).
        """
        self.changing = True
        try:
            answers: dict[str, EngineError | None] = await self._each(
                lambda worker: self._try_update(worker, target, self._config.update_mode, paused=asleep), "the weight update"
            )
            refused = {worker: error for worker, error in answers.items() if error is not None}
            if len(refused) < len(answers):
                self.target = target
            for replica in self._replicas.all:
                if not replica.up or any(worker not in answers for worker in replica.workers):
                    continue
                errors = [refused[worker] for worker in replica.workers if worker in refused]
                if not errors:
                    replica.version = str(target.version)
                elif len(refused) < len(answers):
                    self._replicas.failed(replica, str(errors[0]), decisive=True)
            if refused:
                raise EngineError("; ".join(str(error) for error in refused.values()))
        finally:
            self.changing = False

    async def weight_fingerprints(self) -> dict[str, str]:
        """Of all servers that are up; where they differ, the different ones side by side."""

        async def ask(worker: str) -> list[Any]:
            answer = await self._post(worker, "/weights_checker", {"action": "checksum"})
            return list(answer.get("ranks") or ())

        answers = await self._each(ask, "telling fingerprints of weights")
        return protocol.fingerprints(payload for ranks in answers.values() for payload in ranks)

    async def catch_up(self, worker: str, version: str) -> str:
        """Give a worker that reports `version` the weights of the last update, if it has older ones. Newer ones come from
        somebody else's update and stay. What it has then."""
        while (target := self.target) is not None and rank(version) < target.version:  # it may move on meanwhile
            logger.warning("%s has weights '%s': bringing it to version %d", worker, version, target.version)
            error = await self._try_update(worker, target, "abort", paused=False)
            if error is not None:
                raise EngineError(
                    f"has weights '{version}' and could not be brought to version {target.version}: {error}"
                ) from error
            version = str(target.version)
        return version

    async def _try_update(self, worker: str, target: Target, mode: UpdateMode, *, paused: bool) -> EngineError | None:
        """Pause, update, go on; the error if the worker refused. The update itself must not flush the cache: if a request is
        left, that ends the server (`managers/scheduler_update_weights_mixin.py`)."""
        body = {"model_path": target.path, "weight_version": str(target.version), "flush_cache": False}
        if target.load_format is not None:
            body["load_format"] = target.load_format
        try:
            if not paused and mode == "abort":
                await self._quieten(worker)
            elif not paused:
                await self._post(worker, "/pause_generation", {"mode": mode})
            answer = await self._post(worker, "/update_weights_from_disk", body)
        except ServerRefused as error:
            return error
        finally:
            if not paused:
                await to_the_end(self._post(worker, "/continue_generation"))
        if not (isinstance(answer, dict) and answer.get("success")):
            return EngineError(f"{worker}: the weight update failed: {answer}")
        return None

    async def _quieten(self, worker: str) -> None:
        """Abort everything, wait until the scheduler is idle, which is a step after its last answer, and empty its cache."""
        limit = self._config.control_timeout_s
        await self._post(worker, "/pause_generation", {"mode": "abort"})
        await self._post(worker, f"/flush_cache?timeout={limit / 2:g}")

    async def _post(self, worker: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return await self._http.post(worker, path, body or {}, timeout_s=self._config.control_timeout_s)

    async def _each(self, act: Callable[[str], Awaitable[Any]], what: str) -> dict[str, Any]:
        """`act` on all workers of the replicas that are up, side by side; the results by worker. Those that are lost eject
        their replica. Raises the first `EngineError`, and one if no worker is left."""
        answers: dict[str, Any] = {}
        errors: list[EngineError] = []

        async def one(replica: Replica) -> None:
            try:
                await self._identify(replica)
            except ServerLost as error:
                self._replicas.failed(replica, error.why, decisive=True)
                return
            workers = replica.workers
            results = await asyncio.gather(*map(act, workers), return_exceptions=True)
            for worker, result in zip(workers, results, strict=True):
                if isinstance(result, ServerLost):
                    logger.warning("%s took no part in %s: %s", worker, what, result.why)
                    if not replica.is_router:  # a router goes round a worker that is gone
                        self._replicas.failed(replica, result.why, decisive=True)
                elif isinstance(result, EngineError):
                    errors.append(result)
                elif isinstance(result, BaseException):
                    raise result
                else:
                    answers[worker] = result

        acting = [asyncio.ensure_future(one(replica)) for replica in self._replicas.all if replica.up]
        try:
            await asyncio.gather(*acting)
        finally:  # cancelled, they still have to let their servers go on
            await asyncio.gather(*acting, return_exceptions=True)
        if errors:
            raise errors[0]
        if not answers:
            raise EngineError(f"{what}: no server answers: {self._replicas.errors()}")
        return answers
