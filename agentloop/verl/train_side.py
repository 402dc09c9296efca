"""What verl's trainer computes for each trajectory: written down beside the journal (`agentloop.train_side=true`), and compared
with what the rollout said of it (`agentloop.verl.consistency`).

verl has no plug point that sees log-probabilities, advantages and row keys together, so one method of its trainer is wrapped,
in the trainer's process, when the manager is made there:

- V1: `_compute_advantage(batch, metrics)` of the trainer that `trainer.v1.trainer_mode` names. When it returns, everything is
  in TransferQueue, and is read from there by the rows' keys.
- Legacy: `RayPPOTrainer._update_actor(batch)`, whose batch has everything, the rows' keys included. In
  steps of `trainer.critic_warmup` it is not called, so nothing is written.

Both are part of the step: what a step trained on is on disk, and has been judged, before its weights change (in legacy those of
a critic have changed by then). A failure is logged and counted, and training goes on.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentloop.batch import row_key
from agentloop.consistency.batches import ROW_KEY, SAMPLED, array, row_of_key, rows_of_dataproto, runs_of_mask
from agentloop.errors import ConfigError
from agentloop.journal.train_side import COLUMNS, TrainerRow, write_update
from agentloop.trajectory import Trajectory

if TYPE_CHECKING:
    from agentloop.verl.consistency import StepJudge

logger = logging.getLogger(__name__)

SECONDS = "agentloop/train_side_s"
"""What it cost, among verl's metrics of the step."""


class TrainSideWriter:
    """Writes the files of one start of a run."""

    def __init__(self, run_dir: str | Path, generation: int) -> None:
        self.run_dir = Path(run_dir)
        self.generation = generation
        self.errors = 0
        """Updates that could not be written."""

    def write(self, make_rows: Callable[[], Iterable[TrainerRow]], *, step: int, update: int, recomputed: bool) -> None:
        """Never raises."""
        try:
            rows = list(make_rows())
            write_update(self.run_dir, rows, step=step, update=update, generation=self.generation, recomputed=recomputed)
        except Exception:
            self.lost(step)

    def lost(self, step: int) -> None:
        """To be called where an exception is handled."""
        self.errors += 1
        logger.exception("the train side of step %d could not be written; training goes on without it", step)


def check_trainer(config: Any) -> None:
    """`ConfigError` if verl's trainer is not the one that `install` knows."""
    trainer, name, expected = _place(config)
    method = getattr(trainer, name, None)
    found = list(inspect.signature(method).parameters) if callable(method) else None
    if found != expected:
        from importlib.metadata import version

        raise ConfigError(
            f"agentloop: keys 'train_side' and 'consistency' need {trainer.__name__}.{name}({', '.join(expected[1:])}) of verl "
            f"0.9.1, which verl {version('verl')} does not have; set agentloop.train_side=false and no thresholds"
        )


def install(config: Any, writer: TrainSideWriter | None, judge: StepJudge | None = None) -> Callable[[], None]:
    """Have the trainer that `config` names write its side of every update, and have it judged, from now on in this process.

    Returns what takes it back. Installing anew replaces what was installed before.
    """
    check_trainer(config)
    trainer, name, _ = _place(config)
    correction = config.algorithm.get("rollout_correction") or {}
    recomputed = not correction.get("bypass_mode", False)
    original = inspect.unwrap(getattr(trainer, name), stop=lambda method: not hasattr(method, "agentloop_train_side"))

    def take(make_rows: Callable[[], list[TrainerRow]], step: int, update: int) -> dict[str, float]:
        """verl's metrics. What is judged has been written before."""
        began = time.perf_counter()
        told: dict[str, float] = {}
        try:
            rows = make_rows()
        except Exception as error:
            if writer is not None:
                writer.lost(step)
            return {} if judge is None else judge.failed(step, error)
        if writer is not None:
            writer.write(lambda: rows, step=step, update=update, recomputed=recomputed)
            told[SECONDS] = time.perf_counter() - began
        return told if judge is None else told | judge(rows, step=step, update=update, recomputed=recomputed)

    @functools.wraps(original)
    def compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        result = original(self, batch, metrics)
        metrics.update(take(lambda: rows_of_queue(batch), int(self.global_steps), int(getattr(self, "local_trigger_step", 0))))
        return result

    @functools.wraps(original)
    def update_actor(self: Any, batch: Any) -> Any:
        step = int(self.global_steps)
        told = take(lambda: rows_of_dataproto(batch, step), step, 0)
        result = original(self, batch)
        if told and "metrics" in getattr(result, "meta_info", {}):
            result.meta_info["metrics"].update(told)
        return result

    wrapper: Any = compute_advantage if name == "_compute_advantage" else update_actor
    wrapper.agentloop_train_side = True
    setattr(trainer, name, wrapper)
    return lambda: setattr(trainer, name, original)


def add_row_keys(output: Any, trajectories: Sequence[Trajectory]) -> None:
    """Put the columns `ROW_KEY` and `SAMPLED` into a legacy batch that has a row for each of `trajectories`, in order."""
    keys = ["" if trajectory.masked else row_key(trajectory) for trajectory in trajectories]
    sampled = ["" if trajectory.masked else runs_of_mask(trajectory.response_mask) for trajectory in trajectories]
    for name, values in ((ROW_KEY, keys), (SAMPLED, sampled)):
        column: Any = np.empty(len(trajectories), dtype=object)
        column[:] = values
        output.non_tensor_batch[name] = column


def _place(config: Any) -> tuple[Any, str, list[str]]:
    """The trainer's class, the method to wrap, and its parameters."""
    if bool(config.trainer.get("use_v1", True)):
        from verl.trainer.ppo.v1 import get_trainer_cls

        return get_trainer_cls(config.trainer.v1.trainer_mode), "_compute_advantage", ["self", "batch", "metrics"]
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    return RayPPOTrainer, "_update_actor", ["self", "batch"]


_FIELDS = {"responses": "responses", **{name: name for name in COLUMNS}, "rollout_log_probs": "rollout_log_probs",
           "loss_mask": "sampled"}  # fmt: skip
"""Fields of the V1 contract, and their names here. Rejection sampling changes `response_mask` and not `loss_mask`."""


def rows_of_queue(batch: Any) -> list[TrainerRow]:
    """`batch`: TransferQueue's `KVBatchMeta`, whose tags tell verl's padding, the rollout's step and its weight versions."""
    import transfer_queue as tq

    real = [(key, tag) for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
    # What a row does not have is left out, as verl itself relies on.
    data = tq.kv_batch_get(keys=[key for key, _ in real], partition_id=batch.partition_id, select_fields=list(_FIELDS))
    return rows_of_fields(real, data)


def rows_of_fields(real: Sequence[tuple[str, Mapping[str, Any]]], data: Any) -> list[TrainerRow]:
    """`real`: keys and tags; `data`: a `TensorDict` with a row for each, of nested tensors."""
    columns = {own: data[name].unbind() for name, own in _FIELDS.items() if name in data.keys()}  # noqa: SIM118
    rows = []
    for place, (key, tag) in enumerate(real):
        own = {name: array(column[place]) for name, column in columns.items()}
        versions = (int(tag["min_global_steps"]), int(tag["max_global_steps"])) if "min_global_steps" in tag else None
        rows.append(row_of_key(key, int(tag["global_steps"]), own, versions))
    return rows
