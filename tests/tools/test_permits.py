"""Permits of a cluster: in one process without Ray, and over processes with the real one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from agentloop.tools import ToolRegistry
from agentloop.tools.permits import ACTOR, NAMESPACE, PermitBook
from agentloop.trajectory import CallStatus
from tests.tools.examples import Sleeper
from tests.tools.sessions import call, opened

# -- the book ---------------------------------------------------------------------------------------------------------------


async def test_first_come_first_served_and_no_more_than_there_are() -> None:
    book = PermitBook()
    assert await book.take("k", "a", 2, None, 60, 0)
    assert await book.take("k", "b", 2, None, 60, 0)
    assert not await book.take("k", "c", 2, None, 60, 0)
    assert await book.take("other", "c", 2, None, 60, 0), "each key by itself"
    waiting = [asyncio.create_task(book.take("k", name, 2, None, 60, 20)) for name in "cd"]
    await asyncio.sleep(0)
    await book.give_back("k", "a")
    assert await waiting[0] and not waiting[1].done()
    await book.give_back("k", "b")
    assert await waiting[1] and await book.out("k") == 2


async def test_one_that_asks_again_keeps_its_place() -> None:
    book = PermitBook()
    assert await book.take("k", "a", 1, None, 60, 0)
    assert not await book.take("k", "early", 1, None, 60, 0)
    late = asyncio.create_task(book.take("k", "late", 1, None, 60, 20))
    await asyncio.sleep(0)
    await book.give_back("k", "a")
    assert await book.take("k", "early", 1, None, 60, 1)
    assert not late.done()
    await book.give_back("k", "early")
    assert await late


async def test_one_that_was_cancelled_stands_in_nobodys_way() -> None:
    book = PermitBook()
    assert await book.take("k", "a", 1, None, 60, 0)
    cancelled = asyncio.create_task(book.take("k", "b", 1, None, 60, 20))
    await asyncio.sleep(0)
    await book.give_back("k", "b")
    assert not await cancelled
    await book.give_back("k", "a")
    assert await book.take("k", "c", 1, None, 60, 0)


async def test_a_cancellation_that_meets_a_change_is_not_swallowed() -> None:
    book = PermitBook()
    assert await book.take("k", "a", 1, None, 60, 0)
    waiting = asyncio.create_task(book.take("k", "b", 1, None, 60, 20))
    await asyncio.sleep(0.01)
    await book.give_back("k", "a")  # wakes the one that waits, which has not run yet
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_lease_runs_out_unless_it_is_renewed() -> None:
    book = PermitBook()
    assert await book.take("k", "a", 1, None, 0.2, 0)
    assert await book.take("k", "b", 1, None, 60, 20), "a is not renewed"
    await book.renew({"k": ["b", "unknown to the book"]}, 60)
    assert await book.out("k") == 2


async def test_starts_in_a_period() -> None:
    book = PermitBook()
    given = []
    for number in range(7):
        assert await book.take("k", str(number), None, (3, 0.2), 60, 20)
        given.append(time.monotonic())
    assert all(late - early > 0.19 for early, late in zip(given, given[3:], strict=False))
    assert await book.out("k") == 0


# -- the policies -----------------------------------------------------------------------------------------------------------


async def test_without_ray_the_process_is_the_cluster() -> None:
    sleepers = [Sleeper(), Sleeper()]
    policy = {"sleeper": {"cluster_concurrency": 2, "cluster_rate_limit": "100/1s"}}
    registries = [ToolRegistry.from_tools([sleeper], policy) for sleeper in sleepers]
    async with opened(registries[0]) as one, opened(registries[1]) as two:
        records = await asyncio.gather(*[call(s, "sleeper", {"seconds": 0.1}) for s in (one, two) for _ in range(3)])
        assert {record.status for record in records} == {CallStatus.OK}
        assert max(record.metrics.get("cluster_wait_s", 0) for record in records) > 0.15
        waiting = [asyncio.create_task(call(one, "sleeper", {"seconds": 3600})) for _ in range(3)]
        await asyncio.sleep(0.05)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (await call(two, "sleeper", {"seconds": 0})).status is CallStatus.OK, "no permit was lost"
    assert sum(sleeper.most for sleeper in sleepers) >= 2


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield ray
    ray.shutdown()


class Worker:
    """A process with a registry of its own."""

    def __init__(self, name: str, policy: dict[str, Any]) -> None:
        from tests.tools.examples import Sleeper

        Sleeper.name = name
        self.sleeper = Sleeper()
        self.registry = ToolRegistry.from_tools([self.sleeper], {name: policy})
        self.name = name

    async def ready(self) -> None:
        return None

    async def calls(self, count: int, seconds: float) -> list[tuple[str, float, float]]:
        """Status, and from when to when each ran."""

        async def one() -> tuple[str, float, float]:
            record = await call(session, self.name, {"seconds": seconds})
            return record.status.value, time.time() - record.run_s, time.time()

        async with opened(self.registry) as session:
            return await asyncio.gather(*[one() for _ in range(count)])


def most_at_once(spans: list[tuple[str, float, float]]) -> int:
    return max(sum(begin <= at < end for _, begin, end in spans) for _, at, _ in spans)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_over_the_processes_of_a_cluster(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(name: str, count: int, policy: dict[str, Any]) -> list[Any]:
        actors = [ray.remote(Worker).options(num_cpus=0).remote(name, policy) for _ in range(count)]
        ray.get([actor.ready.remote() for actor in actors])
        return actors

    # No more at once than the cluster may run, although each process may.
    name = f"shared-{uuid4().hex[:6]}"
    actors = start(name, 2, {"cluster_concurrency": 2})
    spans = [span for spans in ray.get([actor.calls.remote(4, 0.3) for actor in actors]) for span in spans]
    assert {status for status, _, _ in spans} == {"ok"} and most_at_once(spans) == 2

    # A dead process's permits come back.
    dies = f"dies-{uuid4().hex[:6]}"
    dying, living = start(dies, 2, {"cluster_concurrency": 1})
    ray.get(living.calls.remote(1, 0))
    dying.calls.remote(1, 3600)
    book = ray.get_actor(ACTOR, namespace=NAMESPACE)
    while not ray.get(book.out.remote(dies)):
        time.sleep(0.05)
    waiting = living.calls.remote(1, 0)
    assert not ray.wait([waiting], timeout=2)[0]
    ray.kill(dying)
    assert ray.get(waiting, timeout=60)[0][0] == "ok"

    # Starts in a period.
    actors = start(f"rate-{uuid4().hex[:6]}", 2, {"cluster_rate_limit": "2/1s"})
    spans = [span for spans in ray.get([actor.calls.remote(3, 0.0) for actor in actors]) for span in spans]
    assert max(begin for _, begin, _ in spans) - min(begin for _, begin, _ in spans) > 1.5

    # The book itself is lost while permits are out: another takes its place and learns of them.
    name = f"lost-{uuid4().hex[:6]}"
    actors = start(name, 2, {"cluster_concurrency": 2})
    running = actors[0].calls.remote(2, 8.0)
    time.sleep(1)
    ray.kill(ray.get_actor(ACTOR, namespace=NAMESPACE))
    time.sleep(6)  # a renewal
    late = ray.get(actors[1].calls.remote(1, 0.0))
    assert most_at_once(ray.get(running) + late) <= 2
