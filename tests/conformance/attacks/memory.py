"""More memory than a sandbox may have, in every place where memory can be had."""

from __future__ import annotations

from tests.conformance.attacks.base import Attack, Outcome, says
from tests.conformance.attacks.host import Host

CHILDREN = """
def held_by_children(count, hold):
    \"\"\"How many of the children hold what they should, at one time.\"\"\"
    pipes = []
    for _ in range(count):
        r, w = os.pipe()
        if os.fork() == 0:
            mark()
            os.close(r)
            try:
                kept = hold()
                os.write(w, b"x")
                time.sleep(6)
            finally:
                os._exit(0)
        os.close(w)
        pipes.append(r)
    return sum(os.read(r, 1) == b"x" for r in pipes)
"""


def segment_left(outcome: Outcome, host: Host) -> str | None:
    return "shared memory was left on the host" if host.shared_segments() else None


ATTACKS = (
    Attack(
        "memory",
        "takes the host's memory",
        """
held = []
for _ in range(20):
    held.append(b"x" * (50 << 20))
pwned("1000 MiB")
""",
        says,
        lasting=True,
    ),
    Attack(
        "memory_in_many_processes",
        "takes the host's memory: no single process has much",
        CHILDREN + 'got = held_by_children(4, lambda: b"x" * (300 << 20))\nif got == 4:\n    pwned("4 x 300 MiB")\n',
        says,
        lasting=True,
    ),
    Attack(
        "memory_mapped_shared",
        "takes the host's memory by shared mappings",
        """
import mmap
area = mmap.mmap(-1, 900 << 20)
page = b"x" * (1 << 20)
for number in range(900):
    area[number << 20 : (number + 1) << 20] = page
pwned("900 MiB")
""",
        says,
    ),
    Attack(
        "memory_file_descriptor",
        "takes the host's memory by files that have no name",
        """
page = b"x" * (1 << 20)
files = [os.memfd_create("m") for _ in range(3)]
for fd in files:
    for _ in range(300):
        assert os.write(fd, page) == len(page)
pwned("3 x 300 MiB")
""",
        says,
    ),
    Attack(
        "memory_in_many_file_descriptors",
        "takes the host's memory by many files that have no name, none of them large",
        """
page = b"x" * (1 << 20)
files = [os.memfd_create("m") for _ in range(25)]
for fd in files:
    for _ in range(40):
        assert os.write(fd, page) == len(page)
pwned("25 x 40 MiB")
""",
        says,
        layer="cgroup memory",
    ),
    Attack(
        "memory_in_files",
        "takes the host's memory by files in memory file systems",
        """
page = b"x" * (1 << 20)
total = 0
for folder in ("/dev/shm", "/tmp", "/run", "/var/tmp", "."):
    name = os.path.join(folder, "@NONCE@.left")
    try:
        with open(name, "wb", 0) as f:
            for _ in range(200):
                total += f.write(page)
    except OSError as error:
        print(folder, error)
print(total >> 20)
if total >= 700 << 20:
    pwned(total >> 20, "MiB")
""",
        says,
    ),
    Attack(
        "memory_system_v",
        "takes the host's memory by System V shared memory",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
got = 0
for _ in range(3):
    segment = libc.shmget(0, 300 << 20, 0o600 | 0o1000)
    if segment < 0:
        break
    address = libc.shmat(segment, None, 0)
    libc.shmctl(segment, 0, None)
    if address in (None, ctypes.c_void_p(-1).value):
        break
    ctypes.memset(address, 1, 300 << 20)
    got += 300
if got >= 900:
    pwned(got, "MiB")
""",
        says,
    ),
    Attack(
        "shared_segment_left",
        "leaves memory on the host that no process holds",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.shmget(@KEY@, 1 << 20, 0o600 | 0o1000), ctypes.get_errno())
""",
        segment_left,
    ),
    Attack(
        "memory_in_pipes",
        "takes the kernel's memory by pipes that nobody reads",
        CHILDREN
        + """
import fcntl
def fill():
    ends = []
    for _ in range(100):
        r, w = os.pipe()
        fcntl.fcntl(w, 1031, 1 << 20)
        os.set_blocking(w, False)
        while True:
            try:
                os.write(w, bytes(1 << 20))
            except BlockingIOError:
                break
        ends.append((r, w))
    return ends
got = held_by_children(8, fill)
if got == 8:
    pwned("800 MiB")
""",
        says,
    ),
    Attack(
        "memory_locked",
        "takes memory that the host cannot get back",
        """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
area = mmap.mmap(-1, 700 << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(700 << 20)) == 0:
    pwned("700 MiB")
""",
        says,
        everywhere=False,
    ),
)
