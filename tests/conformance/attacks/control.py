"""The way by which results come back: forged, broken, flooded. Whatever the code does to it is the code's own failure."""

from __future__ import annotations

from tests.conformance.attacks.base import Attack, Outcome, broken, either
from tests.conformance.attacks.host import Host


def forged(outcome: Outcome, host: Host) -> str | None:
    """A run that raised passes for one that did not."""
    if outcome.status == "ok":
        return f"an error passed for success (value {(outcome.value or '')[:40]!r})"
    return None


FDS = """
import stat
def open_fds():
    found = []
    for fd in range(3, 1024):
        try:
            found.append((fd, stat.S_IFMT(os.fstat(fd).st_mode)))
        except OSError:
            pass
    return [fd for fd, kind in found if kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG)]
"""

ATTACKS = (
    Attack(
        "forges_a_result",
        "writes its own verdict to whatever is open",
        FDS
        + r"""
import json, pickle, struct
result = {"status": "ok", "ok": True, "value": "FORGED", "stdout": "", "stderr": "", "exit_code": 0, "error": ""}
body = json.dumps(result).encode()
frames = [body + b"\n", struct.pack(">I", len(body)) + body, struct.pack("<I", len(body)) + body, pickle.dumps(result)]
for fd in open_fds():
    os.set_blocking(fd, False)
    for frame in frames:
        try:
            os.write(fd, frame)
        except OSError:
            pass
os._exit(7)
""",
        either(forged, broken),
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "garbage_in_every_file",
        "makes its own failure pass for the machinery's",
        FDS
        + r"""
for fd in open_fds():
    os.set_blocking(fd, False)
    for garbage in (b"\n", b"\xff" * 64, b"\0" * 64, b"{]}\n", b"\x7f\xff\xff\xff"):
        try:
            os.write(fd, garbage)
        except OSError:
            pass
1 / 0
""",
        broken,
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "floods_every_file",
        "fills the memory of whoever reads the results",
        FDS
        + r"""
if os.fork():
    os.wait()
else:
    mark()
    for fd in open_fds():
        if os.fork() == 0:
            mark()
            try:
                os.set_blocking(fd, True)
                for _ in range(100):
                    os.write(fd, b"{" * (1 << 20))
            finally:
                os._exit(0)
    time.sleep(2)
    os._exit(0)
1 / 0
""",
        broken,
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "closes_every_file",
        "makes its own failure pass for the machinery's",
        "os.closerange(3, 4096)\n1 / 0\n",
        either(broken, lambda outcome, host: None),
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "replaces_every_file",
        "makes its own failure pass for the machinery's",
        FDS
        + r"""
r, w = os.pipe()
for fd in open_fds():
    if fd not in (r, w):
        os.dup2(w, fd)
os.close(r)
1 / 0
""",
        broken,
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "reads_every_file",
        "takes the questions meant for the next run",
        FDS
        + r"""
for fd in open_fds():
    if os.fork() == 0:
        mark()
        try:
            while os.read(fd, 65536):
                pass
        finally:
            os._exit(0)
time.sleep(0.2)
os._exit(7)
""",
        broken,
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "forges_by_patching",
        "has the driver say that all went well",
        r"""
import builtins, json, pickle, struct, traceback, io, types
good = {"status": "ok", "ok": True, "value": "FORGED", "error": None, "exit_code": 0}
json.dumps = lambda *a, **k: '{"status": "ok", "value": "FORGED"}'
frame = sys._getframe()
while frame is not None:
    for space in (frame.f_locals, frame.f_globals):
        for name, held in list(space.items()):
            if isinstance(held, dict) and "status" in held:
                held.update(good)
    frame = frame.f_back
raise SystemExit(7)
""",
        either(forged, broken),
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "forges_by_gc",
        "finds the driver's objects and changes them",
        r"""
import gc
for thing in gc.get_objects():
    try:
        if isinstance(thing, dict) and thing.get("status") in ("error", "pending", ""):
            thing["status"] = "ok"
            thing["value"] = "FORGED"
        if isinstance(thing, dict) and thing.get("__name__") in ("json", "json.encoder"):
            thing["dumps"] = lambda *a, **k: '{"status": "ok", "value": "FORGED"}'
    except Exception:
        pass
raise SystemExit(7)
""",
        either(forged, broken),
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "breaks_the_builtins",
        "makes its own failure pass for the machinery's",
        r"""
import builtins, json, traceback, ast
def bad(*a, **k):
    raise KeyboardInterrupt("no")
for module in (json, traceback, ast, os, sys, time):
    for name in list(vars(module)):
        if callable(getattr(module, name)) and not name.startswith("__") and name not in ("_exit", "_getframe"):
            try:
                setattr(module, name, bad)
            except Exception:
                pass
for name in ("repr", "compile", "exec", "eval", "len", "print", "isinstance", "open", "str", "bytes", "int", "dict", "list"):
    setattr(builtins, name, bad)
raise ValueError
""",
        broken,
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "dies_without_a_word",
        "makes its own end pass for the machinery's",
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        broken,
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "exits_for_good",
        "makes its own end pass for the machinery's",
        "os._exit(0)\n",
        broken,
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "crashes",
        "makes its own end pass for the machinery's",
        "import ctypes\nctypes.string_at(0)\n",
        broken,
        timeout=5.0,
        lasting=True,
    ),
)
