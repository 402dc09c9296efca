"""Ways to plant a bug: ledgers that no append would have made, and runs that hold them."""

from __future__ import annotations

import copy
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

from agentloop.journal import JournalWriter, token_bytes
from agentloop.trajectory import Origin, Segment, Trajectory, Turn
from tests.audit.rollouts import renderer_of

Piece = tuple[Origin, Sequence[int], int, Sequence[float] | None]
"""Origin, ids, turn, log-probabilities."""


def pieces_of(trajectory: Trajectory) -> list[Piece]:
    return [(s.origin, list(s.ids), s.turn, None if s.log_probs is None else list(s.log_probs)) for s in trajectory.segments]


def rebuilt(trajectory: Trajectory, pieces: Sequence[Piece], turns: Sequence[Turn] | None = None) -> Trajectory:
    """A copy with these segments, laid end to end without a look at what they are. `turns` default to its own."""
    made = copy.copy(trajectory)
    made.turns = [copy.copy(turn) for turn in (trajectory.turns if turns is None else turns)]
    segments: list[Segment] = []
    at = 0
    for origin, ids, turn, log_probs in pieces:
        if len(ids):
            segments.append(Segment(origin, tuple(ids), at, turn, None if log_probs is None else tuple(log_probs)))
        at += len(ids)
    made._segments = segments
    made._ids = [i for segment in segments for i in segment.ids]
    made._crc = crc32(array("I", made._ids).tobytes())
    return made


def moved(trajectory: Trajectory, after: int, by: int, *, crc: bool = True) -> list[Turn]:
    """Its turns, those that begin at token `after` or later moved. `crc`: they forget what the engine was given."""
    return [
        replace(turn, start=turn.start + by, end=turn.end + by, prompt_crc=None if crc else turn.prompt_crc)
        if turn.start >= after
        else turn
        for turn in trajectory.turns
    ]


def write(folder: Path, name: str, trajectories: Sequence[Trajectory], **meta: Any) -> Path:
    """A run of finished trajectories, told to the real writer as the loop would have told it."""
    tokenizer, _ = renderer_of(name)
    with JournalWriter(folder, decode=token_bytes(tokenizer), meta={"seed": 1, **meta}) as writer:
        for number, trajectory in enumerate(trajectories):
            tell(writer, trajectory)
            if number % 64 == 63:  # quicker than any loop: the queue would fill
                writer.flush()
    return folder


def tell(writer: JournalWriter, trajectory: Trajectory) -> None:
    staged = copy.copy(trajectory)
    staged.turns, staged._segments = [], []
    waiting = list(trajectory._segments)

    def append(turn: int, *, sampled: bool) -> None:
        """The segments up to a turn's last sampled one, or to its end."""
        while waiting and (waiting[0].turn < turn or (waiting[0].turn == turn and (not sampled or _ahead(waiting, turn)))):
            staged._segments.append(waiting.pop(0))

    append(-1, sampled=False)
    writer.trajectory_start(staged)
    for turn in trajectory.turns:
        staged.turns.append(turn)
        append(turn.index, sampled=True)
        writer.turn(staged, turn)
        for record in turn.calls:
            writer.tool(staged, turn, record)
        if waiting and waiting[0].turn <= turn.index:
            append(turn.index, sampled=False)
            writer.observation(staged, turn)
    staged._segments += waiting
    writer.trajectory_end(staged)


def _ahead(waiting: Sequence[Segment], turn: int) -> bool:
    """A sampled segment of the turn is still to come."""
    return any(segment.turn == turn and segment.origin is Origin.SAMPLED for segment in waiting)


def segment_at(trajectory: Trajectory, origin: Origin, turn: int) -> int:
    """The place among its segments of the first one of that origin and turn."""
    return next(i for i, s in enumerate(trajectory.segments) if s.origin is origin and s.turn == turn)
