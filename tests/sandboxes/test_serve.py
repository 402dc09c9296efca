"""`agentloop sandbox serve`, as other programs see it."""

from __future__ import annotations

import asyncio
import base64
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.sandboxes.servers import COMMAND, Server, serving


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(tmp_path, "--max-concurrency", "1", "--queue", "1", "--grace-s", "5", limits={"timeout_s": 20}) as found:
        yield found


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def post(http: aiohttp.ClientSession, url: str, **body: Any) -> tuple[int, Any]:
    async with http.post(f"{url}/run_code", json={"language": "python", "run_timeout": 5, **body}) as response:
        return response.status, await response.json()


async def metrics(http: aiohttp.ClientSession, url: str) -> str:
    async with http.get(f"{url}/metrics") as response:
        return await response.text()


async def test_it_answers_as_sandbox_fusion_does(server: Server, http: aiohttp.ClientSession) -> None:
    code = "import sys\nprint(sys.stdin.read() + open('in.txt').read())\nopen('out.txt', 'w').write('made')\n1"
    files = {"in.txt": base64.b64encode(b"file").decode()}
    status, said = await post(http, server.url, code=code, stdin="stdin ", files=files, fetch_files=["out.txt"])
    run = said["run_result"]
    assert (status, said["status"], run["status"], run["return_code"]) == (200, "Success", "Finished", 0)
    assert run["stdout"] == "stdin file\n"
    assert base64.b64decode(said["files"]["out.txt"]) == b"made"
    assert set(said) == {"status", "message", "compile_result", "run_result", "executor_pod_name", "files"}
    _, failed = await post(http, server.url, code="raise SystemExit(3)")
    assert (failed["status"], failed["run_result"]["return_code"]) == ("Failed", 3)
    _, slow = await post(http, server.url, code="while True: pass", run_timeout=0.3)
    assert (slow["status"], slow["run_result"]["status"]) == ("Failed", "TimeLimitExceeded")
    _, flood = await post(http, server.url, code="print('x' * 150_000)")
    assert flood["run_result"]["status"] == "Finished"


async def test_wrong_requests_are_one_sentence(server: Server, http: aiohttp.ClientSession) -> None:
    assert (await post(http, server.url, code="1", language="cobol"))[0] == 422
    status, said = await post(http, server.url, code="1", run_timeout=1000)
    assert (status, said["message"]) == (400, "run_timeout 1000: this service gives at most 20 s")
    status, said = await post(http, server.url, code="1", memory_limit_MB=100_000)
    assert (status, said["message"].startswith("memory_limit_MB 100000: this service gives at most 512")) == (400, True)
    status, said = await post(http, server.url)
    assert (status, said["message"]) == (400, "code: field required")
    status, said = await post(http, server.url, code="1", files={"../x": ""})
    assert status == 400
    async with http.post(f"{server.url}/sessions/none/run", json={"code": "1", "language": "python"}) as response:
        assert response.status == 404


async def test_beyond_the_queue_it_says_when_to_come_again(server: Server, http: aiohttp.ClientSession) -> None:
    sleeping = [asyncio.create_task(post(http, server.url, code="import time; time.sleep(2)")) for _ in range(2)]
    await asyncio.sleep(0.5)
    async with http.post(f"{server.url}/run_code", json={"code": "1", "language": "python", "run_timeout": 5}) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
    assert [said["status"] for _, said in await asyncio.gather(*sleeping)] == ["Success", "Success"]
    text = await metrics(http, server.url)
    assert 'agentloop_sandbox_refused_total{code="429"} 1.0' in text
    assert 'agentloop_sandbox_runs_total{status="ok"} 2.0' in text
    assert "agentloop_sandbox_running 0.0" in text


async def test_a_client_that_hangs_up_frees_its_place(server: Server, http: aiohttp.ClientSession) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await post(http, server.url, code="while True: pass", run_timeout=20)
    async with asyncio.timeout(8):
        assert (await post(http, server.url, code="print(1)"))[1]["status"] == "Success"


async def test_told_to_stop_it_finishes_what_it_began(server: Server, http: aiohttp.ClientSession) -> None:
    running = asyncio.create_task(post(http, server.url, code="import time; time.sleep(4); print('finished')"))
    for _ in range(200):
        if "agentloop_sandbox_running 1.0" in await metrics(http, server.url):
            break
        await asyncio.sleep(0.05)
    server.terminate()
    for _ in range(60):
        async with http.get(f"{server.url}/v1/ping") as response:
            if response.status == 503:
                break
        await asyncio.sleep(0.05)
    assert response.status == 503
    async with http.post(f"{server.url}/run_code", json={"code": "1", "language": "python"}) as response:
        assert (response.status, "Retry-After" in response.headers) == (503, True)
    assert (await running)[1]["run_result"]["stdout"] == "finished\n"
    assert await asyncio.wait_for(server.process.wait(), 10) == 0


async def test_the_token_is_wanted_everywhere_but_for_health(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    async with serving(tmp_path, "--token-file", str(tmp_path / "token")) as server:
        for path in ("/healthz", "/v1/ping"):
            async with http.get(server.url + path) as response:
                assert response.status == 200
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            async with http.get(f"{server.url}/metrics", headers=given) as response:
                assert response.status == 401
            async with http.post(f"{server.url}/run_code", json={"code": "1", "language": "python"}, headers=given) as response:
                assert response.status == 401
        async with http.get(f"{server.url}/metrics", headers={"Authorization": "Bearer s3cret"}) as response:
            assert response.status == 200


@pytest.mark.slow
async def test_sessions_that_nobody_uses_are_closed(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with serving(tmp_path, "--session-idle-s", "1", "--max-sessions", "1") as server:
        async with http.post(f"{server.url}/sessions", json={}) as response:
            path = f"/sessions/{(await response.json())['session']}"
        async with http.post(f"{server.url}/sessions", json={}) as response:
            assert response.status == 429
        await asyncio.sleep(2)
        async with http.post(f"{server.url}{path}/run", json={"code": "1", "language": "python"}) as response:
            assert response.status == 404
        async with http.post(f"{server.url}/sessions", json={}) as response:
            assert response.status == 201


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others can reach this address, and without a token run code here; give"),
        (["--token-file", "nowhere"], "--token-file nowhere: cannot be read"),
        (["--kind", "proces"], "--kind: there is no sandbox of kind 'proces'; did you mean 'process'?"),
        (["--prot", "1"], "unknown option '--prot'; did you mean '--port'?"),
    ],
)
def test_what_is_wrong_is_one_sentence(options: list[str], sentence: str, tmp_path: Path) -> None:
    done = subprocess.run([COMMAND, "sandbox", "serve", *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
async def test_verls_own_client_understands_it(server: Server) -> None:
    pytest.importorskip("verl")
    from verl.utils.reward_score.sandbox_fusion.utils import check_correctness

    cases = {"inputs": ["2\n", "3\n"], "outputs": ["4\n", "9\n"]}
    url = f"{server.url}/run_code"
    results, _ = await asyncio.to_thread(check_correctness, url, cases, "print(int(input()) ** 2)", 5, 256)
    assert results == [True, True]
    results, _ = await asyncio.to_thread(check_correctness, url, cases, "print(4)", 5, 256)
    assert results == [True, False]
