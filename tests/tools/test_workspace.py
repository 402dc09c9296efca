"""`python`, `shell` and `file` in the real `process` sandbox: one session a trajectory, and what the model is told."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ConfigError, ToolInfraError
from agentloop.sandboxes.base import SandboxError
from agentloop.sandboxes.load import load_sandbox
from agentloop.tools import ToolRegistry
from agentloop.tools.file import File
from agentloop.tools.python import Python
from agentloop.tools.registry import read_tools
from agentloop.tools.shell import Shell
from agentloop.trajectory import CallRecord, CallStatus
from tests.tools.sessions import call, opened

BOX: dict[str, Any] = {"kind": "process", "preload": [], "limits": {"timeout_s": 2, "memory_mb": 256, "output_bytes": 4000}}


@pytest.fixture
async def registry() -> AsyncIterator[ToolRegistry]:
    config = {"sandbox": BOX}
    registry = ToolRegistry.from_tools([Python(config), Shell(config), File({**config, "max_lines": 20})])
    try:
        async with load_sandbox(BOX):
            yield registry
    except SandboxError as error:
        pytest.skip(f"no process sandbox here: {error}")
    finally:
        await registry.close()


async def python(session: Any, code: str) -> CallRecord:
    return await call(session, "python", {"code": code})


async def shell(session: Any, command: str) -> CallRecord:
    return await call(session, "shell", {"command": command})


async def file(session: Any, action: str, path: str = ".", **arguments: Any) -> CallRecord:
    return await call(session, "file", {"action": action, "path": path, **arguments})


async def test_a_registry_that_closes_leaves_anothers_sandbox_open(registry: ToolRegistry) -> None:
    other = ToolRegistry.from_tools([Python({"sandbox": BOX})])
    async with opened(registry) as session:
        await python(session, "x = 6")
        async with opened(other) as another:
            await python(another, "x = 1")
        await other.close()
        await other.close()
        assert (await python(session, "x * 7")).text == "42"


# -- one session ----------------------------------------------------------------------------------------------------------


async def test_three_tools_see_the_same_files_and_another_trajectory_does_not(registry: ToolRegistry) -> None:
    async with opened(registry) as one, opened(registry) as other:
        assert (await file(one, "write", "notes/a.txt", content="from file\n")).status is CallStatus.OK
        assert (await python(one, "text = open('notes/a.txt').read(); print(text, end='')")).text == "from file"
        assert (await shell(one, "echo from shell >> notes/a.txt")).text == "[no output]"
        assert (await python(one, "open('notes/a.txt').read() != text, len(text)")).text == "(True, 10)"
        assert (await file(one, "read", "notes/a.txt")).text == "     1\tfrom file\n     2\tfrom shell"
        assert (await file(one, "list")).text == "notes/\nnotes/a.txt (21 bytes)"
        assert (await file(other, "list")).text == "The folder is empty."
        assert "NameError" in (await python(other, "text")).text


async def test_calls_of_one_turn_run_in_the_order_in_which_the_model_wrote_them(registry: ToolRegistry) -> None:
    async with opened(registry) as session:
        calls = [
            python(session, "import time; time.sleep(0.2); open('a', 'w').write('1')"),
            shell(session, "printf 2 >> a"),
            file(session, "edit", "a", old="12", new="123"),
            shell(session, "cat a"),
        ]
        assert (await asyncio.gather(*calls))[-1].text == "123"


async def test_without_state_every_call_begins_anew_and_runs_beside_the_others(registry: ToolRegistry) -> None:
    stateless = ToolRegistry.from_tools([Python({"sandbox": BOX, "stateful": False})])
    assert "nothing is kept" in stateless.schemas[0]["function"]["description"]
    rows = {"python": {"create_kwargs": {"files": {"data.txt": "given"}}}}
    async with opened(stateless, tools_kwargs=rows) as session:
        assert (await python(session, "x = 1; x")).text == "1"
        assert "NameError" in (await python(session, "x")).text
        assert (await python(session, "open('data.txt').read()")).text == "'given'"
        wait = "import os, time; t = time.time(); time.sleep(0.4); print(t, time.time())"
        spans = [tuple(map(float, r.text.split())) for r in await asyncio.gather(*[python(session, wait) for _ in range(2)])]
        assert max(begin for begin, _ in spans) < min(end for _, end in spans)
    await stateless.close()


@pytest.mark.parametrize("stateful", [True, False])
async def test_the_policys_timeout_counts_the_run(registry: ToolRegistry, stateful: bool) -> None:
    slow = Python({"sandbox": {**BOX, "limits": {**BOX["limits"], "timeout_s": 30}}, "stateful": stateful})
    policies = {"python": {"timeout": 0.5, "retries": 2, "on_error": "drop_sample"}}
    slow_registry = ToolRegistry.from_tools([slow], policies)
    async with opened(slow_registry) as session:
        assert (await python(session, "6 * 7")).text == "42"
        record = await python(session, "import time; time.sleep(20)")
        assert (record.status, record.attempts, record.on_error) == (CallStatus.TIMEOUT, 1, "drop_sample")
        assert record.text == "The tool 'python' did not answer within 0.5 s and was stopped."
        assert "deadline" not in record.metrics
        assert (await python(session, "6 * 7")).status is CallStatus.OK
    await slow_registry.close()


async def test_a_run_that_the_policy_stops_is_tried_again_only_with_on_error_retry(registry: ToolRegistry) -> None:
    slow = Python({"sandbox": {**BOX, "limits": {**BOX["limits"], "timeout_s": 30}}, "stateful": False})
    slow_registry = ToolRegistry.from_tools([slow], {"python": {"timeout": 0.3, "retries": 1, "on_error": "retry"}})
    async with opened(slow_registry) as session:
        record = await python(session, "import time; time.sleep(20)")
    assert (record.status, record.attempts, record.on_error) == (CallStatus.TIMEOUT, 2, "observe")
    await slow_registry.close()


@pytest.mark.parametrize("stateful", [True, False])
async def test_waiting_for_a_place_in_the_sandbox_is_not_in_the_policys_timeout(registry: ToolRegistry, stateful: bool) -> None:
    one_place = {**BOX, "max_sessions": 1, "max_runs": 1}
    waiting = ToolRegistry.from_tools([Python({"sandbox": one_place, "stateful": stateful})], {"python": {"timeout": 2}})

    async def trajectory() -> CallRecord:
        async with opened(waiting) as session:
            return await python(session, "import time; time.sleep(1); 1")

    records = await asyncio.gather(*(trajectory() for _ in range(3)))
    assert [record.text for record in records] == ["1", "1", "1"]
    assert sum(record.queue_s > 0.8 for record in records) == 2
    assert all(1 <= record.run_s < 2 for record in records)
    await waiting.close()


async def test_the_start_of_the_sandbox_is_in_no_time_limit_of_a_call(registry: ToolRegistry) -> None:
    """Executing a zygote that imports sympy takes longer than this tool has for a whole call."""
    box = {**BOX, "scope": "process", "preload": ["sympy"]}
    policies = {"python": {"timeout": 0.6, "deadline": 0.6}}
    fresh = ToolRegistry.from_tools([Python({"sandbox": box})], policies)
    async with opened(fresh) as session:
        assert (await python(session, "import sys; 'sympy' in sys.modules")).text == "True"
    await fresh.close()


async def test_a_sandbox_that_cannot_start_is_met_by_the_first_call(registry: ToolRegistry) -> None:
    broken = ToolRegistry.from_tools([Python({"sandbox": {**BOX, "preload": ["no_such_module_here"]}})])
    async with opened(broken) as session:
        record = await python(session, "1")
    assert record.status is CallStatus.INFRA and "no_such_module_here" in record.text
    await broken.close()


async def test_a_row_gives_the_session_files(registry: ToolRegistry) -> None:
    rows = {"python": {"create_kwargs": {"files": {"data/t.csv": "a,b\n1,2\n"}}}}
    async with opened(registry, tools_kwargs=rows) as session:
        assert (await shell(session, "tail -n 1 data/t.csv")).text == "1,2"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"../outside": "x"}, "path '../outside': expected a path inside"),
        ({"a.txt": 5}, "'a.txt' must be text, got 5"),
        ("a.txt", "expected a mapping from path to text, got 'a.txt'"),
    ],
)
async def test_files_of_a_row_that_are_none_are_no_fault_of_the_model(registry: ToolRegistry, files: Any, says: str) -> None:
    with pytest.raises(ToolInfraError, match=re.escape(says)):
        async with opened(registry, tools_kwargs={"python": {"create_kwargs": {"files": files}}}):
            pass


async def test_files_that_do_not_fit_are_no_fault_of_the_model(registry: ToolRegistry) -> None:
    files = {"huge": "x" * 80 * 2**20, "of another row": None}
    async with opened(registry, tools_kwargs={"python": {"create_kwargs": {"files": files}}}) as session:
        for record in (await python(session, "1"), await file(session, "list")):
            assert record.status is CallStatus.INFRA
            assert "the file 'huge' of the row's create_kwargs cannot be written" in record.text


async def test_verls_loop_calls_it_without_a_session(registry: ToolRegistry) -> None:
    tool: Any = Python({"sandbox": BOX})
    instance, _ = await tool.create()
    response, _, _ = await tool.execute(instance, {"code": "6*7"}, agent_data=object())
    await tool.release(instance)
    assert response.text == "42" and tool.instances == {}


# -- what the model is told -----------------------------------------------------------------------------------------------


async def test_output_value_and_the_models_own_part_of_a_traceback(registry: ToolRegistry) -> None:
    async with opened(registry) as session:
        assert (await python(session, "print('a')\n6 * 7")).text == "a\n42"
        assert (await python(session, "x = 1")).text == "[no output]"
        assert (await python(session, "import sys; print('careful', file=sys.stderr); 3")).text == "careful\n3"
        await file(session, "write", "lib.py", content="import json\n\ndef load(text):\n    return json.loads(text)\n")
        record = await python(session, "import sys; sys.path.insert(0, '.')\nimport lib\nlib.load('{')")
    assert record.status is CallStatus.ERROR and record.on_error == "observe"
    assert "lib.load('{')" in record.text and "lib.py" in record.text and "return json.loads(text)" in record.text
    assert "library code …]" in record.text and "json/decoder.py" not in record.text
    assert record.text.endswith("line 1 column 2 (char 1)")


@pytest.mark.parametrize(
    ("tool", "code", "says", "lost"),
    [
        ("python", "while True: pass", "It ran longer than 2 s and was stopped; variables are lost, files are kept.", True),
        ("python", "bytearray(10**9)", "It asked for more than 256 MiB of memory.", False),
        ("python", "print('x' * 10**6)", "It wrote more than 4000 bytes of output and was stopped;", True),
        ("python", "import os; os._exit(3)", "[Exit status 3; variables are lost, files are kept.]", True),
        ("python", "y = (", "SyntaxError: '(' was never closed", False),
        ("shell", "ls nowhere; exit 5", "[Exit status 5.]", False),
        ("shell", "sleep 60", "It ran longer than 2 s and was stopped", None),
        ("shell", "kill -9 $$", "[It was ended by signal 9.]", False),
    ],
)
async def test_what_went_wrong_and_what_is_left(
    registry: ToolRegistry, tool: str, code: str, says: str, lost: bool | None
) -> None:
    async with opened(registry) as session:
        await python(session, "kept = 1; open('kept.txt', 'w').write('kept')")
        record = await call(session, tool, {"code" if tool == "python" else "command": code})
        assert (record.status, record.on_error, record.attempts) == (CallStatus.ERROR, "observe", 1)
        assert says in record.text
        told = "variables are lost" in record.text
        assert lost is None or told == lost
        assert ("NameError" in (await python(session, "kept")).text) == told
        assert (await shell(session, "cat kept.txt")).text == "kept"


async def test_long_output_keeps_beginning_and_end_and_says_what_is_missing(registry: ToolRegistry) -> None:
    async with opened(registry) as session:
        record = await python(session, "print('BEGIN', 'ä' * 100000, flush=True)")
        assert record.text.startswith("BEGIN ä") and "bytes left out …]" in record.text and "\ufffd" not in record.text
        value = await python(session, "'q' * 100_000")
        assert value.text.startswith("'qqq") and value.text.endswith("more bytes]")


async def test_the_registrys_timeout_stops_a_run_and_the_model_hears_of_it(registry: ToolRegistry) -> None:
    short = ToolRegistry.from_tools([Python({"sandbox": BOX})], {"python": {"timeout": 0.5}})
    async with opened(short) as session:
        await python(session, "x = 1")
        assert (await python(session, "import time; time.sleep(60)")).status is CallStatus.TIMEOUT
        assert (await python(session, "1 + 1")).text == (
            "[An earlier run was stopped before it had ended.]\n2\n[Variables are lost, files are kept.]"
        )
        assert (await python(session, "1 + 1")).text == "2"


async def test_a_list_of_files_tells_what_an_earlier_run_has_cost() -> None:
    tools = ToolRegistry.from_tools([Python({"sandbox": BOX}), File({"sandbox": BOX})], {"python": {"timeout": 0.5}})
    async with opened(tools) as session:
        await python(session, "x = 1; open('kept', 'w').write('here')")
        assert (await python(session, "import time; time.sleep(60)")).status is CallStatus.TIMEOUT
        listed = (await call(session, "file", {"action": "list"})).text
        assert listed == (
            "[An earlier run was stopped before it had ended.]\nkept (4 bytes)\n[Variables are lost, files are kept.]"
        )


# -- file -------------------------------------------------------------------------------------------------------------------


async def test_reading_by_lines(registry: ToolRegistry) -> None:
    async with opened(registry) as session:
        await file(session, "write", "long.txt", content="".join(f"line {n}\n" for n in range(1, 51)))
        assert (await file(session, "read", "long.txt", start=3, end=4)).text == (
            "     3\tline 3\n     4\tline 4\n[lines 3 to 4 of 50]"
        )
        assert (await file(session, "read", "long.txt")).text.endswith("[lines 1 to 20 of 50; read on with start=21]")
        assert (await file(session, "read", "./long.txt", start=50)).text == "    50\tline 50\n[lines 50 to 50 of 50]"
        await file(session, "write", "empty", content="")
        assert (await file(session, "read", "empty")).text == "empty is empty."


async def test_what_a_read_shows_is_bounded_like_output(registry: ToolRegistry) -> None:
    async with opened(registry) as session:
        await python(session, "open('wide', 'w').write(('x' * 1000 + '\\n') * 10)")
        record = await file(session, "read", "wide")
        assert len(record.text) < 4100
        assert record.text.endswith("[lines 1 to 3 of 10; read on with start=4]")
        await file(session, "write", "short", content="here\n")
        assert len((await file(session, "edit", "short", old="here", new=("y" * 1000 + "\n") * 9)).text) < 4100


async def test_editing_needs_one_place(registry: ToolRegistry) -> None:
    async with opened(registry) as session:
        await file(session, "write", "a.py", content="def f():\n    return 1\n\ndef g():\n    return 1\n")
        many = await file(session, "edit", "a.py", old="    return 1", new="    return 2")
        assert (many.status, many.text) == (
            CallStatus.ERROR,
            "Error: 'old' occurs 2 times in a.py (lines 2, 5); give more of the text around it",
        )
        none = await file(session, "edit", "a.py", old="def  f():", new="def h():")
        assert none.text == "Error: 'old' does not occur in a.py; the nearest is line 1: 'def f():'"
        done = await file(session, "edit", "a.py", old="def g():\n    return 1", new="def g():\n    return 2")
        assert done.text.startswith("Edited a.py; it now reads:") and "     5\t    return 2" in done.text
        assert (await python(session, "exec(open('a.py').read()); f(), g()")).text == "(1, 2)"


async def test_a_long_list_is_cut_and_costs_no_variables(registry: ToolRegistry) -> None:
    async with opened(registry) as session:
        await python(session, "kept = 1")
        await shell(session, "mkdir many; cd many; touch $(seq 1 300)")
        assert (await file(session, "list", "many")).text.endswith("[… 280 more; list a folder below]")
        await shell(session, "for n in $(seq 1 15); do mkdir -p deep/$n; touch deep/$n/$(printf 'ä%.0s' $(seq 100)); done")
        listed = await file(session, "list", "deep")
        assert listed.status is CallStatus.OK and listed.text.endswith(" more; list a folder below]")
        assert (await python(session, "kept")).text == "1"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ({"action": "read", "path": "../x"}, "error", "expected a path inside the working folder"),
        ({"action": "read", "path": "/etc/passwd"}, "error", "expected a path inside the working folder"),
        ({"action": "read", "path": "outside"}, "error", "Error: "),
        ({"action": "read", "path": "nowhere"}, "error", "there is no file nowhere; use 'list'"),
        ({"action": "read", "path": "folder"}, "error", "folder is a folder; use 'list'"),
        ({"action": "list", "path": "nowhere"}, "error", "nowhere is not a folder"),
        ({"action": "read", "path": "binary"}, "error", "binary is no text file (3 bytes"),
        ({"action": "read", "path": "text", "start": 9}, "error", "text has 1 lines; line 9 is beyond its end"),
        ({"action": "read", "path": "large"}, "error", "large has more than 1048576 bytes; work on it with code"),
        ({"action": "read", "path": "wide"}, "ok", "[… 98000 more characters]"),
        ({"action": "edit", "path": "wide", "old": "y" * 9000, "new": ""}, "error", "'old' does not occur in wide"),
        ({"action": "write", "path": "text/below", "content": "x"}, "error", "Error: "),
        ({"action": "write", "path": "huge", "content": "x" * 80 * 2**20}, "error", "Error: huge: "),
        ({"action": "write", "path": "half \ud800", "content": "x"}, "error", "path 'half \\ud800': expected text"),
        ({"action": "write", "path": "x"}, "invalid_arguments", "'write' needs the argument 'content'"),
        ({"action": "edit", "path": "text", "old": "t"}, "invalid_arguments", "'edit' needs the argument 'new'"),
        ({"action": "raed"}, "invalid_arguments", "is not one of"),
    ],
)
async def test_what_cannot_be_done_with_a_file(
    registry: ToolRegistry, arguments: dict[str, Any], status: str, says: str
) -> None:
    async with opened(registry) as session:
        await shell(session, "mkdir folder; printf '\\377\\376x' > binary; echo t > text; ln -s /etc/passwd outside")
        await python(session, "open('large', 'w').write('x' * 2**21), open('wide', 'w').write('x' * 100_000)")
        record = await call(session, "file", arguments)
        assert (record.status, says in record.text, "root:" in record.text) == (status, True, False), record.text
        assert (await shell(session, "cat text")).text == "t", "the session goes on"


# -- failures of the sandbox ------------------------------------------------------------------------------------------------


async def test_a_sandbox_that_cannot_be_had_is_no_fault_of_the_model(tmp_path: Path) -> None:
    gone = {"sandbox": {"kind": "docker", "host": f"unix://{tmp_path}/nobody.sock"}}
    pytest.importorskip("docker", reason="the docker package is not installed")
    for config in (gone, {**gone, "stateful": False}):
        registry = ToolRegistry.from_tools([Python(config)], {"python": {"retries": 1}})
        async with opened(registry) as session:
            record = await python(session, "1")
            assert (record.status, record.attempts) == (CallStatus.INFRA, 2)
        await registry.close()


async def test_a_run_that_was_cut_off_is_work_too(registry: ToolRegistry) -> None:
    box = registry.tools[0].sandbox  # type: ignore[attr-defined]
    async with opened(registry) as session:
        code = "open('kept', 'w').write('x'); import time; time.sleep(60)"
        assert (await call(session, "python", {"code": code}, within=1)).status is CallStatus.TIMEOUT
        await box.close()
        for _ in range(2):
            assert (await python(session, "open('kept').read()")).status is CallStatus.INFRA


async def test_work_that_a_failed_sandbox_lost_is_not_silently_begun_anew(registry: ToolRegistry) -> None:
    box = registry.tools[0].sandbox  # type: ignore[attr-defined]
    async with opened(registry) as session:
        await python(session, "x = 1")
        await box.close()
        for _ in range(2):
            record = await python(session, "x")
            assert (
                record.status is CallStatus.INFRA and "what was done in it is lost" in record.text
            ) or "closed" in record.text
        assert (await file(session, "list")).status is CallStatus.INFRA


def test_equal_settings_are_equal_however_they_are_written() -> None:
    one = Python({"sandbox": "process"})
    assert File({"sandbox": {"kind": "process", "limits": {"timeout_s": 10}}}).lane == one.lane
    assert Shell({"sandbox": {"kind": "process", "limits": {"timeout_s": 11}}}).lane != one.lane


# -- settings ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{class_name: python, config: {statful: true}}", "config: unknown key 'statful'; did you mean 'stateful'?"),
        ("{class_name: python, config: {sandbox: proces}}", "there is no sandbox of kind 'proces'; did you mean 'process'?"),
        ("{class_name: file, config: {sandbox: 5}}", "key 'config.sandbox' must be a kind, or a mapping with 'kind'"),
        ("{class_name: file, config: {sandbox: {}}}", "key 'config.sandbox': key 'kind' is missing"),
        (
            "{class_name: shell, config: {sandbox: {kind: process, limits: {timeout: 3}}}}",
            "key 'config.sandbox': unknown key 'limits.timeout'; did you mean 'timeout_s'?",
        ),
        ("{class_name: shell, config: {shell: zsh}}", "config: key 'shell': input should be 'bash' or 'sh', got 'zsh'"),
        ("{class_name: file, config: {max_lines: 0}}", "key 'max_lines'"),
        ("{class_name: submit, config: {a: 1}}", "unknown key 'a'"),
    ],
)
def test_lint_finds_wrong_settings_before_anything_starts(tmp_path: Path, entry: str, says: str) -> None:
    path = tmp_path / "tools.yaml"
    path.write_text(f"tools:\n  - {entry}\n")
    _, problems = read_tools(path)
    assert len(problems) == 1 and says in problems[0]
    with pytest.raises(ConfigError):
        ToolRegistry.from_yaml(path)
