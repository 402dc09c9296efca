"""The DeepSeek parsers and the encoding of V3.2 against SGLang's own.

Where SGLang is installed these run; CI does not have it. They need its `function_call` and `entrypoints.openai`, and no GPU.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.chat import load_parser
from tests.chat.deepseek_ import EOS
from tests.chat.test_deepseek import TALK
from tests.chat.test_deepseek_parsers import VERSIONS, around, call, every, ids_of, renderer_of

_reason = "SGLang is not installed: the parsers are not compared with its detectors"
protocol = pytest.importorskip("sglang.srt.entrypoints.openai.protocol", reason=_reason, exc_type=ImportError)
encoding = pytest.importorskip("sglang.srt.entrypoints.openai.encoding_dsv32", reason=_reason, exc_type=ImportError)
DETECTORS: dict[str, Any] = {
    version: getattr(
        pytest.importorskip(f"sglang.srt.function_call.{module}_detector", reason=_reason, exc_type=ImportError), name
    )
    for version, module, name in zip(
        VERSIONS,
        ("deepseekv3", "deepseekv31", "deepseekv32"),
        ("DeepSeekV3Detector", "DeepSeekV31Detector", "DeepSeekV32Detector"),
        strict=True,
    )
}

NAMES = ["add", "get_weather", "a.b-c"]
TOOLS = [protocol.Tool(type="function", function=protocol.Function(name=name, parameters={})) for name in NAMES]

plain = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<>｜"), max_size=8)
text = plain | st.sampled_from(["```python\nx\n```", "a\nb", "\\n", '"quoted"', "<b>", "{}", "漢字 🙂", "[1, 2"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
keys = plain.filter(lambda key: key and '"' not in key)
calls_ = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(keys, values, max_size=3)), max_size=3)
words = st.sampled_from(["", "I call.", "one\n\ntwo", "```json\n{}\n```"])


def stripped(version: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """As SGLang has them, which takes the whitespace off the text parameters of V3.2."""
    if version != "deepseek_v32":
        return arguments
    return {key: value.strip() if isinstance(value, str) else value for key, value in arguments.items()}


def theirs(version: str, said: str) -> tuple[str, list[tuple[str, Any]]]:
    found = DETECTORS[version]().detect_and_parse(said, TOOLS)
    return found.normal_text, [(item.name, json.loads(item.parameters)) for item in found.calls]


@every
@given(words=words, calls=calls_)
@settings(max_examples=150, deadline=None)
def test_the_same_calls_as_sglang(version: str, words: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    said = words + (around(version, *(call(version, *one) for one in calls)) if calls else "")
    parsed = load_parser(version, renderer_of(version)).parse(ids_of(version, said + EOS))
    assert parsed.errors == []
    ours = [(c.name, stripped(version, c.arguments)) for c in parsed.calls]
    assert (parsed.content.strip(), ours) == (theirs(version, said)[0].strip(), theirs(version, said)[1])


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tools", [False, True])
def test_the_same_encoding_as_sglang(thinking: bool, tools: bool) -> None:
    """But for the blank lines in the section on tools, which the published encoding has and SGLang's copy lost."""
    schemas = [{"type": "function", "function": {"name": name, "description": "é", "parameters": {}}} for name in NAMES]
    renderer = renderer_of("deepseek_v32", thinking=thinking)
    for stop in (2, 5, 7, 9):
        talk = [dict(message) for message in TALK[:stop]]
        ours = renderer.decode(renderer.prompt(talk, schemas if tools else None))
        if tools:
            talk[0]["tools"] = schemas
            head, rest = ours.split("</functions>", 1)
            name, head = head.split("\n\n", 1)
            ours = f"{name}\n\n" + head.replace("\n\n", "\n") + "</functions>" + rest
        assert ours == encoding.encode_messages(talk, thinking_mode="thinking" if thinking else "chat")


# -- where the two differ, as docs/renderers.md lists it ----------------------------------------------------------------------

INVOKE, INVOKED = '<｜DSML｜invoke name="add">\n', "\n</｜DSML｜invoke>"


def parameter(value: str, flag: str, name: str = "a") -> str:
    return f'<｜DSML｜parameter name="{name}" string="{flag}">{value}</｜DSML｜parameter>'


def v32(*lines: str) -> str:
    return around("deepseek_v32", INVOKE + "\n".join(lines) + INVOKED)


Calls = list[tuple[str, Any]]
DIFFERENCES: dict[str, tuple[str, str, Calls, str | None, Calls]] = {
    # what: version, what is said, our calls, our error, SGLang's calls
    "a tool that was not offered": (
        "deepseek_v31",
        around("deepseek_v31", call("deepseek_v31", "other"), call("deepseek_v31")),
        [("other", {}), ("add", {})],
        None,
        [("add", {})],
    ),
    "one call of two is malformed": (
        "deepseek_v31",
        around("deepseek_v31", call("deepseek_v31"), call("deepseek_v31").replace("{}", "{")),
        [("add", {})],
        "its JSON is malformed",
        [],
    ),
    "NaN": (
        "deepseek_v31",
        around("deepseek_v31", call("deepseek_v31").replace("{}", '{"a": Infinity}')),
        [],
        "Infinity is not JSON",
        [("add", {"a": float("inf")})],
    ),
    "arguments that are a list": (
        "deepseek_v3",
        around("deepseek_v3", call("deepseek_v3").replace("{}", "[1]")),
        [],
        'its "arguments" are a list',
        [("add", [1])],
    ),
    "another type than function": (
        "deepseek_v3",
        around("deepseek_v3", call("deepseek_v3").replace("function", "tool")),
        [],
        "its type is 'tool'",
        [("add", {})],
    ),
    "calls in reasoning": (
        "deepseek_v31",
        f"<think>{around('deepseek_v31', call('deepseek_v31'))}</think>done",
        [],
        None,
        [("add", {})],
    ),
    "a section that is not closed": (
        "deepseek_v32",
        v32(parameter("1", "false")).removesuffix("</｜DSML｜function_calls>"),
        [("add", {"a": 1})],
        "is missing",
        [],
    ),
    "whitespace around text": (
        "deepseek_v32",
        v32(parameter(" x ", "true")),
        [("add", {"a": " x "})],
        None,
        [("add", {"a": "x"})],
    ),
    "no JSON where it should be": (
        "deepseek_v32",
        v32(parameter("x", "false")),
        [],
        "malformed",
        [("add", {"a": "x"})],
    ),
    "a parameter that is given twice": (
        "deepseek_v32",
        v32(parameter("1", "false"), parameter("2", "false")),
        [],
        "stands twice",
        [("add", {"a": 2})],
    ),
    "a parameter that is written wrongly": (
        "deepseek_v32",
        v32('<｜DSML｜parameter name="a">1</｜DSML｜parameter>', parameter("2", "false", "b")),
        [],
        "is not written as",
        [("add", {"b": 2})],
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_where_this_parser_and_sglangs_differ(what: str) -> None:
    """An upgrade of SGLang that changes one of these should change the docs."""
    version, said, ours, error, others = DIFFERENCES[what]
    parsed = load_parser(version, renderer_of(version)).parse(ids_of(version, said + EOS))
    assert [(c.name, c.arguments) for c in parsed.calls] == ours
    assert (parsed.errors == []) if error is None else (len(parsed.errors) == 1 and error in parsed.errors[0])
    assert theirs(version, said)[1] == others


@every
def test_markers_that_are_spelled_are_calls_for_sglang_alone(version: str) -> None:
    renderer, said = renderer_of(version), around(version, call(version))
    assert load_parser(version, renderer).parse(renderer.encode_text(said)).calls == []
    assert theirs(version, said)[1] == [("add", {})]
