"""Tools files: what they may say, and what is said about those that are wrong."""

from __future__ import annotations

import asyncio
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from agentloop.cli import build
from agentloop.errors import ConfigError
from agentloop.tools import CircuitBreaker, RateLimit, ToolPolicy, ToolRegistry, tool
from agentloop.tools.registry import read_tools
from agentloop.trajectory import Sample, ToolCall
from tests.tools.examples import Counter, repeat

MODULE = '''
from pydantic import BaseModel

from agentloop.tools import BaseTool, tool


def shout(text: str, loud: bool = True) -> str:
    """Say it loudly."""
    return text.upper() if loud else text


@tool
def whisper(text: str) -> str:
    return text.lower()


def untyped(text):
    return text


class Echo(BaseTool):
    """Says it again."""

    name = "echo"

    class Arguments(BaseModel):
        text: str

    async def execute(self, instance_id, parameters, **kwargs):
        return self.config.get("prefix", "") + parameters["text"]


class Sync(Echo):
    name = "sync"

    def execute(self, instance_id, parameters, **kwargs):
        return ""


class Bare(BaseTool):
    async def execute(self, instance_id, parameters, **kwargs):
        return ""


class Leaves(Echo):
    def __init__(self, config, tool_schema):
        raise SystemExit(3)


class Fails(Echo):
    def __init__(self, config, tool_schema):
        raise OSError("no licence key")
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own_tools.py").write_text(MODULE)
    (tmp_path / "leaves.py").write_text("raise SystemExit(4)")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    file = folder / "tools.yaml"
    file.write_text(textwrap.dedent(text))
    return file


def answer(registry: ToolRegistry, name: str, arguments: object) -> str:
    async def ask() -> str:
        session = registry.session(Sample(messages=[]), "row_0")
        await session.open()
        record = await session.call(ToolCall(name, arguments), deadline=asyncio.get_running_loop().time() + 20)
        await session.close()
        return record.text

    return asyncio.run(ask())


def test_a_file_with_everything(folder: Path) -> None:
    file = write(
        folder,
        """
        tools:
          - class_name: calculator
            timeout: 5
            rate_limit: 600/min
          - class_name: own_tools.Echo
            config: {type: native, prefix: "> "}
            max_concurrency: 4
            cluster_concurrency: 8
            deadline: 9
            circuit_breaker: {failures: 2}
            rate_limit: {calls: 10, period: 2}
            retries: 3
            on_error: drop_sample
          - function: own_tools:shout
            tool_schema:
              type: function
              function:
                name: cry
                description: Cry out.
                parameters:
                  type: object
                  properties: {text: {type: string, maxLength: 5}}
                  required: [text]
          - function: own_tools:whisper
        """,
    )
    registry = ToolRegistry.from_yaml(file)
    assert registry.names == ["calculator", "echo", "cry", "whisper"]
    policies = {entry.name: entry.policy for entry in registry}
    assert policies["calculator"] == ToolPolicy(timeout=5, rate_limit=RateLimit(calls=600, period=60))
    assert policies["echo"].rate_limit == RateLimit(calls=10, period=2)
    assert policies["echo"].circuit_breaker == CircuitBreaker(failures=2, open_s=30)
    assert (policies["echo"].on_error, policies["echo"].extra_attempts) == ("drop_sample", 3)
    assert answer(registry, "calculator", {"expression": "6*7"}) == "42"
    assert answer(registry, "echo", {"text": "hi"}) == "> hi"
    assert answer(registry, "cry", {"text": "help"}) == "HELP"
    assert "too long" in answer(registry, "cry", {"text": "help me"})
    assert "no argument 'loud'" in answer(registry, "cry", {"text": "help", "loud": False})
    assert registry.schemas[2]["function"]["parameters"]["properties"] == {"text": {"type": "string", "maxLength": 5}}


def test_modules_of_one_name_beside_two_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "twins.py").write_text(f'def twin() -> str:\n    return "{name}"\n')
        registry = ToolRegistry.from_yaml(write(tmp_path / name, "tools: [{function: 'twins:twin'}]"))
        assert answer(registry, "twin", {}) == name


WRONG = [
    ("- {class_name: calculator, timeot: 3}", "tool 'calculator': unknown key 'timeot'; did you mean 'timeout'?"),
    ("- {class_name: calculator, timeout: 0}", "tool 'calculator': key 'timeout': input should be greater than 0, got 0"),
    ("- {class_name: calculator, on_error: drop}", "key 'on_error' cannot be 'drop'; "),
    ("- {class_name: calculator, on_error: observ}", "key 'on_error' cannot be 'observ'; did you mean 'observe'?"),
    ("- {class_name: calculator, rate_limit: often}", "key 'rate_limit': expected '10/1s'"),
    ("- {class_name: calculator, rate_limit: {cals: 3}}", "unknown key 'rate_limit.cals'; did you mean 'calls'?"),
    ("- {class_name: calculator, deadlin: 3}", "unknown key 'deadlin'; did you mean 'deadline'?"),
    ("- {class_name: calculator, cluster_rate_limit: often}", "key 'cluster_rate_limit': expected '10/1s'"),
    ("- {class_name: calculator, circuit_breaker: {failurs: 3}}", "'circuit_breaker.failurs'; did you mean 'failures'?"),
    ("- {class_name: calculator, circuit_breaker: 3}", "key 'circuit_breaker': expected a mapping, got 3"),
    ("- {class_name: calculator, parallel: 3}", "key 'parallel': "),
    ("- {class_name: calculator, config: {type: mcp}}", "key 'config.type' cannot be 'mcp'; only 'native' is known"),
    ("- {class_name: calculator, config: {digits: 3}}", "unknown key 'config.digits'"),
    ("- {class_name: calculater}", "'calculater' has no module; did you mean 'calculator'?"),
    ("- {class_name: own_tool.Echo}", "there is no module 'own_tool'; did you mean 'own_tools'?"),
    ("- {class_name: own_tools.Eco}", "own_tools has no 'Eco'; did you mean 'Echo'?"),
    ("- {class_name: own_tools.shout}", "own_tools.shout is not a tool class"),
    ("- {class_name: own_tools.Fails}", "own_tools.Fails cannot be made from its config: OSError: no licence key"),
    ("- {class_name: own_tools.Sync}", "'execute' of tool 'sync' must be 'async def'"),
    ("- {function: 'own_tools:Echo'}", "Echo is a class; give an instance, or name it under 'class_name'"),
    ("- {function: 'own_tools:untyped'}", "parameter 'text' of untyped has no type hint"),
    ("- {function: 'own_tools:shout', config: {a: 1}}", "key 'config.a': a function takes no config"),
    ("- {function: shout}", "'shout' has no module; write 'package.module:function'"),
    ("- {timeout: 3}", "tool 1: give either 'class_name' or 'function'"),
    ("- {function: 'own_tools:shout', class_name: calculator}", "give either 'class_name' or 'function', not both"),
    ("- calculator", "tool 1: expected a mapping, got 'calculator'"),
    ("- {class_name: own_tools.Echo, tool_schema: {type: function}}", "key 'tool_schema.function' is missing"),
    ("- {class_name: own_tools.Echo, tool_schema: 3}", "key 'tool_schema': expected a mapping, got 3"),
    (
        "- {class_name: own_tools.Echo, tool_schema: {type: function, function: {name: echo, paramters: {}}}}",
        "unknown key 'tool_schema.function.paramters'; did you mean 'parameters'?",
    ),
    (
        "- {class_name: own_tools.Echo, tool_schema: {type: function, function: {name: echo, parameters: "
        "{properties: {text: {type: array, items: {type: sting}}}}}}}",
        "key 'tool_schema.function.parameters.properties.text.items.type' cannot be 'sting'; did you mean 'string'?",
    ),
    (
        "- {class_name: own_tools.Bare, tool_schema: {type: function, function: {name: bare, parameters: "
        "{properties: {text: {type: string}}, required: [txt]}}}}",
        "key 'tool_schema.function.parameters.required': there is no argument 'txt'; did you mean 'text'?",
    ),
    ("- {class_name: own_tools.Leaves}", "own_tools.Leaves cannot be made from its config: SystemExit: 3"),
    ("- {function: 'leaves:f'}", "cannot import 'leaves:f': SystemExit: 4"),
    (
        "- {function: 'own_tools:shout', tool_schema: {type: function, function: {name: cry, parameters: "
        "{type: object, properties: {txt: {type: string}}, required: [txt]}}}}",
        "tool 'cry': the schema clashes with the signature of shout: the schema offers 'txt', ",
    ),
    (
        "- {class_name: calculator, tool_schema: {type: function, function: {name: calc, parameters: "
        "{type: object, properties: {expr: {type: string}}, required: [expr]}}}}",
        "tool 'calc': the schema clashes with Calculator.Arguments: the schema offers 'expr'",
    ),
    (
        "- {class_name: own_tools.Echo, tool_schema: {type: function, function: {name: echo, parameters: "
        "{type: object, properties: {text: {type: string, minLength: many}}, required: [text]}}}}",
        "key 'tool_schema.function.parameters.properties.text.minLength'",
    ),
    (
        "- {class_name: calculator}\n- {class_name: calculator}",
        "the name 'calculator' is taken by tool 1; a name must be unique",
    ),
]


@pytest.mark.parametrize(("entry", "says"), WRONG)
def test_what_is_wrong_is_said_in_one_sentence(folder: Path, entry: str, says: str) -> None:
    file = write(folder, "tools:\n" + entry)
    with pytest.raises(ConfigError) as caught:
        ToolRegistry.from_yaml(file)
    assert str(caught.value).startswith(f"{file}: tool ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tool: []", "unknown key 'tool'; did you mean 'tools'?"),
        ("tools: 3", "key 'tools' must be a list of tools, got 3"),
        ("tools: [", "not valid YAML"),
        ("- a", "expected a mapping at the top"),
        ("{}", "key 'tools' is missing"),
    ],
)
def test_files_without_a_list_of_tools(folder: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ToolRegistry.from_yaml(write(folder, text))
    assert says in str(caught.value)
    with pytest.raises(ConfigError, match="no such file"):
        ToolRegistry.from_yaml(folder / "nope.yaml")


def test_from_tools_refuses_the_same() -> None:
    for tools, policies, says in (
        ([Counter(), Counter()], {}, "two tools are called 'counter'"),
        ([repeat], {"repeet": {}}, "there is no tool 'repeet'; did you mean 'repeat'?"),
        ([repeat], {"repeat": {"retrys": 1}}, "tool 'repeat': unknown key 'retrys'; did you mean 'retries'?"),
        ([3], {}, "3 is neither a tool nor a function"),
        ([Counter], {}, "Counter is a class"),
    ):
        with pytest.raises(ConfigError, match=says):
            ToolRegistry.from_tools(tools, policies)


def test_functions_beside_a_file_must_not_share_names(folder: Path) -> None:
    file = write(folder, "tools: [{function: 'own_tools:shout'}]")
    (folder / "more.py").write_text("from agentloop.tools import tool\n@tool\ndef shout() -> str:\n    return ''\n")
    with pytest.raises(ConfigError, match="two tools are called 'shout'"):
        ToolRegistry.load(file, folder / "more.py")


# -- the command line -------------------------------------------------------------------------------------------------------


def agentloop(*arguments: object) -> Result:
    return CliRunner().invoke(build("tools"), ["tools", *map(str, arguments)])


def test_lint_prints_every_problem(folder: Path) -> None:
    entries = [entry for entry, _ in WRONG[:-1]]
    file = write(folder, "tolls: 1\ntools:\n" + "\n".join(entries))
    result = agentloop("lint", file)
    assert result.exit_code == 2
    for _, says in WRONG[:-1]:
        assert says.removeprefix("tool 1: ") in result.output
    assert "unknown key 'tolls'; did you mean 'tools'?" in result.output
    _, problems = read_tools(file)
    assert len(result.output.splitlines()) == len(problems) > len(entries)
    fine = agentloop("lint", write(folder, "tools: [{class_name: calculator}]"))
    assert (fine.exit_code, "1 tool, nothing wrong" in fine.output) == (0, True)


def test_list_shows_arguments_and_policies(folder: Path) -> None:
    result = agentloop("list", write(folder, "tools: [{function: 'own_tools:shout', rate_limit: 5/1s, on_error: retry}]"))
    assert result.exit_code == 0
    for shown in ("shout", "text, [loud]", "rate_limit=5/1s", "on_error=retry"):
        assert shown in result.output


def test_explain_is_the_difference_of_two_prompts(folder: Path, tokenizer: object) -> None:
    tokenizer.save_pretrained(folder / "model")  # type: ignore[attr-defined]
    file = write(folder, "tools: [{class_name: calculator}, {function: 'own_tools:shout'}]")
    result = agentloop("explain", file, "--model", folder / "model")
    assert result.exit_code == 0
    shown = {row[1].strip(): int(row[2]) for row in (line.split("│") for line in result.output.splitlines()) if len(row) == 4}
    schemas = ToolRegistry.from_yaml(file).schemas

    def tokens(tools: list[dict[str, object]]) -> int:
        messages = [{"role": "user", "content": "Hello"}]
        text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            messages, tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        return len(tokenizer.encode(text))  # type: ignore[attr-defined]

    assert shown["calculator"] == tokens(schemas) - tokens(schemas[1:])
    assert shown["shout"] == tokens(schemas) - tokens(schemas[:1])
    assert shown["together"] == tokens(schemas) - tokens([]) == sum(shown.values()) - shown["together"]
    with pytest.raises(ConfigError, match="no such folder"):
        raise agentloop("explain", file, "--model", folder / "nope").exception or AssertionError


def test_try_runs_one_call_under_the_policies(folder: Path, tokenizer: object) -> None:
    file = write(folder, "tools: [{class_name: calculator}, {function: 'own_tools:shout', max_response_tokens: 60}]")
    result = agentloop("try", file, "calculator", '{"expression": "2/3"}')
    assert result.exit_code == 0
    assert "status    ok" in result.output
    assert "2/3 ≈ 0.666666666666667" in result.output
    wrong = agentloop("try", file, "calculator", '{"expr": "2/3"}')
    assert (wrong.exit_code, "invalid_arguments" in wrong.output) == (1, True)
    tokenizer.save_pretrained(folder / "model")  # type: ignore[attr-defined]
    text = '{"text": "' + "abc " * 200 + '"}'
    assert "tokens left out" in agentloop("try", file, "shout", text, "--model", folder / "model").output
    assert "max_response_tokens is not applied" in agentloop("try", file, "shout", text).output
    for arguments, says in (
        (("shuot", "{}"), "there is no tool 'shuot'; did you mean 'shout'?"),
        (("shout", "{"), "not valid JSON"),
        (("shout", "{}", "--create-kwargs", "[]"), "expected a JSON object"),
    ):
        with pytest.raises(ConfigError, match=says):
            raise agentloop("try", file, *arguments).exception or AssertionError


def test_create_kwargs_reach_create(folder: Path) -> None:
    file = write(folder, "tools: [{class_name: tests.tools.examples.Counter}]")
    result = agentloop("try", file, "counter", '{"by": 2}', "--create-kwargs", '{"start": 40}')
    assert result.output.endswith("text\n42\n")
    assert "reward    42.25 (tool/counter)" in result.output


def test_tool_objects_stay_functions() -> None:
    assert tool(lambda: "x")() == "x"
