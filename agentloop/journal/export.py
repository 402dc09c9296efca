"""A run for other programs: one line or row a trajectory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, nearest
from agentloop.journal.format import JournalError, dump_json, dump_line
from agentloop.journal.reader import Run
from agentloop.journal.recorded import RecordedTrajectory

_BATCH = 256
"""Rows of a Parquet row group."""


def export(
    run: Run,
    file: Path,
    to: str,
    *,
    partition: str | None = None,
    step: int | None = None,
    incomplete: bool = False,
) -> tuple[int, list[str]]:
    """Write the trajectories to `file`, whole or not at all; how many, and a sentence for each damaged one (left out).

    `incomplete`: those that have not ended too. Raises `ConfigError` for an unknown format or a file that cannot be
    written.
    """
    if to not in FORMATS:
        raise ConfigError(f"no export format '{to}'; {nearest(to, FORMATS)}")
    damaged: list[str] = []

    def loaded() -> Iterator[RecordedTrajectory]:
        for row in run.trajectories(partition, step):
            if row.complete or incomplete:
                try:
                    yield run.load(row)
                except JournalError as error:
                    damaged.append(str(error))

    partial = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        count = FORMATS[to](partial, loaded())
        partial.replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count, damaged


def verl_line(recorded: RecordedTrajectory) -> dict[str, Any]:
    """The keys of verl's rollout dump (`input`, `output`, `gts`, `score`, `step`; `RayPPOTrainer._dump_generations`) and
    what else is known. Unlike verl's, the texts keep their control tokens; they are `None` if no tokenizer was recorded."""
    row, columns = recorded.row, recorded.columns
    return {
        "input": columns.text(0, recorded.prompt_len) if columns is not None else None,
        "output": columns.text(recorded.prompt_len) if columns is not None else None,
        "gts": recorded.sample.ground_truth,
        "score": row.reward,
        "step": row.step,
        "partition": row.partition,
        "id": row.id,
        "uid": row.uid,
        "sibling": row.sibling,
        "data_source": row.data_source,
        "messages": recorded.messages,
        "complete": row.complete,
        "end_reason": row.end_reason,
        "masked": row.masked,
        "error": row.error,
        "reward_components": dict(row.components),
        "reward_info": recorded.reward.info if recorded.reward is not None else {},
        "num_turns": row.turns,
        "prompt_tokens": row.prompt_tokens,
        "sampled_tokens": row.sampled_tokens,
        "tokens": row.tokens,
        "tool_calls": row.tool_calls,
        "tool_failures": dict(row.tool_failures),
        "weight_version": recorded.turns[-1].weight_version if recorded.turns else None,
        "total_s": row.total_s,
    }


def _jsonl(path: Path, trajectories: Iterator[RecordedTrajectory]) -> int:
    count = 0
    with path.open("wb") as file:
        for recorded in trajectories:
            file.write(dump_line(verl_line(recorded)).lstrip(b" "))
            count += 1
    return count


def _parquet(path: Path, trajectories: Iterator[RecordedTrajectory]) -> int:
    """The columns of the JSONL, nested ones as JSON text, and the token columns as lists."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("export to parquet needs pyarrow: pip install pyarrow") from error
    texts = ("input", "output", "partition", "id", "uid", "data_source", "end_reason", "error")
    nested = ("gts", "messages", "reward_components", "reward_info", "tool_failures")
    integers = ("step", "sibling", "num_turns", "prompt_tokens", "sampled_tokens", "tokens", "tool_calls", "weight_version")
    schema = pa.schema(
        [(name, pa.string()) for name in (*texts, *nested)]
        + [(name, pa.int64()) for name in integers]
        + [(name, pa.float64()) for name in ("score", "total_s")]
        + [(name, pa.bool_()) for name in ("complete", "masked")]
        + [
            ("input_ids", pa.list_(pa.uint32())),
            ("response_mask", pa.list_(pa.uint8())),
            ("rollout_log_probs", pa.list_(pa.float32())),
        ]
    )

    def row(recorded: RecordedTrajectory) -> dict[str, Any]:
        line = verl_line(recorded)
        for name in nested:
            line[name] = dump_json(line[name]).strip().decode()
        for name in texts:
            if line[name] is not None:  # Arrow takes no lone surrogates
                line[name] = line[name].encode("utf-8", "replace").decode()
        tokens = {
            "input_ids": recorded.input_ids,
            "response_mask": recorded.response_mask,
            "rollout_log_probs": recorded.rollout_log_probs,
        }
        return line | tokens

    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        batch: list[dict[str, Any]] = []
        for recorded in trajectories:
            batch.append(row(recorded))
            count += 1
            if len(batch) == _BATCH:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch.clear()
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))
    return count


FORMATS: dict[str, Callable[[Path, Iterator[RecordedTrajectory]], int]] = {"jsonl": _jsonl, "parquet": _parquet}
