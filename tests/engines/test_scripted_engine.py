"""ScriptedEngine says what its script says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from agentloop.engines.base import Sampling
from agentloop.engines.scripted import ScriptedEngine, ScriptedTurn
from agentloop.errors import ConfigError, EngineError
from agentloop.trajectory import StopReason

TEN = Sampling(max_tokens=10)


async def test_a_shared_script_starts_anew_for_every_trajectory() -> None:
    engine = ScriptedEngine([[1, 2], [3]])
    assert (await engine.generate([9], TEN, trajectory_id="a")).ids == [1, 2]
    assert (await engine.generate([9], TEN, trajectory_id="b")).ids == [1, 2]
    assert (await engine.generate([9, 1, 2, 9], TEN, trajectory_id="a")).ids == [3]


async def test_own_scripts_and_what_happens_at_their_end() -> None:
    engine = ScriptedEngine({"a": [[1]], "b": [[2]]})
    assert (await engine.generate([9], TEN, trajectory_id="b")).ids == [2]
    with pytest.raises(EngineError, match="has only 1 turns"):
        await engine.generate([9], TEN, trajectory_id="b")
    with pytest.raises(EngineError, match="no script for trajectory 'c'"):
        await engine.generate([9], TEN, trajectory_id="c")


async def test_release_starts_the_script_again() -> None:
    engine = ScriptedEngine([[1]])
    await engine.generate([9], TEN, trajectory_id="a")
    await engine.release("a")
    assert (await engine.generate([9], TEN, trajectory_id="a")).ids == [1]


async def test_a_function_sees_the_input_itself() -> None:
    seen: list[Sequence[int]] = []

    def script(ids: Sequence[int], sampling: Sampling, trajectory_id: str) -> list[int]:
        seen.append(ids)
        return [len(ids), sampling.max_tokens]

    given = [5] * 1000
    engine = ScriptedEngine(script)
    assert (await engine.generate(given, TEN, trajectory_id="a")).ids == [1000, 10]
    assert seen[0] is given


async def test_text_is_encoded_and_needs_an_encoder() -> None:
    engine = ScriptedEngine(["hi", ScriptedTurn(text="!")], encode=lambda text: text.encode())
    assert (await engine.generate([9], TEN, trajectory_id="a")).ids == [104, 105]
    assert (await engine.generate([9], TEN, trajectory_id="a")).ids == [33]
    with pytest.raises(ConfigError, match="needs `encode`"):
        ScriptedEngine(["hi"])


async def test_log_probs_reasons_versions_and_data_are_the_scripts() -> None:
    turn = ScriptedTurn([1, 2], log_probs=[-0.5, -0.25], stop_reason=StopReason.ABORTED, weight_version=7, data={"x": 1})
    engine = ScriptedEngine([turn, [1, 2]], log_prob=-3.0)
    first = await engine.generate([9], TEN, trajectory_id="a")
    assert (first.log_probs, first.stop_reason, first.weight_version, first.data) == ([-0.5, -0.25], "aborted", 7, {"x": 1})
    second = await engine.generate([9], TEN, trajectory_id="a")
    assert (second.log_probs, second.stop_reason, second.weight_version) == ([-3.0, -3.0], "stop", 0)
    with pytest.raises(ConfigError, match="2 ids and 1 log_probs"):
        ScriptedEngine([ScriptedTurn([1, 2], log_probs=[-1.0])])


async def test_errors_are_raised_after_the_delay_and_do_not_advance_the_script() -> None:
    turns = iter([ScriptedTurn(error="the server is gone", delay_s=0.01), ScriptedTurn([4])])
    engine = ScriptedEngine(lambda ids, sampling, trajectory_id: next(turns))
    with pytest.raises(EngineError, match="the server is gone"):
        await engine.generate([9], TEN, trajectory_id="a")
    assert (await engine.generate([9], TEN, trajectory_id="a")).ids == [4]


async def test_what_is_recorded() -> None:
    engine = ScriptedEngine([[1], [2]])
    await engine.generate([9, 9], TEN, trajectory_id="a")
    await engine.generate([9, 9, 1, 8], TEN, trajectory_id="a")
    assert [(c.trajectory_id, c.turn, c.input_length, c.ids) for c in engine.calls] == [("a", 0, 2, None), ("a", 1, 4, None)]
    whole = ScriptedEngine([[1]], record="ids")
    await whole.generate([9, 9], TEN, trajectory_id="a")
    assert whole.calls[0].ids == (9, 9)
    none = ScriptedEngine([[1]], record="nothing")
    await none.generate([9, 9], TEN, trajectory_id="a")
    assert none.calls == []


async def test_an_abort_keeps_the_tokens_that_the_delay_had_given() -> None:
    engine = ScriptedEngine([ScriptedTurn(list(range(100)), delay_s=60)])
    task = asyncio.create_task(engine.generate([9], Sampling(max_tokens=100), trajectory_id="a"))
    await asyncio.sleep(0.05)
    assert engine.in_flight == 1
    await engine.abort_all()
    generation = await task
    assert generation.stop_reason is StopReason.ABORTED
    assert generation.ids == list(range(len(generation.ids)))
    assert len(generation.ids) < 100
    assert engine.in_flight == 0
