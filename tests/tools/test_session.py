"""The tools of one trajectory: their life."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from pydantic import BaseModel

from agentloop.errors import ConfigError, ToolInfraError
from agentloop.tools import BaseTool, ToolRegistry
from agentloop.trajectory import CallStatus, Sample
from tests.tools.examples import Counter, Sleeper, repeat
from tests.tools.sessions import call, opened


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


async def test_a_call_that_outlives_its_session_is_not_tried_again() -> None:
    class Breaks(BaseTool):
        """Fails once its trajectory is over."""

        name = "breaks"

        class Arguments(BaseModel):
            pass

        async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> str:
            await over.wait()
            raise ToolInfraError("it is gone")

        async def release(self, instance_id: str, **kwargs: Any) -> None:
            over.set()

    over = asyncio.Event()
    policies = {"breaks": {"retries": 5, "max_concurrency": 1}}
    async with opened(ToolRegistry.from_tools([Breaks()], policies)) as session:
        calls = [asyncio.create_task(call(session, "breaks")) for _ in range(2)]
        await asyncio.sleep(0.01)
    first, waiting = await asyncio.gather(*calls)
    assert (first.status, first.attempts, first.text) == (
        CallStatus.INFRA,
        1,
        "The tool 'breaks' is not available: it is gone",
    )
    assert (waiting.status, waiting.attempts) == (CallStatus.INFRA, 0)


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


@pytest.mark.parametrize("steps", range(1, 6))
async def test_closing_that_is_cancelled_releases_all_the_same(steps: int) -> None:
    class Slow(Counter):
        async def release(self, instance_id: str, **kwargs: Any) -> None:
            await asyncio.sleep(0.02)
            await super().release(instance_id, **kwargs)

    counter = Slow()
    session = ToolRegistry.from_tools([counter]).session(Sample(messages=[]), "row_0")
    await session.open()
    closing = asyncio.create_task(session.close())
    for _ in range(steps):
        await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert [what for what, _ in counter.log] == ["create", "release"]
    assert counter.instances == {}


@pytest.mark.parametrize("steps", range(1, 5))
async def test_a_registry_whose_closing_is_cancelled_closes_all_the_same(steps: int) -> None:
    class Held(Counter):
        closed = 0

        async def close(self) -> None:
            await asyncio.sleep(0.02)
            self.closed += 1

    held = Held()
    closing = asyncio.create_task(ToolRegistry.from_tools([held]).close())
    for _ in range(steps):
        await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert held.closed == 1


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
