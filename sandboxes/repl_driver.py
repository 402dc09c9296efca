"""The process that runs code inside a container: one interpreter that keeps its variables, and processes beside it.

Runs alone in the container, as its process 1, under any Python from 3.8 on and with nothing but the standard library; the host
passes this file's text to `python3 -c`. The host talks to it in frames over the container's standard input and output:

    4 bytes: length of the header, 4 bytes: length of the body (both big-endian), header (JSON), body (bytes)

Every request has an `id` and an `op` (`hello`, `run`, `kill`, `put`, `get`) and gets one answer with the same `id`, `get` as
many as its data needs. Model-written code runs only in children, which hold neither of the two streams; what they say is read
with a limit and framed anew here, so that they can lie about their own value and nothing else. This process cannot be
signalled by them (it is process 1 of their namespace and handles no signal of theirs) nor read or traced (it is not dumpable).
"""

# ruff: noqa: UP031, SIM105, SIM115

from __future__ import annotations

import ast
import ctypes
import errno
import fcntl
import gc
import io
import json
import linecache
import os
import resource
import select
import signal
import stat
import struct
import sys
import time
import traceback
import types
from typing import Any, NoReturn

FRAME = struct.Struct(">II")
WORD = struct.Struct(">I")
CHUNK = 1 << 18
PR_SET_DUMPABLE = 4
ANSWER_ROOM = 1 << 16
"""Bytes that a child's answer may have beside its value."""
DYING_S = 0.5
"""How long a child that has closed its answers' pipe may take to end."""
NOTHING: dict[str, Any] = {
    **{"status": "error", "exit": None, "value": None, "value_cut": 0, "stdout": 0, "stdout_cut": 0, "stderr_cut": 0},
    **{"state_lost": False, "run_s": 0.0, "cpu_s": None, "peak_mb": None},
}
"""The answer to a run that could not begin."""
ROOT = "/tmp"
WORK = "/tmp/work"


def prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def read_exactly(fd: int, size: int) -> bytes:
    """`size` bytes, or fewer at the end of the stream."""
    parts = []
    while size > 0:
        part = os.read(fd, min(size, CHUNK))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def first_line(path: str) -> str:
    try:
        with open(path) as file:
            return file.readline().strip()
    except OSError:
        return ""


# --- what the kernel counts -------------------------------------------------------------------------------------------------


class Counters:
    """The container's own cgroup, version 1 or 2, as far as it can be read from inside."""

    def __init__(self) -> None:
        two = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        base = "/sys/fs/cgroup"
        self.events = base + ("/memory.events" if two else "/memory/memory.oom_control")
        self.cpu = base + ("/cpu.stat" if two else "/cpuacct/cpuacct.usage")
        self.peak = base + ("/memory.peak" if two else "/memory/memory.max_usage_in_bytes")
        self.memory = base + ("/memory.max" if two else "/memory/memory.limit_in_bytes")
        self.pids = base + ("/pids.max" if two else "/pids/pids.max")
        self.quota = base + ("/cpu.max" if two else "/cpu/cpu.cfs_quota_us")

    def oom_kills(self) -> int | None:
        """Processes that the kernel has killed for memory; `None` if it cannot be read."""
        try:
            with open(self.events) as file:
                found = [line.split()[1] for line in file if line.startswith("oom_kill ")]
        except OSError:
            return None
        return int(found[0]) if found else None

    def cpu_s(self) -> float | None:
        text = first_line(self.cpu).split()
        if not text:
            return None
        return int(text[1]) / 1e6 if len(text) == 2 else int(text[0]) / 1e9

    def peak_mb(self) -> float | None:
        text = first_line(self.peak)
        return int(text) / 2**20 if text.isdigit() else None


def inside() -> dict[str, Any]:
    """What holds in here, for the host to compare with what it asked for."""
    with open("/proc/self/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    counters, disk = Counters(), os.statvfs(ROOT)
    return {
        "python": sys.version.split()[0],
        "pid": os.getpid(),
        "uid": os.getuid(),
        "capabilities": int(status.get("CapEff", "0"), 16) | int(status.get("CapBnd", "0"), 16),
        "no_new_privs": status.get("NoNewPrivs", "").strip() == "1",
        "seccomp": status.get("Seccomp", "").strip() == "2",
        "interfaces": sorted(os.listdir("/sys/class/net")) if os.path.isdir("/sys/class/net") else [],
        "read_only": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
        "disk_bytes": disk.f_blocks * disk.f_frsize,
        "files": disk.f_files,
        "memory": first_line(counters.memory),
        "pids": first_line(counters.pids),
        "quota": first_line(counters.quota),
        "open_files": os.sysconf("SC_OPEN_MAX"),
        "counts_oom": counters.oom_kills() is not None,
        "counts_cpu": counters.cpu_s() is not None,
    }


# --- the interpreter: a child of this process, in which everything is the user's ---------------------------------------------


def start_python(requests: int, answers: int) -> NoReturn:
    """The rest of a child's life: read one request after the other, run it, answer. Never returns."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    sys.argv = [""]
    sys.path.insert(0, "")
    number, own = 0, os.getpid()
    while True:
        head = read_exactly(requests, WORD.size)
        if len(head) < WORD.size:
            os._exit(0)
        request = json.loads(read_exactly(requests, WORD.unpack(head)[0]).decode())
        number += 1
        set_stdin(request["stdin"].encode("utf-8", "surrogateescape"))
        set_outputs()
        answer = evaluate(main, request["code"], "<run %d>" % number, request["value_bytes"])
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                pass
        if os.getpid() != own:  # a fork that the code made has come to its end
            leave(answer["exit"])
        data = json.dumps(answer).encode()
        write_all(answers, WORD.pack(len(data)) + data)
        if request["last"]:
            leave(answer["exit"])


def leave(status: int) -> NoReturn:
    """End as `python file.py` would: wait for threads, run what was registered with atexit."""
    import atexit
    import threading

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:
        pass
    os._exit(status)


def set_stdin(data: bytes) -> None:
    if data:
        fd = os.memfd_create("stdin")
        write_all(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
    else:
        fd = os.open("/dev/null", os.O_RDONLY)
    os.dup2(fd, 0)
    os.close(fd)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)


def set_outputs(new: bool = False) -> None:
    """stdout and stderr on descriptors 1 and 2, whatever earlier code has put there; `new` ones, or where it closed them."""
    streams = (sys.__stdout__, sys.__stderr__)
    if new or not all(isinstance(stream, io.TextIOWrapper) and not stream.closed for stream in streams):
        sys.__stdout__ = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # type: ignore[misc]
        sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # type: ignore[misc]
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def evaluate(main: types.ModuleType, code: str, name: str, value_bytes: int) -> dict[str, Any]:
    """Run `code` in `main`'s namespace; its last expression's value, and how it ended."""
    answer: dict[str, Any] = {"value": None, "value_cut": 0, "exit": 0, "memory": False}
    lines = io.StringIO(code + "\n", newline=None).readlines()  # a last line without its end has its marks a column off
    linecache.cache[name] = (len(code), None, lines, name)
    space = main.__dict__
    try:
        tree, last = ast.parse(code, name), None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body[-1].value)
            del tree.body[-1]
        exec(compile(tree, name, "exec", dont_inherit=True), space)
        if last is not None:
            value = eval(compile(last, name, "eval", dont_inherit=True), space)
            if value is not None:
                shown = repr(value).encode("utf-8", "backslashreplace")
                answer["value_cut"] = max(0, len(shown) - value_bytes)
                answer["value"] = shown[:value_bytes].decode("utf-8", "ignore")
    except SystemExit as end:
        answer["exit"] = end.code & 255 if isinstance(end.code, int) else 0 if end.code is None else 1
        if answer["exit"] and not isinstance(end.code, int):
            show(str(end.code) + "\n")
    except BaseException as error:
        answer["exit"], answer["memory"] = 1, isinstance(error, MemoryError)
        show(trace(error, name))
    return answer


def trace(error: BaseException, name: str) -> str:
    """The traceback without the frames of this file."""
    try:
        at = error.__traceback__
        while at is not None and at.tb_frame.f_code.co_filename != name:
            at = at.tb_next
        return "".join(traceback.format_exception(type(error), error, at))
    except BaseException:
        return "%s\n" % type(error).__name__


def show(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BaseException:
        try:
            os.write(2, text.encode("utf-8", "replace"))
        except OSError:
            pass


# --- the driver ---------------------------------------------------------------------------------------------------------------


class Kept:
    """One output stream of a run: its beginning and its end, at most `limit` bytes together, and how much was left out."""

    def __init__(self, limit: int) -> None:
        self.limit, self.total, self.head, self.tail = limit, 0, bytearray(), bytearray()

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self.limit - len(self.head)
        self.head += data[:room]
        self.tail = self.last(self.tail + data[room:])

    def last(self, data: bytearray) -> bytearray:
        """The end of `data` that is kept: at most half of the limit."""
        return data[max(0, len(data) - self.limit // 2) :]

    def over(self) -> bool:
        return self.total > self.limit

    def kept(self) -> bytes:
        return bytes(self.head[: self.limit - len(self.tail)] + self.tail)


class Child:
    """A child that runs code: the interpreter, or a shell. Its streams as this process holds them."""

    def __init__(self, open_files: int, shell: str = "", code: str = "") -> None:
        out, err = os.pipe(), os.pipe()
        ask, answer = os.pipe(), os.pipe()
        ends = (*out, *err, *ask, *answer)
        try:
            self.pid = os.fork()
        except OSError:
            for fd in ends:
                os.close(fd)
            raise
        if self.pid == 0:
            try:
                become_child(out[1], err[1], ask[0], answer[1], open_files, shell, code)
            except BaseException as error:
                os.write(2, ("%s: %s\n" % (type(error).__name__, error)).encode("utf-8", "replace"))
            finally:
                os._exit(127)
        for fd in (out[1], err[1], ask[0], answer[1]):
            os.close(fd)
        self.out, self.err, self.ask, self.answer = out[0], err[0], ask[1], answer[0]
        for fd in (self.out, self.err, self.ask, self.answer):
            os.set_blocking(fd, False)
        self.status: int | None = None
        """As `waitpid` gives it, once it has ended."""

    def close(self) -> None:
        for fd in (self.out, self.err, self.ask, self.answer):
            os.close(fd)


def become_child(out: int, err: int, ask: int, answer: int, open_files: int, shell: str, code: str) -> NoReturn:
    """Turn a fresh fork into a place for the user's code: its own streams, nothing of the host's, ordinary signals."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    kept = sorted((ask, answer))
    os.closerange(3, kept[0])
    os.closerange(kept[0] + 1, kept[1])
    os.closerange(kept[1] + 1, os.sysconf("SC_OPEN_MAX"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    prctl(PR_SET_DUMPABLE, 1)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass
    os.umask(0o022)
    os.makedirs(WORK, exist_ok=True)
    os.chdir(WORK)
    if not shell:
        set_outputs(new=True)
        start_python(ask, answer)
    set_stdin(read_exactly(ask, WORD.unpack(read_exactly(ask, WORD.size))[0]))
    os.execv("/bin/" + shell, shell_command(shell, code))


class Driver:
    def __init__(self) -> None:
        self.control_in = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
        self.control_out = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        self.woken, wake = os.pipe()
        os.set_blocking(self.woken, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 does not get what it does not handle
        self.counters = Counters()
        self.open_files = 256
        self.python: Child | None = None
        self.untold = False
        """A run that was cancelled has cost the variables; nobody reads its answer, so the next one tells it."""
        self.writing: tuple[int, int, str, str] | None = None
        """The file that a `put` in several frames writes: descriptor, folder's descriptor, temporary name, name."""

    # frames

    def receive(self) -> dict[str, Any]:
        head = read_exactly(self.control_in, FRAME.size)
        if len(head) < FRAME.size:
            os._exit(0)  # the host is gone: with process 1 everything in here ends
        header, body = FRAME.unpack(head)
        request: dict[str, Any] = json.loads(read_exactly(self.control_in, header).decode())
        request["body"] = read_exactly(self.control_in, body)
        return request

    def send(self, answer: dict[str, Any], body: bytes = b"") -> None:
        header = json.dumps(answer).encode()
        write_all(self.control_out, FRAME.pack(len(header), len(body)) + header + body)

    def serve(self) -> NoReturn:
        while True:
            request = self.receive()
            number, op = request["id"], request["op"]
            try:
                if op == "run":
                    self.run(request)
                elif op == "put":
                    self.put(request)
                    self.send({"id": number})
                elif op == "get":
                    self.get(request)
                elif op == "hello":
                    for module in request["preload"]:
                        __import__(module)
                    self.open_files = request["open_files"]
                    gc.collect()
                    gc.freeze()
                    self.python = self.python or Child(self.open_files)
                    self.send(dict(inside(), id=number))
                elif op != "kill":  # a kill that came too late
                    self.send({"id": number, "error": "unknown operation", "errno": errno.ENOSYS})
            except OSError as error:
                self.send({"id": number, "error": error.strerror or str(error), "errno": error.errno or errno.EIO})
            except Exception as error:
                self.send({"id": number, "error": "%s: %s" % (type(error).__name__, error), "errno": errno.EIO})

    # children

    def reap(self, *children: Child) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for child in (self.python, *children):
                if child is not None and child.pid == pid:
                    child.status = status

    def kill_all(self, *children: Child) -> None:
        """Every process in here but this one, and wait until they are gone. The interpreter is gone too."""
        while True:
            try:
                os.kill(-1, signal.SIGKILL)
            except OSError:  # none is left that it may signal
                break
            self.reap(*children)
            time.sleep(0.0005)
        self.reap(*children)

    def kill_new(self, child: Child, old: set[int]) -> None:
        """Every process that was not there when `old` was taken: the run's own, and nothing of the interpreter's."""
        for _ in range(50):
            new = processes() - old
            if not new:
                return
            for pid in new:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.reap(child)
            time.sleep(0.001)
        self.kill_all(child)  # it forks faster than it is killed

    def interpreter(self) -> Child:
        """The living interpreter, a new one if there is none."""
        self.reap()
        if self.python is not None and self.python.status is not None:
            self.forget_python()
        if self.python is None:
            try:
                self.python = Child(self.open_files)
            except OSError:  # what an earlier run left behind fills the process limit
                self.kill_all()
                self.python = Child(self.open_files)
        return self.python

    def forget_python(self) -> None:
        if self.python is not None:
            self.python.close()
            self.python = None

    # one run

    def run(self, request: dict[str, Any]) -> None:
        shell = request["language"] != "python"
        self.reap()
        began, kills, cpu = time.monotonic(), self.counters.oom_kills(), self.counters.cpu_s()
        old = processes() if shell else set()
        if shell:
            try:
                child = Child(self.open_files, request["language"], request["code"])
            except OSError as refused:  # what the session has left running fills the process limit
                self.send(dict(NOTHING, id=request["id"], error="no process could be started: %s" % refused.strerror))
                return
            data = request["stdin"].encode("utf-8", "surrogateescape")
        else:
            child = self.interpreter()
            for fd in (child.out, child.err, child.answer):  # of what an earlier run left behind
                drain_fd(fd)
            names = ("code", "stdin", "value_bytes", "last")
            data = json.dumps({name: request[name] for name in names}).encode()
        watch = Watch(self, child, request, WORD.pack(len(data)) + data, began, cpu)
        ended = watch.until_done(shell or request["last"])
        state_lost = False
        if ended in ("timeout", "output_limit", "killed", "broken"):
            if shell:
                self.kill_new(child, old)
            else:
                self.kill_all(child)
            watch.drain()
        kills_now = self.counters.oom_kills()
        oom = kills is not None and kills_now is not None and kills_now > kills
        answer = watch.answer or {}
        if ended == "answered":
            exit_code = answer["exit"]
        else:
            exit_code = None if child.status is None or ended in ("timeout", "output_limit", "killed") else left(child.status)
        if ended == "broken":
            exit_code = None
        status, error = judge(ended, oom or answer.get("memory", False), exit_code, watch, request)
        if shell:
            child.close()
        if self.python is not None and self.python.status is not None:
            self.forget_python()
            state_lost = not request["last"]
        state_lost, self.untold = state_lost or self.untold, ended == "killed" and (state_lost or self.untold)
        if answer.get("value") is not None:
            answer["value"] = answer["value"].encode()[: request["value_bytes"]].decode("utf-8", "ignore")
        cpu_now = self.counters.cpu_s()
        out, err = watch.out.kept(), watch.err.kept()
        self.send(
            {
                "id": request["id"],
                "status": status,
                "error": error,
                "exit": exit_code,
                "value": answer.get("value"),
                "value_cut": answer.get("value_cut", 0),
                "stdout": len(out),
                "stdout_cut": watch.out.total - len(out),
                "stderr_cut": watch.err.total - len(err),
                "state_lost": state_lost,
                "run_s": time.monotonic() - began,
                "cpu_s": None if cpu is None or cpu_now is None else max(0.0, cpu_now - cpu),
                "peak_mb": self.counters.peak_mb(),
            },
            out + err,
        )

    # files

    def put(self, request: dict[str, Any]) -> None:
        """One part of a file. It is written beside its place and takes it with the last part, so that there is never half a
        file, and whatever stood there before, such as a link or a pipe, is replaced and not written to."""
        if request["first"]:
            self.abandon()
            folder, name = self.folder_of(request["path"], make=True)
            try:
                if is_folder(folder, name):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                temporary = ".%s.put" % os.urandom(8).hex()
                fd = os.open(
                    temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder
                )
            except OSError:
                os.close(folder)
                raise
            self.writing = (fd, folder, temporary, name)
        if self.writing is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fd, folder, temporary, name = self.writing
        try:
            write_all(fd, request["body"])
            if request["last"]:
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            self.abandon()
            raise
        if request["last"]:
            self.writing = None
            os.close(fd)
            os.close(folder)

    def abandon(self) -> None:
        """Remove what was written of a file that will not be finished."""
        if self.writing is not None:
            fd, folder, temporary, _ = self.writing
            self.writing = None
            os.close(fd)
            try:
                os.unlink(temporary, dir_fd=folder)
            except OSError:
                pass
            os.close(folder)

    def get(self, request: dict[str, Any]) -> None:
        folder, name = self.folder_of(request["path"], make=False)
        try:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            except OSError as error:
                raise refusal(error, "a symbolic link" if error.errno == errno.ELOOP else "no regular file") from None
        finally:
            os.close(folder)
        try:
            found = os.fstat(fd)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(found.st_mode):
                raise PermissionError(errno.EPERM, "no regular file")
            left_to_read = request["max_bytes"]
            if found.st_size > left_to_read:
                raise OSError(errno.EFBIG, "%d bytes" % found.st_size)
            while True:
                data = os.read(fd, min(CHUNK, left_to_read) or 1)
                if len(data) > left_to_read:
                    raise OSError(errno.EFBIG, "it grows")
                left_to_read -= len(data)
                self.send({"id": request["id"], "more": bool(data)}, data)
                if not data:
                    return
        finally:
            os.close(fd)

    def folder_of(self, path: str, make: bool) -> tuple[int, str]:
        """A descriptor of the folder that `path` is in, and the name in it. No symbolic link is followed on the way."""
        *folders, name = [part for part in path.split("/") if part not in ("", ".")]
        os.makedirs(WORK, exist_ok=True)
        at = os.open(WORK, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        for part in folders:
            try:
                if make:
                    try:
                        os.mkdir(part, 0o755, dir_fd=at)
                    except FileExistsError:
                        pass
                inner = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            except OSError as error:
                raise refusal(error, "'%s' on the way is no folder" % part) from None
            finally:
                os.close(at)
            at = inner
        return at, name


class Watch:
    """One run while it lasts: feeds the child, reads its streams, and sees whether a limit is reached."""

    def __init__(
        self, driver: Driver, child: Child, request: dict[str, Any], data: bytes, began: float, cpu: float | None
    ) -> None:
        self.driver, self.child, self.data, self.began, self.cpu = driver, child, memoryview(data), began, cpu
        self.deadline, self.cpu_s = began + request["timeout_s"], float(request["cpu_s"])
        self.out, self.err = Kept(request["output_bytes"]), Kept(request["output_bytes"])
        self.kept = {child.out: self.out, child.err: self.err}
        self.open = {child.out, child.err, child.answer}
        self.room = request["value_bytes"] * 6 + ANSWER_ROOM
        self.said = bytearray()
        self.answer: dict[str, Any] | None = None
        self.closed_at: float | None = None
        """When the child closed its side: it is dying, or plays a trick."""
        self.why = ""
        """Of a timeout: `wall` or `cpu`."""

    def until_done(self, to_its_end: bool) -> str:
        """How it went: `answered`, `ended` (the process did), `timeout`, `output_limit`, `killed` or `broken`."""
        child, driver = self.child, self.driver
        poll = select.poll()
        for fd in (driver.control_in, driver.woken, *self.open):
            poll.register(fd, select.POLLIN)
        if self.data:
            poll.register(child.ask, select.POLLOUT)
        while True:
            ready = dict(poll.poll(self.wait_ms()))
            if driver.woken in ready:
                drain_fd(driver.woken)
            if child.ask in ready:
                self.feed(poll)
            if driver.control_in in ready and driver.receive()["op"] == "kill":
                return "killed"
            for fd in self.open & set(ready):
                self.read(fd, poll)
            driver.reap(child)
            if child.status is not None:
                self.drain()
            if self.out.over() or self.err.over():
                return "output_limit"
            if child.status is not None:
                return "ended"
            if self.broken():
                return "broken"
            if self.answer is not None and not to_its_end:
                self.drain()
                return "output_limit" if self.out.over() or self.err.over() else "answered"
            if time.monotonic() >= self.deadline:
                self.why = "wall"
                return "timeout"
            if self.cpu_left() <= 0:
                self.why = "cpu"
                return "timeout"

    def wait_ms(self) -> float:
        wait = self.deadline - time.monotonic()
        if self.closed_at is not None:
            wait = min(wait, DYING_S)
        left_cpu = self.cpu_left()
        if left_cpu != float("inf"):
            wait = min(wait, max(0.01, left_cpu / (os.cpu_count() or 1)))
        return float(max(0.0, wait) * 1000 + 1)

    def cpu_left(self) -> float:
        """CPU seconds that it may still use; infinite if they are not counted."""
        if self.cpu is None:
            return float("inf")
        if time.monotonic() - self.began < 0.01:
            return self.cpu_s
        now = self.driver.counters.cpu_s()
        return float("inf") if now is None else self.cpu_s - now + self.cpu

    def feed(self, poll: select.poll) -> None:
        try:
            self.data = self.data[os.write(self.child.ask, self.data) :]
        except BlockingIOError:
            return
        except OSError:
            self.data = self.data[:0]
        if not self.data:
            poll.unregister(self.child.ask)

    def read(self, fd: int, poll: select.poll | None) -> None:
        """Read once. At the end of a stream it is watched no longer."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self.open.discard(fd)
            if fd == self.child.answer:
                self.closed_at = time.monotonic()
            if poll is not None:
                poll.unregister(fd)
        elif fd in self.kept:
            self.kept[fd].add(data)
        else:
            self.said += data
            size = WORD.unpack(bytes(self.said[: WORD.size]))[0] if len(self.said) >= WORD.size else self.room
            if len(self.said) >= WORD.size + size and self.answer is None and size <= self.room:
                self.answer = understood(bytes(self.said[WORD.size : WORD.size + size]))

    def broken(self) -> bool:
        """The interpreter said something that is no answer, or closed its side although it lives."""
        size = WORD.unpack(bytes(self.said[: WORD.size]))[0] if len(self.said) >= WORD.size else 0
        bad = size > self.room or len(self.said) > WORD.size + self.room or (self.answer is not None and not self.answer)
        if self.child is not self.driver.python or self.closed_at is None:
            return bad
        return bad or time.monotonic() - self.closed_at > DYING_S

    def drain(self) -> None:
        """What is still in the pipes: at most what a pipe can hold, since others may go on writing."""
        for fd in (self.child.out, self.child.err, self.child.answer):
            for _ in range(16):
                if fd not in self.open:
                    break
                before = (self.out.total, self.err.total, len(self.said))
                self.read(fd, None)
                if before == (self.out.total, self.err.total, len(self.said)):
                    break


def understood(data: bytes) -> dict[str, Any]:
    """A child's answer with every field of the right kind; `{}` if it is anything else."""
    try:
        given = json.loads(data.decode())
        value, cut, code, memory = given["value"], given["value_cut"], given["exit"], given["memory"]
        if not (value is None or isinstance(value, str)) or not isinstance(cut, int) or not isinstance(code, int):
            return {}
        if value is not None:
            value = value.encode("utf-8", "replace").decode()  # half of a surrogate pair can be nobody's text
        return {"value": value, "value_cut": max(0, min(cut, 1 << 62)), "exit": code & 255, "memory": bool(memory)}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def judge(ended: str, oom: bool, exit_code: int | None, watch: Watch, request: dict[str, Any]) -> tuple[str, str]:
    """Status and one sentence."""
    if ended == "killed":
        return "killed", "it was cancelled"
    if ended == "timeout":
        if watch.why == "cpu":
            return "timeout", "it used more than %g s of CPU time and was killed" % request["cpu_s"]
        return "timeout", "it ran longer than %g s and was killed" % request["timeout_s"]
    if oom:
        return "oom", "it needed more memory than the %d MiB that it may have" % request["memory_mb"]
    if ended == "output_limit":
        name = "stdout" if watch.out.over() else "stderr"
        return "output_limit", "it wrote more than %d bytes to %s and was killed" % (request["output_bytes"], name)
    if ended == "broken":
        return "error", "it broke its interpreter, which was killed"
    if exit_code:
        return "error", "signal %d ended it" % -exit_code if exit_code < 0 else "it ended with exit status %d" % exit_code
    return "ok", ""


def left(status: int) -> int:
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def shell_command(shell: str, code: str) -> list[str]:
    """`sh -c`, or for what is too long for an argument, `sh` with a file in memory."""
    data = code.encode("utf-8", "surrogateescape")
    if len(data) < 1 << 16:
        return [shell, "-c", code]
    fd = os.memfd_create("code", 0)
    write_all(fd, data)
    return [shell, "/proc/self/fd/%d" % fd]


def processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}


def drain_fd(fd: int) -> None:
    """Throw away what is in a pipe now."""
    try:
        for _ in range(16):
            if not os.read(fd, 1 << 16):
                return
    except BlockingIOError:
        pass


def is_folder(folder: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def refusal(error: OSError, why: str) -> OSError:
    """What to tell of a path that cannot be opened: a missing one as it is, anything odd as a refusal."""
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV):
        return PermissionError(errno.EPERM, why)
    return error


def main() -> None:
    if os.getpid() != 1:
        raise SystemExit("this driver kills every process that it can see: it runs only as process 1 of a container")
    prctl(PR_SET_DUMPABLE, 0)
    os.makedirs(WORK, exist_ok=True)
    Driver().serve()


if __name__ == "__main__":
    main()
