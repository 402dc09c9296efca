"""`agentloop replay`: a recorded run once more through the loop, without a model or a tool."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from agentloop.commands.journal import PartitionOption, RunArgument, StepOption, new_console, open_run
from agentloop.errors import ConfigError, nearest
from agentloop.journal.format import PARTITIONS

if TYPE_CHECKING:
    from agentloop.cassette import Replay
    from agentloop.journal.reader import Run

_LIVE = ("tools", "reward")

ModelOption = Annotated[str | None, typer.Option(help="a folder or hub name with the tokenizer; default: the run's")]
ToolsFileOption = Annotated[
    str | None, typer.Option("--tools-file", help="a tools file; 'recorded': the schemas in run.json; default: the run's file")
]
ParserOption = Annotated[str | None, typer.Option(help="the tool-call format; default: the run's")]
LoopOption = Annotated[
    list[str] | None, typer.Option("--loop", metavar="KEY=VALUE", help="a field of the loop's configuration; may be repeated")
]


def replay(
    run: RunArgument,
    step: StepOption = None,
    partition: PartitionOption = None,
    engine: Annotated[str, typer.Option(metavar="cassette", help="what answers: the run's own record")] = "cassette",
    live: Annotated[
        list[str] | None, typer.Option(metavar="tools|reward", help="call these anew instead of playing them back")
    ] = None,
    model: ModelOption = None,
    tools_file: ToolsFileOption = None,
    parser: ParserOption = None,
    loop: LoopOption = None,
    concurrency: Annotated[int, typer.Option(min=1, help="trajectories at a time")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Play a run back and say where it is not the same any more: the trajectory, the turn, the first token that differs.

    Exit status 0: everything is what was recorded; 1: something differs.
    """
    from agentloop.cassette import Cassette, Replay, loop_of
    from agentloop.cassette import replay as replay_run
    from agentloop.cassette.setup import reward_of
    from agentloop.rewards.spec import close_all

    if engine != "cassette":
        raise ConfigError(f"replay: the engine is the cassette, not '{engine}'; agentloop fork goes on with another engine")
    for name in live or ():
        if name not in _LIVE:
            raise ConfigError(f"replay: --live cannot be '{name}'; {nearest(name, _LIVE)}")
    if partition is not None and partition not in PARTITIONS:
        raise ConfigError(f"--partition: no partition '{partition}'; {nearest(partition, PARTITIONS)}")
    opened = open_run(run)
    again = set(live or ())
    function = reward_of(opened) if "reward" in again else None
    if "reward" in again and function is None:
        raise ConfigError(f"{opened.path}/run.json: key 'setup.reward' names no reward to call")
    parts = loop_of(opened, model=model, tools=tools_file, parser=parser, reward=function, loop=given(loop))
    cassette = Cassette(opened)
    known = dict.fromkeys((row.partition, row.step) for row in cassette.rows.values())
    places = [place for place in known if partition in (None, place[0]) and step in (None, place[1])]
    if not places:
        there = ", ".join(f"{part} {number}" for part, number in list(known)[:8]) or "nothing is recorded yet"
        raise ConfigError(f"{opened.path}: no trajectories there; it has {there}")
    total = Replay()

    async def play() -> None:
        """Step by step: a whole run's trajectories need not be held at a time."""
        try:
            for place in places:
                made = await replay_run(
                    cassette,
                    parts,
                    partition=place[0],
                    step=place[1],
                    tools="live" if "tools" in again else "recorded",
                    reward="live" if "reward" in again else "recorded",
                    max_concurrency=concurrency,
                )
                total.played += made.played
                total.mismatches += made.mismatches
                total.cut += made.cut
                total.damaged += made.damaged
        finally:
            if parts.tools is not None:
                await parts.tools.close()
            await close_all([function])

    with _quiet():
        asyncio.run(play())
    if as_json:
        typer.echo(json.dumps(_told(opened, total)))
    else:
        console = new_console()
        for sentence in [*map(str, total.mismatches), *map(str, total.cut), *total.damaged]:
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        console.print(
            f"{total.played} trajectories are what was recorded, {len(total.mismatches)} are not; "
            f"{len(total.cut)} were the same as far as their record goes, {len(total.damaged)} cannot be played",
            highlight=False,
            soft_wrap=True,
        )
    if total.mismatches or total.damaged:
        raise typer.Exit(1)


def _told(run: Run, made: Replay) -> dict[str, object]:
    return {
        "run": str(run.path),
        "played": made.played,
        "cut": [{"trajectory": end.key, "turn": end.turn, "why": end.why} for end in made.cut],
        "damaged": made.damaged,
        "mismatches": [
            {
                "trajectory": found.key,
                "turn": found.turn,
                "what": found.what,
                "token": found.token,
                "message": str(found),
            }
            for found in made.mismatches
        ],
    }


def given(pairs: list[str] | None) -> dict[str, object]:
    """`KEY=VALUE` as fields of the loop's configuration, values read as YAML."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for pair in pairs or ():
        if "=" not in pair:
            raise ConfigError(f"--loop '{pair}': expected KEY=VALUE")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(list(pairs or ())), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--loop: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Failures that are played back are no news."""
    log = logging.getLogger("agentloop")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
