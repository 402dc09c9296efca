"""What is read back is what happened, exactly."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import struct
import time
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from agentloop.journal import JournalWriter, Run
from agentloop.journal.format import decode_frame
from agentloop.journal.recorded import MIXED_VERSION, NO_VERSION
from agentloop.trajectory import (
    CallRecord,
    CallStatus,
    EndReason,
    Origin,
    Reward,
    Sample,
    State,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)
from tests.journal.conversations import VOCABULARY, conversation, decode, facts, finish


def test_entropies_come_back_where_the_engine_told_them(tmp_path: Path) -> None:
    told = Trajectory(Sample([{"role": "user", "content": "?"}]))
    with JournalWriter(tmp_path, decode=decode) as writer:
        told.append_prompt([1, 2, 3])
        writer.trajectory_start(told)
        for index, entropies in enumerate([[0.0, 1.25, 11.9], None, [0.5], [math.nan, 0.5, 0.5]]):
            start, ids = len(told), [4, 5, 6]
            turn = Turn(index, start, start + 3, StopReason.STOP, entropies=entropies)
            told.append_sampled(ids, [-0.5, -1.5, -2.5], turn)
            writer.turn(told, turn)
            told.append(Origin.OBSERVATION, [7])
            writer.observation(told, turn)
        finish(told, writer)
    recorded = Run(tmp_path).load(told.id)
    columns = recorded.columns
    assert columns is not None
    nan = math.nan
    expected = [nan] * 3 + [0, 1.25, 11.9, nan] + [nan] * 4 + [nan] * 4 + [nan, 0.5, 0.5, nan]
    assert columns.entropies.tolist() == pytest.approx(expected, rel=1e-3, nan_ok=True)
    assert columns.log_probs[3:6].tolist() == [-0.5, -1.5, -2.5]
    assert [turn.entropies is None for turn in recorded.to_trajectory().turns] == [False, True, True, True]
    assert Run(tmp_path).verify() == []


@pytest.mark.parametrize("seed", range(12))
def test_a_conversation_comes_back_exactly(tmp_path: Path, seed: int) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        told = conversation(writer, seed, step=seed, validate=seed % 2 == 1, turns=1 + seed % 5, log_probs=seed % 4 != 3)
    assert writer.errors == 0
    run = Run(tmp_path)
    recorded = run.load(told.id)
    assert recorded.row.complete
    assert facts(recorded.to_trajectory()) == facts(told)
    recorded.to_trajectory().check()
    assert recorded.input_ids == told.input_ids
    assert recorded.response_mask == told.response_mask
    assert recorded.turn_spans == told.turn_spans
    assert recorded.rollout_log_probs == facts(told)["rollout_log_probs"]
    assert run.verify() == []


def test_each_token_has_the_version_that_sampled_it(tmp_path: Path) -> None:
    told = Trajectory(Sample([]))
    with JournalWriter(tmp_path) as writer:
        told.append_prompt([1, 2])
        writer.trajectory_start(told)
        turns = [
            Turn(0, 2, 5, StopReason.STOP, 5, 4, version_runs=((4, 1), (5, 2))),  # aborted, and gone on with
            Turn(1, 5, 7, StopReason.STOP, 6, 5),  # changed meanwhile, and nobody knows when
            Turn(2, 7, 8, StopReason.STOP, 6),
            Turn(3, 8, 9, StopReason.STOP),
        ]
        for turn in turns:
            told.append_sampled([7] * (turn.end - turn.start), None, turn)
            writer.turn(told, turn)
        finish(told, writer)
    recorded = Run(tmp_path).load(told.id)
    assert recorded.columns is not None
    expected = [NO_VERSION] * 2 + [4, 5, 5] + [MIXED_VERSION] * 2 + [6, NO_VERSION]
    assert recorded.columns.weight_version.tolist() == expected
    assert recorded.turns == turns


def test_columns_tell_of_every_token(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        told = conversation(writer, 5, turns=4)
    columns = Run(tmp_path).load(told.id).columns
    assert columns is not None
    assert len(columns) == len(told)
    assert columns.pieces == [VOCABULARY[i] for i in told.input_ids]
    assert (columns.ids.dtype, columns.log_probs.dtype, columns.turn.dtype) == (np.uint32, np.float32, np.int16)
    for segment in told.segments:
        span = slice(segment.start, segment.end)
        sampled = segment.origin is Origin.SAMPLED
        assert set(columns.mask[span].tolist()) == {int(sampled)}
        assert set(columns.turn[span].tolist()) == {segment.turn}
        assert set(columns.weight_version[span].tolist()) == {MIXED_VERSION if sampled else NO_VERSION}
        assert np.isnan(columns.log_probs[span]).all() != sampled


def test_split_characters_stay_split(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        trajectory = Trajectory(Sample([], uid="split"))
        trajectory.append_prompt([257, 258])
        writer.trajectory_start(trajectory)
        turn = Turn(0, 2, 5, StopReason.STOP)
        trajectory.append_sampled([256, 0xE2, 259], [-1.0, -2.0, -3.0], turn)
        writer.turn(trajectory, turn)
        finish(trajectory, writer)
    recorded = Run(tmp_path).load("split_0")
    assert recorded.columns is not None
    assert recorded.columns.pieces == [b"\xf0\x9f", b"\x99\x82", "été 🙂".encode(), b"\xe2", b"<|im_end|>"]
    assert recorded.columns.text(0, 2) == "🙂"
    assert recorded.texts == ["été 🙂\ufffd<|im_end|>"]


def test_empty_and_cut_turns(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        told = Trajectory(Sample([], uid="a"))
        told.append_prompt([1])
        writer.trajectory_start(told)
        empty = Turn(0, 1, 1, StopReason.LENGTH)
        told.append_sampled([], None, empty)
        writer.turn(told, empty)
        told.append(Origin.TEMPLATE, [4, 5])
        empty.closed_by_template = True
        writer.observation(told, empty)
        cut = Turn(1, 3, 5, StopReason.LENGTH)
        told.append_sampled([6, 7], [-0.5, -0.25], cut)
        writer.turn(told, cut)
        empty_again = Turn(2, 5, 5, StopReason.ABORTED)
        told.append_sampled([], None, empty_again)
        writer.turn(told, empty_again)
        finish(told, writer, end_reason=EndReason.TOKEN_LIMIT)
    recorded = Run(tmp_path).load("a_0")
    assert facts(recorded.to_trajectory()) == facts(told)
    assert recorded.texts == ["", "\x06\x07", ""]


def test_without_a_tokenizer_there_are_ids_and_no_text(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as writer:
        told = conversation(writer, 1)
    recorded = Run(tmp_path).load(told.id)
    assert facts(recorded.to_trajectory()) == facts(told)
    assert recorded.columns is not None
    assert recorded.columns.pieces is None
    assert set(recorded.texts) == {None}


def test_values_that_json_is_bad_at(tmp_path: Path) -> None:
    arguments = {"big": 10**40, "text": "lone \ud800", "float": 0.1, "nested": {"list": [1, [2, {"x": []}]]}}
    with JournalWriter(tmp_path) as writer:
        trajectory = Trajectory(Sample([{"role": "user", "content": "q"}], uid="a", ground_truth=np.array([1, 2])))
        trajectory.append_prompt([1])
        writer.trajectory_start(trajectory)
        turn = Turn(0, 1, 2, StopReason.STOP)
        trajectory.append_sampled([2], [-1.0], turn)
        writer.turn(trajectory, turn)
        record = CallRecord(ToolCall("f", arguments, "t0c0"), CallStatus.ERROR, "\ud800\x00\x1b")
        turn.calls.append(record)
        writer.tool(trajectory, turn, record)
        trajectory.reward = Reward(math.nan, {"a": math.inf}, {"object": {1, 2}})
        trajectory.end_reason, trajectory.state = EndReason.FINAL_ANSWER, State.DONE
        writer.trajectory_end(trajectory)
    assert writer.errors == 0
    recorded = Run(tmp_path).load("a_0")
    assert recorded.turns[0].calls == [record]
    assert recorded.reward is not None
    assert math.isnan(recorded.reward.value)
    assert recorded.reward.info == {"object": [1, 2]}
    assert recorded.sample.ground_truth == [1, 2]


def test_every_line_is_json_and_points_to_its_tokens(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        conversation(writer, 2, step=12)
    file = tmp_path / "train" / "step_000012" / "w0.g1.traj.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = [event["type"] for event in events]
    assert [kind for kind in kinds if kind != "pieces"][:3] == ["file", "traj_start", "turn"]
    assert kinds[1] == "pieces", "the texts of tokens come before the tokens"
    assert kinds[-2:] == ["reward", "traj_end"]
    assert {"tool", "observation"} <= set(kinds)
    end = events[-1]
    assert sum(n for _, n in end["mask"]) == sum(n for _, n in end["weight_versions"]) == end["tokens"]
    assert [value for value, _ in end["mask"]] == [0, 1, 0, 1, 0, 1]
    assert [value for value, _ in end["weight_versions"]] == [None, "mixed"] * 3


def test_what_a_tool_changes_later_is_not_what_was_recorded(tmp_path: Path) -> None:
    metrics = {"rows": 1.0}
    with JournalWriter(tmp_path) as writer:
        trajectory = Trajectory(Sample([], uid="a"))
        trajectory.append_prompt([1])
        turn = Turn(0, 1, 2, StopReason.STOP)
        trajectory.append_sampled([2], None, turn)
        writer.trajectory_start(trajectory)
        writer.turn(trajectory, turn)
        turn.calls.append(CallRecord(ToolCall("f", {}, "t0c0"), CallStatus.OK, "", metrics=metrics))
        writer.tool(trajectory, turn, turn.calls[0])
        metrics["rows"] = 2.0
        writer.flush()
    [row] = Run(tmp_path).trajectories()
    assert Run(tmp_path).load(row).turns[0].calls[0].metrics == {"rows": 1.0}


def test_events_that_were_not_told_are_made_up_for(tmp_path: Path) -> None:
    """A recorder that is told of the end alone still has all of the tokens and calls."""
    with JournalWriter(tmp_path, decode=decode) as writer:
        told = conversation(_Deaf(writer), 3)
        writer.trajectory_end(told)
    recorded = Run(tmp_path).load(told.id)
    assert recorded.input_ids == told.input_ids
    assert recorded.response_mask == told.response_mask
    assert recorded.reward == told.reward


class _Deaf:
    """Passes on the turns only."""

    def __init__(self, writer: JournalWriter) -> None:
        self.turn = writer.turn

    def __getattr__(self, name: str) -> object:
        return lambda *_: None


def test_trajectories_are_not_kept_alive(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as writer:
        ended = weakref.ref(conversation(writer, 1))
        abandoned = weakref.ref(conversation(writer, 2, stop_after="turn"))
        writer.flush()
        gc.collect()
        assert ended() is None
        assert abandoned() is None


async def test_many_at_once_keep_their_order(tmp_path: Path) -> None:
    async def one(seed: int) -> Trajectory:
        relay = _Yielding(writer)
        return await asyncio.to_thread(conversation, relay, seed, turns=6)

    with JournalWriter(tmp_path, decode=decode) as writer:
        all_told = await asyncio.gather(*[one(seed) for seed in range(40)])
    run = Run(tmp_path)
    assert len(list(run.trajectories())) == 40
    for told in all_told:
        assert facts(run.load(told.id).to_trajectory()) == facts(told)


class _Yielding:
    """Lets other threads in between any two events."""

    def __init__(self, writer: JournalWriter) -> None:
        self.writer = writer

    def __getattr__(self, name: str) -> object:
        time.sleep(0.0001)
        return getattr(self.writer, name)


def test_frames_of_older_journals_can_be_read(tmp_path: Path) -> None:
    """The first kind of frame had its columns as they are, and each token's text."""
    with JournalWriter(tmp_path, decode=decode) as writer:
        trajectory = conversation(writer, 3)
    expected = Run(tmp_path).load(trajectory.id)
    texts = expected.texts
    assert expected.columns is not None and expected.columns.pieces is not None
    events = tmp_path / "train" / "step_000000" / "w0.g1.traj.jsonl"
    lines, frames, at, tokens = [], b"", 0, (events.parent / "w0.g1.tok").read_bytes()
    for line in events.read_bytes().splitlines():
        event = json.loads(line)
        if event["type"] == "pieces":
            continue
        if event.get("tok"):
            n = sum(count for _, count in event["segments"])
            off, length, crc = (event["tok"][name] for name in ("off", "len", "crc"))
            now = decode_frame(tokens[off : off + length], crc, "here")
            pieces = expected.columns.pieces[at : at + n]
            flags, values = (
                2 | (1 if now.log_probs is not None else 0),
                b"" if now.log_probs is None else now.log_probs.tobytes(),
            )
            lens = np.array([len(piece) for piece in pieces], "<u2").tobytes()
            data = struct.pack("<4sII", b"TOK1", n, flags) + now.ids.tobytes() + values + lens + b"".join(pieces)
            packed = zstandard.ZstdCompressor().compress(data)
            event["tok"] = {"off": len(frames) + 8, "len": len(packed), "crc": zlib.crc32(packed)}
            frames += struct.pack("<II", len(packed), zlib.crc32(packed)) + packed
            at += n
        del event["line_crc"]
        lines.append(json.dumps(event).encode() + b"\n")
    events.write_bytes(b"".join(lines))
    (events.parent / "w0.g1.tok").write_bytes(frames)
    (events.parent / "w0.g1.index.jsonl").unlink()
    found = Run(tmp_path).load(trajectory.id)
    assert found.columns is not None
    assert (found.input_ids, found.rollout_log_probs) == (expected.input_ids, expected.rollout_log_probs)
    assert found.columns.pieces == expected.columns.pieces
    assert found.texts == texts
