"""The journal: the append-only record of a run, written while it happens, and what reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentloop.journal.base import NullRecorder as NullRecorder
    from agentloop.journal.base import Recorder as Recorder
    from agentloop.journal.format import JournalError as JournalError
    from agentloop.journal.meta import next_generation as next_generation
    from agentloop.journal.pieces import token_bytes as token_bytes
    from agentloop.journal.reader import Problem as Problem
    from agentloop.journal.reader import Run as Run
    from agentloop.journal.recorded import RecordedTrajectory as RecordedTrajectory
    from agentloop.journal.recorded import Row as Row
    from agentloop.journal.train_side import TrainedTrajectory as TrainedTrajectory
    from agentloop.journal.train_side import TrainSide as TrainSide
    from agentloop.journal.writer import JournalWriter as JournalWriter

_HOMES = {
    "JournalError": "format",
    "JournalWriter": "writer",
    "NullRecorder": "base",
    "Problem": "reader",
    "RecordedTrajectory": "recorded",
    "Recorder": "base",
    "Row": "recorded",
    "Run": "reader",
    "TrainSide": "train_side",
    "TrainedTrajectory": "train_side",
    "next_generation": "meta",
    "token_bytes": "pieces",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: whoever needs `Recorder` alone does not load numpy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
