"""The train side of a run: what the trainer computed for each trajectory, beside the journal of the rollouts.

```
RUN/train_side/step_000123.u0.g1.rows    update 0 of the trainer's step 123, written by generation 1
```

A file is written whole and then renamed, so what is there under its name is complete, whenever the writer was killed. It is
two records like those of a token file (length, CRC-32, one zstd frame): first a JSON header that names the rows, then the
columns, each of them the rows' response tokens one after the other. `docs/journal.md` describes it for other programs.

Rows are joined with the journal by (rollout's step, uid, sibling), and the join is checked against the token ids.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import numpy as np
import zstandard

from agentloop.journal.format import JournalError, dump_json, load_line
from agentloop.journal.recorded import RecordedTrajectory, Row

if TYPE_CHECKING:
    from agentloop.journal.reader import Run

FOLDER = "train_side"
VERSION = 1
COLUMNS = {"old_log_probs": "<f4", "advantages": "<f4", "response_mask": "|u1", "rollout_is_weights": "<f4"}
"""What may be in a file, and how it is stored; the last one only where verl computed it."""

_RECORD = struct.Struct("<II")
_NAME = re.compile(r"^step_(?P<step>[0-9]{6,})\.u(?P<update>[0-9]+)\.g(?P<generation>[1-9][0-9]*)\.rows$")


# -- writing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TrainerRow:
    """One trajectory as the trainer had it, R response tokens long."""

    step: int
    """Of the rollout: the one under which the journal has the trajectory."""
    uid: str
    sibling: int
    response_ids: Any
    """Integers, (R,). Only their CRC-32 is stored."""
    columns: dict[str, Any]
    """By names of `COLUMNS`, each (R,); every row of an update has the same names. Others are not stored."""
    versions: tuple[int, int] | None = None
    """Oldest and newest weights that sampled it, if that is known. Not stored: the journal has them of every token."""


def write_update(
    run_dir: Path, rows: Sequence[TrainerRow], *, step: int, update: int, generation: int, recomputed: bool = True
) -> Path:
    """Write one update of the trainer's `step`; the file. Raises `OSError`.

    `recomputed` is false if the trainer took the rollout's log-probabilities as its own, which makes them equal.
    """
    names = [name for name in COLUMNS if rows and name in rows[0].columns]
    header = {
        "version": VERSION,
        "step": step,
        "update": update,
        "generation": generation,
        "recomputed": recomputed,
        "columns": [[name, COLUMNS[name]] for name in names],
        "rows": [[row.step, row.uid, row.sibling, len(row.response_ids), ids_crc(row.response_ids)] for row in rows],
    }
    columns = [np.ascontiguousarray(row.columns[name], dtype=COLUMNS[name]).tobytes() for name in names for row in rows]
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.u{update}.g{generation}.rows"
    partial = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        with partial.open("wb") as file:
            for content in (dump_json(header), b"".join(columns)):
                packed = zstandard.ZstdCompressor(level=1).compress(content)
                file.write(_RECORD.pack(len(packed), zlib.crc32(packed)) + packed)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return path


def ids_crc(ids: Any) -> int:
    """CRC-32 of token ids as little-endian 32-bit integers."""
    return zlib.crc32(np.ascontiguousarray(ids, dtype="<u4").tobytes())


# -- reading --------------------------------------------------------------------------------------------------------------


class _Name(NamedTuple):
    step: int
    update: int
    generation: int
    path: Path


class _Place(NamedTuple):
    """Where the trainer's part of a trajectory lies."""

    file: Path
    row: int
    step: int
    """The trainer's."""


@dataclass(frozen=True, slots=True)
class _Update:
    """A file, without or with its columns."""

    path: Path
    header: Mapping[str, Any]
    columns: Mapping[str, Any] = field(default_factory=dict)

    starts: Sequence[int] = ()
    """Where each row begins in the columns, and where the last one ends."""


@dataclass(frozen=True)
class TrainedTrajectory:
    """A trajectory with both sides, R response tokens long."""

    recorded: RecordedTrajectory
    trained_step: int
    """The trainer's step. With an asynchronous trainer it may be a later one than the trajectory's own."""
    update: int
    """Which update of that step, from 0."""
    recomputed: bool
    """False if the trainer took the rollout's log-probabilities as its own (`rollout_correction.bypass_mode`)."""
    old_log_probs: Any
    """float32, (R,): the trainer's, by the weights before its update. Tool output and glue have theirs too."""
    advantages: Any
    """float32, (R,)."""
    response_mask: Any
    """uint8, (R,): 1 for what was trained: what was sampled, less what verl's rejection sampling took out."""
    rollout_is_weights: Any
    """float32, (R,): verl's importance weights of trainer over rollout, with `algorithm.rollout_correction`; or `None`."""

    @property
    def rollout_log_probs(self) -> Any:
        """float32, (R,): the ledger's; NaN where nothing was sampled or the engine was not asked."""
        return self._columns.log_probs[self.recorded.prompt_len :]

    @property
    def sampled(self) -> Any:
        """bool, (R,)."""
        return self._columns.mask[self.recorded.prompt_len :] == 1

    @property
    def weight_version(self) -> Any:
        """int64, (R,), as `Columns.weight_version`."""
        return self._columns.weight_version[self.recorded.prompt_len :]

    @property
    def ratios(self) -> Any:
        """float32, (R,): trainer's probability over the rollout's; NaN where `rollout_log_probs` is."""
        return np.exp(self.old_log_probs - self.rollout_log_probs)

    def turns(self) -> Iterator[tuple[int, slice]]:
        """Each turn and where its sampled tokens lie in the arrays."""
        first = self.recorded.prompt_len
        for turn in self.recorded.turns:
            yield turn.index, slice(turn.start - first, turn.end - first)

    @property
    def _columns(self) -> Any:
        return self.recorded.columns


class TrainSide:
    """The trajectories of one step of the journal for which the trainer's part has arrived.

    To be looped over: `for trained in run.train_side(3)`."""

    def __init__(self, run: Run, step: int, found: Sequence[tuple[Row, _Place]], expected: int) -> None:
        self.step = step
        self.expected = expected
        """Trajectories of the step that ended and were not masked: those that verl is given."""
        self._run = run
        self._found = sorted(found, key=lambda item: (item[1], item[0].t))
        self._last: _Update | None = None

    @property
    def arrived(self) -> int:
        """How many of the expected ones have their trainer's part."""
        return len(self._found)

    @property
    def trained_steps(self) -> set[int]:
        """The trainer's steps in which those that have arrived were trained."""
        return {place.step for _, place in self._found}

    @property
    def ids(self) -> set[str]:
        """The trajectories whose part has arrived."""
        return {row.id for row, _ in self._found}

    def __iter__(self) -> Iterator[TrainedTrajectory]:
        """Raises `JournalError` if a file is damaged or a row is not of the ledger's tokens."""
        for row, place in self._found:
            yield _joined(self._run.load(row), self._columns(place), place.row)

    def get(self, recorded: RecordedTrajectory) -> TrainedTrajectory | None:
        """Both sides of one trajectory, which was loaded with its tokens; `None` if the trainer's has not arrived. Raises as
        looping does."""
        for row, place in self._found:
            if row.id == recorded.row.id:
                return _joined(recorded, self._columns(place), place.row)
        return None

    def mean_advantages(self) -> dict[str, float]:
        """Of each trajectory whose part has arrived, the mean over its trained tokens; NaN if it has none. Reads the trainer's
        part alone. Raises `JournalError` if a file is damaged."""
        means = {}
        for row, place in self._found:
            update = self._columns(place)
            tokens = slice(update.starts[place.row], update.starts[place.row + 1])
            advantages = update.columns["advantages"][tokens][update.columns["response_mask"][tokens] == 1]
            means[row.id] = float(advantages.mean(dtype=np.float64)) if advantages.size else float("nan")
        return means

    def _columns(self, place: _Place) -> _Update:
        """The last file is kept: neighbours are asked for one after the other."""
        if self._last is None or self._last.path != place.file:
            self._last = _read(place.file, columns=True)
        return self._last


class TrainSideIndex:
    """Which trajectory is in which file. Files never change, so each is read once."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / FOLDER
        self._names: list[_Name] = []
        self._headers: dict[Path, _Update] = {}
        self._by_step: dict[int, dict[tuple[str, int], _Place]] = {}

    def files(self) -> list[Path]:
        """All that counts, in the order of training: of each of the trainer's steps only the highest generation does."""
        return [name.path for name in _names(self._folder)]

    def of(self, run: Run, step: int) -> TrainSide:
        self._refresh()
        last: dict[tuple[str, int], Row] = {}
        for row in run.trajectories("train", step):
            other = last.get((row.uid, row.sibling))
            if other is None or other.attempt < row.attempt:
                last[row.uid, row.sibling] = row
        rows = {key: row for key, row in last.items() if row.complete and not row.masked}
        places = self._by_step.get(step, {})
        return TrainSide(run, step, [(row, places[key]) for key, row in rows.items() if key in places], len(rows))

    def _refresh(self) -> None:
        names = _names(self._folder)
        if names == self._names:
            return
        self._names, self._by_step = names, {}
        for name in names:
            if name.path not in self._headers:
                self._headers[name.path] = _read(name.path, columns=False)
            for index, (step, uid, sibling, *_) in enumerate(self._headers[name.path].header["rows"]):
                self._by_step.setdefault(step, {})[uid, sibling] = _Place(name.path, index, name.step)


def check_file(path: Path) -> None:
    """`JournalError` if the file is damaged."""
    _read(path, columns=True)


def _names(folder: Path) -> list[_Name]:
    if not folder.is_dir():
        return []
    matches = [(_NAME.match(name), folder / name) for name in os.listdir(folder)]
    names = sorted(_Name(int(m["step"]), int(m["update"]), int(m["generation"]), path) for m, path in matches if m)
    newest: dict[int, int] = {}
    for name in names:
        newest[name.step] = max(newest.get(name.step, 0), name.generation)
    return [name for name in names if name.generation == newest[name.step]]


def _read(path: Path, *, columns: bool) -> _Update:
    try:
        with path.open("rb") as file:
            header = load_line(_record(path, file.read(_RECORD.size), file))
            if header["version"] > VERSION:
                raise JournalError(f"{path}: version {header['version']}, this agentloop reads {VERSION}")
            if not columns:
                return _Update(path, header)
            data, at, joined = _record(path, file.read(_RECORD.size), file), 0, {}
            starts = list(accumulate((row[3] for row in header["rows"]), initial=0))
            for name, kind in header["columns"]:
                joined[name] = np.frombuffer(data, kind, starts[-1], at)
                at += joined[name].nbytes
            return _Update(path, header, joined, starts)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error
    except (struct.error, zstandard.ZstdError, ValueError, KeyError, IndexError, TypeError) as error:
        raise JournalError(f"{path}: not readable as a train side: {error}") from error


def _record(path: Path, prefix: bytes, file: Any) -> bytes:
    length, crc = _RECORD.unpack(prefix)
    packed = file.read(length)
    if zlib.crc32(packed) != crc:
        raise JournalError(f"{path}: a checksum differs")
    return zstandard.ZstdDecompressor().decompress(packed)


def _joined(recorded: RecordedTrajectory, update: _Update, index: int) -> TrainedTrajectory:
    assert recorded.columns is not None
    ids = recorded.columns.ids[recorded.prompt_len :]
    if [len(ids), ids_crc(ids)] != update.header["rows"][index][3:5]:
        raise JournalError(
            f"{update.path}: row {index} is not of the tokens that the journal has of trajectory {recorded.row.id}"
        )
    place = slice(update.starts[index], update.starts[index + 1])
    columns = {name: column[place] for name, column in update.columns.items()}
    return TrainedTrajectory(
        recorded,
        trained_step=update.header["step"],
        update=update.header["update"],
        recomputed=update.header["recomputed"],
        old_log_probs=columns["old_log_probs"],
        advantages=columns["advantages"],
        response_mask=columns["response_mask"],
        rollout_is_weights=columns.get("rollout_is_weights"),
    )
