"""`Run`: reads a run's journal, while it is written or afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, nearest
from agentloop.journal.format import (
    EVENTS_SUFFIX,
    PARTITIONS,
    TOKENS_SUFFIX,
    FileName,
    JournalError,
    Place,
    load_line,
    parse_file_name,
    parse_step_name,
    read_parts,
    sibling_path,
)
from agentloop.journal.index import Rows, read_rows
from agentloop.journal.meta import read_run
from agentloop.journal.pieces import PieceReader
from agentloop.journal.recorded import RecordedTrajectory, Row, build
from agentloop.journal.train_side import TrainSide, TrainSideIndex, check_file

CACHED_ROWS = 200_000
"""Rows that a `Run` keeps, about a kilobyte each; beyond them files are read anew."""
CACHED_PIECES = 8
"""Event files whose tokens' texts a `Run` keeps."""
_STARTED = itemgetter(Row._fields.index("t"))


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a journal that is not as its writer meant it."""

    kind: str
    """`torn_tail` (a writer was killed within a line; nothing that was finished is concerned), `bad_line` (the same,
    before the writer was started again) or `damaged` (a trajectory whose tokens cannot be trusted, or
    a file of the train side)."""
    file: Path
    what: str


class Run:
    """A run on disk. Every call sees what has been written by then.

    Of each step of each partition only the highest generation counts: what a resumed run does again supersedes what was
    there, as a whole. The writers of one generation are merged.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises `ConfigError` if there is no run at `path`, naming the nearest one that is there."""
        self.path = Path(path)
        if not is_run(self.path):
            raise ConfigError(f"{self.path}: no run here; {nearest(self.path.name, run_names(self.path.parent))}")
        self._cache: dict[Path, Rows] = {}
        """Least recently used first."""
        self._pieces: dict[Path, PieceReader] = {}
        """The same."""
        self._lock = threading.RLock()
        """Of both: a viewer loads in several threads."""
        self._train_side = TrainSideIndex(self.path)

    @property
    def meta(self) -> dict[str, Any]:
        """`run.json`; empty if the writers were given no metadata."""
        return read_run(self.path)

    def steps(self) -> list[Place]:
        """Every partition and step that has files, in order: `train` first, then by step."""
        places = []
        for partition in PARTITIONS:
            folder = self.path / partition
            if folder.is_dir():
                steps = [parse_step_name(item.name) for item in folder.iterdir()]
                places += [Place(partition, step) for step in sorted(step for step in steps if step is not None)]
        return places

    def trajectories(self, partition: str | None = None, step: int | None = None) -> Iterator[Row]:
        """The trajectories of a partition and a step (`None`: of all), in the order in which they started."""
        for place in self.steps():
            if partition in (None, place.partition) and step in (None, place.step):
                yield from self._rows_of(place)

    def load(
        self, trajectory: str | Row, step: int | None = None, partition: str | None = None, *, tokens: bool = True
    ) -> RecordedTrajectory:
        """One trajectory, by its row or its id; of several with one id the one of the last step.

        `tokens=False` reads the events alone. Raises `ConfigError` for an unknown id and `JournalError` if its record is
        damaged.
        """
        row = trajectory if isinstance(trajectory, Row) else self._find(trajectory, step, partition)
        return build(
            row, _read_events(row), sibling_path(row.file, TOKENS_SUFFIX), partial(self.pieces_of, row.file), tokens=tokens
        )

    def train_side(self, step: int) -> TrainSide:
        """What the trainer computed for the training trajectories of a step of the journal, joined with their records, and
        how many of how many have arrived. Empty without `agentloop.train_side`. Raises `JournalError` if a file is damaged.
        """
        return self._train_side.of(self, step)

    def verify(self) -> list[Problem]:
        """Read every event and every frame, superseded ones included, and the train side, and tell what is wrong."""
        problems = []
        for place in self.steps():
            for path, _ in self._files(place):
                rows = self._read(path)
                if rows.size < path.stat().st_size:
                    problems.append(Problem("torn_tail", path, f"a torn line at offset {rows.size}"))
                problems += [Problem("bad_line", path, f"not an event at offset {offset}") for offset in rows.bad_lines]
                for row in rows:
                    try:
                        self.load(row)
                    except JournalError as error:
                        problems.append(Problem("damaged", path, str(error)))
        for path in self._train_side.files():
            try:
                check_file(path)
            except JournalError as error:
                problems.append(Problem("damaged", path, str(error)))
        return problems

    def rebuild_indexes(self) -> int:
        """Write the index of every event file anew from its events; how many. Not while the run is being written."""
        files = [path for place in self.steps() for path, _ in self._files(place)]
        self._cache.clear()
        for path in files:
            rows = Rows(path)
            rows.scan()
            rows.save()
        return len(files)

    def _find(self, key: str, step: int | None, partition: str | None) -> Row:
        rows = list(self.trajectories(partition, step))
        found = [row for row in rows if row.id == key]
        if found:
            return max(found, key=lambda row: (row.step, row.t))
        where = "".join([f" in step {step}" if step is not None else "", f" of {partition}" if partition else ""])
        raise ConfigError(f"{self.path}: no trajectory '{key}'{where}; {nearest(key, _few({row.id for row in rows}, key))}")

    def _rows_of(self, place: Place) -> list[Row]:
        by_generation: dict[int, list[Rows]] = {}
        for path, name in self._files(place):
            rows = self._read(path)
            if rows:
                by_generation.setdefault(name.generation, []).append(rows)
        merged = by_generation[max(by_generation)] if by_generation else []
        if len(merged) == 1:
            return sorted(merged[0], key=_STARTED)
        best: dict[str, Row] = {}
        for row in chain.from_iterable(merged):
            other = best.setdefault(row.id, row)
            if other is not row and (other.complete, other.t) < (row.complete, row.t):
                best[row.id] = row
        return sorted(best.values(), key=_STARTED)

    def event_files(self, place: Place) -> list[Path]:
        """All of them, superseded ones included."""
        return [path for path, _ in self._files(place)]

    def _files(self, place: Place) -> list[tuple[Path, FileName]]:
        paths = sorted((self.path / place.folder).glob("*" + EVENTS_SUFFIX))
        named = [(path, parse_file_name(path.name)) for path in paths]
        return [(path, name) for path, name in named if name is not None]

    def _read(self, path: Path) -> Rows:
        with self._lock:
            rows = self._cache.pop(path, None)
            size = path.stat().st_size
            if rows is None or rows.size > size:
                rows = read_rows(path)
            elif rows.size < size:
                rows.scan()
            self._cache[path] = rows
            kept = 0
            for other in reversed(list(self._cache)):
                kept += len(self._cache[other])
                if kept > CACHED_ROWS and other != path:
                    del self._cache[other]
            return rows

    def pieces_of(self, path: Path) -> PieceReader:
        """The texts of tokens of an event file, as far as it has been written."""
        with self._lock:
            pieces = self._pieces.pop(path, None) or PieceReader(path)
            self._pieces[path] = pieces
            while len(self._pieces) > CACHED_PIECES:
                del self._pieces[next(iter(self._pieces))]
            pieces.read(self._read(path).pieces)
            return pieces


def is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or any((path / partition).is_dir() for partition in PARTITIONS)


def run_names(folder: Path) -> list[str]:
    """Names of the runs in a folder."""
    return sorted(item.name for item in folder.iterdir() if is_run(item)) if folder.is_dir() else []


def _read_events(row: Row) -> list[Mapping[str, Any]]:
    try:
        events = [load_line(bytes(line)) for line in read_parts(row.file, row.lines)]
    except (OSError, ValueError, TypeError) as error:
        raise JournalError(f"{row.file}: trajectory {row.id}: {error}") from error
    ours = events and all(isinstance(event, dict) and event.get("id") == row.id for event in events)
    if not ours or events[0].get("type") != "traj_start":
        raise JournalError(f"{row.file}: trajectory {row.id}: the index is not this file's")
    return events


def _few(known: set[str], key: str) -> list[str]:
    """Enough ids for a hint, not a screenful."""
    import difflib

    return difflib.get_close_matches(key, known, n=1) or sorted(known)[:5]
