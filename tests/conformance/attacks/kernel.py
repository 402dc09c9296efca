"""Parts of the kernel that no tool needs, and where holes have been found over and over."""

from __future__ import annotations

from tests.conformance.attacks.base import Attack, says

CALL = """
import ctypes, platform, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(x86, arm, *arguments):
    got = libc.syscall(x86 if platform.machine() == "x86_64" else arm, *arguments)
    print(got, ctypes.get_errno())
    return got
"""


def surface(name: str, harm: str, code: str, *, everywhere: bool = False) -> Attack:
    return Attack(name, harm, CALL + code, says, layer="seccomp", everywhere=everywhere)


ATTACKS = (
    Attack(
        "nested_user_namespace",
        "becomes root in a name space of its own, and meets all of the kernel",
        CALL
        + """
if os.fork() == 0:
    mark()
    if libc.unshare(0x10000000) == 0:
        pwned("unshare")
    os._exit(0)
os.wait()
""",
        says,
        layer="user",
        everywhere=False,
    ),
    Attack(
        "nested_user_namespace_by_clone",
        "becomes root in a name space of its own, and meets all of the kernel",
        CALL
        + """
child = call(56, 220, 0x10000000 | 17, 0, 0, 0, 0)
if child == 0:
    os._exit(0)
if child > 0:
    os.waitpid(child, 0)
    pwned("clone")
""",
        says,
        layer="user",
        everywhere=False,
    ),
    Attack(
        "nested_user_namespace_by_clone3",
        "becomes root in a name space of its own, and meets all of the kernel",
        CALL
        + """
arguments = struct.pack("=8Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0)
child = call(435, 435, arguments, len(arguments))
if child == 0:
    os._exit(0)
if child > 0:
    os.waitpid(child, 0)
    pwned("clone3")
""",
        says,
        layer="user",
        everywhere=False,
    ),
    Attack(
        "other_namespaces",
        "gets name spaces of its own",
        CALL
        + """
for flag in (0x00020000, 0x04000000, 0x08000000, 0x40000000, 0x02000000, 0x20000000):
    if os.fork() == 0:
        mark()
        if libc.unshare(flag) == 0:
            pwned(hex(flag))
        os._exit(0)
    os.wait()
""",
        says,
    ),
    Attack(
        "enters_namespaces",
        "enters the host's name spaces",
        CALL
        + """
for name in ("net", "uts", "ipc", "mnt"):
    for pid in (1, os.getppid(), os.getpid()):
        try:
            fd = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY)
        except OSError:
            continue
        if libc.setns(fd, 0) == 0:
            pwned(pid, name)
        os.close(fd)
""",
        says,
    ),
    surface("io_uring", "uses io_uring", "if call(425, 425, 4, ctypes.create_string_buffer(120)) >= 0:\n    pwned()\n"),
    surface("keyctl", "uses the kernel's key rings", "if call(250, 219, 0, -3, 1) >= 0:\n    pwned()\n"),
    surface(
        "add_key", "leaves keys in the kernel", 'if call(248, 217, b"user", b"agentloop", b"x", 1, -2) >= 0:\n    pwned()\n'
    ),
    surface(
        "bpf",
        "runs programs in the kernel",
        """
attributes = ctypes.create_string_buffer(128)
struct.pack_into("IIII", attributes, 0, 2, 4, 4, 4)
if call(321, 280, 0, attributes, 128) >= 0:
    pwned()
""",
    ),
    surface(
        "perf_event_open",
        "measures the kernel and other processes",
        """
attributes = ctypes.create_string_buffer(128)
struct.pack_into("IIQ", attributes, 0, 1, 128, 0)
struct.pack_into("Q", attributes, 40, 0x60)
if call(298, 241, attributes, 0, -1, -1, 0) >= 0:
    pwned()
""",
    ),
    surface(
        "userfaultfd", "stops the kernel where it likes", "if call(323, 282, 0) >= 0 or call(323, 282, 1) >= 0:\n    pwned()\n"
    ),
    surface("fanotify", "watches the host's files", "if call(300, 262, 0, 0) >= 0:\n    pwned()\n"),
    surface(
        "kernel_log",
        "reads the kernel's log",
        "if call(103, 116, 3, ctypes.create_string_buffer(4096), 4096) > 0:\n    pwned()\n",
    ),
    surface(
        "sets_the_clock",
        "changes the host's clock",
        """
try:
    time.clock_settime(time.CLOCK_REALTIME, time.time())
    pwned()
except OSError as error:
    print(error)
""",
    ),
    surface(
        "sets_the_host_name",
        "changes the host's name",
        "name = os.uname().nodename.encode()\nif libc.sethostname(name, len(name)) == 0:\n    pwned()\n",
        everywhere=True,
    ),
    surface(
        "changes_owners",
        "acts as any user",
        """
open("f", "w").close()
try:
    os.chown("f", 12345, 12345)
    pwned()
except OSError as error:
    print(error)
""",
        everywhere=True,
    ),
    Attack(
        "becomes_root",
        "becomes root, or may by a program that makes root of whoever runs it",
        """
for act in (lambda: os.setresuid(0, 0, 0), lambda: os.setresgid(0, 0, 0)):
    try:
        act()
        pwned("uid or gid 0")
    except OSError as error:
        print(error)
if "NoNewPrivs:\\t0" in open("/proc/self/status").read():
    for path in ("/bin/su", "/usr/bin/su", "/usr/bin/mount", "/usr/bin/passwd", "/usr/bin/sudo", "/usr/bin/newgrp"):
        if os.path.exists(path) and os.stat(path).st_mode & 0o4000:
            pwned(path)
""",
        says,
    ),
    Attack(
        "keeps_capabilities",
        "has rights over the host that no tool needs",
        """
for line in open("/proc/self/status"):
    name, _, value = line.partition(":")
    if name in ("CapEff", "CapPrm", "CapInh", "CapAmb") and int(value, 16):
        pwned(name, value.strip())
""",
        says,
    ),
)
