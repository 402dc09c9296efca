"""`agentloop replay`: a recorded run once more through the loop, without a model or a tool."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Annotated

import typer

from agentloop.commands.journal import PartitionOption, RunArgument, StepOption, new_console, open_run
from agentloop.errors import ConfigError, nearest

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
    from agentloop.cassette import loop_of
    from agentloop.cassette import replay as replay_run
    from agentloop.cassette.setup import reward_of

    if engine != "cassette":
        raise ConfigError(f"replay: the engine is the cassette, not '{engine}'; agentloop fork goes on with another engine")
    for name in live or ():
        if name not in _LIVE:
            raise ConfigError(f"replay: --live cannot be '{name}'; {nearest(name, _LIVE)}")
    opened = open_run(run)
    again = set(live or ())
    function = reward_of(opened) if "reward" in again else None
    if "reward" in again and function is None:
        raise ConfigError(f"{opened.path}/run.json: key 'setup.reward' names no reward to call")
    parts = loop_of(opened, model=model, tools=tools_file, parser=parser, reward=function, loop=given(loop))
    logging.getLogger("agentloop").setLevel(logging.CRITICAL)  # failures that are played back are no news

    async def play() -> None:
        made = await replay_run(
            opened,
            parts,
            partition=partition,
            step=step,
            tools="live" if "tools" in again else "recorded",
            reward="live" if "reward" in again else "recorded",
            max_concurrency=concurrency,
        )
        if parts.tools is not None:
            await parts.tools.close()
        found = {
            "run": str(opened.path),
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
        if as_json:
            typer.echo(json.dumps(found))
        else:
            console = new_console()
            for mismatch in made.mismatches:
                console.print(str(mismatch), markup=False, highlight=False, soft_wrap=True)
            for sentence in [*map(str, made.cut), *made.damaged]:
                console.print(sentence, markup=False, highlight=False, soft_wrap=True)
            console.print(
                f"{made.played} trajectories are what was recorded, {len(made.mismatches)} are not; "
                f"{len(made.cut)} were the same as far as their record goes, {len(made.damaged)} cannot be played",
                highlight=False,
            )
        if made.mismatches or made.damaged:
            raise typer.Exit(1)

    asyncio.run(play())


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
