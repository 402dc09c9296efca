"""What the loop tells while it runs; the journal writes it down."""

from __future__ import annotations

from typing import Protocol

from agentloop.trajectory import CallRecord, Trajectory, Turn


class Recorder(Protocol):
    """Told of everything, as it happens. No method blocks, raises, or keeps the trajectory alive after `trajectory_end`."""

    def trajectory_start(self, trajectory: Trajectory) -> None:
        """The prompt is in the ledger."""

    def turn(self, trajectory: Trajectory, turn: Turn) -> None:
        """A generation has been appended; its calls have not run yet."""

    def tool(self, trajectory: Trajectory, turn: Turn, record: CallRecord) -> None:
        """One tool call has its outcome."""

    def observation(self, trajectory: Trajectory, turn: Turn) -> None:
        """The segments that follow `turn` (tool answers and glue) are in the ledger."""

    def trajectory_end(self, trajectory: Trajectory) -> None:
        """Scored or failed; `end_reason`, `reward`, `masked` and the times are set."""


class Tee:
    """Tells several recorders."""

    def __init__(self, *recorders: Recorder) -> None:
        self.recorders = recorders

    def trajectory_start(self, trajectory: Trajectory) -> None:
        for recorder in self.recorders:
            recorder.trajectory_start(trajectory)

    def turn(self, trajectory: Trajectory, turn: Turn) -> None:
        for recorder in self.recorders:
            recorder.turn(trajectory, turn)

    def tool(self, trajectory: Trajectory, turn: Turn, record: CallRecord) -> None:
        for recorder in self.recorders:
            recorder.tool(trajectory, turn, record)

    def observation(self, trajectory: Trajectory, turn: Turn) -> None:
        for recorder in self.recorders:
            recorder.observation(trajectory, turn)

    def trajectory_end(self, trajectory: Trajectory) -> None:
        for recorder in self.recorders:
            recorder.trajectory_end(trajectory)


class NullRecorder:
    """Writes nothing."""

    def trajectory_start(self, trajectory: Trajectory) -> None: ...

    def turn(self, trajectory: Trajectory, turn: Turn) -> None: ...

    def tool(self, trajectory: Trajectory, turn: Turn, record: CallRecord) -> None: ...

    def observation(self, trajectory: Trajectory, turn: Turn) -> None: ...

    def trajectory_end(self, trajectory: Trajectory) -> None: ...
