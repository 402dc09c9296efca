"""What `agentloop.train_side=true` costs the V1 trainer in a step: reading a batch from TransferQueue, and writing it.

`python -m benchmarks.train_side [--rows 256] [--tokens 8192]`

The rows are put into a real TransferQueue as the rollout workers and the trainer put them; the clock runs over exactly what
the wrapped method does after verl's own. The run of a real trainer tells the same as `agentloop/train_side_s`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from agentloop.batch import row_key, to_rows
from agentloop.journal.train_side import write_update
from benchmarks.batch_assembly import ledger
from benchmarks.report import report

REPEATS = 3


def put(rows: int, tokens: int) -> tuple[Any, int]:
    """A batch in TransferQueue with all that the trainer adds; its meta, and the response tokens in it."""
    import torch
    import transfer_queue as tq
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    trajectories = [ledger(row, tokens) for row in range(rows)]
    made = [to_rows(trajectory) for trajectory in trajectories]
    keep = ("responses", "response_mask", "rollout_log_probs")
    fields = [{name: row[name] for name in keep} for row, _ in made]
    for row in fields:
        row["old_log_probs"] = row["rollout_log_probs"] + 0.001 * torch.randn(len(row["responses"]))
        row["advantages"] = row["response_mask"] * 0.5
    meta = tq.kv_batch_put(
        keys=[row_key(trajectory) for trajectory in trajectories],
        partition_id="train",
        fields=list_of_dict_to_tensordict(fields),
        tags=[tag for _, tag in made],
    )
    return meta, sum(len(row["responses"]) for row in fields)


def measure(rows: int, tokens: int) -> dict[str, Any]:
    import ray
    import transfer_queue as tq
    from hydra import compose, initialize_config_module

    from agentloop.verl.train_side import rows_of_queue

    with initialize_config_module("verl.trainer.config", version_base=None):
        settings = compose("ppo_trainer", ["transfer_queue.backend.SimpleStorage.num_data_storage_units=1"]).transfer_queue
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        tq.init(settings)
        meta, total = put(rows, tokens)
        reading, writing, size = [], [], 0
        with TemporaryDirectory() as folder:
            for step in range(REPEATS):
                began = perf_counter()
                taken = rows_of_queue(meta)
                read = perf_counter()
                path = write_update(Path(folder), taken, step=step, update=0, generation=1)
                writing.append(perf_counter() - read)
                reading.append(read - began)
                size = path.stat().st_size
        tq.close()
    finally:
        ray.shutdown()
    return {
        "rows": rows,
        "response_tokens": total,
        "read_s": round(min(reading), 4),
        "write_s": round(min(writing), 4),
        "both_s": round(min(map(sum, zip(reading, writing, strict=True))), 4),
        "bytes_per_token": round(size / total, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What recording the train side costs a step.")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192, help="of each trajectory, its prompt of 1,024 included")
    args = parser.parse_args()
    report("train_side", measure(args.rows, args.tokens), [])
    return 0


if __name__ == "__main__":
    sys.exit(main())
