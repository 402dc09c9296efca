"""Running SGLang servers as an `Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentloop.config import validate
from agentloop.engines import sglang_protocol as protocol
from agentloop.engines.base import Engine, Generation, Sampling, Weights
from agentloop.engines.sglang_server import weights_on_disk
from agentloop.engines.sglang_server.config import SGLangServerConfig, UpdateMode
from agentloop.engines.sglang_server.control import Control, Target
from agentloop.engines.sglang_server.flights import Call, Gate, Landed, Sender
from agentloop.engines.sglang_server.group import ServerMember
from agentloop.engines.sglang_server.health import Prober
from agentloop.engines.sglang_server.http import Http, ServerLost, ServerRefused
from agentloop.engines.sglang_server.replicas import Replicas
from agentloop.engines.sglang_server.workers import Limits, limits, number, rank, version
from agentloop.errors import EngineError, nearest
from agentloop.trajectory import StopReason
from agentloop.waiting import to_the_end

logger = logging.getLogger(__name__)

TAGS = ("weights", "kv_cache", "cuda_graph")
SPARE_FILES = 128


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """How one replica is, for people and tests."""

    url: str
    up: bool
    in_flight: int
    trajectories: int
    """That live there now."""
    placed: int
    """Trajectories that were ever placed there."""
    failures: int
    """In a row."""
    error: str
    weight_version: str | None


class SGLangServerEngine(Engine):
    """Generates with SGLang servers that run already, over HTTP.

    A trajectory stays with one replica, whose prefix cache holds its tokens; a new one goes to the replica with the least
    load. A replica that dies or hangs is found by failed requests and by health checks, and loses no trajectory: its requests
    are sent to another replica, with the tokens so far. When it answers again, it is brought to the weights of the last
    update and used again. When no replica can take a request for `unavailable_s`, the request fails with an `EngineError`
    that names them all.

    Answers come whole, not streamed: a whole answer is all that the ledger needs, and its cost does not grow with its length
    squared. What an answer does not tell is the version of its first tokens; it is the version that the replica had when the
    request was sent, so an answer during which weights changed is always marked as mixed, and now and then one that only
    waited in the server's queue meanwhile.

    Belongs to one event loop. Works in the background, so it must be closed.
    """

    def __init__(self, config: SGLangServerConfig | Mapping[str, Any]) -> None:
        """Connects to nothing yet. Raises `ConfigError` for settings that are wrong."""
        if not isinstance(config, SGLangServerConfig):
            config = validate(SGLangServerConfig, config, "sglang_server")
        protocol.check_environment(os.environ)
        self.config = config
        self._http = Http(config)
        self._replicas = Replicas(config.urls, config.failures_to_eject)
        self._gate = Gate()
        self._sender = Sender(config, self._http, self._replicas, self._gate)
        self._asleep: set[str] = set()
        self._resting = False
        self._prober = Prober(
            config,
            self._http,
            self._replicas,
            self._sender,
            resting=lambda: self._resting,
            changing=lambda: self._control.changing,
            catch_up=lambda worker, version: self._control.catch_up(worker, version),
        )
        self._control = Control(config, self._http, self._replicas, self._prober.identify)
        self._limits: Limits | None = None
        self._learning = asyncio.Lock()
        self._updating = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._slots = asyncio.Semaphore(_affordable(config.max_connections))
        self._calls: set[Call] = set()
        self._cache_key: str | None = None
        self._folder = weights_on_disk.Folder(config.weights_dir)
        self._closed = False

    # -- what can be asked --------------------------------------------------------------------------------------------

    @property
    def weight_version(self) -> int | None:
        """Of the last update; before it, the lowest number that a replica told."""
        if self._control.target is not None:
            return self._control.target.version
        told = [value for replica in self._replicas.all if (value := number(replica.version)) is not None]
        return min(told) if told else None

    @property
    def replicas(self) -> list[ReplicaStatus]:
        """In the order of `urls`."""
        return [
            ReplicaStatus(r.url, r.up, len(r.flights), r.trajectories, r.placed, r.failures, "" if r.up else r.error, r.version)
            for r in self._replicas.all
        ]

    @property
    def resent(self) -> int:
        """Requests that were sent again so far, after their replica was lost."""
        return self._sender.resent

    async def start(self) -> None:
        """Check every replica once. Raises `EngineError` if none can be used, which a request would do only after
        `unavailable_s`. Optional: the first request does what is needed."""
        self._check_open()
        if not any(await asyncio.gather(*(self._prober.probe(replica) for replica in self._replicas.all))):
            raise EngineError(f"no server can be used: {self._replicas.errors()}")
        await self._learn()

    async def wait_until_up(self) -> None:
        """Wait until a server can be used, for servers that have just been started. Raises `EngineError` after
        `unavailable_s`."""
        self._check_open()
        await self._learn()

    # -- generating ---------------------------------------------------------------------------------------------------

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        self._check_open()
        protocol.check_sampling(sampling)
        own, known = await self._checked(ids)
        body = protocol.generate_request(
            own,
            sampling,
            rid="",
            room=None if known.context is None else known.context - len(own),
            ignore_eos=self.config.ignore_eos,
            routed_experts=self.config.routed_experts,
            cache_key=self._cache_key,
        )
        landed, queue_s = await self._send(trajectory_id, body)
        if landed is None:
            version = self.weight_version
            return Generation([], [] if sampling.log_probs else None, StopReason.ABORTED, version, version, queue_s=queue_s)
        answer = protocol.generation(
            landed.answer,
            log_probs=sampling.log_probs,
            began_version=_began(landed),
            queue_s=queue_s,
            experts_shape=known.experts,
        )
        if self.config.routed_experts and answer.data is None and answer.stop_reason is not StopReason.ABORTED:
            raise EngineError(
                f"{landed.replica.url} answered no routed experts; servers need --enable-return-routed-experts, and a router "
                "may leave the question out (sglang-router 0.3.2 does): name the servers themselves in 'urls'"
            )
        return answer

    async def score(self, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        """At temperature 1 only. One prefill of its own, without the prefix cache, on the replica with the least load."""
        self._check_open()
        protocol.check_score_temperature(temperature)
        own, _ = await self._checked(ids)
        name = f"score-{protocol.new_request_id()}"
        try:
            landed, _ = await self._send(name, protocol.score_request(own, rid=""))
        finally:
            self._replicas.forget(name)
        if landed is None:
            raise EngineError("the scoring was aborted")
        return protocol.scores(landed.answer, own)

    async def _send(self, trajectory_id: str, body: Mapping[str, Any]) -> tuple[Landed | None, float]:
        """The answer, `None` if it was aborted before there was any; and the seconds that the request waited here."""
        clock = asyncio.get_running_loop()
        began = clock.time()
        call = Call(trajectory_id)
        self._calls.add(call)
        try:
            async with self._slots:
                await self._gate.passed(call)
                queue_s = clock.time() - began
                self._check_awake()
                landed = await self._sender.send(call, body)
        finally:
            self._calls.discard(call)
        self._check_open("was")
        if landed is not None:
            told = str(landed.answer["meta_info"].get("weight_version"))
            replica = landed.replica
            if not replica.is_router and rank(told) > rank(replica.version):
                replica.version = told
        return landed, queue_s

    async def release(self, trajectory_id: str) -> None:
        """Also waits until its cancelled requests have ended on their servers."""
        self._replicas.forget(trajectory_id)
        await self._sender.landed(trajectory_id)

    async def abort_all(self) -> None:
        """Aborts the requests of this engine, one by one; those that others sent to the same servers go on."""
        calls = list(self._calls)
        for call in calls:
            call.abort()
            if call.flight is not None:
                self._sender.land(call.trajectory_id, call.flight)
        await self._sender.landed()

    async def pause(self) -> None:
        """Holds new requests back here; what the servers have goes on. `pause_generation` stops the servers."""
        self._gate.hold("pause")

    async def resume(self) -> None:
        self._gate.let("pause")

    async def pause_generation(self, mode: UpdateMode = "abort") -> None:
        """Stop the servers themselves, for all of their users."""
        self._check_open()
        self._resting = True
        await self._control.pause_generation(mode)

    async def continue_generation(self) -> None:
        await self._control.continue_generation()
        self._resting = bool(self._asleep)

    async def flush_cache(self) -> None:
        """Drop the prefix caches. Raises `EngineError` while a server has requests."""
        self._check_open()
        await self._control.flush_cache()

    # -- weights and memory -------------------------------------------------------------------------------------------

    async def update_weights(self, weights: Weights, version: int) -> None:
        """Writes the tensors into `weights_dir`, from which the servers read them; what was written before goes.

        Names and shapes are checked against the checkpoint that the servers were started with, if this process sees it:
        SGLang itself skips names that it does not know and reports success.
        """
        self._check_open()
        known = await self._learn()
        async with self._writing:
            shapes = await asyncio.to_thread(weights_on_disk.shapes, known.model_path)
            folder = await self._folder.write(weights, version, shapes)
            await self.update_weights_from_disk(str(folder), version)
            self._folder.keep_only(folder)

    async def update_weights_from_disk(self, path: str, version: int, *, load_format: str | None = None) -> None:
        """Load a checkpoint, which all servers see under `path`, in place. What becomes of requests that are under way says
        `update_mode`. A replica that is down catches up when it comes back, so `path` must stay until the next update."""
        self._check_open()
        await self._learn()
        async with self._updating:
            self._gate.hold("weights")
            try:
                await self._control.update_weights_from_disk(Target(path, version, load_format), asleep=self._resting)
                if self.config.update_mode != "abort":
                    # The prefix cache cannot be flushed while there are requests: from here on nobody reads what it has.
                    self._cache_key = f"{version}/{protocol.new_request_id()}"
            finally:
                self._gate.let("weights")

    # -- for weights over a process group (group.py) --------------------------------------------------------------------

    def group_member(self) -> ServerMember:
        """How the servers take part in a process group with a trainer."""
        return ServerMember(self, timeout_s=self.config.control_timeout_s)

    async def workers(self) -> list[str]:
        """The addresses of all servers, paused ones included. Raises `EngineError` where one is gone: it would miss the
        weights."""
        self._check_open()
        for replica in self._replicas.all:
            try:
                await self._prober.identify(replica)
            except ServerLost as error:
                raise EngineError(str(error)) from error
        return [worker for replica in self._replicas.all for worker in replica.workers]

    async def ask_version(self) -> int | None:
        """`weight_version`, for which servers that were not heard of yet are asked, paused ones included."""
        self._check_open()
        for replica in self._replicas.all:
            if replica.version is None:
                with contextlib.suppress(ServerLost, ServerRefused):
                    await self._prober.identify(replica)
                    told = [await version(self._http, url, self.config.probe_timeout_s) for url in replica.workers]
                    replica.version = min(told, key=rank)
        return self.weight_version

    async def ask(self, url: str, path: str, body: Mapping[str, Any] | None, *, timeout_s: float) -> Any:
        """One control request, a GET if `body` is `None`. Raises `ServerLost` and `ServerRefused`."""
        if body is None:
            return await self._http.get(url, path, timeout_s=timeout_s, key="admin")
        return await self._http.post(url, path, body, timeout_s=timeout_s)

    def changing(self, on: bool, version: int | None = None) -> None:
        """Weights are being changed from outside, so requests and health checks wait; then they are those of `version`."""
        self._control.changing = on
        if on:
            self._gate.hold("weights")
            return
        if version is not None:
            self._control.target = None
            for replica in self._replicas.all:
                replica.version = str(version)
        self._gate.let("weights")

    async def weight_checksums(self, names: Sequence[str] | None = None) -> dict[str, int]:
        raise EngineError(protocol.NO_CHECKSUMS)

    async def weight_fingerprints(self) -> dict[str, str]:
        """By the servers' own weight checkers (`POST /weights_checker`, with the admin key), of all that are up; see
        `SGLangEngine.weight_fingerprints`. Where servers differ, the different ones side by side."""
        self._check_awake()
        await self._learn()
        return await self._control.weight_fingerprints()

    async def sleep(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Aborts every request on the servers, of others too, and frees GPU memory; they need `--enable-memory-saver`."""
        self._check_open()
        self._check_tags(tags)
        new = [tag for tag in tags if tag not in self._asleep]
        if not new:
            return
        rested = bool(self._asleep)
        self._gate.hold("sleep")
        self._resting = True
        try:
            await self.abort_all()
            await self._control.release_memory(new, rested=rested)
            self._asleep.update(new)
        except BaseException:
            if not rested:
                with contextlib.suppress(EngineError):
                    await to_the_end(self._control.continue_generation())
            raise
        finally:
            self._resting = bool(self._asleep)
            self._gate.let("sleep")

    async def wake(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        self._check_tags(tags)
        mine = [tag for tag in tags if tag in self._asleep]
        if not mine:
            return
        left = self._asleep.difference(mine)
        await self._control.resume_memory(mine, awake=not left)
        self._asleep = left
        self._resting = bool(left)

    async def close(self) -> None:
        """Aborts what this engine has under way. The servers go on."""
        if self._closed:
            return
        self._closed = True
        self._replicas.bell.ring()
        await self._prober.stop()
        await self.abort_all()
        await self._sender.landed()
        await self._http.close()
        self._folder.clear()

    # -- small parts --------------------------------------------------------------------------------------------------

    def _check_open(self, verb: str = "is") -> None:
        if self._closed:
            raise EngineError(f"the engine {verb} closed")

    def _check_awake(self) -> None:
        self._check_open("was")
        if self._asleep:
            raise EngineError(f"the engine sleeps ({', '.join(sorted(self._asleep))})")

    def _check_tags(self, tags: Sequence[str]) -> None:
        for tag in tags:
            if tag not in TAGS:
                raise EngineError(f"unknown tag '{tag}': {nearest(tag, TAGS)}")

    async def _checked(self, ids: Sequence[int]) -> tuple[list[int], Limits]:
        self._check_awake()
        known = await self._learn()
        vocabulary = self.config.vocab_size or known.vocabulary
        return protocol.check_input(ids, max_input=known.max_input, vocabulary=vocabulary), known

    async def _learn(self) -> Limits:
        """The model's limits, from the first server that is up; waits for one. Raises `EngineError` if none comes up."""
        self._prober.start()
        clock = asyncio.get_running_loop()
        deadline = clock.time() + self.config.unavailable_s
        while self._limits is None:
            self._check_open("was")
            replica = next((replica for replica in self._replicas.all if replica.up), None)
            if replica is None:
                await asyncio.wait({self._replicas.bell.next()}, timeout=max(deadline - clock.time(), 0.0))
                self._check_open("was")
                if clock.time() >= deadline:
                    waited = self.config.unavailable_s
                    raise EngineError(f"no server can be used, waited {waited:g} s: {self._replicas.errors()}")
                continue
            async with self._learning:
                if self._limits is None:
                    try:
                        self._limits = await limits(self._http, replica.workers[0], self.config.probe_timeout_s)
                    except ServerLost as error:
                        self._replicas.failed(replica, error.why, decisive=True)
        return self._limits


def _began(landed: Landed) -> int | None:
    """The version when the request was sent, as `Generation.min_weight_version` wants it; -1 if the server gave it no number
    and the answer is of a later one."""
    before, after = landed.version_before, str(landed.answer["meta_info"].get("weight_version"))
    if before is None or before == after:
        return None
    return rank(before)


def _affordable(connections: int) -> int:
    """No more connections than half of the files that this process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max((soft - SPARE_FILES) // 2, 1) if soft != resource.RLIM_INFINITY else connections
    if connections > most:
        logger.warning("at most %d requests at a time: the process may open %d files (ulimit -n)", most, soft)
    return min(connections, most)
