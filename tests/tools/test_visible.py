"""What the policies did can be read in the journal, and a run's text is what the model saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agentloop.chat import HermesParser, load_renderer
from agentloop.config import LoopConfig
from agentloop.engines.scripted import ScriptedEngine
from agentloop.journal import JournalWriter, Run
from agentloop.loop import AgentLoop
from agentloop.tools import ToolRegistry
from agentloop.trajectory import CallRecord, Sample
from tests.tools.examples import Flaky, Sleeper

END = "<|im_end|>"


def asks(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


async def test_retries_waits_deadlines_and_an_open_breaker(tokenizer: Any, tmp_path: Path) -> None:
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    many = "".join(asks("sleeper", seconds=0.05) for _ in range(2)) + asks("flaky") + asks("late", seconds=60)
    script = [many + END, asks("down") + END, "never"]
    down, late_tool = Flaky({"failures": 10**9}), Sleeper()
    for tool, name in ((down, "down"), (late_tool, "late")):
        tool.name = tool.tool_schema.function.name = name
    policies: dict[str, dict[str, Any]] = {
        "flaky": {"retries": 2},
        "sleeper": {"max_concurrency": 1, "rate_limit": "1/1s", "cluster_concurrency": 9},
        "late": {"deadline": 0.3},
        "down": {"retries": 5, "circuit_breaker": {"failures": 2}},
    }
    registry = ToolRegistry.from_tools([Flaky({"failures": 2}), Sleeper(), down, late_tool], policies)
    renderer = load_renderer(tokenizer)
    with JournalWriter(tmp_path) as journal:
        engine = ScriptedEngine(script, encode=encode)
        config = LoopConfig(max_response_tokens=2048)
        loop = AgentLoop(engine, renderer, HermesParser(renderer), tools=registry, config=config, recorder=journal)
        await loop.run(Sample(messages=[{"role": "user", "content": "Go."}], uid="u"))
    run = Run(tmp_path)
    (row,) = run.trajectories()
    recorded = run.load(row.id, tokens=False)
    first, second, flaky, late = recorded.turns[0].calls
    assert "rate_wait_s" not in first.metrics and second.queue_s > second.metrics["rate_wait_s"] > 0
    assert flaky.attempts == 3 and flaky.metrics["retries"] == 2 and flaky.metrics["backoff_s"] >= 0.15
    assert (late.status, late.metrics["deadline"]) == ("timeout", 1)
    down_call: CallRecord = recorded.turns[1].calls[0]
    assert (down_call.status, down_call.attempts, down_call.metrics["breaker_open"]) == ("infra", 2, 1)
