"""One service a node: who shares it, what is freed when a client goes, and what a client sees when the daemon goes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentloop.sandboxes.base import SandboxError
from agentloop.sandboxes.node import Node, connect, run_folder

DESK = "services:Desk"
HERE = Path(__file__).resolve().parent
ENV = {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}


@pytest.fixture(autouse=True)
def folder(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("run")
    path.chmod(0o700)
    monkeypatch.setenv("AGENTLOOP_RUN_DIR", str(path))
    return path


async def desk(service: str = DESK, settings: dict | None = None, **options) -> Node:
    return await connect(service, settings, idle_s=0.2, env=ENV, **options)


async def gone(pid: int) -> bool:
    for _ in range(400):
        if not os.path.exists(f"/proc/{pid}"):  # noqa: ASYNC240
            return True
        await asyncio.sleep(0.02)
    return False


async def begun(node: Node) -> None:
    """Wait until a call of `sleep` is under way there."""
    while not await node.call("begun"):  # noqa: ASYNC110 - it happens in another process
        await asyncio.sleep(0.01)


async def freed(node: Node) -> None:
    for _ in range(200):
        if await node.call("count") == {"held": 0, "cancelled": 1}:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(await node.call("count"))


async def test_clients_with_the_same_settings_share_one_daemon_and_others_do_not():
    first, second, other = await asyncio.gather(desk(), desk(), desk(settings={"size": 2}))
    pids = [(await node.call("echo", {"a": 1}))["pid"] for node in (first, second, other)]
    assert pids[0] == pids[1] != pids[2]
    assert os.getpid() not in pids
    private = [await desk(scope="process") for _ in range(2)]
    assert len({(await node.call("echo"))["pid"] for node in private} | set(pids)) == 4
    for node in (first, second, other, *private):
        await node.close()


async def test_it_ends_itself_when_nobody_is_connected_and_leaves_no_file(folder):
    node = await desk()
    pid = (await node.call("echo"))["pid"]
    await node.close()
    assert await gone(pid)
    assert not list(folder.iterdir())


async def test_what_a_client_held_is_freed_when_it_goes():
    node, other = await asyncio.gather(desk(), desk())
    await other.call("hold")
    task = asyncio.create_task(other.call("sleep", {"s": 60}))
    await begun(node)
    assert (await node.call("count"))["held"] == 1
    await other.close()
    with pytest.raises(SandboxError):
        await task
    await freed(node)
    await node.close()


async def test_what_a_killed_client_held_is_freed():
    node = await desk()
    code = f"""
import asyncio, sys
from agentloop.sandboxes.node import connect
async def main():
    node = await connect({DESK!r}, {{}}, idle_s=0.2, env={ENV!r})
    await node.call("hold")
    print("held", flush=True)
    await node.call("sleep", {{"s": 60}})
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert (await process.stdout.readline()).strip() == b"held"
    await begun(node)
    assert (await node.call("count"))["held"] == 1
    process.send_signal(signal.SIGKILL)
    await process.wait()
    await freed(node)
    await node.close()


async def test_cancelling_a_call_cancels_it_there():
    node = await desk()
    task = asyncio.create_task(node.call("sleep", {"s": 60}))
    await begun(node)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await node.call("count"))["cancelled"] == 1
    await node.close()


async def test_calls_that_are_cancelled_before_they_begin_leave_room_for_others():
    node = await desk()
    await node.call("echo")
    for _ in range(8):
        tasks = [asyncio.create_task(node.call("sleep", {"s": 60})) for _ in range(200)]
        await asyncio.sleep(0)  # all requests are sent; the daemon reads them and what cancels them in one piece
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(10):
        assert (await node.call("echo", {"a": 1}))["a"] == 1
    await node.close()


async def test_errors_come_back_as_what_they_are():
    node = await desk()
    with pytest.raises(SandboxError, match=r"^the desk is closed$"):
        await node.call("fail")
    with pytest.raises(SandboxError, match="KeyError"):
        await node.call("bug")
    assert (await node.call("echo", {"still": "there"}))["still"] == "there"
    await node.close()


async def test_a_daemon_that_dies_is_replaced_at_the_next_call():
    node = await desk()
    before = (await node.call("echo"))["pid"]
    with pytest.raises(SandboxError, match="died"):
        await node.call("die")
    assert (await node.call("echo"))["pid"] != before
    await node.close()


async def test_a_service_that_does_not_start_says_why():
    with pytest.raises(SandboxError, match=r"^there is no desk here; buy one$"):
        await desk("services:Refuses")


async def test_descriptors_and_large_messages_travel():
    node = await desk()
    answer, fds = await node.call_with_fds("pipe")
    assert answer == "here"
    assert os.read(fds[0], 100) == b"through a passed descriptor"
    os.close(fds[0])
    texts = [str(i) * 400_000 for i in range(10)]
    answers = await asyncio.gather(*(node.call("echo", {"text": text}) for text in texts))
    assert [answer["text"] for answer in answers] == texts
    await node.close()


def test_a_folder_that_others_may_enter_is_refused(folder):
    folder.chmod(0o755)
    with pytest.raises(SandboxError, match="0700"):
        run_folder()
