"""What tools answered, made to fit into the room that is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentloop.chat.base import Message, Piece, Renderer
from agentloop.tools.cut import cut_to_tokens
from agentloop.tools.threads import run_blocking

_SHORTEST = 32
"""Tokens below which no answer is cut to make room."""
_LONG_TEXT = 50_000
"""Characters from which a text is tokenised outside of the event loop."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Answers as the model gets them."""

    pieces: list[Piece]
    texts: list[str]
    left_out: list[int]
    """Tokens that each answer lost, in the messages' order."""


async def fit(
    renderer: Renderer, sampled: Sequence[int], messages: Sequence[Message], room: int, note: str = ""
) -> Fitted | None:
    """`renderer.after_turn(sampled, messages)` in at most `room` tokens; `None` if even the shortest cuts do not fit.

    Short answers stay whole and long ones share the rest: each is cut in its middle and says how much is missing. `note` is
    added to the last answer and never cut.
    """
    texts: list[str] = [message["content"] for message in messages]
    left_out = [0] * len(texts)
    for place, text in enumerate(texts):
        if len(text) > _LONG_TEXT:
            texts[place], left_out[place] = await run_blocking(cut_to_tokens, text, max(room, _SHORTEST), renderer)

    def rendered(contents: Sequence[str]) -> list[Piece]:
        answers = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        answers[-1]["content"] += note
        return renderer.after_turn(sampled, answers)

    pieces = rendered(texts)
    over = _length(pieces) - room
    if over <= 0:
        return Fitted(pieces, texts, left_out)
    lengths = [len(renderer.encode_text(text)) for text in texts]
    budget = sum(lengths)
    for _ in range(2):  # what follows a cut may be tokenised otherwise, so the first may miss by a few tokens
        budget -= over
        most = max(_SHORTEST, _fair_share(lengths, budget))
        cut = [cut_to_tokens(text, most, renderer) for text in texts]
        pieces = rendered([text for text, _ in cut])
        over = _length(pieces) - room
        if over <= 0:
            both = zip(left_out, cut, strict=True)
            return Fitted(pieces, [text for text, _ in cut], [before + now for before, (_, now) in both])
    return None


def _length(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _fair_share(lengths: Sequence[int], budget: int) -> int:
    """The largest cap under which lengths add up to at most `budget`: short ones stay whole, long ones share the rest."""
    for done, length in enumerate(sorted(lengths)):
        share = budget // (len(lengths) - done)
        if length > share:
            return share
        budget -= length
    return max(lengths, default=0)
