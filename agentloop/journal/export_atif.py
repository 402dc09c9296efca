"""ATIF, Harbor's Agent Trajectory Interchange Format: a trajectory as a JSON document.

Source: RFC 0001 of harbor (`harbor.models.trajectories`, ATIF-v1.8), whose models refuse unknown keys: what they have no place
for is in `extra`. Prompt token ids are on the first agent step alone, and what follows a turn (tool answers and the
template's glue) in that step's `metrics.extra.following_token_ids`: all ids are there once, and the document does not grow with
the square of the turns.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agentloop import __version__
from agentloop.journal.recorded import RecordedTrajectory
from agentloop.trajectory import CallRecord, Turn

SCHEMA_VERSION = "ATIF-v1.8"
_SOURCES = {"system": "system", "developer": "system", "user": "user", "assistant": "agent"}


def atif_document(recorded: RecordedTrajectory, meta: Mapping[str, Any], session: str) -> dict[str, Any]:
    """`recorded` with its tokens, if it has any; `meta` is the run's `run.json`, `session` its name."""
    row, missing = recorded.row, set(recorded.row.missing)
    steps = _prompt_steps(recorded.sample.messages)
    steps += [_turn_step(recorded, place, missing) for place in range(len(recorded.turns))]
    steps = steps or [{"source": "system", "message": ""}]
    for number, step in enumerate(steps, 1):
        step["step_id"] = number
    model = meta.get("model")
    tools = [tool for tool in meta.get("tools") or () if isinstance(tool, dict)]
    reward = recorded.reward
    known = "tokens" not in missing
    document = {
        "schema_version": SCHEMA_VERSION,
        "session_id": session,
        "trajectory_id": f"{row.partition}/{row.step}/{row.id}",
        "agent": {
            "name": "agentloop",
            "version": str((meta.get("packages") or {}).get("agentloop", __version__)),
            "model_name": model if isinstance(model, str) else None,
            "tool_definitions": [_Data(tool) for tool in tools] or None,
        },
        "steps": steps,
        "final_metrics": {
            "total_prompt_tokens": sum(turn.start for turn in recorded.turns) if known else None,
            "total_completion_tokens": row.sampled_tokens if known else None,
            "total_steps": len(steps),
            "extra": {"reward": None if reward is None else reward.value, "total_s": _known(row.total_s, "total_s", missing)},
        },
        "extra": {
            "uid": row.uid,
            "sibling": row.sibling,
            "attempt": row.attempt,
            "step": row.step,
            "partition": row.partition,
            "data_source": row.data_source,
            "complete": row.complete,
            "end_reason": row.end_reason,
            "error": row.error,
            "masked": _known(row.masked, "masked", missing),
            "ground_truth": _Data(recorded.sample.ground_truth),
            "reward_components": _Data(row.components),
            "reward_info": _Data({} if reward is None else reward.info),
            "reward_by_turn": None if reward is None or not reward.turns else list(reward.turns),
            "not_recorded": sorted(missing) or None,
        },
    }
    found: dict[str, Any] = _clean(document)
    return found


def _prompt_steps(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The dataset row's conversation. What it has of an agent is context, which nobody trains."""
    steps: list[dict[str, Any]] = []
    for message in messages:
        role = str(message.get("role"))
        text, extra = _content(message.get("content"))
        if role == "tool" and steps and steps[-1]["source"] == "agent":
            asked = {call["tool_call_id"] for call in steps[-1].get("tool_calls") or ()}
            key = message.get("tool_call_id")
            result = {"source_call_id": key if key in asked else None, "content": text, "extra": extra}
            steps[-1].setdefault("observation", {"results": []})["results"].append(result)
            continue
        source = _SOURCES.get(role)
        step: dict[str, Any] = {"source": source or "system", "message": text, "extra": extra}
        if source is None:
            step["extra"] = {**(extra or {}), "role": role}
        if source == "agent":
            step["is_copied_context"] = True
            step["reasoning_content"] = message.get("reasoning_content")
            step["tool_calls"] = [
                _written_call(call, place) for place, call in enumerate(message.get("tool_calls") or ())
            ] or None
        steps.append(step)
    return steps


def _turn_step(recorded: RecordedTrajectory, place: int, missing: set[str]) -> dict[str, Any]:
    turn, text = recorded.turns[place], recorded.texts[place]
    version = turn.weight_version if turn.min_weight_version in (None, turn.weight_version) else None
    extra = {
        "turn": turn.index,
        "text_recorded": None if text is not None else False,
        "stop_reason": _known(turn.stop_reason.value, "stop_reason", missing),
        "weight_version": version,
        "weight_versions": [list(run) for run in turn.versions] if version is None and turn.versions else None,
        "generate_s": _known(turn.generate_s, "generate_s", missing),
        "tools_s": _known(turn.tools_s, "tool_s", missing) if turn.calls else None,
        "closed_by_template": turn.closed_by_template or None,
        "parse_errors": turn.parse_errors or None,
    }
    step: dict[str, Any] = {
        "source": "agent",
        "timestamp": None if "t" in missing else _timestamp(recorded.times[place]),
        "message": text or "",
        "llm_call_count": 1 if "turns" not in missing else None,
        "extra": extra,
    }
    if turn.calls:
        step["tool_calls"] = [_call(record) for record in turn.calls]
        step["observation"] = {"results": [_result(record, missing) for record in turn.calls]}
    if "tokens" not in missing:
        step["metrics"] = _metrics(recorded, turn, place)
    return step


def _metrics(recorded: RecordedTrajectory, turn: Turn, place: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "prompt_tokens": turn.start,
        "completion_tokens": turn.end - turn.start,
        "cached_tokens": turn.cached_tokens or None,
    }
    columns = recorded.columns
    if columns is None:
        return metrics
    following = recorded.turns[place + 1].start if place + 1 < len(recorded.turns) else len(columns)
    values = columns.log_probs[turn.start : turn.end]
    if place == 0:
        metrics["prompt_token_ids"] = columns.ids[: turn.start].tolist()
    metrics["completion_token_ids"] = columns.ids[turn.start : turn.end].tolist()
    metrics["logprobs"] = None if np.isnan(values).any() else values.astype(float).tolist()
    if following > turn.end:
        metrics["extra"] = {"following_token_ids": columns.ids[turn.end : following].tolist()}
    return metrics


def _call(record: CallRecord) -> dict[str, Any]:
    arguments: Any = record.call.arguments
    call = {"tool_call_id": record.call.id, "function_name": record.call.name}
    if isinstance(arguments, dict):
        return call | {"arguments": _Data(arguments)}
    return call | {"arguments": {}, "extra": {"arguments": _Data(arguments)}}


def _result(record: CallRecord, missing: set[str]) -> dict[str, Any]:
    extra = {
        "status": _known(record.status.value, "tool_status", missing),
        "run_s": _known(record.run_s, "tool_s", missing),
        "queue_s": _known(record.queue_s, "tool_s", missing),
        "attempts": record.attempts if "tool_status" not in missing else None,
        "reward": record.reward or None,
        "metrics": _Data(record.metrics) if record.metrics else None,
        "cut_tokens": record.cut_tokens or None,
    }
    return {"source_call_id": record.call.id, "content": record.text, "extra": extra}


def _written_call(call: Any, place: int) -> dict[str, Any]:
    """A call in a message of the prompt, as OpenAI's API has it."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments")
    key = (call.get("id") if isinstance(call, dict) else None) or f"call_{place}"
    found = {"tool_call_id": str(key), "function_name": str(function.get("name", ""))}
    if isinstance(arguments, dict):
        return found | {"arguments": _Data(arguments)}
    return found | {"arguments": {}, "extra": {"arguments": _Data(arguments)}}


def _content(content: Any) -> tuple[str, dict[str, Any] | None]:
    """The text of a message, and `extra` with the whole of it where it is more than text."""
    if isinstance(content, str) or content is None:
        return content or "", None
    parts = content if isinstance(content, list) else [content]
    texts = [str(part["text"]) for part in parts if isinstance(part, dict) and part.get("type") == "text" and "text" in part]
    return "\n".join(texts), None if len(texts) == len(parts) else {"content": _Data(content)}


def _timestamp(t: float) -> str:
    return datetime.datetime.fromtimestamp(t, datetime.UTC).isoformat()


def _known(value: Any, name: str, missing: set[str]) -> Any:
    return None if name in missing else value


class _Data:
    """What a user, a model or a tool wrote, whose nulls and empty parts are its own."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _clean(value: Any) -> Any:
    """Without keys of ours whose value is `None`, without an empty `extra`, and in what strict JSON has a form for."""
    if isinstance(value, _Data):
        return _strict(value.value)
    if isinstance(value, dict):
        cleaned = {key: _clean(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in cleaned.items() if not (key == "extra" and item == {})}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return _strict(value)


def _strict(value: Any) -> Any:
    """Lone surrogates become `?`, numbers that are not finite `null`."""
    if isinstance(value, dict):
        return {_strict(str(key)): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
