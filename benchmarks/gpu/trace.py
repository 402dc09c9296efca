"""A seeded trace of multi-turn conversations, and what replays it on every side.

A model with random weights calls no tools and rarely stops, so the trace says how long each turn is, which tools it calls,
how long they take and how much they answer. Sides differ in how they run a conversation, never in what is in it: the engine
is asked for exactly the turn's tokens (`ignore_eos`, `max_tokens`), the parser of each side reads what was sampled as it
always does and then answers with the trace's calls, and the tools of both sides are the same two.
"""

from __future__ import annotations

import asyncio
import functools
import math
import random
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from agentloop.chat.base import Parsed, Renderer, ToolCallParser
from agentloop.engines.base import Engine, Generation, Sampling
from agentloop.loop import AgentLoop
from agentloop.tools import BaseTool
from agentloop.trajectory import Sample, StopReason, ToolCall, Trajectory

TOOLS = Path(__file__).parent / "tools.yaml"
MAX_TURNS = 8
TURN_WEIGHTS = (1, 2, 3, 3, 3, 2, 1, 1)
"""How often a conversation has 1 to 8 turns."""
TURN_MEDIAN, TURN_SIGMA, TURN_RANGE = 64, 0.6, (8, 256)
"""Tokens of a turn: log-normal."""
DELAY_MEDIAN_S, DELAY_TAIL_S = 1.0, 30.0
DELAY_SIGMA = math.log(DELAY_TAIL_S / DELAY_MEDIAN_S) / 3.09
"""Seconds of a call: log-normal, one in a thousand at the tail, none above it."""
SECOND_CALL = 0.2
"""Share of the calling turns that call two tools at once."""
QUESTION_WORDS, ANSWER_WORDS = (60, 140), (20, 80)


@dataclass(frozen=True, slots=True)
class TracedCall:
    tool: str
    delay_s: float
    words: int
    """Of the answer."""


@dataclass(frozen=True, slots=True)
class TracedTurn:
    tokens: int
    calls: tuple[TracedCall, ...]
    """None in the last turn of a conversation, at least one in every other."""


@dataclass(frozen=True, slots=True)
class Conversation:
    index: int
    words: int
    """Of the question."""
    turns: tuple[TracedTurn, ...]

    @property
    def tokens(self) -> int:
        """Sampled ones."""
        return sum(turn.tokens for turn in self.turns)

    @property
    def delay_s(self) -> float:
        """Seconds that tools take from its beginning to its end; the calls of a turn run side by side."""
        return sum(max((call.delay_s for call in turn.calls), default=0.0) for turn in self.turns)


def make_trace(count: int, *, seed: int = 0, scale: float = 1.0) -> list[Conversation]:
    """`count` conversations; the first ones are the same for every count. `scale` multiplies tokens and delays."""
    rng = random.Random(seed)
    low, high = TURN_RANGE
    made = []
    for index in range(count):
        turns = []
        last = rng.choices(range(MAX_TURNS), TURN_WEIGHTS)[0]
        words = rng.randint(*QUESTION_WORDS)
        for place in range(last + 1):
            tokens = min(max(rng.lognormvariate(math.log(TURN_MEDIAN), TURN_SIGMA), low), high)
            calls = [_call(rng, scale) for _ in range(1 + (rng.random() < SECOND_CALL))]
            turns.append(TracedTurn(max(2, round(tokens * scale)), tuple(calls) if place < last else ()))
        made.append(Conversation(index, words, tuple(turns)))
    return made


def _call(rng: random.Random, scale: float) -> TracedCall:
    delay = min(rng.lognormvariate(math.log(DELAY_MEDIAN_S), DELAY_SIGMA), DELAY_TAIL_S)
    return TracedCall(rng.choice(("python", "calculator")), round(delay * scale, 4), rng.randint(*ANSWER_WORDS))


def instant(trace: Sequence[Conversation]) -> list[Conversation]:
    """The same trace with tools that take no time."""
    return [
        replace(c, turns=tuple(replace(t, calls=tuple(replace(call, delay_s=0.0) for call in t.calls)) for t in c.turns))
        for c in trace
    ]


def shortened(trace: Sequence[Conversation], tokens: int = 16) -> list[Conversation]:
    """One short turn and its answer of each conversation, to warm up."""
    return [replace(c, turns=(TracedTurn(tokens, (TracedCall("python", 0.0, 4),)), TracedTurn(tokens, ()))) for c in trace]


def word(number: int) -> str:
    """A word of its own for every number: five letters, which the benchmark's tokenizer has as one token."""
    letters = ""
    for _ in range(4):
        number, rest = divmod(number, 26)
        letters = chr(ord("a") + rest) + letters
    return f"z{letters}"


@functools.cache
def words(count: int, start: int = 0) -> str:
    """Kept, so that making a tool's answer costs no side anything."""
    return "".join(f" {word((start + i) * 7919 % 20_000)}" for i in range(count))


def messages(conversation: Conversation, salt: int) -> list[dict[str, Any]]:
    """The prompt. `salt` tells passes over the trace apart, so that none finds another one's conversations in the prefix
    cache; all have the system prompt with the tools in common."""
    question = f"Pass {salt:04d}, task {conversation.index:04d}:{words(conversation.words, conversation.index)}"
    return [{"role": "system", "content": "Solve the task with the tools."}, {"role": "user", "content": question}]


def answers(turn: TracedTurn) -> list[dict[str, Any]]:
    """The messages that answer a turn's calls."""
    return [
        {"role": "tool", "name": call.tool, "tool_call_id": f"t0000c{i:03d}", "content": words(call.words)}
        for i, call in enumerate(turn.calls)
    ]


@dataclass(frozen=True, slots=True)
class Requests:
    """One conversation as recorded requests: what a bare loop over the engine has to send."""

    prompt: list[int]
    turns: list[tuple[int, float, list[int]]]
    """Tokens to ask for, seconds that the tools take, ids that follow the sampled ones."""

    @property
    def response_len(self) -> int:
        return sum(tokens + len(after) for tokens, _, after in self.turns)


def record(conversation: Conversation, salt: int, renderer: Renderer, schemas: list[dict[str, Any]]) -> Requests:
    turns = []
    for turn in conversation.turns:
        # What follows does not depend on what was sampled, but for an end-of-turn token that closes the turn by chance.
        after = renderer.after_turn([0], answers(turn)) if turn.calls else []
        delay = max((call.delay_s for call in turn.calls), default=0.0)
        turns.append((turn.tokens, delay, [token for piece in after for token in piece.ids]))
    return Requests(renderer.prompt(messages(conversation, salt), schemas), turns)


# -- replaying ----------------------------------------------------------------------------------------------------------------


class Replay:
    """Where one conversation is in its trace."""

    def __init__(self, conversation: Conversation) -> None:
        self._turns = iter(conversation.turns)
        self.turn = TracedTurn(1, ())

    def advance(self) -> TracedTurn:
        """The next turn; the engine is being asked for it."""
        self.turn = next(self._turns)
        return self.turn


CURRENT: ContextVar[Replay] = ContextVar("CURRENT")
"""Of the task that runs: asking the engine and reading its answer happen in one task, on both sides."""


class TracedLoop(AgentLoop):
    """`AgentLoop`, which gives each sibling of a group the conversation that it replays, with that one's own question."""

    conversations: dict[tuple[str, int], Conversation]
    """By uid and sibling."""
    salt: int

    async def run(self, sample: Sample, *, sibling: int = 0, **kwargs: Any) -> Trajectory:
        conversation = self.conversations[sample.uid, sibling]
        CURRENT.set(Replay(conversation))
        sample = replace(sample, messages=messages(conversation, self.salt))
        return await super().run(sample, sibling=sibling, **kwargs)


class TracedEngine(Engine):
    """Asks an engine for the trace's turns: as many tokens as it says, no stop tokens, no seed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        asked = Sampling(CURRENT.get().advance().tokens, temperature=sampling.temperature)
        answer = await self.engine.generate(ids, asked, trajectory_id=trajectory_id)
        return replace(answer, stop_reason=StopReason.STOP)

    async def release(self, trajectory_id: str) -> None:
        await self.engine.release(trajectory_id)


class TracedParser(ToolCallParser):
    """Parses what was sampled, and answers with the trace's calls."""

    def __init__(self, parser: ToolCallParser) -> None:
        self.parser = parser

    def parse(self, ids: Sequence[int], *, turn: int = 0, in_reasoning: bool = False) -> Parsed:
        parsed = self.parser.parse(ids, turn=turn, in_reasoning=in_reasoning)
        calls = [
            ToolCall(call.tool, arguments(call), f"t{turn:04d}c{i:03d}") for i, call in enumerate(CURRENT.get().turn.calls)
        ]
        return Parsed(parsed.content, parsed.reasoning, calls)


def arguments(call: TracedCall) -> dict[str, Any]:
    return {"seconds": call.delay_s, "words": call.words}


class TracedArguments(BaseModel):
    seconds: float
    words: int


class Python(BaseTool):
    """Runs code: waits as long as the trace says, and answers as much."""

    name = "python"
    Arguments = TracedArguments
    running: ClassVar[int] = 0
    """Calls under way in this process, of all traced tools."""
    held: ClassVar[int] = 0
    """Instances created and not released."""

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> Any:
        Python.held += 1
        return await super().create(instance_id, **kwargs)

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> str:
        Python.running += 1
        try:
            if parameters["seconds"]:
                await asyncio.sleep(parameters["seconds"])
            return words(parameters["words"])
        finally:
            Python.running -= 1

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        Python.held -= 1
        await super().release(instance_id, **kwargs)


class Calculator(Python):
    """Computes: waits as long as the trace says, and answers as much."""

    name = "calculator"
