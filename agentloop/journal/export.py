"""A run for other programs: verl's JSON lines, ATIF documents, Parquet tables. A few trajectories are in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, nearest
from agentloop.journal.format import JournalError, dump_line
from agentloop.journal.reader import Run
from agentloop.journal.recorded import RecordedTrajectory

Trajectories = Iterator[RecordedTrajectory]


def export(
    run: Run,
    out: Path,
    to: str,
    *,
    partition: str | None = None,
    step: int | None = None,
    incomplete: bool = False,
) -> tuple[int, list[str]]:
    """Write the trajectories to `out`, whole or not at all; how many, and a sentence for each damaged one (left out).

    `incomplete`: those that have not ended too. Raises `ConfigError` for an unknown format or an `out` that cannot be
    written.
    """
    if to not in FORMATS:
        raise ConfigError(f"no export format '{to}'; {nearest(to, FORMATS)}")
    damaged: list[str] = []

    def loaded() -> Trajectories:
        for row in run.trajectories(partition, step):
            if row.complete or incomplete:
                try:
                    yield run.load(row)
                except JournalError as error:
                    damaged.append(str(error))

    partial = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        count = FORMATS[to](run, partial, out, loaded())
        if partial.is_dir() and out.is_dir():
            _replace_folder(partial, out)
        else:
            partial.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
    return count, damaged


def _replace_folder(new: Path, old: Path) -> None:
    """Only a folder that an export wrote: nothing else in it is lost."""
    strangers = [path.name for path in old.iterdir() if path.suffix != ".json"]
    if strangers:
        raise ConfigError(
            f"{old}: is there already, and '{strangers[0]}' in it was not written by an export; choose another place"
        )
    shutil.rmtree(old)
    new.replace(old)


def verl_line(recorded: RecordedTrajectory) -> dict[str, Any]:
    """The keys of verl's rollout dump (`input`, `output`, `gts`, `score`, `step`; `RayPPOTrainer._dump_generations`) and
    what else is known. Unlike verl's, the texts keep their control tokens; they are `None` if no tokenizer was recorded."""
    row, columns = recorded.row, recorded.columns
    prompt = output = None
    if columns is not None and len(columns):
        prompt, output = columns.text(0, recorded.prompt_len), columns.text(recorded.prompt_len)
    elif "tokens" in row.missing:
        output = "".join(text or "" for text in recorded.texts) if recorded.turns else None
    line = {
        "input": prompt,
        "output": output,
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
    return line | {name: None for missing in row.missing for name in _SHOWN_AS.get(missing, ())}


_SHOWN_AS = {
    "end_reason": ("end_reason",),
    "masked": ("masked",),
    "turns": ("num_turns",),
    "tokens": ("prompt_tokens", "sampled_tokens", "tokens"),
    "tool_calls": ("tool_calls",),
    "tool_status": ("tool_failures",),
    "total_s": ("total_s",),
}
"""Keys that are `null` where an imported trajectory's source did not record it."""


def _verl(run: Run, path: Path, out: Path, trajectories: Trajectories) -> int:
    return _lines(path, map(verl_line, trajectories))


def _atif(run: Run, path: Path, out: Path, trajectories: Trajectories) -> int:
    """A document a line if `out` is called so, else a folder with a file for each trajectory."""
    from agentloop.journal.export_atif import atif_document

    meta = run.meta
    if out.suffix == ".jsonl":
        return _lines(path, (atif_document(recorded, meta, run.path.name) for recorded in trajectories))
    path.mkdir()
    count = 0
    for recorded in trajectories:
        row = recorded.row
        name = "".join(char if char.isalnum() or char in "-_." else "-" for char in row.id)
        file = path / f"{row.partition}-{row.step:06d}-{name}.json"
        if file.exists():  # ids that differ in such characters alone
            file = file.with_name(f"{file.stem}-{count}.json")
        file.write_bytes(dump_line(atif_document(recorded, meta, run.path.name)).lstrip(b" "))
        count += 1
    return count


def _lines(path: Path, documents: Iterator[dict[str, Any]]) -> int:
    count = 0
    with path.open("wb") as file:
        for document in documents:
            file.write(dump_line(document).lstrip(b" "))
            count += 1
    return count


def _parquet(run: Run, path: Path, out: Path, trajectories: Trajectories) -> int:
    from agentloop.journal.export_parquet import write_trajectories

    return write_trajectories(path, trajectories)


def _tokens(run: Run, path: Path, out: Path, trajectories: Trajectories) -> int:
    from agentloop.journal.export_parquet import write_tokens

    return write_tokens(path, trajectories)


FORMATS: dict[str, Callable[[Run, Path, Path, Trajectories], int]] = {
    "verl": _verl,
    "jsonl": _verl,
    "atif": _atif,
    "parquet": _parquet,
    "parquet-tokens": _tokens,
}
"""Each is given the run, the path to write, the path that it will have, and what to write; it tells how many it wrote.
`jsonl` is another name of `verl`."""
