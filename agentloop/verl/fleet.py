"""The rollout workers of a run, and what becomes of the groups of one that dies.

verl's V1 trainer polls TransferQueue until every group has ended, and a killed worker ends none of its own. So the trainer's
process holds a call to each worker that never returns: when it fails the worker is gone, its unfinished groups are marked
`failure`, and later groups go to the workers that are left.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from time import sleep
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

if TYPE_CHECKING:
    from agentloop.trajectory import Trajectory
    from agentloop.verl.metrics import Summary
    from agentloop.verl.worker import GroupRequest

logger = logging.getLogger(__name__)

UNFINISHED = ("pending", "running")
"""Statuses that verl's replay buffer waits for."""
LOOK_AGAIN_S = 1.0


class Fleet:
    """Ray actors of `RolloutWorker`, called from one thread."""

    def __init__(self, actors: Sequence[Any], queue: Any = None) -> None:
        """Comes back when every worker is ready; what went wrong in one is raised. `queue`: TransferQueue's module, if the
        trainer uses it."""
        self._queue = queue
        pids = ray.get([actor.ready.remote() for actor in actors])
        self._names = [f"rollout worker {index} (pid {pid})" for index, pid in enumerate(pids)]
        self._alive = dict(enumerate(actors))
        self._groups: dict[int, dict[str, str]] = {index: {} for index in self._alive}
        """By worker: the partition of each group that had not ended when the worker was last handed some."""
        self._last_death = ""
        self._lock = threading.Lock()
        """Over the three above, which a watcher's thread changes."""
        self._watchers: dict[int, Future[Any]] = {}
        self._next = 0
        for index in list(self._alive):
            self._watch(index)

    # -- V1 -------------------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Hand groups out and return. A group on a worker that dies is marked `failure` in TransferQueue, now or later.

        Round-robin over all calls: a batch of one group (a refill) does not always go to the first worker. RuntimeError if
        no worker is left."""
        shares: dict[int, list[GroupRequest]] = {}
        with self._lock:
            living = list(self._living().items())
            for request in requests:
                index = living[self._next % len(living)][0]
                self._next += 1
                shares.setdefault(index, []).append(request)
                self._groups[index][request.sample.uid] = request.partition
        actors = dict(living)
        calls = {index: actors[index].submit.remote(share) for index, share in shares.items()}
        for index, call in calls.items():
            try:
                unfinished = ray.get(call)
            except RayActorError as error:
                # With a broken connection nobody knows whether the groups have arrived, so the worker goes.
                ray.kill(actors[index])
                self._lost(index, error)
                continue
            with self._lock:
                if index in self._groups:
                    self._groups[index] = {uid: p for uid, p in self._groups[index].items() if uid in unfinished}
        with self._lock:
            self._living()

    # -- legacy ---------------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GroupRequest]) -> tuple[list[list[Trajectory]], list[Summary]]:
        """As `RolloutWorker.generate`, over all workers. RuntimeError as soon as one dies: the legacy trainer needs every
        row."""
        with self._lock:
            living = list(self._living().items())
        calls = [actor.generate.remote(requests[place :: len(living)]) for place, (_, actor) in enumerate(living)]
        try:
            parts = ray.get(calls)
        except RayActorError as error:
            name = next((self._names[index] for index, actor in living if actor._actor_id.hex() == error.actor_id), "a worker")
            raise RuntimeError(_died(name, error)) from error
        groups: list[list[Trajectory]] = [[] for _ in requests]
        for place, (found, _) in enumerate(parts):
            groups[place :: len(living)] = found
        return groups, [summary for _, summaries in parts for summary in summaries]

    # -- deaths ---------------------------------------------------------------------------------------------------------

    def _living(self) -> dict[int, Any]:
        if not self._alive:
            raise RuntimeError(f"no rollout worker is left, all {len(self._names)} have died; the last: {self._last_death}")
        return self._alive

    def _watch(self, index: int) -> None:
        with self._lock:
            actor = self._alive.get(index)
        if actor is None:
            return
        watcher = actor.watch.remote().future()
        self._watchers[index] = watcher  # the call's reference must live
        # Ray's own thread runs the callback and must not be kept.
        watcher.add_done_callback(
            lambda done: threading.Thread(target=self._ended, args=(index, done.exception()), daemon=True).start()
        )

    def _ended(self, index: int, error: BaseException | None) -> None:
        if not ray.is_initialized():
            return  # the run is over
        if isinstance(error, ActorUnavailableError):
            sleep(LOOK_AGAIN_S)
            self._watch(index)
        else:
            self._lost(index, error)

    def _lost(self, index: int, error: BaseException | None) -> None:
        """Take a worker out and fail its groups; once, whoever notices first."""
        died = _died(self._names[index], error)
        with self._lock:
            if self._alive.pop(index, None) is None:
                return
            groups = self._groups.pop(index)
            self._last_death = died
            left = len(self._alive)
        logger.error("%s; %d of %d rollout workers are left", died, left, len(self._names))
        if self._queue is not None:
            threading.Thread(target=self._fail_all, args=(groups,), daemon=True).start()

    def _fail_all(self, groups: Mapping[str, str]) -> None:
        """See to it that all of `groups` have ended; without that the trainer would wait for ever."""
        looks = 2  # the worker's last words may come in after the first
        while looks and ray.is_initialized():
            try:
                self._fail(groups)
                looks -= 1
            except AssertionError:
                return  # TransferQueue is closed: the run is over
            except Exception:
                logger.exception("the groups of a rollout worker that died could not be marked; trying again")
            if looks:
                sleep(LOOK_AGAIN_S)

    def _fail(self, groups: Mapping[str, str]) -> None:
        """Mark those of `groups` (partition by uid) that have not ended."""
        for partition in sorted(set(groups.values())):
            tags = (self._queue.kv_list(partition) or {}).get(partition, {})
            for uid in [uid for uid in groups if tags.get(uid, {}).get("status") in UNFINISHED]:
                self._queue.kv_put(key=uid, partition_id=partition, tag={"status": "failure"})
                logger.error("group %s fails with its rollout worker", uid)


def _died(name: str, error: BaseException | None) -> str:
    """Ray's message of many lines has the reason between its report on the call and its guesses."""
    text = " ".join(str(error).split())
    reason = text.partition("The actor is dead because ")[2] or text
    return f"{name} died: {re.split(r' (?:Some common causes|There are some potential)', reason)[0].rstrip('.')}"
