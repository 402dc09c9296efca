"""Groups of trajectories: what wrong input, failures and cancellation do to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agentloop.errors import ConfigError
from agentloop.journal.base import NullRecorder
from agentloop.rollout import Rollout
from agentloop.trajectory import EndReason, Sample, Trajectory
from tests.test_loop import END, SAMPLE, Probe, ScriptedTurn, Setup, call


class Ends(NullRecorder):
    """Keeps what has ended."""

    def __init__(self) -> None:
        self.ended: list[Trajectory] = []

    def trajectory_end(self, trajectory: Trajectory) -> None:
        self.ended.append(trajectory)


class SlowRelease(Probe):
    """Takes its time to let go."""

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self.log.append("releasing")
        await asyncio.sleep(0.1)
        self.log.append("released")


def sample(uid: str, **options: Any) -> Sample:
    return Sample(messages=SAMPLE.messages, uid=uid, ground_truth="3", **options)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  what is waited for has no event
        await asyncio.sleep(0.01)


async def test_wrong_input_comes_out_as_it_is_and_cancels_the_other_groups(tokenizer: Any) -> None:
    recorder = Ends()
    setup = Setup(tokenizer, [ScriptedTurn(text="ok" + END, delay_s=60)], recorder=recorder)
    rollout = Rollout(setup.loop)
    with pytest.raises(ConfigError, match="there is no tool 'prob'; did you mean 'probe'"):
        await rollout.run([sample("good"), sample("bad", tools=("prob",))], 2)
    assert setup.engine.in_flight == 0
    assert [t.end_reason for t in recorder.ended] == [EndReason.ABORTED] * 2
    assert await rollout.cancel() == 0


async def test_two_samples_with_one_uid_are_refused(tokenizer: Any) -> None:
    rollout = Rollout(Setup(tokenizer, ["ok" + END]).loop)
    with pytest.raises(ConfigError, match="2 samples of one rollout have the uid 'a'"):
        await rollout.run([sample("a"), sample("b"), sample("a")])
    with pytest.raises(ConfigError, match="uid 'a'"):
        async for _ in rollout.stream([sample("a"), sample("a")]):
            pass


async def test_cancelled_while_it_releases_a_trajectory_is_released_and_recorded_all_the_same(tokenizer: Any) -> None:
    probe, recorder = SlowRelease(), Ends()
    setup = Setup(tokenizer, ["The answer is 3" + END], probe, recorder=recorder)
    released: list[str] = []
    original = setup.engine.release

    async def release(trajectory_id: str) -> None:
        released.append(trajectory_id)
        await original(trajectory_id)

    setup.engine.release = release  # type: ignore[method-assign]
    task = asyncio.create_task(setup.run())
    await until(lambda: "releasing" in probe.log)
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert probe.log[-1] == "released" and released == ["train-0-u_0"]
    assert [t.reward.value for t in recorder.ended] == [1.0]


async def test_cancelled_twice_a_group_still_gives_back_what_it_held(tokenizer: Any) -> None:
    probe, recorder = SlowRelease(), Ends()
    setup = Setup(tokenizer, [call() + END, ScriptedTurn(text="x", delay_s=60)], probe, recorder=recorder)
    group = asyncio.create_task(Rollout(setup.loop).group(SAMPLE, 3))
    await until(lambda: setup.engine.in_flight == 3)
    group.cancel()
    await until(lambda: "releasing" in probe.log)
    group.cancel()
    with pytest.raises(asyncio.CancelledError):
        await group
    await until(lambda: len(recorder.ended) == 3)
    assert probe.log.count("released") == 3
    assert [t.end_reason for t in recorder.ended] == [EndReason.ABORTED] * 3


async def test_leaving_a_stream_early_cancels_the_rest(tokenizer: Any) -> None:
    def script(ids: Any, sampling: Any, key: str) -> Any:
        return ScriptedTurn(text="ok" + END, delay_s=60 if "slow" in key else 0.0)

    recorder = Ends()
    setup = Setup(tokenizer, script, recorder=recorder)
    stream = Rollout(setup.loop).stream([sample("slow"), sample("quick")])
    async for group in stream:
        assert group[0].sample.uid == "quick"
        break
    await stream.aclose()  # type: ignore[attr-defined]
    assert setup.engine.in_flight == 0
    assert [t.end_reason for t in recorder.ended] == [EndReason.FINAL_ANSWER, EndReason.ABORTED]
