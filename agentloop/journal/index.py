"""One row a trajectory, built from events: by the writer as it writes, by the reader when it scans; the same code."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import orjson

from agentloop.journal.format import (
    INDEX_SUFFIX,
    PIECES,
    dump_line,
    load_line,
    parse_file_name,
    parse_step_name,
    sealed,
    sibling_path,
)
from agentloop.journal.recorded import SHARED_FIELDS, Row

INDEX_VERSION = 4
OWN_FIELDS = Row._fields[: -len(SHARED_FIELDS)]
"""What an index holds of a row; the rest is the same for all rows of a file."""

_COMPLETE = OWN_FIELDS.index("complete")
Growing = dict[str, Any]
"""A row of a trajectory that has not ended: its own fields by name, but `places` as a list."""


class Rows:
    """The rows of one event file, as far as it has been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        """Bytes of the event file that are covered; always a line's end."""
        self.bad_lines: list[int] = []
        """Offsets of whole lines that are not events (the torn end of a killed writer that was started again)."""
        self.pieces: list[tuple[int, int]] = []
        """Offset and length of each event that tells the texts of tokens."""
        self._by_id: dict[str, Row | Growing] = {}
        """In the order of their first lines. A second start with the same id replaces the first."""
        self._unended: set[str] = set()
        """Whose rows still grow."""
        name, step = parse_file_name(path.name), parse_step_name(path.parent.name)
        assert name is not None
        assert step is not None
        self._shared = (path.parent.parent.name, step, name.writer, name.generation, path)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Row]:
        """Each row as it is now."""
        rows = list(self._by_id.values())
        if self._unended:
            rows = [row if isinstance(row, Row) else self._settled(row) for row in rows]
        return iter(cast(list[Row], rows))

    def events_of(self, key: str) -> int:
        """Events so far of a trajectory that has not ended."""
        row = self._by_id.get(key)
        return len(row["places"]) if isinstance(row, dict) else 0

    def feed(self, event: dict[str, Any], offset: int, length: int) -> None:
        """Take in the event whose line lies at `offset`; it may be of any type, known or not."""
        kind, key = event.get("type"), event.get("id")
        if kind == PIECES:
            self.pieces.append((offset, length))
        if not isinstance(key, str):
            return
        if kind == "traj_start":
            self._by_id.pop(key, None)
            self._by_id[key] = _new_row(event)
            self._unended.add(key)
        row = self._by_id.get(key)
        if row is None or isinstance(row, Row):  # nothing follows an end
            return
        row["places"].append(f"{offset} {length}")
        tokens = sum(n for _, n in event.get("segments") or ())
        row["tokens"] += tokens
        if kind == "turn":
            row["turns"] += 1
            row["sampled_tokens"] += tokens
        elif kind == "tool":
            row["tool_calls"] += 1
            if event["status"] != "ok":
                row["tool_failures"][event["status"]] = row["tool_failures"].get(event["status"], 0) + 1
        elif kind == "reward":
            row["reward"], row["components"] = event["value"], event["components"]
        elif kind == "traj_end":
            ended = {name: event[name] for name in _TOLD_AT_END}
            self._by_id[key] = self._settled(row | ended | {"complete": True})
            self._unended.discard(key)

    def scan(self) -> None:
        """Read on from `size` to the last whole line of the file."""
        with self.path.open("rb") as file:
            file.seek(self.size)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset = self.size
                self.size += len(line)
                if not line.strip():
                    continue
                try:
                    self.feed(load_line(line), offset, len(line))
                except (ValueError, KeyError, TypeError, AttributeError):
                    self.bad_lines.append(offset)

    def save(self) -> None:
        """Write the index beside the event file, whole or not at all. Raises `OSError`."""
        path = sibling_path(self.path, INDEX_SUFFIX)
        head = {"type": "index", "version": INDEX_VERSION, "size": self.size, "bad_lines": self.bad_lines}
        columns = b"".join([dump_line(_once(column)) for column in list(zip(*self, strict=True))[: len(OWN_FIELDS)]])
        told = {"pieces": self.pieces, "rows": len(self), "fields": OWN_FIELDS, "crc": zlib.crc32(columns)}
        written = path.with_name(f"{path.name}.{os.getpid()}.part")
        written.write_bytes(sealed(head | told) + columns)
        written.replace(path)

    def load(self) -> None:
        """Start from the index, if there is one that belongs to this file and to this version."""
        try:
            first, _, rest = sibling_path(self.path, INDEX_SUFFIX).read_bytes().partition(b"\n")
            head = load_line(first)
            if (
                head["version"] != INDEX_VERSION
                or head["crc"] != zlib.crc32(rest)
                or head["size"] > self.path.stat().st_size
                or head["fields"] != list(OWN_FIELDS)
            ):
                return
            columns = list(_columns(rest))
            ids = columns[0] if columns else []
            full = [repeat(column[0], len(ids)) if len(column) == 1 else column for column in columns]
            shared = [repeat(value, len(ids)) for value in self._shared]
            by_id: dict[str, Row | Growing] = dict(zip(ids, map(_new, zip(*full, *shared, strict=True)), strict=True))
            if len(by_id) != head["rows"]:
                return
            unended: set[str] = set()
            if columns and columns[_COMPLETE] != [True]:
                growing: dict[str, Row | Growing] = {
                    key: self._growing(row) for key, row in by_id.items() if isinstance(row, Row) and not row.complete
                }
                by_id, unended = by_id | growing, set(growing)
            size, bad_lines, pieces = head["size"], list(head["bad_lines"]), [(offset, n) for offset, n in head["pieces"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        self.size, self.bad_lines, self.pieces, self._by_id, self._unended = size, bad_lines, pieces, by_id, unended

    def _settled(self, row: Growing) -> Row:
        """A snapshot: `row` may go on being counted up while the run is written."""
        fields = row | {"places": " ".join(row["places"]), "tool_failures": dict(row["tool_failures"])}
        return Row._make((*fields.values(), *self._shared))

    def _growing(self, row: Row) -> Growing:
        fields = dict(zip(OWN_FIELDS, row, strict=False))
        copies = {
            "tool_failures": dict(row.tool_failures),
            "missing": list(row.missing),
        }  # rows of an index share what is equal
        return fields | copies | {"places": [f"{offset} {length}" for offset, length in row.lines]}


def read_rows(path: Path) -> Rows:
    """The rows of an event file: from its index as far as that goes, then from the events themselves."""
    rows = Rows(path)
    rows.load()
    rows.scan()
    return rows


_new = partial(tuple.__new__, Row)
"""`Row._make`, without a call of Python's for each."""


def _columns(lines: bytes) -> Iterator[list[Any]]:
    """Without a copy of each line, which the last one is too long for."""
    view, at = memoryview(lines), 0
    while (end := lines.find(b"\n", at)) >= 0:
        yield load_line(lines[at:end]) if lines.startswith(b" ", at) else orjson.loads(view[at:end])
        at = end + 1


def _once(column: Sequence[Any]) -> Sequence[Any]:
    """What all rows have in common stands in an index once."""
    return column[:1] if column.count(column[0]) == len(column) else column


def _new_row(event: dict[str, Any]) -> Growing:
    """In the order of `OWN_FIELDS`."""
    row = {
        "id": event["id"],
        "uid": event["sample"]["uid"],
        "sibling": event["sibling"],
        "attempt": event["attempt"],
        "data_source": event["sample"]["data_source"],
        "t": event["t"],
        "complete": False,
        "end_reason": None,
        "state": None,
        "error": None,
        "masked": False,
        "reward": None,
        "components": {},
        "turns": 0,
        "tokens": 0,
        "prompt_tokens": sum(n for _, n in event.get("segments") or ()),
        "sampled_tokens": 0,
        "tool_calls": 0,
        "tool_failures": {},
        "score_s": 0.0,
        "total_s": 0.0,
        "missing": list(event.get("missing", ())),
        "places": [],
    }
    assert tuple(row) == OWN_FIELDS
    return row


_TOLD_AT_END = ("end_reason", "state", "error", "masked", "score_s", "total_s", "tool_calls", "tool_failures")
