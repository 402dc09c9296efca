"""`agentloop train`: verl's own training command, from one YAML file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from agentloop.errors import ConfigError, nearest


def train(
    config: Annotated[Path, typer.Argument(help="YAML with `platform`, `agentloop:` and `verl:` (see docs/train.md)")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE…", help="agentloop.… and platform are ours; the rest goes to verl as it is"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the command and stop")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show all that verl prints, not the gist")] = False,
) -> None:
    """Train with verl. Everything is checked before Ray starts or a model is loaded."""
    from agentloop.verl.launch import make_plan
    from agentloop.verl.process import run

    given = list(overrides or [])
    for item in (str(config), *given):
        if item.startswith("-"):
            hint = nearest(item, ("--dry-run", "--verbose", "--help"))
            raise ConfigError(f"train: unknown option '{item}'; {hint} (settings of verl are given as key=value)")
    plan = make_plan(config, given)
    if dry_run:
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in plan.env.items())
        typer.echo(f"{variables} {shlex.join(plan.command)}")
        return
    status = run(plan.command, plan.env, plan.run_dir / "verl.log", total_steps=plan.total_steps, verbose=verbose)
    if status != 0:
        raise typer.Exit(status if status > 0 else 128 - status)
