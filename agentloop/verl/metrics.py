"""How rollouts went, in verl's own loggers.

verl's V1 trainer takes metrics about rollouts from one place only, the second value of `ReplayBuffer.sample`
(`verl/trainer/ppo/v1/trainer_base.py`, `_step_once`). So each group's terminal status in TransferQueue carries a summary of
its trajectories, the left-out ones included, and a replay buffer with `GroupMetrics` adds the summaries of the groups that
it hands out to the step's metrics. The legacy trainer takes what the manager returns in `meta_info["timing"]`, and logs it
under `timing_s/`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from agentloop.trajectory import CallStatus, EndReason, Trajectory

SUMMARY = "agentloop"
"""Key of the summary in a group's tag."""

Summary = dict[str, Any]
"""`counts`: numbers that add up, by name; `each`: one number a trajectory, by name."""


def summarize(trajectories: Sequence[Trajectory]) -> Summary:
    """One group, in plain numbers and lists, small enough for a tag."""
    counts: Counter[str] = Counter(trajectories=len(trajectories), masked=0, resampled=0, parse_failures=0)
    each: dict[str, list[float]] = {"turns": [], "generate_s": [], "tools_s": [], "score_s": [], "trajectory_s": []}
    for trajectory in trajectories:
        counts["masked"] += trajectory.masked
        counts["resampled"] += trajectory.attempt
        counts["parse_failures"] += sum(len(turn.parse_errors) for turn in trajectory.turns)
        counts[f"end/{trajectory.end_reason.value if trajectory.end_reason else 'error'}"] += 1
        counts.update(f"tools/{record.status.value}" for record in trajectory.calls)
        each["turns"].append(float(len(trajectory.turns)))
        each["generate_s"].append(round(sum(turn.generate_s for turn in trajectory.turns), 4))
        each["tools_s"].append(round(sum(turn.tools_s for turn in trajectory.turns), 4))
        each["score_s"].append(round(trajectory.score_s, 4))
        each["trajectory_s"].append(round(trajectory.total_s, 4))
    return {"counts": dict(counts), "each": each}


def metrics(summaries: Iterable[Summary], *, failed_groups: int = 0) -> dict[str, float]:
    """The metrics of one step. Every end reason and every call status is there, so that a curve has no gaps.

    `agentloop/{trajectories,masked,resampled,parse_failures,failed_groups}`, `agentloop/end/<reason>` and
    `agentloop/tools/<status>` are counts. Over trajectories: `agentloop/turns/{mean,max}`, and in seconds of one trajectory
    `agentloop/{generate,tools,score,trajectory}_s/{mean,p95}`.

    Where verl makes one report of several updates (`parameter_sync_step`), it goes by the names: what contains «total» or «sum»
    is added up, «max» is the largest, and everything else, counts too, is averaged.
    """
    counts: Counter[str] = Counter({f"end/{reason.value}": 0 for reason in EndReason})
    counts.update({f"tools/{status.value}": 0 for status in CallStatus})
    counts.update(trajectories=0, masked=0, resampled=0, parse_failures=0, failed_groups=failed_groups)
    each: dict[str, list[float]] = {}
    for summary in summaries:
        counts.update(summary["counts"])
        for name, values in summary["each"].items():
            each.setdefault(name, []).extend(values)
    result = {f"agentloop/{name}": float(count) for name, count in counts.items()}
    for name, values in each.items():
        if values:
            last, value = ("max", max(values)) if name == "turns" else ("p95", float(np.percentile(values, 95)))
            result |= {f"agentloop/{name}/mean": float(np.mean(values)), f"agentloop/{name}/{last}": value}
    return result


class GroupMetrics:
    """Put before a replay buffer of verl: `class Buffer(GroupMetrics, ReplayBuffer)`.

    Reads the tags of the groups at the last moment, just before the buffer removes them. Validation's metrics are thrown
    away by verl (`_validate` keeps the batch alone), so nothing is added for that partition.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group_tags: list[Mapping[str, Any]] = []

    def _materialize_batch(self, partition_id: str, selected_prompt_uids: list[str], *args: Any, **kwargs: Any) -> Any:
        self._collect(partition_id, selected_prompt_uids)
        return super()._materialize_batch(partition_id, selected_prompt_uids, *args, **kwargs)  # type: ignore[misc]

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        self._collect(partition_id, uids)
        super()._clear_groups(partition_id, uids)  # type: ignore[misc]

    def _collect(self, partition_id: str, uids: Iterable[str]) -> None:
        if partition_id == "val" or not uids:
            return
        import transfer_queue as tq

        tags = (tq.kv_list(partition_id) or {}).get(partition_id, {})
        self._group_tags += [tags[uid] for uid in uids if uid in tags]

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, Any]]:
        batch, found = super().sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)  # type: ignore[misc]
        if partition_id == "val":
            return batch, found
        tags, self._group_tags = self._group_tags, []
        summaries = [tag[SUMMARY] for tag in tags if SUMMARY in tag]
        failed = sum(tag.get("status") == "failure" for tag in tags)
        return batch, {**found, **(metrics(summaries, failed_groups=failed) if tags else {})}
