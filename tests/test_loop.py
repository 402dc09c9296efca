"""The state machine, through the scripted engine, real tools and a real tokenizer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pydantic import BaseModel, Field

from agentloop.chat import HermesParser, load_renderer
from agentloop.config import Deadlines, LoopConfig, OnCutoff
from agentloop.engines.base import Sampling
from agentloop.engines.scripted import ScriptedEngine, ScriptedTurn
from agentloop.errors import LedgerError, ToolInfraError
from agentloop.journal.base import NullRecorder
from agentloop.loop import TRANSITIONS, AgentLoop, derive_seed, print_transitions, transition
from agentloop.rollout import Rollout
from agentloop.tools import BaseTool, ToolRegistry, ToolResult
from agentloop.trajectory import CallStatus, EndReason, Origin, Reward, Sample, State, StopReason, Trajectory, Turn

END = "<|im_end|>"
SAMPLE = Sample(messages=[{"role": "user", "content": "What is 1 plus 2?"}], uid="u", ground_truth="3")


def call(value: Any = 1, name: str = "probe") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps({"a": value})}}}\n</tool_call>'


class Probe(BaseTool):
    """Counts its life, keeps state across turns, and misbehaves on request."""

    name = "probe"
    description = "Adds to a running sum."

    class Arguments(BaseModel):
        a: int = Field(description="what to add")

    def __init__(self, **behaviour: Any) -> None:
        super().__init__()
        self.behaviour = behaviour
        self.log: list[str] = []
        self.sums: dict[str, int] = {}

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> Any:
        created = await super().create(instance_id, **kwargs)
        self.sums[created[0]] = 0
        self.log.append("create")
        if self.behaviour.get("create_fails"):
            raise ToolInfraError("no place for another probe")
        return created

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
        self.log.append(f"execute {parameters['a']}")
        if self.behaviour.get("hangs"):
            await asyncio.sleep(3600)
        if self.behaviour.get("infra"):
            raise ToolInfraError("the machine is gone")
        if self.behaviour.get("raises"):
            raise ValueError("bad luck")
        self.sums[instance_id] += parameters["a"]
        text = self.behaviour.get("text", f"sum {self.sums[instance_id]}")
        return ToolResult(text, reward=0.25)

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        self.log.append("calc_reward")
        return 1.0

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self.log.append("release")
        if self.behaviour.get("release_raises"):
            raise RuntimeError("release failed")
        if self.behaviour.get("release_hangs"):
            await asyncio.sleep(3600)


async def answer_is_right(trajectory: Trajectory, sample: Sample, text: str) -> Reward:
    return Reward(float(str(sample.ground_truth) in text), {"right": float(str(sample.ground_truth) in text)})


class Setup:
    """One loop with its parts, for a list of scripted turns."""

    def __init__(self, tokenizer: Any, script: Any, *tools: Any, policies: dict[str, Any] | None = None, **loop: Any) -> None:
        self.tokenizer = tokenizer
        self.renderer = load_renderer(tokenizer)
        self.engine = ScriptedEngine(script, encode=self.encode, record="ids")
        self.tools = tools or (Probe(),)
        registry = ToolRegistry.from_tools([*self.tools], policies={"probe": policies} if policies else None)
        settings = {"config": LoopConfig(max_response_tokens=2048), "reward": answer_is_right, **loop}
        self.loop = AgentLoop(self.engine, self.renderer, HermesParser(self.renderer), tools=registry, **settings)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def run(self, **options: Any) -> Any:
        return self.loop.run(SAMPLE, **options)

    def text(self, trajectory: Trajectory) -> str:
        return str(self.tokenizer.decode(trajectory.response_ids))


def observations(setup: Setup, trajectory: Trajectory) -> str:
    return "".join(setup.tokenizer.decode(list(s.ids)) for s in trajectory.segments if s.origin is Origin.OBSERVATION)


# -- what verl's ToolAgentLoop gets wrong, and ours right, point by point ---------------------------------------------


async def test_point_01_an_empty_first_turn_leaves_the_prompt_a_prompt(tokenizer: Any) -> None:
    setup = Setup(tokenizer, [ScriptedTurn(ids=())])
    t = await setup.run()
    assert t.prompt_ids == setup.renderer.prompt(SAMPLE.messages, setup.loop.tools.session(SAMPLE, "x").schemas)
    assert t.response_ids == [] and t.response_mask == []
    assert (t.end_reason, t.masked, t.reward) == (EndReason.ENGINE_FAILURE, True, None)


async def test_point_02_a_malformed_call_is_told_to_the_model_and_never_a_final_answer(tokenizer: Any) -> None:
    bad = '<tool_call>\n{"name": "probe", "arguments": {"a": 1}\n</tool_call>' + END
    setup = Setup(tokenizer, [bad, call(3) + END, "The answer is 3" + END])
    t = await setup.run()
    assert t.turns[0].parse_errors and "JSON" in t.turns[0].parse_errors[0]
    assert t.turns[0].parse_errors[0] in observations(setup, t)
    assert t.end_reason is EndReason.FINAL_ANSWER and len(t.turns) == 3
    ends = Setup(tokenizer, [bad], config=LoopConfig(on_parse_failure="end"))
    assert (await ends.run()).end_reason is EndReason.PARSE_FAILURE
    stubborn = Setup(tokenizer, [bad] * 9, config=LoopConfig(max_parse_failures=3))
    t = await stubborn.run()
    assert t.end_reason is EndReason.PARSE_FAILURE and len(t.turns) == 3


async def test_point_03_a_call_inside_think_is_not_run(tokenizer: Any) -> None:
    probe = Probe()
    t = await Setup(tokenizer, [f"<think>maybe {call()} no</think>The answer is 3.{END}"], probe).run()
    assert not any(entry.startswith("execute") for entry in probe.log)
    assert t.end_reason is EndReason.FINAL_ANSWER and t.reward.value == 1.0


async def test_point_04_every_parallel_call_is_run_and_those_over_the_limit_are_answered(tokenizer: Any) -> None:
    probe = Probe()
    script = [call(1) + "\n" + call(2) + "\n" + call(3) + END, "ok" + END]
    t = await Setup(tokenizer, script, probe).run()
    assert sorted(entry for entry in probe.log if entry.startswith("execute")) == ["execute 1", "execute 2", "execute 3"]
    setup = Setup(tokenizer, script, config=LoopConfig(max_parallel_calls=2))
    t = await setup.run()
    assert [record.status for record in t.turns[0].calls] == [CallStatus.OK, CallStatus.OK, CallStatus.NOT_RUN]
    assert [record.call.arguments for record in t.turns[0].calls] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert "not run: limit" in observations(setup, t)


async def test_point_05_a_tool_lives_as_long_as_its_trajectory(tokenizer: Any) -> None:
    probe = Probe()
    setup = Setup(tokenizer, [call(1) + END, call(2) + END, "ok" + END], probe)
    t = await setup.run()
    assert probe.log == ["create", "execute 1", "execute 2", "calc_reward", "release"]
    assert [record.text for record in t.calls] == ["sum 1", "sum 3"]


async def test_point_06_a_result_that_does_not_fit_is_cut_in_tokens_and_says_so(tokenizer: Any) -> None:
    probe = Probe(text="7" * 1500)
    setup = Setup(tokenizer, [call() + END, "ok" + END], probe, config=LoopConfig(max_response_tokens=300))
    t = await setup.run()
    assert t.end_reason is EndReason.FINAL_ANSWER and t.response_len <= 300
    assert t.turns[0].calls[0].cut_tokens > 0
    assert "tokens left out" in observations(setup, t)


async def test_point_06_an_answer_that_leaves_no_room_at_all_ends_as_token_limit(tokenizer: Any) -> None:
    room = len(tokenizer.encode(call() + END)) + 10
    setup = Setup(tokenizer, [call() + END], config=LoopConfig(max_response_tokens=room))
    t = await setup.run()
    assert t.end_reason is EndReason.TOKEN_LIMIT and t.response_len <= room
    assert len(list(t.calls)) == 1  # it ran, and the record says so


async def test_long_answers_share_the_room_and_the_record_says_what_the_model_saw(tokenizer: Any) -> None:
    probe = Probe(text="7" * 1500)
    config = LoopConfig(max_response_tokens=900, max_turns=2, final_turn_without_tools=True)
    script = [call(1) + call(2) + call("x") + END, "The answer is 3" + END]
    setup = Setup(tokenizer, script, probe, config=config)
    t = await setup.run()
    assert t.end_reason is EndReason.FINAL_ANSWER and t.response_len <= 900
    first, second, refused = t.turns[0].calls
    seen = observations(setup, t)
    for record in (first, second):
        assert f"[… {record.cut_tokens} tokens left out …]" in record.text and record.text in seen
    assert abs(len(first.text) - len(second.text)) < 10 and len(first.text) > 100
    assert refused.cut_tokens == 0 and refused.text in seen  # short enough to stay whole
    assert seen.endswith(config.final_turn_note)


async def test_a_huge_answer_is_cut_like_any_other(tokenizer: Any) -> None:
    probe = Probe(text="7é🙂 " * 30_000)
    setup = Setup(tokenizer, [call() + END, "ok" + END], probe, config=LoopConfig(max_response_tokens=500))
    t = await setup.run()
    assert t.end_reason is EndReason.FINAL_ANSWER and t.response_len <= 500
    assert t.turns[0].calls[0].cut_tokens > 100_000


@pytest.mark.parametrize("fault", ["release_raises", "release_hangs"])
async def test_point_07_a_failing_release_changes_nothing(tokenizer: Any, fault: str) -> None:
    config = LoopConfig(deadlines=Deadlines(release_s=0.05))
    t = await Setup(tokenizer, ["The answer is 3" + END], Probe(**{fault: True}), config=config).run()
    assert (t.state, t.reward.value) == (State.DONE, 1.0)


async def test_point_08_tools_have_timeouts_and_the_model_is_told(tokenizer: Any) -> None:
    setup = Setup(tokenizer, [call() + END, "ok" + END], Probe(hangs=True), policies={"timeout": 0.05})
    t = await setup.run()
    assert t.turns[0].calls[0].status is CallStatus.TIMEOUT and t.end_reason is EndReason.FINAL_ANSWER
    config = LoopConfig(deadlines=Deadlines(tools_s=0.05))
    t = await Setup(tokenizer, [call() + END, "ok" + END], Probe(hangs=True), config=config).run()
    assert t.turns[0].calls[0].status is CallStatus.TIMEOUT and t.end_reason is EndReason.FINAL_ANSWER


async def test_point_08_a_generation_and_a_trajectory_have_deadlines(tokenizer: Any) -> None:
    for deadlines in (Deadlines(generate_s=0.05), Deadlines(trajectory_s=0.05)):
        setup = Setup(tokenizer, [ScriptedTurn(text="x", delay_s=60)], config=LoopConfig(deadlines=deadlines))
        t = await setup.run()
        assert (t.end_reason, t.masked, t.state) == (EndReason.DEADLINE, True, State.FAILED)
        assert setup.engine.in_flight == 0
    config = LoopConfig(deadlines=Deadlines(trajectory_s=0.05))
    probe = Probe(hangs=True)
    slow = ScriptedTurn(text="x", delay_s=60)
    t = await Setup(tokenizer, [call() + END, slow], probe, config=config).run()
    assert t.end_reason is EndReason.DEADLINE and probe.log[-1] == "release"


async def test_point_08_tools_are_retried_and_capped(tokenizer: Any) -> None:
    probe = Probe(raises=True)
    policies = {"retries": 2, "on_error": "retry", "max_concurrency": 1}
    t = await Setup(tokenizer, [call() + END, "ok" + END], probe, policies=policies).run()
    assert probe.log.count("execute 1") == 3 and t.turns[0].calls[0].attempts == 3


async def test_point_09_every_turn_keeps_its_stop_reason(tokenizer: Any) -> None:
    cut = ScriptedTurn(text="The answer is 3 and", stop_reason=StopReason.LENGTH)
    t = await Setup(tokenizer, [call() + END, cut]).run()
    assert [turn.stop_reason for turn in t.turns] == [StopReason.STOP, StopReason.LENGTH]
    assert t.end_reason is EndReason.TOKEN_LIMIT  # a cut-off one is never mistaken for a finished one


async def test_point_10_a_cut_turn_is_closed_before_anything_follows(tokenizer: Any) -> None:
    setup = Setup(tokenizer, [ScriptedTurn(text="a " + call(), stop_reason=StopReason.LENGTH), "ok" + END])
    t = await setup.run()
    assert t.turns[0].closed_by_template and not t.turns[1].closed_by_template
    assert setup.text(t).startswith("a " + call() + END + "\n<|im_start|>user")
    closing = t.segments[2]
    assert closing.origin is Origin.TEMPLATE and closing.ids[0] == tokenizer.eos_token_id


async def test_point_11_a_turn_has_a_token_budget_of_its_own(tokenizer: Any) -> None:
    setup = Setup(tokenizer, ["word " * 100 + END], config=LoopConfig(max_turn_tokens=7, max_response_tokens=500))
    t = await setup.run(sampling=Sampling(max_tokens=1000))
    assert setup.engine.calls[0].sampling.max_tokens == 7 and t.sampled_len == 7
    assert t.end_reason is EndReason.TOKEN_LIMIT


async def test_point_12_at_the_turn_limit_the_last_call_is_run_and_answered(tokenizer: Any) -> None:
    probe = Probe()
    setup = Setup(tokenizer, [call(1) + END, call(5) + END, "never"], probe, config=LoopConfig(max_turns=2))
    t = await setup.run()
    assert "execute 5" in probe.log and "sum 6" in observations(setup, t)
    assert t.end_reason is EndReason.TURN_LIMIT and len(t.turns) == 2


async def test_point_12_the_last_turn_can_be_kept_for_the_answer(tokenizer: Any) -> None:
    config = LoopConfig(max_turns=2, final_turn_without_tools=True)
    setup = Setup(tokenizer, [call(1) + END, "The answer is 3" + END], config=config)
    t = await setup.run()
    assert config.final_turn_note in observations(setup, t)
    assert t.end_reason is EndReason.FINAL_ANSWER and t.reward.value == 1.0
    probe = Probe()
    t = await Setup(tokenizer, [call(1) + END, call(5) + END], probe, config=config).run()
    assert "execute 5" not in probe.log and t.turns[1].calls[0].status is CallStatus.NOT_RUN
    assert t.end_reason is EndReason.TURN_LIMIT


async def test_point_13_the_tools_rewards_reach_the_reward(tokenizer: Any) -> None:
    script = [call(1) + END, call(2) + END, "The answer is 3" + END]
    t = await Setup(tokenizer, script).run()
    assert t.reward.value == 1.0  # recorded, not added, unless asked for
    assert t.reward.components == {"right": 1.0, "tool/probe": 1.5}
    assert [record.reward for record in t.calls] == [0.25, 0.25]
    t = await Setup(tokenizer, script, config=LoopConfig(tool_rewards="add")).run()
    assert t.reward.value == 2.5


async def test_point_14_arguments_are_checked_before_the_tool_sees_them(tokenizer: Any) -> None:
    probe = Probe()
    listed = '<tool_call>\n{"name": "probe", "arguments": [1, 2]}\n</tool_call>' + END
    t = await Setup(tokenizer, [listed, call("x") + END, "ok" + END], probe).run()
    assert not any(entry.startswith("execute") for entry in probe.log)
    problems = [*t.turns[0].parse_errors, *(record.text for record in t.calls)]
    assert len(problems) == 2 and t.turns[1].calls[0].status is CallStatus.INVALID_ARGUMENTS


async def test_point_15_every_sibling_of_a_group_carries_its_own_reward(tokenizer: Any) -> None:
    setup = Setup(tokenizer, lambda ids, sampling, key: ("The answer is 3" if key.endswith("1") else "no idea") + END)
    group = await Rollout(setup.loop).group(SAMPLE, 3)
    assert [t.reward.value for t in group] == [0.0, 1.0, 0.0]


async def test_point_16_one_failed_sibling_never_fails_its_group(tokenizer: Any) -> None:
    def script(ids: Any, sampling: Any, key: str) -> Any:
        return ScriptedTurn(error="the replica died") if key.endswith("_1") else "The answer is 3" + END

    group = await Rollout(Setup(tokenizer, script).loop).group(SAMPLE, 4)
    assert [t.end_reason for t in group] == [
        EndReason.FINAL_ANSWER,
        EndReason.ENGINE_FAILURE,
        EndReason.FINAL_ANSWER,
        EndReason.FINAL_ANSWER,
    ]
    assert [t.masked for t in group] == [False, True, False, False]
    assert group[1].error == "the replica died"


async def test_point_17_everything_is_told_to_the_recorder_as_it_happens(tokenizer: Any) -> None:
    seen: list[Any] = []

    class Recorder(NullRecorder):
        def trajectory_start(self, trajectory: Trajectory) -> None:
            seen.append("start")

        def turn(self, trajectory: Trajectory, turn: Turn) -> None:
            seen.append(("turn", turn.index, turn.weight_version, turn.generate_s > 0))

        def tool(self, trajectory: Trajectory, turn: Turn, record: Any) -> None:
            seen.append(("tool", record.call.id, record.status))

        def observation(self, trajectory: Trajectory, turn: Turn) -> None:
            seen.append(("observation", turn.index))

        def trajectory_end(self, trajectory: Trajectory) -> None:
            seen.append(("end", trajectory.end_reason, trajectory.reward.value, trajectory.total_s > 0))

    await Setup(tokenizer, [call() + END, "The answer is 3" + END], recorder=Recorder()).run()
    assert seen == [
        "start",
        ("turn", 0, 0, True),
        ("tool", "t0000c000", CallStatus.OK),
        ("observation", 0),
        ("turn", 1, 0, True),
        ("end", EndReason.FINAL_ANSWER, 1.0, True),
    ]


async def test_point_18_an_overlong_prompt_is_never_cut(tokenizer: Any) -> None:
    setup = Setup(tokenizer, ["ok" + END], config=LoopConfig(max_prompt_tokens=10))
    t = await setup.run()
    assert t.end_reason is EndReason.TOKEN_LIMIT and "max_prompt_tokens is 10" in t.error
    assert t.prompt_len > 10 and setup.engine.calls == []
    assert t.masked  # nothing was sampled, so there is nothing to train


async def test_point_19_the_stream_equals_the_full_render(tokenizer: Any) -> None:
    setup = Setup(tokenizer, [call(1) + END, call(2) + END, "The answer is 3" + END])
    t = await setup.run()
    schemas = setup.loop.tools.session(SAMPLE, "x").schemas
    messages = list(SAMPLE.messages)
    for value, result in ((1, "sum 1"), (2, "sum 3")):
        asked = {"type": "function", "function": {"name": "probe", "arguments": {"a": value}}}
        messages += [{"role": "assistant", "content": "", "tool_calls": [asked]}, {"role": "tool", "content": result}]
    messages.append({"role": "assistant", "content": "The answer is 3"})
    render = tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False)
    stream = tokenizer.decode(t.input_ids)
    assert stream.replace("\n<tool_call>", "<tool_call>") + "\n" == render.replace("\n<tool_call>", "<tool_call>")
    t.check()


# -- the engine's input ----------------------------------------------------------------------------------------------


async def test_each_turn_starts_with_exactly_the_tokens_of_the_last(tokenizer: Any) -> None:
    setup = Setup(tokenizer, [call(i) + END for i in range(8)] + ["ok" + END])
    t = await setup.run()
    inputs = [list(asked.ids) for asked in setup.engine.calls]
    for before, after, turn in zip(inputs, inputs[1:], t.turns, strict=False):
        assert after[: turn.end] == t.input_ids[: turn.end] and after[: len(before)] == before
    t.check_prefix(t.input_ids)
    with pytest.raises(LedgerError, match="differs at token 3"):
        t.check_prefix([*t.input_ids[:3], 999, *t.input_ids[4:]])


async def test_an_aborted_generation_goes_on_from_its_tokens(tokenizer: Any) -> None:
    half = ScriptedTurn(text="The answer", stop_reason=StopReason.ABORTED, weight_version=4)
    setup = Setup(tokenizer, [half, ScriptedTurn(text=" is 3" + END, weight_version=5)])
    t = await setup.run()
    assert len(t.turns) == 1 and setup.text(t) == "The answer is 3" + END
    assert (t.turns[0].min_weight_version, t.turns[0].weight_version) == (4, 5)
    (old, before), (new, after) = t.turns[0].versions
    assert (old, new, before + after) == (4, 5, t.response_len)
    assert len(t.rollout_log_probs) == t.response_len
    first, second = setup.engine.calls
    assert first.input_length + before == second.input_length
    assert first.sampling.seed != second.sampling.seed  # an engine would repeat its random numbers
    stuck = Setup(tokenizer, lambda *_: ScriptedTurn(stop_reason=StopReason.ABORTED))
    assert (await stuck.run()).end_reason is EndReason.ENGINE_FAILURE


async def test_seeds_come_from_what_a_request_is_for(tokenizer: Any) -> None:
    async def seeds(seed: int) -> list[int | None]:
        setup = Setup(tokenizer, [call() + END, "ok" + END], seed=seed)
        await Rollout(setup.loop).group(SAMPLE, 3)
        return sorted((c.sampling.seed for c in setup.engine.calls), key=str)

    assert await seeds(7) == await seeds(7)
    assert len(set(await seeds(7))) == 6 and set(await seeds(7)).isdisjoint(await seeds(8))
    assert 0 <= derive_seed(0, "k", 1, 0, 2) < 2**31


# -- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "value", "masked"), [("score", 0.0, False), ("penalty", -1.0, False), ("mask", None, True)])
async def test_on_cutoff(tokenizer: Any, action: Any, value: float | None, masked: bool) -> None:
    config = LoopConfig(max_turns=1, on_cutoff=OnCutoff(turn_limit=action), penalty=-1.0)
    t = await Setup(tokenizer, [call() + END], config=config).run()
    assert (t.end_reason, t.masked) == (EndReason.TURN_LIMIT, masked)
    assert (t.reward.value if t.reward else None) == value


async def test_a_broken_machine_is_never_reward_0(tokenizer: Any) -> None:
    for broken in (Probe(infra=True), Probe(create_fails=True)):
        t = await Setup(tokenizer, [call() + END, "ok" + END], broken).run()
        assert (t.end_reason, t.masked, t.reward, t.state) == (EndReason.TOOL_FAILURE, True, None, State.FAILED)


async def test_a_failing_tool_can_drop_or_resample_its_sample(tokenizer: Any) -> None:
    t = await Setup(tokenizer, [call() + END], Probe(raises=True), policies={"on_error": "drop_sample"}).run()
    assert t.end_reason is EndReason.TOOL_FAILURE and "bad luck" in t.error
    probe = Probe(raises=True)
    t = await Setup(tokenizer, [call() + END], probe, policies={"on_error": "resample"}).run()
    assert t.attempt == 1 and probe.log.count("create") == probe.log.count("release") == 2
    assert t.end_reason is EndReason.TOOL_FAILURE


@pytest.mark.parametrize("on_error", ["observe", "retry", "drop_sample", "resample"])
async def test_a_tool_that_runs_into_the_trajectorys_deadline_ends_it_as_that(tokenizer: Any, on_error: str) -> None:
    config = LoopConfig(deadlines=Deadlines(trajectory_s=0.2))
    probe = Probe(hangs=True)
    t = await Setup(tokenizer, [call() + END, "ok" + END], probe, policies={"on_error": on_error}, config=config).run()
    assert t.end_reason is EndReason.DEADLINE and "the trajectory's deadline passed in the tool calls of turn 0" in t.error
    assert (t.attempt, t.masked, t.turns[0].calls[0].status) == (0, True, CallStatus.TIMEOUT)
    assert probe.log == ["create", "execute 1", "release"]


@pytest.mark.parametrize("own", [{"timeout": 0.05}, {}])
async def test_a_tools_own_timeout_is_the_tools_failure(tokenizer: Any, own: dict[str, float]) -> None:
    config = LoopConfig(deadlines=Deadlines(trajectory_s=60, tools_s=60 if own else 0.05))
    policies = {"on_error": "drop_sample", **own}
    t = await Setup(tokenizer, [call() + END], Probe(hangs=True), policies=policies, config=config).run()
    assert t.end_reason is EndReason.TOOL_FAILURE and "timeout" in t.error


async def test_a_failing_reward_is_not_a_reward(tokenizer: Any) -> None:
    async def broken(trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        raise RuntimeError("grader down")

    t = await Setup(tokenizer, ["ok" + END], reward=broken).run()
    assert (t.state, t.masked, t.reward) == (State.FAILED, True, None)
    assert t.end_reason is EndReason.FINAL_ANSWER and "grader down" in t.error

    async def slow(trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        await asyncio.sleep(3600)
        return Reward(1.0)

    config = LoopConfig(deadlines=Deadlines(score_s=0.05))
    t = await Setup(tokenizer, ["ok" + END], reward=slow, config=config).run()
    assert t.masked and "deadline" in t.error


@pytest.mark.parametrize("answer", [Reward(float("nan")), Reward(float("inf")), 1.0, None])
async def test_a_reward_that_is_none_is_not_trained_on(tokenizer: Any, answer: Any) -> None:
    async def broken(trajectory: Trajectory, sample: Sample, text: str) -> Any:
        return answer

    t = await Setup(tokenizer, ["ok" + END], reward=broken).run()
    assert (t.state, t.masked, t.reward) == (State.FAILED, True, None)
    assert "the reward failed" in t.error


async def test_without_a_reward_function_the_tools_rewards_do_not_score(tokenizer: Any) -> None:
    t = await Setup(tokenizer, [call() + END, "ok" + END], reward=None).run()
    assert (t.state, t.masked, t.reward) == (State.DONE, False, None)
    t = await Setup(tokenizer, [call() + END, "ok" + END], reward=None, config=LoopConfig(tool_rewards="add")).run()
    assert t.reward.value == 1.25

    class Worthless(Probe):
        async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
            return 0.0

    t = await Setup(tokenizer, ["ok" + END], Worthless(), reward=None, config=LoopConfig(tool_rewards="add")).run()
    assert t.reward == Reward(0.0), "tools that gave nothing sum up to 0"


async def test_an_attempt_that_is_started_anew_is_not_scored(tokenizer: Any) -> None:
    ended: list[Trajectory] = []

    class Recorder(NullRecorder):
        def trajectory_end(self, trajectory: Trajectory) -> None:
            ended.append(trajectory)

    config = LoopConfig(on_cutoff=OnCutoff(tool_failure="score"))
    policies = {"on_error": "resample"}
    setup = Setup(tokenizer, [call() + END], Probe(raises=True), policies=policies, config=config, recorder=Recorder())
    t = await setup.run()
    assert [(one.id, one.masked, one.reward is None) for one in ended] == [("u_0", True, True), ("u_0_r1", False, False)]
    assert t is ended[1]


async def test_calls_beside_the_malformed_one_that_ends_it_are_in_the_record(tokenizer: Any) -> None:
    probe = Probe()
    script = [call(1) + '<tool_call>\n{"name": "probe"}\n</tool_call>' + END]
    t = await Setup(tokenizer, script, probe, config=LoopConfig(on_parse_failure="end")).run()
    assert t.end_reason is EndReason.PARSE_FAILURE and "execute 1" not in probe.log
    assert [record.status for record in t.turns[0].calls] == [CallStatus.NOT_RUN]


async def test_a_timeout_of_the_engines_own_is_a_failure_of_the_engine(tokenizer: Any) -> None:
    setup = Setup(tokenizer, ["ok" + END])

    async def generate(*args: Any, **kwargs: Any) -> Any:
        raise TimeoutError("no answer from the server")

    setup.engine.generate = generate  # type: ignore[method-assign]
    t = await setup.run()
    assert t.end_reason is EndReason.ENGINE_FAILURE and "no answer from the server" in t.error


async def test_a_bug_in_one_of_several_calls_travels_up_as_it_is(tokenizer: Any) -> None:
    class Recorder(NullRecorder):
        def tool(self, trajectory: Trajectory, turn: Turn, record: Any) -> None:
            raise LedgerError("a bug")

    with pytest.raises(LedgerError, match="a bug"):
        await Setup(tokenizer, [call(1) + call(2) + END], recorder=Recorder()).run()


# -- cancellation and bookkeeping -------------------------------------------------------------------------------------


async def test_calls_that_are_cancelled_are_in_the_record(tokenizer: Any) -> None:
    probe = Probe(hangs=True)
    ended: list[Trajectory] = []

    class Recorder(NullRecorder):
        def trajectory_end(self, trajectory: Trajectory) -> None:
            ended.append(trajectory)

    setup = Setup(tokenizer, [call(1) + call("x") + call(2) + END], probe, recorder=Recorder())
    running = asyncio.create_task(setup.run())
    while len(probe.log) < 3:  # noqa: ASYNC110  create and two calls
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    (t,) = ended
    statuses = [CallStatus.CANCELLED, CallStatus.INVALID_ARGUMENTS, CallStatus.CANCELLED]
    assert [record.status for record in t.turns[0].calls] == statuses and t.turns[0].tools_s > 0
    assert probe.log[-1] == "release"


async def test_cancelling_releases_everything(tokenizer: Any) -> None:
    ended: list[Trajectory] = []

    class Recorder(NullRecorder):
        def trajectory_end(self, trajectory: Trajectory) -> None:
            ended.append(trajectory)

    probe = Probe()
    setup = Setup(tokenizer, [call() + END, ScriptedTurn(text="x", delay_s=60)], probe, recorder=Recorder())
    rollout = Rollout(setup.loop)
    group = asyncio.create_task(rollout.group(SAMPLE, 4))
    while setup.engine.in_flight < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await rollout.cancel() == 4
    with pytest.raises(asyncio.CancelledError):
        await group
    assert setup.engine.in_flight == 0 and probe.log.count("release") == 4
    assert [(t.state, t.end_reason, t.masked) for t in ended] == [(State.ABORTED, EndReason.ABORTED, True)] * 4


async def test_a_cancelled_error_that_nobody_asked_for_is_a_failure_of_who_raises_it(tokenizer: Any) -> None:
    class Cancels(ScriptedEngine):
        async def generate(self, ids: Any, sampling: Sampling, *, trajectory_id: str) -> Any:
            if trajectory_id.endswith("_1"):
                raise asyncio.CancelledError
            return await super().generate(ids, sampling, trajectory_id=trajectory_id)

    async def reward(trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        if trajectory.sibling == 2:
            raise asyncio.CancelledError
        return Reward(1.0)

    setup = Setup(tokenizer, ["ok" + END], reward=reward)
    setup.loop.engine = Cancels(["ok" + END], encode=setup.encode)
    group = await Rollout(setup.loop).group(SAMPLE, 4)
    assert [t.masked for t in group] == [False, True, True, False]
    assert (group[1].end_reason, group[1].error) == (EndReason.ENGINE_FAILURE, "the engine cancelled the request")
    assert (group[2].state, group[2].reward) == (State.FAILED, None) and "CancelledError" in str(group[2].error)


async def test_an_engine_that_changes_the_tokens_that_it_was_given_is_found_out(tokenizer: Any) -> None:
    class Overwrites(ScriptedEngine):
        async def generate(self, ids: Any, sampling: Sampling, *, trajectory_id: str) -> Any:
            ids[0] += 1
            return await super().generate(ids, sampling, trajectory_id=trajectory_id)

    setup = Setup(tokenizer, ["ok" + END])
    setup.loop.engine = Overwrites(["ok" + END], encode=setup.encode)
    with pytest.raises(LedgerError, match="token buffer differs"):
        await setup.run()


async def test_the_concurrency_limit_holds(tokenizer: Any) -> None:
    most = 0

    def script(ids: Any, sampling: Any, key: str) -> Any:
        nonlocal most
        most = max(most, setup.engine.in_flight + 1)
        return ScriptedTurn(text="ok" + END, delay_s=0.01)

    setup = Setup(tokenizer, script)
    samples = [Sample(messages=SAMPLE.messages, uid=f"u{i}") for i in range(4)]
    groups = await Rollout(setup.loop, max_concurrency=3).run(samples, 4)
    assert [len(group) for group in groups] == [4] * 4 and most == 3
    assert [t.id for t in groups[2]] == ["u2_0", "u2_1", "u2_2", "u2_3"]


async def test_groups_stream_as_they_end(tokenizer: Any) -> None:
    def script(ids: Any, sampling: Any, key: str) -> Any:
        return ScriptedTurn(text="ok" + END, delay_s=0.3 if "slow" in key else 0.0)

    setup = Setup(tokenizer, script)
    samples = [Sample(messages=SAMPLE.messages, uid=uid) for uid in ("slow", "quick")]
    assert [group[0].sample.uid async for group in Rollout(setup.loop).stream(samples)] == ["quick", "slow"]


def test_the_table_of_transitions_holds() -> None:
    live = [state for state, after in TRANSITIONS.items() if after]
    assert all(State.FAILED in TRANSITIONS[state] and State.ABORTED in TRANSITIONS[state] for state in live)
    assert "calling_tools  -> generating" in print_transitions()
    with pytest.raises(RuntimeError, match="no way from pending to done"):
        transition(Trajectory(SAMPLE), State.DONE)
