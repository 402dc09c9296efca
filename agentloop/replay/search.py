"""A plain text search in what was said, called and answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from agentloop.journal.format import JournalError, dump_json, load_line
from agentloop.journal.reader import Run
from agentloop.journal.recorded import Row

AROUND = 60
"""Characters of an excerpt before the hit; as many after it."""


class _Text(NamedTuple):
    turn: int
    where: str
    text: str


def first_hit(run: Run, row: Row, text: str) -> dict[str, Any] | None:
    """`turn`, `where` and `excerpt` of the first place in a trajectory that holds `text`, whatever its case; `None` if no
    place does, or its events cannot be read."""
    wanted = text.casefold()
    try:
        for found in _texts(run, row):
            at = found.text.casefold().find(wanted)
            if at >= 0:
                return {"turn": found.turn, "where": found.where, "excerpt": _excerpt(found.text, at, len(text))}
    except (JournalError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    return None


def _texts(run: Run, row: Row) -> Iterator[_Text]:
    said: Sequence[str | None] | None = None
    with row.file.open("rb") as file:
        for offset, length in row.lines:
            file.seek(offset)
            event: Mapping[str, Any] = load_line(file.read(length))
            if event["type"] == "traj_start":
                for message in event["sample"]["messages"]:
                    yield _Text(-1, "prompt", _plain(message.get("content")))
            elif event["type"] == "turn":
                said = run.load(row, tokens=False).texts if said is None else said  # events do not repeat the tokens' text
                yield _Text(event["turn"], "text", said[event["turn"]] or "")
            elif event["type"] == "tool":
                where = "result" if event["status"] == "ok" else "error"
                yield _Text(event["turn"], "call", f"{event['call']['name']} {_plain(event['call']['arguments'])}")
                yield _Text(event["turn"], where, event["text"])
            elif event["type"] == "traj_end":
                for index, turn in enumerate(event["turns"]):
                    yield from (_Text(index, "error", sentence) for sentence in turn["parse_errors"])
                yield _Text(len(event["turns"]) - 1, "error", event["error"] or "")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else dump_json(value).decode("utf-8", "replace")


def _excerpt(text: str, at: int, length: int) -> str:
    start, end = max(at - AROUND, 0), at + length + AROUND
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
