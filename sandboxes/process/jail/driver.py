"""The interpreter inside: runs code, keeps its variables, and says how it went on a private descriptor.

Everything in this process belongs to the code it runs, this module and the descriptor included. What it reports is therefore
a claim about itself: the launcher takes from it no more than that, and judges limits, time and death on its own.

A report is one `REPORT` struct and the value's bytes. A job is a `wire` frame: code, stdin.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import gc
import io
import linecache
import os
import resource
import struct
import sys
import threading
import traceback
import types
from typing import Any

from . import wire

REPORT = struct.Struct("!BBiQI")
"""outcome, whether there is a value, exit code, length of the value, bytes of it that follow."""
OK, RAISED, MEMORY, LEFT, EXHAUSTED = range(5)
"""`EXHAUSTED`: what code keeps in memory leaves this module none to go on with; it ends."""
OURS = ("jail", *(f"jail.{name}" for name in ("wire", "kernel", "files", "group", "driver", "template", "launcher", "zygote")))
WARM_UP = (
    ("", "import math\nx = 6\nprint(x, [1], {'a': 2.5})\nx * 7"),
    ("", "def f():\n    return 1 / 0\nf()"),
    ("", "def"),
    ("numpy", "import numpy\nprint(numpy.arange(6.0).reshape(2, 3) @ numpy.ones((3, 2)))"),
    (
        "sympy",
        "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 2, x), integrate(x * exp(x), x), simplify(sin(x)**2 - 1))",
    ),
)
"""By module, what to run once in the zygote if it is preloaded."""
MAX_VALUE = 16 * 2**20
CHANNEL_FD = 900
"""Where the private descriptor is: above what code that closes «all» descriptors usually reaches."""


def set_limits(limits: dict[str, Any], *, whole: bool) -> None:
    """Lower this process's rlimits for good; `whole`: it runs once, so that CPU time may be limited too."""
    with open("/proc/self/statm") as f:
        data = int(f.read().split()[5]) * resource.getpagesize()
    hard = {
        resource.RLIMIT_DATA: data + limits["memory_mb"] * 2**20,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_FSIZE: limits["disk_mb"] * 2**20,
        resource.RLIMIT_CORE: 1,  # 0 does not keep the kernel from starting a `core_pattern` that is a program, on the host
        resource.RLIMIT_SIGPENDING: 1024,  # counted over all processes of a user, elsewhere too
        resource.RLIMIT_MEMLOCK: 64 * 1024,
    }
    if whole:
        hard[resource.RLIMIT_CPU] = int(limits["cpu_s"]) + 2
    for kind, value in hard.items():
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def set_stdin(data: bytes) -> None:
    """Make `data` what descriptor 0 reads: a file in memory, so that nobody has to feed a pipe."""
    if data:
        fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    else:
        fd = os.open(os.devnull, os.O_RDONLY)
    os.dup2(fd, 0)
    if fd != 0:
        os.close(fd)


def _raw(fd: int, mode: str) -> io.FileIO:
    return io.FileIO(fd, mode, closefd=False)


def _outputs() -> tuple[io.TextIOWrapper, io.TextIOWrapper]:
    """stdout and stderr; by lines, so that what a killed run printed is not lost with it."""
    out, err = (
        io.TextIOWrapper(io.BufferedWriter(_raw(fd, "wb")), encoding="utf-8", errors="backslashreplace", line_buffering=True)
        for fd in (1, 2)
    )
    return out, err


class Interpreter:
    """One namespace, as a notebook's: `__main__`, kept between runs."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.runs = 0
        self.main = types.ModuleType("__main__")
        self.main.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = self.main
        self.outputs = _outputs()

    def run(self, code: str, value_bytes: int) -> tuple[int, int, bytes | None, int]:
        """Outcome, exit code, the value's first bytes and its length."""
        self.runs += 1
        name = f"<run {self.runs}>"
        self._streams()
        try:
            value = self._execute(code, name)
            text = None if value is None else repr(value).encode("utf-8", "backslashreplace")
            outcome, left = OK, 0
        except SystemExit as end:
            text, (outcome, left) = None, self._left(end)
        except MemoryError as error:
            text, outcome, left = None, MEMORY, 1
            self._show(error, name)
        except BaseException as error:
            text, outcome, left = None, RAISED, 1
            self._show(error, name)
        return outcome, left, None if text is None else text[:value_bytes], 0 if text is None else len(text)

    def finish(self) -> None:
        """What a Python process does at its end: wait for threads, call what `atexit` holds."""
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        except BaseException as error:
            self._show(error, "")

    def flush(self) -> None:
        for stream in (sys.stdout, sys.stderr, *self.outputs):
            with contextlib.suppress(BaseException):  # whatever the code put there
                stream.flush()

    def _execute(self, code: str, name: str) -> Any:
        try:
            tree = compile(code, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        except MemoryError:  # the parser's word for its own depth
            raise SyntaxError("too deeply nested") from None
        lines = io.StringIO(code + "\n", newline=None).readlines()  # a last line without its end has its marks a column off
        linecache.cache[name] = (len(code), None, lines, name)
        assert isinstance(tree, ast.Module)
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
        if tree.body:
            exec(compile(tree, name, "exec", dont_inherit=True), self.main.__dict__)
        if not isinstance(last, ast.Expr):
            return None
        return eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), self.main.__dict__)

    def _streams(self) -> None:
        """Standard streams on descriptors 0 to 2: put back if the code replaced them, new if it closed them."""
        if any(stream.closed for stream in self.outputs):
            self.outputs = _outputs()
        self.input = io.TextIOWrapper(io.BufferedReader(_raw(0, "rb")), encoding="utf-8", errors="replace")
        sys.stdin, (sys.stdout, sys.stderr) = self.input, self.outputs
        sys.__stdin__, (sys.__stdout__, sys.__stderr__) = self.input, self.outputs  # type: ignore[misc]

    @staticmethod
    def _left(end: SystemExit) -> tuple[int, int]:
        if end.code is None:
            return LEFT, 0
        if isinstance(end.code, int):
            return LEFT, end.code & 0xFF
        print(end.code, file=sys.stderr)
        return LEFT, 1

    def _show(self, error: BaseException, name: str) -> None:
        """A traceback without this module's frames."""
        try:
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename != name:
                trace = trace.tb_next
            sys.stderr.write("".join(traceback.format_exception(type(error), error, trace)))
        except BaseException:
            with contextlib.suppress(BaseException):
                os.write(2, f"{type(error).__name__}\n".encode())


def warm_up() -> None:
    """Run a little once, in the zygote: what Python makes at first use is then shared by all that are forked."""
    kept = [os.dup(fd) for fd in (0, 1, 2)]
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__, sys.modules["__main__"])
    for fd in (0, 1, 2):
        set_stdin(b"x") if fd == 0 else os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    interpreter = Interpreter()
    for module, code in WARM_UP:
        if not module or module in sys.modules:
            interpreter.run(code, 100)
    interpreter.flush()
    for at, fd in enumerate(kept):
        os.dup2(fd, at)
        os.close(fd)
    sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams[:6]  # type: ignore[misc]
    sys.modules["__main__"] = streams[6]
    linecache.cache.clear()


NO_MEMORY = REPORT.pack(EXHAUSTED, 0, 1, 0, 0)


def serve(channel: int) -> None:
    """Run jobs from `channel` until it ends. Never returns."""
    pid = os.getpid()
    try:
        _serve(channel)
    except MemoryError:
        if os.getpid() == pid:
            os.write(channel, NO_MEMORY)
        os._exit(1)


def _serve(channel: int) -> None:
    interpreter: Interpreter | None = None
    unpacker = wire.Unpacker()
    room = bytearray(1 << 18)  # made now: between two runs there may be no memory left for it
    while True:
        size = os.readv(channel, [room])
        if not size:
            os._exit(0)
        for head, (code, stdin) in unpacker.feed(bytes(memoryview(room)[:size])):
            if interpreter is None:
                prepare(head)
                if head["shell"]:
                    set_stdin(stdin)
                    os.execve(head["shell"], [head["shell"], "-c", code.decode("utf-8", "replace")], dict(os.environ))
                interpreter = Interpreter()
            _run(interpreter, channel, head, code, stdin)


def prepare(head: dict[str, Any]) -> None:
    """Before the first job: limits, and what the preloading process and its siblings would otherwise share."""
    set_limits(head["limits"], whole=bool(head["once"]))
    for name in OURS:
        sys.modules.pop(name, None)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    gc.enable()


def _run(interpreter: Interpreter, channel: int, head: dict[str, Any], code: bytes, stdin: bytes) -> None:
    set_stdin(stdin)
    outcome, left, value, length = interpreter.run(code.decode("utf-8", "replace"), min(head["value_bytes"], MAX_VALUE))
    if os.getpid() != interpreter.pid:  # the code forked, and this is the child
        interpreter.flush()
        os._exit(left)
    if head["once"]:
        interpreter.finish()
    interpreter.flush()
    report = REPORT.pack(outcome, value is not None, left, length, len(value or b"")) + (value or b"")
    view = memoryview(report)
    while view:
        view = view[os.write(channel, view) :]
