"""The kind `docker` against a real engine."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ConfigError
from agentloop.sandboxes import Limits, Result, SandboxError, Session, Status, load_sandbox
from agentloop.sandboxes.docker import DockerConfig, DockerSandbox
from agentloop.sandboxes.docker.engine import Engine
from agentloop.sandboxes.docker.owner import OWNER, SANDBOX

COMMAND = Path(sys.executable).with_name("agentloop")


def sandbox(host: str, **settings: Any) -> DockerSandbox:
    return DockerSandbox(DockerConfig(host=host, **{"scope": "process", "spares": 0, **settings}))


@pytest.fixture
async def session(docker_host: str) -> AsyncIterator[Session]:
    async with sandbox(docker_host) as docker, docker.session(Limits(timeout_s=5)) as opened:
        yield opened


@pytest.fixture
async def engine(docker_host: str) -> AsyncIterator[Engine]:
    engine = Engine(DockerConfig(host=docker_host))
    yield engine
    engine.close()


async def ours(engine: Engine) -> set[str]:
    """Containers of this process."""
    me = f"/{os.getpid()}/"
    return {item["Id"] for item in await engine.ours() if me in item["Labels"][OWNER]}


# --- sessions


async def test_a_session_keeps_its_variables_and_shows_the_last_value(session: Session) -> None:
    assert (await session.run("x = 6")).value is None
    result = await session.run("print('printed')\nx * 7")
    assert (result.status, result.value, result.stdout, result.exit_code) == (Status.OK, "42", "printed\n", 0)
    assert result.run_s > 0
    assert result.peak_memory_mb is not None


async def test_an_error_is_a_traceback_of_the_code_alone_and_loses_nothing(session: Session) -> None:
    await session.run("x = 1")
    result = await session.run("def f():\n    return 1 / 0\nf()")
    assert result.status is Status.ERROR
    assert "return 1 / 0" in result.stderr
    assert "ZeroDivisionError" in result.stderr
    assert "repl_driver" not in result.stderr and "<string>" not in result.stderr
    assert not result.state_lost
    assert (await session.run("x")).value == "1"


async def test_after_a_timeout_state_is_lost_and_files_are_not(session: Session) -> None:
    await session.run("x = 1; open('kept', 'w').write('k')")
    result = await session.run("while True: pass", timeout=0.3)
    assert (result.status, result.state_lost, result.exit_code) == (Status.TIMEOUT, True, None)
    after = await session.run("open('kept').read(), 'x' in globals()")
    assert after.value == "('k', False)"


async def test_memory_of_one_and_of_many_processes_is_one_limit(docker_host: str) -> None:
    async with sandbox(docker_host) as docker, docker.session(Limits(memory_mb=96, timeout_s=20)) as session:
        alone = await session.run("a = b'x' * (200 << 20)")
        assert (alone.status, alone.state_lost) == (Status.OOM, True)
        many = "import os\nfor _ in range(6):\n    if os.fork() == 0:\n        a = b'x' * (40 << 20); os._exit(0)\n"
        together = await session.run(
            many.replace("os._exit", "__import__('time').sleep(3); os._exit") + "for _ in range(6): os.wait()"
        )
        assert together.status is Status.OOM
        assert (await session.run("1 + 1")).value == "2"


async def test_a_flood_is_cut_at_the_limit_and_says_so(session: Session) -> None:
    result = await session.run("print('first')\nwhile True: print('x' * 1000)")
    assert result.status is Status.OUTPUT_LIMIT
    assert len(result.stdout) == 64 * 1024
    assert result.stdout.startswith("first\n")
    assert result.stdout_cut > 0
    assert (await session.run("'alive'")).value == "'alive'"


async def test_code_that_forks_answers_once(session: Session) -> None:
    result = await session.run("import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint('here')")
    assert (result.status, result.stdout.count("here")) == (Status.OK, 2)
    assert (await session.run("'next'")).value == "'next'"


async def test_how_a_process_ends_is_told(session: Session) -> None:
    assert (await session.run("raise SystemExit(3)")).exit_code == 3
    killed = await session.run("import os; os.kill(os.getpid(), 11)")
    assert (killed.status, killed.exit_code, killed.state_lost) == (Status.ERROR, -11, True)
    left = await session.run("import os; os._exit(0)")
    assert (left.status, left.state_lost) == (Status.OK, True)


async def test_the_shell_has_its_own_process_in_the_same_folder(session: Session) -> None:
    await session.run("x = 1; open('f', 'w').write('from python\\n')")
    result = await session.run("cat f -; exit 4", language="sh", stdin="from stdin")
    assert (result.status, result.exit_code, result.stdout) == (Status.ERROR, 4, "from python\nfrom stdin")
    slow = await session.run("sleep 30 & sleep 30", language="bash", timeout=0.3)
    assert (slow.status, slow.state_lost) == (Status.TIMEOUT, False)
    assert (await session.run("x")).value == "1"
    processes = await session.run("import os; [open(f'/proc/{p}/comm').read() for p in os.listdir('/proc') if p.isdigit()]")
    assert "sleep" not in str(processes.value)


async def test_stdin_is_of_one_run(session: Session) -> None:
    assert (await session.run("input()", stdin="zeile: ä\n")).value == "'zeile: ä'"
    assert "EOFError" in (await session.run("input()")).stderr


async def test_a_cancelled_run_ends_and_the_session_goes_on(session: Session) -> None:
    await session.run("x = 1; open('f', 'w').write('kept')")
    run = asyncio.create_task(session.run("import time\nopen('began', 'w')\ntime.sleep(60)"))
    await asyncio.sleep(0.5)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    result = await session.run("open('f').read(), 'x' in globals()")
    assert (result.value, result.state_lost) == ("('kept', False)", True)
    assert not (await session.run("1")).state_lost


async def test_wrong_arguments_are_refused_before_anything_runs(session: Session) -> None:
    with pytest.raises(ValueError, match="language 'perl': known are python, sh, bash"):
        await session.run("1", language="perl")
    with pytest.raises(ValueError, match="inside the working folder"):
        await session.run("1", files={"../x": ""})
    with pytest.raises(ValueError, match="above 0"):
        await session.run("1", timeout=0)


# --- files


async def test_files_go_in_and_come_out(session: Session) -> None:
    data = os.urandom(3 << 20)
    await session.put("a/b/data.bin", data)
    result = await session.run(
        "import helper\nhelper.f(), len(open('a/b/data.bin', 'rb').read())", files={"helper.py": "def f(): return 5"}
    )
    assert result.value == f"(5, {len(data)})"
    assert await session.get("a/b/data.bin") == data
    fetched = await session.run("open('out', 'w').write('o')", fetch=["out", "missing"])
    assert fetched.files == {"out": b"o"}


@pytest.mark.parametrize(
    ("code", "path", "error"),
    [
        ("os.symlink('/etc/passwd', 'p')", "p", PermissionError),
        ("os.symlink('/etc', 'p')", "p/passwd", PermissionError),
        ("os.mkfifo('p')", "p", PermissionError),
        ("os.mkdir('p')", "p", IsADirectoryError),
        ("open('p', 'w').truncate(1 << 40)", "p", ValueError),
        ("pass", "p", FileNotFoundError),
    ],
)
async def test_get_takes_nothing_but_regular_files(session: Session, code: str, path: str, error: type[Exception]) -> None:
    assert (await session.run(f"import os\n{code}")).ok
    with pytest.raises(error):
        await session.get(path)


async def test_put_replaces_what_is_in_its_way_and_follows_nothing(session: Session) -> None:
    await session.run(
        "import os\nos.symlink('target', 'link'); os.mkfifo('pipe'); os.mkdir('folder')\nos.symlink('/tmp', 'out')"
    )
    await session.put("link", "new")
    await session.put("pipe", "new")
    assert (
        await session.run("os.path.islink('link'), open('pipe').read(), os.path.exists('target')")
    ).value == "(False, 'new', False)"
    with pytest.raises(IsADirectoryError):
        await session.put("folder", "x")
    with pytest.raises(PermissionError):
        await session.put("out/x", "x")


async def test_a_full_disk_is_an_os_error_and_leaves_no_half_file(docker_host: str) -> None:
    async with sandbox(docker_host) as docker, docker.session(Limits(disk_mb=2)) as session:
        with pytest.raises(OSError, match="No space left"):
            await session.put("big", b"x" * (3 << 20))
        assert (await session.run("import os; os.listdir()")).value == "[]"


# --- the driver


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls by their numbers on x86-64")
async def test_the_driver_cannot_be_reached_by_what_it_watches(session: Session) -> None:
    attempts = {
        "its limits": "resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))",
        "its priority": "os.setpriority(os.PRIO_PROCESS, 1, 19)",
        "the priority of everyone": "os.setpriority(os.PRIO_USER, 0, 19)",
        "its processors": "os.sched_setaffinity(1, {0})",
        "its memory": "open('/proc/1/mem', 'rb')",
        "its streams": "os.listdir('/proc/1/fd')",
        "its chance to be killed for memory": "open('/proc/1/oom_score_adj', 'w')",
        "its environment": "open('/proc/1/environ').read()",
        "its memory by a call": "libc(310, 1, 0, 0, 0, 0, 0)",  # process_vm_readv on x86-64
        "its descriptors by a call": "libc(438, libc(434, 1, 0), 1, 0)",  # pidfd_getfd
        "tracing it": "libc(101, 16, 1, 0, 0)",  # ptrace(PTRACE_ATTACH)
    }
    code = """import ctypes, os, resource
def libc(*numbers):
    if ctypes.CDLL(None, use_errno=True).syscall(*numbers) < 0:
        raise OSError(ctypes.get_errno(), '')
    return 0
done = []
for name, attempt in ATTEMPTS.items():
    try:
        exec(attempt)
        done.append(name)
    except OSError:
        pass
done"""
    assert (await session.run(code.replace("ATTEMPTS", repr(attempts)))).value == "[]"
    signals = await session.run("import os, signal\nfor n in set(signal.Signals):\n    os.kill(1, n)\n'sent'")
    assert signals.value == "'sent'"
    assert (await session.run("1 + 1")).value == "2"


async def test_frames_that_the_code_writes_reach_nobody(session: Session) -> None:
    forged = (
        "import json, os, struct\nhead = json.dumps({'id': 1, 'status': 'ok', 'value': 'forged'}).encode()\n"
        "frame = struct.pack('>II', len(head), 0) + head\n"
        "fds = [int(fd) for fd in os.listdir('/proc/self/fd')]\n"
        "for fd in fds:\n    try:\n        os.write(fd, frame)\n    except OSError:\n        pass\n1 / 0"
    )
    result = await session.run(forged)
    assert result.status is Status.ERROR
    assert result.value is None
    assert (await session.run("1 + 1")).value == "2"


# --- without a session


async def test_a_stateless_run_ends_as_a_script_does(docker_host: str) -> None:
    async with sandbox(docker_host) as docker:
        code = "import atexit, threading, time\natexit.register(print, 'at exit')\n"
        result = await docker.run(code + "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n7")
        assert (result.status, result.stdout, result.value, result.state_lost) == (Status.OK, "thread\nat exit\n", "7", False)
        assert (await docker.run("import sys; sys.exit(9)")).exit_code == 9
        first, second = await asyncio.gather(docker.run("open('f', 'w')\n1"), docker.run("import os; os.listdir()"))
        assert (first.value, second.value) == ("1", "[]")


# --- what the machinery does


async def test_a_container_that_someone_removes_is_infra_and_the_next_run_has_a_new_one(
    docker_host: str, engine: Engine
) -> None:
    async with sandbox(docker_host) as docker, docker.session() as session:
        before = await ours(engine)
        await session.run("x = 1")
        run = asyncio.create_task(session.run("import time; time.sleep(20)"))
        await asyncio.sleep(0.5)
        for container in before:
            await engine.remove(container)
        result = await run
        assert (result.status, result.state_lost) == (Status.INFRA, True)
        assert "docker: its container" in result.error
        assert (await session.run("'x' in globals()")).value == "False"


async def test_as_many_containers_as_configured_and_none_afterwards(docker_host: str, engine: Engine) -> None:
    async with sandbox(docker_host, max_containers=2) as docker:
        sessions = [docker.session() for _ in range(3)]
        opening = [asyncio.create_task(session.open()) for session in sessions]
        done, waiting = await asyncio.wait(opening, timeout=5)
        assert (len(done), len(waiting)) == (2, 1)
        await next(session for session, task in zip(sessions, opening, strict=True) if task in done).close()
        await asyncio.wait_for(waiting.pop(), 10)
        cancelled = asyncio.create_task(docker.session().open())
        await asyncio.sleep(0.1)
        cancelled.cancel()
    assert await ours(engine) == set()


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.25])
async def test_closed_while_sessions_open_it_leaves_no_container(docker_host: str, engine: Engine, after_s: float) -> None:
    async with sandbox(docker_host) as docker:
        limits = Limits(memory_mb=100)  # no spare has these
        opening = asyncio.create_task(docker.session(limits).open())
        running = asyncio.create_task(docker.run("1", limits=limits))
        await asyncio.sleep(after_s)
        await docker.close()
        assert await ours(engine) == set()
        opened, ran = await asyncio.gather(opening, running, return_exceptions=True)
        assert opened is None or (isinstance(opened, SandboxError) and "the sandbox is closed" in str(opened))
        assert isinstance(ran, Result) and ran.status in (Status.INFRA, Status.OK)


async def test_a_session_closed_while_it_opens_leaves_no_container(docker_host: str, engine: Engine) -> None:
    async with sandbox(docker_host) as docker:
        session = docker.session(Limits(memory_mb=100))
        opening = asyncio.create_task(session.open())
        await asyncio.sleep(0.1)
        await session.close()
        await docker.close()
        assert await ours(engine) == set()
        with pytest.raises(SandboxError, match=r"docker: the s[a-z]+ (is|was) closed"):
            await opening


@pytest.mark.slow
async def test_places_of_the_node_are_shared_by_processes_and_freed_by_a_kill(
    docker_host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTLOOP_RUN_DIR", str(tmp_path / "run"))
    program = (
        "import asyncio, sys\nfrom agentloop.sandboxes import load_sandbox\n"
        "async def main():\n"
        f"    sandbox = load_sandbox({{'kind': 'docker', 'host': {docker_host!r}, 'max_containers': 1, 'spares': 0}})\n"
        "    async with sandbox, sandbox.session():\n        print('open', flush=True)\n        await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert await other.stdout.readline() == b"open\n"
        async with sandbox(docker_host, scope="node", max_containers=1) as docker:
            run = asyncio.create_task(docker.run("1"))
            await asyncio.sleep(1)
            assert not run.done()
            other.kill()
            assert (await asyncio.wait_for(run, 20)).value == "1"
    finally:
        with suppress(ProcessLookupError):
            other.kill()
        await other.wait()


@pytest.mark.slow
async def test_leftovers_of_a_killed_process_end_and_are_removed_and_those_of_a_living_one_stay(
    docker_host: str, engine: Engine
) -> None:
    program = (
        "import asyncio\nfrom agentloop.sandboxes import load_sandbox\n"
        "async def main():\n"
        f"    sandbox = load_sandbox({{'kind': 'docker', 'host': {docker_host!r}, 'scope': 'process'}})\n"
        "    async with sandbox, sandbox.session() as session:\n"
        "        await session.run('1')\n        print('open', flush=True)\n        await session.run('while True: pass')\n"
        "asyncio.run(main())"
    )
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        await other.stdout.readline()
        theirs = {item["Id"] for item in await engine.ours() if f"/{other.pid}/" in item["Labels"][OWNER]}
        assert theirs
        async with sandbox(docker_host):
            assert theirs <= {item["Id"] for item in await engine.ours()}
    finally:
        other.kill()
        await other.wait()
    for _ in range(100):
        if not any(item["Id"] in theirs for item in await engine.ours(running=True)):
            break
        await asyncio.sleep(0.1)
    else:
        raise AssertionError("its containers still run")
    async with sandbox(docker_host):
        assert not theirs & {item["Id"] for item in await engine.ours()}


async def test_labels_are_on_every_container(docker_host: str, engine: Engine) -> None:
    async with sandbox(docker_host, spares=2) as docker, docker.session():
        found = [item["Labels"] for item in await engine.ours() if f"/{os.getpid()}/" in item["Labels"][OWNER]]
        assert found
        assert all(labels[SANDBOX] for labels in found)


async def test_what_keeps_it_from_starting_is_one_sentence(docker_host: str) -> None:
    with pytest.raises(
        SandboxError, match=r"no image 'nothing:here'; make it with `agentloop sandbox image --tag nothing:here`"
    ):
        await sandbox(docker_host, image="nothing:here").start()
    with pytest.raises(SandboxError, match=r"no engine answers at unix:///nowhere\.sock"):
        await sandbox("unix:///nowhere.sock").start()
    with pytest.raises(SandboxError, match="python9"):
        await sandbox(docker_host, python="python9").start()
    with pytest.raises(SandboxError, match="No module named 'nothing_of_this_name'"):
        await sandbox(docker_host, preload=("nothing_of_this_name",)).start()
    with pytest.raises(ConfigError, match="unknown key 'cpu'; did you mean 'cpus'"):
        load_sandbox({"kind": "docker", "cpu": 2})


async def test_a_missing_layer_is_refused_unless_allowed(docker_host: str) -> None:
    with pytest.raises(SandboxError, match="the engine does not give 'no capabilities'"):
        await _Capable(DockerConfig(host=docker_host, scope="process", spares=0)).start()
    async with _Capable(DockerConfig(host=docker_host, scope="process", require=("seccomp",))) as docker:
        assert (await docker.run("1")).value == "1"


class _Capable(DockerSandbox):
    """As if the engine gave capabilities that were not asked for."""

    def _missing(self, container: Any) -> str:
        container.inside["capabilities"] = 1
        return super()._missing(container)


async def test_preloaded_modules_are_there(docker_host: str) -> None:
    async with sandbox(docker_host, preload=("numpy",), limits=Limits(memory_mb=256)) as docker:
        result = await docker.run(
            "import sys\nthere = 'numpy' in sys.modules\nimport numpy\n(there, int(numpy.arange(4).sum()))"
        )
        assert result.value == "(True, 6)"


def test_check_on_the_command_line_lists_the_layers(docker_host: str) -> None:
    environment = {**os.environ, "DOCKER_HOST": docker_host, "COLUMNS": "160"}
    done = subprocess.run([COMMAND, "sandbox", "check", "docker"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "seccomp" in done.stdout
    assert "missing" not in done.stdout
    nowhere = environment | {"DOCKER_HOST": "unix:///nowhere.sock"}
    failed = subprocess.run([COMMAND, "sandbox", "check", "docker"], env=nowhere, capture_output=True, text=True, check=False)
    assert failed.returncode == 3
    assert failed.stderr.startswith("agentloop: docker: no engine answers at unix:///nowhere.sock")
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.slow
def test_run_on_the_command_line(docker_host: str, tmp_path: Path) -> None:
    environment = {**os.environ, "DOCKER_HOST": docker_host}
    (tmp_path / "code.py").write_text("print('out')\n6 * 7")
    command = [COMMAND, "sandbox", "run", "code.py", "--kind", "docker"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "out\n42\n")
    (tmp_path / "code.py").write_text("1 / 0")
    failed = subprocess.run([*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert json.loads(failed.stdout)["status"] == "error"
