"""What a session has left behind, and what its code has done to the interpreter, is never taken for a failure of the machinery:
a run that is `infra` is not judged, and a model would learn to end its failures that way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from agentloop.sandboxes.base import Limits, Sandbox, Status
from tests.conformance.sandboxes import KINDS, available

pytestmark = pytest.mark.asyncio(loop_scope="module")

DAEMON = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    while True:
        try:
            {act}
        except OSError:
            pass
os.wait()
time.sleep(0.1)
"""
MOVED = """
import os
here = os.getcwd()
try:
    os.rename(here, here + ".moved")
    {act}
except OSError as error:
    print(error)
os._exit(3)
"""
PIPES = """
import os, stat, struct, threading, time
def private(kind):
    return stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)
fds = []
for fd in range(3, 1024):
    try:
        if private(os.fstat(fd).st_mode):
            fds.append(fd)
    except OSError:
        pass
"""
CROWD = """
import os, time
try:
    while os.fork():
        pass
    time.sleep(60)
    os._exit(0)
except OSError as error:
    print(error)
"""
ANSWER = json.dumps({"value": "\ud800", "value_cut": -(10**30), "exit": 10**30, "memory": 5})

LEFT = {
    "a folder that nobody may enter": "import os\nfor path in ('.', '..', '/tmp'):\n    try: os.chmod(path, 0)\n"
    "    except OSError as error: print(error)\nos._exit(3)",
    "no folder": MOVED.format(act="pass"),
    "a file in the folder's place": MOVED.format(act="open(here, 'w').close()"),
    "a link in the folder's place": MOVED.format(act="os.symlink('/etc', here)"),
    "a process that kills all others": DAEMON.format(act="os.kill(-1, signal.SIGKILL)"),
    "a process that stops all others": DAEMON.format(act="os.kill(-1, signal.SIGSTOP)"),
    "a process that starts others": DAEMON.format(
        act="os.fork() or (time.sleep(0.05), os._exit(0)); os.waitpid(-1, os.WNOHANG)"
    ),
    "as many processes as there may be": CROWD,
    "as many processes, and no interpreter": CROWD + "os._exit(3)",
    "processes that signal the machinery": "import os\nfor _ in range(6):\n    if os.fork() == 0:\n        while True:\n"
    "            for number in (17, 10, 12, 1, 15, 2, 28):\n                try: os.kill(1, number)\n"
    "                except OSError: pass",
    "processes that flood its pipes": PIPES + "for fd in fds:\n    if os.fork() == 0:\n        os.set_blocking(fd, True)\n"
    "        try:\n            while True: os.write(fd, bytes(65536))\n        finally: os._exit(0)",
    "a thread that writes into its pipes": PIPES + "def go(fd):\n    try:\n        while True: os.write(fd, b'\\1' * 4096)\n"
    "    except OSError: pass\nfor fd in fds:\n    threading.Thread(target=go, args=(fd,), daemon=True).start()",
    "an answer with impossible numbers": PIPES + f"body = {ANSWER!r}.encode()\nfor fd in fds:\n    try:\n"
    "        os.write(fd, struct.pack('>I', len(body)) + body)\n    except OSError: pass\ntime.sleep(0.3)",
    "a full folder": "import os\ntry:\n    for n in range(10**6): open(f'f{n}', 'w').close()\nexcept OSError: os._exit(3)",
    "folders in folders": "import os\ntry:\n    for _ in range(3000): os.mkdir('d'); os.chdir('d')\nexcept OSError: pass",
    "a hook that raises": "import sys\ndef hook(event, arguments): raise RuntimeError(event)\nsys.addaudithook(hook)",
    "a hook that leaves": "import os, sys\ndef hook(event, arguments): os._exit(0)\nsys.addaudithook(hook)",
    "no system calls": "import ctypes, struct\nlibc = ctypes.CDLL(None)\nprogram = ctypes.create_string_buffer("
    "struct.pack('=HBBI', 6, 0, 0, 0x50001), 8)\nlibc.prctl(38, 1, 0, 0, 0)\n"
    "libc.prctl(22, 2, struct.pack('=HxxxxxxQ', 1, ctypes.addressof(program)))",
    "no limits to speak of": "import resource\nfor name in ('NOFILE', 'FSIZE', 'STACK', 'NPROC'):\n"
    "    resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (1, 1))",
    "nothing open": "import os\nos.closerange(0, 4096)\ntry:\n    while True: os.open('/dev/zero', os.O_RDWR)\n"
    "except OSError: pass",
    "little that kills it first": "import os, sys\ntry: open('/proc/self/oom_score_adj', 'w').write('0')\n"
    "except OSError as error: print(error)\nheld = []\nfor _ in range(40):\n    held.append(os.memfd_create('x'))\n"
    "    for _ in range(16): os.write(held[-1], bytes(1 << 20))",
    "an exit status of its own making": "class Odd(int):\n    def __and__(self, other): raise KeyboardInterrupt\n"
    "raise SystemExit(Odd(3))",
    "a text of its own making": "class Text(str):\n    def encode(self, *a): return self\n    def __len__(self): return -1\n"
    "class A:\n    def __repr__(self): return Text('x')\nA()",
    "an exception of its own making": "class Text(str):\n    def __getattribute__(self, name): raise SystemExit(0)\n"
    "error = SyntaxError('x')\nerror.text, error.lineno, error.offset = Text('x'), Text('3'), 10**30\nraise error",
}


@pytest.fixture(scope="module", params=KINDS)
def kind_name(request: pytest.FixtureRequest) -> str:
    available(request.param)
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(kind_name: str) -> AsyncIterator[Sandbox]:
    async with KINDS[kind_name].start() as sandbox:
        yield sandbox


async def complaint(sandbox: Sandbox, code: str) -> str:
    """What the machinery says of itself after this code; empty if nothing."""
    limits = Limits(timeout_s=4.0)
    said = []
    async with sandbox.session(limits) as session:
        results = [await session.run(code, timeout=1.5)]
        for language, line in (("python", "6 * 7"), ("sh", "echo 42"), ("python", "6 * 7")):
            results.append(await session.run(line, language=language, timeout=2.0))
        try:
            await session.put("folder/file", "x")
            assert await session.get("folder/file") == b"x"
        except OSError:
            pass  # it cannot be had any more, which is the code's doing
    results.append(await sandbox.run(code, timeout=1.5, limits=limits))
    for result in results:
        if result.status is Status.INFRA:
            said.append(result.error)
        json.dumps(result.value, ensure_ascii=False).encode()
        assert result.value_cut >= 0 and len((result.value or "").encode()) <= limits.value_bytes
    return "; ".join(said)


async def test_nothing_that_code_leaves_is_a_failure_of_the_machinery(sandbox: Sandbox) -> None:
    several = asyncio.Semaphore(6)

    async def one(code: str) -> str:
        async with several:
            return await complaint(sandbox, code)

    found = dict(zip(LEFT, await asyncio.gather(*map(one, LEFT.values())), strict=True))
    assert not {name: said for name, said in found.items() if said}
    assert (await sandbox.run("print('fine')")).stdout == "fine\n"
