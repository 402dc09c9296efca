"""`agentloop view`: a run in the browser."""

from __future__ import annotations

import webbrowser
from typing import Annotated

import typer

from agentloop.errors import ConfigError
from agentloop.journal.recorded import Row
from agentloop.replay.forks import forker, recorded_loop
from agentloop.replay.notebook import link_to
from agentloop.replay.payload import Payload
from agentloop.replay.runs import as_run, chosen_rows
from agentloop.replay.server import ReplayServer


def view(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run, or its name under ./runs")],
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="a trajectory to show first")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="the step of ID")] = None,
    partition: Annotated[str | None, typer.Option(metavar="train|val", help="the partition of ID")] = None,
    turn: Annotated[int | None, typer.Option(min=0, help="a turn of ID to show first")] = None,
    token: Annotated[int | None, typer.Option(min=0, help="a token of ID to show first, by its position")] = None,
    steps: Annotated[str | None, typer.Option(metavar="1,4-6", help="only these steps")] = None,
    ids: Annotated[str | None, typer.Option(metavar="ID,ID", help="only these trajectories")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 0,
    browser: Annotated[bool, typer.Option(help="open a browser")] = True,
    fork: Annotated[
        str | None, typer.Option(metavar="local", help="let the page fork conversations, with this engine going on")
    ] = None,
) -> None:
    """Look at a run in the browser, while it goes on or afterwards. For this machine alone: what is served needs the token in
    the address. Ends with Ctrl-C."""
    opened = as_run(run)
    wanted_steps, wanted_ids = parse_steps(steps), parse_ids(ids)
    narrowed = wanted_steps is not None or wanted_ids is not None

    def rows() -> list[Row]:
        return chosen_rows(opened, steps=wanted_steps, ids=wanted_ids)

    if narrowed:
        rows()  # a wrong choice is said now
    forks = None if fork is None else forker(opened, recorded_loop(opened, fork))
    payload = Payload(opened, rows if narrowed else None, fork=forks)
    link = link_to(payload, id, step=step, partition=partition, turn=turn, token=token)
    server = ReplayServer(payload, port=port, title=f"{opened.path.resolve().name} – agentloop")
    typer.echo(f"{opened.path}: {server.url(link)}")
    typer.echo("Ctrl-C ends it.")
    if browser:
        webbrowser.open(server.url(link))
    try:
        server.serve()
    except KeyboardInterrupt:
        typer.echo()


def parse_steps(text: str | None) -> list[int] | None:
    """`1,4-6` as a list; `ConfigError` if it is not one."""
    if text is None:
        return None
    steps: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"--steps: '{part.strip()}' is neither a step nor a range; write them as 1,4-6")
        if dash and int(last) - int(first) > 1_000_000:
            raise ConfigError(f"--steps: '{part.strip()}' is too long a range")
        steps += range(int(first), int(last or first) + 1)
    return steps


def parse_ids(text: str | None) -> list[str] | None:
    return None if text is None else [key.strip() for key in text.split(",") if key.strip()]
