"""`agentloop audit`: proves that what is trained is what was sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agentloop.audit import Report, audit_batch, audit_run, read_batch
from agentloop.commands.journal import PartitionOption, StepOption, open_run
from agentloop.errors import ConfigError, nearest
from agentloop.journal.format import PARTITIONS

SHOWN = 50
"""Findings that are printed unless `--all` is given."""


def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|BATCH", help="a run (folder, or name under ./runs), or a batch (.pkl of DataProto, .pt, .npz)"
        ),
    ],
    run: Annotated[str | None, typer.Option(metavar="RUN", help="of a batch: the run that its rows are held against")] = None,
    step: StepOption = None,
    partition: PartitionOption = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="of a run: render prompts and tools' answers anew with this tokenizer")
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(metavar="NAME", help="of a batch: grpo, 'grpo without std' or rloo; by default whichever fits")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
    everything: Annotated[bool, typer.Option("--all", help=f"print all findings, not the first {SHOWN}")] = False,
) -> None:
    """Prove that the record of a run, or a padded batch, holds what training relies on.

    Names each invariant that does not hold, with the trajectory, the turn and the first token. Exit status 1 if there are any.
    """
    path = Path(target)
    if path.is_file():
        if tokenizer is not None or partition is not None:
            raise ConfigError(
                f"agentloop audit: {'--tokenizer' if tokenizer else '--partition'} is for a run, and {target} is a file"
            )
        report = _batch(path, run, step, estimator)
    else:
        if run is not None or estimator is not None:
            raise ConfigError(f"agentloop audit: {'--run' if run else '--estimator'} is for a batch, and {target} is no file")
        report = _run(target, step, partition, tokenizer)
    typer.echo(json.dumps(report.as_json()) if as_json else report.render(None if everything else SHOWN))
    if report.findings:
        raise typer.Exit(1)


def _batch(path: Path, run: str | None, step: int | None, estimator: str | None) -> Report:
    from agentloop.audit.advantages import ESTIMATORS

    if estimator is not None and estimator not in ESTIMATORS:
        raise ConfigError(f"--estimator: no estimator '{estimator}'; {nearest(estimator, ESTIMATORS)}")
    opened = None if run is None else open_run(run)
    report = audit_batch(read_batch(path), opened, step=step, estimator=estimator)
    report.what = f"{path} against {report.what}" if run is not None else str(path)
    return report


def _run(name: str, step: int | None, partition: str | None, tokenizer: str | None) -> Report:
    if partition is not None and partition not in PARTITIONS:
        raise ConfigError(f"--partition: no partition '{partition}'; {nearest(partition, PARTITIONS)}")
    opened = open_run(name)
    steps = sorted({place.step for place in opened.steps() if partition in (None, place.partition)})
    if step is not None and step not in steps:
        there = f"it has steps {steps[0]} to {steps[-1]}" if steps else "nothing is recorded yet"
        raise ConfigError(f"{opened.path}: no trajectories of step {step}; {there}")
    renderer: Any = None
    if tokenizer is not None:
        from agentloop.chat import load_renderer

        renderer = load_renderer(_tokenizer(tokenizer))
    return audit_run(opened, step=step, partition=partition, renderer=renderer)


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tokenizer: {path}: {str(error).splitlines()[0]}") from error
