"""Our tools in verl's loop, verl's tools in our registry, one file for both."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl", reason="verl is not installed")

from verl.tools.tool_registry import initialize_tools_from_config, load_all_tools

from agentloop.tools import FunctionTool, ToolRegistry
from agentloop.tools.calculator import Calculator
from agentloop.trajectory import CallStatus, Sample, ToolCall
from tests.tools.examples import Counter, repeat
from tests.tools.verl_tools import Tally

FILE = """
tools:
  - class_name: agentloop.tools.calculator.Calculator
    config: {type: native}
    timeout: 5
    on_error: drop_sample
  - class_name: tests.tools.verl_tools.Tally
    config: {type: native}
    max_concurrency: 2
    tool_schema:
      type: function
      function:
        name: adder
        description: Add to a total.
        parameters:
          type: object
          properties: {by: {type: integer, description: how much}}
          required: [by]
"""


async def verl_calls(tools: list[Any], name: str, arguments: Any, **tools_kwargs: Any) -> tuple[Any, float, dict[str, Any]]:
    """One call as verl's ToolAgentLoop makes it: its own `_call_tool`, on its own loop object."""
    from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
    from verl.experimental.agent_loop.tool_parser import FunctionCall

    loop = ToolAgentLoop.__new__(ToolAgentLoop)  # without a model; `_call_tool` reads these alone
    loop.tools = {tool.name: tool for tool in tools}
    loop.max_tool_response_length, loop.tool_response_truncate_side = 256, "middle"
    asked = FunctionCall(name=name, arguments=json.dumps(arguments))
    result: tuple[Any, float, dict[str, Any]] = await loop._call_tool(asked, tools_kwargs, SimpleNamespace())
    return result


async def test_one_file_serves_both(tmp_path: Path) -> None:
    file = tmp_path / "tools.yaml"
    file.write_text(FILE)
    theirs = initialize_tools_from_config(str(file))
    ours = ToolRegistry.from_yaml(file)
    assert [tool.name for tool in theirs] == ours.names == ["calculator", "adder"]
    for tool, entry in zip(theirs, ours, strict=True):
        assert tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) == entry.schema
    response, reward, metrics = await verl_calls(theirs, "calculator", {"expression": "6*7"})
    assert (response.text, reward, metrics) == ("42", 0.0, {})
    response, *_ = await verl_calls(theirs, "calculator", {"expression": "1/0"})
    assert response.text == "Error: division by zero"
    response, reward, _ = await verl_calls(theirs, "adder", {"by": 2}, adder={"create_kwargs": {"start": 3}})
    assert (response.text, reward) == ("5", 0.5)


async def test_tools_that_answer_our_way_work_in_verls_loop() -> None:
    counter = Counter()
    tools = [counter, repeat, Calculator()]
    response, reward, metrics = await verl_calls(tools, "counter", {"by": 2}, counter={"create_kwargs": {"start": 40}})
    assert (response.text, reward, metrics) == ("42", 0.25, {"steps": 1})
    assert [what for what, _ in counter.log] == ["create", "execute", "release"]
    response, *_ = await verl_calls(tools, "repeat", {"text": "ab"})
    assert response.text == "abab"
    response, *_ = await verl_calls(tools, "repeat", {"text": 3, "times": "x"})
    assert "argument 'text': input should be a valid string" in response.text


async def test_verls_parsers_read_our_schemas(tokenizer: Any) -> None:
    from verl.experimental.agent_loop.tool_parser import ToolParser

    text = "<tool_call>\n<function=counter>\n<parameter=by>\n3\n</parameter>\n</function>\n</tool_call>"
    parser = ToolParser.get_tool_parser("qwen3_coder", tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    _, calls = await parser.extract_tool_calls(ids, [Counter().tool_schema, repeat.tool_schema])
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("counter", {"by": 3})]


async def test_a_tool_of_verls_lives_in_our_registry() -> None:
    tally = Tally({"type": "native"}, None)
    registry = ToolRegistry.from_tools([tally])
    session = registry.session(Sample(messages=[], tools_kwargs={"tally": {"create_kwargs": {"start": 5}}}), "row_0")
    await session.open()
    deadline = asyncio.get_running_loop().time() + 20
    records = [await session.call(ToolCall("tally", {"by": 1}), deadline=deadline) for _ in range(2)]
    assert [(record.text, record.reward, record.metrics) for record in records] == [
        ("6", 0.5, {"n": 1.0}),
        ("7", 0.5, {"n": 1.0}),
    ]
    assert (await session.call(ToolCall("tally", [1]), deadline=deadline)).status is CallStatus.INVALID_ARGUMENTS
    assert await session.rewards() == {"tool/tally": 8.0}
    await session.close()
    assert [what for what, _ in tally.log] == ["create", "execute", "execute", "calc_reward", "release"]


FUNCTIONS = '''
from verl.tools.function_tool import function_tool


@function_tool
def {name}(text: str, times: int = 2) -> dict:
    """Say it again.

    Args:
        text: What to say.
        times: How often.
    """
    return {{"said": text * times}}


@function_tool("{name}_later")
async def later(text: str):
    """Say it later.

    Args:
        text: What to say.
    """
    return text, 0.5, {{"n": 1}}
'''


@pytest.mark.parametrize("first", ["verl", "agentloop"])
async def test_a_file_of_verls_function_tools(tmp_path: Path, first: str) -> None:
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS.format(name=f"say_{first}"))
    if first == "verl":  # verl's worker loads the same file in the same process
        theirs = load_all_tools(None, str(file))
        registry = ToolRegistry.load(function_tool_path=file)
    else:
        registry = ToolRegistry.load(function_tool_path=file)
        theirs = load_all_tools(None, str(file))
    assert [tool.name for tool in theirs] == registry.names == [f"say_{first}", f"say_{first}_later"]
    assert all(isinstance(tool, FunctionTool) for tool in registry.tools)
    session = registry.session(Sample(messages=[]), "row_0")
    await session.open()
    deadline = asyncio.get_running_loop().time() + 20
    record = await session.call(ToolCall(f"say_{first}", {"text": "a"}), deadline=deadline)
    assert record.text == '{"said": "aa"}'
    record = await session.call(ToolCall(f"say_{first}_later", {"text": "a"}), deadline=deadline)
    assert (record.text, record.reward, record.metrics) == ("a", 0.5, {"n": 1.0})
    await session.close()
