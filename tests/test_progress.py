"""What the progress display counts and prints."""

from __future__ import annotations

import io
from typing import Any

import pytest

from agentloop.progress import Progress
from agentloop.rollout import Rollout
from agentloop.trajectory import EndReason, Sample, Trajectory
from tests.test_loop import END, SAMPLE, Probe, Setup, call


def trajectory(step: int = 0, *, validate: bool = False, uid: str = "u") -> Trajectory:
    return Trajectory(Sample(messages=SAMPLE.messages, uid=uid), step=step, validate=validate)


async def test_it_counts_what_happened_in_one_unbroken_line(tokenizer: Any) -> None:
    stream = io.StringIO()
    bad = '<tool_call>\n{"name": "probe"}\n</tool_call>' + END
    script = [call() + END, bad, call(name="prob") + END, "The answer is 3" + END]
    with Progress("a title that takes some room in the line", total=2, stream=stream) as progress:
        await Rollout(Setup(tokenizer, script, Probe(), recorder=progress).loop).group(SAMPLE, 2)
    (line,) = stream.getvalue().splitlines()
    assert len(line) > 80 and "2/2 trajectories, 8 turns" in line and "4 tool calls, reward 1.000" in line
    assert "failed calls: malformed call 2" in line and "failed calls: unknown_tool 2" in line


def test_a_crashed_trajectory_and_a_failed_call_are_told_apart() -> None:
    progress = Progress(stream=io.StringIO())
    crashed = trajectory()
    progress.trajectory_start(crashed)
    progress.failures["error"] += 2
    progress.trajectory_end(crashed)
    assert progress.line().endswith("error 1, failed calls: error 2")


def test_without_a_terminal_lines_come_now_and_then() -> None:
    stream = io.StringIO()
    progress = Progress(stream=stream, every_s=3600)
    for _ in range(50):
        progress.trajectory_start(trajectory())
    assert stream.getvalue() == ""
    progress = Progress(stream=stream, every_s=0)
    progress.trajectory_start(trajectory())
    assert stream.getvalue().startswith("rollout: 0 trajectories, 0 turns")


def test_a_step_is_counted_anew_unless_it_overlaps_with_another() -> None:
    progress = Progress(stream=io.StringIO())
    first, second, third, val = trajectory(1), trajectory(1, uid="v"), trajectory(2), trajectory(2, validate=True)
    for one in (first, second):
        progress.trajectory_start(one)
        one.end_reason = EndReason.FINAL_ANSWER
        progress.trajectory_end(one)
    assert progress.ended == 2  # the step goes on, even if nothing ran for a moment
    progress.trajectory_start(third)
    assert (progress.started, progress.ended, progress.rewards) == (1, 0, [])
    progress.trajectory_start(val)
    assert progress.started == 2


def test_a_line_that_is_due_between_two_steps_tells_of_the_one_that_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("agentloop.progress.monotonic", lambda: now)
    stream = io.StringIO()
    progress = Progress(stream=stream, every_s=10)
    first, second = trajectory(1), trajectory(2)
    progress.trajectory_start(first)
    now = 5.0
    first.end_reason = EndReason.FINAL_ANSWER
    progress.trajectory_end(first)
    now = 20.0
    progress.trajectory_start(second)
    assert stream.getvalue().splitlines() == ["rollout: 1 trajectories, 0 turns, 0 tokens/s, 0 tool calls"]
