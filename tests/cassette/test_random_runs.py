"""Runs under random configurations and policies: played back they are the same batch, forked anywhere they begin the same."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from agentloop.cassette import fork, loop_of, replay
from agentloop.cassette.tape import key_of
from agentloop.config import LoopConfig, OnCutoff
from agentloop.engines.base import Sampling
from agentloop.engines.scripted import ScriptedEngine, ScriptedTurn
from agentloop.errors import ConfigError
from agentloop.journal import Run
from tests.cassette.rollouts import END, Parts, record, samples
from tests.cassette.test_replay import batch, by_place


def configuration(rng: random.Random) -> LoopConfig:
    actions = {reason: rng.choice(["score", "mask", "penalty"]) for reason in OnCutoff.model_fields}
    return LoopConfig(
        max_turns=rng.randint(1, 7),
        max_response_tokens=rng.choice([200, 500, 900]),
        max_turn_tokens=rng.choice([None, 40, 200]),
        max_parallel_calls=rng.randint(1, 3),
        final_turn_without_tools=rng.random() < 0.5,
        on_parse_failure=rng.choice(["observe", "end"]),
        max_parse_failures=rng.randint(1, 3),
        tool_rewards=rng.choice(["record", "add"]),
        penalty=rng.choice([0.0, -1.5]),
        max_resamples=rng.randint(0, 2),
        on_cutoff=OnCutoff.model_validate(actions),
    )


def policy(rng: random.Random) -> dict[str, Any]:
    return {
        "on_error": rng.choice(["observe", "retry", "drop_sample", "resample"]),
        "retries": rng.choice([0, 1]),
        "timeout": 0.05,
        "max_response_tokens": rng.choice([20, 100, 300]),
    }


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 60))])
async def test_the_same_batch_and_the_same_beginning(tokenizer: Any, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    parts, path = Parts(tokenizer), tmp_path / "run"
    kinds, config = policy(rng), configuration(rng)
    options: dict[str, Any] = {"config": config, "seed": seed}
    if rng.random() < 0.2:
        options["reward"] = None
    stops = (5,) if rng.random() < 0.3 else ()
    sampling = Sampling(max_tokens=300, temperature=0.7, log_probs=rng.random() < 0.8, stop_token_ids=stops)
    with parts.writer(path) as writer:
        loop = parts.loop(parts.scripted(), recorder=writer, tools=parts.registry(**kinds), **options)
        before = await record(loop, samples(8), 3, sampling=sampling)
    made = await replay(
        path,
        parts.loop(ScriptedEngine([]), tools=parts.registry(**kinds), **options),
        max_concurrency=rng.randint(1, 64),
        latency=lambda seconds: rng.random() * 0.002,
    )
    assert made.check().played == len(before)
    assert batch(by_place(made.trajectories)) == batch(by_place(before))

    run = Run(path)
    wider = config.model_copy(update={"max_response_tokens": 4000, "max_turn_tokens": 2000, "max_parallel_calls": 3})
    if not config.final_turn_without_tools:
        wider = wider.model_copy(update={"max_turns": 20})
    goes_on = parts.loop(ScriptedEngine(lambda *_: ScriptedTurn(ids=parts.encode("so" + END))), config=wider, reward=None)
    forked = None
    for row in rng.sample([row for row in run.trajectories() if row.turns], 4):
        recorded = run.load(row)
        turn = rng.randrange(row.turns)
        if any(told.parse_errors for told in recorded.turns[:turn]):
            continue  # what the loop itself says of a malformed call may have been cut, and has more room now
        edit: dict[str, Any] = {"tool_result": "something else", "call": 0} if recorded.turns[turn].calls else {}
        try:
            made_one = await fork(run, recorded, loop=goes_on, turn=turn, **edit)
        except ConfigError as error:  # it was the final answer, or another call of the turn failed, or was its last
            if not edit or f"before turn {turn + 1}" not in str(error):
                pytest.fail(f"{key_of(row)}, turn {turn}: {error}")
            continue
        forked, (ended,) = made_one, made_one.trajectories
        shared = recorded.turns[turn].end if edit else recorded.turns[turn].start
        assert forked.shared_tokens == shared and ended.input_ids[:shared] == recorded.input_ids[:shared]
        assert len(ended.turns) > forked.turn
    if forked is None:
        return
    again = loop_of(forked.run, tokenizer=tokenizer, tools=parts.registry())
    assert (await asyncio.wait_for(replay(forked.run, again), 60)).check().played == 1
