"""What every engine promises, for each of `engines.KINDS`."""

from __future__ import annotations

import asyncio
import math
import random
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
import torch

from agentloop.engines.base import Engine, Generation, Sampling
from agentloop.errors import EngineError
from agentloop.trajectory import StopReason
from tests.conformance.engines import CONTEXT, END, LONG, MODEL, VOCABULARY, Kind, plain_log_probs, reference, weights

pytestmark = pytest.mark.asyncio(loop_scope="module")


def prompt(length: int, seed: int = 0) -> list[int]:
    """Ids of plain text tokens."""
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


async def started(engine: Engine, count: int = 1) -> list[asyncio.Task[Generation]]:
    """`count` long generations that are under way."""
    tasks = [
        asyncio.create_task(engine.generate(prompt(8, seed=i), Sampling(max_tokens=LONG, seed=i), trajectory_id=f"long{i}"))
        for i in range(count)
    ]
    await asyncio.sleep(0.05)
    return tasks


async def idle(engine: Engine, kind: Kind, seconds: float = 20.0) -> None:
    """Wait until the engine holds no request; a test that waits in vain fails."""
    assert kind.running is not None
    async with asyncio.timeout(seconds):
        while await kind.running(engine):  # noqa: ASYNC110 - another thread or process tells
            await asyncio.sleep(0.01)


def assert_close(values: Sequence[float] | None, expected: Sequence[float], kind: Kind) -> None:
    assert values is not None
    assert list(values) == pytest.approx(expected, abs=kind.tolerance)
    differences = [abs(a - b) for a, b in zip(values, expected, strict=True)]
    assert sum(differences) / max(len(differences), 1) <= kind.tolerance / 5


# What is answered


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


async def test_any_sequence_of_ids_is_taken_and_left_alone(engine: Engine) -> None:
    sampling = Sampling(max_tokens=4, temperature=0)
    forms: list[Sequence[int]] = [prompt(8), tuple(prompt(8)), array("i", prompt(8))]
    answers = [await engine.generate(form, sampling, trajectory_id=f"form{i}") for i, form in enumerate(forms)]
    assert answers[0].ids == answers[1].ids == answers[2].ids
    assert all(list(form) == prompt(8) for form in forms)


async def test_turns_of_a_trajectory_reuse_what_came_before(engine: Engine, kind: Kind) -> None:
    ids, before = prompt(10), 0
    for turn in range(8):
        generation = await engine.generate(ids, Sampling(max_tokens=6, seed=turn), trajectory_id="a")
        assert 0 <= generation.cached_tokens < len(ids)
        if turn and kind.cache:
            assert generation.cached_tokens >= before - 1  # the last token of a generation was sampled and not yet computed
        before = len(ids) + len(generation.ids)
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


async def test_score_has_one_value_for_each_token_but_the_first(engine: Engine) -> None:
    values = await engine.score(prompt(12))
    assert len(values) == 11
    assert all(math.isfinite(value) and value <= 0 for value in values)


async def test_releasing_the_unknown_is_fine(engine: Engine) -> None:
    await engine.release("never seen")


# What is ended


async def test_abort_all_ends_what_runs_and_keeps_its_tokens(engine: Engine, kind: Kind) -> None:
    tasks = await started(engine, 3)
    await engine.abort_all()
    for task in tasks:
        generation = await task
        assert generation.stop_reason is StopReason.ABORTED
        assert generation.log_probs is not None
        assert len(generation.log_probs) == len(generation.ids) < LONG
    await idle(engine, kind)
    assert (await engine.generate([1], Sampling(max_tokens=1), trajectory_id="next")).stop_reason is StopReason.LENGTH


async def test_a_cancelled_request_leaves_nothing_running_and_the_others_whole(engine: Engine, kind: Kind) -> None:
    assert kind.running is not None
    tasks = await started(engine, 2)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    await engine.release("long0")
    assert len((await engine.generate([1, 2], Sampling(max_tokens=2), trajectory_id="next")).ids) == 2
    assert len((await tasks[1]).ids) == LONG
    await idle(engine, kind)


async def test_cancelled_at_any_moment_nothing_is_left(engine: Engine, kind: Kind) -> None:
    tasks = []
    for i in range(24):
        tasks.append(asyncio.create_task(engine.generate(prompt(9, seed=i), Sampling(LONG), trajectory_id=f"gone{i}")))
        await asyncio.sleep(0.003 * (i % 4))
        if i % 2:
            tasks[i].cancel()
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended)
    await idle(engine, kind)


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


async def test_a_paused_request_can_be_cancelled(engine: Engine, kind: Kind) -> None:
    await engine.pause()
    task = asyncio.create_task(engine.generate([1], Sampling(max_tokens=1), trajectory_id="a"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.resume()
    await idle(engine, kind)


# Weights


async def test_weight_version_on_every_answer(engine: Engine) -> None:
    before = engine.weight_version
    generation = await engine.generate([1], Sampling(max_tokens=2), trajectory_id="a")
    assert generation.weight_version == before
    assert generation.min_weight_version in (None, before)
    await engine.update_weights(weights(1), 41)
    assert engine.weight_version == 41
    generation = await engine.generate([1], Sampling(max_tokens=2), trajectory_id="a")
    assert generation.weight_version == 41
    assert generation.min_weight_version in (None, 41)


async def test_weights_may_come_asynchronously(engine: Engine) -> None:
    async def slowly() -> AsyncIterator[tuple[str, torch.Tensor]]:
        for item in weights(1):
            await asyncio.sleep(0)
            yield item

    await engine.update_weights(slowly(), 42)
    assert engine.weight_version == 42


async def test_an_update_during_a_generation_shows_in_its_versions(engine: Engine, kind: Kind) -> None:
    ids, sampling = prompt(8), Sampling(max_tokens=LONG, seed=0)
    (task,) = await started(engine)
    await engine.update_weights(weights(1), 43)
    generation = await task
    if kind.keeps_on:
        assert generation.weight_version == 43
        assert generation.min_weight_version not in (None, 43)
        assert len(generation.ids) == LONG
    else:
        assert generation.stop_reason is StopReason.ABORTED
        assert generation.weight_version == 0
        rest = replace(sampling, max_tokens=LONG - len(generation.ids))
        generation = await engine.generate([*ids, *generation.ids], rest, trajectory_id="long0")
        assert (generation.weight_version, generation.min_weight_version) == (43, 43)
        assert generation.stop_reason is StopReason.LENGTH


async def test_after_an_update_answers_are_the_new_models(sampler: Engine, kind: Kind) -> None:
    ids = prompt(20)
    first = await sampler.generate(ids, Sampling(5, seed=1), trajectory_id="a")
    await sampler.update_weights(weights(1), 2)
    longer = ids + first.ids
    generation = await sampler.generate(longer, Sampling(8, seed=1), trajectory_id="a")
    assert generation.cached_tokens == 0  # what was kept was of the old weights
    assert_close(generation.log_probs, plain_log_probs(longer + generation.ids, len(longer), seed=1), kind)
    assert_close(await sampler.score(longer), plain_log_probs(longer, 1, seed=1), kind)


async def test_unknown_names_and_wrong_shapes_leave_the_old_weights(sampler: Engine, kind: Kind) -> None:
    before, ids = sampler.weight_version, prompt(12)
    values = await sampler.score(ids)
    new = weights(1)
    for bad in ("no.such.weight", new[0][0]):
        with pytest.raises(EngineError, match=bad):
            await sampler.update_weights([*new[1:], (bad, torch.zeros(3))], 99)
    assert sampler.weight_version == before
    assert_close(await sampler.score(ids), values, kind)
    assert (await sampler.generate(ids, Sampling(2), trajectory_id="a")).weight_version == before


# Memory


async def test_sleep_and_wake(engine: Engine) -> None:
    await engine.generate(prompt(5), Sampling(max_tokens=3), trajectory_id="a")
    await engine.sleep()
    with pytest.raises(EngineError, match="sleeps"):
        await engine.generate([1], Sampling(max_tokens=1), trajectory_id="a")
    await engine.wake(["weights"])
    with pytest.raises(EngineError, match="kv_cache"):
        await engine.generate([1], Sampling(max_tokens=1), trajectory_id="a")
    await engine.wake(["kv_cache"])
    assert (await engine.generate([1], Sampling(max_tokens=1), trajectory_id="a")).ids


async def test_sleeping_twice_is_sleeping_once(sampler: Engine, kind: Kind) -> None:
    ids = prompt(12)
    before = await sampler.score(ids)
    await sampler.sleep(["kv_cache"])
    await sampler.sleep()
    await sampler.wake()
    await sampler.wake()
    assert_close(await sampler.score(ids), before, kind)


# Engines with a model


async def test_sampled_log_probs_are_those_of_transformers(sampler: Engine, kind: Kind) -> None:
    async def one(i: int, temperature: float) -> None:
        ids = prompt(5 + 7 * i, seed=i)
        sampling = Sampling(20, temperature=temperature, top_p=1.0 if i % 2 else 0.7, top_k=-1 if i % 3 else 9, seed=i)
        generation = await sampler.generate(ids, sampling, trajectory_id=str(i))
        expected = plain_log_probs([*ids, *generation.ids], len(ids), temperature=temperature)
        assert_close(generation.log_probs, expected, kind)

    await asyncio.gather(*(one(i, (0.6, 1.0, 1.5)[i % 3]) for i in range(12)))


async def test_sampled_log_probs_are_those_of_score(sampler: Engine, kind: Kind) -> None:
    for temperature in kind.scores_at:
        ids = prompt(20)
        generation = await sampler.generate(ids, Sampling(10, temperature=temperature, top_p=0.8, seed=3), trajectory_id="a")
        values = await sampler.score(ids + generation.ids, temperature=temperature)
        assert_close(generation.log_probs, values[len(ids) - 1 :], kind)


async def test_temperatures_that_cannot_be_scored_are_refused(sampler: Engine, kind: Kind) -> None:
    for temperature in {-1.0, 0.0, 0.5, 1.7} - set(kind.scores_at):
        with pytest.raises(EngineError, match="temperature"):
            await sampler.score(prompt(4), temperature=temperature)


async def test_greedy_takes_the_likeliest_token_and_reports_temperature_one(sampler: Engine, kind: Kind) -> None:
    ids = prompt(15, seed=4)
    generation = await sampler.generate(ids, Sampling(16, temperature=0), trajectory_id="a")
    assert_close(generation.log_probs, plain_log_probs([*ids, *generation.ids], len(ids)), kind)
    with torch.inference_mode():
        logits = reference()(input_ids=torch.tensor([[*ids, *generation.ids]]), use_cache=False).logits[0, len(ids) - 1 : -1]
    behind = logits.max(dim=-1).values - logits.gather(1, torch.tensor(generation.ids)[:, None])[:, 0]
    assert float(behind.max()) <= 2 * kind.tolerance


async def test_a_seed_gives_the_same_tokens_alone_and_in_company(sampler: Engine, kind: Kind) -> None:
    if not kind.seeds:
        pytest.skip("this engine does not follow seeds")
    alone = [await sampler.generate(prompt(9 + i, seed=i), Sampling(12, seed=i), trajectory_id=f"a{i}") for i in range(8)]
    together = await asyncio.gather(
        *(sampler.generate(prompt(9 + i, seed=i), Sampling(12, seed=i), trajectory_id=f"b{i}") for i in range(8))
    )
    assert [g.ids for g in alone] == [g.ids for g in together]


async def test_without_a_seed_answers_differ(sampler: Engine) -> None:
    sampling = Sampling(24, temperature=1.5)
    answers = [await sampler.generate(prompt(9), sampling, trajectory_id=str(i)) for i in range(4)]
    assert len({tuple(g.ids) for g in answers}) > 1


async def test_a_stop_token_is_the_last_of_the_answer(sampler: Engine) -> None:
    free = await sampler.generate(prompt(9), Sampling(30, temperature=0), trajectory_id="a")
    stop = free.ids[7]
    ends = (stop, END)
    first = next(place for place, token in enumerate(free.ids) if token in ends)
    generation = await sampler.generate(prompt(9), Sampling(30, temperature=0, stop_token_ids=ends), trajectory_id="b")
    assert generation.stop_reason is StopReason.STOP
    assert generation.ids == free.ids[: first + 1]
    assert generation.log_probs is not None
    assert len(generation.log_probs) == len(generation.ids)


async def test_a_stop_string_ends_the_answer_with_its_tokens_kept(sampler: Engine) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    free = await sampler.generate(prompt(9), Sampling(30, temperature=0), trajectory_id="a")
    stop = next(text for token in free.ids[5:] if (text := tokenizer.decode([token])).isprintable() and text.strip())
    end = next(i for i in range(1, 31) if stop in tokenizer.decode(free.ids[:i]))
    sampling = Sampling(30, temperature=0, stop=("never there", stop))
    generation = await sampler.generate(prompt(9), sampling, trajectory_id="b")
    assert generation.stop_reason is StopReason.STOP
    assert generation.ids == free.ids[:end]
    assert generation.log_probs is not None
    assert len(generation.log_probs) == end


async def test_an_unknown_token_id_is_an_error_of_its_request_only(sampler: Engine) -> None:
    (task,) = await started(sampler)
    for bad in (VOCABULARY, -1):
        with pytest.raises(EngineError, match=str(bad)):
            await sampler.generate([1, bad], Sampling(max_tokens=1), trajectory_id="bad")
    assert len((await task).ids) == LONG


async def test_the_context_ends_a_generation_and_refuses_an_input(sampler: Engine) -> None:
    with pytest.raises(EngineError, match=str(CONTEXT)):
        await sampler.generate(prompt(CONTEXT), Sampling(max_tokens=1), trajectory_id="long")
    ids = prompt(CONTEXT - 20)
    generation = await sampler.generate(ids, Sampling(max_tokens=100), trajectory_id="full")
    assert generation.stop_reason is StopReason.LENGTH
    assert 10 <= len(generation.ids) <= 20


# The end


async def test_closed_means_closed(engine: Engine) -> None:
    (task,) = await started(engine)
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await task
    with pytest.raises(EngineError, match="closed"):
        await engine.generate([1], Sampling(max_tokens=1), trajectory_id="a")
    await engine.close()
