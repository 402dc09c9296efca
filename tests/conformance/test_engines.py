"""What every engine promises. An engine joins with one entry in `ENGINES`."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from agentloop.engines.base import Engine, Sampling
from agentloop.engines.local import LocalEngine
from agentloop.engines.scripted import ScriptedEngine, ScriptedTurn
from agentloop.errors import EngineError
from agentloop.trajectory import StopReason
from tests.engines.support import EOS, VOCABULARY, tiny_model, tiny_tokenizer

LONG = 480
"""Tokens of a generation that is still running when the test gets to it."""


@dataclass(frozen=True)
class Kind:
    """One engine under test."""

    make: Callable[[], Awaitable[Engine]]
    weights: Callable[[], list[tuple[str, torch.Tensor]]]
    """Other weights for its model."""
    samples: bool = True
    """It has a model, so temperature, seeds and stop tokens mean something."""
    needs: str | None = None
    """The module without which it is skipped."""


async def make_scripted() -> Engine:
    def script(ids: Sequence[int], sampling: Sampling, trajectory_id: str) -> ScriptedTurn:
        delay = 2.0 if sampling.max_tokens >= LONG else 0.0
        return ScriptedTurn([i % VOCABULARY for i in range(sampling.max_tokens + 1)], delay_s=delay)

    return ScriptedEngine(script)


async def make_local() -> Engine:
    return LocalEngine(tiny_model(), tokenizer=tiny_tokenizer(), max_slots=8, stop_token_ids=())


ENGINES: dict[str, Kind] = {
    "scripted": Kind(make_scripted, lambda: [("any.weight", torch.zeros(1))], samples=False),
    "local": Kind(make_local, lambda: list(tiny_model(seed=1).named_parameters())),
}


@pytest.fixture(params=sorted(ENGINES))
def kind(request: pytest.FixtureRequest) -> Kind:
    kind = ENGINES[request.param]
    if kind.needs is not None and importlib.util.find_spec(kind.needs) is None:
        pytest.skip(f"the engine '{request.param}' needs {kind.needs}, which is not installed")
    return kind


@pytest.fixture
async def engine(kind: Kind) -> AsyncIterator[Engine]:
    engine = await kind.make()
    yield engine
    await engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


async def started(engine: Engine, count: int = 1) -> list[asyncio.Task[object]]:
    """`count` long generations that are under way."""
    tasks = [
        asyncio.create_task(engine.generate(prompt(8, seed=i), Sampling(max_tokens=LONG, seed=i), trajectory_id=f"long{i}"))
        for i in range(count)
    ]
    await asyncio.sleep(0.05)
    return tasks


async def test_lengths_agree_and_max_tokens_is_a_limit(engine: Engine) -> None:
    generation = await engine.generate(prompt(8), Sampling(max_tokens=5, seed=1), trajectory_id="a")
    assert len(generation.ids) == 5
    assert generation.stop_reason is StopReason.LENGTH
    assert generation.log_probs is not None
    assert len(generation.log_probs) == 5
    assert all(math.isfinite(value) and value <= 0 for value in generation.log_probs)
    assert generation.queue_s >= 0


async def test_no_log_probs_unless_asked(engine: Engine) -> None:
    generation = await engine.generate(prompt(8), Sampling(max_tokens=3, log_probs=False), trajectory_id="a")
    assert generation.log_probs is None
    assert len(generation.ids) == 3


async def test_the_input_is_left_alone(engine: Engine) -> None:
    ids = prompt(8)
    await engine.generate(ids, Sampling(max_tokens=5), trajectory_id="a")
    assert ids == prompt(8)


async def test_any_sequence_of_ids_is_taken(engine: Engine) -> None:
    from array import array

    sampling = Sampling(max_tokens=4, temperature=0)
    answers = [
        await engine.generate(form, sampling, trajectory_id=f"form{i}")
        for i, form in enumerate([prompt(8), tuple(prompt(8)), array("i", prompt(8))])
    ]
    assert answers[0].ids == answers[1].ids == answers[2].ids


async def test_turns_of_a_trajectory_extend_each_other(engine: Engine) -> None:
    ids = prompt(10)
    for turn in range(8):
        generation = await engine.generate(ids, Sampling(max_tokens=6, seed=turn), trajectory_id="a")
        assert 0 <= generation.cached_tokens < len(ids)
        if turn:
            assert generation.cached_tokens > 0
        ids = ids + generation.ids + prompt(3, seed=turn)
    await engine.release("a")


async def test_many_at_a_time(engine: Engine) -> None:
    async def one(i: int) -> None:
        generation = await engine.generate(prompt(4 + 3 * i, seed=i), Sampling(max_tokens=1 + i % 7), trajectory_id=str(i))
        assert len(generation.ids) == 1 + i % 7

    await asyncio.gather(*(one(i) for i in range(32)))


@pytest.mark.parametrize(
    ("ids", "sampling"),
    [([], Sampling(max_tokens=1)), ([1], Sampling(max_tokens=0))],
    ids=["empty input", "no room"],
)
async def test_senseless_requests_are_engine_errors(engine: Engine, ids: list[int], sampling: Sampling) -> None:
    with pytest.raises(EngineError):
        await engine.generate(ids, sampling, trajectory_id="a")
    assert (await engine.generate([1], Sampling(max_tokens=1), trajectory_id="a")).ids


async def test_abort_all_ends_what_runs_and_keeps_its_tokens(engine: Engine) -> None:
    tasks = await started(engine, 3)
    await engine.abort_all()
    for task in tasks:
        generation = await task
        assert generation.stop_reason is StopReason.ABORTED
        assert len(generation.ids) < LONG
        assert len(generation.log_probs) == len(generation.ids)
    assert (await engine.generate([1], Sampling(max_tokens=1), trajectory_id="next")).stop_reason is StopReason.LENGTH


async def test_a_cancelled_request_ends_and_the_engine_goes_on(engine: Engine) -> None:
    tasks = await started(engine, 2)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    await engine.release("long0")
    assert len((await engine.generate([1, 2], Sampling(max_tokens=2), trajectory_id="next")).ids) == 2
    assert len((await tasks[1]).ids) == LONG


async def test_pause_holds_new_requests_back(engine: Engine) -> None:
    await engine.pause()
    task = asyncio.create_task(engine.generate([1], Sampling(max_tokens=1), trajectory_id="a"))
    await asyncio.sleep(0.05)
    assert not task.done()
    await engine.resume()
    assert len((await task).ids) == 1


async def test_abort_reaches_a_paused_request(engine: Engine) -> None:
    await engine.pause()
    task = asyncio.create_task(engine.generate([1], Sampling(max_tokens=1), trajectory_id="a"))
    await asyncio.sleep(0.05)
    await engine.abort_all()
    generation = await task
    assert (generation.ids, generation.stop_reason) == ([], StopReason.ABORTED)
    await engine.resume()


async def test_weight_version_on_every_answer(engine: Engine, kind: Kind) -> None:
    before = engine.weight_version
    generation = await engine.generate([1], Sampling(max_tokens=2), trajectory_id="a")
    assert generation.weight_version == before
    assert generation.min_weight_version in (None, before)
    await engine.update_weights(kind.weights(), 41)
    assert engine.weight_version == 41
    generation = await engine.generate([1], Sampling(max_tokens=2), trajectory_id="a")
    assert generation.weight_version == 41


async def test_weights_may_come_asynchronously(engine: Engine, kind: Kind) -> None:
    async def weights() -> AsyncIterator[tuple[str, torch.Tensor]]:
        for item in kind.weights():
            await asyncio.sleep(0)
            yield item

    await engine.update_weights(weights(), 42)
    assert engine.weight_version == 42


async def test_an_update_during_a_generation_shows_in_its_versions(engine: Engine, kind: Kind) -> None:
    (task,) = await started(engine)
    await engine.update_weights(kind.weights(), 43)
    generation = await task
    assert generation.weight_version == 43
    assert generation.min_weight_version not in (None, 43)
    assert len(generation.ids) == LONG


async def test_sleep_and_wake(engine: Engine) -> None:
    await engine.sleep()
    with pytest.raises(EngineError, match="sleeps"):
        await engine.generate([1], Sampling(max_tokens=1), trajectory_id="a")
    await engine.wake(["weights"])
    with pytest.raises(EngineError, match="kv_cache"):
        await engine.generate([1], Sampling(max_tokens=1), trajectory_id="a")
    await engine.wake(["kv_cache"])
    assert (await engine.generate([1], Sampling(max_tokens=1), trajectory_id="a")).ids


async def test_releasing_the_unknown_is_fine(engine: Engine) -> None:
    await engine.release("never seen")


async def test_score_has_one_value_for_each_token_but_the_first(engine: Engine) -> None:
    values = await engine.score(prompt(12))
    assert len(values) == 11
    assert all(math.isfinite(value) and value <= 0 for value in values)


async def test_closed_means_closed(engine: Engine) -> None:
    (task,) = await started(engine)
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await task
    with pytest.raises(EngineError, match="closed"):
        await engine.generate([1], Sampling(max_tokens=1), trajectory_id="a")
    await engine.close()


# Engines with a model


@pytest.fixture
def sampler(kind: Kind, engine: Engine) -> Engine:
    if not kind.samples:
        pytest.skip("this engine has no model")
    return engine


async def test_sampled_log_probs_are_those_of_score(sampler: Engine) -> None:
    for temperature in (0.5, 1.0, 1.7):
        ids = prompt(20)
        generation = await sampler.generate(ids, Sampling(10, temperature=temperature, top_p=0.8, seed=3), trajectory_id="a")
        values = await sampler.score(ids + generation.ids, temperature=temperature)
        assert generation.log_probs == pytest.approx(values[len(ids) - 1 :], abs=1e-4)


async def test_a_seed_gives_the_same_tokens_alone_and_in_company(sampler: Engine) -> None:
    alone = [await sampler.generate(prompt(9 + i, seed=i), Sampling(12, seed=i), trajectory_id=f"a{i}") for i in range(8)]
    together = await asyncio.gather(
        *(sampler.generate(prompt(9 + i, seed=i), Sampling(12, seed=i), trajectory_id=f"b{i}") for i in range(8))
    )
    assert [g.ids for g in alone] == [g.ids for g in together]


async def test_without_a_seed_answers_differ(sampler: Engine) -> None:
    answers = [await sampler.generate(prompt(9), Sampling(12), trajectory_id=str(i)) for i in range(3)]
    assert len({tuple(g.ids) for g in answers}) > 1


async def test_a_stop_token_is_the_last_of_the_answer(sampler: Engine) -> None:
    free = await sampler.generate(prompt(9), Sampling(30, seed=5), trajectory_id="a")
    stop = free.ids[7]
    generation = await sampler.generate(prompt(9), Sampling(30, seed=5, stop_token_ids=(stop, EOS)), trajectory_id="b")
    assert generation.stop_reason is StopReason.STOP
    assert generation.ids == free.ids[: free.ids.index(stop) + 1]


async def test_an_unknown_token_id_is_an_error_of_its_request_only(sampler: Engine) -> None:
    (task,) = await started(sampler)
    for bad in (VOCABULARY, -1):
        with pytest.raises(EngineError, match=str(bad)):
            await sampler.generate([1, bad], Sampling(max_tokens=1), trajectory_id="bad")
    assert len((await task).ids) == LONG


async def test_unknown_names_and_wrong_shapes_leave_the_old_weights(sampler: Engine, kind: Kind) -> None:
    before, ids = sampler.weight_version, prompt(12)
    values = await sampler.score(ids)
    weights = kind.weights()
    for bad in ("no.such.weight", weights[0][0]):
        with pytest.raises(EngineError, match=bad):
            await sampler.update_weights([*weights[1:], (bad, torch.zeros(3))], 99)
    assert sampler.weight_version == before
    assert await sampler.score(ids) == values
