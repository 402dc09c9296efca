"""Rows of verl's padded batch; nothing of verl is imported for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from agentloop.journal.train_side import COLUMNS, TrainerRow

ROW_KEY = "agentloop_row"
"""Column of the legacy batch: the row's key, empty for a filler."""
SAMPLED = "agentloop_sampled"
"""Column of the legacy batch: the row's `response_mask` before verl's rejection sampling, as run lengths (`0 5 3 4`: counts of
0 and of 1 by turns, beginning with 0)."""


def rows_of_dataproto(batch: Any, step: int) -> list[TrainerRow]:
    """`batch`: padded, each response from its first place on; without an `attention_mask` up to its last.

    With the columns of `COLUMNS` that it has, and `rollout_log_probs` and `sampled` where it has them. A batch that is not of
    our manager has no keys: then a row's uid is its `uid`, and its sibling the number of rows before it with the same one.
    """
    wanted = ("responses", *COLUMNS, "rollout_log_probs")
    columns = {name: array(batch.batch[name]) for name in wanted if name in batch.batch.keys()}  # noqa: SIM118
    count, width = columns["response_mask"].shape
    attended = batch.batch["attention_mask"][:, -width:].sum(dim=1).tolist() if "attention_mask" in batch.batch.keys() else None  # noqa: SIM118
    lengths = [width] * count if attended is None else attended
    others = batch.non_tensor_batch
    rows = []
    for place, key in enumerate(_keys(others, len(lengths))):
        if not key:
            continue
        own = {name: column[place, : lengths[place]] for name, column in columns.items()}
        if SAMPLED in others:
            own["sampled"] = mask_of_runs(others[SAMPLED][place])
        versions = None
        if "min_global_steps" in others and "max_global_steps" in others:
            ends = others["min_global_steps"][place], others["max_global_steps"][place]
            versions = None if None in ends else (int(ends[0]), int(ends[1]))
        rows.append(row_of_key(key, step, own, versions))
    return rows


def row_of_key(key: str, step: int, columns: dict[str, Any], versions: tuple[int, int] | None) -> TrainerRow:
    """`key`: of `agentloop.batch.row_key`. `columns`: with `responses`; without them tokens have no ids."""
    uid, sibling, _ = key.rsplit("_", 2)
    return TrainerRow(step, uid, int(sibling), columns.pop("responses", None), columns, versions)


def array(tensor: Any) -> Any:
    """numpy has no bfloat16."""
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def runs_of_mask(mask: Any) -> str:
    """As in `SAMPLED`."""
    values = np.asarray(mask, bool)
    ends = np.flatnonzero(np.diff(np.concatenate([[False], values]))).tolist()
    return " ".join(str(end - start) for start, end in zip([0, *ends], [*ends, len(values)], strict=True))


def mask_of_runs(runs: str) -> Any:
    """bool, the inverse."""
    counts = [int(count) for count in runs.split()]
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts)


def _keys(columns: Any, rows: int) -> list[str]:
    if ROW_KEY in columns:
        return [str(key) for key in columns[ROW_KEY]]
    seen: dict[str, int] = {}
    keys = []
    for place in range(rows):
        uid = str(columns["uid"][place]) if "uid" in columns else str(place)
        keys.append(f"{uid}_{seen.setdefault(uid, 0)}_0")
        seen[uid] += 1
    return keys
