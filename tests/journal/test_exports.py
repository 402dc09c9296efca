"""What other programs are given: ATIF as harbor's own package reads it, Parquet by trajectory and by token."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentloop.journal import JournalWriter, RecordedTrajectory, Run
from agentloop.journal.export import export
from agentloop.journal.recorded import ORIGINS
from agentloop.trajectory import CallRecord, CallStatus, Reward, ToolCall
from tests.journal.conversations import conversation, decode, finish
from tests.journal.test_commands import agentloop

HARBOR = "harbor==0.25.0"
TOOLS = [{"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two steps, validation, an unfinished one, one without log-probabilities, and one with all kinds of awkward values."""
    with JournalWriter(tmp_path / "runs" / "mixed", decode=decode, meta={"model": "tiny", "tools": TOOLS}) as writer:
        for step in (1, 2):
            for seed in range(4):
                conversation(writer, seed, step=step)
        conversation(writer, 8, step=2, validate=True, log_probs=False)
        conversation(writer, 9, step=2, stop_after="tool")
        odd = conversation(writer, 10, uid="odd/\u2028\ud800", step=3, stop_after="turn")
        call = {"id": "a1", "type": "function", "function": {"name": "calculator", "arguments": '{"x": 1}'}}
        odd.sample.messages[1:] = [
            {
                "role": "user",
                "content": [{"type": "text", "text": "look \ud800"}, {"type": "image_url", "image_url": {"url": "x"}}],
            },
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a1", "content": "2"},
            {"role": "tool", "tool_call_id": "elsewhere", "content": "3"},
            {"role": "critic", "content": "no"},
        ]
        turn = odd.turns[0]
        for place, arguments in enumerate(("not an object", {"deep": [float("nan")]})):
            turn.calls.append(CallRecord(ToolCall("\ud800", arguments, f"c{place}"), CallStatus.ERROR, "\x00\ud800"))
            writer.tool(odd, turn, turn.calls[-1])
        finish(odd, writer, reward=float("nan"))
        started_late = conversation(writer, 11, step=3, stop_after="turn")
        started_late.reward = Reward(1.0)
    with JournalWriter(tmp_path / "runs" / "mixed", decode=decode, generation=2) as writer:
        again = conversation(writer, 10, uid="odd/\u2028\ud800", step=4, stop_after="start")
        again.sample.messages[1:] = odd.sample.messages[1:]
    return Run(tmp_path / "runs" / "mixed")


@pytest.fixture(scope="session")
def validator() -> Any:
    """Harbor's. It needs Python 3.12 and much else, but its validator needs neither."""
    folder = os.environ.get("AGENTLOOP_HARBOR")
    if folder:
        sys.path.append(folder)
    try:
        return importlib.import_module("harbor.utils.trajectory_validator").TrajectoryValidator
    except ImportError:
        pytest.skip(
            f"harbor is missing: pip install --target DIR --no-deps --ignore-requires-python {HARBOR}; AGENTLOOP_HARBOR=DIR"
        )


def all_of(run: Run) -> dict[tuple[str, int, str], RecordedTrajectory]:
    return {(row.partition, row.step, row.id): run.load(row) for row in run.trajectories()}


def key_of(document: dict[str, Any]) -> tuple[str, int, str]:
    partition, step, key = document["trajectory_id"].split("/", 2)
    return partition, int(step), key


def test_atif_is_valid_by_harbors_own_package(run: Run, tmp_path: Path, validator: Any) -> None:
    count, damaged = export(run, tmp_path / "atif", "atif", incomplete=True)
    files = sorted((tmp_path / "atif").iterdir())
    assert (count, len(files), damaged) == (len(all_of(run)), count, [])
    assert count == 13
    for file in files:
        found = validator()
        assert found.validate(file), (file, found.get_errors())


def test_atif_has_what_was_said_and_every_token_once(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "atif.jsonl", "atif")
    documents = [json.loads(line) for line in (tmp_path / "atif.jsonl").read_bytes().split(b"\n")[:-1]]
    every = all_of(run)
    assert len(documents) == 10
    for document in documents:
        if document["trajectory_id"].startswith("train/3"):
            continue
        recorded = every[key_of(document)]
        agent = [step for step in document["steps"] if step["source"] == "agent"]
        assert [step["message"] for step in agent] == recorded.texts
        assert [step["message"] for step in document["steps"][:2]] == [m["content"] for m in recorded.sample.messages]
        ids = list(agent[0]["metrics"]["prompt_token_ids"])
        for step, turn in zip(agent, recorded.turns, strict=True):
            metrics = step["metrics"]
            assert (metrics["prompt_tokens"], metrics["completion_tokens"]) == (len(ids), turn.end - turn.start)
            ids += metrics["completion_token_ids"] + metrics.get("extra", {}).get("following_token_ids", [])
            calls = [(call["tool_call_id"], call["function_name"], call["arguments"]) for call in step.get("tool_calls", [])]
            assert calls == [(r.call.id, r.call.name, r.call.arguments) for r in turn.calls]
            results = step.get("observation", {"results": []})["results"]
            assert [(r["source_call_id"], r["content"], r["extra"]["status"]) for r in results] == [
                (r.call.id, r.text, r.status) for r in turn.calls
            ]
        assert ids == recorded.input_ids
        logprobs = [value for step in agent for value in step["metrics"].get("logprobs", [])]
        values = recorded.rollout_log_probs
        mask = recorded.response_mask
        assert logprobs == ([] if values is None else [value for value, m in zip(values, mask, strict=True) if m])
        assert recorded.reward is not None
        assert document["final_metrics"]["extra"]["reward"] == recorded.reward.value
        assert document["extra"]["ground_truth"] == recorded.sample.ground_truth
        assert (document["agent"]["model_name"], document["agent"]["tool_definitions"]) == ("tiny", TOOLS)


def test_atif_grows_with_the_tokens_and_not_with_their_square(tmp_path: Path) -> None:
    sizes = []
    for turns in (10, 40):
        with JournalWriter(tmp_path / str(turns), decode=decode) as writer:
            conversation(writer, 1, turns=turns, tokens=200)
        export(Run(tmp_path / str(turns)), tmp_path / f"{turns}.jsonl", "atif")
        sizes.append((tmp_path / f"{turns}.jsonl").stat().st_size)
    assert sizes[1] < 5 * sizes[0]


def test_an_export_replaces_only_what_an_export_wrote(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "atif")
    for step in ("1", "2"):
        assert agentloop("export", str(run.path), "--to", "atif", "--out", out, "--step", step).exit_code == 0
    assert {file.name[:12] for file in (tmp_path / "atif").iterdir()} == {"train-000002", "val-000002-u"}
    (tmp_path / "atif" / "thesis.txt").write_text("mine")
    refused = agentloop("export", str(run.path), "--to", "atif", "--out", out)
    assert "'thesis.txt' in it was not written by an export" in str(refused.exception)
    assert (tmp_path / "atif" / "thesis.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*.part"))


def test_parquet_by_token(run: Run, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    result = agentloop("export", str(run.path), "--to", "parquet-tokens", "--out", str(tmp_path / "t.parquet"), "--incomplete")
    assert result.exit_code == 0, result.output
    frame = pandas.read_parquet(tmp_path / "t.parquet")
    every = all_of(run)
    assert len(frame) == sum(recorded.row.tokens for recorded in every.values())
    for (partition, step, key), recorded in every.items():
        if "\ud800" in key:
            continue
        mine = frame[(frame.partition == partition) & (frame.step == step) & (frame.id == key)]
        columns = recorded.columns
        assert columns is not None
        assert mine.position.tolist() == list(range(len(columns)))
        assert mine.token_id.tolist() == columns.ids.tolist()
        assert mine.piece.tolist() == columns.pieces
        assert mine.origin.tolist() == [ORIGINS[i].value for i in columns.origin]
        assert mine["mask"].tolist() == columns.mask.tolist()
        assert mine.turn.tolist() == columns.turn.tolist()
        np.testing.assert_array_equal(mine.log_prob.to_numpy(np.float32, na_value=np.nan), columns.log_probs)
        known = columns.weight_version >= 0
        assert mine.weight_version[known].tolist() == columns.weight_version[known].tolist()
        assert mine.weight_version[~known].isna().all()


def test_parquet_is_written_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("agentloop.journal.export_parquet.GROUP_TOKENS", 500)
    with JournalWriter(tmp_path / "run", decode=decode) as writer:
        tokens = [len(conversation(writer, seed)) for seed in range(20)]
    for to, rows in (("parquet", 20), ("parquet-tokens", sum(tokens))):
        assert export(Run(tmp_path / "run"), tmp_path / to, to) == (20, [])
        found = parquet.ParquetFile(tmp_path / to).metadata
        assert found.num_rows == rows
        assert found.num_row_groups > 2, "so much is in memory at a time"
