"""Long answers lose their middle, counted in tokens."""

from __future__ import annotations

from typing import Any

import pytest

from agentloop.errors import ConfigError
from agentloop.tools import ToolRegistry, tool
from agentloop.trajectory import Sample
from tests.tools.examples import Counter, repeat
from tests.tools.sessions import call, opened


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
