"""The kinds whose places a zygote forks, `process` and `bubblewrap`: what a run says of itself, what a session keeps, and what
code cannot do. Attacks on every kind are in `tests/conformance`."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
import venv

import pytest

from agentloop.errors import ConfigError
from agentloop.sandboxes import Limits, Sandbox, SandboxError, Status, load_sandbox
from agentloop.sandboxes.process import ProcessSandbox

KINDS = ["process", "bubblewrap"]
SETTINGS = {"preload": [], "warm": 2, "idle_s": 3.0}
LIMITS = Limits(memory_mb=128, processes=16, disk_mb=8, files=64, output_bytes=10_000)


def missing(kind: str) -> str:
    if kind == "process":
        return "" if os.geteuid() == 0 and os.access("/sys/fs/cgroup", os.W_OK) else "needs root and control groups"
    return "" if shutil.which("bwrap") else "bubblewrap is not installed"


@pytest.fixture(params=KINDS)
async def sandbox(request):
    if missing(request.param):
        pytest.skip(missing(request.param))
    async with load_sandbox({"kind": request.param, **SETTINGS, "limits": LIMITS.model_dump()}) as found:
        yield found


async def test_a_run_says_how_it_ended(sandbox: Sandbox):
    result = await sandbox.run("import sys\nprint('out')\nprint('err', file=sys.stderr)\n[1, 2]")
    assert (result.status, result.stdout, result.stderr, result.value, result.exit_code) == (
        "ok",
        "out\n",
        "err\n",
        "[1, 2]",
        0,
    )
    assert result.run_s > 0 and result.cpu_s is not None
    for code, exit_code in (("1 / 0", 1), ("raise SystemExit(3)", 3), ("import os; os._exit(4)", 4), ("def", 1)):
        result = await sandbox.run(code)
        assert (result.status, result.exit_code) == (Status.ERROR, exit_code), code
        assert result.error
    result = await sandbox.run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert (result.status, result.exit_code) == (Status.ERROR, -11)
    result = await sandbox.run("def f():\n    return 1 / 0\nf()")
    assert result.stderr.splitlines()[:2] == ["Traceback (most recent call last):", '  File "<run 1>", line 3, in <module>']
    assert (await sandbox.run("import os; os._exit(0)")).ok
    assert (await sandbox.run("exit 7", language="sh")).exit_code == 7


async def test_a_program_ends_as_python_would_end_it(sandbox: Sandbox):
    code = """
import atexit, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
print("main", end="")
"""
    assert (await sandbox.run(code)).stdout == "mainthread\nat exit\n"


async def test_stdin_files_and_fetch(sandbox: Sandbox):
    result = await sandbox.run(
        "import helper\na, b = map(int, input().split())\nhelper.save(a + b)\nopen('/dev/stdin').read()",
        stdin="2 3\nrest",
        files={"helper.py": "def save(n): open('out/sum.txt', 'w').write(str(n))", "out/keep": b""},
        fetch=["out/sum.txt", "missing", "out"],
    )
    assert result.ok, result
    assert result.files == {"out/sum.txt": b"5"}
    with pytest.raises(ValueError, match="inside"):
        await sandbox.run("1", fetch=["../x"])
    with pytest.raises(ValueError, match="python"):
        await sandbox.run("1", language="pyhton")


async def test_a_session_keeps_variables_and_files(sandbox: Sandbox):
    async with sandbox.session() as session:
        assert (await session.run("x = 20\nx + 1")).value == "21"
        await session.put("a/b.txt", "hello")
        assert (await session.run("cat a/b.txt; echo more > a/c.txt", language="sh")).stdout == "hello"
        assert (await session.run("x, open('a/c.txt').read()")).value == "(20, 'more\\n')"
        assert await session.get("a/c.txt") == b"more\n"
        assert (await session.run("raise SystemExit(2)")).exit_code == 2
        assert (await session.run("x")).value == "20"
        first, second = await asyncio.gather(session.run("y = 1"), session.run("y"))
        assert first.ok and second.value == "1"


async def test_a_timeout_kills_the_interpreter_and_keeps_the_files(sandbox: Sandbox):
    async with sandbox.session() as session:
        await session.run("x = 1; open('kept', 'w').write('k')")
        code = """
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
print('so far')
while True: pass
"""
        result = await session.run(code, timeout=0.4)
        assert (result.status, result.stdout, result.state_lost) == (Status.TIMEOUT, "so far\n", True)
        assert (await session.run("'x' in globals(), open('kept').read()")).value == "(False, 'k')"


async def test_cpu_time_is_limited_over_all_processes(sandbox: Sandbox):
    limits = LIMITS.model_copy(update={"cpu_s": 0.3})
    result = await sandbox.run("import os\nos.fork(); os.fork()\nwhile True: pass", limits=limits)
    assert result.status is Status.TIMEOUT and "CPU" in result.error


async def test_memory_of_one_and_of_many(sandbox: Sandbox):
    async with sandbox.session() as session:
        result = await session.run("x = 1\ny = bytearray(400 << 20)")
        assert (result.status, result.state_lost) == (Status.OOM, False)
        assert (await session.run("x")).value == "1"
    code = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        block = bytearray(60 << 20)
        for i in range(0, len(block), 4096): block[i] = 1
        time.sleep(3)
        os._exit(0)
for _ in range(6): os.wait()
"""
    result = await sandbox.run(code)
    assert result.status is Status.OOM


async def test_output_is_drained_capped_and_told(sandbox: Sandbox):
    began = time.monotonic()
    result = await sandbox.run("import sys\nprint('begin')\nfor _ in range(200): sys.stdout.write('x' * 2**20)")
    assert result.status is Status.OUTPUT_LIMIT
    assert result.stdout.startswith("begin\n") and len(result.stdout) == 10_000 and result.stdout_cut > 0
    assert time.monotonic() - began < 10
    result = await sandbox.run("print('x' * 9000); 'v' * 20_000")
    assert result.ok and len(result.value or "") == 16 * 1024 and result.value_cut == 20_002 - 16 * 1024


async def test_a_daemon_neither_holds_the_pipe_nor_outlives_its_run(sandbox: Sandbox):
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    time.sleep(1000)
while True:
    break
print('done')
"""
    began = time.monotonic()
    for language, text in (("python", code), ("sh", "(setsid sleep 1000 &) ; echo done")):
        result = await sandbox.run(text, language=language, timeout=5)
        assert (result.status, result.stdout) == ("ok", "done\n")
    assert time.monotonic() - began < 5
    async with sandbox.session() as session:
        await session.run("sleep 1000 & echo $! > pid", language="sh")
        assert (await session.run("import os; os.kill(int(open('pid').read()), 0)")).ok


async def test_forks_run_out_and_the_session_lives_on(sandbox: Sandbox):
    bomb = (
        "import os\ntry:\n  while True:\n    if os.fork() == 0:\n      while True: pass\nexcept OSError as e: print('refused')"
    )
    async with sandbox.session() as session:
        result = await session.run(bomb, timeout=3)
        assert result.stdout == "refused\n" or result.status in (Status.TIMEOUT, Status.ERROR)
        assert (await session.run("while :; do (sleep 100 &) ; done", language="sh", timeout=2)).status is not Status.OK
        assert (await session.run("1 + 1")).value == "2" or (await session.run("1 + 1")).value == "2"


async def test_disk_and_files_are_capped(sandbox: Sandbox):
    code = """
import os
def tried(f):
    try: f()
    except OSError as e: return e.errno
    return 0
def fill(folder):
    for i in range(200): open(f'{folder}/f{i}', 'w')
def big(folder):
    with open(f'{folder}/big', 'wb') as f:
        for _ in range(4): f.write(bytes(4 << 20)); f.flush()
for folder in ('.', '/tmp', '/dev/shm'):
    print(tried(lambda: big(folder)), tried(lambda: fill(folder)))
print([tried(lambda: open(f'{p}/x', 'w')) > 0 for p in ('/', '/dev', '/usr', '/etc', '/proc', '/home')])
"""
    result = await sandbox.run(code)
    assert result.ok, result
    *caps, outside = result.stdout.splitlines()
    assert all(line.split()[0] in ("27", "28") and line.split()[1] == "28" for line in caps), result.stdout
    assert outside == str([True] * 6)


async def test_get_and_put_follow_no_link_and_wait_for_no_fifo(sandbox: Sandbox):
    async with sandbox.session() as session:
        await session.run("ln -s /etc/passwd link; ln -s /etc etc; mkfifo fifo; mkdir folder; ln -s / root", language="sh")
        for path, error in (
            ("link", PermissionError),
            ("etc/passwd", PermissionError),
            ("root/etc/passwd", PermissionError),
            ("fifo", PermissionError),
            ("folder", IsADirectoryError),
            ("missing", FileNotFoundError),
            ("../x", ValueError),
            ("/etc/passwd", ValueError),
        ):
            with pytest.raises(error):
                await asyncio.wait_for(session.get(path), 5)
        with pytest.raises(PermissionError):
            await session.put("etc/x", "x")
        with pytest.raises(IsADirectoryError):
            await session.put("folder", "x")
        await session.put("link", "mine")
        await session.put("fifo", "mine")
        assert await session.get("link") == await session.get("fifo") == b"mine"
        with pytest.raises(ValueError, match="larger"):
            await session.get("link", max_bytes=3)
        with pytest.raises(OSError, match="space"):
            await session.put("big", bytes(9 << 20))


async def test_nothing_of_the_host_is_there(sandbox: Sandbox, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("s")
    monkeypatch.setenv("SECRET_OF_THE_HOST", "hunter2")
    code = f"""
import os, socket
print([os.path.exists(p) for p in ({str(tmp_path)!r}, '/etc/shadow', '/root/x', '/var', '/sys', '/proc/1/environ')])
print('hunter2' in str(os.environ), sorted(int(p) for p in os.listdir('/proc') if p.isdigit() and int(p) > 2000))
for family, address in ((socket.AF_INET, ('127.0.0.1', 22)), (socket.AF_INET6, ('::1', 22))):
    try: socket.socket(family).connect(address); print('connected')
    except OSError: print('no')
print(os.getuid() != 0, open('/proc/self/status').read().split('CapEff:')[1].split()[0])
"""
    result = await sandbox.run(code)
    assert result.stdout.splitlines()[1:] == ["False []", "no", "no", "True 0000000000000000"], result
    seen = result.stdout.splitlines()[0]
    assert "True" not in seen.rpartition(",")[0], seen


async def test_the_kernel_is_out_of_reach(sandbox: Sandbox):
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    ctypes.set_errno(0)
    return libc.syscall(*args), ctypes.get_errno()
print([call(*a)[0] for a in (
    (272, 0x10000000), (272, 0x20000), (56, 0x10000000 | 17, 0, 0, 0, 0), (435, 0, 0), (101, 0, 0, 0, 0), (101, 16, 1, 0, 0),
    (425, 1, 0), (250, 0, -3, 0), (248, b'user', b'x', b'y', 1, -2), (321, 0, 0, 0), (165, b'a', b'/tmp', b'tmpfs', 0, 0),
    (298, 0, 0, 0, 0, 0), (323, 0), (308, 3, 0), (161, b'/tmp'), (105, 0), (62, 1, 9), (310, 1, 0, 0, 0, 0, 0), (41, 40, 1, 0),
    (41, 16, 3, 0), (41, 38, 5, 0), (302, 1, 7, 0, 0), (246, 0, 0, 0, 0), (0x40000000 + 39,), (304, 0, 0, 0),
)])
"""
    if os.uname().machine != "x86_64":
        pytest.skip("system calls by their x86-64 numbers")
    result = await sandbox.run(code)
    refused = [number for number, found in enumerate(eval(result.stdout)) if found >= 0]
    own_process = {16} if sandbox.kind == "bubblewrap" else set()  # a signal that PID 1 does not take
    assert set(refused) <= own_process, result


async def test_a_forged_report_is_about_oneself_alone(sandbox: Sandbox):
    forge = "import os, struct\nos.write(900, struct.pack('!BBiQI', 0, 1, 0, 5, 5) + b'12345')\nos.kill(os.getpid(), 9)"
    async with sandbox.session() as session:
        assert (await session.run(forge)).status in (Status.OK, Status.ERROR)
        for garbage in (b"\xff" * 100, b"", b"\0\1\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"):
            result = await session.run(f"import os\nos.write(900, {garbage!r})\nos.close(900)\nwhile True: pass", timeout=1)
            assert result.status in (Status.ERROR, Status.TIMEOUT, Status.OK), garbage
        for code in ("import os\nos.closerange(0, 2000)", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"):
            assert (await session.run(code, timeout=1)).status in (Status.ERROR, Status.TIMEOUT)
        for _ in range(2):
            last = await session.run("6 * 7")
        assert last.value == "42"
    assert (await sandbox.run("6 * 7")).value == "42"


async def test_one_run_leaves_nothing_to_the_next(sandbox: Sandbox):
    code = """
import ctypes, os
libc = ctypes.CDLL(None)
found = libc.shmget(4711, 4096, 0o600)
libc.shmget(4711, 4096, 0o600 | 0o1000)
print(found, os.listdir('.'), os.listdir('/tmp'), os.listdir('/dev/shm'))
open('x', 'w'); open('/tmp/x', 'w'); open('/dev/shm/x', 'w')
"""
    for _ in range(6):
        assert (await sandbox.run(code)).stdout == "-1 [] [] []\n"
    seeds = {(await sandbox.run("import random; random.random()")).value for _ in range(4)}
    assert len(seeds) == 4


async def test_cancelling_kills_the_run_and_not_the_session(sandbox: Sandbox):
    async with sandbox.session() as session:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(session.run("while True: pass"), 0.3)
        result = await session.run("6 * 7")
        assert result.value == "42"


async def test_cancelling_keeps_the_files_and_tells_that_variables_are_lost(sandbox: Sandbox):
    async with sandbox.session() as session:
        await session.run("x = 1")
        await session.put("kept", "here")
        task = asyncio.create_task(session.run("while True: pass"))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        result = await session.run("open('kept').read(), 'x' in globals()")
        assert (result.value, result.state_lost) == ("('here', False)", True)
        assert not (await session.run("1")).state_lost


async def test_several_cancelled_runs_are_told_of_once(sandbox: Sandbox):
    async with sandbox.session() as session:
        await session.run("x = 1")
        for code, language in (("while True: pass", "python"), ("sleep 60", "sh"), ("sleep 60", "sh")):
            task = asyncio.create_task(session.run(code, language=language))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert [(await session.run("1")).state_lost for _ in range(2)] == [True, False]


BIG = "x" * 20_000_000  # more than a socket takes at once


@pytest.mark.parametrize("what", ["run", "put"])
async def test_a_place_that_is_given_up_with_what_was_cancelled_is_told_of(sandbox: Sandbox, what: str):
    for code, status in (("1", Status.OK), ("1 / 0", Status.ERROR)):
        async with sandbox.session() as session:
            await session.run("x = 1")
            work = session.run("while True: pass", stdin=BIG) if what == "run" else session.put("big", BIG)
            task = asyncio.create_task(work)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            result = await session.run(code)
            assert (result.status, result.state_lost) == (status, True) and "files are gone" in result.error
            assert not (await session.run("1")).state_lost


async def test_nothing_is_left_of_a_killed_client(sandbox: Sandbox, tmp_path):
    marker = f"{time.time_ns()}"
    code = f"""
import asyncio
from agentloop.sandboxes import load_sandbox
async def main():
    async with load_sandbox({{"kind": {sandbox.kind!r}, "scope": "process", "preload": []}}) as sandbox:
        async with sandbox.session() as session:
            await session.run("sleep 1{marker} & sleep 0.1; echo", language="sh")
            print("up", flush=True)
            await session.run("sleep 2{marker}", language="sh")
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"up\n"
    assert running(marker)
    process.kill()
    await process.wait()
    for _ in range(200):
        if not running(marker):
            break
        await asyncio.sleep(0.05)
    assert not running(marker)


def running(marker: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                words = f.read().split(b"\0")
        except OSError:
            continue
        if words[0] == b"sleep" and words[1].endswith(marker.encode()):
            found.append(pid)
    return found


async def test_a_place_that_dies_is_infra_and_the_next_run_gets_another(sandbox: Sandbox):
    async with sandbox.session() as session:
        assert (await session.run("x = 1")).ok
        session._wire.sock.shutdown(2)  # type: ignore[attr-defined]
        result = await session.run("x")
        assert result.status is Status.INFRA and result.state_lost and "files are gone" in result.error
        assert (await session.run("6 * 7")).value == "42"


async def test_more_sessions_than_places_wait_their_turn():
    if missing("process"):
        pytest.skip(missing("process"))
    async with load_sandbox({"kind": "process", **SETTINGS, "max_sessions": 2, "scope": "process"}) as sandbox:

        async def one(n: int) -> str | None:
            async with sandbox.session() as session:
                return (await session.run(f"import time; time.sleep(0.1); {n}")).value

        assert await asyncio.gather(*(one(n) for n in range(6))) == [str(n) for n in range(6)]


async def test_layers_are_told_and_required():
    sandbox = ProcessSandbox()
    layers = {layer.name: layer for layer in await sandbox.layers()}
    assert {"mount namespace", "seccomp", "landlock", "cgroup memory"} <= set(layers)
    assert all(layer.stops for layer in layers.values())
    with pytest.raises(ConfigError, match=r"tools\.yaml.*'secomp'.*did you mean 'seccomp'"):
        load_sandbox({"kind": "process", "require": ["secomp"]}, where="tools.yaml")


def test_without_root_it_says_what_is_missing_and_what_to_take(tmp_path):
    if missing("process"):
        pytest.skip(missing("process"))
    code = "import asyncio; from agentloop.sandboxes import load_sandbox; asyncio.run(load_sandbox('process').start())"
    line = ["unshare", "--user", "--map-root-user", "setpriv", "--bounding-set=-all", sys.executable, "-c", code]
    env = {**os.environ, "AGENTLOOP_RUN_DIR": str(tmp_path / "run")}
    told = subprocess.run(line, capture_output=True, text=True, env=env).stderr.splitlines()[-1]
    assert "missing is mount namespace (unshare: Operation not permitted)" in told and "take the kind 'bubblewrap'" in told


async def test_a_module_that_cannot_be_preloaded_is_named():
    if missing("process"):
        pytest.skip(missing("process"))
    with pytest.raises(SandboxError, match="no_such_module"):
        await load_sandbox({"kind": "process", "preload": ["no_such_module"], "scope": "process"}).start()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_place_used_again_knows_nothing_of_its_last_lease(kind: str):
    if missing(kind):
        pytest.skip(missing(kind))
    look = r"""
import re
found = set()
with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', 0) as memory:
    for line in maps:
        words = line.split()
        if words[1].startswith('rw'):
            begin, end = (int(word, 16) for word in words[0].split('-'))
            memory.seek(begin)
            try: found |= set(re.findall(rb'LEAKE[D]-\d{6}', memory.read(end - begin)))
            except OSError: pass
found
"""
    settings = {**SETTINGS, "max_sessions": 1, "warm": 1, "scope": "process"}
    async with load_sandbox({"kind": kind, **settings}) as sandbox:
        marked = {f"LEAKED-{n:06}": f"print('LEAKED-{n:06}')\nprint(input())\n'LEAKED-{n:06}'" for n in range(3)}
        for mark, code in marked.items():
            assert (await sandbox.run(code, stdin=mark, files={"f": mark}, fetch=["f"])).ok
        async with sandbox.session() as session:
            await session.run("echo LEAKED-000009", language="sh", stdin="LEAKED-000010")
            assert (await session.run(look)).value == "set()"


TRICKS = [
    """
import os
for f in ('oom_score_adj', 'oom_adj'):
    try: open(f'/proc/self/{f}', 'w').write('0')
    except OSError: pass
x = [bytearray(1 << 20) for _ in range(1000)]
""",
    """
import os
for n in range(1, 65):
    for pid in (1, -1, 0):
        try: os.kill(pid, n)
        except OSError: pass
""",
    """
import os
while True:
    r, w = os.pipe()
    os.set_blocking(w, False)
    os.write(w, bytes(65536))
    os.fork()
""",
    "import os\nos.chdir('/home/sandbox')\nos.system('rm -rf work tmp shm; chmod 0 . ; kill -9 -1')",
    "import resource\nresource.setrlimit(resource.RLIMIT_DATA, (1, 1))\nx = bytearray(1 << 24)",
    "raise SystemExit(10**30)",
    "raise SystemExit('\\ud800')",
    "class R:\n  def __repr__(self): raise KeyboardInterrupt\nR()",
    "class R:\n  def __repr__(self): return '\\ud800' * 10\nR()",
    "import sys\nsys.stdout.close(); sys.stderr.close(); sys.stdin.close()\n1 / 0",
    "import builtins\nfor n in ('print', 'repr', 'compile', 'exec', 'open', 'len', 'isinstance'): delattr(builtins, n)\n1",
    "\0",
    "(" * 100_000,
    "-" * 100_000 + "1",
    "x = " + "[" * 50_000,
]


async def test_code_cannot_pass_its_doing_off_as_the_machinerys(sandbox: Sandbox):
    async with sandbox.session() as session:
        full = "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 100 & done; echo started"
        await session.run(full, language="sh")
        for language in ("sh", "python", "sh"):
            assert (await session.run("1", language=language)).status is not Status.INFRA
    limits = Limits(memory_mb=32, disk_mb=64, processes=8)
    async with sandbox.session(limits) as session:
        fill = "f = open('/tmp/x', 'wb')\nfor _ in range(60): f.write(bytes(1 << 20))"
        statuses = [(await session.run(fill)).status]
        statuses += [(await session.run("1", language=language)).status for language in ("python", "sh", "python")]
        assert Status.INFRA not in statuses, statuses
    for code in TRICKS:
        result = await sandbox.run(code, timeout=4)
        assert result.status is not Status.INFRA, (code[:80], result)
    assert (await sandbox.run("6 * 7")).value == "42"


async def test_the_groups_of_a_killed_pool_are_removed_by_the_next():
    if missing("process"):
        pytest.skip(missing("process"))
    from agentloop.sandboxes.process import cgroups

    left = cgroups.find().roots["memory"] / "agentloop-sandbox-63" / "place-0"
    left.mkdir(parents=True, exist_ok=True)
    async with load_sandbox({"kind": "process", **SETTINGS, "scope": "process"}) as sandbox:
        assert (await sandbox.run("1")).value == "1"
        assert not left.parent.exists()


def test_groups_that_come_and_go_do_not_disturb_a_pool_that_starts():
    if missing("process"):
        pytest.skip(missing("process"))
    from agentloop.sandboxes.process import cgroups

    tree = cgroups.find()
    over = threading.Event()

    def another() -> None:
        while not over.is_set():
            groups = cgroups.Groups(tree, 62, None)
            for number in range(4):
                for fd in groups.make(f"place-{number}").values():
                    os.close(fd)
            groups.remove()

    thread = threading.Thread(target=another)
    thread.start()
    try:
        for _ in range(300):
            cgroups.sweep(tree, lambda number: None)
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("kind", KINDS)
def test_packages_below_tmp_are_found_although_code_has_a_tmp_of_its_own(kind: str, tmp_path):
    if missing(kind):
        pytest.skip(missing(kind))
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (packages / "planted.py").write_text("X = 41\n")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "paths.pth").write_text("\n".join([*here, os.getcwd()]))
    script = f"""
import asyncio
from agentloop.sandboxes import load_sandbox

async def main():
    async with load_sandbox({{"kind": {kind!r}, "preload": ["planted"], "idle_s": 1.0}}) as sandbox:
        print(await sandbox.run("import os, planted; planted.X + 1, os.listdir('/tmp')"))

asyncio.run(main())
"""
    done = subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "value='(42, [])'" in done.stdout


def test_what_code_has_to_itself_cannot_be_the_hosts():
    with pytest.raises(ConfigError, match=r"'/tmp/data' cannot be read in there: code has /tmp, "):
        load_sandbox({"kind": "process", "readable": ["/tmp/data"]})
