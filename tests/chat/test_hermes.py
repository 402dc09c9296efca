"""The Hermes parser: what it reads, and what it tells the model about what it cannot read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.chat import HermesParser, load_parser, load_renderer
from agentloop.chat.hermes import parse_text
from agentloop.errors import ConfigError
from agentloop.trajectory import ToolCall
from tests.chat.templates import DROPS_REASONING, QWEN_LIKE
from tests.chat.tokenizers_ import tokenizer


def call(name: str = "add", arguments: object = None) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments or {}})}\n</tool_call>"


def test_reads_reasoning_content_and_several_calls() -> None:
    tok = tokenizer("qwen")
    text = f"<think>\nhm\n</think>\n\nI add.\n{call('add', {'a': 1})}\n{call('sub', {'b': [2, None]})}<|im_end|>"
    parsed = HermesParser(tok).parse(tok(text)["input_ids"], turn=3)
    assert (parsed.content, parsed.reasoning, parsed.errors) == ("I add.", "hm", [])
    assert parsed.calls == [ToolCall("add", {"a": 1}, "t0003c000"), ToolCall("sub", {"b": [2, None]}, "t0003c001")]


def test_tags_spelled_with_ordinary_tokens_count() -> None:
    tok = tokenizer("qwen")
    renderer = load_renderer(tok, chat_template=QWEN_LIKE)
    ids = renderer.encode_text(call("add", {"a": 1}))
    assert tok.convert_tokens_to_ids("<tool_call>") not in ids
    assert load_parser("hermes", renderer).parse(ids).calls == [ToolCall("add", {"a": 1}, "t0000c000")]


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{call()}</think>done",
        f"<think>{call()}",
        f"a<think>b</think>c<think>{call()}</think>",
        f"<tool_call>junk <think></tool_call>{call()}</think>",
    ],
)
def test_calls_in_reasoning_are_never_returned(text: str) -> None:
    assert parse_text(text).calls == []


def test_a_turn_that_begins_in_reasoning() -> None:
    tok = tokenizer("qwen")
    renderer = load_renderer(tok, chat_template=DROPS_REASONING)
    assert renderer.opens_reasoning
    parser = HermesParser(renderer)
    ids = tok(f"hm {call('no')}</think>\n\n{call('yes')}<|im_end|>")["input_ids"]
    assert [c.name for c in parser.parse(ids, in_reasoning=True).calls] == ["yes"]
    unclosed = parser.parse(tok(f"hm {call('no')}")["input_ids"], in_reasoning=True)
    assert unclosed.calls == []
    assert unclosed.content == ""
    assert "no" in unclosed.reasoning


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('<tool_call>{"name": "f", "arguments": {}}', "the closing </tool_call> is missing"),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', "the closing </tool_call> is missing"),
        ("<tool_call>{name: f}</tool_call>", "its JSON is malformed (Expecting property name enclosed in double quotes"),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "NaN is not JSON"),
        ('<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', "too large"),
        ('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', "half of a surrogate pair"),
        ('<tool_call>{"arguments": {}}</tool_call>', 'it has no "name"'),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', 'its "name" is a number'),
        ('<tool_call>{"name": "f"}</tool_call>', 'it has no "arguments"'),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', 'its "arguments" are a list'),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', 'its "arguments" are text'),
        ('<tool_call>["f", {}]</tool_call>', "it is a list, not a JSON object"),
        ('<tool_call>"f"</tool_call>', "it is text, not a JSON object"),
        ("<tool_call></tool_call>", "it is empty"),
        ('<tool_call>{"name": "f", "arguments": {}} {}</tool_call>', "something follows the JSON object"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "nested too deeply"),
        ('<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 64 + "]" * 64 + "}}</tool_call>", "nested too deeply"),
        ('{"name": "f", "arguments": {}}</tool_call>', "has no <tool_call> before it"),
    ],
)
def test_a_malformed_call_says_what_is_wrong_and_how_it_is_right(body: str, says: str) -> None:
    parsed = parse_text(body)
    assert parsed.calls == []
    assert len(parsed.errors) == 1
    assert says in parsed.errors[0]
    assert '{"name": "tool_name", "arguments": {"key": "value"}}' in parsed.errors[0]


def test_a_good_call_beside_a_malformed_one() -> None:
    parsed = parse_text(f'<tool_call>{{"name": "f"\n{call("g")}<tool_call>oops</tool_call>{call("h")} end')
    assert [(c.name, c.id) for c in parsed.calls] == [("g", "t0000c000"), ("h", "t0000c001")]
    assert len(parsed.errors) == 2
    assert parsed.content == " end"


def test_arguments_as_text_of_an_object_and_tags_within_strings() -> None:
    assert parse_text('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>').calls[0].arguments == {"a": 1}
    inner = {"code": "</tool_call> <think> <tool_call>"}
    parsed = parse_text(call("f", inner) + call("g"))
    assert [c.arguments for c in parsed.calls] == [inner, {}]
    assert parsed.errors == []


def test_plain_text_is_kept_as_it_is() -> None:
    assert parse_text(" a\n\n").content == " a\n\n"


PARTS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    '{"name": "f", "arguments": {}}',
    "{",
    "}",
    '"',
    "\\",
    "[",
    "\ud800",
]


@given(parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=12), inside=st.booleans())
@settings(max_examples=300, deadline=None)
def test_never_raises_and_never_ends_in_silence(parts: list[str], inside: bool) -> None:
    text = "".join(parts)
    parsed = parse_text(text, in_reasoning=inside)
    assert [c.id for c in parsed.calls] == [f"t0000c{i:03d}" for i in range(len(parsed.calls))]
    if not inside and "think>" not in text and "tool_call>" in text and ("<tool_call>" in text or "</tool_call>" in text):
        assert parsed.calls or parsed.errors


@given(ids=st.lists(st.integers(0, 380), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_tokens_parse(ids: list[int]) -> None:
    HermesParser(tokenizer("qwen")).parse(ids)


def test_unknown_parser_names_the_nearest() -> None:
    renderer = load_renderer(tokenizer("qwen"), chat_template=QWEN_LIKE)
    with pytest.raises(ConfigError, match="tool-call parser 'herms' is unknown: did you mean 'hermes'"):
        load_parser("herms", renderer)
