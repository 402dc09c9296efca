"""`python`, `shell` and `file` in a real container: the same answers as in the `process` sandbox."""

from __future__ import annotations

import pytest

from agentloop.tools import ToolRegistry
from agentloop.tools.file import File
from agentloop.tools.python import Python
from agentloop.tools.shell import Shell
from agentloop.trajectory import CallStatus
from tests.sandboxes.docker_engine import docker_host
from tests.tools.sessions import call, opened


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_three_tools_share_a_container() -> None:
    config = {"sandbox": {"kind": "docker", "host": docker_host(), "limits": {"timeout_s": 5, "memory_mb": 256}}}
    registry = ToolRegistry.from_tools([Python(config), Shell(config), File(config)])
    try:
        async with opened(registry) as session:
            wrote = await call(session, "file", {"action": "write", "path": "notes/a.txt", "content": "from file\n"})
            assert wrote.text == "Wrote notes/a.txt (1 lines, 10 bytes)."
            code = "text = open('notes/a.txt').read(); print(text, end='')\nlen(text)"
            assert (await call(session, "python", {"code": code})).text == "from file\n10"
            assert (await call(session, "shell", {"command": "cat notes/a.txt; exit 3"})).text == "from file\n[Exit status 3.]"
            assert (await call(session, "file", {"action": "list"})).text == "notes/\nnotes/a.txt (10 bytes)"
            failed = await call(session, "python", {"code": "import json\njson.loads('{')"})
            assert failed.status is CallStatus.ERROR and "library code …]" in failed.text and "json.loads('{')" in failed.text
            late = await call(session, "python", {"code": "while True: pass"})
            assert "ran longer than 5 s and was stopped; variables are lost, files are kept" in late.text
            assert (await call(session, "file", {"action": "read", "path": "notes/a.txt"})).text == "     1\tfrom file"
            out = await call(session, "file", {"action": "read", "path": "../../etc/passwd"})
            assert "inside the working folder" in out.text
    finally:
        await registry.close()
