"""Bugs planted in the files of a run, and on the trainer's side of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentloop.audit import Report, audit_run, audit_trajectories
from agentloop.journal.train_side import TrainerRow, write_update
from agentloop.trajectory import Trajectory
from tests.audit.planted import pieces_of, rebuilt, write
from tests.audit.rollouts import Maker

NAME = "qwen-like"


def rollouts() -> list[Trajectory]:
    maker = Maker(NAME, 1, plain=True)
    return [t for g in range(3) for t in maker.group(f"g{g}", 4)]


# -- events ---------------------------------------------------------------------------------------------------------------

Event = dict[str, Any]


def events_of(run: Path) -> tuple[Path, list[Event]]:
    path = next(run.glob("train/*/*.traj.jsonl"))
    return path, [json.loads(line) for line in path.read_bytes().splitlines()]


def rewrite(run: Path, change: Callable[[list[Event]], list[Event] | None]) -> None:
    path, events = events_of(run)
    changed = change(events)
    path.write_bytes(b"".join(json.dumps(event).encode() + b"\n" for event in (events if changed is None else changed)))
    for index in path.parent.glob("*.index.jsonl"):
        index.unlink()


def of(events: list[Event], kind: str, id_: str = "g1_1", turn: int | None = None) -> Event:
    return next(e for e in events if e["type"] == kind and e.get("id") == id_ and turn in (None, e.get("turn")))


def without(kind: str, turn: int | None = None) -> Callable[[list[Event]], list[Event]]:
    def change(events: list[Event]) -> list[Event]:
        gone = of(events, kind, turn=turn)
        return [event for event in events if event is not gone]

    return change


def mask_of_the_end(events: list[Event]) -> None:
    """The mask at the record's end begins a token late."""
    runs = of(events, "traj_end")["mask"]
    runs[0][1] += 1
    runs[1][1] -= 1


def versions_of_the_end(events: list[Event]) -> None:
    end = of(events, "traj_end")
    end["weight_versions"] = [[9 if version is not None else None, count] for version, count in end["weight_versions"]]


def origin_of_an_answer(events: list[Event]) -> None:
    event = of(events, "observation", turn=0)
    event["segments"] = [["sampled" if origin == "observation" else origin, count] for origin, count in event["segments"]]


def boundary_of_a_segment(events: list[Event]) -> None:
    event = of(events, "observation", turn=0)
    event["segments"][0][1] += 1
    event["segments"][1][1] -= 1


def place_of_a_turn(events: list[Event]) -> None:
    of(events, "turn", turn=1)["start"] += 1


def sibling(events: list[Event]) -> None:
    of(events, "traj_start")["sibling"] = 3


def answer(events: list[Event]) -> None:
    of(events, "tool", turn=0)["text"] = "quite another answer than the tokens have"


def frame_of_another(events: list[Event]) -> None:
    """The turn points to the tokens of a sibling's."""
    of(events, "turn", turn=0)["tok"] = of(events, "turn", "g1_2", turn=0)["tok"]


def checksum(events: list[Event]) -> None:
    of(events, "turn", turn=0)["tok"]["crc"] ^= 1


def tokens_at_the_end(events: list[Event]) -> None:
    of(events, "traj_end")["crc"] ^= 1


def twice(events: list[Event]) -> list[Event]:
    return [*events, *[event for event in events if event.get("id") == "g1_1"]]


def reward(events: list[Event]) -> None:
    of(events, "reward")["value"] = None


EDITS: list[tuple[Callable[[list[Event]], Any], str]] = [
    (without("turn", 1), "turns"),
    (without("observation", 1), "prefix"),
    (without("tool", 1), "observation"),
    (mask_of_the_end, "mask"),
    (versions_of_the_end, "weight_versions"),
    (origin_of_an_answer, "mask"),
    (place_of_a_turn, "prefix"),
    (sibling, "identity"),
    (answer, "observation"),
    (frame_of_another, "record"),
    (checksum, "record"),
    (tokens_at_the_end, "record"),
    (twice, "identity"),
    (reward, "reward"),
]


@pytest.mark.parametrize(("change", "invariant"), EDITS, ids=lambda value: getattr(value, "__qualname__", ""))
def test_a_bug_in_the_files_is_found(change: Callable[[list[Event]], Any], invariant: str, tmp_path: Path) -> None:
    write(tmp_path, NAME, rollouts())
    audit_run(tmp_path).raise_if_any()
    rewrite(tmp_path, change)
    report = audit_run(tmp_path)
    assert "g1_1" in {f.trajectory for f in report.of(invariant)}, report.render()


def test_a_run_that_is_being_written_or_was_killed_is_good(tmp_path: Path) -> None:
    write(tmp_path, NAME, rollouts())
    path, events = events_of(tmp_path)
    whole = path.read_bytes()
    for index in tmp_path.glob("train/*/*.index.jsonl"):
        index.unlink()
    for size in range(len(whole) // 5, len(whole), max(1, len(whole) // 23)):
        path.write_bytes(whole[:size])
        audit_run(tmp_path).raise_if_any()
    assert events


# -- the trainer's side ---------------------------------------------------------------------------------------------------

TEMPERATURE = 0.7


def sampled_by_a_model(trajectories: list[Trajectory], *, of_temperature: float, seed: int = 0) -> list[Trajectory]:
    """The ledgers with log-probabilities of a made-up distribution, from which something was sampled at `TEMPERATURE`, told
    at `of_temperature`. Versions are those that a synchronous trainer has."""
    rng = np.random.default_rng(seed)
    made = []
    for t in trajectories:
        pieces = []
        for origin, ids, turn, values in pieces_of(t):
            if values is not None:
                logits = rng.normal(0, 3, (len(ids), 40))
                chosen = (logits / TEMPERATURE + rng.gumbel(size=logits.shape)).argmax(axis=1)
                scaled = logits / of_temperature
                values = (scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True)))[np.arange(len(ids)), chosen].tolist()
            pieces.append((origin, ids, turn, values))
        new = rebuilt(t, pieces)
        for turn in new.turns:
            turn.weight_version = turn.min_weight_version = 0
            turn.version_runs = ()
        made.append(new)
    return made


def trained(t: Trajectory, *, noise: float = 0.01) -> TrainerRow:
    rng = np.random.default_rng(len(t))
    own = np.array(t.rollout_log_probs, np.float32)
    mask = np.array(t.response_mask)
    columns = {
        "old_log_probs": np.minimum(own + rng.normal(0, noise, len(own)), 0),
        "advantages": np.zeros(len(own)),
        "response_mask": mask,
    }
    return TrainerRow(t.step, t.sample.uid, t.sibling, np.array(t.response_ids), columns)


def grpo(rows: list[TrainerRow], trajectories: list[Trajectory]) -> None:
    for row, t in zip(rows, trajectories, strict=True):
        own = [other.reward.value for other in trajectories if other.reward and other.sample.uid == row.uid]
        assert t.reward is not None
        value = (t.reward.value - np.mean(own)) / (np.std(own, ddof=1) + 1e-6)
        row.columns["advantages"] = row.columns["response_mask"] * value


def run_with(folder: Path, change: Callable[[list[TrainerRow]], None], *, told_at: float = TEMPERATURE) -> Report:
    good = sampled_by_a_model(rollouts(), of_temperature=TEMPERATURE)
    rows = [trained(t) for t in good]
    grpo(rows, good)
    change(rows)
    write(folder, NAME, sampled_by_a_model(rollouts(), of_temperature=told_at))
    write_update(folder, rows, step=1, update=0, generation=1)
    return audit_run(folder)


def test_a_trainer_that_agrees_is_good(tmp_path: Path) -> None:
    report = run_with(tmp_path, lambda rows: None)
    report.raise_if_any()
    assert report.not_checked == []


@pytest.mark.parametrize("told_at", [1.0, 0.5])
def test_log_probs_before_temperature_against_after_are_found(told_at: float, tmp_path: Path) -> None:
    report = run_with(tmp_path, lambda rows: None, told_at=told_at)
    assert report.of("log_probs"), report.render()
    assert report.of("log_probs")[0].token is not None


@pytest.mark.parametrize("temperature", [0.95, 1.05])
def test_a_temperature_that_is_a_little_off_is_found_over_all_tokens(temperature: float, tmp_path: Path) -> None:
    report = run_with(tmp_path, lambda rows: None, told_at=TEMPERATURE * temperature)
    assert "correlation" in report.of("log_probs")[0].message


def shifted(rows: list[TrainerRow]) -> None:
    """What verl would have if the rollout's numbers stood a token late, seen from the other side."""
    row = rows[5]
    sampled = np.flatnonzero(row.columns["response_mask"])
    row.columns["old_log_probs"][sampled] = np.roll(row.columns["old_log_probs"][sampled], 1)


def another_model(rows: list[TrainerRow]) -> None:
    rows[5].columns["old_log_probs"] = rows[5].columns["old_log_probs"] - 0.4


def tool_tokens_trained(rows: list[TrainerRow]) -> None:
    row = rows[5]
    row.columns["response_mask"] = np.ones_like(row.columns["response_mask"])


def advantage_of_another(rows: list[TrainerRow]) -> None:
    rows[5].columns["advantages"] = rows[5].columns["response_mask"] * 0.7


def advantage_varies(rows: list[TrainerRow]) -> None:
    rows[5].columns["advantages"][3] += 0.25


def log_prob_nan(rows: list[TrainerRow]) -> None:
    rows[5].columns["old_log_probs"][2] = np.nan


def siblings_swapped(rows: list[TrainerRow]) -> None:
    a, b = rows[4], rows[5]
    rows[4], rows[5] = (TrainerRow(x.step, x.uid, x.sibling, y.response_ids, y.columns) for x, y in ((a, b), (b, a)))


def columns_swapped(rows: list[TrainerRow]) -> None:
    """Two siblings' log-probabilities, as far as they go."""
    a, b = rows[4].columns, rows[5].columns
    n = min(len(a["old_log_probs"]), len(b["old_log_probs"]))
    a["old_log_probs"][:n], b["old_log_probs"][:n] = b["old_log_probs"][:n].copy(), a["old_log_probs"][:n].copy()


@pytest.mark.parametrize(
    ("change", "invariant"),
    [
        (shifted, "log_probs"),
        (another_model, "log_probs"),
        (columns_swapped, "log_probs"),
        (tool_tokens_trained, "mask"),
        (advantage_of_another, "advantages"),
        (advantage_varies, "advantages"),
        (log_prob_nan, "train_side"),
        (siblings_swapped, "train_side"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bug_on_the_trainers_side_is_found(change: Callable[[Any], None], invariant: str, tmp_path: Path) -> None:
    report = run_with(tmp_path, change)
    named = report.of(invariant)
    assert named, report.render()
    if invariant != "train_side" or change is log_prob_nan:
        assert "g1_1" in {f.trajectory for f in named}, report.render()
    if change is shifted:
        assert "shifted by one" in named[0].message


def test_a_model_scores_the_record(tmp_path: Path) -> None:
    """Without a trainer's side: `score` is what an engine answers."""
    good = sampled_by_a_model(rollouts(), of_temperature=TEMPERATURE)
    known = {tuple(t.input_ids): t for t in good}

    def score(ids: Any, temperature: float) -> list[float]:
        assert temperature in (0.7, 1.0)
        t = known[tuple(ids)]
        return [0.0] * (t.prompt_len - 1) + list(t.rollout_log_probs or ())

    audit_trajectories(good, score=score).raise_if_any()
    bad = sampled_by_a_model(rollouts(), of_temperature=1.0)
    assert audit_trajectories(bad, score=score).of("log_probs")
    pieces = pieces_of(good[5])
    pieces[1] = (*pieces[1][:3], [*(pieces[1][3] or ())[1:], -1.0])
    stale = rebuilt(good[5], pieces)
    report = audit_trajectories([*good[:5], stale, *good[6:]], score=score)
    assert {f.trajectory for f in report.findings} == {"g1_1"}
