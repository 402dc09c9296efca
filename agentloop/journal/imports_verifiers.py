"""Results of verifiers (PrimeIntellect): `results.jsonl` of its versions up to 0.3, `traces.jsonl` of version 1 of its format.

Sources: `state_to_output` in verifiers 0.3.1, `legacy/utils/save_utils.py`; `Episode`, `Trace` and `MessageNode` in verifiers
0.4.0, `v1/episode.py`, `v1/trace.py`, `v1/graph.py`. `results.jsonl` has messages; `traces.jsonl` has tokens too, if its client
was one that tells them. A trace with several branches is imported as its last one.

What an environment said without being called (a user's message after the first turn) is an answer of `environment`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, nearest
from agentloop.journal.imports import (
    Imported,
    ImportedTurn,
    Source,
    as_number,
    as_text,
    guarded,
    modified,
    plain_uid,
    read_lines,
)
from agentloop.trajectory import CallRecord, CallStatus, EndReason, Origin, Reward, Sample, StopReason, ToolCall

RESULTS, TRACES, METADATA = "results.jsonl", "traces.jsonl", "metadata.json"
ENVIRONMENT = "environment"
_REASONS = {
    "max_turns_reached": EndReason.TURN_LIMIT,
    "max_turns": EndReason.TURN_LIMIT,
    "prompt_too_long": EndReason.TOKEN_LIMIT,
    "max_total_completion_tokens_reached": EndReason.TOKEN_LIMIT,
    "max_input_tokens": EndReason.TOKEN_LIMIT,
    "max_output_tokens": EndReason.TOKEN_LIMIT,
    "max_total_tokens": EndReason.TOKEN_LIMIT,
    "timeout_reached": EndReason.DEADLINE,
    "no_tools_called": EndReason.FINAL_ANSWER,
    "has_final_env_response": EndReason.FINAL_ANSWER,
    "agent_completed": EndReason.FINAL_ANSWER,
    "provider_error": EndReason.ENGINE_FAILURE,
    "tool_error": EndReason.TOOL_FAILURE,
    "sandbox_error": EndReason.TOOL_FAILURE,
}
"""Stop conditions that say what an end reason of ours says; any other is «not recorded», and in the reward's info as it is."""
_NEVER = ("masked", "tool_status", "tool_s")
"""What no version records."""


def read_verifiers(path: Path, partition: str | None) -> Source:
    """A folder with either file, or the file itself. Raises `ConfigError` if there is none."""
    found = [path] if path.is_file() else [path / name for name in (TRACES, RESULTS) if (path / name).is_file()]
    if not found:
        below = sorted({item.parent for name in (TRACES, RESULTS) for item in path.rglob(name)})[:3]
        hint = f"; below it there is {', '.join(map(str, below))}" if below else ""
        raise ConfigError(f"{path}: neither {RESULTS} nor {TRACES} in it{hint}")
    file = found[0]
    skipped: list[str] = []
    first = next((line for _, line in read_lines(file, [])), {})
    if "traces" in first:
        return Source(_run_facts(file), _traces(file, partition, skipped), skipped)
    if "completion" not in first:
        raise ConfigError(f"{file}, line 1: neither 'completion' nor 'traces' in it; {nearest('completion', first)}")
    return Source(_metadata(file), _results(file, partition or "val", skipped), skipped)


# -- results.jsonl ----------------------------------------------------------------------------------------------------------


def _metadata(file: Path) -> dict[str, Any]:
    path = file.with_name(METADATA)
    if not path.is_file():
        return {}
    try:
        metadata = json.loads(path.read_bytes())
        return {"model": metadata.get("model"), "tools": _tools(metadata.get("tools")), "config": metadata}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: not readable as verifiers' metadata: {error}") from error


def _tools(tools: Any) -> list[Any]:
    """As OpenAI's API has them."""
    found = []
    for tool in tools or ():
        if isinstance(tool, dict):
            flat = {key: tool[key] for key in ("name", "description", "parameters") if key in tool}
            found.append(tool if "function" in tool else {"type": "function", "function": flat})
    return found


def _results(file: Path, partition: str, skipped: list[str]) -> Iterator[Imported]:
    siblings: Counter[str] = Counter()
    began = modified(file)
    for number, line in read_lines(file, skipped):
        where, t = f"{file}, line {number}", began + number * 1e-6
        yield from guarded(where, skipped, _result, line, partition, siblings, t)


def _result(line: Mapping[str, Any], partition: str, siblings: Counter[str], t: float) -> Imported:
    uid = plain_uid(line["example_id"])
    siblings[uid] += 1
    timing = line.get("timing") or {}
    began = as_number(timing.get("start_time")) or 0.0
    total, scored = as_number(timing.get("total")), (timing.get("scoring") or {})
    if total is None and "total_ms" in timing:  # of the older versions
        total = (as_number(timing["total_ms"]) or 0.0) / 1e3
    condition = line.get("stop_condition")
    reason = _REASONS.get(str(condition))
    error = line.get("error")
    if reason is None and error:
        reason = EndReason.ENGINE_FAILURE if "ModelError" in str(error) else None
    metrics = line.get("metrics") or {}
    reward = as_number(line.get("reward"))
    info = {
        "stop_condition": condition,
        "is_truncated": line.get("is_truncated"),
        "token_usage": line.get("token_usage"),
        **{key: value for key, value in metrics.items() if as_number(value) is None},
    }
    components = {key: number for key, value in metrics.items() if (number := as_number(value)) is not None}
    unknown = ["tokens", "log_probs", "weight_version", "generate_s", "stop_reason", *_NEVER]
    unknown += ["t"] if not began else []
    unknown += ["total_s"] if not total else []
    unknown += ["end_reason"] if reason is None else []
    t = began or t
    return Imported(
        sample=Sample(
            messages=_messages(line.get("prompt")),
            uid=uid,
            data_source=str(line.get("task") or "verifiers"),
            ground_truth=line.get("answer"),
            extra_info=_mapping(line.get("info")),
        ),
        turns=_turns(_messages(line.get("completion"), role="assistant"), t),
        missing=tuple(unknown),
        t=t,
        partition=partition,
        sibling=siblings[uid] - 1,
        reward=None if reward is None else Reward(reward, components, {k: v for k, v in info.items() if v is not None}),
        end_reason=reason,
        error=_error(error),
        complete=bool(line.get("is_completed", True)),
        score_s=as_number(scored.get("duration")) or 0.0,
        total_s=total or 0.0,
    )


def _messages(value: Any, role: str = "user") -> list[dict[str, Any]]:
    """Of a chat, or the text of an environment that completes."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = [dict(message) for message in value]
    for message in messages:
        if message.get("tool_calls"):
            message["tool_calls"] = [json.loads(call) if isinstance(call, str) else call for call in message["tool_calls"]]
    return messages


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {"info": value}
    return value if isinstance(value, dict) else {}


def _error(error: Any) -> str | None:
    """One sentence; older versions have an object or the exception's `repr`."""
    if not error:
        return None
    if isinstance(error, dict):
        kind, message = error.get("error") or error.get("type") or "error", error.get("message")
        return str(kind) if not message or str(message) in str(kind) else f"{kind}: {message}"
    return str(error)


def _turns(messages: Sequence[Mapping[str, Any]], t: float) -> list[ImportedTurn]:
    """What follows the prompt: each assistant's message is a turn, and what comes before the next one its answers."""
    turns: list[ImportedTurn] = []
    for message in messages:
        if message.get("role") == "assistant":
            calls = [_asked(call, len(turns), place) for place, call in enumerate(message.get("tool_calls") or ())]
            turns.append(ImportedTurn(_said(message), t, calls))
        elif turns:
            _answer(turns[-1], message, len(turns) - 1)
    return turns


def _said(message: Mapping[str, Any]) -> str:
    reasoning, content = message.get("reasoning_content"), as_text(message.get("content"))
    return f"{reasoning}\n\n{content}" if reasoning else content


def _asked(call: Mapping[str, Any], turn: int, place: int) -> CallRecord:
    """A call without its answer."""
    function: Mapping[str, Any] = call.get("function") or call
    arguments: Any = function.get("arguments")
    with suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    asked = ToolCall(str(function.get("name")), arguments, str(call.get("id") or f"t{turn:04d}c{place:03d}"))
    return CallRecord(asked, CallStatus.NOT_RUN, "", attempts=0)


def _answer(turn: ImportedTurn, message: Mapping[str, Any], index: int) -> None:
    text = as_text(message.get("content"))
    key = message.get("tool_call_id")
    for place, record in enumerate(turn.calls):
        if message.get("role") == "tool" and record.call.id == key and record.status is CallStatus.NOT_RUN:
            turn.calls[place] = CallRecord(record.call, CallStatus.OK, text)
            return
    name = message.get("name") or "tool" if message.get("role") == "tool" else ENVIRONMENT
    said = ToolCall(str(name), {}, str(key or f"t{index:04d}e{len(turn.calls):03d}"))
    turn.calls.append(CallRecord(said, CallStatus.OK, text))


# -- traces.jsonl -----------------------------------------------------------------------------------------------------------


def _run_facts(file: Path) -> dict[str, Any]:
    """The resolved config beside the traces, if it is there."""
    for path in sorted((file.parent / "configs" / "resolved").glob("*.json")):
        try:
            config = json.loads(path.read_bytes())
            return {"config": config, "model": config.get("model") if isinstance(config.get("model"), str) else None}
        except (ValueError, AttributeError):
            continue
    return {}


def _traces(file: Path, partition: str | None, skipped: list[str]) -> Iterator[Imported]:
    siblings: Counter[tuple[str, int, str]] = Counter()
    began = modified(file)
    for number, episode in read_lines(file, skipped):
        for place, trace in enumerate(episode.get("traces") or ()):
            where, t = f"{file}, line {number}, trace {place}", began + number * 1e-6
            yield from guarded(where, skipped, _trace, episode, trace, partition, siblings, t)


def _trace(
    episode: Mapping[str, Any],
    trace: Mapping[str, Any],
    partition: str | None,
    siblings: Counter[tuple[str, int, str]],
    t: float,
) -> Imported:
    work = (episode.get("run") or {}).get("work") or {}
    where = {"train": "train", "eval": "val"}.get(str(work.get("type")), partition or "val")
    step = int(work.get("step") or 0)
    task = trace.get("task") or episode.get("task") or {}
    data = task.get("data") or {}
    agent = (trace.get("agent") or {}).get("name", "agent")
    group = (episode.get("group") or {}).get("id") or task.get("key") or task.get("hash") or episode.get("id")
    uid = plain_uid(group if len(episode["traces"]) == 1 else f"{group}-{agent}")
    siblings[where, step, uid] += 1
    nodes, branches = _last_branch(trace.get("nodes") or [])
    first = next((place for place, node in enumerate(nodes) if node.get("sampled")), len(nodes))
    calls = {call["node"]: call for call in trace.get("calls") or () if call.get("node") is not None}
    policy = work.get("policy") or {}
    turns = _trace_turns(nodes, first, calls, policy)
    prompt = _tokens(nodes, first, turns)
    timing = trace.get("timing") or {}
    began, ended = (
        as_number(timing.get("start")) or 0.0,
        max(_span(timing.get(name))[1] for name in ("agent", "finalize", "scoring")),
    )
    reason = _trace_reason(trace)
    rewards = {name: reward for name, reward in (trace.get("rewards") or {}).items() if reward is not None}
    values = {name: float(reward["score"]) * float(reward.get("weight", 1.0)) for name, reward in rewards.items()}
    metrics = {name: value for name, value in (trace.get("metrics") or {}).items() if value is not None}
    info = {
        "stop_condition": trace.get("stop_condition"),
        "metrics": metrics,
        "info": trace.get("info") or None,
        "agent": agent,
    }
    errors = trace.get("errors") or []
    unknown = [*_NEVER, "t"] if not began else [*_NEVER]
    unknown += ["end_reason"] if reason is None else []
    unknown += ["total_s"] if ended <= began else []
    unknown += ["generate_s", "stop_reason"] if not calls else []
    unknown += ["tokens"] if not prompt else []
    unknown += ["log_probs"] if not prompt or any(turn.log_probs is None for turn in turns if turn.ids) else []
    unknown += ["weight_version"] if not policy else []
    scoring = _span(timing.get("scoring"))
    return Imported(
        sample=Sample(
            messages=_messages([node["message"] for node in nodes[:first]]),
            uid=uid,
            data_source=str((episode.get("env") or {}).get("id") or task.get("type") or "verifiers"),
            ground_truth=data.get("answer") if isinstance(data, dict) else None,
            extra_info={"task": data, "episode": episode.get("id"), "trace": trace.get("id"), "branches": branches},
        ),
        turns=turns,
        missing=tuple(unknown),
        t=began or t,
        partition=where,
        step=step,
        sibling=siblings[where, step, uid] - 1,
        prompt_ids=prompt,
        reward=Reward(sum(values.values()), values, {k: v for k, v in info.items() if v}) if values else None,
        end_reason=reason,
        error=_error(errors[-1]) if errors and not trace.get("ok") else None,
        complete=bool(trace.get("is_completed", True)),
        score_s=max(0.0, scoring[1] - scoring[0]),
        total_s=max(0.0, ended - began) if began else 0.0,
    )


def _last_branch(nodes: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The nodes from a root to the last leaf, each with its `place` in the trace; and how many leaves there are."""
    parents = {node.get("parent") for node in nodes}
    leaves = [place for place in range(len(nodes)) if place not in parents]
    path: list[dict[str, Any]] = []
    place = leaves[-1] if leaves else None
    while place is not None and len(path) < len(nodes):
        path.append({**nodes[place], "place": place})
        place = nodes[place].get("parent")
    return path[::-1], len(leaves)


def _trace_turns(
    nodes: Sequence[Mapping[str, Any]], first: int, calls: Mapping[int, Mapping[str, Any]], policy: Mapping[str, Any]
) -> list[ImportedTurn]:
    turns: list[ImportedTurn] = []
    for node in nodes[first:]:
        message = node["message"]
        if not node.get("sampled"):
            _answer(turns[-1], message, len(turns) - 1)
            continue
        call = calls.get(node["place"]) or {}
        began, ended = _span(call.get("time"))
        usage = call.get("usage") or {}
        asked = [_asked(asked, len(turns), place) for place, asked in enumerate(message.get("tool_calls") or ())]
        turns.append(
            ImportedTurn(
                text=_said(message),
                t=as_number(node.get("timestamp")) or 0.0,
                calls=asked,
                stop_reason=StopReason.LENGTH if call.get("finish_reason") == "length" else StopReason.STOP,
                generate_s=max(0.0, ended - began),
                weight_version=policy.get("end"),
                min_weight_version=policy.get("start"),
                cached_tokens=int(usage.get("cached_input_tokens") or 0),
            )
        )
    return turns


def _tokens(nodes: Sequence[Mapping[str, Any]], first: int, turns: list[ImportedTurn]) -> list[int]:
    """Put the nodes' tokens into the turns; those of the prompt. Empty, and no tokens in any turn, if the trace has not all
    of them or something was sampled in pieces."""
    if not turns or not all(node.get("token_ids") for node in nodes if node.get("sampled")):
        return []
    prompt: list[int] = []
    placed: list[tuple[list[int], list[float] | None, list[tuple[Origin, list[int]]]]] = []
    for at, node in enumerate(nodes):
        ids, mask = [int(i) for i in node.get("token_ids") or ()], list(node.get("mask") or ())
        mask += [False] * (len(ids) - len(mask))
        if at < first:
            prompt += ids
            continue
        if not node.get("sampled"):
            _append(placed[-1][2], Origin.OBSERVATION, ids)
            continue
        begin, end = (
            mask.index(True) if True in mask else len(ids),
            len(ids) - mask[::-1].index(True) if True in mask else len(ids),
        )
        if not all(mask[begin:end]):
            return []
        if placed:
            _append(placed[-1][2], Origin.TEMPLATE, ids[:begin])
        else:
            prompt += ids[:begin]
        values = node.get("logprobs")
        known = [float(x) for x in values] if values and len(values) == end - begin else None
        placed.append((ids[begin:end], known, []))
        _append(placed[-1][2], Origin.TEMPLATE, ids[end:])
    for turn, (ids, values, following) in zip(turns, placed, strict=True):
        turn.ids, turn.log_probs, turn.following = ids, values, following
    return prompt


def _append(following: list[tuple[Origin, list[int]]], origin: Origin, ids: list[int]) -> None:
    if ids:
        following.append((origin, ids))


def _trace_reason(trace: Mapping[str, Any]) -> EndReason | None:
    if trace.get("is_timeout"):
        return EndReason.DEADLINE
    condition = trace.get("stop_condition")
    if condition is None and trace.get("ok"):
        return EndReason.FINAL_ANSWER
    return _REASONS.get(str(condition))


def _span(span: Any) -> tuple[float, float]:
    span = span or {}
    return as_number(span.get("start")) or 0.0, as_number(span.get("end")) or 0.0
