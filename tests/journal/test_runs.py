"""Runs: several writers, several steps, resumed ones, and reading while writing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agentloop.errors import ConfigError
from agentloop.journal import JournalWriter, NullRecorder, Run, next_generation
from agentloop.journal.writer import KEPT_STEPS
from tests.journal.conversations import conversation, decode, facts, finish


def test_writers_of_one_generation_are_merged(tmp_path: Path) -> None:
    generation = next_generation(tmp_path)
    with (
        JournalWriter(tmp_path, "w0", generation=generation, decode=decode) as first,
        JournalWriter(tmp_path, "w1", generation=generation, decode=decode) as second,
    ):
        for seed in range(10):
            conversation(first if seed % 2 else second, seed, step=4)
    run = Run(tmp_path)
    rows = list(run.trajectories("train", 4))
    assert {row.uid for row in rows} == {f"u{seed}" for seed in range(10)}
    assert {row.writer for row in rows} == {"w0", "w1"}
    for row in rows:
        assert facts(run.load(row).to_trajectory()) == facts(conversation(NullRecorder(), int(row.uid[1:]), step=4))


def test_steps_done_again_supersede_and_never_duplicate(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        for step in (1, 2, 3):
            for seed in range(4):
                conversation(writer, seed, step=step, reward=0.0)
        conversation(writer, 7, step=3, validate=True)
    with JournalWriter(tmp_path, decode=decode) as writer:  # resumed from a checkpoint after step 1
        assert writer.generation == 2
        for seed in range(3):
            conversation(writer, seed, step=2, reward=1.0)
    run = Run(tmp_path)
    assert [(row.generation, row.reward) for row in run.trajectories("train", 1)] == [(1, 0.0)] * 4
    assert [(row.generation, row.reward) for row in run.trajectories("train", 2)] == [(2, 1.0)] * 3
    assert [(row.generation, row.reward) for row in run.trajectories("train", 3)] == [(1, 0.0)] * 4
    assert [row.uid for row in run.trajectories("val")] == ["u7"]
    assert run.verify() == []


def test_a_generation_that_wrote_no_trajectory_supersedes_nothing(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        conversation(writer, 1)
    (tmp_path / "train" / "step_000000" / "w0.g2.traj.jsonl").write_bytes(b'{"type":"file","ver')
    assert [row.generation for row in Run(tmp_path).trajectories()] == [1]


def test_no_two_starts_have_one_generation(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda _: next_generation(tmp_path), range(16)))
    assert sorted(given) == list(range(1, 17))


def test_writers_that_nobody_starts_in_common_find_their_generation_together(tmp_path: Path) -> None:
    names = ["monday", "tuesday", "wednesday"]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda i: (names[i % 3], next_generation(tmp_path, names[i % 3])), range(24)))
    assert sorted({generation for _, generation in given}) == [1, 2, 3]
    assert len(set(given)) == 3
    generation = dict(given)["tuesday"]
    with JournalWriter(tmp_path, "w7", generation=generation, meta={"seed": 7}) as writer:
        conversation(writer, 1)
    assert next_generation(tmp_path, "tuesday") == generation, "also when its own metadata has been written"
    assert next_generation(tmp_path) == 4
    assert sorted(path.name for path in (tmp_path / "starts").iterdir()) == ["g1.json", "g2.json", "g3.json", "g4.json"]


def test_validation_is_apart(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        conversation(writer, 1, step=5)
        conversation(writer, 1, step=5, validate=True, reward=0.25)
    run = Run(tmp_path)
    assert [(place.partition, place.step) for place in run.steps()] == [("train", 5), ("val", 5)]
    assert run.load("u1_1", partition="val").row.reward == 0.25
    assert run.load("u1_1", partition="train").row.reward != 0.25


def test_more_steps_at_once_than_files_are_kept_open(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        for seed in range(60):
            conversation(writer, seed, step=seed % 20)
        for step in range(20):
            conversation(writer, 1000 + step, step=step, stop_after="turn")
        for seed in range(60, 120):
            conversation(writer, seed, step=seed % 20)
    assert writer.errors == 0
    run = Run(tmp_path)
    rows = list(run.trajectories())
    assert sum(row.complete for row in rows) == 120
    assert {row.step for row in rows if not row.complete} == set(range(20))
    assert run.verify() == []


def test_trajectories_that_end_a_hundred_steps_later(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        late = [conversation(writer, step, step=step, stop_after="observation") for step in range(100)]
        writer.flush()
        assert len(writer._files) <= KEPT_STEPS, "memory does not grow with the steps"
        for trajectory in late[:50]:
            finish(trajectory, writer)
    assert writer.errors == 0
    run = Run(tmp_path)
    assert [row.step for row in run.trajectories() if row.complete] == list(range(50))
    assert [facts(run.load(trajectory.id).to_trajectory()) for trajectory in late[:50]] == [facts(t) for t in late[:50]]
    assert run.verify() == []


def test_a_step_that_is_flushed_after_each_trajectory(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        for seed in range(30):
            conversation(writer, seed)
            writer.flush()
            assert len(list(Run(tmp_path).trajectories())) == seed + 1, "wherever the index is by then"
    head = json.loads((tmp_path / "train" / "step_000000" / "w0.g1.index.jsonl").read_bytes().split(b"\n")[0])
    assert head["size"] == (tmp_path / "train" / "step_000000" / "w0.g1.traj.jsonl").stat().st_size


def test_a_run_keeps_a_bounded_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentloop.journal.reader.CACHED_ROWS", 10)
    monkeypatch.setattr("agentloop.journal.reader.CACHED_PIECES", 2)
    with JournalWriter(tmp_path, decode=decode) as writer:
        for seed in range(40):
            conversation(writer, seed, step=seed // 4)
    run = Run(tmp_path)
    for _ in range(2):
        for row in run.trajectories():
            assert facts(run.load(row).to_trajectory()) == facts(conversation(NullRecorder(), int(row.uid[1:]), step=row.step))
    assert sum(len(rows) for rows in run._cache.values()) <= 12
    assert len(run._pieces) <= 2


def test_reading_while_it_is_written(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        conversation(writer, 1)
        writer.flush()
        run = Run(tmp_path)
        assert [row.uid for row in run.trajectories()] == ["u1"]
        conversation(writer, 2)
        conversation(writer, 3, step=1, stop_after="turn")
        writer.flush()
        assert [(row.uid, row.complete) for row in run.trajectories()] == [("u1", True), ("u2", True), ("u3", False)]
        assert facts(run.load("u2_2").to_trajectory()) == facts(conversation(NullRecorder(), 2))
        assert len(run.load("u3_3").turns) == 1
        conversation(writer, 4, tokens=300)
        writer.flush()
        row = next(row for row in Run(tmp_path).trajectories() if row.uid == "u4")
        assert facts(run.load(row).to_trajectory()) == facts(conversation(NullRecorder(), 4, tokens=300))


def test_many_threads_read_one_run(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        for seed in range(24):
            conversation(writer, seed, step=seed % 3)
    for _ in range(5):
        run = Run(tmp_path)
        rows = list(run.trajectories()) * 2
        with ThreadPoolExecutor(8) as pool:
            loaded = list(pool.map(run.load, rows))
        for row, recorded in zip(rows, loaded, strict=True):
            assert facts(recorded.to_trajectory()) == facts(conversation(NullRecorder(), int(row.uid[1:]), step=row.step))


def test_what_the_run_is(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, meta={"seed": 7, "config": {"max_turns": 3}, "tools": [{"name": "calculator"}]}):
        pass
    first = Run(tmp_path).meta
    assert first["format"] == "agentloop-journal"
    assert (first["format_version"], first["seed"], first["generation"]) == (1, 7, 1)
    assert first["tools"] == [{"name": "calculator"}]
    assert {"python", "agentloop", "transformers"} <= set(first["packages"])
    with JournalWriter(tmp_path, meta={"seed": 8}):
        pass
    second = Run(tmp_path).meta
    assert (second["created"], second["seed"], second["generation"]) == (first["created"], 8, 2)
    assert not list(tmp_path.rglob("*.part"))


def test_metadata_of_a_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format":"agentloop-journal","format_version":99}')
    with pytest.raises(ConfigError, match="key 'format_version' is 99"):
        _ = Run(tmp_path).meta


def test_a_missing_run_or_trajectory_is_one_sentence(tmp_path: Path) -> None:
    with JournalWriter(tmp_path / "quickstart", decode=decode) as writer:
        conversation(writer, 1)
    with pytest.raises(ConfigError, match="quickstrat: no run here; did you mean 'quickstart'"):
        Run(tmp_path / "quickstrat")
    with pytest.raises(ConfigError, match="no trajectory 'u1_2' in step 0 of train; did you mean 'u1_1'"):
        Run(tmp_path / "quickstart").load("u1_2", 0, "train")


def test_the_same_trajectory_started_again_replaces_the_first(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        conversation(writer, 1, stop_after="turn")
        conversation(writer, 1)
    run = Run(tmp_path)
    assert [row.complete for row in run.trajectories()] == [True]
    assert facts(run.load("u1_1").to_trajectory()) == facts(conversation(NullRecorder(), 1))
