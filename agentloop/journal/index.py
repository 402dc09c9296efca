"""One row a trajectory, built from events: by the writer as it writes, by the reader when it scans; the same code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from agentloop.journal.format import INDEX_SUFFIX, VERSION, dump_line, load_line, sibling_path

RawRow = dict[str, Any]
"""The fields of `agentloop.journal.Row` that events tell, plus `lines`: `[offset, length]` of each of its lines."""


class Rows:
    """The rows of one event file, as far as it has been read."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes of the event file that are covered; always a line's end."""
        self.by_id: dict[str, RawRow] = {}
        """In the order of their first lines. A second start with the same id replaces the first."""
        self.bad_lines: list[int] = []
        """Offsets of whole lines that are not events (the torn end of a killed writer that was started again)."""

    def feed(self, event: dict[str, Any], offset: int, length: int) -> None:
        """Take in the event whose line lies at `offset`; it may be of any type, known or not."""
        kind, key = event.get("type"), event.get("id")
        if kind == "traj_start" and isinstance(key, str):
            self.by_id.pop(key, None)
            self.by_id[key] = _new_row(event)
        row = self.by_id.get(key) if isinstance(key, str) else None
        if row is None:
            return
        row["lines"].append([offset, length])
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
            row["complete"] = True
            for name in ("end_reason", "state", "error", "masked", "score_s", "total_s", "tool_calls", "tool_failures"):
                row[name] = event[name]

    def scan(self, path: Path) -> None:
        """Read on from `size` to the last whole line of the file."""
        with path.open("rb") as file:
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

    def save(self, events: Path) -> None:
        """Write the index beside its event file, whole or not at all. Raises `OSError`."""
        path = sibling_path(events, INDEX_SUFFIX)
        head = {"type": "index", "version": VERSION, "size": self.size, "bad_lines": self.bad_lines}
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        partial.write_bytes(b"".join(dump_line(item) for item in (head, *self.by_id.values())))
        partial.replace(path)


def read_rows(events: Path) -> Rows:
    """The rows of an event file: from its index as far as that goes, then from the events themselves."""
    rows = _read_index(sibling_path(events, INDEX_SUFFIX), events.stat().st_size) or Rows()
    rows.scan(events)
    return rows


def _read_index(path: Path, size: int) -> Rows | None:
    """`None` if there is no index, or it does not belong to a file of `size` bytes or to this version."""
    try:
        head, *rest = [load_line(line) for line in path.read_bytes().splitlines()]
        if head["version"] != VERSION or head["size"] > size:
            return None
        rows = Rows()
        rows.size, rows.bad_lines = head["size"], head["bad_lines"]
        rows.by_id = {row["id"]: row for row in rest}
        if any(row.keys() != _KEYS for row in rest):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return rows


def _new_row(event: dict[str, Any]) -> RawRow:
    return {
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
        "lines": [],
    }


_KEYS = _new_row({"id": "", "sample": {"uid": "", "data_source": ""}, "sibling": 0, "attempt": 0, "t": 0.0}).keys()
