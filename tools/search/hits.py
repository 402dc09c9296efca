"""What a search found, and how a model reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SCANNED = 200_000  # characters of a document that are looked through for the best place
_MAX_TITLE = 200  # characters of a title and of an id


@dataclass(frozen=True, slots=True)
class Hit:
    """One document that was found; `id` and `title` may be empty."""

    id: str
    title: str
    text: str
    score: float


def as_text(hits: Sequence[Hit], query: str, snippet_chars: int) -> str:
    """The hits for a model: number, title and id on a line, then at most `snippet_chars` characters of each."""
    if not hits:
        return f"No results for {_line(query)!r}. Try other words, or fewer."
    return "\n\n".join(
        f"[{number}] {_head(hit)}\n{snippet(hit.text, query, snippet_chars)}" for number, hit in enumerate(hits, start=1)
    )


def _head(hit: Hit) -> str:
    title, identity = _line(hit.title), _line(hit.id)
    if not identity:
        return title or "(no title)"
    return f"{title} (id: {identity})" if title else f"id: {identity}"


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TITLE else f"{text[: _MAX_TITLE - 1]}…"


def snippet(text: str, query: str, limit: int) -> str:
    """At most about `limit` characters of `text`, around where most words of the query stand close together.

    «…» says where something is left out; cuts are made between words.
    """
    text = text.strip()
    if len(text) <= limit:
        return text
    start = _best_start(text[:_SCANNED], query, limit)
    end = min(len(text), start + limit)
    start = max(0, end - limit)
    if start > 0 and (space := re.search(r"\s", text[start : start + 40])):
        start += space.end()
    if end < len(text) and (space := re.search(r"\s\S*$", text[max(start, end - 40) : end])):
        end = max(start, end - 40) + space.start()
    return ("…" if start > 0 else "") + text[start:end].strip() + ("…" if end < len(text) else "")


def _best_start(text: str, query: str, limit: int) -> int:
    """Where a window of `limit` characters holds most different words of the query; the first such place, with some room
    before the first of them."""
    wanted = {word for word in re.findall(r"\w+", query.casefold()) if len(word) > 1}
    if not wanted:
        return 0
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(wanted))) + r")\b", re.IGNORECASE)
    places = [(match.start(), match.group().casefold()) for match in pattern.finditer(text)]
    best, best_count, first, inside = 0, 0, 0, dict[str, int]()
    for at, word in places:
        inside[word] = inside.get(word, 0) + 1
        while at - places[first][0] > limit * 3 // 4:
            gone = places[first][1]
            inside[gone] -= 1
            if not inside[gone]:
                del inside[gone]
            first += 1
        if len(inside) > best_count:
            best, best_count = places[first][0], len(inside)
    return max(0, best - limit // 8)
