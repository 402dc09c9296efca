"""A run to play back: a real loop with tools that answer, fail, hang and are cut, and an engine that plays a random script.

Every kind of end that a journal can hold is among its trajectories.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from agentloop.chat import HermesParser, load_renderer
from agentloop.config import LoopConfig, OnCutoff
from agentloop.engines.base import Engine, Sampling
from agentloop.engines.scripted import ScriptedEngine, ScriptedTurn
from agentloop.errors import ToolInfraError
from agentloop.journal import JournalWriter, token_bytes
from agentloop.loop import AgentLoop
from agentloop.rollout import Rollout
from agentloop.tools import BaseTool, ToolRegistry, ToolResult
from agentloop.tools.calculator import Calculator
from agentloop.tools.submit import Submit
from agentloop.trajectory import Reward, Sample, Trajectory

END = "<|im_end|>"
CONFIG = LoopConfig(
    max_turns=5, max_response_tokens=900, max_parallel_calls=2, penalty=-1.0, on_cutoff=OnCutoff(turn_limit="penalty")
)


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Moody(BaseTool):
    """Does what it is told to, in a time of its own, and remembers how often."""

    name = "moody"

    class Arguments(BaseModel):
        mood: str = Field(description="what to do")

    async def create(self, instance_id: str | None = None, *, start: int = 0, **kwargs: Any) -> Any:
        if start < 0:
            raise ToolInfraError("no place for a moody one")
        created = await super().create(instance_id)
        self.instances[created[0]] = start
        return created

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
        self.instances[instance_id] += 1
        await asyncio.sleep(random.random() * 0.005)
        match parameters["mood"]:
            case "raise":
                raise ValueError("bad mood")
            case "gone":
                raise ToolInfraError("the machine is gone")
            case "hang":
                await asyncio.sleep(60)
            case "talk":
                return ToolResult("words and more words " * 120, reward=0.5)
        return ToolResult(f"mood {self.instances[instance_id]}", reward=0.25, metrics={"moods": 1.0})

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        return float(self.instances[instance_id])


async def reward(trajectory: Trajectory, sample: Sample, text: str) -> Reward:
    await asyncio.sleep(0)
    if "unscorable" in text:
        raise ValueError("no way to score this")
    value = float(len(trajectory) % 7) / 3
    return Reward(value, {"length": float(len(trajectory))}, {"said": text[:20]}, turns=(0.125,))


class Parts:
    """What a loop is made of; `loop` puts it together."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.renderer = load_renderer(tokenizer)
        self.decode = token_bytes(tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def registry(self, **policies: Any) -> ToolRegistry:
        moody = {"timeout": 0.05, "max_response_tokens": 300, **policies}
        return ToolRegistry.from_tools([Moody(), Calculator(), Submit()], policies={"moody": moody}).bind(self.renderer)

    def loop(self, engine: Engine, **options: Any) -> AgentLoop:
        options = {"tools": self.registry(), "reward": reward, "config": CONFIG, "seed": 7, **options}
        return AgentLoop(engine, self.renderer, HermesParser(self.renderer), **options)

    def writer(self, path: Path, **options: Any) -> JournalWriter:
        return JournalWriter(path, decode=self.decode, meta={"seed": 7}, **options)

    def scripted(self, turn: Callable[[random.Random], str | ScriptedTurn] | None = None) -> ScriptedEngine:
        """Says something of everything, the same for the same trajectory and turn."""

        def say(ids: Any, sampling: Sampling, trajectory_id: str) -> ScriptedTurn:
            rng = random.Random(f"{trajectory_id}/{len(ids)}")
            said = _anything(rng) if turn is None else turn(rng)
            if isinstance(said, ScriptedTurn):
                return said
            tokens = self.encode(said)
            values = [-rng.random() for _ in tokens]
            return ScriptedTurn(ids=tokens, log_probs=values, delay_s=rng.random() * 0.004, weight_version=rng.randrange(3))

        return ScriptedEngine(say, record="nothing")


def _anything(rng: random.Random) -> str | ScriptedTurn:
    mood = rng.choice(["good", "good", "good", "raise", "talk", "talk", "gone", "hang"])
    match rng.randrange(16):
        case 0 | 1:
            return f"The answer is {rng.random()}{END}"
        case 2:
            return called("submit", answer=f"{rng.randrange(100)}") + END
        case 3:
            return "<tool_call>\nno JSON\n</tool_call>" + END
        case 4:
            return called("nobody", a=1) + called("calculator", expression=3) + END
        case 5:
            return "unscorable" + END
        case 6 if rng.random() < 0.5:
            return ScriptedTurn(error="the server is gone")
        case 7:
            return "a turn that is cut off " * 60
        case 8 | 9:
            return "".join(called("moody", mood=m) for m in ("good", mood, "good")) + END
        case _:
            return called("calculator", expression=f"{rng.randrange(1000)} * 3") + called("moody", mood=mood) + END


def samples(count: int, **options: Any) -> list[Sample]:
    return [
        Sample(
            messages=[{"role": "system", "content": "Use tools."}, {"role": "user", "content": f"Question {number}?"}],
            uid=f"s{number}",
            ground_truth={"answer": number},
            tools_kwargs={"moody": {"create_kwargs": {"start": -1 if number % 9 == 8 else number}}},
            extra_info={"index": number},
            **options,
        )
        for number in range(count)
    ]


async def record(
    loop: AgentLoop, given: list[Sample], n: int = 4, *, steps: tuple[int, ...] = (1,), sampling: Sampling | None = None
) -> list[Trajectory]:
    """All trajectories, by step, group and sibling."""
    rollout = Rollout(loop)
    ended: list[Trajectory] = []
    for step in steps:
        ended += [t for group in await rollout.run(given, n, step=step, sampling=sampling) for t in group]
    return ended
