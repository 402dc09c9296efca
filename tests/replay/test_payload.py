"""The answers of the viewer's protocol are what the ledger had."""

from __future__ import annotations

import json
import struct
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentloop.consistency import consistency
from agentloop.journal import JournalWriter, Run
from agentloop.journal.imports import import_run
from agentloop.journal.train_side import write_update
from agentloop.replay import to_frame
from agentloop.replay.payload import Answer, Payload
from agentloop.trajectory import Sample, StopReason, Trajectory, Turn
from tests.journal.conversations import conversation, decode, finish
from tests.journal.test_train_side import trainer_row
from tests.replay.runs import DIFFERENT, STEPS, Recorded, planted_badges

DTYPES = {"u32": "<u4", "f32": "<f4", "u16": "<u2", "u8": "|u1"}


def opened(frame: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and columns of a frame, as another program would read it."""
    length, zero = struct.unpack_from("<II", frame)
    assert zero == 0
    header = json.loads(frame[8 : 8 + length])
    start = -(-(8 + length) // 8) * 8
    columns = {}
    for column in header.get("columns", ()):
        assert column["offset"] % 8 == 0
        columns[column["name"]] = np.frombuffer(frame, DTYPES[column["dtype"]], column["length"], start + column["offset"])
    return header, columns


@pytest.fixture(scope="module")
def payload(recorded: Recorded) -> Payload:
    return Payload(Run(recorded.path))


def ask(payload: Payload, **request: Any) -> dict[str, Any]:
    return opened(payload.answer(request).frame())[0]


def rows(overview: dict[str, Any]) -> dict[str, dict[str, Any]]:
    columns = overview["trajectories"]
    return {key: {name: values[i] for name, values in columns.items()} for i, key in enumerate(columns["key"])}


def test_the_overview_tells_of_every_trajectory(payload: Payload, recorded: Recorded) -> None:
    overview = ask(payload, kind="overview")
    told = rows(overview)
    assert len({len(values) for values in overview["trajectories"].values()}) == 1
    assert set(told) == {f"{partition}/{step}/{key}" for partition, step, key in recorded.trajectories}
    for (partition, step, key), trajectory in recorded.trajectories.items():
        row = told[f"{partition}/{step}/{key}"]
        assert row["group"] == f"{partition}/{step}/{trajectory.sample.uid}"
        if row["complete"]:
            assert row["reward"] == (trajectory.reward.value if trajectory.reward else None)
            assert (row["end_reason"], row["tokens"]) == (trajectory.end_reason, len(trajectory))
        if partition == "train":
            assert set(row["badges"]) == planted_badges(step, key)
    assert overview["groups"]["train/1/even"]["prompt"].startswith("even: 日本語")
    assert [(s["partition"], s["step"], s["arrived"], s["expected"]) for s in overview["steps"]] == [
        ("train", 1, 15, 15),
        ("train", 2, 7, 15),
        ("train", 3, None, None),
        ("val", 3, None, None),
    ]
    assert overview["can"] == ["search", "refresh", "changes", "consistency"]
    assert overview["run"]["model"] == "quickstart"


def test_advantages_are_the_trainers_or_what_grpo_makes_of_the_group(payload: Payload, recorded: Recorded) -> None:
    told = rows(ask(payload, kind="overview"))
    for step in STEPS:
        rewards = [told[f"train/{step}/even_{i}"]["reward"] for i in range(4)]
        expected = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards, ddof=1) + 1e-6)
        for i in range(4):
            assert told[f"train/{step}/even_{i}"]["advantage"] == pytest.approx(expected[i], rel=1e-5)
    sources = [told[f"train/{step}/even_0"]["advantage_source"] for step in STEPS]
    assert sources == ["train", "train", "group"]
    assert told["train/1/trouble_0"]["advantage"] is None, "masked"
    assert told["train/3/trouble_1"]["advantage"] is None, "a sibling is still open"
    assert told["val/3/even_0"]["advantage"] is None


def test_every_token_of_a_sample_is_the_ledgers(payload: Payload, recorded: Recorded) -> None:
    for (partition, step, key), trajectory in recorded.trajectories.items():
        if (step, key) == (3, "trouble_3"):
            continue
        header, columns = opened(payload.answer({"kind": "sample", "key": f"{partition}/{step}/{key}"}).frame())
        check(trajectory, header, columns)


def check(trajectory: Trajectory, header: dict[str, Any], columns: dict[str, Any]) -> None:
    assert header["n"] == len(trajectory)
    assert columns["ids"].tolist() == trajectory.input_ids
    assert header["segments"] == [[s.origin.value, len(s.ids), s.turn] for s in trajectory.segments]
    expected = [x for s in trajectory.segments for x in (s.log_probs or [float("nan")] * len(s.ids))]
    np.testing.assert_allclose(columns["logprob"], np.array(expected), rtol=1e-6)
    assert len(columns["piece_len"]) == header["n"] and columns["piece_len"].sum() == len(columns["piece_bytes"])
    assert sum(count for _, count in header["versions"]) == header["n"]
    flat = [version for version, count in header["versions"] for _ in range(count)]
    for turn, told in zip(trajectory.turns, header["turns"], strict=True):
        assert (told["start"], told["end"]) == (turn.start, turn.end)
        assert [list(run) for run in turn.versions] == [[v, len(list(g))] for v, g in groupby(flat[turn.start : turn.end])]
        assert [call["text"].encode("utf-8", "replace") for call in told["calls"]] == [
            record.text.replace("\ud800", "\ufffd").encode() for record in turn.calls
        ]


def test_the_train_side_is_there_once_it_has_arrived(payload: Payload, recorded: Recorded) -> None:
    header, columns = opened(payload.answer({"kind": "sample", "key": "train/{}/{}".format(*DIFFERENT)}).frame())
    assert header["train"] == {"step": 1, "update": 0, "recomputed": True}
    apart = columns["train_logprob"] - columns["logprob"]
    assert np.flatnonzero(np.abs(apart) > 0.5).tolist() == recorded.big_differences
    prompt = header["segments"][0][1]
    assert np.isnan(columns["train_logprob"][:prompt]).all() and not columns["train_mask"][:prompt].any()
    header, columns = opened(payload.answer({"kind": "sample", "key": "train/3/even_0"}).frame())
    assert header["train"] is None and "train_logprob" not in columns and "advantage" not in columns


def test_trainer_against_rollout_is_what_the_report_says(recorded: Recorded) -> None:
    payload = Payload(Run(recorded.path))
    told = ask(payload, kind="consistency")["report"]
    assert "consistency" in ask(payload, kind="overview")["can"]
    assert told == json.loads(json.dumps(consistency(Run(recorded.path)).to_dict()))
    named = {token["token"] for token in told["worst_tokens"] if token["key"] == "train/{}/{}".format(*DIFFERENT)}
    assert set(recorded.big_differences) <= named
    steps = ask(payload, kind="overview")["steps"]
    assert told["arrived"] == told["trajectories"] == sum(step["arrived"] or 0 for step in steps)
    assert {int(step): n for step, n in told["missing"].items()}.keys() == {2, 3}
    rows = [row for row in Run(recorded.path).trajectories("train", 1) if row.id == "even_1"]
    chosen = ask(Payload(Run(recorded.path), lambda: rows, live=False), kind="consistency")["report"]
    assert chosen["trajectories"] == 1
    assert {token["id"] for token in chosen["worst_tokens"]} == {"even_1"}


def test_trainer_against_rollout_follows_what_arrives(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as writer:
        made = conversation(writer, 0)
    payload = Payload(Run(tmp_path))
    assert "consistency" not in ask(payload, kind="overview")["can"]
    assert ask(payload, kind="consistency")["report"] is None
    write_update(tmp_path, [trainer_row(made)], step=made.step, update=0, generation=1)
    assert "consistency" in ask(payload, kind="overview")["can"]
    assert ask(payload, kind="consistency")["report"]["trajectories"] == 1


def test_entropies_are_those_that_the_engine_told(tmp_path: Path) -> None:
    told = [0.5, 0.0, 2.25]
    with JournalWriter(tmp_path, decode=decode) as writer:
        for sibling, entropies in enumerate((told, None)):
            trajectory = Trajectory(Sample([{"role": "user", "content": "?"}], uid="u"), sibling=sibling, step=1)
            trajectory.append_prompt([65, 66])
            writer.trajectory_start(trajectory)
            turn = Turn(0, 2, 5, StopReason.STOP, entropies=entropies)
            trajectory.append_sampled([67, 68, 69], [-0.1, -0.2, -0.3], turn)
            writer.turn(trajectory, turn)
            finish(trajectory, writer)
    payload = Payload(Run(tmp_path))
    _, columns = opened(payload.answer({"kind": "sample", "key": "train/1/u_0"}).frame())
    assert np.isnan(columns["entropy"][:2]).all() and columns["entropy"][2:].tolist() == told
    _, columns = opened(payload.answer({"kind": "sample", "key": "train/1/u_1"}).frame())
    assert "entropy" not in columns
    pytest.importorskip("pandas")
    tokens = to_frame(tmp_path, "token")
    assert tokens[tokens.id == "u_0"].entropy.dropna().tolist() == told and tokens[tokens.id == "u_1"].entropy.isna().all()
    turns = to_frame(tmp_path, "turn").set_index("id").entropy
    assert turns["u_0"] == pytest.approx(np.mean(told)) and np.isnan(turns["u_1"])


def test_a_late_arrival_is_seen(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        told = [conversation(writer, seed, step=1) for seed in range(3)]
    payload = Payload(Run(tmp_path))
    assert ask(payload, kind="sample", key="train/1/u0_0")["train"] is None
    write_update(tmp_path, [trainer_row(t) for t in told[:2]], step=1, update=0, generation=1)
    assert ask(payload, kind="sample", key="train/1/u0_0")["train"]["step"] == 1
    assert ask(payload, kind="overview")["steps"] == [{"partition": "train", "step": 1, "arrived": 2, "expected": 3}]


def test_a_run_that_grows(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        open_one = conversation(writer, 0, step=1, stop_after="observation")
        writer.flush()
        payload = Payload(Run(tmp_path))
        row = rows(ask(payload, kind="overview"))["train/1/u0_0"]
        assert (row["complete"], row["parse_errors"], row["total_s"]) == (False, None, None) and "incomplete" in row["badges"]
        header = ask(payload, kind="sample", key="train/1/u0_0")
        assert header["n"] == len(open_one) and header["reward"] is None and header["turns"][0]["tools_s"] is None
        finish(open_one, writer, reward=0.5)
        conversation(writer, 1, step=1)
        writer.flush()
        told = rows(ask(payload, kind="overview"))
        assert set(told) == {"train/1/u0_0", "train/1/u1_1"}
        assert told["train/1/u0_0"]["complete"] and told["train/1/u0_0"]["reward"] == 0.5


def test_search_finds_what_was_said_called_and_answered(payload: Payload) -> None:
    found = ask(payload, kind="search", text="ONERROR=", keys=None, limit=10)
    assert [(hit["key"], hit["turn"], hit["where"]) for hit in found["hits"]] == [
        (f"train/{step}/trouble_3", 0, "result") for step in STEPS
    ]
    assert "onerror=" in found["hits"][0]["excerpt"]
    assert found["searched"] == 50
    places = {"17 + 25": "text", "I add first": "text", "Use the tools": "prompt", "the engine died": "error"}
    for text, where in places.items():
        hit = ask(payload, kind="search", text=text, keys=None, limit=1)["hits"][0]
        assert hit["where"] == where, text
    narrowed = ask(payload, kind="search", text="i add first", keys=["train/1/even_0", "train/1/flat_0"], limit=10)
    assert [hit["key"] for hit in narrowed["hits"]] == ["train/1/even_0"] and narrowed["searched"] == 2


def test_what_is_wrong_is_one_sentence(payload: Payload) -> None:
    for request in (
        {"kind": "sample", "key": "train/1/nobody"},
        {"kind": "sample"},
        {"kind": "fork", "key": "x"},
        {},
        None,
        [1],
    ):
        answer = payload.answer(request)
        assert answer.header["kind"] == "error" and answer.header["message"] and not answer.buffer


def test_a_damaged_trajectory_does_not_hide_the_others(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        for seed in range(3):
            conversation(writer, seed, step=1)
    (path,) = tmp_path.rglob("*.tok")
    path.write_bytes(path.read_bytes()[:-5])
    payload = Payload(Run(tmp_path))
    assert len(rows(ask(payload, kind="overview"))) == 3
    assert ask(payload, kind="sample", key="train/1/u0_0")["kind"] == "sample"
    assert ask(payload, kind="sample", key="train/1/u2_2")["kind"] == "error"


def test_a_fork_is_handed_on(recorded: Recorded) -> None:
    asked = []

    def fork(row: Any, turn: int, call: int | None, text: str) -> dict[str, str]:
        asked.append((row.id, row.step, turn, call, text))
        return {"text": "forked", "command": "agentloop view there"}

    payload = Payload(Run(recorded.path), fork=fork)
    assert "fork" in ask(payload, kind="overview")["can"]
    assert ask(payload, kind="fork", key="train/1/even_0", turn=0, call=0, text="43")["text"] == "forked"
    assert asked == [("even_0", 1, 0, 0, "43")]


def test_headers_are_json_everywhere() -> None:
    answer = Answer({"kind": "x", "nan": float("nan"), "text": "a\ud800b", "huge": 2**70})
    told = json.loads(answer.json())
    assert told == {"kind": "x", "nan": None, "text": "a\ufffdb", "huge": 2**70}
    answer.json().decode("utf-8")


def test_what_an_import_does_not_know_is_not_recorded(tmp_path: Path) -> None:
    lines = [
        {"input": "user\nWhat is 1+1?\n", "output": f"It is {i}.", "gts": "2", "score": float(i), "step": 1} for i in range(2)
    ]
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / "1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    import_run(tmp_path / "dump", "verl", tmp_path / "run")
    payload = Payload(Run(tmp_path / "run"))
    overview = ask(payload, kind="overview")
    row = rows(overview)["train/1/p0_1"]
    unknown = ("turns", "tokens", "tool_calls", "tool_failures", "parse_errors", "cut_turns", "retries", "t", "total_s")
    assert {name: row[name] for name in unknown} == dict.fromkeys(unknown)
    assert (row["reward"], row["end_reason"], row["badges"]) == (1.0, "not recorded", [])
    assert "What is 1+1?" in overview["groups"]["train/1/p0"]["prompt"]
    header, columns = opened(payload.answer({"kind": "sample", "key": "train/1/p0_1"}).frame())
    assert header["n"] == 0 and not len(columns["ids"])
    (turn,) = header["turns"]
    assert turn["text"] == "It is 1."
    assert {turn[name] for name in ("generate_s", "tools_s", "stop_reason", "t", "cached_tokens")} == {None}
    pd = pytest.importorskip("pandas")
    frame = to_frame(tmp_path / "run").iloc[0]
    assert all(pd.isna(frame[name]) for name in (*unknown[:-2], "started", "total_s", "end_reason"))
    assert to_frame(tmp_path / "run", "turn").start.isna().all()
