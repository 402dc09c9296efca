"""The kind `remote` against real services, some of which die, and against peers that misbehave."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ConfigError
from agentloop.sandboxes import Limits, SandboxError, Status, load_sandbox
from agentloop.sandboxes.remote import RemoteConfig, RemoteSandbox
from tests.sandboxes.servers import Peer, http, peer, serving

FAST = {"probe_interval_s": 0.1, "overhead_s": 5.0}
OK = b'{"status":"Success","message":"","run_result":{"status":"Finished","execution_time":0.1,"return_code":0,"stdout":"hi"}}'


def remote(*urls: str, **settings: Any) -> RemoteSandbox:
    return RemoteSandbox(RemoteConfig(endpoints=urls, **{**FAST, **settings}))


# --- our own service


async def test_runs_and_sessions_over_the_network_are_as_exact_as_here(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, remote(server.url) as sandbox:
        once = await sandbox.run("print('out')\n6 * 7", files={"a": "1"}, fetch=["a", "missing"])
        assert (once.status, once.stdout, once.value, once.files) == (Status.OK, "out\n", "42", {"a": b"1"})
        flood = await sandbox.run("while True: print('x' * 1000)")
        assert (flood.status, len(flood.stdout), flood.stdout_cut > 0) == (Status.OUTPUT_LIMIT, 64 * 1024, True)
        assert (await sandbox.run("b'x' * (2 << 30)")).status is Status.OOM
        assert (await sandbox.run("exit 3", language="sh")).exit_code == 3
        async with sandbox.session(Limits(timeout_s=3)) as session:
            await session.run("x = 6")
            assert (await session.run("x * 7")).value == "42"
            await session.put("folder/f.bin", b"\0\xff")
            assert await session.get("folder/f.bin") == b"\0\xff"
            for path, error in (("nope", FileNotFoundError), ("folder", IsADirectoryError), ("../x", ValueError)):
                with pytest.raises(error):
                    await session.get(path)
            with pytest.raises(ValueError, match="larger than 1 bytes"):
                await session.get("folder/f.bin", max_bytes=1)
            with pytest.raises(OSError, match="No space left"):
                await session.put("big", b"x" * (65 << 20))
            lost = await session.run("while True: pass", timeout=0.3)
            assert (lost.status, lost.state_lost) == (Status.TIMEOUT, True)
            assert (await session.run("'x' in globals()")).value == "False"
        layers = await sandbox.layers()
        assert any(layer.name == f"{server.url}: network namespace" and layer.active for layer in layers)
        too_much = await sandbox.run("1", limits=Limits(memory_mb=100_000))
        assert too_much.status is Status.INFRA
        assert "this service gives at most 512" in too_much.error


@pytest.mark.slow
async def test_a_service_killed_mid_run_is_infra_for_that_run_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    async with (
        serving(tmp_path / "one") as one,
        serving(tmp_path / "other") as other,
        remote(one.url, other.url) as sandbox,
    ):
        session = sandbox.session()
        await session.open()
        await session.run("x = 1")
        home = next(endpoint for endpoint in sandbox._endpoints.all if endpoint.running)  # type: ignore[union-attr]
        dying, living = (one, other) if home.url == one.url else (other, one)
        run = asyncio.create_task(session.run("import time; time.sleep(10)"))
        await asyncio.sleep(0.5)
        await dying.kill()
        result = await run
        assert (result.status, result.state_lost) == (Status.INFRA, True)
        assert dying.url in result.error
        after = await session.run("'x' in globals()")  # a fresh one, on the other
        assert (after.status, after.value) == (Status.OK, "False")
        assert all(found.ok for found in await asyncio.gather(*(sandbox.run("1") for _ in range(6))))
        await session.close()
        # The dead one is taken back once something answers there.
        again = "one" if dying is one else "other"
        async with serving(tmp_path / again, "--port", str(dying.port)):
            for _ in range(100):
                if home.up:
                    break
                await asyncio.sleep(0.1)
            assert home.up
            await living.kill()
            assert (await sandbox.run("'back'")).value == "'back'"


async def test_a_cancelled_run_ends_at_the_service(tmp_path: Path) -> None:
    async with serving(tmp_path, "--max-concurrency", "1") as server, remote(server.url) as sandbox:
        run = asyncio.create_task(sandbox.run("while True: pass", timeout=10))
        await asyncio.sleep(1)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        assert (await asyncio.wait_for(sandbox.run("1"), 5)).value == "1"


@pytest.mark.slow
async def test_a_token_is_sent(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    async with serving(tmp_path, "--token-file", str(tmp_path / "token")) as server:
        async with remote(server.url, token_file=tmp_path / "token") as sandbox:
            assert (await sandbox.run("1")).value == "1"
        async with remote(server.url) as sandbox:
            result = await sandbox.run("1")
            assert result.status is Status.INFRA
            assert "401" in result.error and "bearer token" in result.error


# --- services that fail


async def test_the_least_loaded_takes_the_next() -> None:
    async with peer(lambda *_: http(200, OK)) as one, peer(lambda *_: http(200, OK)) as other:
        async with remote(one.url, other.url) as sandbox:
            await asyncio.gather(*(sandbox.run("1") for _ in range(20)))
        assert abs(len(one.requests) - len(other.requests)) <= 2


async def test_busy_means_later_or_elsewhere() -> None:
    busy = http(429, b"{}", Retry_After="0.2")
    async with peer(lambda number, _: busy if number == 1 else http(200, OK)) as alone, remote(alone.url) as sandbox:
        assert (await sandbox.run("1")).stdout == "hi"
        assert len(alone.requests) == 2
    async with (
        peer(lambda *_: http(503, b"{}", Retry_After="30")) as full,
        peer(lambda *_: http(200, OK)) as free,
        remote(full.url, free.url) as sandbox,
    ):
        results = await asyncio.gather(*(sandbox.run("1") for _ in range(4)))
        assert all(result.ok for result in results)


@pytest.mark.parametrize("reply", [None, http(500, b'{"detail":"boom"}'), http(502, b"bad gateway"), http(503, b"{}")])
async def test_what_may_have_run_is_not_run_twice(reply: bytes | None) -> None:
    async with peer(lambda *_: reply) as broken, peer(lambda *_: reply) as other:
        async with remote(broken.url, other.url) as sandbox:
            assert (await sandbox.run("1")).status is Status.INFRA
        assert len(broken.requests) + len(other.requests) == 1
        async with remote(broken.url, other.url, idempotent=True, max_attempts=3) as sandbox:
            assert (await sandbox.run("1")).status is Status.INFRA
        assert len(broken.requests) + len(other.requests) == 4


@pytest.mark.parametrize(
    "reply",
    [b"no json", b"[]", b'{"status":"Great"}', b'{"status":"Success","agentloop":{},"run_result":{"status":"Finished"}}'],
)
async def test_an_answer_that_is_none_is_infra(reply: bytes) -> None:
    async with peer(lambda *_: http(200, reply)) as odd, remote(odd.url) as sandbox:
        result = await sandbox.run("1")
        assert result.status is Status.INFRA
        assert odd.url in result.error


async def test_a_service_that_fails_again_and_again_is_left_alone() -> None:
    async with peer(lambda *_: None) as broken, peer(lambda *_: http(200, OK)) as good:
        async with remote(broken.url, good.url, failures_to_eject=2, probe_interval_s=60) as sandbox:
            results = [await sandbox.run("1") for _ in range(12)]
        assert [result.status for result in results].count(Status.INFRA) == 2
        assert len(broken.requests) == 2


async def test_one_deadline_covers_every_attempt() -> None:
    async with peer(lambda *_: http(429, b"{}", Retry_After="1.5")) as full:
        async with remote(full.url, overhead_s=1.9, compile_timeout_s=0.1, max_attempts=100) as sandbox:
            result = await asyncio.wait_for(sandbox.run("1", timeout=0.5), 10)
        assert result.status is Status.INFRA
        assert "429" in result.error
        assert len(full.requests) == 2


def opens(number: int, line: str) -> bytes:
    return http(201, b'{"session":"it"}') if line == "POST /sessions" else http(204, b"")


async def test_a_session_closed_while_it_opens_ends_at_the_service() -> None:
    async with peer(opens) as service, remote(service.url) as sandbox:
        await sandbox.start()
        service.after_s = 0.5
        session = sandbox.session()
        opening = asyncio.create_task(session.open())
        await arrived(service, 1)
        await session.close()
        assert service.requests == ["POST /sessions", "DELETE /sessions/it"]
        with pytest.raises(SandboxError, match="remote: the session is closed"):
            await opening


async def test_a_session_cancelled_while_it_opens_ends_at_the_service() -> None:
    async with peer(opens) as service, remote(service.url) as sandbox:
        await sandbox.start()
        service.after_s = 0.5
        session = sandbox.session()
        opening = asyncio.create_task(session.open())
        await arrived(service, 1)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(opening, 0.2)
        await session.open()  # another one
        await arrived(service, 3)
        assert sorted(service.requests) == ["DELETE /sessions/it", "POST /sessions", "POST /sessions"]
        await session.close()
    assert service.requests.count("DELETE /sessions/it") == 2


async def test_a_sandbox_that_closes_ends_its_sessions_at_the_service() -> None:
    async with peer(opens) as service:
        async with remote(service.url) as sandbox:
            await sandbox.session().open()
            service.after_s = 0.3
            opening = asyncio.create_task(sandbox.session().open())
            await arrived(service, 2)
        assert service.requests.count("DELETE /sessions/it") == 2
        with pytest.raises(SandboxError, match="remote: the session is closed"):
            await opening


async def arrived(service: Peer, count: int) -> None:
    for _ in range(200):
        if len(service.requests) >= count:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(service.requests)


async def test_a_foreign_service_has_no_sessions_and_knows_sh_as_bash() -> None:
    def script(number: int, line: str) -> bytes:
        if line != "POST /run_code":
            return http(404, b'{"detail":"Not Found"}')
        return http(422, b'{"detail":"unknown language"}') if number == 1 else http(200, OK)

    async with peer(script) as foreign, remote(foreign.url) as sandbox:
        assert (await sandbox.run("echo hi", language="sh")).stdout == "hi"
        with pytest.raises(SandboxError, match="this service has no sessions; only `agentloop sandbox serve` keeps them"):
            await sandbox.session().open()
        assert [layer.active for layer in await sandbox.layers()] == [False]


async def test_what_is_wrong_is_one_sentence() -> None:
    with pytest.raises(SandboxError, match=r"no service answers: http://127\.0\.0\.1:9 \(Connect"):
        await remote("http://127.0.0.1:9").start()
    with pytest.raises(ConfigError, match="sandbox: key 'endpoints': 'node7' is no address: expected http://host:port"):
        load_sandbox({"kind": "remote", "endpoints": ["node7"]})
    with pytest.raises(ConfigError, match="sandbox: key 'endpoints' is missing"):
        load_sandbox("remote")
