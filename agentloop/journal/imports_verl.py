"""verl's rollout dumps: `trainer.rollout_data_dir` and `trainer.validation_data_dir`, a file `{step}.jsonl` for each step.

Source: `_write_generations` in verl 0.9.1, `trainer/ppo/ray_trainer.py` and `trainer/ppo/v1/trainer_base.py`. A line has
`input` and `output` (decoded without special tokens), `gts`, `score`, `step`, and a key for everything that the reward function
returned. The V1 trainer adds `uid`, its key `{uid}_{rollout}_{output}`; the older one `request_id` where there is one. That is
all: no tokens, no turns, no tool calls, no times.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
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
from agentloop.journal.recorded import MISSING
from agentloop.trajectory import Reward, Sample

KEYS = ("input", "output", "gts", "score", "step")
_KEY = re.compile(r"^(?P<uid>.+)_(?P<rollout>[0-9]+)_(?P<output>[0-9]+)$")
_OURS = ("id", "partition", "sibling", "messages", "complete", "num_turns", "reward_components", "reward_info")
"""Keys of our own export, which are not what a reward function returned."""


def read_verl(path: Path, partition: str | None) -> Source:
    """A folder of dumps, or one of its files. Raises `ConfigError` if there is none, or the first line is not of its kind."""
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"), key=_order)
    if not files:
        raise ConfigError(f"{path}: no '{{step}}.jsonl' in it, as trainer.rollout_data_dir has them")
    skipped: list[str] = []
    _check(files[0])
    return Source({}, _trajectories(files, partition or "train", skipped), skipped)


def _order(path: Path) -> tuple[int, str]:
    return (int(path.stem), "") if path.stem.isdigit() else (-1, path.stem)


def _check(path: Path) -> None:
    for number, line in read_lines(path, []):
        for key in ("input", "output", "score"):
            if key not in line:
                raise ConfigError(f"{path}, line {number}: no key '{key}', which verl's dumps have; {nearest(key, line)}")
        return


def _trajectories(files: list[Path], partition: str, skipped: list[str]) -> Iterator[Imported]:
    for path in files:
        groups: dict[str, str] = {}
        siblings: Counter[tuple[int, str]] = Counter()
        began = modified(path)
        for number, line in read_lines(path, skipped):
            t, where = began + number * 1e-6, f"{path}, line {number}"
            yield from guarded(where, skipped, _imported, line, path.stem, partition, groups, siblings, t)


def _group(line: dict[str, Any], groups: dict[str, str]) -> tuple[str, int | None]:
    """The group, and the place in it if the line tells. Without a uid the lines with one prompt are a group."""
    key = line.get("uid")
    match = _KEY.match(key) if isinstance(key, str) else None
    if match:
        output = "" if match["output"] == "0" else f"-{match['output']}"  # one rollout may have several outputs
        return plain_uid(match["uid"]) + output, int(match["rollout"])
    if key is not None:
        return plain_uid(key), line["sibling"] if isinstance(line.get("sibling"), int) else None
    return groups.setdefault(as_text(line["input"]), f"p{len(groups)}"), None


def _imported(
    line: dict[str, Any], name: str, partition: str, groups: dict[str, str], siblings: Counter[tuple[int, str]], t: float
) -> Imported:
    told = line.get("step", name)
    step = int(told) if str(told).isdigit() else 0
    uid, rollout = _group(line, groups)
    sibling = siblings[step, uid] if rollout is None else rollout
    siblings[step, uid] += 1
    more = {key: value for key, value in line.items() if key not in (*KEYS, *_OURS, "uid", "data_source")}
    components = {key: number for key, value in more.items() if (number := as_number(value)) is not None}
    score = as_number(line["score"])
    info = {key: value for key, value in more.items() if key not in components}
    sample = Sample(
        messages=[{"role": "prompt", "content": as_text(line["input"])}],
        uid=uid,
        data_source=str(line.get("data_source", "verl")),
        ground_truth=line.get("gts"),
        extra_info={"verl_key": line["uid"]} if "uid" in line else {},
    )
    return Imported(
        sample=sample,
        turns=[ImportedTurn(as_text(line["output"]), t)],
        missing=MISSING,
        t=t,
        partition=str(line["partition"]) if line.get("partition") in ("train", "val") else partition,
        step=step,
        sibling=sibling,
        reward=None if score is None else Reward(score, components, info),
    )
