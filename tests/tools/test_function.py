"""Functions as tools: the schema that is derived, what reaches the function, and what is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Optional

import pytest
from pydantic import BaseModel, Field

from agentloop.errors import ConfigError
from agentloop.tools import FunctionTool, InvalidArguments, ToolResponse, ToolResult, load_function_file, tool
from tests.tools.examples import repeat


class Point(BaseModel):
    x: int
    y: int = Field(0, description="the height")


class Even(BaseModel):
    n: int

    def model_post_init(self, context: Any) -> None:
        if self.n % 2:
            raise ValueError("must be even")


@dataclass
class Circle:
    radius: float


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


def parameters(made: FunctionTool) -> dict[str, Any]:
    found: dict[str, Any] = made.tool_schema.to_dict()["function"]["parameters"]
    return found


async def run(made: FunctionTool, **arguments: Any) -> Any:
    response, *_ = await made.execute("id", arguments)
    return response.text


def test_the_schema_comes_from_hints_and_docstring() -> None:
    assert repeat.tool_schema.to_dict() == {
        "type": "function",
        "function": {
            "name": "repeat",
            "description": "Repeat a text.",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string", "description": "What to repeat."},
                    "times": {"type": "integer", "description": "How often.", "default": 2},
                    "end": {"type": "string", "enum": ["", "!"], "description": "What to put at the end.", "default": ""},
                },
                "required": ["text"],
            },
        },
    }


def test_it_agrees_with_transformers_where_both_apply() -> None:
    from transformers.utils import get_json_schema

    def search(query: str, limit: int, tags: list[str]) -> str:
        """Search the web,
        and the attic.

        Args:
            query: What to look for,
                in words.
            limit: How many.
            tags: Any of these.

        Returns:
            what was found
        """
        return ""

    theirs = get_json_schema(search)
    ours = FunctionTool(search).tool_schema.to_dict()
    assert ours["function"]["parameters"] == theirs["function"]["parameters"]
    assert ours["function"]["description"] == " ".join(theirs["function"]["description"].split())


def test_a_parameter_may_be_described_where_it_stands() -> None:
    def roll(sides: Annotated[int, Field(ge=2, description="of one die")], dice: Annotated[int, "how many"] = 1) -> int:
        """Roll dice.

        Args:
            sides: is said above
        """
        return sides * dice

    assert parameters(FunctionTool(roll))["properties"] == {
        "sides": {"type": "integer", "minimum": 2, "description": "of one die"},
        "dice": {"type": "integer", "description": "how many", "default": 1},
    }


async def test_types_reach_the_function_as_it_names_them() -> None:
    seen: list[Any] = []

    @tool
    async def f(point: Point, points: list[Point], table: dict[str, int], note: Optional[str] = None, _model: int = 3) -> str:  # noqa: UP045
        seen.extend([point, points, table, note, _model])
        return "done"

    assert await run(f, point={"x": 1}, points=[{"x": 2, "y": 3}], table={"a": 1}, _model=4) == "done"
    assert seen == [Point(x=1), [Point(x=2, y=3)], {"a": 1}, None, 4]
    shown = parameters(f)
    assert shown["properties"]["note"] == {"type": ["string", "null"]}
    assert shown["properties"]["point"]["properties"]["y"] == {"type": "integer", "description": "the height", "default": 0}
    assert shown["properties"]["points"]["items"]["required"] == ["x"]
    assert shown["required"] == ["point", "points", "table"]


async def test_a_type_that_contains_itself_keeps_its_definition() -> None:
    def depth(tree: Tree) -> int:
        return 1 + max((depth(child) for child in tree.children), default=0)

    made = FunctionTool(depth)
    assert "Tree" in parameters(made)["$defs"]
    assert await run(made, tree={"value": 1, "children": [{"value": 2}]}) == "2"


@pytest.mark.parametrize(
    ("returned", "text", "reward"),
    [
        ("text", "text", 0.0),
        (None, "", 0.0),
        (3, "3", 0.0),
        (True, "true", 0.0),
        ({"a": "ä"}, '{"a": "ä"}', 0.0),
        ([1, 2], "[1, 2]", 0.0),
        (Point(x=1), '{"x": 1, "y": 0}', 0.0),
        (Circle(2.5), '{"radius": 2.5}', 0.0),
        ({"on": {date(2024, 5, 1)}}, '{"on": ["2024-05-01"]}', 0.0),
        (date(2024, 5, 1), "2024-05-01", 0.0),
        (ToolResult(42), "42", 0.0),  # type: ignore[arg-type]
        (("text", 0.5), "text", 0.5),
        (({"a": 1}, None, {"n": 1}), '{"a": 1}', 0.0),
        (ToolResult("text", reward=1.5), "text", 1.5),
    ],
)
async def test_what_a_function_may_return(returned: Any, text: str, reward: float) -> None:
    def f() -> Any:
        return returned

    response, value, _ = await FunctionTool(f).execute("id", {})
    assert (response.text, value) == (text, reward)


async def test_what_it_may_not_return() -> None:
    def four() -> Any:
        return 1, 2, 3, 4

    def nan() -> Any:
        return "text", float("nan")

    def number_as_text() -> Any:
        return ToolResponse(text=42)  # type: ignore[arg-type]

    def list_as_metrics() -> Any:
        return "text", 0.0, ["n"]

    with pytest.raises(TypeError, match=r"must be text, and its '\.text' is of type int"):
        await FunctionTool(number_as_text).execute("id", {})
    with pytest.raises(TypeError, match="metrics must be a mapping, not of type list"):
        await FunctionTool(list_as_metrics).execute("id", {})
    with pytest.raises(TypeError, match="tuple of 4"):
        await FunctionTool(four).execute("id", {})
    with pytest.raises(ValueError, match="finite"):
        await FunctionTool(nan).execute("id", {})


async def test_a_sync_function_runs_beside_the_event_loop() -> None:
    @tool
    def where() -> str:
        return threading.current_thread().name

    @tool
    def stop() -> str:
        raise StopIteration("no more")

    assert await run(where) != threading.main_thread().name
    with pytest.raises(RuntimeError, match="no more"):
        await asyncio.wait_for(run(stop), 5)


async def test_wrong_values_that_json_schema_lets_pass() -> None:
    def f(even: Even) -> str:
        return str(even.n)

    with pytest.raises(InvalidArguments, match="argument 'even': value error, must be even"):
        await FunctionTool(f).execute("id", {"even": {"n": 3}})


def test_the_decorated_function_can_still_be_called() -> None:
    assert repeat("ab", 2) == "abab"

    @tool(name="twice")
    def f(text: str) -> str:
        return text * 2

    assert (f.name, f.tool_schema.function.name, f("a")) == ("twice", "twice", "aa")


def test_signatures_that_are_refused() -> None:
    def no_hint(a) -> str:  # type: ignore[no-untyped-def]
        return ""

    def many(*words: str) -> str:
        return ""

    def positional(a: int, /) -> str:
        return ""

    def odd(b: int, a: threading.Thread) -> str:
        return ""

    def lines() -> Iterator[str]:
        yield ""

    async def later_lines() -> AsyncIterator[str]:
        yield ""

    for function, says in (
        (no_hint, "parameter 'a' of .*no_hint has no type hint"),
        (many, r"parameter '\*words: 'str'"),
        (positional, "parameter 'a: 'int''"),
        (odd, "parameter 'a' of .*odd has no JSON schema"),
        (lines, "lines is a generator"),
        (later_lines, "later_lines is a generator"),
    ):
        with pytest.raises(ConfigError, match=says):
            FunctionTool(function)


def schema(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    body = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": "f", "description": "d", "parameters": body}}


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (schema({"txt": {"type": "string"}}, ["txt"]), "offers 'txt', .* did you mean 'text'?"),
        (schema({"text": {"type": "integer"}}, ["text"]), "gives 'text' the type 'integer', the signature takes string"),
        (schema({"times": {"type": "integer"}}, []), "needs 'text', which the schema does not offer"),
        (schema({"text": {"type": "string"}}, []), "needs 'text', which the schema does not list under 'required'"),
        (schema({"text": {"type": "strin"}}, ["text"]), "cannot be 'strin'; did you mean 'string'"),
        ({"type": "function"}, "key 'tool_schema.function' is missing"),
    ],
)
def test_a_schema_that_clashes_with_the_signature(written: Any, says: str) -> None:
    def f(text: str, times: int = 2, share: float = 0.5) -> str:
        return text

    with pytest.raises(ConfigError, match=says):
        FunctionTool(f, schema=written)
    narrower = schema({"text": {"type": "string"}, "share": {"type": "integer"}}, ["text", "share"])
    assert FunctionTool(f, schema=narrower).name == "f"


def test_a_file_of_functions(tmp_path: Path) -> None:
    file = tmp_path / "functions.py"
    file.write_text("from agentloop.tools import tool\n\n@tool\ndef shout(text: str) -> str:\n    return text.upper()\n")
    assert [made.name for made in load_function_file(file)] == ["shout"]
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("x = \n")
    for name, says in (("none.py", "no function has"), ("broken.py", "SyntaxError"), ("nope.py", "no such file")):
        with pytest.raises(ConfigError, match=says):
            load_function_file(tmp_path / name)
