"""A plain text search in what was said, called and answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from agentloop.journal.format import JournalError, dump_json
from agentloop.journal.recorded import RecordedTrajectory
from agentloop.trajectory import CallStatus

AROUND = 60
"""Characters of an excerpt before the hit; as many after it."""


class _Text(NamedTuple):
    turn: int
    where: str
    text: str


def first_hit(recorded: RecordedTrajectory, text: str) -> dict[str, Any] | None:
    """`turn`, `where` and `excerpt` of the first place in a trajectory that holds `text`, whatever its case; `None` if no
    place does."""
    wanted = text.casefold()
    for found in _texts(recorded):
        at = found.text.casefold().find(wanted)
        if at >= 0:
            return {"turn": found.turn, "where": found.where, "excerpt": _excerpt(found.text, at, len(text))}
    return None


def _texts(recorded: RecordedTrajectory) -> Iterator[_Text]:
    for message in recorded.sample.messages:
        yield _Text(-1, "prompt", _plain(message.get("content")))
    for turn in recorded.turns:
        yield _Text(turn.index, "text", _said(recorded, turn.index))
        yield from (_Text(turn.index, "error", sentence) for sentence in turn.parse_errors)
        for record in turn.calls:
            where = "result" if record.status is CallStatus.OK else "error"
            yield _Text(turn.index, "call", f"{record.call.name} {_plain(record.call.arguments)}")
            yield _Text(turn.index, where, record.text)
    yield _Text(len(recorded.turns) - 1, "error", recorded.row.error or "")


def _said(recorded: RecordedTrajectory, turn: int) -> str:
    try:
        return recorded.texts[turn] or ""
    except JournalError:
        return ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else dump_json(value).decode("utf-8", "replace")


def _excerpt(text: str, at: int, length: int) -> str:
    start, end = max(at - AROUND, 0), at + length + AROUND
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
