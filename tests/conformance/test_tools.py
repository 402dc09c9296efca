"""What every tool must do, whoever wrote it: each shipped one, a function, one of our base class, one of verl's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from agentloop.sandboxes.base import SandboxError
from agentloop.tools import BaseTool, ToolRegistry, ToolSchema
from agentloop.tools.calculator import Calculator
from agentloop.tools.file import File
from agentloop.tools.python import Python
from agentloop.tools.shell import Shell
from agentloop.tools.submit import Submit
from agentloop.tools.sympy_math import SympyMath
from agentloop.tools.workspace import SandboxTool
from agentloop.trajectory import CallStatus, Sample, ToolCall
from tests.tools import services
from tests.tools.examples import Counter, Sleeper, repeat


def verls() -> Any:
    pytest.importorskip("verl", reason="verl is not installed")
    from tests.tools.verl_tools import Tally

    return Tally({"type": "native"}, None)


BOX = {"sandbox": {"kind": "process", "preload": [], "limits": {"timeout_s": 10}}}

TOOLS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "calculator": (Calculator, {"expression": "6*7"}, "42"),
    "python": (lambda: Python(BOX), {"code": "6*7"}, "42"),
    "python, stateless": (lambda: Python({**BOX, "stateful": False}), {"code": "6*7"}, "42"),
    "shell": (lambda: Shell(BOX), {"command": "expr 6 '*' 7"}, "42"),
    "file": (lambda: File(BOX), {"action": "list"}, "The folder is empty."),
    "submit": (Submit, {"answer": "42"}, "42"),
    "search": (services.search, {"query": "rings"}, "[1] saturn (id: saturn.txt)\nSaturn has rings."),
    "sympy_math": (
        lambda: SympyMath({"scope": "process", "workers": 1, "limit_s": 60}),
        {"operation": "simplify", "expression": "6*7"},
        "42",
    ),
    "http_tool": (services.http_tool, {"question": "6*7"}, "42"),
    "mcp": (services.mcp, {"text": "42"}, "42"),
    "function": (lambda: repeat, {"text": "ab"}, "abab"),
    "counter": (Counter, {"by": 3}, "3"),
    "sleeper": (Sleeper, {"seconds": 0.0}, "awake"),
    "verl": (verls, {"by": 3}, "3"),
}
"""By name: how to make one, arguments that it takes, what it answers."""

METHODS = ("create", "execute", "calc_reward", "release")


@pytest.fixture(params=list(TOOLS))
async def case(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Any, dict[str, Any], str]]:
    make, arguments, answer = TOOLS[request.param]
    tool = make()
    if isinstance(tool, SandboxTool):
        try:
            await tool.sandbox.start()
        except SandboxError as error:
            pytest.skip(f"no process sandbox here: {error}")
    yield tool, arguments, answer
    if isinstance(tool, BaseTool):
        await tool.close()


@pytest.fixture
def calls(case: tuple[Any, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the tool: (method, instance id)."""
    seen: list[tuple[str, str]] = []

    def watch(method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        async def watched(instance_id: str, *args: Any, **kwargs: Any) -> Any:
            if method != "create":
                seen.append((method, instance_id))
            returned = await original(instance_id, *args, **kwargs)
            if method == "create":  # one that did not get to its end made nothing
                seen.append((method, instance_id))
            return returned

        return watched

    for method in METHODS:
        monkeypatch.setattr(case[0], method, watch(method, getattr(case[0], method)))
    return seen


def test_the_schema_is_valid_and_names_the_tool(case: tuple[Any, dict[str, Any], str]) -> None:
    tool, arguments, _ = case
    schema = tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True)
    assert schema["type"] == "function"
    assert schema["function"]["name"] == tool.name == tool.tool_schema.function.name
    Draft202012Validator.check_schema(schema["function"]["parameters"])
    Draft202012Validator(schema["function"]["parameters"]).validate(arguments)
    assert ToolSchema.of(tool.tool_schema).to_dict() == schema


async def test_verls_life_and_tuples(case: tuple[Any, dict[str, Any], str]) -> None:
    tool, arguments, answer = case
    instance_id, created = await tool.create(create_kwargs={})
    assert isinstance(instance_id, str)
    assert created.text is None
    response, reward, metrics = await tool.execute(instance_id, dict(arguments), agent_data=object())
    assert (response.text, isinstance(reward, float), isinstance(metrics, dict)) == (answer, True, True)
    assert not response.image
    assert isinstance(await tool.calc_reward(instance_id), float)
    await tool.release(instance_id)
    assert (await tool.create("mine"))[0] == "mine"
    await tool.release("mine")


async def test_the_order_of_its_life(case: tuple[Any, dict[str, Any], str], calls: list[tuple[str, str]]) -> None:
    tool, arguments, answer = case
    session = ToolRegistry.from_tools([tool]).session(Sample(messages=[]), "row_0")
    await session.open()
    deadline = asyncio.get_running_loop().time() + 20
    record = await session.call(ToolCall(tool.name, arguments), deadline=deadline)
    assert (record.status, record.text) == (CallStatus.OK, answer)
    assert (await session.call(ToolCall(tool.name, arguments), deadline=deadline)).status is CallStatus.OK
    assert (await session.call(ToolCall(tool.name, [1]), deadline=deadline)).status is CallStatus.INVALID_ARGUMENTS
    await session.rewards()
    await session.close()
    await session.close()
    assert [method for method, _ in calls] == ["create", "execute", "execute", "calc_reward", "release"]
    assert len({instance for _, instance in calls}) == 1


async def test_many_trajectories_share_one_tool(case: tuple[Any, dict[str, Any], str], calls: list[tuple[str, str]]) -> None:
    tool, arguments, answer = case
    registry = ToolRegistry.from_tools([tool])

    async def one() -> str:
        session = registry.session(Sample(messages=[]), "row_0")
        await session.open()
        record = await session.call(ToolCall(tool.name, arguments), deadline=asyncio.get_running_loop().time() + 60)
        await session.close()
        return record.text

    assert await asyncio.gather(*[one() for _ in range(20)]) == [answer] * 20
    created = [instance for method, instance in calls if method == "create"]
    released = [instance for method, instance in calls if method == "release"]
    assert len(set(created)) == 20
    assert sorted(created) == sorted(released)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 20])
async def test_cancelled_anywhere_it_is_released_and_can_be_used_again(
    case: tuple[Any, dict[str, Any], str], calls: list[tuple[str, str]], steps: int
) -> None:
    tool, arguments, answer = case
    registry = ToolRegistry.from_tools([tool], {tool.name: {"max_concurrency": 1}})
    deadline = asyncio.get_running_loop().time() + 60

    async def trajectory() -> str:
        session = registry.session(Sample(messages=[]), "row_0")
        try:
            await session.open()
            record = await session.call(ToolCall(tool.name, arguments), deadline=deadline)
        finally:
            await session.close()
        return record.text

    task = asyncio.create_task(trajectory())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await trajectory() == answer
    created = [instance for method, instance in calls if method == "create"]
    released = [instance for method, instance in calls if method == "release"]
    assert sorted(released) == sorted(created)
    assert len(released) == len(set(released))
    if isinstance(tool, BaseTool):
        assert tool.instances == {}


def test_every_shipped_tool_is_here() -> None:
    from agentloop.tools.registry import SHIPPED

    assert set(SHIPPED) <= set(TOOLS)
