"""One dataset row as a `Sample`.

The columns are verl's own (`verl/utils/dataset/rl_dataset.py`, `RLHFDataset.__getitem__`): `prompt` (handed on as
`raw_prompt`), `data_source`, `reward_model.ground_truth`, `extra_info` with `tools_kwargs`, `tool_selection` and `index`,
and `agent_name`. Two keys of `extra_info` are ours: `system_prompt` and `chat_template_kwargs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from agentloop.errors import ConfigError, nearest
from agentloop.trajectory import Sample

ROLES = ("system", "developer", "user", "assistant", "tool")
MEDIA_COLUMNS = ("images", "videos", "audios")
MEDIA_PARTS = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio")


class RowError(Exception):
    """What is wrong with one row: the column, a sentence, and the kind of mistake, by which the linter counts."""

    def __init__(self, column: str, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.column = column
        self.message = message
        self.kind = kind or message


def sample_from_row(
    row: Mapping[str, Any],
    *,
    uid: str,
    seed_key: str | None = None,
    system_prompt: str | None = None,
    where: str = "",
) -> Sample:
    """The row as verl hands it to an agent loop, or as it stands in the file, as a `Sample`.

    Values may be numpy arrays or scalars, tensors or tensordict's wrappers: the sample holds plain Python (`Sample.fields`
    alone keeps the row as it came). `system_prompt` is the run's: used where neither `extra_info.system_prompt` nor a
    system message of the prompt gives one. `where` names the file and row in errors. Raises `ConfigError`.
    """
    where = where or f"row '{uid}'"
    if not uid or "_" in uid:
        raise ConfigError(f"{where}: uid '{uid}' must be non-empty and contain no underscore: verl builds keys from it")
    try:
        refuse_media(row)
        return Sample(
            messages=with_system_prompt(messages_of(row), system_prompt_of(row), system_prompt),
            uid=uid,
            seed_key=seed_key,
            data_source=data_source_of(row) or "default",
            ground_truth=ground_truth_of(row),
            tools=tool_selection_of(row),
            tools_kwargs=tools_kwargs_of(row),
            template_kwargs=template_kwargs_of(row),
            extra_info=mapping_of(row, "extra_info"),
            fields=dict(row),
        )
    except RowError as error:
        raise ConfigError(f"{where}, column '{error.column}': {error.message}") from error


def content_key(sample: Sample) -> str:
    """A digest of the messages and the ground truth (32 hex digits): the same row in every run, so it can be a seed key."""
    packed = orjson.dumps([sample.messages, sample.ground_truth], option=orjson.OPT_SORT_KEYS, default=repr)
    return hashlib.blake2b(packed, digest_size=16).hexdigest()


def plain(value: Any) -> Any:
    """`value` in plain Python: numpy arrays and scalars, tensors, tensordict's and OmegaConf's containers resolved,
    mappings to `dict`s with string keys, sequences to lists. What is none of these stays as it is."""
    if type(value) in (str, int, float, bool, bytes, type(None)):  # not isinstance: numpy's float64 is a float
        return value
    if type(value).__module__.startswith("tensordict"):
        # NonTensorData wraps one object in `.data`; a NonTensorStack is a list of them; LinkedList is a list.
        return plain(value.tolist() if hasattr(value, "tolist") else list(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return [plain(item) for item in value]
    return value


def absent(value: Any) -> bool:
    """Null, or the NaN that pandas writes where a value is missing."""
    return value is None or (isinstance(value, float) and value != value)


def mapping_of(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    """A struct column in plain Python; empty where it is missing."""
    value = plain(row.get(column))
    if absent(value):
        return {}
    if not isinstance(value, dict):
        hint = "; write the struct itself, not its JSON" if isinstance(value, str) else ""
        raise RowError(column, f"expected a struct, found a {type(value).__name__}{hint}", "not a struct")
    return value


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation, checked: known roles, text content, and an end that the model can answer."""
    column = "raw_prompt" if "raw_prompt" in row else "prompt"
    messages = plain(row.get(column))
    if isinstance(messages, str):
        raise RowError(column, "is a string, expected a list of messages {role, content}", "a string")
    if not isinstance(messages, list):
        found = "is missing" if absent(messages) else f"is a {type(messages).__name__}"
        raise RowError(column, f"{found}, expected a list of messages {{role, content}}", "no list")
    if not messages:
        raise RowError(column, "holds no message")
    checked = [_message(message, place, column) for place, message in enumerate(messages)]
    last = checked[-1]["role"]
    if last not in ("user", "tool"):
        raise RowError(column, f"the last message is from '{last}', expected one from 'user' or 'tool'", "last role")
    return checked


def _message(message: Any, place: int, column: str) -> dict[str, Any]:
    where = f"message {place}"
    if not isinstance(message, dict):
        raise RowError(column, f"{where} is a {type(message).__name__}, expected {{role, content}}", "no message")
    message = prune(message)
    for key in ("role", "content"):
        if key in message or (key == "content" and message.get("tool_calls")):
            continue
        others = [found for found in message if found not in ("role", "content")]
        found = f"; it has {', '.join(others)}" if others else ""
        raise RowError(column, f"{where} has no '{key}'{found}", f"no {key}")
    role = message["role"]
    if role not in ROLES:
        raise RowError(column, f"{where} has the unknown role {role!r}; {nearest(str(role), ROLES)}", "unknown role")
    content = _text(message.get("content", ""), where, column)
    if role == "user" and not content.strip():
        raise RowError(column, f"{where} from 'user' is empty", "empty message")
    return {**message, "content": content}


def _text(content: Any, where: str, column: str) -> str:
    """Text, from a string or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(column, f"the content of {where} is a {type(content).__name__}, expected text", "content")
    pieces: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in MEDIA_PARTS:
            raise RowError(column, f"{where} holds a part of type '{kind}'; images, video and audio are not supported", "media")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(column, f"the content of {where} holds a part that is not {{type: text, text: …}}", "content part")
        pieces.append(part["text"])
    return "".join(pieces)


def refuse_media(row: Mapping[str, Any]) -> None:
    for column in MEDIA_COLUMNS:
        value = plain(row.get(column))
        if not absent(value) and value != []:
            raise RowError(column, "is not empty; images, video and audio are not supported", "media")


def with_system_prompt(messages: list[dict[str, Any]], row: str | None, run: str | None) -> list[dict[str, Any]]:
    """The row's own system prompt replaces the conversation's (an empty one removes it); the run's only fills a gap."""
    has = messages[0]["role"] in ("system", "developer")
    text = row if row is not None else (None if has else run)
    if text is None:
        return messages
    rest = messages[1:] if has else messages
    return [{"role": messages[0]["role"] if has else "system", "content": text}, *rest] if text else rest


def system_prompt_of(row: Mapping[str, Any]) -> str | None:
    text = mapping_of(row, "extra_info").get("system_prompt")
    if absent(text):
        return None
    if not isinstance(text, str):
        raise RowError("extra_info.system_prompt", f"expected text, found a {type(text).__name__}", "not text")
    return text


def data_source_of(row: Mapping[str, Any]) -> str | None:
    source = plain(row.get("data_source"))
    if absent(source):
        return None
    if not isinstance(source, str):
        raise RowError("data_source", f"expected text, found a {type(source).__name__}", "not text")
    return source


def ground_truth_of(row: Mapping[str, Any]) -> Any:
    """`reward_model.ground_truth`; `None` where there is none."""
    truth = mapping_of(row, "reward_model").get("ground_truth")
    return None if absent(truth) else truth


def tool_selection_of(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the tools that the row may use: `None` is all of them, an empty list none."""
    names = mapping_of(row, "extra_info").get("tool_selection")
    if absent(names):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RowError("extra_info.tool_selection", f"expected a list of tool names, found {names!r:.80}", "no list")
    return tuple(names)


def tools_kwargs_of(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per tool `create_kwargs` and its like. Nulls are dropped at every depth: Parquet gives every row the keys of all
    rows and fills in nulls, so that a null cannot be told from a key that is not there."""
    column, value = "tools_kwargs", plain(row.get("tools_kwargs"))  # where verl's dataset puts a copy
    if absent(value) or not value:
        column, value = "extra_info.tools_kwargs", mapping_of(row, "extra_info").get("tools_kwargs")
    if absent(value):
        return {}
    if not isinstance(value, dict):
        raise RowError(column, f"expected a struct by tool name, found a {type(value).__name__}", "not a struct")
    pruned: dict[str, dict[str, Any]] = {}
    for name, kwargs in prune(value).items():
        if not isinstance(kwargs, dict) or not all(isinstance(inner, dict) for inner in kwargs.values()):
            raise RowError(column, f"'{name}' needs a struct such as {{create_kwargs: {{…}}}}, found {kwargs!r:.80}", "shape")
        pruned[name] = kwargs
    return pruned


def template_kwargs_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Chat-template arguments of this row (`enable_thinking`); nulls are dropped."""
    kwargs = mapping_of(row, "extra_info").get("chat_template_kwargs")
    if absent(kwargs):
        return {}
    if not isinstance(kwargs, dict):
        raise RowError("extra_info.chat_template_kwargs", f"expected a struct, found a {type(kwargs).__name__}", "not a struct")
    return {key: value for key, value in kwargs.items() if not absent(value)}


def prune(value: Any) -> Any:
    """`value` without the nulls in its mappings."""
    if isinstance(value, dict):
        return {key: prune(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [prune(item) for item in value]
    return value
