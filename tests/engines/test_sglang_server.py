"""The engine over HTTP against servers over the local engine, in this process: real HTTP, the quickstart's model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from safetensors.torch import load_file, save_file

from agentloop.engines.base import Sampling
from agentloop.engines.local import LocalEngine
from agentloop.engines.serve_local import LocalServer
from agentloop.engines.sglang_server import SGLangServerEngine
from agentloop.errors import ConfigError, EngineError
from agentloop.trajectory import StopReason
from tests.engines.peers import MODEL
from tests.engines.support import until

PROMPT = [5, 6, 7, 8]
LONG = 400
"""Tokens of a generation that is still running when a test gets to it."""
QUICK: dict[str, Any] = {
    "ignore_eos": True,
    "probe_interval_s": 0.1,
    "probe_timeout_s": 2.0,
    "health_timeout_s": 2.0,
    "connect_timeout_s": 2.0,
    "abort_timeout_s": 2.0,
    "unavailable_s": 20.0,
}

Serve = Callable[..., Awaitable[LocalServer]]
Connect = Callable[..., SGLangServerEngine]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts servers, on a given port or a free one."""
    servers: list[LocalServer] = []

    async def start(*, port: int = 0, slots: int = 8, **settings: Any) -> LocalServer:
        engine = LocalEngine.load(str(MODEL), max_slots=slots, threads=1)
        server = LocalServer(engine, **{"model_path": str(MODEL), "weight_version": "0", **settings})
        servers.append(server)
        await server.start(port=port)
        return server

    yield start
    for server in servers:
        await server.close()


@pytest.fixture
async def connect(tmp_path: Path) -> AsyncIterator[Connect]:
    engines: list[SGLangServerEngine] = []

    def make(*servers: LocalServer, **settings: Any) -> SGLangServerEngine:
        urls = [server.url for server in servers]
        engine = SGLangServerEngine({"urls": urls, "weights_dir": tmp_path, **QUICK, **settings})
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        await engine.close()


async def requests_on(server: LocalServer) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/get_load") as response:
        return sum(load["num_reqs"] for load in await response.json())


async def tell(server: LocalServer, path: str, body: dict[str, Any]) -> None:
    """What somebody else asks of the server."""
    async with aiohttp.ClientSession() as session, session.post(server.url + path, json=body) as response:
        assert response.status == 200


async def started(engine: SGLangServerEngine, name: str = "long", tokens: int = LONG) -> asyncio.Task[Any]:
    task = asyncio.create_task(engine.generate(PROMPT, Sampling(tokens, seed=1), trajectory_id=name))
    await until(lambda: sum(replica.in_flight for replica in engine.replicas) > 0)
    return task


# -- ending requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
async def test_a_cancelled_request_ends_on_the_server_however_early_it_is_cancelled(
    serve: Serve, connect: Connect, steps: int
) -> None:
    server = await serve()
    engine = connect(server)
    await engine.start()
    task = await started(engine)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.release("long")
    assert await requests_on(server) == 0
    assert len((await engine.generate(PROMPT, Sampling(3), trajectory_id="next")).ids) == 3


async def test_abort_all_leaves_the_requests_of_others_alone(serve: Serve, connect: Connect) -> None:
    server = await serve()
    mine, other = connect(server), connect(server)
    aborted, left = await started(mine, "mine"), await started(other, "other")
    await asyncio.sleep(0.05)
    await mine.abort_all()
    answer = await aborted
    assert answer.stop_reason is StopReason.ABORTED
    assert 0 < len(answer.ids) == len(answer.log_probs) < LONG
    assert len((await left).ids) == LONG


async def test_closing_ends_what_is_under_way(serve: Serve, connect: Connect) -> None:
    server = await serve()
    engine = connect(server)
    task = await started(engine)
    await engine.close()
    with pytest.raises(EngineError, match="closed"):
        await task
    assert await requests_on(server) == 0


async def test_no_more_requests_at_a_time_than_connections(serve: Serve, connect: Connect) -> None:
    engine = connect(await serve(), max_connections=2)
    tasks = [asyncio.create_task(engine.generate(PROMPT, Sampling(20), trajectory_id=f"t{i}")) for i in range(8)]
    most = 0
    while not all(task.done() for task in tasks):
        most = max(most, engine.replicas[0].in_flight)
        await asyncio.sleep(0.001)
    answers = [task.result() for task in tasks]
    assert most == 2
    assert [len(answer.ids) for answer in answers] == [20] * 8
    assert max(answer.queue_s for answer in answers) > 0


# -- servers that fail --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"answer_timeout_s": 2.0}, {"health_timeout_s": 0.5}], ids=["answer", "health"])
async def test_a_server_that_stops_answering_is_left_and_aborts_when_it_is_back(
    serve: Serve, connect: Connect, limits: dict[str, float]
) -> None:
    hung, other = await serve(), await serve()
    engine = connect(hung, other, **{"failures_to_eject": 1, "abort_timeout_s": 0.5, "health_timeout_s": 30.0, **limits})
    await engine.start()
    await tell(hung, "/pause_generation", {"mode": "in_place"})
    answers = await asyncio.gather(
        *(engine.generate(PROMPT, Sampling(40, temperature=0), trajectory_id=f"t{i}") for i in range(4))
    )
    assert len({tuple(answer.ids) for answer in answers}) == 1
    assert engine.resent >= 2
    assert [replica.up for replica in engine.replicas] == [False, True]
    assert await requests_on(hung) >= 2, "aborts do not reach what a paused server holds"
    await tell(hung, "/continue_generation", {})
    await until(lambda: engine.replicas[0].up)
    while await requests_on(hung):  # noqa: ASYNC110 - what is waited for happens on the server
        await asyncio.sleep(0.01)


async def test_nobody_there_is_an_error_in_bounded_time_that_names_everyone(connect: Connect) -> None:
    engine = connect(urls=["http://127.0.0.1:9", "http://127.0.0.1:11"], unavailable_s=0.3)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9 .*127\.0\.0\.1:11 "):
        await engine.start()
    began = time.monotonic()
    requests = (engine.generate(PROMPT, Sampling(1), trajectory_id=f"t{i}") for i in range(20))
    for error in await asyncio.gather(*requests, return_exceptions=True):
        assert isinstance(error, EngineError)
        assert "http://127.0.0.1:9 (" in str(error) and "http://127.0.0.1:11 (" in str(error)
    assert time.monotonic() - began < 15, "not one after the other"


async def test_a_server_that_comes_up_late_is_waited_for(serve: Serve, connect: Connect) -> None:
    first = await serve()
    port = int(first.url.rpartition(":")[2])
    await first.close()
    engine = connect(urls=[f"http://127.0.0.1:{port}"])
    task = asyncio.create_task(engine.generate(PROMPT, Sampling(4), trajectory_id="t"))
    await asyncio.sleep(0.3)
    assert not task.done()
    await serve(port=port)
    assert len((await task).ids) == 4


async def test_a_wrong_request_is_refused_and_not_sent_again(serve: Serve, connect: Connect) -> None:
    engine = connect(await serve(model_path="somewhere/else"), await serve(model_path="somewhere/else"))
    with pytest.raises(EngineError, match="687"):  # the vocabulary is not known here, so the server refuses
        await engine.generate([1, 687], Sampling(1), trajectory_id="t")
    assert engine.resent == 0
    assert all(replica.up for replica in engine.replicas if replica.placed)


async def test_a_server_that_only_accepts_connections_is_not_used(serve: Serve, connect: Connect) -> None:
    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    mute = await asyncio.start_server(silence, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{mute.sockets[0].getsockname()[1]}"
    server = await serve()
    engine = connect(urls=[url, server.url], probe_timeout_s=0.3)
    await engine.start()
    for i in range(4):
        assert (await engine.generate(PROMPT, Sampling(2), trajectory_id=f"t{i}")).ids
    assert [replica.placed for replica in engine.replicas] == [0, 4]
    await engine.close()
    mute.close()


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_a_server_that_turns_requests_away_for_a_while_is_asked_again(
    serve: Serve, connect: Connect, status: int
) -> None:
    """Behind a proxy that answers three requests by itself, as one does while its server is overloaded or restarts."""
    server, away = await serve(), 3

    async def forward(request: web.Request) -> web.Response:
        nonlocal away
        if request.path == "/generate" and away:
            away -= 1
            return web.Response(status=status, text="not now")
        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, server.url + request.path_qs, data=await request.read()) as answer,
        ):
            return web.Response(status=answer.status, body=await answer.read())

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    engine = connect(urls=[f"http://127.0.0.1:{runner.addresses[0][1]}"])
    assert len((await engine.generate(PROMPT, Sampling(2), trajectory_id="t")).ids) == 2
    assert (away, engine.resent) == (0, 3)
    await engine.close()
    await runner.cleanup()


async def test_a_request_that_a_server_fails_each_time_is_given_up(connect: Connect) -> None:
    """One whose health checks pass all the while."""

    async def fail(request: web.Request) -> web.Response:
        known: dict[str, Any] = {"/model_info": {"weight_version": "0"}, "/health": {}}
        return web.json_response(known.get(request.path), status=500 if request.path == "/generate" else 200)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fail)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    engine = connect(urls=[f"http://127.0.0.1:{runner.addresses[0][1]}"], resends=2)
    with pytest.raises(EngineError, match=r"lost 3 times.*answered 500"):
        await engine.generate(PROMPT, Sampling(2), trajectory_id="t")
    await engine.close()
    await runner.cleanup()


# -- keys ---------------------------------------------------------------------------------------------------------------------


async def test_each_path_gets_the_key_that_it_wants(serve: Serve, connect: Connect) -> None:
    server = await serve(api_key="users", admin_api_key="operators")
    engine = connect(server, api_key="users", admin_api_key="operators")
    task = await started(engine)
    await engine.abort_all()
    assert (await task).stop_reason is StopReason.ABORTED
    await engine.flush_cache()
    for wrong in ({}, {"api_key": "guess"}):
        with pytest.raises(EngineError, match="401"):
            await connect(server, **wrong).start()


# -- weights ------------------------------------------------------------------------------------------------------------------


def weights(scale: float = 1.0) -> dict[str, Any]:
    return {name: tensor * scale for name, tensor in load_file(str(MODEL / "model.safetensors")).items()}


async def test_an_update_aborts_and_every_token_has_an_exact_version(serve: Serve, connect: Connect) -> None:
    engine = connect(await serve(), await serve())
    task = await started(engine)
    await asyncio.sleep(0.05)
    await engine.update_weights(weights(0.5).items(), 3)
    answer = await task
    assert (answer.stop_reason, answer.min_weight_version, answer.weight_version) == (StopReason.ABORTED, 0, 0)
    assert len(answer.ids) < LONG
    for i in range(4):
        after = await engine.generate(PROMPT, Sampling(3), trajectory_id=f"t{i}")
        assert (after.min_weight_version, after.weight_version) == (3, 3)
    assert engine.weight_version == 3


@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_an_answer_that_goes_on_through_an_update_is_mixed(serve: Serve, connect: Connect, mode: str) -> None:
    engine = connect(await serve(), update_mode=mode)
    task = await started(engine)
    await engine.update_weights_from_disk(str(MODEL), 3)
    answer = await task
    assert (answer.stop_reason, answer.min_weight_version, answer.weight_version) == (StopReason.LENGTH, 0, 3)


async def test_an_update_by_somebody_else_is_mixed_too(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    server = await serve(weight_version="default")
    engine = connect(server)
    await engine.start()
    assert engine.weight_version is None
    save_file(weights(), str(tmp_path / "model.safetensors"))
    task = await started(engine)
    await tell(server, "/pause_generation", {"mode": "in_place"})
    body = {"model_path": str(tmp_path), "weight_version": "8", "flush_cache": False}
    await tell(server, "/update_weights_from_disk", body)
    await tell(server, "/continue_generation", {})
    answer = await task
    assert (answer.min_weight_version, answer.weight_version) == (-1, 8)
    assert engine.weight_version == 8


async def test_a_server_that_comes_back_with_old_weights_gets_the_new_ones_first(serve: Serve, connect: Connect) -> None:
    first, second = await serve(), await serve()
    engine = connect(first, second)
    await engine.start()
    await engine.update_weights(weights(0.5).items(), 3)
    port = int(first.url.rpartition(":")[2])
    await first.close()
    await until(lambda: not engine.replicas[0].up)
    await engine.update_weights(weights(2.0).items(), 4)  # without it
    await serve(port=port)
    await until(lambda: engine.replicas[0].up)
    answers = [await engine.generate(PROMPT, Sampling(6, temperature=0), trajectory_id=f"t{i}") for i in range(4)]
    assert all(replica.placed for replica in engine.replicas)
    assert {(answer.min_weight_version, answer.weight_version) for answer in answers} == {(4, 4)}
    assert len({tuple(answer.ids) for answer in answers}) == 1


async def test_wrong_weights_change_nothing(serve: Serve, connect: Connect, tmp_path: Path) -> None:
    engine = connect(await serve(), await serve())
    await engine.start()
    right = weights()
    name = "model.norm.weight"
    with pytest.raises(EngineError, match=r"no weight 'model\.norm\.wait': did you mean 'model\.norm\.weight'"):
        await engine.update_weights([*right.items(), ("model.norm.wait", right[name])], 3)
    with pytest.raises(EngineError, match=r"'model\.norm\.weight' has shape"):
        await engine.update_weights({**right, name: right[name][:3].clone()}.items(), 3)
    with pytest.raises(EngineError, match="Cannot find any model weights"):
        await engine.update_weights_from_disk(str(tmp_path / "nowhere"), 3)
    answers = [await engine.generate(PROMPT, Sampling(3), trajectory_id=f"t{i}") for i in range(2)]
    assert [answer.weight_version for answer in answers] == [0, 0]
    assert engine.weight_version == 0
    assert all(replica.up for replica in engine.replicas)


async def test_update_weights_needs_a_shared_folder(serve: Serve, connect: Connect) -> None:
    with pytest.raises(EngineError, match="weights_dir"):
        await connect(await serve(), weights_dir=None).update_weights(weights().items(), 3)
    with pytest.raises(EngineError, match=r"weights_dir: .*/no/such/folder"):
        await connect(await serve(), weights_dir="/no/such/folder").update_weights(weights().items(), 3)


async def test_only_the_last_weights_stay_on_disk_and_none_after_closing(
    serve: Serve, connect: Connect, tmp_path: Path
) -> None:
    engine = connect(await serve())
    for version in (1, 2, 3):
        await engine.update_weights(weights().items(), version)
    folders = [path.parent.name.partition("-")[0] for path in tmp_path.rglob("*.safetensors")]  # noqa: ASYNC240
    assert folders == ["3"]
    await engine.close()
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240


# -- memory, cache, pausing ---------------------------------------------------------------------------------------------------


async def test_sleeping_servers_are_left_in_peace(serve: Serve, connect: Connect) -> None:
    engine = connect(await serve(), failures_to_eject=1, health_timeout_s=0.3)
    task = await started(engine)
    await engine.sleep(("kv_cache",))
    assert (await task).stop_reason is StopReason.ABORTED
    await asyncio.sleep(1.0)  # a /health would take longer than its limit now
    assert engine.replicas[0].up
    await engine.sleep()
    await engine.wake()
    assert (await engine.generate(PROMPT, Sampling(2), trajectory_id="t")).ids


async def test_the_prefix_cache_is_flushed_only_when_nothing_runs(serve: Serve, connect: Connect) -> None:
    engine = connect(await serve())
    first = await engine.generate(PROMPT, Sampling(4), trajectory_id="t")
    task = await started(engine)
    with pytest.raises(EngineError, match="Flush cache failed"):
        await engine.flush_cache()
    await engine.abort_all()
    await task
    await engine.flush_cache()
    again = await engine.generate(PROMPT + first.ids + [1], Sampling(4), trajectory_id="t")
    assert again.cached_tokens == 0
    more = await engine.generate(PROMPT + first.ids + [1] + again.ids + [2], Sampling(4), trajectory_id="t")
    assert more.cached_tokens > len(PROMPT + first.ids)


async def test_servers_that_are_paused_take_requests_later(serve: Serve, connect: Connect) -> None:
    engine = connect(await serve())
    await engine.start()
    await engine.pause_generation()
    task = asyncio.create_task(engine.generate(PROMPT, Sampling(2), trajectory_id="t"))
    await asyncio.sleep(0.2)
    assert not task.done()
    await engine.continue_generation()
    assert len((await task).ids) == 2


async def test_limits_are_those_of_the_server(serve: Serve, connect: Connect) -> None:
    engine = connect(await serve())
    for bad in ([-1], [687]):
        with pytest.raises(EngineError, match=str(bad[0])):
            await engine.generate(bad, Sampling(1), trajectory_id="t")
    with pytest.raises(EngineError, match="1024 tokens"):
        await engine.generate([1] * 1024, Sampling(1), trajectory_id="t")
    assert len((await engine.generate([1] * 1000, Sampling(500), trajectory_id="t")).ids) == 24
    with pytest.raises(EngineError, match="only 1 can be scored"):
        await engine.score(PROMPT, temperature=0.5)


def test_an_environment_that_changes_log_probabilities_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    with pytest.raises(ConfigError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
        SGLangServerEngine({"urls": "http://127.0.0.1:9"})
