"""`submit`, and what the loop does with a tool that takes the final answer."""

from __future__ import annotations

import json
from typing import Any

from agentloop.chat import HermesParser, load_renderer
from agentloop.config import LoopConfig
from agentloop.engines.scripted import ScriptedEngine
from agentloop.loop import AgentLoop
from agentloop.tools import ToolRegistry
from agentloop.tools.submit import Submit
from agentloop.trajectory import CallStatus, EndReason, Reward, Sample, State, Trajectory
from tests.tools.examples import Flaky, repeat

END = "<|im_end|>"
SAMPLE = Sample(messages=[{"role": "user", "content": "What is 1 plus 2?"}], uid="u", ground_truth="3")


def asks(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


async def run(tokenizer: Any, script: list[str], **config: Any) -> tuple[Trajectory, list[str]]:
    """The trajectory, and the texts that the reward was asked about."""
    asked: list[str] = []

    async def reward(trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        asked.append(text)
        return Reward(float(text == sample.ground_truth))

    renderer = load_renderer(tokenizer)
    engine = ScriptedEngine(script, encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False)))
    tools = ToolRegistry.from_tools([Submit(), repeat, Flaky({"failures": 9})], {"submit": {"max_response_tokens": 1}})
    loop = AgentLoop(
        engine,
        renderer,
        HermesParser(renderer),
        tools=tools.bind(renderer),
        reward=reward,
        config=LoopConfig(max_response_tokens=2048, **config),
    )
    return await loop.run(SAMPLE), asked


async def test_it_ends_the_trajectory_and_the_reward_sees_the_answer(tokenizer: Any) -> None:
    t, asked = await run(tokenizer, [asks("repeat", text="a") + END, "So it is: " + asks("submit", answer="3") + END, "never"])
    assert (t.end_reason, t.state, len(t.turns)) == (EndReason.FINAL_ANSWER, State.DONE, 2)
    assert asked == ["3"] and t.reward is not None and t.reward.value == 1.0
    assert t.turns[1].calls[0].text == "3"
    assert t.turns[1].end == len(t), "nothing follows what the model sampled"


async def test_a_long_answer_is_not_cut(tokenizer: Any) -> None:
    _, asked = await run(tokenizer, [asks("submit", answer="long " * 50) + END])
    assert asked == ["long " * 50]


async def test_of_several_the_last_counts_and_the_others_calls_are_run(tokenizer: Any) -> None:
    calls = [asks("submit", answer="2"), asks("repeat", text="a"), asks("submit", answer="3")]
    t, asked = await run(tokenizer, ["\n".join(calls) + END])
    assert asked == ["3"] and [record.text for record in t.turns[0].calls] == ["2", "aa", "3"]


async def test_one_that_goes_wrong_ends_nothing(tokenizer: Any) -> None:
    script = [asks("submit", answer=" ") + END, asks("submit", anwser="3") + END, asks("submit", answer="3") + END]
    t, asked = await run(tokenizer, script)
    assert [turn.calls[0].status for turn in t.turns] == ["invalid_arguments", "invalid_arguments", "ok"]
    assert asked == ["3"]


async def test_in_a_last_turn_without_tools_it_is_taken_all_the_same(tokenizer: Any) -> None:
    calls = asks("repeat", text="a") + "\n" + asks("submit", answer="3")
    t, asked = await run(tokenizer, [calls + END], max_turns=1, final_turn_without_tools=True)
    assert (t.end_reason, asked) == (EndReason.FINAL_ANSWER, ["3"])
    assert [record.status for record in t.turns[0].calls] == [CallStatus.NOT_RUN, CallStatus.OK]


async def test_the_note_before_a_last_turn_says_that_it_is_still_taken(tokenizer: Any) -> None:
    script = [asks("repeat", text="a") + END, asks("submit", answer="3") + END]
    t, asked = await run(tokenizer, script, max_turns=2, final_turn_without_tools=True)
    assert asked == ["3"]
    note = "Give your final answer now. A call of 'submit' is still taken."
    assert note in tokenizer.decode(t.input_ids)


async def test_a_failure_of_the_machinery_beside_it_masks_the_trajectory(tokenizer: Any) -> None:
    t, asked = await run(tokenizer, [asks("flaky") + "\n" + asks("submit", answer="3") + END])
    assert (t.end_reason, t.masked, asked) == (EndReason.TOOL_FAILURE, True, [])
