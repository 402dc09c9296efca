"""What every sandbox keeps: `agentloop/sandboxes/base.py`, line by line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agentloop.sandboxes.base import Limits, Result, Sandbox, Session, Status
from tests.conformance.sandboxes import KINDS, Kind, available

pytestmark = pytest.mark.asyncio(loop_scope="module")
HELD = open(os.path.join(os.path.dirname(__file__), "sandboxes.py"))  # noqa: SIM115 - an open file that nothing inherits
os.set_inheritable(HELD.fileno(), True)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return available(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(kind: Kind) -> AsyncIterator[Sandbox]:
    async with kind.start() as sandbox:
        yield sandbox


@pytest_asyncio.fixture(loop_scope="module")
async def session(sandbox: Sandbox) -> AsyncIterator[Session]:
    async with sandbox.session() as session:
        yield session


@pytest.fixture
def run(sandbox: Sandbox) -> Any:
    """Runs code by itself, and at the same time in a new session: what comes of it is the same."""

    async def both(code: str, *, limits: dict[str, Any] | None = None, **arguments: Any) -> Result:
        held = Limits(**limits) if limits else None

        async def in_session() -> Result:
            async with sandbox.session(held) as session:
                return await session.run(code, **arguments)

        once, lasting = await asyncio.gather(sandbox.run(code, limits=held, **arguments), in_session())
        assert once.status is lasting.status, f"by itself {once}, in a session {lasting}"
        assert lasting.exit_code in (once.exit_code, None)
        if not once.stdout_cut and not once.stderr_cut:
            assert (once.stdout, once.stderr, once.value) == (lasting.stdout, lasting.stderr, lasting.value)
        assert once.files == lasting.files
        return once

    return both


def sure(result: Result, status: Status = Status.OK) -> Result:
    assert result.status is status, f"{result.status}, expected {status}: {result.error} {result.stderr[-500:]}"
    assert (result.error == "") == (status is Status.OK)
    return result


# --- output and value


async def test_output_value_and_exit(run: Any) -> None:
    result = sure(await run("import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7"))
    assert (result.stdout, result.stderr, result.value) == ("out\n", "err\n", "42")
    assert result.exit_code == 0 and result.ok and not result.state_lost
    assert result.stdout_cut == result.stderr_cut == result.value_cut == 0
    assert 0 < result.run_s < 30 and result.queue_s >= 0


VALUES = {
    "": None,
    "x = 1": None,
    "None": None,
    "1\nx = 2": None,
    "'a'": "'a'",
    "x = 3\nx": "3",
    "(1,\n 2)": "(1, 2)",
    "def f():\n    return 5\nf()": "5",
    "if True:\n    7": None,
    "print('x')": None,
    "3; 4": "4",
    "'ünï\\n'": "'ünï\\n'",
    "# nothing but words": None,
}


async def test_value_of_the_last_expression(sandbox: Sandbox) -> None:
    results = await asyncio.gather(*(sandbox.run(code) for code in VALUES))
    assert {code: sure(result).value for code, result in zip(VALUES, results, strict=True)} == VALUES


async def test_stdout_is_capped_and_says_so(run: Any) -> None:
    result = sure(await run("print('a' * 5000 + 'b' * 5000)", limits={"output_bytes": 1000}), Status.OUTPUT_LIMIT)
    assert len(result.stdout.encode()) <= 1000 and result.stdout_cut > 0
    assert result.stdout.startswith("aaa")


async def test_stderr_is_capped_and_says_so(run: Any) -> None:
    code = "import sys\nsys.stderr.write('a' * 20000)"
    result = sure(await run(code, limits={"output_bytes": 1000}), Status.OUTPUT_LIMIT)
    assert len(result.stderr.encode()) <= 1000 and result.stderr_cut > 0


async def test_output_up_to_the_cap_is_kept_whole(run: Any) -> None:
    result = sure(await run("print('a' * 999)\nimport sys\nsys.stderr.write('b' * 1000)", limits={"output_bytes": 1000}))
    assert len(result.stdout) == 1000 and len(result.stderr) == 1000


async def test_value_is_capped_and_says_so(run: Any) -> None:
    result = sure(await run("'a' * 100_000", limits={"value_bytes": 100}))
    assert result.value is not None and len(result.value.encode()) <= 100 and result.value_cut >= 99_900


async def test_fifty_megabytes_of_stdout_are_neither_a_timeout_nor_kept(run: Any) -> None:
    result = sure(await run("import os\nfor _ in range(50):\n    os.write(1, b'x' * (1 << 20))"), Status.OUTPUT_LIMIT)
    assert len(result.stdout) <= 64 * 1024


async def test_bytes_that_are_not_utf8(run: Any) -> None:
    result = sure(await run("import os\nos.write(1, b'a\\xff\\xfeb\\n')\nos.write(2, b'\\x80')\nprint('ok')"))
    assert result.stdout == "a\ufffd\ufffdb\nok\n" and result.stderr == "\ufffd"


async def test_unicode_in_and_out(run: Any) -> None:
    result = sure(await run("print('héllo €100 中文 😀')\nlen('😀')"))
    assert result.stdout == "héllo €100 中文 😀\n" and result.value == "1"


async def test_lone_surrogates_do_no_harm(run: Any) -> None:
    result = await run("print('\\ud800')\n'\\ud800'")
    assert result.status in (Status.OK, Status.ERROR)


async def test_output_of_children_belongs_to_the_run(run: Any) -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(6 * 7)'], check=True)"
    assert sure(await run(code)).stdout == "42\n"


async def test_partial_output_of_a_killed_run_is_kept(run: Any) -> None:
    result = sure(await run("print('begun', flush=True)\nwhile True: pass", timeout=1.0), Status.TIMEOUT)
    assert result.stdout == "begun\n" and result.exit_code is None


# --- what the code does wrong


async def test_an_exception_is_an_error_with_its_line(run: Any) -> None:
    result = sure(await run("x = 1\ndef f():\n    return x / 0\nf()"), Status.ERROR)
    assert "ZeroDivisionError" in result.stderr and "line 3" in result.stderr and "line 4" in result.stderr
    assert result.value is None and result.exit_code in (1, None)
    assert "agentloop" not in result.stderr, "the traceback shows the machinery's own frames"


async def test_a_syntax_error_names_the_line(run: Any) -> None:
    result = sure(await run("x = 1\ny = (\nz = = 2\n"), Status.ERROR)
    assert ("SyntaxError" in result.stderr and "line 3" in result.stderr) or "line 2" in result.stderr


async def test_a_null_byte_in_the_code_is_an_error(run: Any) -> None:
    sure(await run("x = 1\0\n"), Status.ERROR)


EXITS = [
    ("import sys\nsys.exit()", Status.OK, 0),
    ("import sys\nsys.exit(0)", Status.OK, 0),
    ("import sys\nsys.exit(3)", Status.ERROR, 3),
    ("import sys\nsys.exit('words')", Status.ERROR, 1),
    ("raise SystemExit(255)", Status.ERROR, 255),
    ("import os\nos._exit(0)", Status.OK, 0),
    ("import os\nos._exit(7)", Status.ERROR, 7),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", Status.ERROR, -9),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", Status.ERROR, -15),
    ("import signal\nsignal.raise_signal(signal.SIGSEGV)", Status.ERROR, -11),
    ("import os\nos.abort()", Status.ERROR, -6),
    ("import signal, time\nsignal.alarm(1)\ntime.sleep(8)", Status.ERROR, -14),
]


async def test_exits(run: Any) -> None:
    results = await asyncio.gather(*(run(code) for code, _, _ in EXITS))
    for (code, status, exit_code), result in zip(EXITS, results, strict=True):
        assert (code, sure(result, status).exit_code) == (code, exit_code)
        assert not (result.exit_code or 0) or result.error


async def test_words_of_an_exit_are_on_stderr(run: Any) -> None:
    assert "words" in (await run("import sys\nsys.exit('words')")).stderr


async def test_deep_recursion_is_an_error(run: Any) -> None:
    result = sure(await run("def f(n):\n    return f(n + 1)\nf(0)"), Status.ERROR)
    assert "RecursionError" in result.stderr and len(result.stderr) < 20_000


async def test_a_blown_stack_is_an_error(sandbox: Sandbox) -> None:
    code = "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self):\n        return repr(self)\nrepr(A())"
    result = await sandbox.run(code)
    assert result.status in (Status.ERROR, Status.OOM)


async def test_deeply_nested_source_is_an_error(sandbox: Sandbox) -> None:
    failed = (Status.ERROR, Status.OOM, Status.OUTPUT_LIMIT)  # the last: the message shows the whole line
    assert (await sandbox.run("(" * 100_000 + ")" * 100_000)).status in failed
    assert (await sandbox.run("x = " + "-" * 200_000 + "1")).status in failed


async def test_a_megabyte_of_code(run: Any) -> None:
    code = "".join(f"x{number} = {number}\n" for number in range(80_000)) + "x79999"
    assert len(code) > 1 << 20
    assert sure(await run(code, limits={"timeout_s": 60.0})).value == "79999"  # to compile it takes a second or so of CPU


async def test_warnings_are_shown_and_do_no_harm(run: Any) -> None:
    result = sure(await run("import warnings\nwarnings.warn('careful')\n1"))
    assert "careful" in result.stderr and result.value == "1"


async def test_a_repr_that_raises_is_an_error(run: Any) -> None:
    sure(await run("class A:\n    def __repr__(self):\n        raise ValueError('no')\nA()"), Status.ERROR)


async def test_an_exception_whose_message_raises_is_an_error(run: Any) -> None:
    sure(await run("class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E"), Status.ERROR)


async def test_a_base_exception_is_an_error(run: Any) -> None:
    sure(await run("raise KeyboardInterrupt"), Status.ERROR)
    sure(await run("raise GeneratorExit"), Status.ERROR)


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.stdout.close()",
        "import sys\nsys.stdout = None\nsys.stderr = None",
        "import sys\nclass Out:\n    def write(self, text): raise ValueError\nsys.stdout = Out()",
        "import os\nos.close(1)\nos.close(2)",
        "import sys\ndel sys.stdout",
        "import builtins\ndel builtins.repr",
        "import sys\nsys.modules.clear()",
        "globals().clear()",
        "import sys\nsys.settrace(lambda *a: 1 / 0)",
        "import sys\nsys.excepthook = sys.displayhook = None\nsys.setrecursionlimit(100)",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass",
    ],
)
async def test_a_vandal_is_no_failure_of_the_machinery(sandbox: Sandbox, session: Session, code: str) -> None:
    assert (await sandbox.run(code)).status is not Status.INFRA
    assert (await session.run(code)).status is not Status.INFRA
    await session.run("1")
    after = await session.run("print(40 + 2)")
    assert after.status is not Status.INFRA
    if "sys.std" in code:
        assert after.stdout == "42\n" or after.state_lost


ENDLESS = [
    "while True: pass",
    "import time\ntime.sleep(60)",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "class A:\n    def __repr__(self):\n        while True: pass\nA()",
    "import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass",
    "import threading\nwhile True: threading.Event().wait(1)",
    "import os\nr, w = os.pipe()\nos.read(r, 1)",
    "int('9' * 4000) ** 10 ** 7",
]


async def test_time_out(sandbox: Sandbox) -> None:
    async def one(code: str) -> None:
        began = time.perf_counter()
        result = sure(await sandbox.run(code, timeout=0.7), Status.TIMEOUT)
        assert result.run_s >= 0.6 and time.perf_counter() - began < 15
        assert result.exit_code is None

    await asyncio.gather(*map(one, ENDLESS))


HANGS_AT_THE_END = [
    "import atexit, time\natexit.register(time.sleep, 60)",
    "import time\nclass A:\n    def __del__(self):\n        time.sleep(60)\na = A()",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
]


async def test_what_hangs_at_the_end_does_not_hold_up_anyone(sandbox: Sandbox) -> None:
    async def one(code: str) -> None:
        began = time.perf_counter()
        result = await sandbox.run(code, timeout=1.0)
        assert result.status in (Status.OK, Status.TIMEOUT) and time.perf_counter() - began < 15

    await asyncio.gather(*map(one, HANGS_AT_THE_END))


async def test_timeout_cannot_exceed_the_limit(run: Any) -> None:
    began = time.perf_counter()
    sure(await run("import time\ntime.sleep(60)", limits={"timeout_s": 0.7}, timeout=50.0), Status.TIMEOUT)
    assert time.perf_counter() - began < 15


async def test_cpu_time_is_a_limit_of_its_own(run: Any) -> None:
    result = sure(await run("while True: pass", limits={"cpu_s": 1.0, "timeout_s": 30.0}), Status.TIMEOUT)
    assert result.run_s < 25


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(400 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1",
        "held = []\nwhile True: held.append(b'x' * (8 << 20))",
        "import mmap\nm = mmap.mmap(-1, 400 << 20)\nfor i in range(0, 400 << 20, 4096): m[i] = 1",
        "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        x = b'x' * (60 << 20)\n"
        "        time.sleep(2); os._exit(0)\nfor _ in range(3): os.wait()",
    ],
)
async def test_too_much_memory(run: Any, code: str) -> None:
    result = await run(code, limits={"memory_mb": 128})
    assert result.status is Status.OOM, result


async def test_a_memory_error_that_is_caught_is_the_codes_own_affair(run: Any) -> None:
    code = "try:\n    x = bytearray(1 << 40)\nexcept MemoryError:\n    print('caught')"
    assert sure(await run(code)).stdout == "caught\n"


async def test_too_many_processes_is_an_error_of_the_code(run: Any) -> None:
    code = "import os, time\nfor _ in range(40):\n    if os.fork() == 0:\n        time.sleep(5)\n        os._exit(0)"
    result = await run(code, limits={"processes": 8})
    assert result.status is Status.ERROR


async def test_too_many_files_and_too_much_disk(run: Any) -> None:
    code = "for n in range(500): open(f'f{n}', 'w').close()"
    assert "OSError" in sure(await run(code, limits={"files": 100}), Status.ERROR).stderr
    code = "with open('f', 'wb') as f:\n    for _ in range(20): f.write(b'x' * (1 << 20))"
    assert "OSError" in sure(await run(code, limits={"disk_mb": 8}), Status.ERROR).stderr
    assert sure(await run(code, limits={"disk_mb": 32})).ok


async def test_open_files(run: Any) -> None:
    sure(await run("held = [open('/dev/null') for _ in range(80)]", limits={"open_files": 64}), Status.ERROR)


# --- input


async def test_stdin(run: Any) -> None:
    result = sure(await run("a = input()\nb = input()\nimport sys\n(a, b, sys.stdin.read())", stdin="1\n2\nrest"))
    assert result.value == "('1', '2', 'rest')"


async def test_no_stdin_is_an_empty_one(run: Any) -> None:
    assert "EOFError" in sure(await run("input()"), Status.ERROR).stderr


async def test_a_child_reads_stdin(run: Any) -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(input()[::-1])'], check=True)"
    assert sure(await run(code, stdin="abc\n")).stdout == "cba\n"


async def test_megabytes_of_stdin(run: Any) -> None:
    assert sure(await run("import sys\nlen(sys.stdin.read())", stdin="x" * (5 << 20))).value == str(5 << 20)


async def test_stdin_that_nobody_reads(run: Any) -> None:
    assert sure(await run("1", stdin="x" * (1 << 20))).value == "1"


async def test_stdin_of_a_run_is_not_the_next_ones(session: Session) -> None:
    assert sure(await session.run("input()", stdin="first\nrest\n")).value == "'first'"
    assert sure(await session.run("input()", stdin="second\n")).value == "'second'"
    assert "EOFError" in sure(await session.run("input()"), Status.ERROR).stderr


# --- files


async def test_files_in_and_out(run: Any) -> None:
    code = "open('out.bin', 'wb').write(open('a/in.txt', 'rb').read()[::-1])\nopen('empty', 'w').close()"
    files = {"a/in.txt": "abc", "b.bin": bytes(range(256))}
    result = sure(await run(code, files=files, fetch=["out.bin", "b.bin", "empty", "missing", "a"]))
    assert result.files == {"out.bin": b"cba", "b.bin": bytes(range(256)), "empty": b""}


async def test_files_of_a_failed_run_are_fetched(run: Any) -> None:
    result = sure(await run("open('f', 'w').write('x')\n1 / 0", fetch=["f"]), Status.ERROR)
    assert result.files == {"f": b"x"}


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", ".", "..", "a\0b"])
async def test_paths_that_leave_the_folder(sandbox: Sandbox, session: Session, path: str) -> None:
    for act in (
        lambda: session.put(path, b""),
        lambda: session.get(path),
        lambda: session.run("1", files={path: "x"}),
        lambda: session.run("1", fetch=[path]),
        lambda: sandbox.run("1", files={path: "x"}),
    ):
        with pytest.raises(ValueError, match="path"):
            await act()


@pytest.mark.parametrize("path", ["ünï 中文 😀.txt", "with space", "a/b/c/d", "quo'te\"", "new\nline", "-rf", "$HOME", "*"])
async def test_put_and_get(session: Session, path: str) -> None:
    await session.put(path, "one")
    await session.put(path, b"two\xff")
    assert await session.get(path) == b"two\xff"
    assert sure(await session.run(f"open({path!r}, 'rb').read()")).value == "b'two\\xff'"
    await session.run(f"open({path!r}, 'a').write('!')")
    assert await session.get(path) == b"two\xff!"


async def test_get_of_what_is_no_file(session: Session) -> None:
    await session.run(
        "import os\nos.mkdir('folder')\nos.mkfifo('fifo')\nos.symlink('/etc/passwd', 'link')\nos.symlink('/etc', 'up')"
    )
    with pytest.raises(FileNotFoundError):
        await session.get("missing")
    with pytest.raises(FileNotFoundError):
        await session.get("folder/missing")
    with pytest.raises(IsADirectoryError):
        await session.get("folder")
    for path in ("fifo", "link"):
        with pytest.raises(PermissionError):
            await session.get(path)
    with pytest.raises((PermissionError, NotADirectoryError)):
        await session.get("up/passwd")


async def test_get_of_what_is_too_large(session: Session) -> None:
    await session.put("f", b"x" * 1000)
    assert len(await session.get("f", max_bytes=1000)) == 1000
    with pytest.raises(ValueError, match="f"):
        await session.get("f", max_bytes=999)


async def test_put_where_it_cannot(session: Session) -> None:
    await session.run("import os\nos.mkdir('folder')\nopen('file', 'w').close()\nos.symlink('/tmp', 'link')")
    with pytest.raises(IsADirectoryError):
        await session.put("folder", b"x")
    with pytest.raises(OSError, match=r"."):
        await session.put("file/under", b"x")
    with pytest.raises(OSError, match=r"."):
        await session.put("link/under", b"x")


async def test_put_beyond_the_disk_limit(sandbox: Sandbox) -> None:
    async with sandbox.session(Limits(disk_mb=4)) as session:
        with pytest.raises(OSError, match=r"."):
            await session.put("f", b"x" * (6 << 20))
        assert sure(await session.run("1 + 1")).value == "2"


async def test_a_large_file_there_and_back(session: Session) -> None:
    data = os.urandom(8 << 20)
    await session.put("f", data)
    assert await session.get("f") == data


async def test_put_before_the_first_run_and_after_a_timeout(sandbox: Sandbox) -> None:
    async with sandbox.session(Limits(timeout_s=5.0)) as session:
        await session.put("f", "early")
        sure(await session.run("open('g', 'w').write('x')\nwhile True: pass", timeout=0.7), Status.TIMEOUT)
        assert await session.get("f") == b"early"
        assert sure(await session.run("open('g').read()")).value == "'x'"


# --- sessions


async def test_variables_last(session: Session) -> None:
    sure(await session.run("x = 6\nimport math\ndef f(y):\n    return x * y"))
    assert sure(await session.run("f(7)")).value == "42"
    assert sure(await session.run("math.floor(2.5)")).value == "2"


async def test_an_error_loses_nothing(session: Session) -> None:
    sure(await session.run("x = 1"))
    assert not sure(await session.run("x = 2\n1 / 0"), Status.ERROR).state_lost
    assert sure(await session.run("x")).value == "2"


async def test_stateless_runs_share_nothing(sandbox: Sandbox) -> None:
    await sandbox.run("x = 1\nopen('f', 'w').close()\nimport os\nopen('/tmp/f', 'w').close()")
    sure(await sandbox.run("x"), Status.ERROR)
    assert sure(await sandbox.run("import os\nos.path.exists('f') or os.path.exists('/tmp/f')")).value == "False"


async def test_sessions_share_nothing(sandbox: Sandbox) -> None:
    async with sandbox.session() as one, sandbox.session() as two:
        await one.run("x = 'one'\nopen('f', 'w').write('1')\nopen('/tmp/f', 'w').write('1')")
        sure(await two.run("x"), Status.ERROR)
        assert sure(await two.run("import os\nos.path.exists('f') or os.path.exists('/tmp/f')")).value == "False"
        with pytest.raises(FileNotFoundError):
            await two.get("f")
        assert sure(await one.run("x + open('/tmp/f').read()")).value == "'one1'"


@pytest.mark.parametrize("code", ["while True: pass", "import os\nos._exit(3)", "import os\nos.kill(os.getpid(), 9)"])
async def test_a_killed_interpreter_loses_its_variables_and_says_so(session: Session, code: str) -> None:
    sure(await session.run("x = 1\nopen('f', 'w').write('kept')"))
    assert (await session.run(code, timeout=0.7)).state_lost
    after = await session.run("x")
    assert after.status is Status.ERROR and "NameError" in after.stderr and not after.state_lost
    assert sure(await session.run("open('f').read()")).value == "'kept'"


async def test_memory_exhausted_in_a_session(sandbox: Sandbox) -> None:
    async with sandbox.session(Limits(memory_mb=128)) as session:
        sure(await session.run("x = 1"))
        result = sure(await session.run("held = []\nwhile True: held.append(b'x' * (4 << 20))"), Status.OOM)
        after = await session.run("x")
        assert after.ok or result.state_lost or after.state_lost, "its variables are gone, and nobody said so"
        assert after.status in (Status.OK, Status.OOM) or result.state_lost
        assert sure(await session.run("globals().pop('held', None) and None\n1")).value == "1"


async def test_output_of_a_run_is_not_the_next_ones(session: Session) -> None:
    sure(await session.run("print('one')"))
    assert sure(await session.run("print('two')")).stdout == "two\n"
    await session.run("print('x' * 1_000_000)")
    assert sure(await session.run("print('three')")).stdout == "three\n"


async def test_runs_of_a_session_are_one_after_the_other(session: Session) -> None:
    sure(await session.run("log = []"))
    code = "import time\nlog.append('in')\ntime.sleep(0.05)\nlog.append('out')"
    await asyncio.gather(*(session.run(code) for _ in range(5)))
    assert sure(await session.run("log == ['in', 'out'] * 5")).value == "True"


async def test_threads_and_subprocesses_in_a_session(session: Session) -> None:
    code = """
import subprocess, sys, threading
got = []
threads = [threading.Thread(target=got.append, args=(n,)) for n in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
subprocess.run([sys.executable, "-c", "print('child')"], check=True)
sorted(got)
"""
    for _ in range(2):
        result = sure(await session.run(code))
        assert result.value == "[0, 1, 2, 3]" and result.stdout == "child\n"


async def test_multiprocessing_in_a_session(session: Session) -> None:
    code = """
import multiprocessing
def square(x):
    return x * x
with multiprocessing.get_context("fork").Pool(2) as pool:
    got = pool.map(square, range(4))
got
"""
    assert sure(await session.run(code)).value == "[0, 1, 4, 9]"


async def test_classes_pickle_in_a_session(session: Session) -> None:
    sure(await session.run("import pickle\nclass A:\n    x = 5\na = A()"))
    assert sure(await session.run("pickle.loads(pickle.dumps(a)).x")).value == "5"


async def test_the_marks_in_a_traceback_stand_under_what_they_mark(run: Any) -> None:
    """Also under a last line without its newline."""
    for code in ("y = 1\nx = [1 / 0]", "y = 1\nx = [1 / 0]\n", "y = '\x0c'\r\nx = [1 / 0]"):
        lines = (await run(code)).stderr.splitlines()
        source = next(place for place, line in enumerate(lines) if "x = [1 / 0]" in line)
        marks = lines[source + 1]
        assert lines[source][marks.index("~") : len(marks)] == "1 / 0"


async def test_source_of_a_function_is_in_the_traceback(session: Session) -> None:
    sure(await session.run("def broken():\n    raise ValueError('here')  # the culprit"))
    assert "the culprit" in sure(await session.run("broken()"), Status.ERROR).stderr


async def test_many_sessions_at_once(kind: Kind, sandbox: Sandbox) -> None:
    async def one(number: int) -> bool:
        async with sandbox.session() as session:
            await session.run(f"x = {number}")
            return (await session.run("x")).value == str(number)

    assert all(await asyncio.gather(*(one(number) for number in range(3 * kind.sessions))))


async def test_many_runs_at_once(sandbox: Sandbox) -> None:
    results = await asyncio.gather(*(sandbox.run(f"{number} * 2") for number in range(24)))
    assert [result.value for result in results] == [str(number * 2) for number in range(24)]


async def test_cancelling_kills_the_run_and_the_session_goes_on(sandbox: Sandbox, session: Session) -> None:
    for target in (sandbox, session):
        task = asyncio.create_task(target.run("import time\ntime.sleep(60)", timeout=9.0))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    began = time.perf_counter()
    assert sure(await session.run("1 + 1")).value == "2"
    assert time.perf_counter() - began < 8, "it waited for the run that was cancelled"


async def test_cancelling_at_any_moment(sandbox: Sandbox) -> None:
    for delay in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1):
        async with sandbox.session() as session:
            task = asyncio.create_task(session.run("x = 0\nwhile True: x += 1", timeout=9.0))
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert sure(await session.run("1 + 1")).value == "2"


async def test_close_while_a_run_is_under_way(sandbox: Sandbox) -> None:
    session = sandbox.session()
    await session.open()
    task = asyncio.create_task(session.run("import time\ntime.sleep(60)"))
    await asyncio.sleep(0.3)
    began = time.perf_counter()
    await session.close()
    assert time.perf_counter() - began < 8
    result = await asyncio.wait_for(task, 8)
    assert result.status is not Status.OK
    await session.close()


async def test_close_twice_and_without_open(sandbox: Sandbox) -> None:
    session = sandbox.session()
    await session.close()
    await session.close()
    async with sandbox.session() as session:
        await session.close()


async def test_a_closed_session_is_of_no_use(sandbox: Sandbox) -> None:
    async with sandbox.session() as session:
        await session.run("1")
    assert (await session.run("1")).status is Status.INFRA


async def test_a_session_that_waits_for_a_place_can_be_given_up(sandbox: Sandbox) -> None:
    tasks = [asyncio.create_task(sandbox.run("import time\ntime.sleep(0.2)")) for _ in range(20)]
    await asyncio.sleep(0.1)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, Result) and result.ok for result in results[1::2])
    assert sure(await sandbox.run("1")).value == "1"


# --- languages


async def test_unknown_language(sandbox: Sandbox, session: Session) -> None:
    for target in (sandbox, session):
        with pytest.raises(ValueError, match="klingon"):
            await target.run("1", language="klingon")


async def test_languages_of_the_kind(sandbox: Sandbox) -> None:
    assert "python" in sandbox.languages


async def test_a_shell(sandbox: Sandbox, run: Any) -> None:
    if "sh" not in sandbox.languages:
        pytest.skip("this kind has no shell")
    result = sure(await run("read x; echo $x; echo err >&2; cat f", language="sh", stdin="in\n", files={"f": "file"}))
    assert (result.stdout, result.stderr, result.value) == ("in\nfile", "err\n", None)
    assert sure(await run("exit 70", language="sh"), Status.ERROR).exit_code == 70
    sure(await run("sleep 60", language="sh", timeout=0.7), Status.TIMEOUT)
    sure(await run("while :; do echo y; done", language="sh"), Status.OUTPUT_LIMIT)
    assert sure(await run("kill -TERM $$", language="sh"), Status.ERROR).exit_code in (-15, 143)


async def test_a_shell_shares_the_sessions_folder(sandbox: Sandbox, session: Session) -> None:
    if "sh" not in sandbox.languages:
        pytest.skip("this kind has no shell")
    sure(await session.run("x = 5\nopen('f', 'w').write('from python')"))
    result = sure(await session.run("cat f; echo more > g", language="sh"))
    assert result.stdout == "from python"
    sure(await session.run("sleep 60", language="sh", timeout=0.7), Status.TIMEOUT)
    after = await session.run("open('g').read(), x")
    assert after.value == "('more\\n', 5)" or "NameError" in after.stderr


# --- the place itself


async def test_it_is_no_root_and_has_a_name(run: Any) -> None:
    assert sure(await run("import os\nos.getuid() != 0 and os.geteuid() != 0")).value == "True"


async def test_usual_things_work(run: Any) -> None:
    code = """
import os, tempfile, random, json, datetime, decimal, socket, threading, subprocess, hashlib, sqlite3, shutil, time, uuid
with tempfile.TemporaryDirectory() as folder:
    open(os.path.join(folder, "f"), "w").write("x")
time.sleep(0.01)
assert os.path.isdir(os.getcwd()) and os.access(os.getcwd(), os.W_OK)
os.makedirs("a/b"); os.rename("a", "c"); shutil.rmtree("c")
assert len(os.urandom(4)) == 4 and open("/dev/null").read() == "" and open("/dev/zero", "rb").read(2) == b"\\0\\0"
a, b = socket.socketpair(); a.send(b"x"); assert b.recv(1) == b"x"
db = sqlite3.connect("x.db"); db.execute("create table t (x)"); db.commit()
print(datetime.date.today().year > 2000, os.path.expanduser("~"), uuid.uuid4().version)
"""
    result = sure(await run(code))
    assert result.stdout.startswith("True")


async def test_numpy_and_sympy(kind: Kind, run: Any) -> None:
    result = await run("import numpy, sympy\nx = sympy.Symbol('x')\nint(numpy.arange(4).sum()), sympy.solve(x**2 - 4)")
    assert sure(result).value == "(6, [-2, 2])"


async def test_randomness_differs_from_run_to_run(sandbox: Sandbox) -> None:
    code = """
import random
try:
    import numpy
    number = float(numpy.random.rand())
except ImportError:
    number = random.random()
(random.random(), number)
"""
    values = {(await sandbox.run(code)).value for _ in range(4)}
    assert len(values) == 4
    assert len({part for value in values for part in (value or "").split(", ")}) == 8


async def test_nothing_of_the_host_is_open(run: Any) -> None:
    code = """
import os
for fd in range(3, 1024):
    try:
        where = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        continue
    if not where.startswith(("pipe:", "socket:", "anon_inode:", "/memfd:")) and "/proc/" not in where:
        print(fd, where)
"""
    assert sure(await run(code)).stdout == ""


async def test_killing_all_in_reach_is_the_codes_own_end(sandbox: Sandbox, session: Session) -> None:
    code = """
import os, time
for pid in (os.getppid(), 1):
    try:
        os.kill(pid, 9)
    except OSError as error:
        print(error)
time.sleep(0.2)
"""
    assert (await sandbox.run(code)).status is not Status.INFRA
    assert (await session.run(code)).status is not Status.INFRA
    everything = "import os\ntry: os.kill(-1, 9)\nexcept OSError as e: print(e)"
    assert (await sandbox.run(everything)).status is not Status.INFRA
    assert (await session.run(everything)).status is not Status.INFRA
    assert sure(await session.run("1 + 1")).value == "2"
    assert sure(await sandbox.run("1 + 1")).value == "2"


async def test_peak_memory_and_cpu(run: Any) -> None:
    code = "x = b'x' * (100 << 20)\nimport time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    result = sure(await run(code))
    assert result.peak_memory_mb is None or 90 < result.peak_memory_mb < 512
    assert result.cpu_s is None or 0.2 < result.cpu_s < 5


async def test_a_background_thread_does_not_speak_into_the_next_run_wrongly(session: Session) -> None:
    code = """
import threading, time
def late():
    time.sleep(0.5)
    print("late")
threading.Thread(target=late, daemon=True).start()
"""
    sure(await session.run(code))
    result = sure(await session.run("print('next')"))
    assert "next\n" in result.stdout
    sure(await session.run("import time\ntime.sleep(0.8)"))


async def test_layers(sandbox: Sandbox) -> None:
    layers = await sandbox.layers()
    assert layers and len({layer.name for layer in layers}) == len(layers)
    for layer in layers:
        assert layer.stops
        assert layer.active or layer.detail, f"{layer.name} is not active, and nothing says why"


async def test_start_and_close_twice(kind: Kind) -> None:
    async with kind.start() as sandbox:
        await sandbox.start()
        assert sure(await sandbox.run("1")).value == "1"
        await sandbox.close()
        await sandbox.close()


async def test_a_sandbox_that_is_closed_ends_its_sessions(kind: Kind) -> None:
    async with kind.start() as sandbox:
        session = sandbox.session()
        await session.open()
        sure(await session.run("import os\ntry:\n    open('/proc/self/comm', 'w').write('orphan')\nexcept OSError: pass"))
        await sandbox.close()
        await session.close()
    for _ in range(100):
        if not running("orphan"):
            break
        await asyncio.sleep(0.05)
    else:
        pytest.fail("an interpreter outlived its sandbox")


def running(name: str) -> list[Path]:
    """Processes of this machine that have given themselves this name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text() == name + "\n":
                found.append(path)
    return found
