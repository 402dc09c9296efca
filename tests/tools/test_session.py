"""The tools of one trajectory: their life, and every policy of a call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import BaseModel

from agentloop.errors import ConfigError, ToolError, ToolInfraError
from agentloop.tools import BaseTool, ToolRegistry, ToolResponse, ToolResult, ToolSession, tool
from agentloop.trajectory import CallRecord, CallStatus, Sample, ToolCall
from tests.tools.examples import Counter, Flaky, Sleeper, repeat


@asynccontextmanager
async def opened(registry: ToolRegistry, **sample: Any) -> AsyncIterator[ToolSession]:
    session = registry.session(Sample(messages=[], **sample), "row_0")
    await session.open()
    try:
        yield session
    finally:
        await session.close()


async def call(session: ToolSession, name: str, arguments: Any = None, *, within: float = 30.0) -> CallRecord:
    asked = ToolCall(name, {} if arguments is None else arguments, "t0c0")
    return await session.call(asked, deadline=asyncio.get_running_loop().time() + within)


# -- life -----------------------------------------------------------------------------------------------------------------


async def test_state_lives_as_long_as_the_trajectory() -> None:
    counter = Counter()
    registry = ToolRegistry.from_tools([counter])
    async with (
        opened(registry, tools_kwargs={"counter": {"create_kwargs": {"start": 10}}}) as first,
        opened(registry) as second,
    ):
        assert [(await call(first, "counter", {"by": 2})).text for _ in range(3)] == ["12", "14", "16"]
        assert (await call(second, "counter")).text == "1"
        assert await first.rewards() == {"tool/counter": 3 * 0.25 + 16}
        assert await first.rewards() == {"tool/counter": 3 * 0.25 + 16}, "asked for once"
    await first.close()
    happened = [what for what, instance in counter.log if instance == counter.log[0][1]]
    assert happened == ["create", "execute", "execute", "execute", "calc_reward", "release"]
    assert counter.instances == {}


async def test_only_the_selected_tools_are_created_and_offered_in_the_registrys_order() -> None:
    counter = Counter()
    registry = ToolRegistry.from_tools([counter, repeat, Sleeper()])
    async with opened(registry, tools=("sleeper", "repeat")) as session:
        assert [schema["function"]["name"] for schema in session.schemas] == ["repeat", "sleeper"]
        record = await call(session, "counter")
        assert (record.status, counter.log) == (CallStatus.UNKNOWN_TOOL, [])


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ({"tools": ("countr",)}, "tool_selection: there is no tool 'countr'; did you mean 'counter'?"),
        ({"tools_kwargs": {"countr": {}}}, "tools_kwargs: there is no tool 'countr'; did you mean 'counter'?"),
        ({"tools_kwargs": {"counter": {"create_kwarg": {}}}}, "unknown key 'create_kwarg'; did you mean 'create_kwargs'?"),
        (
            {"tools_kwargs": {"counter": {"create_kwargs": {"strt": 1}}}},
            "'create_kwargs': unknown key 'strt'; did you mean 'start'?",
        ),
        ({"tools_kwargs": {"counter": {"create_kwargs": [1]}}}, "'create_kwargs' must be a mapping"),
    ],
)
def test_a_row_that_names_what_is_not_there(sample: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ToolRegistry.from_tools([Counter()]).session(Sample(messages=[], **sample), "row_0")
    assert says in str(caught.value)


def test_a_row_that_lacks_what_create_needs() -> None:
    class Keyed(Counter):
        async def create(self, instance_id: str | None, key: str, **kwargs: Any) -> None:  # type: ignore[override]
            return None

    with pytest.raises(ConfigError, match="tool 'counter': key 'create_kwargs': missing a required argument: 'key'"):
        ToolRegistry.from_tools([Keyed()]).session(Sample(messages=[]), "row_0")


def test_a_row_with_columns_that_parquet_filled_with_nothing() -> None:
    kwargs: Any = {"counter": {"create_kwargs": None, "execute_kwargs": None}, "repeat": None}
    ToolRegistry.from_tools([Counter(), repeat]).session(Sample(messages=[], tools_kwargs=kwargs), "row_0")


class Broken(BaseTool):
    """Fails where its config says."""

    class Arguments(BaseModel):
        pass

    def __init__(self, where: str, name: str = "broken") -> None:
        self.name = name
        super().__init__()
        self.where = where
        self.released = 0

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> Any:
        if self.where == "create":
            raise OSError("no space left")
        return await super().create(instance_id, **kwargs)

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> str:
        return "fine"

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return float("nan") if self.where == "calc_reward" else 0.0

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self.released += 1
        if self.where == "release":
            raise RuntimeError("cannot let go")
        if self.where == "release hangs":
            await asyncio.sleep(3600)


async def test_a_tool_that_cannot_be_created_releases_the_others() -> None:
    counter, broken = Counter(), Broken("create")
    session = ToolRegistry.from_tools([counter, broken]).session(Sample(messages=[]), "row_0")
    with pytest.raises(ToolInfraError, match="'broken' could not be created: OSError: no space left"):
        await session.open()
    await session.close()
    assert [what for what, _ in counter.log] == ["create", "release"]
    assert broken.released == 0


async def test_a_release_that_raises_or_hangs_kills_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentloop.tools.calls.RELEASE_TIMEOUT_S", 0.05)
    tools = [Broken("release", "raises"), Broken("release hangs", "hangs"), Broken("", "good")]
    async with opened(ToolRegistry.from_tools(tools)):
        pass
    assert [made.released for made in tools] == [1, 1, 1]
    assert "'raises': release failed" in caplog.text
    assert "'hangs': release failed" in caplog.text


async def test_a_reward_that_is_not_known_is_not_zero() -> None:
    async with opened(ToolRegistry.from_tools([Broken("calc_reward")])) as session:
        with pytest.raises(ToolInfraError, match="calc_reward of tool 'broken' failed"):
            await session.rewards()


async def test_opening_that_is_cancelled_releases_what_was_created() -> None:
    class Slow(Sleeper):
        name = "slow"

        async def create(self, instance_id: str | None = None, **kwargs: Any) -> None:
            await asyncio.sleep(3600)

    counter, slow = Counter(), Slow()
    session = ToolRegistry.from_tools([counter, slow]).session(Sample(messages=[]), "row_0")
    opening = asyncio.create_task(session.open())
    while not counter.log:  # noqa: ASYNC110
        await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await session.close()
    assert [what for what, _ in counter.log] == ["create", "release"]
    assert slow.released == 0


async def test_a_create_that_ends_too_late_is_released_all_the_same() -> None:
    finish = asyncio.Event()

    class Late(Counter):
        async def create(self, instance_id: str, start: int = 0) -> None:  # type: ignore[override]
            while not finish.is_set():
                try:
                    await finish.wait()
                except asyncio.CancelledError:
                    continue
            await super().create(instance_id)

    late = Late()
    session = ToolRegistry.from_tools([late], {"counter": {"timeout": 0.05}}).session(Sample(messages=[]), "row_0")
    with pytest.raises(ToolInfraError, match=r"took longer than 0\.05 s"):
        await session.open()
    await session.close()
    assert late.log == []
    finish.set()
    while len(late.log) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    (created, one), (released, same) = late.log
    assert (created, released) == ("create", "release") and one == same


async def test_a_tool_that_is_created_twice_is_released_twice() -> None:
    class SecondTry(Counter):
        async def create(self, instance_id: str, start: int = 0) -> None:  # type: ignore[override]
            await super().create(instance_id)
            if len(self.log) == 1:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)

    tool = SecondTry()
    async with opened(ToolRegistry.from_tools([tool], {"counter": {"timeout": 0.05, "retries": 1}})) as session:
        assert (await call(session, "counter")).text == "1"
    assert sorted(instance for what, instance in tool.log if what == "create") == sorted(
        instance for what, instance in tool.log if what == "release"
    )
    assert [what for what, _ in tool.log].count("release") == 2


# -- what the model got wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([1, 2], "the arguments must be a JSON object, not a list"),
        ("text", "the arguments must be a JSON object, not a string"),
        (None, "argument 'text' is missing"),
        ({"text": 3}, "argument 'text': 3 is not of type 'string'"),
        ({"text": "a", "tims": 2}, "there is no argument 'tims', did you mean 'times'?"),
        ({"text": "a", "end": "?"}, "argument 'end': '?' is not one of ['', '!']"),
        ({"text": "a", "times": "x" * 10_000}, "…"),
    ],
)
async def test_arguments_are_checked_before_the_tool_runs(arguments: Any, says: str) -> None:
    async with opened(ToolRegistry.from_tools([repeat], {"repeat": {"on_error": "drop_sample"}})) as session:
        record = await call(session, "repeat", arguments)
    assert record.status is CallStatus.INVALID_ARGUMENTS
    assert says in record.text
    assert "'repeat'" in record.text
    assert len(record.text) < 500
    assert (record.attempts, record.on_error) == (0, "observe"), "what the model does wrong never drops a sample"


async def test_an_unknown_tool_is_answered_with_the_nearest() -> None:
    async with opened(ToolRegistry.from_tools([repeat])) as session:
        record = await call(session, "repaet", {})
    assert (record.status, record.text) == (CallStatus.UNKNOWN_TOOL, "There is no tool 'repaet'; did you mean 'repeat'?")


# -- failures -----------------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Any:
    @tool
    async def fails() -> str:
        raise error

    return fails


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("bad\nsecond line"), CallStatus.ERROR, "The tool 'fails' failed: ValueError: bad"),
        (KeyError(), CallStatus.ERROR, "The tool 'fails' failed: KeyError"),
        (ToolError("The file is not there."), CallStatus.ERROR, "The file is not there."),
        (ToolInfraError("sandbox down"), CallStatus.INFRA, "The tool 'fails' is not available: sandbox down"),
        (TimeoutError("the page"), CallStatus.TIMEOUT, "The tool 'fails' timed out: TimeoutError: the page."),
        (asyncio.CancelledError(), CallStatus.ERROR, "The tool 'fails' failed: CancelledError"),
    ],
)
async def test_a_tool_that_raises(
    error: BaseException, status: CallStatus, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(ToolRegistry.from_tools([raising(error)], {"fails": {"on_error": "resample"}})) as session:
        record = await call(session, "fails")
    assert (record.status, record.text, record.on_error) == (status, text, "resample")
    assert "Traceback" not in record.text
    if status is not CallStatus.ERROR or isinstance(error, (ValueError, KeyError)):
        assert "Traceback" in caplog.text, "whoever runs it sees all of it"


async def test_a_reported_error_is_an_answer() -> None:
    @tool
    async def divide(a: float, b: float) -> ToolResult:
        return ToolResult("cannot divide by 0", reward=-0.5, error=True)

    async with opened(ToolRegistry.from_tools([divide], {"divide": {"on_error": "retry"}})) as session:
        record = await call(session, "divide", {"a": 1, "b": 0})
        assert await session.rewards() == {"tool/divide": -0.5}
    assert (record.status, record.attempts, record.on_error) == (CallStatus.ERROR, 1, "observe")


async def test_half_a_character_in_an_answer_is_replaced_and_two_halves_are_one() -> None:
    @tool
    def torn(whole: bool) -> str:
        return "a\ud83d" + ("\ude00" if whole else "!")

    async with opened(ToolRegistry.from_tools([torn])) as session:
        assert (await call(session, "torn", {"whole": False})).text == "a\ufffd!"
        assert (await call(session, "torn", {"whole": True})).text == "a\U0001f600"


async def test_metrics_that_are_no_finite_numbers_are_left_out() -> None:
    @tool
    def measured() -> Any:
        return "text", 0.0, {"good": 1, "nan": float("nan"), "text": "x"}

    async with opened(ToolRegistry.from_tools([measured])) as session:
        assert (await call(session, "measured")).metrics == {"good": 1.0}


async def test_a_tool_and_a_conversation_without_any() -> None:
    @tool
    def plain() -> str:
        return "text"

    async with opened(ToolRegistry.from_tools([plain])) as session:
        assert (await call(session, "plain", {"a": 1})).text.endswith(": the tool takes no arguments.")
    async with opened(ToolRegistry.from_tools([plain]), tools=()) as session:
        assert (await call(session, "plain")).text == "There is no tool 'plain'; this conversation has no tools"


async def test_images_are_refused() -> None:
    @tool
    async def draw() -> Any:
        return ToolResponse(text="look", image=[object()])

    async with opened(ToolRegistry.from_tools([draw])) as session:
        record = await call(session, "draw")
    assert record.status is CallStatus.ERROR
    assert "only text is read" in record.text


@pytest.mark.parametrize(
    ("error", "policy", "status", "attempts"),
    [
        ("infra", {}, CallStatus.INFRA, 1),
        ("infra", {"retries": 1}, CallStatus.INFRA, 2),
        ("infra", {"retries": 2}, CallStatus.OK, 3),
        ("value", {"retries": 2}, CallStatus.ERROR, 1),
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


async def test_retries_end_with_the_deadline() -> None:
    flaky = Flaky({"failures": 10**9})
    async with opened(ToolRegistry.from_tools([flaky], {"flaky": {"retries": 10**6}})) as session:
        record = await call(session, "flaky", within=0.5)
    assert record.status is CallStatus.INFRA
    assert 1 < record.attempts < 5


# -- time and places ------------------------------------------------------------------------------------------------------


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

    async with opened(ToolRegistry.from_tools([block], {"block": {"max_concurrency": 1, "timeout": 0.1}})) as session:
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
    monkeypatch.setattr("agentloop.tools.calls.CANCEL_GRACE_S", 0.05)
    finish = asyncio.Event()

    @tool
    async def stubborn(wait: bool) -> str:
        while wait and not finish.is_set():
            try:
                await finish.wait()
            except asyncio.CancelledError:
                continue
        return "done"

    async with opened(ToolRegistry.from_tools([stubborn], {"stubborn": {"max_concurrency": 1, "timeout": 0.1}})) as session:
        assert (await call(session, "stubborn", {"wait": True})).status is CallStatus.TIMEOUT
        assert "does not end although it was cancelled" in caplog.text
        assert (await call(session, "stubborn", {"wait": False})).attempts == 0, "it keeps its place"
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


# -- length -----------------------------------------------------------------------------------------------------------------


class Codec:
    """A tokenizer of the fixture, as a renderer would use it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode_text(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode(list(ids)))


@pytest.mark.parametrize("unit", ["the answer is not here ", "ä€😀", "x"])
@pytest.mark.parametrize("length", [40, 5_000])
async def test_long_answers_lose_their_middle_in_tokens(tokenizer: Any, unit: str, length: int) -> None:
    codec = Codec(tokenizer)

    @tool
    def long() -> str:
        return "START " + unit * length + " END"

    registry = ToolRegistry.from_tools([long], {"long": {"max_response_tokens": 90}}).bind(codec)
    async with opened(registry) as session:
        record = await call(session, "long")
    whole = len(codec.encode_text(long()))
    if whole <= 90:
        assert (record.text, record.cut_tokens) == (long(), 0)
        return
    assert record.text.startswith("START ")
    assert record.text.endswith(" END")
    assert f"[… {record.cut_tokens} tokens left out …]" in record.text
    assert "\ufffd" not in record.text
    assert len(codec.encode_text(record.text)) <= 90
    assert 0 < record.cut_tokens < whole


@pytest.mark.parametrize("limit", [1, 2, 3, 10])
async def test_a_limit_below_the_marker_keeps_the_head(tokenizer: Any, limit: int) -> None:
    codec = Codec(tokenizer)
    long = tool(name="long")(lambda: "😀 the answer is " * 100)
    async with opened(ToolRegistry.from_tools([long], {"long": {"max_response_tokens": limit}}).bind(codec)) as session:
        record = await call(session, "long")
    assert len(codec.encode_text(record.text)) <= limit
    assert "\ufffd" not in record.text


def test_a_limit_without_a_renderer_is_an_error() -> None:
    registry = ToolRegistry.from_tools([repeat, Counter()], {"repeat": {"max_response_tokens": 5}})
    with pytest.raises(ConfigError, match="'repeat' has max_response_tokens, and no renderer"):
        registry.session(Sample(messages=[]), "row_0")
    registry.session(Sample(messages=[], tools=("counter",)), "row_0")


async def test_the_record_keeps_what_the_model_wrote() -> None:
    class Greedy(Counter):
        name = "greedy"

        async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
            return ToolResult(str(parameters.pop("by")))

    async with opened(ToolRegistry.from_tools([Greedy()])) as session:
        record = await call(session, "greedy", {"by": 4})
    assert (record.text, record.call.arguments) == ("4", {"by": 4})


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


async def test_create_gets_its_arguments_by_name_and_as_verl_passes_them() -> None:
    seen: list[dict[str, Any]] = []

    class Watch(Counter):
        name = "watch"

        async def create(self, instance_id: str | None = None, start: int = 0, **kwargs: Any) -> None:
            seen.append({"start": start, **kwargs})

    watch = Watch()
    registry = ToolRegistry.from_tools([watch])
    given = {"start": 3, "more": 4}
    async with opened(registry, tools_kwargs={"watch": {"create_kwargs": given}}), opened(registry):
        await watch.create(create_kwargs=given)
    everything = {**given, "create_kwargs": given}
    assert seen == [everything, {"start": 0, "create_kwargs": {}}, everything]
