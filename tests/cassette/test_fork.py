"""A conversation that goes on otherwise from one of its turns: what is before stays token for token."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from agentloop.cassette import CassetteMismatch, fork, forks
from agentloop.cassette.forking import ToolState
from agentloop.chat import HermesParser, load_renderer
from agentloop.config import LoopConfig
from agentloop.engines.base import Sampling
from agentloop.engines.scripted import ScriptedEngine, ScriptedTurn
from agentloop.errors import ConfigError
from agentloop.journal import JournalWriter, Run, token_bytes
from agentloop.loop import AgentLoop
from agentloop.tools import BaseTool, ToolRegistry, ToolResult
from agentloop.trajectory import CallStatus, EndReason, Origin, Reward, Sample, Trajectory
from tests.cassette.rollouts import END, Parts, called, record, samples

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
SAMPLING = Sampling(max_tokens=300, temperature=0.9)
ASKED = [replace(samples(1)[0], tools_kwargs={})]


class Ledger(BaseTool):
    """Books what it is told; it remembers, and the world outside sees each entry."""

    name = "ledger"

    def __init__(self) -> None:
        self.world: list[int] = []
        super().__init__(tool_schema={"type": "function", "function": {
            "name": "ledger", "description": "Books a number.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}})  # fmt: skip

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> Any:
        created = await super().create(instance_id)
        self.instances[created[0]] = 0
        return created

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
        self.world.append(parameters["a"])
        self.instances[instance_id] += parameters["a"]
        return ToolResult(f"balance {self.instances[instance_id]}", reward=0.5)


class Books:
    """Three bookings and an answer, recorded."""

    def __init__(self, tokenizer: Any, path: Path) -> None:
        self.parts, self.path = Parts(tokenizer), path
        self.tool = Ledger()
        script = [*(called("ledger", a=a) + END for a in (1, 20, 300)), "balance 321" + END]
        with self.parts.writer(path) as writer:
            loop = self.loop(script, recorder=writer)
            self.parent: Trajectory = asyncio.run(record(loop, ASKED, 2, sampling=SAMPLING))[1]
        self.tool.world.clear()

    def loop(self, script: list[Any], **options: Any) -> AgentLoop:
        async def reward(trajectory: Trajectory, sample: Sample, text: str) -> Reward:
            return Reward(float(text.split()[-1]))

        engine = ScriptedEngine(script, encode=self.parts.encode, record="ids", log_prob=-0.25, weight_version=9)
        tools = ToolRegistry.from_tools([self.tool])
        return self.parts.loop(engine, **{"tools": tools, "reward": reward, "config": LoopConfig(), **options})


@pytest.fixture
def books(tokenizer: Any, tmp_path: Path) -> Books:
    return Books(tokenizer, tmp_path / "run")


def text(books: Books, trajectory: Trajectory) -> str:
    return books.parts.renderer.decode(trajectory.input_ids)


async def test_another_tool_result(books: Books) -> None:
    loop = books.loop(["so it is 99" + END])
    made = await fork(books.path, "s0_1", loop=loop, turn=1, tool_result="balance 99", n=3)
    parent = books.parent
    shared = parent.turns[1].end
    assert made.shared_tokens == shared and made.turn == 2
    assert len(made.trajectories) == 3
    for ended in made.trajectories:
        assert ended.input_ids[:shared] == parent.input_ids[:shared], "token for token"
        assert ended.rollout_log_probs is not None and parent.rollout_log_probs is not None
        place = slice(0, shared - parent.prompt_len)
        assert ended.rollout_log_probs[place] == parent.rollout_log_probs[place]
        assert [turn.versions for turn in ended.turns[:2]] == [turn.versions for turn in parent.turns[:2]]
        assert [record.text for record in ended.calls] == ["balance 1", "balance 99"]
        assert ended.turns[2].weight_version == 9 and ended.end_reason is EndReason.FINAL_ANSWER
        assert ended.reward is not None and ended.reward.value == 99.0
        ended.check()
    engine = loop.engine
    assert isinstance(engine, ScriptedEngine) and {call.turn for call in engine.calls} == {0}
    asked = engine.calls[0].ids
    assert asked is not None and list(asked[:shared]) == parent.input_ids[:shared]
    assert "balance 99" in books.parts.renderer.decode(list(asked[shared:]))
    assert len({call.sampling.seed for call in engine.calls}) == 3, "each its own dice"
    assert books.tool.world == [], "nothing was booked again"


async def test_without_a_change_the_turn_is_made_anew_and_tools_know_nothing_of_before(books: Books) -> None:
    loop = books.loop([called("ledger", a=4000) + END, "balance 4" + END])
    made = await fork(books.path, "s0_1", loop=loop, turn=2)
    (ended,) = made.trajectories
    assert made.shared_tokens == books.parent.turns[2].start
    assert ended.input_ids[: made.shared_tokens] == books.parent.input_ids[: made.shared_tokens]
    assert [record.text for record in ended.calls] == ["balance 1", "balance 21", "balance 4000"], "created anew"
    assert ended.reward is not None and ended.reward.components == {"tool/ledger": 1.5}, "of earlier calls as recorded"
    assert books.tool.world == [4000]


async def test_earlier_calls_run_again_bring_the_tools_to_where_they_were(books: Books) -> None:
    loop = books.loop([called("ledger", a=4000) + END, "balance 4" + END])
    made = await fork(books.path, "s0_1", loop=loop, turn=2, tools="replay")
    (ended,) = made.trajectories
    assert [record.text for record in ended.calls] == ["balance 1", "balance 21", "balance 4021"]
    assert books.tool.world == [1, 20, 4000], "in the world outside too, which is the price"
    assert ended.reward is not None and ended.reward.components == {"tool/ledger": 1.5} and made.differences == []


async def test_what_comes_out_otherwise_is_told_and_not_shown_to_the_model(books: Books) -> None:
    class Inflated(Ledger):
        async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
            return "balance 5"

    tools = ToolRegistry.from_tools([Inflated()])
    loop = books.loop(["balance 5" + END], tools=tools)
    made = await fork(books.path, "s0_1", loop=loop, turn=1, tools="replay")
    assert [record.text for record in made.trajectories[0].calls] == ["balance 1"]
    assert made.differences == [
        "turn 0: ledger({\"a\":1}) came to ok 'balance 5' this time, and to ok 'balance 1' when it was recorded"
    ]


async def test_another_prompt_begins_anew(books: Books) -> None:
    made = await fork(books.path, "s0_1", loop=books.loop(["balance 7" + END]), prompt="How much is there?")
    (ended,) = made.trajectories
    assert made.shared_tokens == 0 and made.turn == 0
    assert "How much is there?" in text(books, ended) and "Question" not in text(books, ended)
    assert "Use tools." in text(books, ended), "only the last user message is another one"
    made = await fork(
        books.path, "s0_1", loop=books.loop(["balance 7" + END]), prompt=[{"role": "user", "content": "Just this."}]
    )
    assert "Use tools." not in text(books, made.trajectories[0])


async def test_another_message_of_the_model_and_its_calls_are_run(books: Books) -> None:
    loop = books.loop(["balance 6" + END])
    made = await fork(books.path, "s0_1", loop=loop, turn=1, message=called("ledger", a=5), tools="replay")
    (ended,) = made.trajectories
    assert made.shared_tokens == books.parent.turns[1].start
    assert ended.input_ids[: made.shared_tokens] == books.parent.input_ids[: made.shared_tokens]
    assert [record.text for record in ended.calls] == ["balance 1", "balance 6"]
    spoken = ended.input_ids[ended.turns[1].start : ended.turns[1].end]
    assert books.parts.renderer.decode(spoken) == called("ledger", a=5) + END
    assert books.parts.tokenizer.convert_tokens_to_ids("<tool_call>") in spoken, "as the model would have written it"
    assert ended.rollout_log_probs is None, "nobody sampled it"


async def test_forks_are_a_run_that_names_its_parent(books: Books) -> None:
    first = await fork(books.path, "s0_1", loop=books.loop(["balance 1" + END]), turn=1, tool_result="nothing", n=2)
    second = await fork(books.path, "s0_0", loop=books.loop(["balance 1" + END]), turn=0)
    assert [first.path.name, second.path.name] == ["0001", "0002"]
    told = first.run.meta["fork"]
    assert told == {
        "run": "../..", "partition": "train", "step": 1, "trajectory": "s0_1", "turn": 2, "tools": "record", "n": 2,
        "shared_tokens": first.shared_tokens, "edit": {"tool_result": "nothing", "call": "t0001c000"},
    }  # fmt: skip
    assert (first.path / told["run"]).resolve() == books.path.resolve()
    rows = list(first.run.trajectories())
    assert [row.id for row in rows] == list(first.ids) == ["s0-1-turn1_0", "s0-1-turn1_1"]
    assert first.run.load(rows[0]).input_ids == first.trajectories[0].input_ids and first.run.verify() == []
    assert forks(books.path) == [first, second] and forks(books.path, "s0_0") == [second]
    assert [row.id for row in Run(books.path).trajectories()] == ["s0_0", "s0_1"], "the run itself is what it was"
    again = await fork(first.run, rows[0].id, loop=books.loop(["balance 2" + END]), turn=2)
    assert again.path.parent.parent == first.path, "forks can be forked"


async def test_what_cannot_be_forked_is_one_sentence(books: Books) -> None:
    loop = books.loop(["balance 1" + END])

    async def refused(match: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            await fork(books.path, options.pop("trajectory", "s0_1"), loop=loop, **options)

    await refused("no trajectory 's0_7'; did you mean", trajectory="s0_7", turn=0)
    await refused("say from which turn; trajectory s0_1 has turns 0 to 3")
    await refused("there is no turn 7; trajectory s0_1 has turns 0 to 3, and 4 goes on after its end", turn=7)
    await refused("ends after 4 turns as final_answer, before turn 4", turn=4)
    await refused("turn 3 of trajectory s0_1 called no tool", turn=3, tool_result="x")
    await refused("turn 0 has no call '4'; its calls are 0: ledger", turn=0, tool_result="x", call=4)
    await refused("give one of tool_result and prompt", turn=0, tool_result="x", prompt="y")
    await refused("leaves no turn 2 to go on from", turn=2, prompt="y")
    await refused("tools cannot be 'replays'; did you mean 'replay'", turn=1, tools="replays")
    await refused("at least one", turn=1, n=0)
    assert forks(books.path) == [], "and leaves nothing behind"


async def test_a_changed_renderer_is_found_before_anything_goes_on(books: Books, tokenizer: Any) -> None:
    renderer = load_renderer(tokenizer, chat_template=tokenizer.chat_template.replace("# Tools", "# The tools"))
    engine = ScriptedEngine(["balance 1" + END], encode=books.parts.encode)
    tools = ToolRegistry.from_tools([books.tool])
    loop = AgentLoop(engine, renderer, HermesParser(renderer), tools=tools, config=LoopConfig())
    with pytest.raises(CassetteMismatch, match="# ⟦The⟧ tools"):
        await fork(books.path, "s0_1", loop=loop, turn=2)
    assert engine.calls == []


async def test_what_failed_or_was_cut_goes_on(tokenizer: Any, tmp_path: Path) -> None:
    """The usual reason to fork: what if that call had not failed, and what if there had been more turns."""
    parts = Parts(tokenizer)
    script = [called("moody", mood="good") + called("moody", mood="gone") + END, "good" + END]
    with parts.writer(tmp_path / "run") as writer:
        engine = ScriptedEngine(script, encode=parts.encode)
        (failed,) = await record(parts.loop(engine, recorder=writer), samples(1), 1)
    assert failed.end_reason is EndReason.TOOL_FAILURE
    loop = parts.loop(ScriptedEngine(["good" + END], encode=parts.encode))
    with pytest.raises(ConfigError, match=r"turn 0 has 2 calls; say which one by 'call': 0: moody.*1: moody"):
        await fork(tmp_path / "run", "s0_0", loop=loop, turn=0, tool_result="fine")
    made = await fork(tmp_path / "run", "s0_0", loop=loop, turn=0, tool_result="fine", call=1)
    (ended,) = made.trajectories
    kept = next(failed.calls)
    assert [(r.status, r.text) for r in ended.calls] == [(CallStatus.OK, kept.text), (CallStatus.OK, "fine")]
    assert ended.end_reason is EndReason.FINAL_ANSWER

    stubborn = ScriptedEngine([called("moody", mood="good") + END] * 9, encode=parts.encode)
    short = LoopConfig(max_turns=2)
    with parts.writer(tmp_path / "short") as writer:
        (cut,) = await record(parts.loop(stubborn, config=short, recorder=writer), samples(1), 1)
    assert cut.end_reason is EndReason.TURN_LIMIT
    loop = parts.loop(ScriptedEngine(["good" + END], encode=parts.encode), config=LoopConfig(max_turns=4))
    (ended,) = (await fork(tmp_path / "short", "s0_0", loop=loop, turn=2)).trajectories
    assert ended.end_reason is EndReason.FINAL_ANSWER and ended.input_ids[: len(cut)] == cut.input_ids

    dead = ScriptedEngine([called("moody", mood="good") + END, ScriptedTurn(error="gone")], encode=parts.encode)
    with parts.writer(tmp_path / "dead") as writer:
        (cut,) = await record(parts.loop(dead, recorder=writer), samples(1), 1)
    (ended,) = (await fork(tmp_path / "dead", "s0_0", loop=loop, turn=1)).trajectories
    assert ended.end_reason is EndReason.FINAL_ANSWER and ended.input_ids[: len(cut)] == cut.input_ids


async def test_a_python_session_is_brought_back_by_running_its_calls_again(tokenizer: Any, tmp_path: Path) -> None:
    parts = Parts(tokenizer)
    file = tmp_path / "tools.yaml"
    file.write_text("tools:\n  - {class_name: python, config: {sandbox: {kind: process}}}\n")
    try:
        tools = ToolRegistry.load(file)
    except ConfigError as error:
        pytest.skip(f"no process sandbox here: {error}")
    script = [called("python", code="x = 20 + 1\nprint(x)") + END, called("python", code="print(x)") + END, "21" + END]
    with parts.writer(tmp_path / "run") as writer:
        engine = ScriptedEngine(script, encode=parts.encode)
        loop = parts.loop(engine, tools=tools, config=LoopConfig(), reward=None, recorder=writer)
        (parent,) = await record(loop, ASKED, 1)
    if any(record.status is CallStatus.INFRA for record in parent.calls):
        pytest.skip("no process sandbox here")
    answers: dict[str, list[str]] = {}
    for state in get_args(ToolState):
        engine = ScriptedEngine([called("python", code="print(x * 2)") + END, "done" + END], encode=parts.encode)
        loop = parts.loop(engine, tools=tools, config=LoopConfig(), reward=None)
        made = await fork(tmp_path / "run", "s0_0", loop=loop, turn=1, tools=state)
        answers[state] = [record.text for record in made.trajectories[0].calls]
    assert answers["replay"] == ["21", "42"]
    assert answers["record"][0] == "21" and "NameError" in answers["record"][1]
    await tools.close()


async def test_the_local_engine_goes_on_from_a_conversation_of_its_own(tmp_path: Path) -> None:
    """A real model, its own record, and a fork with n = 4: the beginning is the parent's, what follows the model's."""
    from transformers import AutoTokenizer

    from agentloop.engines.local import LocalEngine
    from examples.quickstart.calculator_tool import Calculator as QuickstartCalculator

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    renderer = load_renderer(tokenizer)
    engine = LocalEngine.load(str(QUICKSTART / "model"))
    config = LoopConfig(max_turns=8, max_turn_tokens=64, max_response_tokens=384)

    def loop(**options: Any) -> AgentLoop:
        tools = ToolRegistry.from_tools([QuickstartCalculator()])
        return AgentLoop(engine, renderer, HermesParser(renderer), tools=tools, config=config, **options)

    question = [{"role": "user", "content": "Compute ((17 + 28) * 3) - 9."}]
    with JournalWriter(tmp_path / "run", decode=token_bytes(tokenizer), meta={}) as writer:
        own = [Sample(messages=question, uid="q")]
        parents = await record(loop(recorder=writer), own, 8, sampling=Sampling(max_tokens=64))
    parent = next(t for t in parents if t.turns[0].calls and t.turns[0].calls[0].status is CallStatus.OK)
    made = await fork(tmp_path / "run", parent.id, loop=loop(), turn=0, tool_result="1000", n=4)
    shared = parent.turns[0].end
    assert made.shared_tokens == shared
    for ended in made.trajectories:
        assert ended.input_ids[:shared] == parent.input_ids[:shared]
        observed = [list(s.ids) for s in ended.segments if s.origin is Origin.OBSERVATION]
        assert renderer.decode(observed[0]) == "1000"
        scored = await engine.score(ended.input_ids[: ended.turns[1].end])
        sampled = ended.turns[1]
        told = ended.rollout_log_probs
        assert told is not None
        here = told[sampled.start - ended.prompt_len : sampled.end - ended.prompt_len]
        assert here == pytest.approx(scored[sampled.start - 1 : sampled.end - 1], abs=1e-3), "the model's own on this input"
    assert len({tuple(t.input_ids) for t in made.trajectories}) > 1
    again = await fork(tmp_path / "run", parent.id, loop=loop(), turn=0, tool_result="1000", n=4)
    assert [t.input_ids for t in again.trajectories] == [t.input_ids for t in made.trajectories], "the same seeds"
    other = await fork(tmp_path / "run", parent.id, loop=loop(), turn=0, tool_result="1000", n=4, seed=1)
    assert [t.input_ids for t in other.trajectories] != [t.input_ids for t in made.trajectories]
    await engine.close()
