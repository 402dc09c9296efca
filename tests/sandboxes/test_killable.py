"""Workers that can be killed: what a caller gets, and what a bomb costs the others."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agentloop.sandboxes.base import SandboxError
from agentloop.sandboxes.killable import PoolService, WorkerCrash, WorkerOutOfMemory, WorkerPool, WorkerTimeout, run_blocking

TARGETS = str(Path(__file__).parent)


def make(**settings: Any) -> WorkerPool:
    settings = {"workers": 2, "limit_s": 5.0, "scope": "process", **settings}
    return WorkerPool("killable_targets:work", paths=[TARGETS], **settings)


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    pool = make()
    yield pool
    await pool.close()


async def gone(pid: int) -> None:
    """Wait until the process is gone."""
    async with asyncio.timeout(20):
        while os.path.exists(f"/proc/{pid}"):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.02)


async def test_a_call_gets_the_functions_value(pool: WorkerPool) -> None:
    assert await pool.call({"a": [1, "ü"]}) == {"a": [1, "ü"]}
    assert await asyncio.gather(*(pool.call(n) for n in range(500))) == list(range(500))


async def test_big_payloads(pool: WorkerPool) -> None:
    text = "x" * 5_000_000
    assert await pool.call(text) == text


async def test_a_bomb_costs_its_caller_alone() -> None:
    pool = make(workers=2, limit_s=0.5)
    try:
        await pool.call(0)
        bombs = [asyncio.create_task(pool.call(["bomb", 9])) for _ in range(4)]
        values = [await pool.call(n) for n in range(20)]
        assert values == list(range(20))
        for bomb in bombs:
            with pytest.raises(WorkerTimeout):
                await bomb
        assert await pool.call("alive") == "alive"
    finally:
        await pool.close()


async def test_a_killed_worker_is_gone_and_replaced() -> None:
    pool = make(workers=1, limit_s=0.3)
    try:
        before = await pool.call(["pid", 0])
        with pytest.raises(WorkerTimeout) as caught:
            await pool.call(["bomb", 9])
        assert caught.value.cpu_s is not None and caught.value.cpu_s > 0
        await gone(before)
        assert await pool.call(["pid", 0]) != before
    finally:
        await pool.close()


async def test_memory_is_limited_and_told_apart() -> None:
    pool = make(memory_mb=128)
    try:
        assert await pool.call(["memory", 16]) == 16 * 2**20
        with pytest.raises(WorkerOutOfMemory):
            await pool.call(["memory", 4096])
        assert await pool.call(["memory", 16]) == 16 * 2**20
    finally:
        await pool.close()


async def test_what_the_machinery_does_wrong_is_no_value(pool: WorkerPool) -> None:
    with pytest.raises(WorkerCrash, match="KeyError: 'x'"):
        await pool.call(["raise", "x"])
    with pytest.raises(WorkerCrash, match="died"):
        await pool.call(["exit", 0])
    assert await pool.call(1) == 1


async def test_a_worker_that_dies_between_calls_is_not_noticed(pool: WorkerPool) -> None:
    await pool.call(0)
    for pid in await pool.pids():
        os.kill(pid, signal.SIGKILL)
    assert await pool.call(1) == 1


async def test_a_target_that_cannot_be_imported_says_so() -> None:
    pool = WorkerPool("killable_targets:nothing", paths=[TARGETS], scope="process")
    try:
        with pytest.raises(SandboxError, match="nothing"):
            await pool.call(1)
    finally:
        await pool.close()


async def test_cancelling_a_call_kills_its_worker() -> None:
    pool = make(workers=1, limit_s=600)
    try:
        before = await pool.call(["pid", 0])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await pool.call(["bomb", 9])
        await gone(before)
        assert await pool.call(1) == 1
    finally:
        await pool.close()


async def test_a_call_that_is_cancelled_while_its_worker_is_made_mixes_up_no_others() -> None:
    pool = make(workers=2)
    service = PoolService(pool._settings)
    await service.start()
    try:
        assert service._refilling is not None
        await service._refilling
        cancelled = asyncio.create_task(service._fork())
        await asyncio.sleep(0)  # it has begun
        await asyncio.sleep(0)  # the template is asked
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        for _ in range(3):
            worker = await service._fork()
            answer = await service._ask(worker, json.dumps(["pid", 0]).encode())
            assert answer["value"] == worker.pid, "whom it would kill is who works"
    finally:
        await service.stop()


def test_an_event_loop_that_was_closed_keeps_no_connection() -> None:
    pool = make(scope="node")
    for _ in range(3):
        asyncio.run(pool.call(0))
    nodes = list(pool._nodes.values())
    assert len(nodes) == 1, "those of closed loops went when the next one came"


async def test_workers_are_recycled() -> None:
    pool = make(workers=1, recycle=3)
    try:
        pids = [await pool.call(["pid", 0]) for _ in range(12)]
        assert len(set(pids)) >= 4
    finally:
        await pool.close()


async def test_closing_ends_every_process() -> None:
    pool = make()
    await pool.call(0)
    pids = await pool.pids()
    await pool.close()
    for pid in pids:
        await gone(pid)


async def test_workers_die_with_the_service(pool: WorkerPool) -> None:
    pid = await pool.call(["pid", 0])
    parent = int((await pool.call(["status", 0]))["PPid"])
    os.kill(parent, signal.SIGKILL)  # the template
    await gone(pid)
    assert await pool.call(2) == 2


async def test_a_worker_has_one_thread_and_no_other_packages(pool: WorkerPool) -> None:
    assert (await pool.call(["status", 0]))["Threads"] == "1"


async def test_the_event_loop_is_not_held_up() -> None:
    """Bombs all the time, and the loop's longest pause is counted in its own CPU time, which other processes do not change."""
    pool = make(workers=2, limit_s=0.2)
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            worst = max(worst, time.thread_time() - before)

    try:
        await pool.call(0)
        gc.collect()
        gc.disable()  # a collection of all that the process has imported takes longer, and is nobody's here
        watching = asyncio.create_task(watch())
        results = await asyncio.gather(*(pool.call(["bomb", 9]) for _ in range(10)), return_exceptions=True)
        watching.cancel()
        assert all(isinstance(result, WorkerTimeout) for result in results)
        assert worst < 0.020
    finally:
        gc.enable()
        await pool.close()


def test_callers_without_an_event_loop() -> None:
    pool = make()
    try:
        assert pool.call_blocking("a") == "a"
        assert pool.call_blocking("b", timeout=10) == "b"
        with pytest.raises(TimeoutError):
            pool.call_blocking(["sleep", 3], timeout=0.2)
    finally:
        run_blocking(pool.close())


async def test_two_pools_of_one_node_are_one() -> None:
    first, second = make(scope="node", limit_s=4.5), make(scope="node", limit_s=4.5)
    try:
        assert set(await first.pids()) & set(await second.pids())
    finally:
        await first.close()
        await second.close()
