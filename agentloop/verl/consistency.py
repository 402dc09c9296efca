"""Trainer against rollout, judged in every step of verl before its weights change.

Where the train side's values pass (`agentloop.verl.train_side`), each update's batch is compared. The figures go to verl's
metrics and to `RUN/consistency/`, and a batch beyond a threshold of `agentloop.consistency` is warned of or ends the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentloop.consistency import Consistency, ConsistencyError, Thresholds, consistency, judge
from agentloop.consistency.record import write_event
from agentloop.journal.train_side import TrainerRow

logger = logging.getLogger(__name__)

PREFIX = "agentloop/consistency"
_TOLD = ("tokens", "not_recorded", "infinite", "max_abs", "mean", "mean_abs", "k1", "k3", "correlation", "ratio_outside", "ess")
_RATIOS = ("p0.1", "p99.9")


class StepJudge:
    """Compares, tells and judges the updates of one start of a run."""

    def __init__(self, thresholds: Thresholds, run_dir: str | Path | None = None, generation: int = 1) -> None:
        """`run_dir`: of the journal; `None` writes nothing."""
        self.thresholds = thresholds
        self.errors = 0
        """Updates that could not be compared, or whose report could not be written."""
        self._run_dir = None if run_dir is None else Path(run_dir)
        self._generation = generation

    def __call__(self, rows: Sequence[TrainerRow], *, step: int, update: int, recomputed: bool) -> dict[str, float]:
        """verl's metrics. Raises `ConsistencyError` if the run is to stop."""
        began = time.perf_counter()
        try:
            report = consistency(rows, step=step, update=update, recomputed=recomputed, clip=self.thresholds.clip)
            beyond = judge(report, self.thresholds)
        except Exception as error:
            return self.failed(step, error)
        action = self.thresholds.action if beyond else None
        self._write(report, beyond, step, update, action)
        sentence = " | ".join(found.sentence for found in beyond)
        if action == "stop":
            raise ConsistencyError(sentence)
        if beyond:
            logger.warning("%s", sentence)
        return metrics(report) | {f"{PREFIX}/beyond": float(len(beyond)), f"{PREFIX}/s": time.perf_counter() - began}

    def failed(self, step: int, error: Exception) -> dict[str, float]:
        """What was not compared is not passed where the run is to stop: raises `ConsistencyError` then."""
        self.errors += 1
        if self.thresholds.limits and self.thresholds.action == "stop":
            raise ConsistencyError(f"step {step}: trainer and rollout could not be compared: {error!r}") from error
        logger.error("step %d: trainer and rollout could not be compared; training goes on", step, exc_info=error)
        return {}

    def _write(self, report: Consistency, beyond: Sequence[Any], step: int, update: int, action: str | None) -> None:
        if self._run_dir is None:
            return
        try:
            write_event(self._run_dir, report, beyond, step=step, update=update, generation=self._generation, action=action)
        except OSError:
            self.errors += 1
            logger.exception("the consistency report of step %d could not be written; training goes on without it", step)


def metrics(report: Consistency) -> dict[str, float]:
    """`agentloop/consistency/…`, without what does not exist; `not_recomputed` counts trajectories."""
    figures = report.all
    told = {name: getattr(figures, name) for name in _TOLD}
    told |= {f"ratio_{name}": (figures.ratio or {}).get(name) for name in _RATIOS}
    told["not_recomputed"] = report.not_recomputed
    return {f"{PREFIX}/{name}": float(value) for name, value in told.items() if value is not None}
