"""Sending a request until a replica has answered it, and ending requests that nobody waits for."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from agentloop.engines.sglang_server.config import SGLangServerConfig
from agentloop.engines.sglang_server.http import Http, ServerLost, ServerRefused
from agentloop.engines.sglang_server.replicas import Bell, Flight, Replica, Replicas
from agentloop.errors import EngineError

logger = logging.getLogger(__name__)

ROUTING_KEY = "X-SMG-Routing-Key"
"""By this header routers with the policy `manual` or `consistent_hashing` send a trajectory to the same worker each time."""
ABORTS_AT_A_TIME = 64
ABORT_AGAIN_S = 0.5
"""An abort that overtakes its request finds nothing to abort, so it is repeated until the request has ended."""
BUSY, INTERNAL = (429, 503), 500
"""Answers after which a server is still a good one: it (or a router) has too much to do, or it failed this one request."""
BACKOFF_S = (0.1, 2.0)
"""First and longest pause before the same replica is tried again."""


class Gate:
    """Holds requests back while there is a reason to."""

    def __init__(self) -> None:
        self._reasons: set[str] = set()
        self._bell = Bell()

    def hold(self, reason: str) -> None:
        self._reasons.add(reason)

    def let(self, reason: str) -> None:
        self._reasons.discard(reason)
        self._bell.ring()

    async def passed(self, call: Call) -> None:
        """Return when nothing holds `call` back, or when it was aborted."""
        while self._reasons and not call.aborted.done():
            await asyncio.wait({self._bell.next(), call.aborted}, return_when=asyncio.FIRST_COMPLETED)


@dataclass(eq=False, slots=True)
class Call:
    """One `generate`, from its beginning to its end, over any number of replicas."""

    trajectory_id: str
    aborted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    flight: Flight | None = None

    def abort(self) -> None:
        if not self.aborted.done():
            self.aborted.set_result(None)


@dataclass(frozen=True, slots=True)
class Landed:
    """An answer, and what was known of the replica's weights when the request was sent."""

    answer: Any
    replica: Replica
    version_before: str | None


class Sender:
    """Sends requests to replicas. A request that is lost with its replica goes to another one: generating has no effect but
    its answer, so the same request may be sent twice, and the first is aborted where it can be reached."""

    def __init__(self, config: SGLangServerConfig, http: Http, replicas: Replicas, gate: Gate) -> None:
        self._config = config
        self._http = http
        self._replicas = replicas
        self._gate = gate
        self._aborts = asyncio.Semaphore(ABORTS_AT_A_TIME)
        self._landings: dict[asyncio.Task[None], str] = {}
        self.resent = 0
        """Requests that were sent again so far."""

    async def send(self, call: Call, body: Mapping[str, Any]) -> Landed | None:
        """The first answer; `None` if the call was aborted before there was one. `body` lacks only the request id.

        Raises `ServerRefused`, and `EngineError` when it was lost too often or no replica could take it for too long."""
        config, avoid = self._config, set[Replica]()
        lost, patience, backoff = 0, config.unavailable_s, BACKOFF_S[0]
        clock = asyncio.get_running_loop()
        while True:
            await self._gate.passed(call)
            if call.aborted.done():
                return None
            replica = self._replicas.place(call.trajectory_id, avoid)
            if replica is not None and replica not in avoid:
                try:
                    return await self._once(call, replica, body)
                except ServerLost as error:
                    if call.aborted.done():
                        return None
                    avoid.add(replica)
                    if error.status not in (*BUSY, INTERNAL):
                        self._replicas.failed(replica, error.why, decisive=error.refused)
                    lost += error.sent and error.status not in BUSY
                    if lost > config.resends:
                        raise EngineError(f"the request was lost {lost} times, the last time by {error}") from error
                    self.resent += 1
                    continue
            if patience <= 0:
                raise EngineError(f"no server took the request within {config.unavailable_s:g} s: {self._replicas.errors()}")
            began = clock.time()
            waited_for = {call.aborted, self._replicas.bell.next()}
            pause = patience if replica is None else min(backoff, patience)
            await asyncio.wait(waited_for, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            patience -= clock.time() - began
            backoff = min(2 * backoff, BACKOFF_S[1])
            avoid.clear()

    async def _once(self, call: Call, replica: Replica, body: Mapping[str, Any]) -> Landed:
        # SGLang aborts every request whose id *begins* with the given one, so ids are of one length.
        rid = uuid.uuid4().hex
        before = replica.version
        answer = asyncio.create_task(
            self._http.post(
                replica.url,
                "/generate",
                {**body, "rid": rid},
                timeout_s=self._config.answer_timeout_s,
                key="key",
                headers={ROUTING_KEY: blake2b(call.trajectory_id.encode(), digest_size=16).hexdigest()},
            )
        )
        answer.add_done_callback(_look_at)
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        flight = call.flight = replica.flights[rid] = Flight(rid, replica, answer, lost, replica.workers)
        try:
            await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() or answer.cancelled():
                raise ServerLost(replica.url, lost.result() if lost.done() else "the request could not be aborted there")
            landed = Landed(_checked(replica.url, answer.result()), replica, before)
        except asyncio.CancelledError:
            self.land(call.trajectory_id, flight)
            raise
        except ServerLost as error:
            if error.sent and error.status is None and not call.aborted.done():
                self.land(call.trajectory_id, flight)
            raise
        finally:
            call.flight = None
            del replica.flights[rid]
        self._replicas.succeeded(replica)
        return landed

    # Ending requests

    def land(self, trajectory_id: str, flight: Flight) -> asyncio.Task[None]:
        """End a request on its server, in the background; see `landed`."""
        task = asyncio.create_task(self._land(flight))
        self._landings[task] = trajectory_id
        task.add_done_callback(lambda task: self._landings.pop(task, None) and None)
        return task

    async def landed(self, trajectory_id: str | None = None) -> None:
        """Wait until what is being ended (of one trajectory) has ended; at most `abort_timeout_s` and one abort's time."""
        tasks = [task for task, owner in self._landings.items() if trajectory_id in (None, owner)]
        if tasks:
            await asyncio.wait(tasks)

    async def _land(self, flight: Flight) -> None:
        clock = asyncio.get_running_loop()
        deadline = clock.time() + self._config.abort_timeout_s
        reached = True
        while True:
            if clock.time() >= deadline or not (reached := await self.abort(flight.workers, [flight.rid])):
                break
            if not flight.answer.done():
                await asyncio.wait({flight.answer}, timeout=min(ABORT_AGAIN_S, max(deadline - clock.time(), 0.0)))
            if flight.answer.done():
                if not _answered(flight.answer):  # the abort has arrived, but perhaps before the request: once more later
                    flight.replica.orphan(flight.rid)
                return
        flight.replica.orphan(flight.rid)
        flight.answer.cancel()
        why = "it did not end in time" if reached else "it cannot be reached"
        logger.warning("request %s was left behind on %s: %s", flight.rid, flight.replica.url, why)

    async def abort(self, workers: Iterable[str], rids: Iterable[str]) -> bool:
        """Abort requests wherever they may be decoding; False if one that may be could not be told."""
        timeout = min(self._config.probe_timeout_s, self._config.abort_timeout_s)

        async def tell(worker: str, rid: str) -> bool:
            async with self._aborts:
                try:
                    await self._http.post(worker, "/abort_request", {"rid": rid}, timeout_s=timeout)
                except ServerLost as error:
                    return error.refused  # nothing runs there any more
                except ServerRefused as error:
                    logger.warning("request %s could not be aborted: %s", rid, error)
                    return False
                return True

        return all(await asyncio.gather(*(tell(worker, rid) for worker in workers for rid in rids)))


def _checked(url: str, answer: Any) -> Any:
    if not isinstance(answer, Mapping) or not isinstance(answer.get("meta_info"), Mapping):
        raise ServerRefused(f"{url}: /generate answered what no SGLang server does: {str(answer)[:80]}")
    return answer


def _answered(answer: asyncio.Task[Any]) -> bool:
    """The server is done with the request, and not only the connection."""
    if answer.cancelled():
        return False
    error = answer.exception()
    return error is None or not isinstance(error, ServerLost) or error.status is not None or error.refused


def _look_at(task: asyncio.Task[Any]) -> None:
    """Keep asyncio from reporting the failure of a task that nobody waits for any more."""
    if not task.cancelled():
        task.exception()
