"""Parquet: one row a trajectory, or one a token. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.errors import ConfigError
from agentloop.journal.export import verl_line
from agentloop.journal.format import dump_json
from agentloop.journal.recorded import MIXED_VERSION, ORIGINS, RecordedTrajectory

GROUP_TOKENS = 1 << 20
"""Tokens after which a row group is written: what is in memory at a time."""
GROUP_ROWS = 1024
_TEXTS = ("input", "output", "partition", "id", "uid", "data_source", "end_reason", "error")
_NESTED = ("gts", "messages", "reward_components", "reward_info", "tool_failures")
"""Written as JSON."""
_INTEGERS = ("step", "sibling", "num_turns", "prompt_tokens", "sampled_tokens", "tokens", "tool_calls", "weight_version")


def write_trajectories(path: Path, trajectories: Iterable[RecordedTrajectory]) -> int:
    """The columns of verl's JSON lines, nested ones as JSON text, and the token columns as lists; how many rows."""
    pa = _pyarrow()
    schema = pa.schema(
        [(name, pa.string()) for name in (*_TEXTS, *_NESTED)]
        + [(name, pa.int64()) for name in _INTEGERS]
        + [(name, pa.float64()) for name in ("score", "total_s")]
        + [(name, pa.bool_()) for name in ("complete", "masked")]
        + [
            ("input_ids", pa.list_(pa.uint32())),
            ("response_mask", pa.list_(pa.uint8())),
            ("rollout_log_probs", pa.list_(pa.float32())),
        ]
    )

    def table(group: list[dict[str, Any]]) -> Any:
        return pa.Table.from_arrays([pa.array([row[f.name] for row in group], f.type) for f in schema], schema=schema)

    return _write(path, schema, trajectories, _trajectory_row, table)


def _trajectory_row(recorded: RecordedTrajectory) -> dict[str, Any]:
    line = verl_line(recorded)
    for name in _NESTED:
        line[name] = dump_json(line[name]).strip().decode()
    for name in _TEXTS:
        line[name] = _storable(line[name])
    columns, start = recorded.columns, recorded.prompt_len
    assert columns is not None
    if "tokens" in recorded.row.missing:
        return line | {"input_ids": None, "response_mask": None, "rollout_log_probs": None}
    sampled = columns.mask[start:] == 1
    values = np.where(sampled, columns.log_probs[start:], np.float32(0.0))
    log_probs = None if np.isnan(values).any() else values
    return line | {"input_ids": columns.ids, "response_mask": columns.mask[start:], "rollout_log_probs": log_probs}


def write_tokens(path: Path, trajectories: Iterable[RecordedTrajectory]) -> int:
    """One row a token, in order, with the key of its trajectory; how many trajectories. What was not recorded is null;
    `weight_version` is null and `mixed` true where the weights changed and nobody told at which token."""
    pa = _pyarrow()
    word = pa.dictionary(pa.int32(), pa.string())
    key = [("partition", word), ("step", pa.int64()), ("id", word), ("uid", word), ("sibling", pa.int32())]
    token = [
        ("position", pa.int32()),
        ("turn", pa.int16()),
        ("origin", word),
        ("token_id", pa.uint32()),
        ("piece", pa.binary()),
    ]
    numbers = [("mask", pa.uint8()), ("log_prob", pa.float32()), ("weight_version", pa.int64()), ("mixed", pa.bool_())]
    schema = pa.schema([*key, *token, *numbers])

    def table(group: list[RecordedTrajectory]) -> Any:
        return pa.concat_tables([_token_table(pa, schema, recorded) for recorded in group]).unify_dictionaries()

    return _write(path, schema, trajectories, lambda recorded: recorded, table)


def _token_table(pa: Any, schema: Any, recorded: RecordedTrajectory) -> Any:
    row, columns = recorded.row, recorded.columns
    assert columns is not None
    n = len(columns)

    def repeated(value: str) -> Any:
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([_storable(value)], pa.string()))

    origins = pa.array([origin.value for origin in ORIGINS], pa.string())
    pieces = columns.pieces
    arrays = {
        "partition": repeated(row.partition),
        "step": np.full(n, row.step, np.int64),
        "id": repeated(row.id),
        "uid": repeated(row.uid),
        "sibling": np.full(n, row.sibling, np.int32),
        "position": np.arange(n, dtype=np.int32),
        "turn": columns.turn,
        "origin": pa.DictionaryArray.from_arrays(pa.array(columns.origin.astype(np.int32)), origins),
        "token_id": columns.ids,
        "piece": pa.nulls(n, pa.binary()) if pieces is None else pa.array(pieces, pa.binary()),
        "mask": columns.mask,
        "log_prob": pa.array(columns.log_probs, pa.float32(), mask=np.isnan(columns.log_probs)),
        "weight_version": pa.array(columns.weight_version, pa.int64(), mask=columns.weight_version < 0),
        "mixed": columns.weight_version == MIXED_VERSION,
    }
    return pa.Table.from_arrays([pa.array(arrays[field.name]) for field in schema], schema=schema)


def _write(
    path: Path,
    schema: Any,
    trajectories: Iterable[RecordedTrajectory],
    prepared: Callable[[RecordedTrajectory], Any],
    table: Callable[[list[Any]], Any],
) -> int:
    import pyarrow.parquet as pq

    count, tokens = 0, 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        group: list[Any] = []
        for recorded in trajectories:
            group.append(prepared(recorded))
            count += 1
            tokens += recorded.row.tokens
            if tokens >= GROUP_TOKENS or len(group) >= GROUP_ROWS:
                writer.write_table(table(group))
                group, tokens = [], 0
        if group:
            writer.write_table(table(group))
    return count


def _storable(text: str | None) -> str | None:
    """Arrow takes no lone surrogates."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError("export to parquet needs pyarrow: pip install pyarrow") from error
    return pyarrow
