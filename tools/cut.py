"""Shortening a tool's answer, counted in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class TextCodec(Protocol):
    """Plain text to token ids and back; a `Renderer` is one."""

    def encode_text(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def cut_to_tokens(text: str, limit: int, codec: TextCodec) -> tuple[str, int]:
    """`text` in at most `limit` tokens, and how many of its tokens were left out.

    Head and tail stay, with «[… 812 tokens left out …]» between them; where not even the marker fits, the head alone.
    Costs the encoding of `text`.
    """
    if len(text) < limit and len(text.encode()) < limit:  # at most a token a byte, and one that some tokenizers put in front
        return text, 0
    ids = codec.encode_text(text)
    if len(ids) <= limit:
        return text, 0
    keep = limit - len(codec.encode_text(_marker(len(ids))))
    while keep > 1:
        head, tail = (keep + 1) // 2, keep // 2
        left_out = len(ids) - head - tail
        # A cut inside a character of several tokens leaves a replacement character at the cut's edge.
        before = codec.decode(ids[:head]).rstrip("\ufffd")
        after = codec.decode(ids[-tail:]).lstrip("\ufffd")
        short = before + _marker(left_out) + after
        excess = len(codec.encode_text(short)) - limit
        if excess <= 0:
            return short, left_out
        keep -= excess
    for head in range(limit, 0, -1):
        short = codec.decode(ids[:head]).rstrip("\ufffd")
        if len(codec.encode_text(short)) <= limit:
            return short, len(ids) - head
    return "", len(ids)


def _marker(count: int) -> str:
    return f"\n[… {count} tokens left out …]\n"
