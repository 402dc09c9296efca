"""Forks that are asked for in the viewer: a conversation once more from one of its turns on (`agentloop.cassette.fork`)."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

from agentloop.journal.reader import Run
from agentloop.journal.recorded import Row
from agentloop.replay.payload import Fork

if TYPE_CHECKING:
    from agentloop.loop import AgentLoop

MakeLoop = Callable[[], "AgentLoop"]
"""Gives the loop that goes on; its engine, tools and reward are closed when the fork has ended."""


def recorded_loop(run: Run, engine: str) -> MakeLoop:
    """The loop that made the run, with another engine: `local`, or what `agentloop.cassette.load_engine` knows besides."""

    def make() -> AgentLoop:
        from agentloop.cassette import load_engine, loop_of
        from agentloop.cassette.setup import reward_of, tokenizer_of

        tokenizer = tokenizer_of(run)
        parts = loop_of(run, tokenizer=tokenizer, reward=reward_of(run))
        parts.engine = load_engine(engine, run=run, tokenizer=tokenizer)
        return parts

    return make


def forker(run: Run, make_loop: MakeLoop) -> Fork:
    """What `Payload` calls for a fork: the edited answer of a call, or with `call=None` the edited prompt. Blocks until it has
    ended; must not be called where an event loop runs."""

    def fork(row: Row, turn: int, call: int | None, text: str) -> dict[str, str]:
        from agentloop.cassette import fork as fork_run
        from agentloop.rewards.spec import close_all

        async def go_on() -> dict[str, str]:
            loop = make_loop()
            edit = {"prompt": text} if call is None else {"turn": turn, "call": call, "tool_result": text}
            place = {"step": row.step, "partition": row.partition}
            try:
                made = await fork_run(run, row.id, loop=loop, **edit, **place)  # type: ignore[arg-type]
            finally:
                await loop.engine.close()
                if loop.tools is not None:
                    await loop.tools.close()
                await close_all([loop.reward])
            (told,) = made.trajectories
            reward = "no reward" if told.reward is None else f"reward {told.reward.value:g}"
            sentence = (
                f"Forked: {len(told.turns)} turns, ended as {told.end_reason}, {reward}; "
                f"{made.shared_tokens} tokens are those of {row.id}. It is the run {made.path}"
            )
            return {"text": sentence, "command": f"agentloop view {shlex.quote(str(made.path))}"}

        return asyncio.run(go_on())

    return fork
