"""Tool calls as Hermes and Qwen write them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from agentloop.chat.base import Parsed, Renderer, ToolCallParser
from agentloop.trajectory import ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FORM = '<tool_call>\n{"name": "tool_name", "arguments": {"key": "value"}}\n</tool_call>'
"""The right form, as errors show it."""

_TAG = re.compile("</?tool_call>|</?think>")
_CLOSING = re.compile(r"\s*</tool_call>")
_SPACE = re.compile(r"\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_DEPTH = 64
"""Lists and objects inside each other in the arguments of a call. Whoever copies, checks or records them recurses."""


class HermesParser(ToolCallParser):
    """Parses the JSON calls of the Hermes and Qwen families.

    The tags count however they were spelled, as the control token or with ordinary ones. Text within `<think>…</think>` is
    reasoning, and so is everything after a `<think>` that is not closed; calls there are not returned. A call that cannot be
    read is an error sentence; what follows it is read as if its opening tag were not there. Costs O(tokens).
    """

    def __init__(self, source: Renderer | Any) -> None:
        """`source`: a renderer, or a transformers tokenizer."""
        if isinstance(source, Renderer):
            self._decode = source.decode
            self._ends = frozenset(source.stop_token_ids)
        else:
            self._decode = lambda ids: str(
                source.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )
            self._ends = frozenset(int(id_) for id_ in source.all_special_ids)

    def parse(self, ids: Sequence[int], *, turn: int = 0, in_reasoning: bool = False) -> Parsed:
        end = len(ids)
        while end and ids[end - 1] in self._ends:
            end -= 1
        return parse_text(self._decode(ids[:end]), turn=turn, in_reasoning=in_reasoning)


def parse_text(text: str, *, turn: int = 0, in_reasoning: bool = False) -> Parsed:
    """`HermesParser.parse` of text, which is without the end-of-turn token."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    errors: list[str] = []
    at = 0
    broken = False  # within a malformed call that may still be closed

    def say(stop: int) -> None:
        if not broken:
            content.append(text[at:stop])

    if in_reasoning:
        at = _reason(text, 0, reasoning)
    while (match := _TAG.search(text, at)) is not None:
        tag = match.group()
        if tag == "<think>":
            say(match.start())
            at = _reason(text, match.end(), reasoning)
        elif tag == "</think>":  # closes nothing: text
            say(match.end())
            at = match.end()
        elif tag == CLOSE:
            say(match.start())
            if not broken:
                errors.append(f"A {CLOSE} has no {OPEN} before it. To call a tool, write:\n{FORM}")
            broken = False
            at = match.end()
        else:
            say(match.start())
            broken = False
            call, at = _call(text, match.end())
            if isinstance(call, ToolCall):
                calls.append(ToolCall(call.name, call.arguments, f"t{turn:04d}c{len(calls):03d}"))
            else:
                errors.append(f"The tool call could not be read: {call}. Write it like this:\n{FORM}")
                broken = at == match.end()
    say(len(text))
    return Parsed(_joined(content), "\n".join(part for part in reasoning if part), calls, errors)


def _joined(parts: Sequence[str]) -> str:
    """The text around reasoning and calls, without the line ends that set these off."""
    if len(parts) == 1:
        return parts[0]
    trimmed = [parts[0].rstrip("\n"), *(part.strip("\n") for part in parts[1:-1]), parts[-1].lstrip("\n")]
    return "\n".join(part for part in trimmed if part)


def _reason(text: str, at: int, reasoning: list[str]) -> int:
    """Take the reasoning that begins at `at`; where what follows it begins."""
    end = text.find("</think>", at)
    reasoning.append(text[at : end if end >= 0 else len(text)].strip("\n"))
    return end + len("</think>") if end >= 0 else len(text)


def _call(text: str, at: int) -> tuple[ToolCall | str, int]:
    """The call whose opening tag ends at `at`, and where it ends; or what is wrong with it, and `at` if its closing tag is
    still to come."""
    start = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    closing = _CLOSING.match(text, start)
    if closing:
        return "it is empty", closing.end()
    try:
        value, stop = _DECODER.raw_decode(text, start)
    except RecursionError:
        return "its JSON is nested too deeply", at
    except ValueError as error:
        problem = _unclosed(text, at)
        return problem or f"its JSON is malformed ({_reason_of(error, text, start)})", at
    closing = _CLOSING.match(text, stop)
    if closing is None:
        return _unclosed(text, stop) or f"something follows the JSON object before {CLOSE}", at
    try:
        return _checked(value), closing.end()
    except RecursionError:
        return "its JSON is nested too deeply", closing.end()


def _unclosed(text: str, at: int) -> str | None:
    match = _TAG.search(text, at)
    return None if match is not None and match.group() == CLOSE else f"the closing {CLOSE} is missing"


def _reason_of(error: ValueError, text: str, start: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        near = text[error.pos : error.pos + 20].split("<", 1)[0]
        return f"{error.msg} at character {error.pos - start}" + (f", near {near!r}" if near else "")
    return str(error)


def _checked(value: Any) -> ToolCall | str:
    if not isinstance(value, dict):
        return f"it is {_kind(value)}, not a JSON object"
    if "name" not in value:
        return 'it has no "name"'
    name = value["name"]
    if not isinstance(name, str) or not name:
        return f'its "name" is {_kind(name)}, not the name of a tool'
    if "arguments" not in value:
        return 'it has no "arguments" (use {} for none)'
    arguments = value["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError):
            return 'its "arguments" are text, not a JSON object'
    if not isinstance(arguments, dict):
        return f'its "arguments" are {_kind(arguments)}, not a JSON object'
    if _deeper_than(arguments, _MAX_DEPTH):
        return "its JSON is nested too deeply"
    if _SURROGATE.search(json.dumps([name, arguments], ensure_ascii=False)):
        return "it has half of a surrogate pair, which is no character"
    return ToolCall(name, arguments)


def _deeper_than(value: Any, depth: int) -> bool:
    """Whether lists and mappings are nested more than `depth` deep, `value` included; without recursion."""
    level = [value]
    for _ in range(depth):
        children = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in children if isinstance(child, dict | list)]
    return bool(level)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if value == "":
        return "empty"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float)
