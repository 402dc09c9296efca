"""`agentloop export | import`: runs for other programs, and theirs as runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentloop.commands.journal import PartitionOption, RunArgument, StepOption, rows_of
from agentloop.errors import ConfigError, nearest
from agentloop.journal.export import FORMATS
from agentloop.journal.export import export as export_run
from agentloop.journal.format import PARTITIONS
from agentloop.journal.imports import SOURCES, import_run

_BY_SUFFIX = {".jsonl": "verl", ".parquet": "parquet", ".html": "html"}


def export(
    run: RunArgument,
    file: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="what to write; replaced if it is there")] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="verl|atif|parquet|parquet-tokens|html",
            help="the format; by the end of OUT's name if it is not given. atif: OUT is a folder, or ends with .jsonl",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="OUT", help="the same as OUT")] = None,
    step: StepOption = None,
    partition: PartitionOption = None,
    incomplete: Annotated[bool, typer.Option("--incomplete", help="trajectories that have not ended too")] = False,
    steps: Annotated[str | None, typer.Option(metavar="1,4-6", help="html: only these steps")] = None,
    ids: Annotated[str | None, typer.Option(metavar="ID,ID", help="html: only these trajectories")] = None,
    max_mb: Annotated[float | None, typer.Option(min=0, help="html: the largest page; default 100")] = None,
) -> None:
    """Write the trajectories for other programs, or as a page to look at."""
    path = out or file
    if path is None or (out is not None and file is not None):
        raise ConfigError(f"agentloop export: say once where to write: agentloop export {run} --to {to or 'verl'} --out PATH")
    formats = [*FORMATS, "html"]
    if to is None:
        if path.suffix not in _BY_SUFFIX:
            raise ConfigError(f"agentloop export: '{path}' does not tell the format: give --to, one of {', '.join(formats)}")
        to = _BY_SUFFIX[path.suffix]
    if to not in formats:
        raise ConfigError(f"--to: no export format '{to}'; {nearest(to, formats)}")
    for name, value in (("--steps", steps), ("--ids", ids), ("--max-mb", max_mb)):
        if value is not None and to != "html":
            raise ConfigError(f"agentloop export: {name} goes with --to html; for {to} there are --step and --partition")
    opened, rows = rows_of(run, step, partition)
    damaged: list[str] = []
    if to == "html":
        from agentloop.commands.view import parse_ids, parse_steps
        from agentloop.replay.html import MAX_FILE_MB, Page
        from agentloop.replay.runs import chosen_rows

        wanted = parse_steps(steps) if steps is not None else step
        rows = chosen_rows(opened, partition=partition, steps=wanted, ids=parse_ids(ids))
        chosen = [row for row in rows if row.complete or incomplete]
        Page(opened, chosen, max_mb=MAX_FILE_MB if max_mb is None else max_mb).save(path)
        count = len(chosen)
    else:
        count, damaged = export_run(opened, path, to, partition=partition, step=step, incomplete=incomplete)
    typer.echo(f"{count} trajectories written to {path}")
    if not count and rows:
        typer.echo(f"{len(rows)} have not ended: --incomplete writes them too", err=True)
    _tell_left_out(damaged)


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="a folder of dumps or results, or one file of it")],
    source: Annotated[str, typer.Option("--from", metavar="verl|verifiers", help="what wrote it")],
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="the run to make; without it, PATH's name under ./runs")
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            metavar="train|val", help="where trajectories belong whose source does not tell: verl's to train, else val"
        ),
    ] = None,
) -> None:
    """Make a run of what verl dumped or verifiers wrote. What they did not record stays «not recorded»."""
    if source not in SOURCES:
        raise ConfigError(f"--from: no import source '{source}'; {nearest(source, SOURCES)}")
    if partition is not None and partition not in PARTITIONS:
        raise ConfigError(f"--partition: no partition '{partition}'; {nearest(partition, PARTITIONS)}")
    run = out or Path("runs") / (path.resolve().stem or "imported")
    count, skipped = import_run(path, source, run, partition=partition)
    typer.echo(f"{count} trajectories written to {run}: agentloop ls {run}")
    _tell_left_out(skipped)


def _tell_left_out(sentences: list[str]) -> None:
    for sentence in sentences[:20]:
        typer.echo(f"left out: {sentence}", err=True)
    if len(sentences) > 20:
        typer.echo(f"left out: {len(sentences) - 20} more", err=True)
    if sentences:
        raise typer.Exit(1)
