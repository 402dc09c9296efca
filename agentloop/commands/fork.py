"""`agentloop fork`: go on from a turn of a recorded conversation, with something changed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentloop.commands.journal import PartitionOption, RunArgument, StepOption, new_console, open_run
from agentloop.commands.replay import LoopOption, ModelOption, ParserOption, ToolsFileOption, given
from agentloop.errors import ConfigError

if TYPE_CHECKING:
    from agentloop.cassette import Fork


def fork(
    run: RunArgument,
    trajectory: Annotated[str, typer.Option(metavar="ID", help="as `agentloop ls RUN --step N` lists it")],
    turn: Annotated[
        int | None, typer.Option(min=0, help="the turn that is made anew, or of which the result is changed")
    ] = None,
    tool_result: Annotated[str | None, typer.Option(metavar="TEXT", help="what a tool answered in that turn instead")] = None,
    call: Annotated[str | None, typer.Option(metavar="PLACE|ID", help="which call, where the turn has several")] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="what the model wrote in that turn instead")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="the user's message instead; from the beginning")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="forks, side by side")] = 1,
    engine: Annotated[str, typer.Option(metavar="local|sglang_server|scripted", help="what goes on")] = "local",
    url: Annotated[list[str] | None, typer.Option(help="of an SGLang server, for sglang_server; may be repeated")] = None,
    script: Annotated[Path | None, typer.Option(help="for scripted: a JSON list of what the model writes from then on")] = None,
    tools: Annotated[
        str,
        typer.Option(
            metavar="record|replay", help="earlier calls: answered from the record, or run again too (side effects included)"
        ),
    ] = "record",
    step: StepOption = None,
    partition: PartitionOption = None,
    model: ModelOption = None,
    tools_file: ToolsFileOption = None,
    parser: ParserOption = None,
    loop: LoopOption = None,
    seed: Annotated[int, typer.Option(help="another one gives other forks")] = 0,
    into: Annotated[
        Path | None, typer.Option(help="folder of the run that the forks become; default: RUN/forks/0001, …")
    ] = None,
) -> None:
    """Go on from a turn of a recorded conversation with a real engine; everything before it stays token for token.

    The forks are a run of their own: `agentloop show RUN/forks/0001`.
    """
    from agentloop.cassette import fork as fork_run
    from agentloop.cassette import load_engine, loop_of
    from agentloop.cassette.setup import reward_of, tokenizer_of
    from agentloop.rewards.spec import close_all

    opened = open_run(run)
    if engine == "cassette":
        raise ConfigError("fork: the record has no answers beyond itself, so another engine than 'cassette' must go on")
    if tools_file == "recorded":
        raise ConfigError("fork: --tools-file 'recorded' has schemas alone, and a fork calls its tools")
    tokenizer = tokenizer_of(opened, model)
    parts = loop_of(opened, tokenizer=tokenizer, tools=tools_file, parser=parser, reward=reward_of(opened), loop=given(loop))
    parts.engine = load_engine(engine, run=opened, model=model, url=url, script=script, tokenizer=tokenizer)

    async def go_on() -> Fork:
        try:
            return await fork_run(
                opened,
                trajectory,
                loop=parts,
                turn=turn,
                tool_result=tool_result,
                call=call,
                message=message,
                prompt=prompt,
                n=n,
                tools=tools,  # type: ignore[arg-type]  # checked there
                seed=seed,
                step=step,
                partition=partition,
                into=into,
            )
        finally:
            await parts.engine.close()
            if parts.tools is not None:
                await parts.tools.close()
            await close_all([parts.reward])

    from agentloop.cassette import CassetteMismatch

    try:
        made = asyncio.run(go_on())
    except CassetteMismatch as error:
        raise ConfigError(
            f"fork: what is before the turn does not come out as it was recorded ({error}); give what run.json does not tell: "
            "--model, --tools-file, --parser, --loop"
        ) from error
    console = new_console()
    for ended in made.trajectories:
        reward = "-" if ended.reward is None else f"{ended.reward.value:g}"
        console.print(
            f"{ended.id}: {len(ended.turns)} turns, {len(ended)} tokens, ended as {ended.end_reason}, reward {reward}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    for sentence in made.differences:
        console.print(f"ran again otherwise: {sentence}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{made.shared_tokens} tokens are those of {trajectory}; written to {made.path}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
