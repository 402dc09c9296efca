"""What all processes of one kernel share, whatever name spaces they are in: locks and watches on files, quotas of a user, pages
of a reserve, and the machinery's own processes."""

from __future__ import annotations

from tests.conformance.attacks.base import Attack, Outcome, Place, broken, says
from tests.conformance.attacks.host import Host
from tests.conformance.attacks.kernel import CALL

FOREIGN = CALL + "pids = sorted({1, os.getppid()} - {0, os.getpid()})\n"
"""The machinery's processes, as far as they can be named. What is set is what they have already."""


async def lives_on(place: Place, host: Host, outcome: Outcome) -> None:
    """Further runs in the same place: none of them may fail for what the first one did to the machinery."""
    for _ in range(3):
        after = await place.run("print(40 + 2)", timeout=8.0)
        if after.status == "infra":
            outcome.status, outcome.error = "infra", after.error


ATTACKS = (
    Attack(
        "watches_what_the_host_opens",
        "learns which programs the host runs and which files it reads",
        CALL
        + """
watch = call(294, 26, 0)
for folder in ("/usr/bin", "/bin"):
    call(254, 27, watch, folder.encode(), 0x20)
os.set_blocking(watch, False)
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        if os.read(watch, 4096):
            pwned()
            break
    except OSError:
        time.sleep(0.05)
""",
        says,
        neighbour="""
mark("@NEIGHBOUR@")
while True:
    open("/usr/bin/env").close()
    time.sleep(0.05)
""",
    ),
    Attack(
        "takes_all_watches",
        "takes the inotify instances that the user has on the whole host",
        CALL + "got = [call(294, 26, 0) for _ in range(100)]\nif min(got) >= 0:\n    pwned()\n",
        says,
    ),
    Attack(
        "leases_a_file",
        "holds up whoever opens a file of the host for writing",
        """
import fcntl
for path in (sys.executable, os.__file__, "/usr/bin/env", *@SECRET_FILES@):
    try:
        fcntl.fcntl(os.open(path, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)
        pwned(path)
    except OSError as error:
        print(error)
""",
        says,
    ),
    Attack(
        "leased_file_fetched",
        "holds up whoever fetches its files, by a lease on them",
        """
import fcntl
fd = os.open("loot", os.O_RDWR | os.O_CREAT)
if os.fork() == 0:
    mark()
    for n in range(1, 65):
        signal.signal(n, signal.SIG_IGN) if n not in (9, 19, 32, 33) else None
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    os.closerange(0, fd)
    time.sleep(30)
    os._exit(0)
time.sleep(0.3)
""",
        broken,
        fetch=("loot",),
        everywhere=False,
    ),
    Attack(
        "queues_signals",
        "takes the signals that a user may have waiting on the whole host",
        CALL
        + """
signal.pthread_sigmask(signal.SIG_BLOCK, [40])
info = struct.pack("iiiiii", 40, 0, -1, 0, os.getpid(), os.getuid()) + bytes(104)
queued = 0
number = 129 if platform.machine() == "x86_64" else 138
while queued < 20000 and libc.syscall(number, os.getpid(), 40, info) == 0:
    queued += 1
if queued > 4096:
    pwned(queued)
""",
        says,
    ),
    Attack(
        "takes_huge_pages",
        "takes the huge pages that the host has reserved: no control group for memory counts them",
        CALL
        + """
libc.mmap.restype = ctypes.c_void_p
for flags in (0x40022, 0x40021):
    got = libc.mmap(None, ctypes.c_size_t(2 << 20), 3, flags, -1, ctypes.c_long(0))
    print(got, ctypes.get_errno())
    if got != ctypes.c_void_p(-1).value:
        pwned()
if call(319, 279, b"x", 4) >= 0 or call(29, 194, 0, 2 << 20, 0o4600) >= 0:
    pwned()
""",
        says,
    ),
    Attack(
        "kernel_events",
        "hears of the host's devices",
        """
import socket
try:
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15)
    s.bind((0, 1))
    pwned()
except OSError as error:
    print(error)
""",
        says,
    ),
    Attack(
        "odd_sockets",
        "meets parts of the kernel that nothing here needs",
        """
import socket
netlink = [(16, 3, protocol) for protocol in (4, 9, 12, 16, 21)]
for family, kind, protocol in (*netlink, (38, 5, 0), (44, 3, 0), (29, 3, 1), (30, 5, 0), (17, 3, 3), (43, 1, 0)):
    try:
        socket.socket(family, kind, protocol)
        pwned(family, protocol)
    except OSError as error:
        print(family, error)
    try:
        socket.socketpair(family, kind, protocol)
        pwned("pair", family, protocol)
    except (OSError, ValueError) as error:
        print(family, error)
""",
        says,
    ),
    Attack(
        "governs_the_machinery",
        "slows down or frees what holds it",
        FOREIGN
        + """
for pid in pids:
    for act in (
        lambda: os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid)),
        lambda: os.sched_setaffinity(pid, os.sched_getaffinity(pid)),
        lambda: os.sched_setscheduler(pid, os.sched_getscheduler(pid), os.sched_getparam(pid)),
    ):
        try:
            act()
            pwned(pid)
        except OSError as error:
            print(error)
    if call(251, 30, 1, pid, call(252, 31, 1, pid)) == 0:
        pwned("io", pid)
""",
        says,
    ),
    Attack(
        "opens_the_machinery",
        "reads and writes the memory, files and settings of what holds it",
        FOREIGN
        + """
for pid in pids:
    for name in ("mem", "environ", "maps", "stack", "syscall", "auxv", "io", "smaps"):
        try:
            with open(f"/proc/{pid}/{name}", "r+b" if name == "mem" else "rb") as f:
                if name == "mem" or f.read(10):
                    pwned(pid, name)
        except OSError as error:
            print(error)
    for name in ("oom_score_adj", "coredump_filter", "timerslack_ns"):
        try:
            text = open(f"/proc/{pid}/{name}").read()
            with open(f"/proc/{pid}/{name}", "w") as f:
                f.write(text)
            pwned(pid, name)
        except OSError as error:
            print(error)
    for name in ("root", "cwd", "exe", "fd/0", "fd/1", "fd/3", "fd/4", "fd/5", "ns/pid", "ns/user"):
        try:
            pwned(pid, os.readlink(f"/proc/{pid}/{name}"))
        except OSError as error:
            print(error)
""",
        says,
    ),
    Attack(
        "is_nobodys_child",
        "makes a process beside itself, whose end passes for that of what holds it",
        CALL
        + """
for flags in (0x8000 | 17, 0x8000):
    pid = call(56, 220, flags, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    if pid > 0:
        pwned("has a brother", pid)
time.sleep(0.5)
""",
        says,
        then=lives_on,
        lasting=True,
    ),
)
