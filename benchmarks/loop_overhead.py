"""Host time per turn of the loop itself, at turns 1 to 128 of a conversation that grows to 64k tokens.

The engine is scripted and the tool answers at once, so what is measured is everything else: ledger, parser, tool session,
renderer, bookkeeping. Beside it verl's `ToolAgentLoop` runs the same conversation with a client that answers the same tokens.
The host time of turn k is the time from the engine's answer k to its question k+1, median over the trajectories.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.report import Aim, report

MODEL = Path(__file__).parent.parent / "examples" / "quickstart" / "model"
TURNS = 129
TOKENS = 65_536
REPEATS = 8
SHOWN = (1, 2, 8, 32, 128)
PROMPT = [{"role": "user", "content": "What is 12 + 30?"}]
CALL = '<tool_call>\n{"name": "echo", "arguments": {"text": "12 + 30"}}\n</tool_call>'
SCHEMA = {
    "type": "function",
    "function": {
        "name": "echo",
        "description": "Answers with a text.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "description": "any text"}},
            "required": ["text"],
        },
    },
}


def conversation(tokenizer: Any) -> tuple[list[list[int]], str]:
    """The sampled turns' ids (the last one is a final answer) and the tool's answer; together about `TOKENS` tokens."""
    half = TOKENS // TURNS // 2

    def filled(tail: str) -> list[int]:
        end = tokenizer.encode(tail, add_special_tokens=False)
        words: list[int] = []
        number = 0
        while len(words) < half - len(end):
            words += tokenizer.encode(f" step {number}", add_special_tokens=False)
            number += 1
        return [*words[: half - len(end)], *end]

    ids = [filled(f"{CALL}<|im_end|>") for _ in range(TURNS - 1)] + [filled(" The answer is 42.<|im_end|>")]
    return ids, tokenizer.decode(filled(" 42"))


def host_times(stamps: Sequence[float]) -> list[float]:
    """Microseconds between one answer and the next question; `stamps` alternates question, answer, question, …"""
    return [(asked - answered) * 1e6 for answered, asked in zip(stamps[1::2], stamps[2::2], strict=False)]


def ours(tokenizer: Any, turns: list[list[int]], answer: str) -> tuple[list[list[float]], float]:
    """Host times per turn of each trajectory, and trajectories per second."""
    from agentloop.chat import HermesParser, load_renderer
    from agentloop.config import LoopConfig
    from agentloop.engines.base import Generation, Sampling
    from agentloop.engines.scripted import ScriptedEngine
    from agentloop.loop import AgentLoop
    from agentloop.tools import BaseTool, ToolRegistry
    from agentloop.trajectory import EndReason, Sample

    class Echo(BaseTool):
        async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
            return answer

    stamps: list[float] = []

    class Stamped(ScriptedEngine):
        async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
            stamps.append(perf_counter())
            generation = await super().generate(ids, sampling, trajectory_id=trajectory_id)
            stamps.append(perf_counter())
            return generation

    renderer = load_renderer(tokenizer)
    engine = Stamped(turns, record="nothing")
    config = LoopConfig(max_turns=TURNS, max_response_tokens=4 * TOKENS)
    loop = AgentLoop(engine, renderer, HermesParser(renderer), tools=ToolRegistry.from_tools([Echo({}, SCHEMA)]), config=config)
    times: list[list[float]] = []

    async def all_of_them() -> float:
        spent = 0.0
        for repeat in range(REPEATS + 1):
            stamps.clear()
            started = perf_counter()
            trajectory = await loop.run(Sample(messages=PROMPT, uid=f"u{repeat}"))
            if repeat:  # the first one warms up
                spent += perf_counter() - started
                times.append(host_times(stamps))
            assert trajectory.end_reason is EndReason.FINAL_ANSWER, trajectory.error
            assert len(trajectory.turns) == TURNS and len(trajectory) > 0.95 * TOKENS
        return REPEATS / spent

    return times, asyncio.run(all_of_them())


def verls(tokenizer: Any, turns: list[list[int]], answer: str) -> tuple[list[list[float]], float]:
    """The same for verl's `ToolAgentLoop`."""
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    import verl
    from hydra import compose, initialize_config_dir
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
    from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
    from verl.tools.base_tool import BaseTool
    from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.workers.rollout.replica import TokenOutput

    class Echo(BaseTool):  # type: ignore[misc]
        async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
            return ToolResponse(text=answer), 0.0, {}

    stamps: list[float] = []

    class Client:
        def __init__(self) -> None:
            self.played = 0

        async def generate(self, request_id: str, **kwargs: Any) -> Any:
            stamps.append(perf_counter())
            ids = turns[self.played]
            self.played += 1
            output = TokenOutput(token_ids=list(ids), log_probs=[-1.0] * len(ids), stop_reason="stop", extra_fields={})
            stamps.append(perf_counter())
            return output

    with initialize_config_dir(config_dir=str(Path(verl.__file__).parent / "trainer/config"), version_base=None):
        config = compose("ppo_trainer")
    rollout = config.actor_rollout_ref.rollout
    rollout.prompt_length, rollout.response_length = 4096, 4 * TOKENS
    rollout.multi_turn.max_assistant_turns = TURNS
    rollout.multi_turn.max_tool_response_length = 10**6
    with contextlib.redirect_stdout(io.StringIO()):
        tool = Echo({}, OpenAIFunctionToolSchema.model_validate(SCHEMA))
    times: list[list[float]] = []

    async def all_of_them() -> float:
        spent = 0.0
        for repeat in range(REPEATS + 1):
            stamps.clear()
            started = perf_counter()
            loop = ToolAgentLoop(
                trainer_config=DictConfigWrap(config),
                server_manager=Client(),
                tokenizer=tokenizer,
                processor=None,
                dataset_cls=RLHFDataset,
                data_config=DictConfigWrap(config.data),
                hf_model_type="qwen3",
                tools=ToolListWrap([tool]),
            )
            output = await loop.run({"temperature": 1.0}, raw_prompt=PROMPT)
            if repeat:
                spent += perf_counter() - started
                times.append(host_times(stamps))
            assert len(stamps) == 2 * TURNS and len(output.response_ids) > 0.95 * TOKENS
        return REPEATS / spent

    return times, asyncio.run(all_of_them())


def main() -> None:
    """Print the figures."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    turns, answer = conversation(tokenizer)
    figures: dict[str, Any] = {"turns": TURNS, "tokens": TOKENS, "trajectories": REPEATS}
    for name, side in (("agentloop", ours), ("verl_tool_agent_loop", verls)):
        times, rate = side(tokenizer, turns, answer)
        figures[name] = {
            "host_us_at_turn": {
                str(turn): round(statistics.median(row[i] for row in times for i in around(turn, len(row))), 1)
                for turn in SHOWN
            },
            "trajectories_per_s": round(rate, 3),
        }
    mine, theirs = figures["agentloop"], figures["verl_tool_agent_loop"]
    growth = mine["host_us_at_turn"]["128"] / mine["host_us_at_turn"]["2"]
    speed = mine["trajectories_per_s"] / theirs["trajectories_per_s"]
    aims = [
        Aim("host time at turn 128 over turn 2", round(growth, 3), "at most 1.3", growth <= 1.3),
        Aim("trajectories per second over verl's", round(speed, 2), "at least 3", speed >= 3),
    ]
    report("loop_overhead", figures, aims)


def around(turn: int, turns: int) -> range:
    """Indices (from 0) of `turn` (from 1) and its neighbours, which steady the median; turn 1 stands alone."""
    width = 0 if turn == 1 else 1 if turn < 8 else 3
    return range(max(0, turn - 1 - width), min(turns, turn + width))


if __name__ == "__main__":
    main()
