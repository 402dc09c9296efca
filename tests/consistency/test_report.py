"""The report on a recorded run: planted drifts are found where they were planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentloop.consistency import consistency
from agentloop.journal import JournalWriter
from agentloop.journal.train_side import TrainerRow, write_update
from agentloop.trajectory import Origin, Trajectory
from tests.consistency.support import batch, noisy, recorded, span, trainer_side
from tests.journal.conversations import conversation, decode


def test_every_sampled_token_is_in_every_grouping(tmp_path: Path) -> None:
    run, told = recorded(tmp_path, noisy(np.random.default_rng(0)), steps=(1, 2))
    found = consistency(run)
    sampled = sum(trajectory.sampled_len for trajectory in told)
    assert (found.trajectories, found.expected, found.arrived, found.missing) == (24, 24, 24, {})
    assert found.sampled_tokens == found.all.tokens == sampled
    assert [step.name for step in found.steps] == ["1", "2"]
    for name, groups in found.by.items():
        later = sum(t.turns[i].end - t.turns[i].start for t in told for i in (1, 2))
        assert sum(group.figures.tokens for group in groups) == (later if name == "in_turn_after_observation" else sampled), (
            name
        )
    assert sum(turn.figures.tokens for step in found.steps for turn in step.turns) == sampled
    assert found.turn_level is not None and found.turn_level["turns"] == 72
    assert [group.name for group in found.by["origin"]] == ["after_prompt", "after_observation"]
    assert [group.name for group in found.by["turn"]] == ["0", "1", "2"]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == json.loads(json.dumps(found.to_dict()))
    alone = consistency(run, step=2).all
    assert (alone.tokens, alone.max_abs) == (found.steps[1].figures.tokens, found.steps[1].figures.max_abs)
    assert alone.k3 == pytest.approx(found.steps[1].figures.k3)


def test_one_token(tmp_path: Path) -> None:
    def change(trajectory: Trajectory, row: TrainerRow) -> None:
        if trajectory.sample.uid == "u5":
            row.columns["old_log_probs"][span(trajectory, 1).start] -= 4.0

    run, told = recorded(tmp_path, noisy(np.random.default_rng(0)), change)
    found = consistency(run)
    worst = found.worst_tokens[0]
    planted = told[5]
    at = planted.turns[1].start
    assert (worst["id"], worst["turn"], worst["token"], worst["in_turn"]) == (planted.id, 1, at, 0)
    assert worst["origin"] == "after_observation" and worst["response_position"] == at - planted.prompt_len
    assert worst["diff"] == pytest.approx(-4, abs=0.1) and worst["diff"] == pytest.approx(worst["trainer"] - worst["rollout"])
    columns = run.load(planted.id).columns
    assert columns is not None and (worst["token_id"], worst["text"]) == (planted.input_ids[at], columns.text(at, at + 1))
    assert worst["key"] == f"train/1/{planted.id}"
    assert (
        found.worst_turns[0]["id"] == planted.id and found.worst_turns[0]["turn"] == 1 and found.worst_turns[0]["share"] > 0.9
    )
    largest = {group.name: group.figures.max_abs for group in found.by["in_turn_after_observation"]}
    assert max(largest, key=lambda name: largest[name] or 0) == "0"


def test_one_turn_index(tmp_path: Path) -> None:
    def change(trajectory: Trajectory, row: TrainerRow) -> None:
        row.columns["old_log_probs"][span(trajectory, 2)] += 0.3

    run, _ = recorded(tmp_path, noisy(np.random.default_rng(0)), change)
    found = consistency(run)
    means = {group.name: group.figures.mean for group in found.by["turn"]}
    assert means["0"] == pytest.approx(0, abs=0.01) == means["1"] and means["2"] == pytest.approx(0.3, abs=0.01)
    assert {turn["turn"] for turn in found.worst_turns} == {2}
    assert [turn.figures.k1 for turn in found.steps[0].turns][2] == pytest.approx(-0.3, abs=0.01)


def test_old_versions_are_apart_from_current_and_mixed_ones(tmp_path: Path) -> None:
    """Turn k is sampled by version 7 + k, begun with 6 + k, and nobody told at which token: mixed."""

    def change(trajectory: Trajectory, row: TrainerRow) -> None:
        row.columns["old_log_probs"][span(trajectory, 0)] -= 0.5

    with JournalWriter(tmp_path, decode=decode) as writer:
        told = [conversation(writer, seed, step=10) for seed in range(8)]
    rows = [trainer_side(trajectory) for trajectory in told]
    for trajectory, row in zip(told, rows, strict=True):
        change(trajectory, row)
    write_update(tmp_path, rows, step=10, update=0, generation=1)
    found = consistency(_run(tmp_path))
    groups = {group.name: group.figures for group in found.by["staleness"]}
    assert list(groups) == ["mixed"] and groups["mixed"].tokens == found.all.tokens

    def exact(trajectory: Trajectory) -> None:
        for turn in trajectory.turns:
            turn.min_weight_version = turn.weight_version

    other = tmp_path / "exact"
    with JournalWriter(other, decode=decode) as writer:
        again = [_retold(writer, trajectory, exact) for trajectory in told]
    write_update(other, rows, step=10, update=0, generation=1)
    groups = {group.name: group.figures for group in consistency(_run(other)).by["staleness"]}
    assert list(groups) == ["0", "1", "2"]
    for name, turn in (("2", 0), ("1", 1), ("0", 2)):
        assert groups[name].tokens == sum(t.turns[turn].end - t.turns[turn].start for t in again)
        assert groups[name].mean == pytest.approx(-0.5 if turn == 0 else 0, abs=1e-6)


def _retold(writer: JournalWriter, trajectory: Trajectory, change: Any) -> Trajectory:
    change(trajectory)
    writer.trajectory_start(trajectory)
    for turn in trajectory.turns:
        writer.turn(trajectory, turn)
        writer.observation(trajectory, turn)
    writer.trajectory_end(trajectory)
    return trajectory


def _run(folder: Path) -> Any:
    from agentloop.journal import Run

    return Run(folder)


def test_a_temperature_that_one_side_forgot(tmp_path: Path) -> None:
    """The rollout sampled at temperature 0.6 and the trainer computes at 1: the trainer is less sure of every token."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=2.0, size=(4000, 50))

    def log_softmax(x: Any) -> Any:
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    hot, cold = log_softmax(logits), log_softmax(logits / 0.6)
    drawn = [rng.choice(50, p=np.exp(row)) for row in cold]
    rows = np.arange(4000)
    sides = {"old_log_probs": hot[rows, drawn], "rollout_log_probs": cold[rows, drawn], "response_mask": np.ones(4000)}
    found = consistency([TrainerRow(1, "g", 0, np.array(drawn), sides)], step=1)
    true = float((np.exp(cold) * (cold - hot)).sum(axis=1).mean())
    assert true > 0.1
    assert found.all.k1 == pytest.approx(true, rel=0.1) and found.all.k3 == pytest.approx(true, rel=0.1)
    assert all((group.figures.k1 or 0) > 0.05 for group in found.by["position"]), "everywhere, not at one place"
    assert found.all.correlation is not None and found.all.correlation > 0.9, "a correlation does not show it"


def test_the_same_weights_and_no_log_probabilities(tmp_path: Path) -> None:
    run, told = recorded(tmp_path, log_probs=False)
    found = consistency(run)
    sampled = sum(trajectory.sampled_len for trajectory in told)
    assert (found.all.tokens, found.all.not_recorded, found.sampled_tokens) == (0, sampled, sampled)
    assert found.all.mean_abs is None and found.turn_level is None and found.worst_tokens == found.worst_turns == ()
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_trainer_that_took_the_rollouts_numbers_is_not_compared(tmp_path: Path) -> None:
    run, _ = recorded(tmp_path, recomputed=False)
    found = consistency(run)
    assert (found.trajectories, found.not_recomputed, found.all.tokens, found.sampled_tokens) == (12, 12, 0, 0)


def test_a_trained_token_that_was_not_sampled_is_a_finding(tmp_path: Path) -> None:
    where = {}

    def change(trajectory: Trajectory, row: TrainerRow) -> None:
        if trajectory.sample.uid == "u3":
            segment = next(s for s in trajectory.segments if s.origin is Origin.OBSERVATION)
            where["at"] = segment.start - trajectory.prompt_len
            row.columns["response_mask"][where["at"]] = 1

    run, told = recorded(tmp_path, change)
    found = consistency(run)
    assert found.steps[0].misplaced == 1
    assert found.findings == (
        f"1 trained token was not sampled: trajectory {told[3].id} of step 1, response token {where['at']} (observation)",
    )


def test_an_impossible_token_is_a_finding_and_the_worst_one(tmp_path: Path) -> None:
    def change(trajectory: Trajectory, row: TrainerRow) -> None:
        if trajectory.sample.uid == "u2":
            row.columns["old_log_probs"][span(trajectory, 0).start] = -np.inf

    run, told = recorded(tmp_path, noisy(np.random.default_rng(0)), change)
    found = consistency(run)
    assert found.all.infinite == 1 and "1 sampled token to which one side gives the probability 0" in found.findings[0]
    worst = found.worst_tokens[0]
    assert (worst["id"], worst["turn"], worst["infinite"], worst["trainer"], worst["diff"]) == (told[2].id, 0, True, None, None)
    assert (found.worst_turns[0]["id"], found.worst_turns[0]["turn"]) == (told[2].id, 0)


def test_a_conversation_by_itself(tmp_path: Path) -> None:
    """As the viewer asks for it."""
    run, told = recorded(tmp_path, noisy(np.random.default_rng(0)))
    one = next(iter(run.train_side(1)))
    found = consistency([one])
    assert found.trajectories == 1 and found.expected is None
    assert found.all.tokens == next(t for t in told if t.id == one.recorded.row.id).sampled_len
    assert found.worst_tokens[0]["text"] is not None


def test_a_batch_in_memory_says_what_the_record_says(tmp_path: Path) -> None:
    run, _ = recorded(tmp_path, noisy(np.random.default_rng(0)))
    rows = []
    for trained in run.train_side(1):
        columns = {
            "old_log_probs": trained.old_log_probs,
            "rollout_log_probs": np.nan_to_num(trained.rollout_log_probs),
            "response_mask": trained.response_mask,
        }
        row = trained.recorded.row
        ids = trained.recorded.columns.ids[trained.recorded.prompt_len :] if trained.recorded.columns else None
        rows.append(TrainerRow(1, row.uid, row.sibling, ids, columns, (6, 9)))
    found, record = consistency(rows, step=1), consistency(run)
    assert found.all == record.all
    assert found.by["turn"] == record.by["turn"] and found.by["in_turn"] == record.by["in_turn"]
    assert [group.name for group in found.by["origin"]] == ["after_prompt", "after_turn"]
    assert [group.name for group in found.by["staleness"]] == ["mixed"]
    assert [token["response_position"] for token in found.worst_tokens] == [
        token["response_position"] for token in record.worst_tokens
    ]


def test_what_rejection_sampling_took_out_is_compared_all_the_same() -> None:
    rows = batch(np.random.default_rng(0), 8, drift=lambda rng, n: rng.normal(scale=0.01, size=n))
    rows[3].columns["old_log_probs"][5] -= 5
    rows[3].columns["response_mask"][5] = 0
    found = consistency(rows, step=1)
    assert found.all.max_abs == pytest.approx(5, abs=0.1) and found.findings == ()
    assert [group.name for group in found.by["turn"]] == ["0", "1"]
