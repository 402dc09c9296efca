"""Runs of other programs, written down as a run of ours: `agentloop ls`, `show`, `stats` and the viewer read them as any other.

What a source does not record is named in each trajectory's `missing` (`agentloop.journal.recorded.MISSING`) and shown as «not
recorded»; it is never made up.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, LedgerError, nearest
from agentloop.journal.format import dump_json
from agentloop.journal.reader import is_run
from agentloop.journal.writer import JournalWriter
from agentloop.trajectory import (
    CallRecord,
    EndReason,
    Origin,
    Reward,
    Sample,
    State,
    StopReason,
    Trajectory,
    Turn,
)

FLUSH_EVERY = 200
"""Trajectories after which the importer waits for the writer, so that no more than these are in memory."""


@dataclass
class ImportedTurn:
    """One generation, its calls, and the tokens if the source has them."""

    text: str | None
    t: float
    calls: list[CallRecord] = field(default_factory=list)
    stop_reason: StopReason = StopReason.STOP
    generate_s: float = 0.0
    weight_version: int | None = None
    min_weight_version: int | None = None
    cached_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] | None = None
    following: list[tuple[Origin, list[int]]] = field(default_factory=list)
    """Tokens between this turn's and the next one's."""


@dataclass
class Imported:
    """One trajectory of another program."""

    sample: Sample
    turns: list[ImportedTurn]
    missing: tuple[str, ...]
    t: float
    partition: str = "train"
    step: int = 0
    sibling: int = 0
    prompt_ids: list[int] = field(default_factory=list)
    """Empty if the source has no tokens."""
    reward: Reward | None = None
    end_reason: EndReason | None = None
    error: str | None = None
    complete: bool = True
    score_s: float = 0.0
    total_s: float = 0.0


@dataclass
class Source:
    """What an importer found: the run's metadata, and its trajectories one by one."""

    meta: dict[str, Any]
    trajectories: Iterator[Imported]
    skipped: list[str] = field(default_factory=list)
    """A sentence for each line that could not be read; filled while the trajectories are read."""


def import_run(path: Path, source: str, out: Path, *, partition: str | None = None) -> tuple[int, list[str]]:
    """Write what is at `path` as a run at `out`, whole or not at all; how many trajectories, and a sentence for each that could
    not be read.

    `partition` says where trajectories belong whose source does not tell. Raises `ConfigError` for an unknown source, for
    files that are not of its kind, and for an `out` that is there or cannot be written.
    """
    if source not in SOURCES:
        raise ConfigError(f"no import source '{source}'; {nearest(source, SOURCES)}")
    if not path.exists():
        raise ConfigError(f"{path}: not there; {nearest(path.name, _names(path.parent))}")
    if out.exists() and (is_run(out) or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; choose another name for the imported run")
    found = SOURCES[source](path, partition)
    partial = out.with_name(f"{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    count = 0
    try:
        writer = _Writer(partial, meta={**found.meta, "imported": {"from": source, "path": str(path)}})
        with writer:
            for imported in found.trajectories:
                try:
                    fill(imported)
                except LedgerError as error:
                    found.skipped.append(f"{path}: {error}")
                    continue
                fill(imported, writer)
                count += 1
                if count % FLUSH_EVERY == 0:
                    writer.flush()
        if writer.errors:
            raise ConfigError(f"{out}: not everything could be written; the log says why")
        if not count:
            raise ConfigError(f"{path}: no trajectories in it" + "".join(f"; {sentence}" for sentence in found.skipped[:1]))
        if out.is_dir():
            out.rmdir()
        partial.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count, found.skipped


class _Writer(JournalWriter):
    """Writes what was recorded elsewhere: with its own times, its texts where there are no tokens, and what is missing."""

    more: Mapping[str, Any] = {}
    """Of the next events."""

    def _put(self, told: Any, kind: str, body: dict[str, Any], *segments: Any, **everything: Any) -> None:
        super()._put(told, kind, {**body, **self.more}, *segments, **everything)


def fill(imported: Imported, writer: _Writer | None = None) -> None:
    """Put a trajectory into a ledger, and tell a writer as the loop would. Raises `LedgerError` if its tokens do not fit."""
    trajectory = Trajectory(imported.sample, sibling=imported.sibling, step=imported.step, validate=imported.partition == "val")
    if imported.prompt_ids:
        trajectory.append_prompt(imported.prompt_ids)
    if writer is not None:
        writer.more = {"t": imported.t, "missing": list(imported.missing)}
        writer.trajectory_start(trajectory)
    for index, said in enumerate(imported.turns):
        turn = Turn(
            index=index,
            start=len(trajectory),
            end=len(trajectory) + len(said.ids),
            stop_reason=said.stop_reason,
            weight_version=said.weight_version,
            min_weight_version=said.min_weight_version,
            cached_tokens=said.cached_tokens,
            generate_s=said.generate_s,
        )
        if imported.prompt_ids:
            trajectory.append_sampled(said.ids, said.log_probs, turn)
        else:
            trajectory.turns.append(turn)  # the ledger itself knows no turns before a prompt's tokens
        if writer is not None:
            writer.more = {"t": said.t} if said.text is None else {"t": said.t, "text": said.text}
            writer.turn(trajectory, turn)
            writer.more = {"t": said.t}
        for record in said.calls:
            turn.calls.append(record)
            if writer is not None:
                writer.tool(trajectory, turn, record)
        for origin, ids in said.following:
            trajectory.append(origin, ids)
        if writer is not None and said.following:
            writer.observation(trajectory, turn)
    trajectory.reward, trajectory.error, trajectory.end_reason = imported.reward, imported.error, imported.end_reason
    trajectory.score_s, trajectory.total_s, trajectory.state = imported.score_s, imported.total_s, State.DONE
    if writer is not None and imported.complete:
        writer.trajectory_end(trajectory)


def read_lines(path: Path, skipped: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with one a line, with the number of the line; what is none is told in `skipped`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                torn = "torn" if not line.endswith(b"\n") else f"not JSON: {error}"
                skipped.append(f"{path}, line {number}: {torn}")
                continue
            yield number, value


def as_number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def as_text(value: Any) -> str:
    """A message's content as text."""
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, list):
        parts = [part["text"] if isinstance(part, dict) and isinstance(part.get("text"), str) else None for part in value]
        if all(part is not None for part in parts):
            return "\n".join(str(part) for part in parts)
    return dump_json(value).strip().decode("utf-8", "replace")


def plain_uid(value: Any) -> str:
    """verl builds keys with underscores from uids, so a uid has none."""
    return str(value).replace("_", "-")


def guarded(where: str, skipped: list[str], build: Callable[..., Imported], *arguments: Any) -> Iterator[Imported]:
    """What `build` makes of the arguments; nothing and a sentence if the line is not what it should be."""
    try:
        yield build(*arguments)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        skipped.append(f"{where}: not what it should be: {error!r}")


def modified(path: Path) -> float:
    """For sources that do not tell when: the time of the file, so that they are in their order."""
    return path.stat().st_mtime if path.exists() else time.time()


def _names(folder: Path) -> Sequence[str]:
    return sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []


def _verl(path: Path, partition: str | None) -> Source:
    from agentloop.journal.imports_verl import read_verl

    return read_verl(path, partition)


def _verifiers(path: Path, partition: str | None) -> Source:
    from agentloop.journal.imports_verifiers import read_verifiers

    return read_verifiers(path, partition)


SOURCES: dict[str, Callable[[Path, str | None], Source]] = {"verl": _verl, "verifiers": _verifiers}
