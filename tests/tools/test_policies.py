"""The policies of a call: time, places, retries."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace
from typing import Any

import pytest

from agentloop.errors import ToolInfraError
from agentloop.tools import CircuitBreaker, ToolRegistry, ToolResult, queueing, tool
from agentloop.tools.breaker import Breaker
from agentloop.trajectory import CallStatus, Sample, ToolCall
from tests.tools.examples import Flaky, Sleeper
from tests.tools.sessions import call, opened


@pytest.mark.parametrize(
    ("error", "policy", "status", "attempts"),
    [
        ("infra", {}, CallStatus.INFRA, 1),
        ("infra", {"retries": 1}, CallStatus.INFRA, 2),
        ("infra", {"retries": 2}, CallStatus.OK, 3),
        ("value", {"retries": 2}, CallStatus.ERROR, 1),
        ("timeout", {"retries": 2}, CallStatus.TIMEOUT, 1),
        ("value", {"on_error": "retry"}, CallStatus.OK, 3),
        ("value", {"on_error": "retry", "retries": 1}, CallStatus.ERROR, 2),
    ],
)
async def test_retries(error: str, policy: dict[str, Any], status: CallStatus, attempts: int) -> None:
    flaky = Flaky({"failures": 2, "error": error})
    async with opened(ToolRegistry.from_tools([flaky], {"flaky": policy})) as session:
        record = await call(session, "flaky")
    assert (record.status, record.attempts, flaky.tries) == (status, attempts, attempts)
    assert record.on_error == "observe"
    assert record.metrics.get("retries", 0) == attempts - 1
    # 0.1 s, 0.2 s, … each times a half to one and a half
    assert sum(0.05 * 2**n for n in range(attempts - 1)) <= record.metrics.get("backoff_s", 0) <= 0.15 * (2**attempts - 2) / 2


async def test_what_failed_together_does_not_come_back_together() -> None:
    waits = []
    for _ in range(4):
        async with opened(ToolRegistry.from_tools([Flaky({"failures": 1})], {"flaky": {"retries": 1}})) as session:
            waits.append((await call(session, "flaky")).metrics["backoff_s"])
    assert len(set(waits)) == 4


async def test_what_the_model_does_wrong_is_not_retried_whatever_the_policy() -> None:
    tries = []

    @tool
    def wrong() -> ToolResult:
        tries.append(1)
        return ToolResult("division by zero", error=True)

    async with opened(ToolRegistry.from_tools([wrong], {"wrong": {"on_error": "retry", "retries": 3}})) as session:
        assert (await call(session, "wrong")).attempts == len(tries) == 1


async def test_retries_end_with_the_deadline() -> None:
    flaky = Flaky({"failures": 10**9})
    async with opened(ToolRegistry.from_tools([flaky], {"flaky": {"retries": 10**6}})) as session:
        record = await call(session, "flaky", within=0.5)
    assert record.status is CallStatus.INFRA
    assert 1 < record.attempts < 5


@pytest.mark.parametrize(("policy", "within"), [({"timeout": 0.05}, 30.0), ({"timeout": 30.0}, 0.05), ({}, 0.05)])
async def test_a_call_ends_at_its_timeout_or_the_deadline(policy: dict[str, Any], within: float) -> None:
    sleeper = Sleeper()
    async with opened(ToolRegistry.from_tools([sleeper], {"sleeper": policy})) as session:
        record = await call(session, "sleeper", {"seconds": 3600}, within=within)
    assert record.status is CallStatus.TIMEOUT
    assert "The tool 'sleeper' did not answer within" in record.text
    assert (sleeper.ended, sleeper.running, sleeper.released) == (["cancelled"], 0, 1)


async def test_the_answer_is_there_before_whoever_set_the_deadline_enforces_it() -> None:
    async with opened(ToolRegistry.from_tools([Sleeper()], {"sleeper": {"on_error": "drop_sample"}})) as session:
        deadline = asyncio.get_running_loop().time() + 0.5
        async with asyncio.timeout_at(deadline):
            record = await session.call(ToolCall("sleeper", {"seconds": 3600}), deadline=deadline)
    assert (record.status, record.attempts, record.on_error) == (CallStatus.TIMEOUT, 1, "drop_sample")


async def test_nothing_starts_after_the_deadline() -> None:
    sleeper = Sleeper()
    async with opened(ToolRegistry.from_tools([sleeper])) as session:
        record = await call(session, "sleeper", {"seconds": 0}, within=-1.0)
    assert (record.status, record.attempts, sleeper.ended) == (CallStatus.TIMEOUT, 0, [])


async def test_concurrency_is_capped_over_all_trajectories_and_waiting_counts() -> None:
    sleeper = Sleeper()
    registry = ToolRegistry.from_tools([sleeper], {"sleeper": {"max_concurrency": 2, "timeout": 5.0}})
    async with opened(registry) as first, opened(registry) as second:
        calls = [call(session, "sleeper", {"seconds": 0.05}) for session in (first, second) for _ in range(3)]
        records = await asyncio.gather(*calls)
        assert {record.status for record in records} == {CallStatus.OK}
        assert sleeper.most == 2
        assert sum(record.queue_s > 0.04 for record in records) == 4
        holders = [asyncio.create_task(call(first, "sleeper", {"seconds": 0.2})) for _ in range(2)]
        await asyncio.sleep(0.01)
        late = await call(second, "sleeper", {"seconds": 0}, within=0.05)
        assert (late.status, late.attempts) == (CallStatus.TIMEOUT, 0)
        await asyncio.gather(*holders)
        assert (await call(first, "sleeper", {"seconds": 0})).status is CallStatus.OK


async def test_rate_limit() -> None:
    starts: list[float] = []

    @tool
    async def tick() -> str:
        starts.append(asyncio.get_running_loop().time())
        return ""

    async with opened(ToolRegistry.from_tools([tick], {"tick": {"rate_limit": "3/0.2s"}})) as session:
        records = await asyncio.gather(*[call(session, "tick") for _ in range(7)])
    assert {record.status for record in records} == {CallStatus.OK}
    assert all(late - early > 0.19 for early, late in zip(starts, starts[3:], strict=False))


async def test_cancellation_passes_through_after_the_tool_was_told() -> None:
    sleeper = Sleeper()
    async with opened(ToolRegistry.from_tools([sleeper], {"sleeper": {"max_concurrency": 1}})) as session:
        running = asyncio.create_task(call(session, "sleeper", {"seconds": 3600}))
        queued = asyncio.create_task(call(session, "sleeper", {"seconds": 3600}))
        while not sleeper.running:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for task in (queued, running):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert sleeper.ended == ["cancelled"]
        assert (await call(session, "sleeper", {"seconds": 0})).status is CallStatus.OK, "no place was lost"


async def test_a_thread_keeps_its_place_until_it_ends() -> None:
    go_on = threading.Event()

    @tool
    def block(wait: bool) -> str:
        if wait:
            go_on.wait(20)
        return "done"

    async with opened(
        ToolRegistry.from_tools([block], {"block": {"max_concurrency": 1, "timeout": 0.1, "deadline": 0.3}})
    ) as session:
        assert (await call(session, "block", {"wait": True})).status is CallStatus.TIMEOUT
        second = await call(session, "block", {"wait": False})
        assert (second.status, second.attempts) == (CallStatus.TIMEOUT, 0), "the thread is still at work"
        go_on.set()
        for _ in range(100):
            record = await call(session, "block", {"wait": False})
            if record.status is CallStatus.OK:
                break
        assert record.text == "done"


async def test_a_tool_that_ignores_cancellation_is_left_behind(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentloop.tools.attempt.CANCEL_GRACE_S", 0.05)
    finish = asyncio.Event()

    @tool
    async def stubborn(wait: bool) -> str:
        while wait and not finish.is_set():
            try:
                await finish.wait()
            except asyncio.CancelledError:
                continue
        return "done"

    async with opened(
        ToolRegistry.from_tools([stubborn], {"stubborn": {"max_concurrency": 1, "timeout": 0.1, "deadline": 0.3}})
    ) as session:
        try:
            assert (await call(session, "stubborn", {"wait": True})).status is CallStatus.TIMEOUT
            assert "does not end although it was cancelled" in caplog.text
            assert (await call(session, "stubborn", {"wait": False})).attempts == 0, "it keeps its place"
        finally:
            finish.set()
        await asyncio.sleep(0.01)
        assert (await call(session, "stubborn", {"wait": False})).status is CallStatus.OK


async def test_a_tool_keeps_its_place_while_it_runs_even_if_the_call_is_cancelled_twice() -> None:
    finish = asyncio.Event()
    running = most = 0

    @tool
    async def stubborn() -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        while not finish.is_set():
            try:
                await finish.wait()
            except asyncio.CancelledError:
                continue
        running -= 1
        return "done"

    async with opened(ToolRegistry.from_tools([stubborn], {"stubborn": {"max_concurrency": 1}})) as session:
        first = asyncio.create_task(call(session, "stubborn"))
        while not running:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(2):
            first.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(call(session, "stubborn"))
        await asyncio.sleep(0.02)
        finish.set()
        assert (await second).status is CallStatus.OK and most == 1


async def test_the_event_loop_goes_on_while_a_sync_tool_blocks() -> None:
    alive = threading.Event()

    @tool
    def block() -> str:
        return "the loop went on" if alive.wait(20) else "the loop stood still"

    async with opened(ToolRegistry.from_tools([block])) as session:
        asyncio.get_running_loop().call_later(0.01, alive.set)
        assert (await call(session, "block")).text == "the loop went on"


def test_one_registry_serves_several_event_loops(caplog: pytest.LogCaptureFixture) -> None:
    sleeper = Sleeper()
    registry = ToolRegistry.from_tools([sleeper], {"sleeper": {"max_concurrency": 1, "rate_limit": "100/1s"}})

    async def twice() -> list[CallStatus]:
        async with opened(registry) as session:
            records = await asyncio.gather(*[call(session, "sleeper", {"seconds": 0.01}) for _ in range(3)])
        return [record.status for record in records]

    with caplog.at_level(logging.WARNING):
        assert [asyncio.run(twice()) for _ in range(2)] == [[CallStatus.OK] * 3] * 2
    assert sleeper.most == 1


# -- whose time it is -----------------------------------------------------------------------------------------------------


async def test_waiting_for_a_place_is_not_the_tools_own_time() -> None:
    policies = {"sleeper": {"max_concurrency": 1, "timeout": 1.0}}
    async with opened(ToolRegistry.from_tools([Sleeper()], policies)) as session:
        records = await asyncio.gather(*[call(session, "sleeper", {"seconds": 0.4}) for _ in range(4)])
    assert [record.status for record in records] == [CallStatus.OK] * 4
    assert max(record.queue_s for record in records) > 1.0


async def test_a_deadline_covers_the_wait_the_attempts_and_the_time_between_them() -> None:
    policies = {"sleeper": {"max_concurrency": 1, "deadline": 1.5}}
    async with opened(ToolRegistry.from_tools([Sleeper()], policies)) as session:
        first, second = await asyncio.gather(*[call(session, "sleeper", {"seconds": 0.9}) for _ in range(2)])
        assert (first.status, second.status, second.attempts) == (CallStatus.OK, CallStatus.TIMEOUT, 1)
        assert (first.metrics, second.metrics) == ({}, {"deadline": 1.0})
        assert "did not answer within 1.5 s" in second.text
    flaky = Flaky({"failures": 10**9})
    async with opened(ToolRegistry.from_tools([flaky], {"flaky": {"retries": 100, "deadline": 0.5}})) as session:
        record = await call(session, "flaky")
    assert record.status is CallStatus.INFRA and 1 < record.attempts < 5


async def test_a_retry_that_the_deadline_cuts_off_leaves_the_failure_what_it_was() -> None:
    tries = []

    @tool
    async def service() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise ToolInfraError("connection refused")
        await asyncio.sleep(3600)
        return ""

    async with opened(ToolRegistry.from_tools([service], {"service": {"retries": 1, "deadline": 0.5}})) as session:
        record = await call(session, "service")
    assert (record.status, record.attempts, len(tries)) == (CallStatus.INFRA, 2, 2)
    assert "connection refused" in record.text


async def test_a_timeout_is_for_one_attempt() -> None:
    tries = []

    @tool
    async def slow() -> str:
        tries.append(1)
        await asyncio.sleep(0.3)
        if len(tries) < 3:
            raise ToolInfraError("not yet")
        return "done"

    async with opened(ToolRegistry.from_tools([slow], {"slow": {"retries": 2, "timeout": 0.8}})) as session:
        record = await call(session, "slow")
    assert (record.text, record.attempts) == ("done", 3)


async def test_a_queue_inside_the_tool_is_not_its_own_time_either() -> None:
    @tool
    async def pooled(queue: float, work: float) -> str:
        with queueing():
            await asyncio.sleep(queue)
        await asyncio.sleep(work)
        return "done"

    async with opened(ToolRegistry.from_tools([pooled], {"pooled": {"timeout": 0.5}})) as session:
        patient = await call(session, "pooled", {"queue": 0.8, "work": 0.01})
        slow = await call(session, "pooled", {"queue": 0.1, "work": 3600})
        late = await call(session, "pooled", {"queue": 3600, "work": 0}, within=0.4)
    assert (patient.text, patient.queue_s >= 0.8, patient.run_s < 0.5) == ("done", True, True)
    assert (slow.status, slow.text) == (CallStatus.TIMEOUT, "The tool 'pooled' did not answer within 0.5 s and was stopped.")
    assert (late.status, late.metrics) == (CallStatus.TIMEOUT, {"deadline": 1.0})


async def test_create_keeps_the_timeout_and_the_deadline() -> None:
    class Slow(Sleeper):
        async def create(self, instance_id: str | None = None, **kwargs: Any) -> None:
            await asyncio.sleep(3600)

    for policy, says in (
        ({"timeout": 0.05}, r"longer than 0\.05 s"),
        ({"deadline": 0.2, "retries": 50}, "could not be created"),
    ):
        session = ToolRegistry.from_tools([Slow()], {"sleeper": policy}).session(Sample(messages=[]), "row_0")
        with pytest.raises(ToolInfraError, match=says):
            await session.open()
        await session.close()


# -- calls of one turn ----------------------------------------------------------------------------------------------------


class Ordered(Sleeper):
    """Says when it began and ended."""

    def __init__(self, name: str, log: list[str], lane: str | None = None, parallel: bool = False) -> None:
        self.name = name
        super().__init__()
        self.log, self.lane, self.parallel = log, lane, parallel

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> str:
        self.log.append(f"{self.name} begins")
        await asyncio.sleep(parameters["seconds"])
        self.log.append(f"{self.name} ends")
        return "done"


@pytest.mark.parametrize(
    ("parallel", "policy", "in_order"),
    [(True, {}, False), (False, {}, True), (True, {"parallel": False}, True), (False, {"parallel": True}, False)],
)
async def test_calls_of_a_turn_run_side_by_side_unless_the_tool_says_otherwise(
    parallel: bool, policy: dict[str, Any], in_order: bool
) -> None:
    log: list[str] = []
    async with opened(ToolRegistry.from_tools([Ordered("a", log, parallel=parallel)], {"a": policy})) as session:
        await asyncio.gather(*[call(session, "a", {"seconds": seconds}) for seconds in (0.1, 0.05, 0.0)])
    assert log == (["a begins", "a ends"] * 3 if in_order else ["a begins"] * 3 + ["a ends"] * 3)


async def test_tools_of_one_lane_wait_for_each_other_within_a_trajectory_only() -> None:
    log: list[str] = []
    registry = ToolRegistry.from_tools([Ordered("a", log, "files"), Ordered("b", log, "files")])
    async with opened(registry) as session:
        await asyncio.gather(*[call(session, name, {"seconds": 0.05}) for name in "abab"])
    assert log == ["a begins", "a ends", "b begins", "b ends"] * 2
    log.clear()
    async with opened(registry) as first, opened(registry) as second:
        await asyncio.gather(*[call(session, "a", {"seconds": 0.1}) for session in (first, second)])
    assert log == ["a begins"] * 2 + ["a ends"] * 2


# -- a tool that is down --------------------------------------------------------------------------------------------------


class Service(Sleeper):
    """Up or down, as the test has it."""

    name = "service"
    up = False
    tries = 0

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> str:
        self.tries += 1
        await asyncio.sleep(parameters.get("seconds", 0))
        if not self.up:
            raise ToolInfraError("connection refused")
        return "up"


async def test_a_tool_that_is_down_is_left_alone_and_then_tried_by_one_call() -> None:
    service, now = Service(), [0.0]
    (entry,) = ToolRegistry.from_tools([service])
    breaker = Breaker(CircuitBreaker(failures=3, open_s=30), clock=lambda: now[0])
    async with opened(ToolRegistry([replace(entry, breaker=breaker)])) as session:
        for _ in range(3):
            assert "connection refused" in (await call(session, "service")).text
        now[0] = 10.0
        refused = await call(session, "service")
        assert (refused.status, refused.attempts, service.tries) == (CallStatus.INFRA, 0, 3)
        assert refused.metrics == {"breaker_open": 1.0}
        assert refused.text == (
            "The tool 'service' is not available: it failed 3 times in a row and is left alone for another 20.0 s."
        )

        now[0] = 31.0
        probe, other = await asyncio.gather(call(session, "service", {"seconds": 0.05}), call(session, "service"))
        assert (probe.metrics, other.metrics) == ({"breaker_probe": 1.0}, {"breaker_open": 1.0})
        assert "is being tried by another call" in other.text
        now[0] = 60.0
        assert (await call(session, "service")).metrics == {"breaker_open": 1.0}, "the probe failed: open again"

        now[0], service.up = 62.0, True
        assert (await call(session, "service")).text == "up"
        assert (await call(session, "service")).metrics == {}


async def test_an_open_breaker_ends_the_retries_and_the_queue() -> None:
    service = Service()
    policy = {"circuit_breaker": {"failures": 2, "open_s": 60}, "retries": 50, "max_concurrency": 1}
    async with opened(ToolRegistry.from_tools([service], {"service": policy})) as session:
        records = await asyncio.gather(*[call(session, "service") for _ in range(5)])
    assert service.tries == 2
    assert {record.status for record in records} == {CallStatus.INFRA}
    assert all(record.metrics["breaker_open"] for record in records)


async def test_only_infrastructure_failures_in_a_row_open_the_breaker() -> None:
    @tool
    async def mixed(what: str) -> str:
        if what == "infra":
            raise ToolInfraError("gone")
        if what == "raises":
            raise ValueError("bad")
        if what == "hangs":
            await asyncio.sleep(3600)
        return "fine"

    policy = {"circuit_breaker": {"failures": 2, "open_s": 60}, "timeout": 0.05}
    async with opened(ToolRegistry.from_tools([mixed], {"mixed": policy})) as session:
        for what in ("infra", "fine", "infra", "raises", "raises", "raises", "hangs", "hangs", "infra"):
            await call(session, "mixed", {"what": what})
        assert (await call(session, "mixed", {"what": "fine"})).text == "fine"
        await call(session, "mixed", {"what": "infra"})
        await call(session, "mixed", {"what": "infra"})
        assert (await call(session, "mixed", {"what": "fine"})).metrics == {"breaker_open": 1.0}


async def test_a_probe_that_is_cancelled_leaves_its_place_to_the_next() -> None:
    service = Service()
    policies = {"service": {"circuit_breaker": {"failures": 1, "open_s": 0.05}}}
    async with opened(ToolRegistry.from_tools([service], policies)) as session:
        await call(session, "service")
        await asyncio.sleep(0.1)
        probe = asyncio.create_task(call(session, "service", {"seconds": 3600}))
        while service.tries < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        service.up = True
        assert (await call(session, "service")).text == "up"


async def test_a_registry_that_is_closed_closes_its_tools_each_with_its_own_guard(caplog: pytest.LogCaptureFixture) -> None:
    closed = []

    class Holds(Sleeper):
        def __init__(self, name: str) -> None:
            self.name = name
            super().__init__()

        async def close(self) -> None:
            if self.name == "fails":
                raise OSError("no")
            closed.append(self.name)

    await ToolRegistry.from_tools([Holds("fails"), Holds("good")]).close()
    assert closed == ["good"] and "'fails': close failed" in caplog.text
