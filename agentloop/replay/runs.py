"""What every view of a run begins with: the run itself, and which of its trajectories are meant."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from agentloop.errors import ConfigError, nearest
from agentloop.journal.format import PARTITIONS
from agentloop.journal.reader import Run, run_names
from agentloop.journal.recorded import Row

RUNS = Path("runs")
"""Where a run that is given by its name alone is looked for."""

RunLike = str | Path | Run
"""A run, its folder, or its name under `./runs`."""


def as_run(run: RunLike) -> Run:
    """The run itself; `ConfigError` with the nearest name if there is none."""
    if isinstance(run, Run):
        return run
    path = Path(run)
    if not path.exists() and len(path.parts) == 1:
        names = run_names(RUNS)
        if path.name not in names:
            raise ConfigError(f"no run '{run}' here or under ./{RUNS}" + (f"; {nearest(path.name, names)}" if names else ""))
        path = RUNS / path
    return Run(path)


def chosen_rows(
    run: Run,
    *,
    partition: str | None = None,
    steps: Iterable[int] | int | None = None,
    ids: Iterable[str] | str | None = None,
) -> list[Row]:
    """The trajectories of these steps and with these ids (`None`: all), in the order of steps and starts.

    Raises `ConfigError` for a partition, a step or an id that the run does not have.
    """
    if partition is not None and partition not in PARTITIONS:
        raise ConfigError(f"no partition '{partition}'; {nearest(partition, PARTITIONS)}")
    wanted_steps = None if steps is None else {steps} if isinstance(steps, int) else set(steps)
    wanted_ids = None if ids is None else {ids} if isinstance(ids, str) else set(ids)
    rows = [
        row
        for place in run.steps()
        if partition in (None, place.partition) and (wanted_steps is None or place.step in wanted_steps)
        for row in run.trajectories(*place)
    ]
    there = {row.step for row in rows}
    for step in sorted((wanted_steps or set()) - there):
        known = sorted({place.step for place in run.steps() if partition in (None, place.partition)})
        has = f"it has steps {known[0]} to {known[-1]}" if known else "nothing is recorded yet"
        raise ConfigError(f"{run.path}: no trajectories of step {step}; {has}")
    if wanted_ids is None:
        return rows
    known_ids = {row.id for row in rows}
    for key in sorted(wanted_ids - known_ids):
        raise ConfigError(f"{run.path}: no trajectory '{key}'; {nearest(key, sorted(known_ids)[:1000])}")
    return [row for row in rows if row.id in wanted_ids]
