"""Other programs' dumps become runs that are read like any other; what they lack stays «not recorded»."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ConfigError
from agentloop.journal import Run
from agentloop.journal.imports import import_run
from agentloop.journal.recorded import MISSING
from agentloop.trajectory import CallStatus, EndReason, Origin
from tests.journal.test_commands import agentloop


def lines(path: Path, *values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
    return path


# -- verl -------------------------------------------------------------------------------------------------------------------


INPUTS = ["user\nwhat is 1+1?\nassistant\n"] * 2 + ["user\nand 2+2?\nassistant\n"] * 2
OUTPUTS = ["I think 2", "it is 3 <script>\x1b[31m", "4", "été 🙂"]
TRUTHS: list[Any] = ["2", "2", "4", None]
SCORES = [1.0, 0.0, 1.0, 0.5]
OF_THE_REWARD = {"acc": [True, False, True, True], "f1": [0.5, 0.25, 1, 0], "pred": list("2345")}
V1_KEYS = {"uid": [f"5b6e-9{group}_{rollout}_0" for group in range(2) for rollout in range(2)]}


def dump(folder: Path, steps: int, extra: dict[str, list[Any]]) -> Path:
    """As `test_verl_writes_these_lines` says that verl writes it."""
    columns = {"input": INPUTS, "output": OUTPUTS, "gts": TRUTHS, "score": SCORES}
    for step in range(1, steps + 1):
        every = columns | {"step": [step] * 4} | extra
        lines(folder / f"{step}.jsonl", *({key: values[i] for key, values in every.items()} for i in range(4)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "extra"), [("ray", OF_THE_REWARD), ("v1", V1_KEYS)])
def test_verl_writes_these_lines(tmp_path: Path, trainer: str, extra: dict[str, list[Any]]) -> None:
    pytest.importorskip("verl")
    if trainer == "v1":
        from verl.trainer.ppo.v1.trainer_base import PPOTrainer as Trainer
    else:
        from verl.trainer.ppo.ray_trainer import RayPPOTrainer as Trainer
    Trainer._write_generations(INPUTS, OUTPUTS, TRUTHS, SCORES, extra, str(tmp_path / "verl"), 1)
    assert (tmp_path / "verl" / "1.jsonl").read_bytes() == (dump(tmp_path / "ours", 1, extra) / "1.jsonl").read_bytes()


@pytest.mark.parametrize("extra", [OF_THE_REWARD, V1_KEYS])
def test_verls_dump(tmp_path: Path, extra: dict[str, list[Any]]) -> None:
    dump(tmp_path / "dump", 2, extra)
    count, skipped = import_run(tmp_path / "dump", "verl", tmp_path / "run")
    assert (count, skipped) == (8, [])
    run = Run(tmp_path / "run")
    assert run.verify() == []
    rows = list(run.trajectories("train", 2))
    assert [(row.complete, row.reward, row.end_reason, row.sibling) for row in rows] == [
        (True, 1.0, None, 0),
        (True, 0.0, None, 1),
        (True, 1.0, None, 0),
        (True, 0.5, None, 1),
    ]
    assert rows[0].uid == rows[1].uid != rows[2].uid == rows[3].uid, "siblings are together"
    assert rows[0].uid == ("5b6e-90" if "uid" in extra else "p0")
    recorded = run.load(rows[1])
    assert recorded.messages == [
        {"role": "prompt", "content": "user\nwhat is 1+1?\nassistant\n"},
        {"role": "assistant", "content": "it is 3 <script>\x1b[31m"},
    ]
    assert set(recorded.row.missing) == set(MISSING)
    assert recorded.sample.ground_truth == "2"
    assert recorded.reward is not None
    if "acc" in extra:
        assert (recorded.reward.components, recorded.reward.info) == ({"f1": 0.25}, {"acc": False, "pred": "3"})
    assert run.meta["imported"] == {"from": "verl", "path": str(tmp_path / "dump")}


def test_what_verl_lacks_is_not_recorded_and_never_0(tmp_path: Path) -> None:
    dump(tmp_path / "dump", 1, {})
    assert agentloop("import", str(tmp_path / "dump"), "--from", "verl", "--out", str(tmp_path / "run")).exit_code == 0
    run = str(tmp_path / "run")
    head, row = (line.split() for line in agentloop("ls", run).output.splitlines())
    found = dict(zip(head[:5] + head[-2:], row[:5] + row[-2:], strict=True))
    assert row[:8] == ["train", "1", "4", "0", "0.625", "-", "-", "-"], found
    assert agentloop("ls", run).output.count("not recorded 4") == 1
    of_step = agentloop("ls", run, "--step", "1").output.splitlines()[1]
    assert of_step.split()[:8] == ["train", "p0_0", "1.000", "not", "recorded", "-", "-", "-"]
    shown = agentloop("show", run, "p0_1").output
    assert "0 tokens" not in shown
    assert "0.000 s" not in shown
    assert "imported; not recorded: " in shown
    assert "it is 3 <script>\\x1b[31m" in shown
    assert "end: not recorded" in shown
    [step] = json.loads(agentloop("stats", run, "--json").output)["steps"]
    assert (step["reward"]["mean"], step["end_reasons"]) == (0.625, {"not recorded": 4})
    assert {step[name] for name in ("tokens", "sampled_tokens", "tool_calls", "tool_failures", "masked", "mean_turns")} == {
        None
    }
    assert step["latency_s"] == {"generate": {"p50": None, "p95": None}, "trajectory": {"p50": None, "p95": None}}


def test_an_imported_run_can_be_exported_again(tmp_path: Path) -> None:
    dump(tmp_path / "dump", 1, {})
    import_run(tmp_path / "dump" / "1.jsonl", "verl", tmp_path / "run", partition="val")
    result = agentloop("export", str(tmp_path / "run"), "--to", "verl", "--out", str(tmp_path / "out.jsonl"))
    assert result.exit_code == 0, result.output
    for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()):
        assert line["output"] is not None
        assert {line[name] for name in ("tokens", "num_turns", "tool_calls", "total_s", "end_reason", "weight_version")} == {
            None
        }
    for to in ("atif", "parquet", "parquet-tokens"):
        assert agentloop("export", str(tmp_path / "run"), "--to", to, "--out", str(tmp_path / to)).exit_code == 0
    document = json.loads(next((tmp_path / "atif").iterdir()).read_text())
    assert "metrics" not in document["steps"][-1]
    assert "total_prompt_tokens" not in document["final_metrics"]


def test_lines_that_are_torn_or_of_another_kind_are_told(tmp_path: Path) -> None:
    good = {"input": "a", "output": "b", "gts": None, "score": 1.0, "step": 3}
    path = lines(tmp_path / "3.jsonl", good, [1], good | {"step": "x"}, {"input": "a"})
    with path.open("a") as file:
        file.write('{"input": "to')
    count, skipped = import_run(path, "verl", tmp_path / "run")
    assert count == 2
    assert [sentence.split(": ")[0] for sentence in skipped] == [f"{path}, line {n}" for n in (2, 4, 5)]
    assert skipped[2].endswith("torn")
    with pytest.raises(ConfigError, match=r"line 1: no key 'output', which verl's dumps have; did you mean 'outputs'"):
        import_run(lines(tmp_path / "bad" / "1.jsonl", {"input": "", "outputs": ""}), "verl", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob("*.part"))


# -- verifiers: results.jsonl -------------------------------------------------------------------------------------------------

NESTED = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 17, "b": 25}'}}
TIMING = {"start_time": 1.7e9, "generation": {"start": 1.7e9, "end": 1.7e9 + 2}, "scoring": {"duration": 0.5}, "total": 2.5}
RESULT: dict[str, Any] = {
    "example_id": 7,
    "prompt": [{"role": "system", "content": "Use tools."}, {"role": "user", "content": "17+25?"}],
    "completion": [
        {
            "role": "assistant",
            "content": "I add",
            "tool_calls": [json.dumps(NESTED), '{"id": "c2", "name": "add", "arguments": "{broken"}'],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "42"},
    ],
    "answer": "42",
    "info": {"level": 1},
    "reward": 0.75,
    "error": None,
    "timing": TIMING,
    "is_completed": True,
    "is_truncated": False,
    "stop_condition": "no_tools_called",
    "metrics": {"correct": 1.0, "num_turns": 2.0},
    "token_usage": {"input_tokens": 10.0, "output_tokens": 5.0},
    "correct": 1.0,
}  # fmt: skip


def test_results_of_verifiers(tmp_path: Path) -> None:
    failed = RESULT | {
        "completion": None,
        "reward": None,
        "stop_condition": "has_error",
        "error": {"error": "SandboxError", "message": "no room", "error_chain_repr": "", "error_chain_str": ""},
        "timing": {"generation_ms": 10.0, "scoring_ms": 0.0, "total_ms": 10.0},
    }
    lines(
        tmp_path / "eval" / "results.jsonl",
        RESULT,
        RESULT | {"reward": 0.0},
        failed,
        RESULT | {"example_id": 8, "completion": "text"},
    )
    (tmp_path / "eval" / "metadata.json").write_text(
        json.dumps(
            {"env_id": "gsm8k", "model": "m", "tools": [{"name": "add", "description": "", "parameters": {}, "strict": None}]}
        )
    )
    assert import_run(tmp_path / "eval", "verifiers", tmp_path / "run") == (4, [])
    run = Run(tmp_path / "run")
    assert run.verify() == []
    assert run.meta["model"] == "m"
    assert run.meta["config"]["env_id"] == "gsm8k"
    assert run.meta["tools"] == [{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]
    first = run.load("7_0")
    assert first.row.partition == "val"
    assert (first.row.reward, first.row.components) == (0.75, {"correct": 1.0, "num_turns": 2.0})
    assert (first.row.end_reason, first.row.total_s, first.row.score_s, first.row.t) == ("final_answer", 2.5, 0.5, 1.7e9)
    assert first.texts == ["I add", "42"]
    asked, unanswered, said = first.turns[0].calls
    assert (asked.call.name, asked.call.arguments, asked.text, asked.status) == ("add", {"a": 17, "b": 25}, "42", CallStatus.OK)
    assert (unanswered.call.arguments, unanswered.status) == ("{broken", CallStatus.NOT_RUN)
    assert (said.call.name, said.text) == ("environment", "go on")
    assert {"tokens", "log_probs", "weight_version", "tool_status", "stop_reason"} <= set(first.row.missing)
    assert not {"turns", "tool_calls", "end_reason", "total_s", "t"} & set(first.row.missing)
    assert first.reward is not None
    assert first.reward.info["token_usage"] == RESULT["token_usage"]
    third = run.load("7_2").row
    assert (third.reward, third.error, third.end_reason, third.turns) == (None, "SandboxError: no room", None, 0)
    assert "end_reason" in third.missing
    assert run.load("8_0").texts == ["text"]
    for command in (["ls"], ["show"], ["stats"], ["ls", "--step", "0"]):
        assert agentloop(command[0], str(tmp_path / "run"), *command[1:]).exit_code == 0


# -- verifiers: traces.jsonl --------------------------------------------------------------------------------------------------


def trace(**changes: Any) -> dict[str, Any]:
    asked = {"id": "c1", "name": "add", "arguments": '{"a": 17}'}
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "cached_input_tokens": 3}
    nodes = [
        {"message": {"role": "user", "content": "17+25?"}, "token_ids": [1, 2, 3], "mask": [False] * 3, "timestamp": 1e9},
        {
            "parent": 0,
            "message": {"role": "assistant", "content": "I add", "tool_calls": [asked]},
            "sampled": True,
            "token_ids": [4, 5, 6, 7],
            "mask": [False, True, True, False],
            "logprobs": [-0.5, -0.25],
            "timestamp": 1e9 + 1,
        },
        {"parent": 1, "message": {"role": "tool", "tool_call_id": "c1", "content": "42"}, "token_ids": [8, 9]},
        {
            "parent": 2,
            "message": {"role": "assistant", "content": "42", "reasoning_content": "easy"},
            "sampled": True,
            "token_ids": [10, 11],
            "mask": [False, True],
            "logprobs": [-1.0],
            "timestamp": 1e9 + 3,
        },
    ]  # fmt: skip
    return {
        "id": "t1",
        "nodes": nodes,
        "calls": [
            {"node": 1, "finish_reason": "tool_calls", "time": {"start": 1.0, "end": 1.5}, "usage": usage},
            {"node": 3, "finish_reason": "length", "time": {"start": 2.0, "end": 2.25}},
        ],
        "rewards": {"correct": {"score": 1.0, "weight": 0.5}, "style": {"score": 0.5, "weight": 1.0}, "late": None},
        "metrics": {"words": 3.0},
        "is_completed": True,
        "ok": True,
        "stop_condition": "agent_completed",
        "timing": {"start": 1e9, "agent": {"start": 1e9, "end": 1e9 + 4}, "scoring": {"start": 1e9 + 4, "end": 1e9 + 5}},
    } | changes  # fmt: skip


def episode(*traces: dict[str, Any], **changes: Any) -> dict[str, Any]:
    work = {"type": "train", "step": 12, "policy": {"start": 3, "end": 3}}
    task = {"type": "GSM", "data": {"answer": "42"}, "key": "k1"}
    run = {"type": "train", "id": "r", "work": work}
    head = {"id": "e1", "env": {"id": "gsm8k"}, "task": task, "group": {"id": "g_1"}, "run": run, "ok": True}
    return {**head, "traces": list(traces), **changes}


def test_traces_of_verifiers_with_their_tokens(tmp_path: Path) -> None:
    lines(tmp_path / "run_v" / "traces.jsonl", episode(trace()), episode(trace(id="t2")))
    assert import_run(tmp_path / "run_v", "verifiers", tmp_path / "run") == (2, [])
    run = Run(tmp_path / "run")
    assert run.verify() == []
    recorded = run.load("g-1_0", 12, "train")
    row = recorded.row
    assert [r.sibling for r in run.trajectories("train", 12)] == [0, 1]
    assert (row.tokens, row.prompt_tokens, row.sampled_tokens, row.turns, row.tool_calls) == (11, 4, 3, 2, 1)
    assert recorded.input_ids == list(range(1, 12))
    assert recorded.response_mask == [1, 1, 0, 0, 0, 0, 1]
    assert recorded.rollout_log_probs == [-0.5, -0.25, 0.0, 0.0, 0.0, 0.0, -1.0]
    assert [origin for origin, *_ in recorded.segments] == [
        Origin.PROMPT, Origin.SAMPLED, Origin.TEMPLATE, Origin.OBSERVATION, Origin.TEMPLATE, Origin.SAMPLED,
    ]  # fmt: skip
    assert recorded.texts == ["I add", "easy\n\n42"]
    assert [(turn.weight_version, turn.stop_reason, turn.generate_s, turn.cached_tokens) for turn in recorded.turns] == [
        (3, "stop", 0.5, 3),
        (3, "length", 0.25, 0),
    ]
    assert recorded.reward is not None
    assert (recorded.reward.value, recorded.reward.components) == (1.0, {"correct": 0.5, "style": 0.5})
    assert (row.end_reason, row.t, row.score_s, row.total_s) == ("final_answer", 1e9, 1.0, 5.0)
    assert set(row.missing) == {"masked", "tool_status", "tool_s"}
    recorded.to_trajectory().check()


def test_traces_without_tokens_or_with_branches(tmp_path: Path) -> None:
    plain = trace()
    for node in plain["nodes"]:
        for name in ("token_ids", "mask", "logprobs"):
            node.pop(name, None)
    branched = trace()
    again = {"message": {"role": "assistant", "content": "again"}, "sampled": True, "token_ids": [5], "mask": [True]}
    branched["nodes"].append({"parent": 0, "logprobs": []} | again)
    errors = [{"type": "RolloutError", "message": "late"}]
    timed_out = trace(stop_condition="agent_timeout", is_timeout=True, ok=False, errors=errors)
    timed_out["nodes"] = timed_out["nodes"][:1]
    other = {"run": None, "group": None}
    episodes = [episode(plain, **other), episode(branched), episode(timed_out), {"traces": [{"nodes": [1]}]}]
    lines(tmp_path / "traces.jsonl", *episodes)
    count, skipped = import_run(tmp_path / "traces.jsonl", "verifiers", tmp_path / "run")
    assert (count, len(skipped)) == (3, 1)
    assert "line 4, trace 0: not what it should be" in skipped[0]
    run = Run(tmp_path / "run")
    first = run.load("k1_0", 0, "val")
    assert {"tokens", "log_probs", "weight_version"} <= set(first.row.missing)
    assert (first.row.turns, first.texts, first.turns[0].calls[0].text) == (2, ["I add", "easy\n\n42"], "42")
    second = run.load("g-1_0")
    assert (second.texts, second.sample.extra_info["branches"], "log_probs" in second.row.missing) == (["again"], 2, True)
    third = run.load("g-1_1").row
    assert (third.end_reason, third.error, third.turns) == (EndReason.DEADLINE, "RolloutError: late", 0)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    lines(tmp_path / "a" / "results.jsonl", {"index": 1})
    with pytest.raises(ConfigError, match=r"line 1: neither 'completion' nor 'traces' in it"):
        import_run(tmp_path / "a", "verifiers", tmp_path / "run")
    lines(tmp_path / "b" / "deep" / "results.jsonl", RESULT)
    with pytest.raises(ConfigError, match=rf"below it there is {tmp_path}/b/deep"):
        import_run(tmp_path / "b", "verifiers", tmp_path / "run")
    lines(tmp_path / "c" / "results.jsonl")
    with pytest.raises(ConfigError):
        import_run(tmp_path / "c", "verifiers", tmp_path / "run")
    assert not (tmp_path / "run").exists()
