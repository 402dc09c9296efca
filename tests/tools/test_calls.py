"""What becomes of one call: arguments, failures, answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from agentloop.errors import ToolError, ToolInfraError
from agentloop.tools import ToolRegistry, ToolResponse, ToolResult, tool
from agentloop.trajectory import CallStatus
from tests.tools.examples import Counter, repeat
from tests.tools.sessions import call, opened


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


async def test_arguments_that_are_nested_too_deeply_are_refused() -> None:
    @tool
    def depth(data: dict[str, Any]) -> str:
        """Look at it.

        Args:
            data: Anything.
        """
        return "seen"

    async with opened(ToolRegistry.from_tools([depth])) as session:
        for levels, status in ((90, CallStatus.OK), (150, CallStatus.INVALID_ARGUMENTS), (900, CallStatus.INVALID_ARGUMENTS)):
            record = await call(session, "depth", {"data": {"x": json.loads("[" * levels + "]" * levels)}})
            assert record.status is status, record.text
    assert "nested more than 100 deep" in record.text


async def test_an_unknown_tool_is_answered_with_the_nearest() -> None:
    async with opened(ToolRegistry.from_tools([repeat])) as session:
        record = await call(session, "repaet", {})
    assert (record.status, record.text) == (CallStatus.UNKNOWN_TOOL, "There is no tool 'repaet'; did you mean 'repeat'?")


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


async def test_the_record_keeps_what_the_model_wrote() -> None:
    class Greedy(Counter):
        name = "greedy"

        async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
            return ToolResult(str(parameters.pop("by")))

    async with opened(ToolRegistry.from_tools([Greedy()])) as session:
        record = await call(session, "greedy", {"by": 4})
    assert (record.text, record.call.arguments) == ("4", {"by": 4})
