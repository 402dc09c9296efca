"""Random rollouts through the real loop: renderers of several families, tools that answer, fail and are asked again, turns that
are cut or aborted, weights that change meanwhile, conversations that are given up."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from agentloop.chat import HermesParser, load_renderer
from agentloop.chat.base import Renderer
from agentloop.config import LoopConfig, OnCutoff
from agentloop.engines.base import Sampling
from agentloop.engines.scripted import ScriptedEngine, ScriptedTurn
from agentloop.errors import ToolInfraError
from agentloop.journal import JournalWriter, NullRecorder, token_bytes
from agentloop.journal.base import Recorder
from agentloop.loop import AgentLoop
from agentloop.rollout import Rollout
from agentloop.tools import ToolRegistry
from agentloop.tools.submit import Submit
from agentloop.trajectory import Reward, Sample, StopReason, Trajectory
from tests.chat.templates import TAKEN
from tests.chat.tokenizers_ import tokenizer as family_tokenizer

NAMES = list(TAKEN)
WORDS = [
    "the",
    "answer",
    "is",
    "seven",
    "plus",
    "two",
    "lines",
    "été",
    "🙂",
    "漢字",
    "naïve",
    "12",
    "34",
    "46",
    "<b>",
    "{x}",
    '"q"',
    "\\n",
]


@cache
def renderer_of(name: str) -> tuple[Any, Renderer]:
    family, template = TAKEN[name]
    tokenizer = family_tokenizer(family)
    return tokenizer, load_renderer(tokenizer, chat_template=template)


def look_up(key: str) -> str:
    """Look something up.

    Args:
        key: what to look up
    """
    rng = random.Random(key)
    if rng.random() < 0.1:
        raise ValueError("nothing under that key")
    if rng.random() < 0.05:
        return ""
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 3, 10, 60])))


def flaky(key: str) -> str:
    """Break down at times.

    Args:
        key: what to look up
    """
    if random.Random(f"flaky {key}").random() < 0.3:
        raise ToolInfraError("the machine is gone")
    return f"value {key}"


class Maker:
    """Rollouts of one template, told to one recorder."""

    def __init__(
        self,
        name: str,
        seed: int,
        recorder: Recorder | None = None,
        *,
        tokens: int = 900,
        plain: bool = False,
        log_probs: bool = True,
    ) -> None:
        """`plain`: nothing is cut, fails or is given up, and every trajectory has several turns."""
        self.tokenizer, self.renderer = renderer_of(name)
        self.name, self.seed, self.plain = name, seed, plain
        self.log_probs = log_probs
        self.end = self.renderer.stop_token_ids[0]
        self.config = LoopConfig(
            max_turns=4 if plain else random.Random(seed).choice([2, 4, 6]),
            max_prompt_tokens=4000,
            max_response_tokens=4000 if plain else tokens,
            max_turn_tokens=None if plain else random.Random(seed).choice([None, 40]),
            final_turn_without_tools=not plain and seed % 3 == 0,
            on_cutoff=OnCutoff(parse_failure="penalty") if seed % 5 == 0 else OnCutoff(),
        )
        policies = {"flaky": {"on_error": random.Random(seed).choice(["resample", "drop_sample"])}}
        tools = [look_up] if plain else [look_up, flaky, Submit()]
        taken = "tool" not in getattr(self.renderer, "not_taken", {})
        registry = ToolRegistry.from_tools(tools, policies=None if plain else policies) if taken else None
        self.engine = ScriptedEngine(self.turn, record="ids")
        self.parts: dict[str, int] = {}
        """Tokens that an aborted turn still has to say."""
        self.rest: dict[str, ScriptedTurn] = {}
        self.versions: dict[str, int] = {}
        self.loop = AgentLoop(
            self.engine,
            self.renderer,
            HermesParser(self.renderer),
            tools=registry,
            reward=self.reward,
            config=self.config,
            recorder=recorder or NullRecorder(),
            seed=seed,
        )

    def turn(self, ids: Sequence[int], sampling: Sampling, key: str) -> ScriptedTurn:
        if key in self.rest:
            return self.rest.pop(key)
        rng = random.Random(f"{self.seed}/{key}/{len(ids)}")
        say = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))
        text = say
        if len(ids) < 60 or rng.random() < 0.6 or (self.plain and self.engine_turn(key) < 2):
            calls = [self.call(rng) for _ in range(1 if self.plain else rng.choice([1, 1, 2, 3]))]
            text = "\n".join([*([say] if rng.random() < 0.4 else []), *calls])
        text = f"so</think>{text}" if self.renderer.opens_reasoning else text
        said = [*self.tokenizer.encode(text, add_special_tokens=False)]
        cut = not self.plain and rng.random() < 0.1
        said = said[: rng.randint(1, len(said))] if cut else [*said, self.end]
        values = [-rng.expovariate(1.0) for _ in said]
        first = self.versions.setdefault(key, rng.randint(0, 2))
        if not self.plain and rng.random() < 0.02:
            return ScriptedTurn(error="planted")
        reason = StopReason.LENGTH if cut else StopReason.STOP
        if not self.plain and rng.random() < 0.1 and len(said) > 2:
            at = rng.randint(0, len(said) - 1)
            self.versions[key] = first + 1
            self.rest[key] = ScriptedTurn(ids=said[at:], log_probs=values[at:], stop_reason=reason, weight_version=first + 1)
            return ScriptedTurn(ids=said[:at], log_probs=values[:at], stop_reason=StopReason.ABORTED, weight_version=first)
        return ScriptedTurn(ids=said, log_probs=values, stop_reason=reason, weight_version=first)

    def engine_turn(self, key: str) -> int:
        return sum(call.trajectory_id == key for call in self.engine.calls) - 1

    def call(self, rng: random.Random) -> str:
        kinds = ["look_up"] if self.plain else ["look_up"] * 6 + ["flaky", "gone", "submit", "malformed", "wrong"]
        kind = rng.choice(kinds)
        key = f"{rng.random():.6f}"
        if kind == "malformed":
            return '<tool_call>\n{"name": "look_up", "argum\n</tool_call>'
        arguments = {"look_up": {"key": key}, "flaky": {"key": key}, "submit": {"answer": key}, "wrong": {"nothing": 1}}.get(
            kind, {}
        )
        name = "look_up" if kind == "wrong" else kind
        return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'

    async def reward(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        rng = random.Random(f"reward {self.seed}/{trajectory.id}")
        turns = tuple(rng.choice([0.0, 0.25]) for _ in trajectory.turns) if rng.random() < 0.3 else ()
        value = rng.choice([0.0, 0.0, 1.0, rng.random()])
        if rng.random() < 0.01:
            raise ValueError("planted")
        return Reward(value, {"right": value, "length": float(len(trajectory))}, {"right": value, "said": text[:5]}, turns)

    def group(self, uid: str, n: int, *, step: int = 1, validate: bool = False) -> list[Trajectory]:
        rng = random.Random(f"{self.seed}/{uid}")
        messages = [{"role": "user", "content": " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 30)))}]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": f"Be brief {uid}."})
        sample = Sample(messages=messages, uid=uid, ground_truth="7")
        sampling = Sampling(max_tokens=4000, temperature=rng.choice([1.0, 0.7]), log_probs=self.log_probs)
        rollout = Rollout(self.loop, max_concurrency=8)
        return asyncio.run(rollout.group(sample, n, sampling=sampling, step=step, validate=validate))


def record(
    folder: Path, name: str, seed: int, *, groups: int = 2, n: int = 4, steps: int = 1, plain: bool = True
) -> list[Trajectory]:
    """A run under `folder`, recorded by the real writer; its trajectories."""
    tokenizer, _ = renderer_of(name)
    with JournalWriter(folder, decode=token_bytes(tokenizer), meta={"seed": seed}) as writer:
        maker = Maker(name, seed, writer, plain=plain)
        return [t for step in range(1, steps + 1) for g in range(groups) for t in maker.group(f"s{step}g{g}", n, step=step)]
