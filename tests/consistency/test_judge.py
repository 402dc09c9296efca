"""Thresholds: what is beyond them, what is not, the record of it, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from agentloop.commands import consistency as command
from agentloop.config import validate
from agentloop.consistency import Thresholds, consistency, judge, read_events
from agentloop.consistency.record import write_event
from agentloop.errors import ConfigError
from agentloop.journal import JournalError
from agentloop.journal.train_side import TrainerRow, write_update
from agentloop.trajectory import Origin, Trajectory
from tests.consistency.support import batch, noisy, recorded, span

DENSE = Thresholds(max_abs=0.2, max_mean_abs=0.02, max_k3=0.001, max_ratio_outside=0.001)


def apart(trajectory: Trajectory, row: TrainerRow) -> None:
    """Turn 1 of one trajectory in the second step."""
    if trajectory.sample.uid == "u4" and trajectory.step == 2:
        row.columns["old_log_probs"][span(trajectory, 1)] -= 3.0


def test_settings() -> None:
    assert Thresholds().limits == {} and Thresholds().action == "warn"
    assert DENSE.limits == {"max_abs": 0.2, "mean_abs": 0.02, "k3": 0.001, "ratio_outside": 0.001}, "by figure"
    for wrong, message in (
        ({"max_k4": 1}, "did you mean 'max_k3'"),
        ({"action": "halt"}, "action"),
        ({"max_k3": -1}, "max_k3"),
        ({"max_ratio_outside": 2}, "max_ratio_outside"),
        ({"clip": [1.5, 2]}, "clip"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(Thresholds, wrong, "agentloop.consistency")


def test_noise_of_bfloat16_never_stops_a_run() -> None:
    rng = np.random.default_rng(0)
    for step in range(1, 1001):
        rows = batch(rng, int(rng.integers(1, 9)), drift=lambda rng, n: rng.normal(scale=0.01, size=n))
        assert judge(consistency(rows, step=step, worst=1), DENSE) == []


@pytest.mark.parametrize(
    ("key", "value"), [("max_abs", 1.0), ("max_mean_abs", 0.02), ("max_k3", 0.01), ("max_ratio_outside", 0.001)]
)
def test_the_step_the_figure_and_the_worst_turn_are_named(tmp_path: Path, key: str, value: float) -> None:
    run, told = recorded(tmp_path, noisy(np.random.default_rng(0)), apart, steps=(1, 2, 3))
    report = consistency(run)
    (beyond,) = judge(report, validate(Thresholds, {key: value}, "x"))
    assert (beyond.step, beyond.update, beyond.threshold) == (2, 0, value)
    assert beyond.value == getattr(report.steps[1].figures, beyond.figure) > value
    assert beyond.worst_turn is not None and beyond.worst_turn["turn"] == 1
    bad = next(t for t in told if t.sample.uid == "u4")
    tokens = bad.turns[1].end - bad.turns[1].start
    assert beyond.sentence.startswith(f"step 2: trainer and rollout are too far apart: {beyond.figure} is ")
    assert (
        f"beyond agentloop.consistency.{key}={value:g}; worst turn: turn 1 of trajectory {bad.id} (max_abs 3" in beyond.sentence
    )
    assert beyond.sentence.endswith(f"over {tokens} tokens)")


def test_nothing_compared_is_beyond_any_threshold(tmp_path: Path) -> None:
    run, _ = recorded(tmp_path, log_probs=False)
    report = consistency(run)
    assert judge(report, Thresholds()) == []
    (beyond,) = judge(report, Thresholds(max_k3=0.1))
    assert beyond.figure == "tokens" and "none of" in beyond.sentence and "calculate_log_probs" in beyond.sentence


def test_what_should_not_be_is_beyond_any_threshold(tmp_path: Path) -> None:
    def change(trajectory: Trajectory, row: TrainerRow) -> None:
        if trajectory.sample.uid == "u1":
            row.columns["old_log_probs"][span(trajectory, 0).start] = -np.inf
            observed = next(s for s in trajectory.segments if s.origin is Origin.OBSERVATION)
            row.columns["response_mask"][observed.start - trajectory.prompt_len] = 1

    run, _ = recorded(tmp_path, change)
    assert [beyond.figure for beyond in judge(consistency(run), Thresholds(max_abs=9))] == ["misplaced", "infinite"]


def test_the_record_of_steps(tmp_path: Path) -> None:
    """A resumed run's steps supersede the first start's, and torn or damaged lines are left out."""
    rng = np.random.default_rng(0)
    report = consistency(batch(rng, 4, drift=lambda rng, n: rng.normal(scale=0.3, size=n)), step=1)
    beyond = judge(report, DENSE)
    assert read_events(tmp_path) == []
    for generation, step, update in ((1, 1, 0), (1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0)):
        write_event(tmp_path, report, beyond, step=step, update=update, generation=generation, action="stop")
    path = tmp_path / "consistency" / "g2.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.replace(b'"step":2', b'"step":4', 1) + whole[:-9])
    events = read_events(tmp_path)
    assert [(event["step"], event["update"], event["generation"]) for event in events] == [(1, 0, 1), (2, 0, 2), (3, 0, 1)]
    assert events[0]["report"] == json.loads(json.dumps(report.to_dict()))
    assert events[0]["beyond"][0]["sentence"] == beyond[0].sentence and events[0]["action"] == "stop"
    path.write_bytes(b'{"type":"consistency","version":9}\n')
    with pytest.raises(JournalError, match="version 9"):
        read_events(tmp_path)


# -- the command ----------------------------------------------------------------------------------------------------------


def agentloop(*arguments: str) -> Any:
    app = typer.Typer()
    app.command("consistency")(command.report)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_shows_where_and_what_has_not_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    run, told = recorded(tmp_path, noisy(np.random.default_rng(0)), apart, steps=(1, 2))
    (run.path / "train_side" / "step_000001.u0.g1.rows").unlink()
    result = agentloop(str(tmp_path), "--worst", "3")
    assert result.exit_code == 0
    for heading in (
        "turn ",
        "the turn began",
        "position in the turn",
        "position in a turn after",
        "worst turns",
        "worst tokens",
    ):
        assert any(line.startswith(heading) for line in result.output.splitlines()), heading
    sampled = sum(t.sampled_len for t in told if t.step == 2)
    assert f"The train side of 12 of 24 trajectories has arrived. Compared: {sampled} of {sampled} sampled" in result.output
    assert "Not arrived, by the rollout's step: 12 of step 1." in result.output
    found = json.loads(agentloop(str(tmp_path), "--json", "--step", "2", "--worst", "2").output)
    assert [step["name"] for step in found["by"]["step"]] == ["2"] and found["beyond"] == [] and len(found["worst_tokens"]) == 2
    error = agentloop(str(tmp_path), "--step", "9").exception
    assert isinstance(error, ConfigError) and "step 9" in str(error)


def test_the_command_fails_beyond_a_threshold_and_on_a_finding(tmp_path: Path) -> None:
    recorded(tmp_path, noisy(np.random.default_rng(0)), apart, steps=(1, 2))
    result = agentloop(str(tmp_path), "--max-mean-abs", "0.05")
    assert result.exit_code == 1 and "step 2: trainer and rollout are too far apart: mean_abs is" in " ".join(
        result.output.split()
    )
    assert agentloop(str(tmp_path), "--max-mean-abs", "5").exit_code == 0
    wide = json.loads(agentloop(str(tmp_path), "--json", "--clip", "0.01", "50").output)
    assert wide["clip"] == [0.01, 50] and wide["all"]["ratio_outside"] == 0


def test_the_run_s_own_thresholds_count_unless_others_are_given(tmp_path: Path) -> None:
    recorded(tmp_path, noisy(np.random.default_rng(0)), apart, steps=(1, 2))
    meta = {"format": "agentloop-journal", "format_version": 1, "config": {"agentloop": {"consistency": {"max_abs": 1.0}}}}
    (tmp_path / "run.json").write_text(json.dumps(meta))
    assert agentloop(str(tmp_path)).exit_code == 1
    assert agentloop(str(tmp_path), "--max-abs", "9").exit_code == 0


def test_runs_without_a_train_side(tmp_path: Path) -> None:
    run, _ = recorded(tmp_path)
    (run.path / "train_side" / "step_000001.u0.g1.rows").unlink()
    error = agentloop(str(tmp_path)).exception
    assert isinstance(error, ConfigError) and "agentloop.train_side=true" in str(error)


def test_rollouts_without_log_probabilities_and_trainers_that_copy_are_told_of(tmp_path: Path) -> None:
    run, told = recorded(tmp_path, log_probs=False)
    sampled = sum(t.sampled_len for t in told)
    assert f"{sampled} tokens are not compared" in agentloop(str(tmp_path)).output
    side = list(run.train_side(1))
    rows = [
        TrainerRow(
            1,
            t.recorded.row.uid,
            t.recorded.row.sibling,
            t.recorded.input_ids[t.recorded.prompt_len :],
            {name: getattr(t, name) for name in ("old_log_probs", "advantages", "response_mask")},
        )
        for t in side
    ]
    write_update(tmp_path, rows, step=1, update=0, generation=1, recomputed=False)
    output = " ".join(agentloop(str(tmp_path)).output.split())
    assert "12 trajectories are not compared" in output and "bypass_mode" in output


def test_a_damaged_train_side_is_one_sentence(tmp_path: Path) -> None:
    run, _ = recorded(tmp_path)
    path = run.path / "train_side" / "step_000001.u0.g1.rows"
    path.write_bytes(path.read_bytes()[:-7])
    error = agentloop(str(tmp_path)).exception
    assert isinstance(error, ConfigError) and path.name in str(error)
