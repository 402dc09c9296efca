"""Where the answer of a trajectory is."""

from __future__ import annotations

from collections.abc import Mapping

from agentloop.trajectory import CallStatus, EndReason, Trajectory


def cut_off(trajectory: Trajectory) -> bool:
    """Whether the trajectory ended before the model was done: its last turn is then no final answer, whatever stands in it."""
    return trajectory.end_reason not in (None, EndReason.FINAL_ANSWER)


def submitted(trajectory: Trajectory, tool: str) -> str | None:
    """The answer of the last successful call of `tool`: its argument `answer` or `code`, else its only one; `None` if it was
    never called, or not with text."""
    for record in reversed(list(trajectory.calls)):
        arguments = record.call.arguments
        if record.call.name != tool or record.status is not CallStatus.OK or not isinstance(arguments, Mapping):
            continue
        only = next(iter(arguments.values())) if len(arguments) == 1 else None
        answer = arguments.get("answer", arguments.get("code", only))
        return answer if isinstance(answer, str) else None
    return None
