"""The trainer's side of trajectories: written beside the journal, and joined with it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentloop.journal import JournalError, JournalWriter, Run
from agentloop.journal.train_side import FOLDER, TrainerRow, write_update
from agentloop.trajectory import Trajectory
from tests.journal.conversations import conversation, decode


def record(
    folder: Path, *, step: int = 1, seeds: range = range(4), generation: int | None = None, **kwargs: Any
) -> list[Trajectory]:
    with JournalWriter(folder, decode=decode, generation=generation) as writer:
        return [conversation(writer, seed, step=step, **kwargs) for seed in seeds]


def trainer_row(trajectory: Trajectory, *, off: float = 0.25, weights: bool = False) -> TrainerRow:
    """The trainer's log-probabilities are the rollout's plus `off` in turn 0 and 2 `off` in later ones."""
    response = trajectory.segments[1:]
    rollout = np.concatenate([np.array(s.log_probs or np.zeros(len(s.ids)), np.float32) for s in response])
    turn = np.concatenate([np.full(len(s.ids), s.turn) for s in response])
    columns = {
        "old_log_probs": rollout + np.where(turn == 0, off, 2 * off).astype(np.float32),
        "advantages": np.array(trajectory.response_mask, np.float32) * (1 + trajectory.sibling),
        "response_mask": np.array(trajectory.response_mask),
    }
    if weights:
        columns["rollout_is_weights"] = np.exp(np.full(len(rollout), off))
    ids = np.array(trajectory.response_ids)
    return TrainerRow(trajectory.step, trajectory.sample.uid, trajectory.sibling, ids, columns)


def test_both_sides_are_joined_by_trajectory_and_turn(tmp_path: Path) -> None:
    told = {trajectory.id: trajectory for trajectory in record(tmp_path)}
    write_update(tmp_path, [trainer_row(t, weights=True) for t in told.values()], step=1, update=0, generation=1)
    side = Run(tmp_path).train_side(1)
    assert (side.arrived, side.expected) == (4, 4)
    seen = {}
    for trained in side:
        trajectory = seen[trained.recorded.row.id] = told[trained.recorded.row.id]
        row = trainer_row(trajectory, weights=True)
        for name in row.columns:
            np.testing.assert_array_equal(getattr(trained, name), row.columns[name].astype(np.float32))
        assert trained.sampled.tolist() == [bool(x) for x in trajectory.response_mask]
        assert np.isnan(trained.rollout_log_probs).tolist() == [not x for x in trajectory.response_mask]
        assert [index for index, _ in trained.turns()] == [0, 1, 2]
        for index, place in trained.turns():
            assert trained.sampled[place].all()
            assert trained.sampled[place].size == trajectory.turns[index].end - trajectory.turns[index].start
            np.testing.assert_allclose(trained.ratios[place], np.exp(0.5 if index else 0.25), rtol=1e-5)
            assert set(trained.weight_version[place]) <= {6 + index, 7 + index, -2}
    assert seen.keys() == told.keys()


def test_it_arrives_later_and_maybe_in_another_step(tmp_path: Path) -> None:
    told = record(tmp_path)
    run = Run(tmp_path)
    assert (run.train_side(1).arrived, run.train_side(1).expected) == (0, 4)
    write_update(tmp_path, [trainer_row(t) for t in told[:1]], step=1, update=0, generation=1)
    write_update(tmp_path, [trainer_row(t) for t in told[1:2]], step=1, update=1, generation=1)
    assert run.train_side(1).arrived == 2
    write_update(tmp_path, [trainer_row(told[2])], step=5, update=0, generation=1)
    side = run.train_side(1)
    assert (side.arrived, side.expected, side.trained_steps) == (3, 4, {1, 5})
    places = [(trained.recorded.row.id, trained.trained_step, trained.update) for trained in side]
    assert places == [(told[0].id, 1, 0), (told[1].id, 1, 1), (told[2].id, 5, 0)]
    assert run.train_side(5).expected == 0


def test_what_verl_is_not_given_is_not_expected(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        conversation(writer, 0, step=1)
        conversation(writer, 1, step=1, stop_after="turn")
        conversation(writer, 2, step=1, validate=True)
        failed = conversation(writer, 3, step=1, stop_after="tool")
        failed.masked = True
        writer.trajectory_end(failed)
    assert Run(tmp_path).train_side(1).expected == 1


def test_a_resumed_run_supersedes_the_steps_that_it_does_again(tmp_path: Path) -> None:
    first = [record(tmp_path, step=step, generation=1) for step in (1, 2)]
    for step, told in enumerate(first, 1):
        write_update(tmp_path, [trainer_row(t) for t in told], step=step, update=0, generation=1)
    again = record(tmp_path, step=2, seeds=range(4, 7), generation=2)
    run = Run(tmp_path)
    assert (run.train_side(2).arrived, run.train_side(2).expected) == (0, 3)
    write_update(tmp_path, [trainer_row(t) for t in again], step=2, update=0, generation=2)
    assert [run.train_side(step).arrived for step in (1, 2)] == [4, 3]


def test_whoever_writes_may_be_killed(tmp_path: Path) -> None:
    told = record(tmp_path)
    rows = [trainer_row(t) for t in told]
    child = os.fork()
    if child == 0:
        try:
            for step in range(1, 10**6):
                write_update(tmp_path, rows, step=step, update=0, generation=1)
        finally:
            os._exit(1)
    while len(list((tmp_path / FOLDER).glob("*.rows"))) < 20:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    run = Run(tmp_path)
    assert run.verify() == []
    assert len(list(run.train_side(1))) == 4


def test_damage_is_told(tmp_path: Path) -> None:
    told = record(tmp_path)
    path = write_update(tmp_path, [trainer_row(t) for t in told], step=1, update=0, generation=1)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:40], whole[:6], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b""):
        path.write_bytes(content)
        with pytest.raises(JournalError, match=path.name):
            list(Run(tmp_path).train_side(1))
        assert [(problem.kind, problem.file) for problem in Run(tmp_path).verify()] == [("damaged", path)]


def test_rows_of_other_tokens_are_refused(tmp_path: Path) -> None:
    told = record(tmp_path)
    row = trainer_row(told[0])
    row.response_ids[0] += 1
    write_update(tmp_path, [row], step=1, update=0, generation=1)
    with pytest.raises(JournalError, match="not of the tokens that the journal has of trajectory u0_0"):
        list(Run(tmp_path).train_side(1))
