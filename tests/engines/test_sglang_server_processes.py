"""Servers that die, hang and come back while multi-turn conversations run on them: real processes, the quickstart's model and
its calculator."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import aiohttp
import pytest
from transformers import AutoTokenizer

from agentloop.chat import load_parser, load_renderer
from agentloop.engines.base import Engine, Sampling
from agentloop.engines.local import LocalEngine
from agentloop.engines.sglang_server import SGLangServerEngine
from agentloop.loop import AgentLoop
from agentloop.rollout import Rollout
from agentloop.tools.registry import ToolRegistry
from agentloop.trajectory import EndReason, Sample, Trajectory
from examples.quickstart.conversation import messages
from examples.quickstart.evaluate import TOOLS, loop_config
from examples.quickstart.make_data import held_out
from tests.engines.peers import MODEL, Peer, running
from tests.engines.support import until

PROBLEMS = 24
SETTINGS: dict[str, Any] = {
    "probe_interval_s": 0.2,
    "probe_timeout_s": 1.0,
    "failures_to_eject": 2,
    "connect_timeout_s": 1.0,
    "abort_timeout_s": 3.0,
    "unavailable_s": 30.0,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def peers() -> Iterator[Sequence[Peer]]:
    """Two for all tests; the last of them leaves both dead."""
    with running(2, "--weight-version", "0", "--max-running-requests", "16") as peers:
        yield peers


def rollout(engine: Engine, tokenizer: Any) -> Rollout:
    renderer = load_renderer(tokenizer)
    path = TOOLS["right"]
    assert path is not None
    tools = ToolRegistry.from_yaml(path).bind(renderer)
    loop = AgentLoop(engine, renderer, load_parser("hermes", renderer), tools=tools, config=loop_config())
    return Rollout(loop, max_concurrency=12)


async def run(engine: Engine, tokenizer: Any) -> list[Trajectory]:
    """Greedy conversations about the same problems each time."""
    samples = [Sample(messages(problem.question), uid=str(i)) for i, problem in enumerate(held_out(PROBLEMS))]
    sampling = Sampling(max_tokens=loop_config().max_response_tokens, temperature=0.0)
    return [group[0] for group in await rollout(engine, tokenizer).run(samples, sampling=sampling)]


@pytest.fixture(scope="module")
def expected(tokenizer: Any) -> list[list[int]]:
    """The token streams without servers."""

    async def alone() -> list[list[int]]:
        engine = LocalEngine.load(str(MODEL), threads=1)
        try:
            return [trajectory.input_ids for trajectory in await run(engine, tokenizer)]
        finally:
            await engine.close()

    return asyncio.run(alone())


async def requests_on(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/get_load") as response:
        return sum(load["num_reqs"] for load in await response.json())


async def disturb(engine: SGLangServerEngine, place: int, act: Callable[[], Any]) -> None:
    """Do something to a server when it has requests."""
    await until(lambda: engine.replicas[place].in_flight >= 3)
    act()


def check(trajectories: Sequence[Trajectory], expected: Sequence[list[int]]) -> None:
    assert [trajectory.end_reason for trajectory in trajectories] == [EndReason.FINAL_ANSWER] * PROBLEMS
    assert [trajectory.input_ids for trajectory in trajectories] == list(expected)
    assert any(len(trajectory.turns) > 2 for trajectory in trajectories)


async def test_weights_that_change_all_the_time_change_no_token_if_they_are_the_same(
    peers: Sequence[Peer], tokenizer: Any, expected: list[list[int]]
) -> None:
    """Every update aborts what is decoding, and the loop goes on from the tokens so far."""
    engine = SGLangServerEngine({"urls": [peer.url for peer in peers], **SETTINGS})

    async def update() -> None:
        version = 0
        while True:
            version += 1
            await engine.update_weights_from_disk(str(MODEL), version)
            await asyncio.sleep(0.1)

    try:
        await engine.start()
        updating = asyncio.create_task(update())
        trajectories = await run(engine, tokenizer)
        updating.cancel()
        await asyncio.wait([updating])
    finally:
        await engine.close()
    check(trajectories, expected)
    versions = [(turn.min_weight_version, turn.weight_version) for t in trajectories for turn in t.turns]
    assert all(first is not None and last is not None and first <= last for first, last in versions)
    assert max(last or 0 for _, last in versions) >= 3
    assert any(first != last for first, last in versions)
    assert [await requests_on(peer.url) for peer in peers] == [0, 0]


async def test_a_killed_server_loses_no_trajectory_and_is_used_again(
    peers: Sequence[Peer], tokenizer: Any, expected: list[list[int]]
) -> None:
    engine = SGLangServerEngine({"urls": [peer.url for peer in peers], **SETTINGS})
    try:
        await engine.start()
        killing = asyncio.create_task(disturb(engine, 0, lambda: peers[0].signal(signal.SIGKILL)))
        check(await run(engine, tokenizer), expected)
        await killing
        assert engine.resent >= 3
        assert not engine.replicas[0].up
        assert engine.replicas[0].error
        before = [replica.placed for replica in engine.replicas]
        check(await run(engine, tokenizer), expected)  # on the one that is left
        assert [replica.placed for replica in engine.replicas] == [before[0], before[1] + PROBLEMS]

        await asyncio.to_thread(peers[0].start)
        await until(lambda: engine.replicas[0].up)
        before = [replica.placed for replica in engine.replicas]
        check(await run(engine, tokenizer), expected)
        new = [after.placed - old for after, old in zip(engine.replicas, before, strict=True)]
        assert sum(new) == PROBLEMS
        assert min(new) >= PROBLEMS // 4
    finally:
        await engine.close()
    assert [await requests_on(peer.url) for peer in peers] == [0, 0]


async def test_a_hung_server_loses_no_trajectory_and_is_left_with_nothing_decoding(
    peers: Sequence[Peer], tokenizer: Any, expected: list[list[int]]
) -> None:
    engine = SGLangServerEngine({"urls": [peer.url for peer in peers], **SETTINGS})
    try:
        await engine.start()
        stopping = asyncio.create_task(disturb(engine, 1, lambda: peers[1].signal(signal.SIGSTOP)))
        check(await run(engine, tokenizer), expected)
        await stopping
        assert engine.resent >= 3
        assert not engine.replicas[1].up

        peers[1].signal(signal.SIGCONT)
        await until(lambda: engine.replicas[1].up)
        assert await requests_on(peers[1].url) == 0
        check(await run(engine, tokenizer), expected)
    finally:
        peers[1].signal(signal.SIGCONT)
        await engine.close()


async def test_all_servers_gone_ends_trajectories_as_engine_failures_that_name_them(
    peers: Sequence[Peer], tokenizer: Any
) -> None:
    engine = SGLangServerEngine({"urls": [peer.url for peer in peers], **SETTINGS, "unavailable_s": 1.0})
    try:
        await engine.start()

        def kill_both() -> None:
            for peer in peers:
                peer.signal(signal.SIGKILL)

        killing = asyncio.create_task(disturb(engine, 0, kill_both))
        async with asyncio.timeout(60):
            trajectories = await run(engine, tokenizer)
        await killing
        failed = [t for t in trajectories if t.end_reason is EndReason.ENGINE_FAILURE]
        assert failed
        assert all(t.masked and t.error is not None for t in failed)
        assert all(peer.url in str(t.error) for t in failed for peer in peers)
        assert all(t.end_reason is EndReason.FINAL_ANSWER for t in trajectories if t not in failed)
    finally:
        await engine.close()
