"""The weight sync: what serves afterwards, when it is due, and what becomes of rollouts meanwhile and where it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agentloop.engines.base import Sampling
from agentloop.engines.local import LocalEngine
from agentloop.errors import ConfigError, EngineError
from agentloop.trajectory import StopReason
from agentloop.weights import (
    DiskPlan,
    MegatronSGLangShardingManager,
    RestartPlan,
    SendPlan,
    SyncFailed,
    TensorsPlan,
    WeightsRefused,
)
from tests.engines.support import until
from tests.weights.models import TOKENS
from tests.weights.sync_support import (
    SMALL_BUCKET,
    Breaking,
    ExactCheck,
    FailingSource,
    Trainer,
    answers,
    engine_of,
    served,
    start_local,
)


@pytest.fixture
async def engine() -> AsyncIterator[LocalEngine]:
    made = engine_of()
    yield made
    await made.close()


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


def manager_of(trainer: Trainer, *engines: Any, plan: SendPlan | None = None, **more: Any) -> MegatronSGLangShardingManager:
    options: dict[str, Any] = {"bucket_bytes": SMALL_BUCKET, "check": ExactCheck()}
    return MegatronSGLangShardingManager(engines, trainer.source, plan or TensorsPlan(), **(options | more))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


Plans = Callable[[Path, Trainer], SendPlan]
PLANS: dict[str, Plans] = {
    "tensors": lambda path, trainer: TensorsPlan(),
    "disk": lambda path, trainer: DiskPlan(path, trainer.config),
    "restart": lambda path, trainer: RestartPlan(path, trainer.config, start_local),
}


@pytest.mark.parametrize("model", ["deepseek", "qwen3_moe"])
@pytest.mark.parametrize("plan", PLANS)
async def test_what_serves_is_what_the_trainer_has(plan: str, model: str, tmp_path: Path) -> None:
    trainer = Trainer(model)
    manager = manager_of(trainer, engine_of(model), engine_of(model), plan=PLANS[plan](tmp_path / "sync", trainer))
    for version in (1, 2, 3):
        trainer.step()
        report = await manager.sync()
        assert report is not None
        assert manager.sent == trainer.checksums()
        assert (report.version, manager.version, report.tensors) == (version, version, len(manager.sent))
        assert report.buckets > 3
        for guard in manager.engines.values():
            assert served(guard.engine) == manager.sent
            assert await answers(guard) == version
    assert names_in(tmp_path / "sync") == ([] if plan == "tensors" else ["version-3"])
    for guard in manager.engines.values():
        await guard.close()


async def test_a_sync_is_due_at_first_and_every_k_steps(engine: LocalEngine, trainer: Trainer) -> None:
    manager = manager_of(trainer, engine, every=3)
    seen = []
    for _ in range(8):
        trainer.step()
        async with manager:
            seen.append(manager.version)
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3]
    assert not manager.due()
    assert [manager.due(step) for step in (8, 9, 10, 11)] == [False, False, True, True]
    await manager.sync()  # on demand
    assert manager.version == 4
    assert [manager.due(step) for step in (10, 11)] == [False, True]


async def test_engines_sleep_between_rollouts(engine: LocalEngine, trainer: Trainer) -> None:
    manager = manager_of(trainer, engine, every=5, sleep=("kv_cache",))
    for _ in range(2):
        async with manager:
            assert await answers(manager.engine) == 1
        with pytest.raises(EngineError, match="sleeps"):
            await answers(manager.engine)
    await engine.wake()
    freeing = manager_of(trainer, engine, every=5, sleep=("weights", "kv_cache"))
    for _ in range(2):
        async with freeing:
            assert await answers(freeing.engine) == freeing.version
    assert freeing.version == 3  # weights that were freed are sent again at every step


def test_without_an_event_loop_too(trainer: Trainer) -> None:
    manager = manager_of(trainer, engine_of(), sleep=("kv_cache",))
    for step in (1, 2):
        with manager:
            assert manager.run(answers(manager.engine)) == step
    manager.run(manager.engine.close())
    manager.run(manager.close())


async def test_rollouts_wait_for_the_new_weights(engine: LocalEngine, trainer: Trainer) -> None:
    """What runs ends with its tokens so far, under the old version; what comes meanwhile waits; none has two versions."""
    manager = manager_of(trainer, engine)
    await manager.sync()
    stop = False
    versions: list[tuple[int | None, int | None]] = []
    reasons = set()

    async def roll(key: str) -> None:
        while not stop:
            answer = await manager.engine.generate(TOKENS[0][:4], Sampling(12), trajectory_id=key)
            if answer.ids:
                versions.append((answer.min_weight_version, answer.weight_version))
                assert len(answer.version_runs) <= 1
            reasons.add(answer.stop_reason)

    rollouts = [asyncio.create_task(roll(str(number))) for number in range(3)]
    for _ in range(4):
        trainer.step()
        await manager.sync()
        before = len(versions)
        await at_least(versions, before + 6)
    stop = True
    await asyncio.gather(*rollouts)
    assert all(first == last for first, last in versions)
    assert [last for _, last in versions] == sorted(last or 0 for _, last in versions)
    assert {last for _, last in versions} >= {2, 3, 4, 5}
    assert reasons <= {StopReason.LENGTH, StopReason.ABORTED}


async def at_least(items: list[Any], count: int) -> None:
    await until(lambda: len(items) >= count)


async def test_those_who_wait_can_be_aborted(engine: LocalEngine, trainer: Trainer) -> None:
    manager = manager_of(trainer, engine)
    manager.engine.hold()
    waiting = asyncio.create_task(manager.engine.generate([1, 2], Sampling(2), trajectory_id="a"))
    await asyncio.sleep(0)
    await manager.engine.abort_all()
    assert (await waiting).stop_reason is StopReason.ABORTED


# What fails


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("at", [1, 40, "last"])
async def test_a_source_that_fails_leaves_the_old_version_serving(
    plan: str, at: int | str, trainer: Trainer, tmp_path: Path
) -> None:
    """And is read to its end, for the ranks that wait for it."""
    manager = manager_of(trainer, engine_of(), plan=PLANS[plan](tmp_path / "sync", trainer))
    await manager.sync()
    before, kept = served(manager.engine.engine), manager.sent
    trainer.step()
    place = len(trainer.source().items) if at == "last" else int(at)
    broken = FailingSource(trainer.source(), place, ConfigError("the file x is cut short"))
    with pytest.raises(SyncFailed, match=r"^the sync to version 2 failed: the file x is cut short; version 1 goes on serving$"):
        await manager.sync(source=lambda: broken)
    assert broken.reads == [item.name for item in broken.items]
    assert await answers(manager.engine) == 1
    assert served(manager.engine.engine) == before == manager.sent == kept
    assert names_in(tmp_path / "sync") == ([] if plan == "tensors" else ["version-1"])
    assert manager.due()
    await manager.sync()
    assert await answers(manager.engine) == 2  # none was skipped
    assert served(manager.engine.engine) == trainer.checksums()
    await manager.engine.close()


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("after", [0, 30])
async def test_an_engine_that_dies_amid_a_sync_leaves_no_mix(mixes: bool, after: int, trainer: Trainer) -> None:
    dying, other = Breaking(engine_of(), 10**6, mixes=mixes), engine_of()
    manager = manager_of(trainer, dying, other, check=None)
    await manager.sync()
    trainer.step()
    before, dying.after = served(other), after
    with pytest.raises(SyncFailed, match=r"engine '0' did not take the weights: a process of the engine died; version 1 goes"):
        await manager.sync()
    first, second = manager.engines.values()
    assert await answers(second) == 1
    assert served(other) == before
    if mixes:
        with pytest.raises(WeightsRefused, match="the last update of its weights failed"):
            await answers(first)
    else:
        assert await answers(first) == 1
    dying.after = 10**6
    await manager.sync()
    assert [await answers(guard) for guard in manager.engines.values()] == [2, 2]
    assert served(other) == served(dying.inner) == trainer.checksums()
    for guard in manager.engines.values():
        await guard.close()


async def test_an_engine_that_is_gone_is_named_and_another_takes_its_place(trainer: Trainer) -> None:
    manager = manager_of(trainer, engine_of(), engine_of())
    await manager.sync()
    await manager.engines["1"].engine.close()
    trainer.step()
    with pytest.raises(SyncFailed, match=r"version 1 goes on serving; engine '1' does not answer: the engine is closed$"):
        await manager.sync()
    assert await answers(manager.engines["0"]) == 1
    with pytest.raises(WeightsRefused, match="engine '1' does not answer"):
        await answers(manager.engines["1"])
    manager.replace("1", engine_of())
    with pytest.raises(WeightsRefused, match="is a new one"):
        await answers(manager.engines["1"])
    await manager.sync()
    assert [await answers(guard) for guard in manager.engines.values()] == [2, 2]
    for guard in manager.engines.values():
        await guard.close()


async def test_a_version_on_one_engine_only_serves_on_none(trainer: Trainer, tmp_path: Path) -> None:
    """The folder was loaded by the first engine when the second one failed."""
    dying, other = Breaking(engine_of(), 10**6, mixes=False), engine_of()
    manager = manager_of(trainer, other, dying, plan=DiskPlan(tmp_path / "sync", trainer.config), check=None)
    await manager.sync()
    trainer.step()
    dying.after = 3
    with pytest.raises(SyncFailed, match=r"a process of the engine died; no engine serves until a sync lands and passes$"):
        await manager.sync()
    for guard in manager.engines.values():
        with pytest.raises(WeightsRefused, match="no engine serves until"):
            await answers(guard)
    assert manager.version == 1
    dying.after = 10**6
    trainer.step()
    await manager.sync()
    assert [await answers(guard) for guard in manager.engines.values()] == [2, 2]
    assert served(other) == served(dying.inner) == trainer.checksums()
    for guard in manager.engines.values():
        await guard.close()


async def test_an_engine_that_does_not_start_again_is_told_and_started_by_the_next_sync(
    trainer: Trainer, tmp_path: Path
) -> None:
    fails = True

    async def start(folder: Path, version: int) -> Any:
        if fails:
            raise EngineError("out of memory")
        return await start_local(folder, version)

    manager = manager_of(trainer, engine_of(), plan=RestartPlan(tmp_path / "sync", trainer.config, start))
    with pytest.raises(SyncFailed, match="engine '0' did not start again: out of memory; no engine serves"):
        await manager.sync()
    with pytest.raises(WeightsRefused, match="out of memory"):
        await answers(manager.engine)
    fails = False
    await manager.sync()
    assert await answers(manager.engine) == 1
    await manager.engine.close()


async def test_a_check_that_does_not_pass_refuses_rollouts_until_one_does(engine: LocalEngine, trainer: Trainer) -> None:
    check = ExactCheck()
    manager = manager_of(trainer, engine, check=check)
    await manager.sync()
    trainer.step()
    check.refuse = 1
    waiting = asyncio.create_task(_after(manager.engine))
    with pytest.raises(WeightsRefused, match=r"engine '0', version 2: 1 tensors differ: layer 2 is off; no engine serves"):
        await manager.sync()
    with pytest.raises(WeightsRefused, match="layer 2 is off"):
        await waiting
    with pytest.raises(WeightsRefused, match="layer 2 is off"):
        await answers(manager.engine)
    with pytest.raises(WeightsRefused, match="layer 2 is off"):
        await manager.engine.score([1, 2, 3])
    assert (manager.version, manager.due()) == (1, True)
    unguarded = asyncio.create_task(engine.generate([1, 2], Sampling(1), trajectory_id="b"))
    await asyncio.sleep(0.1)
    assert not unguarded.done()  # the engine itself is paused
    async with manager:
        assert await answers(manager.engine) == 2
    await unguarded
    assert check.checked == [1, 2, 2]


async def _after(engine: Any) -> Any:
    await until(lambda: engine.refusal is not None)
    return await answers(engine)


async def test_who_paused_an_engine_resumes_it(engine: LocalEngine, trainer: Trainer) -> None:
    check = ExactCheck()
    manager = manager_of(trainer, engine, check=check)
    await manager.engine.pause()
    check.refuse = 1
    with pytest.raises(WeightsRefused):
        await manager.sync()
    await manager.sync()
    waiting = asyncio.create_task(answers(manager.engine))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await manager.engine.resume()
    assert await waiting == 1


async def test_answers_under_another_version_than_was_synced_are_errors(engine: LocalEngine, trainer: Trainer) -> None:
    """A server that comes back has the weights that it was started with."""
    manager = manager_of(trainer, engine)
    await manager.sync()
    await engine.update_weights([], 0)
    with pytest.raises(EngineError, match=r"engine '0' answered with weights of version 0, not 1"):
        await answers(manager.engine)
    await manager.sync()
    assert await answers(manager.engine) == 2


async def test_random_weights_serve_nobody_before_the_first_sync(engine: LocalEngine, trainer: Trainer) -> None:
    manager = manager_of(trainer, engine, serves=False)
    with pytest.raises(WeightsRefused, match="started with weights that mean nothing"):
        await answers(manager.engine)
    broken = FailingSource(trainer.source(), 5, ConfigError("no such file"))
    with pytest.raises(SyncFailed, match="no such file; no engine serves; engine '0' was started with weights that mean"):
        await manager.sync(source=lambda: broken)
    await manager.sync()
    assert await answers(manager.engine) == 1


@pytest.mark.parametrize("plan", PLANS)
async def test_a_cancelled_sync_leaves_the_old_version_serving(plan: str, trainer: Trainer, tmp_path: Path) -> None:
    manager = manager_of(trainer, engine_of(), plan=PLANS[plan](tmp_path / "sync", trainer))
    await manager.sync()
    before = served(manager.engine.engine)
    trainer.step()
    slow = FailingSource(trainer.source(), -1, ConfigError(""))
    task = asyncio.create_task(manager.sync(source=lambda: slow))
    await until(lambda: len(slow.reads) >= 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(slow.reads) == len(slow.items)
    assert await answers(manager.engine) == 1
    assert served(manager.engine.engine) == before
    await manager.sync()
    assert await answers(manager.engine) == 2
    await manager.engine.close()


async def test_an_engine_that_hangs_ends_the_sync(trainer: Trainer) -> None:
    class Hanging(Breaking):
        async def update_weights(self, weights: Any, version: int) -> None:
            await asyncio.Event().wait()

    manager = manager_of(trainer, Hanging(engine_of(), 0, mixes=False), check=None, timeout_s=0.2)
    import agentloop.weights.sync_plans as plans

    limit, plans.GIVE_UP_S = plans.GIVE_UP_S, 0.1
    try:
        with pytest.raises(SyncFailed, match=r"it took longer than 0\.2 s; no engine serves"):
            await manager.sync()
    finally:
        plans.GIVE_UP_S = limit
    await manager.engine.close()


async def test_what_cannot_be_is_refused(engine: LocalEngine, trainer: Trainer) -> None:
    with pytest.raises(ConfigError, match="every is 0"):
        manager_of(trainer, engine, every=0)
    with pytest.raises(ConfigError, match="has no engine"):
        manager_of(trainer)
    manager = manager_of(trainer, engine)
    with pytest.raises(EngineError, match="its sharding manager's to change"):
        await manager.engine.update_weights([], 3)
    other = Trainer("qwen3_moe")
    with pytest.raises(SyncFailed, match="engine '0' did not take the weights: the model has no weight"):
        await manager.sync(source=other.source)
    assert await answers(manager.engine) == 0
