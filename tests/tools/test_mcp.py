"""`mcp`: a server from PyPI, one made with the SDK (stdio and HTTP), and one that misbehaves in every way we know."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="mcp is not installed")

from agentloop.errors import ConfigError
from agentloop.tools import ToolRegistry, ToolSession
from agentloop.tools.mcp import McpServer
from agentloop.trajectory import CallRecord, CallStatus, Sample, ToolCall

HERE = Path(__file__).parent
PLAIN = {"command": sys.executable, "args": [str(HERE / "mcp_plain.py")]}


def plain(*options: str, **config: Any) -> dict[str, Any]:
    return {**PLAIN, "args": [*PLAIN["args"], *options], **config}


@asynccontextmanager
async def trajectory(registry: ToolRegistry) -> AsyncIterator[ToolSession]:
    session = registry.session(Sample(messages=[]), "row_0")
    await session.open()
    try:
        yield session
    finally:
        await session.close()


async def call(session: ToolSession, name: str, /, **arguments: Any) -> CallRecord:
    return await session.call(ToolCall(name, arguments), deadline=asyncio.get_running_loop().time() + 60)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


# -- a server of the SDK, and one from PyPI -----------------------------------------------------------------------------


async def test_a_published_server_tells_the_time() -> None:
    program = shutil.which("mcp-server-time", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("mcp-server-time is not installed")
    config = {"command": program, "args": ["--local-timezone", "UTC"], "include": ["convert_time"], "prefix": "clock_"}
    registry = ToolRegistry.from_tools([McpServer(config)])
    assert registry.names == ["clock_convert_time"]
    async with trajectory(registry) as session:
        arguments = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
        good, bad = await asyncio.gather(
            call(session, "clock_convert_time", **arguments),
            call(session, "clock_convert_time", **{**arguments, "target_timezone": "Mars/Base"}),
        )
    assert good.status is CallStatus.OK
    assert "T21:00:00+09:00" in good.text
    assert bad.status is CallStatus.ERROR
    assert "Mars/Base" in bad.text


async def test_a_server_of_the_sdk_over_stdio() -> None:
    config = {"command": sys.executable, "args": [str(HERE / "mcp_official.py")], "max_message_bytes": 100_000}
    registry = ToolRegistry.from_tools([McpServer(config)])
    schema = registry.schemas[0]["function"]
    assert (schema["name"], schema["description"]) == ("take", "Take something from the stock.")
    assert schema["parameters"]["properties"]["amount"] == {"type": "integer", "default": 1}
    async with trajectory(registry) as session:
        assert json.loads((await call(session, "take", what="apple")).text) == {"left": 2}
        assert json.loads((await call(session, "take", what="apple")).text) == {"left": 1}  # one session
        missing = await call(session, "take", what="pear")
        assert (missing.status, "there is no pear" in missing.text) == (CallStatus.ERROR, True)
        assert (await call(session, "take", what=3)).status is CallStatus.INVALID_ARGUMENTS
        large = await call(session, "large", size=200_000)
        assert (large.status, large.text) == (CallStatus.ERROR, "Error: the answer is larger than 100000 bytes. Ask for less.")
        assert (await call(session, "die")).status is CallStatus.INFRA
        assert json.loads((await call(session, "take", what="apple")).text) == {"left": 2}  # a new one


class HttpServer:
    """The SDK's server on a port of its own; can be killed and started again."""

    def __init__(self) -> None:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(HERE / "mcp_official.py"), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("the server does not listen")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def http_server() -> Iterator[HttpServer]:
    server = HttpServer()
    yield server
    server.kill()


async def test_a_server_of_the_sdk_over_http(http_server: HttpServer) -> None:
    config = {"url": http_server.url, "max_message_bytes": 100_000, "exclude": ["die"]}
    async with trajectory(ToolRegistry.from_tools([McpServer(config)])) as session:
        assert (await call(session, "large", size=3)).text == "xxx"
    registry = ToolRegistry.from_tools([McpServer({**config, "scope": "process"})])
    try:
        async with trajectory(registry) as session:
            assert json.loads((await call(session, "take", what="apple")).text) == {"left": 2}
            large = await call(session, "large", size=200_000)
            assert large.status is CallStatus.ERROR
            assert "larger than 100000 bytes" in large.text
            http_server.kill()
            assert (await call(session, "take", what="apple")).status is CallStatus.INFRA
            await asyncio.to_thread(http_server.start)
            assert json.loads((await call(session, "take", what="apple")).text) == {"left": 2}
    finally:
        await registry.close()


# -- sessions -----------------------------------------------------------------------------------------------------------


async def test_a_session_for_each_trajectory_shared_by_the_servers_tools() -> None:
    registry = ToolRegistry.from_tools([McpServer(plain())])
    async with trajectory(registry) as first, trajectory(registry) as second:
        assert [(await call(first, "count")).text for _ in range(2)] == ["1", "2"]
        assert (await call(second, "count")).text == "1"
        pid = int((await call(first, "child")).text.split()[0])
        assert alive(pid)
    assert not alive(pid)


async def test_one_session_for_all_trajectories_of_a_process() -> None:
    registry = ToolRegistry.from_tools([McpServer(plain(scope="process"))])
    async with trajectory(registry) as first:
        assert (await call(first, "count")).text == "1"
    async with trajectory(registry) as second:
        assert (await call(second, "count")).text == "2"
        pid = int((await call(second, "child")).text.split()[0])
    assert alive(pid)
    await registry.close()
    assert not alive(pid)


def test_one_registry_serves_several_event_loops() -> None:
    registry = ToolRegistry.from_tools([McpServer(plain(scope="process"))])

    async def once() -> str:
        async with trajectory(registry) as session:
            return (await call(session, "count")).text

    assert [asyncio.run(once()) for _ in range(3)] == ["1", "2", "3"]
    asyncio.run(registry.close())


async def test_a_server_that_ignores_sigterm_and_has_children_is_gone_with_its_trajectory() -> None:
    registry = ToolRegistry.from_tools([McpServer(plain())])
    async with trajectory(registry) as session:
        pids = [int(pid) for pid in (await call(session, "child")).text.split()]
        await asyncio.wait({hang := asyncio.create_task(call(session, "hang"))}, timeout=0.2)
        hang.cancel()
        await asyncio.gather(hang, return_exceptions=True)
    assert not any(alive(pid) for pid in pids)


def test_servers_end_with_the_interpreter() -> None:
    code = (
        "import asyncio, json, sys\nfrom agentloop.tools.mcp import McpServer\n"
        "tools = {t.name: t for t in McpServer(json.loads(sys.argv[1])).tools}\n"
        "async def main():\n"
        "    await tools['child'].create('i')\n"
        "    print((await tools['child'].execute('i', {}))[0].text, flush=True)\n"
        "asyncio.run(main())"
    )
    command = [sys.executable, "-c", code, json.dumps(plain(scope="process"))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert not any(alive(int(pid)) for pid in printed.stdout.split())


async def test_a_start_that_is_given_up_leaves_no_server(tmp_path: Path) -> None:
    registry = ToolRegistry.from_tools([McpServer(plain(f"pid={tmp_path / 'pid'}", "start=slow-again"))])
    assert not alive(int((tmp_path / "pid").read_text()))
    (tmp_path / "pid").unlink()
    async with trajectory(registry) as session:
        late = asyncio.create_task(call(session, "count"))
        await asyncio.to_thread(wait_for, tmp_path / "pid")
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
    assert not alive(int((tmp_path / "pid").read_text()))


async def test_nothing_is_left_after_many_trajectories() -> None:
    registry = ToolRegistry.from_tools([McpServer(plain())])

    async def one(number: int) -> CallRecord:
        async with trajectory(registry) as session:
            return await call(session, "die" if number % 3 == 0 else "count")

    await asyncio.gather(*(one(number) for number in range(3)))
    handles = len(os.listdir("/proc/self/fd"))
    records = await asyncio.gather(*(one(number) for number in range(12)))
    assert [record.status for record in records[:3]] == [CallStatus.INFRA, CallStatus.OK, CallStatus.OK]
    assert len(os.listdir("/proc/self/fd")) <= handles
    assert "mcp_plain" not in children()


def children() -> str:
    """The commands of our children."""
    found = []
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread, or a child, that has just ended
            found += [Path(f"/proc/{pid}/cmdline").read_text() for pid in file.read_text().split()]
    return " ".join(found)


# -- what a server may do to us -----------------------------------------------------------------------------------------


async def test_what_a_server_answers_becomes_text() -> None:
    async with trajectory(ToolRegistry.from_tools([McpServer(plain(max_output_chars=200))])) as session:
        assert (await call(session, "echo", text="héllo\n")).text == "héllo\n"
        failed = await call(session, "fail")
        assert (failed.status, failed.text, failed.on_error) == (CallStatus.ERROR, "no such city", "observe")
        blocks = (await call(session, "blocks")).text.splitlines()
        assert blocks == [
            "[left out: image image/png]",
            "[a link, not followed: notes http://127.0.0.1:1/notes]",
            "inside",
            "[left out: audio/mp3]",
        ]
        assert (await call(session, "long", size=200)).text == "a" * 100 + "\n[… 200 characters left out …]\n" + "b" * 100
        assert (await call(session, "noise")).text == "still here"
        assert (await call(session, "wrong")).status is CallStatus.INFRA
        assert (await call(session, "echo", text="on")).text == "on"


async def test_a_long_error_loses_its_middle() -> None:
    async with trajectory(ToolRegistry.from_tools([McpServer(plain(max_output_chars=100))])) as session:
        record = await call(session, "refuse")
        assert (record.status, record.text[:9]) == (CallStatus.ERROR, "Error: no")
        assert "characters left out" in record.text and len(record.text) < 200
        assert (await call(session, "count")).text == "1"


async def test_an_answer_that_is_too_large_is_told_and_the_session_goes_on() -> None:
    async with trajectory(ToolRegistry.from_tools([McpServer(plain())])) as session:
        assert (await call(session, "count")).text == "1"
        huge = await call(session, "huge")
        assert (huge.status, huge.text) == (CallStatus.ERROR, "Error: the answer is larger than 1000000 bytes. Ask for less.")
        assert (await call(session, "count")).text == "2"


@pytest.mark.parametrize("name", ["hang", "endless"])
async def test_a_server_that_hangs_times_out_and_the_next_call_finds_a_new_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentloop.tools.mcp.connection.PROBE_S", 0.2)
    async with trajectory(ToolRegistry.from_tools([McpServer(plain(call_timeout_s=1.5))])) as session:
        assert (await call(session, "count")).text == "1"
        late = await call(session, name)
        assert late.status is CallStatus.TIMEOUT
        assert "no answer within 1.5 s" in late.text
        await asyncio.sleep(0.5)
        assert (await call(session, "count")).text == "1"


async def test_a_servers_start_is_not_the_tools_own_time() -> None:
    registry = ToolRegistry.from_tools([McpServer(plain("delay=1.5"))], {"count": {"timeout": 1}})
    async with trajectory(registry) as session:
        record = await call(session, "count")
    assert (record.status, record.text) == (CallStatus.OK, "1")
    assert record.queue_s > 1 > record.run_s


async def test_a_server_that_is_only_slow_keeps_its_session() -> None:
    async with trajectory(ToolRegistry.from_tools([McpServer(plain(call_timeout_s=1))])) as session:
        assert (await call(session, "count")).text == "1"
        assert (await call(session, "sleep", seconds=1.5)).status is CallStatus.TIMEOUT
        await asyncio.sleep(1)
        assert (await call(session, "count")).text == "2"


async def test_a_server_that_dies_is_an_infrastructure_failure_and_retries_find_a_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    server = McpServer(plain(stderr=str(tmp_path / "stderr.txt")))
    registry = ToolRegistry.from_tools([server], {"die": {"retries": 1}})
    async with trajectory(registry) as session:
        record = await call(session, "die")
        assert (record.status, record.attempts) == (CallStatus.INFRA, 2)
        assert "a last word" not in record.text
        assert (await call(session, "echo", text="again")).text == "again"
    assert "a last word" in caplog.text
    assert "a last word" in (tmp_path / "stderr.txt").read_text()
    assert capfd.readouterr().err.count("starting") == 0


async def test_the_servers_environment_is_what_the_configuration_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OUR_SECRET", "THEIR_SECRET", "HANDED_ON"):
        monkeypatch.setenv(name, name.lower())
    config = plain(env={"A": "b", "TOKEN": {"env": "THEIR_SECRET"}}, inherit_env=["HANDED_ON", "NOT_SET_ANYWHERE"])
    async with trajectory(ToolRegistry.from_tools([McpServer(config)])) as session:
        environment = json.loads((await call(session, "env")).text)
        refused = await call(session, "refuse")
    assert (refused.status, refused.text) == (CallStatus.ERROR, "Error: not with [secret]")
    environment.pop("LC_CTYPE", None)  # Python sets it for itself
    assert environment == {"A": "b", "TOKEN": "[secret]", "HANDED_ON": "handed_on"}


async def test_imported_schemas_hold_no_regular_expressions() -> None:
    registry = ToolRegistry.from_tools([McpServer(plain(rename={"echo": "say"}, prefix="p_", include=["echo", "pattern"]))])
    assert registry.names == ["say", "p_pattern"]
    parameters = [schema["function"]["parameters"]["properties"] for schema in registry.schemas]
    assert parameters == [{"text": {"type": "string"}}, {"pattern": {"type": "string"}}]
    async with trajectory(registry) as session:
        assert (await call(session, "say", text="a" * 40 + "!")).status is CallStatus.OK


# -- what is wrong with a configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "config: give either 'command' (a server to start) or 'url' (one that runs)"),
        ({"comand": "x"}, "unknown key 'config.comand'; did you mean 'command'?"),
        ({"command": "no-such-program-here"}, "config.command: there is no program 'no-such-program-here'"),
        ({"url": "localhost/mcp"}, "config.url: expected http://host:port/mcp, got 'localhost/mcp'"),
        ({"url": "http://127.0.0.1:1/mcp"}, "the MCP server http://127.0.0.1:1/mcp cannot be used: it did not start"),
        (plain(scope="trajectry"), "config: key 'scope'"),
        (plain(inclde=["echo"]), "config: unknown key 'inclde'; did you mean 'include'?"),
        (plain(include=["ecko"]), "config.include: the MCP server has no tool 'ecko'; did you mean 'echo'?"),
        (plain(rename={"echo": "e c h o"}), "the MCP server's tool 'echo': 'e c h o' cannot be a tool's name"),
        (plain(rename={"echo": "count"}), "the name 'count' is taken"),
        (plain(env={"K": {"env": "NO_SUCH_VARIABLE_HERE"}}), "config.env.K: the environment variable 'NO_SUCH_VARIABLE_HERE'"),
        (plain("start=hang", start_timeout_s=0.5), "cannot be used: it did not start within 0.5 s"),
        (plain("start=die"), "there is no database"),
        (plain("listing=none"), "has no tools"),
        (plain("listing=huge"), "the answer is larger than 1000000 bytes"),
        (plain("listing=wide"), "'odd': its schema has"),
        (plain("listing=deep"), "'odd': its schema is nested more than 30 deep; leave it out with 'exclude'"),
        (plain("listing=remote"), "'odd': its schema refers to another document ('http://127.0.0.1:1/schema.json')"),
        (plain("listing=loop"), "'odd': its schema refers to itself"),
        (plain("listing=badname"), "'no spaces, please' cannot be a tool's name; give it one with 'rename'"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    file = tmp_path / "tools.yaml"
    file.write_text(json.dumps({"tools": [{"class_name": "mcp", "config": config}]}))
    with pytest.raises(ConfigError) as caught:
        ToolRegistry.from_yaml(file)
    assert str(caught.value).startswith(f"{file}: tool 'mcp': ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tools_with_odd_schemas_can_be_left_out(tmp_path: Path) -> None:
    server = McpServer(plain("listing=deep", "start=noise", exclude=["odd"]))
    assert "echo" in [tool.name for tool in server.tools]
