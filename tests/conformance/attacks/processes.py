"""Too many processes, processes that do not end, other processes seen, hurt and read."""

from __future__ import annotations

from tests.conformance.attacks.base import Attack, either, leaks, says, slower, survives, victim_hurt

DAEMON = """
def daemon(body, keep=False):
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    mark()
    if not keep:
        null = os.open("/dev/null", os.O_RDWR) if os.path.exists("/dev/null") else -1
        for fd in range(64):
            try:
                os.dup2(null, fd) if null >= 0 and fd < 3 else os.close(fd)
            except OSError:
                pass
    try:
        body()
    finally:
        os._exit(0)
"""

ATTACKS = (
    Attack(
        "fork_bomb",
        "fills the host's process table",
        """
made = 0
try:
    for made in range(400):
        if os.fork() == 0:
            mark()
            os.closerange(0, 64)
            time.sleep(20)
            os._exit(0)
    pwned("400 processes")
except OSError as error:
    print("stopped at", made, error)
os._exit(0)
""",
        either(says, survives),
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "thread_bomb",
        "takes the host's threads",
        """
import threading
threading.stack_size(65536)
over = threading.Event()
def wait():
    over.wait()
made = 0
try:
    for made in range(1000):
        threading.Thread(target=wait, daemon=True).start()
    pwned("1000 threads")
except RuntimeError as error:
    print("stopped at", made, error)
over.set()
""",
        says,
        timeout=8.0,
        lasting=True,
        layer="cgroup pids",  # a count 20 times a second may see a thousand threads only after the last of them
    ),
    Attack(
        "fork_tree",
        "doubles its processes until the host has none left",
        """
r, w = os.pipe()
mark()
try:
    for _ in range(9):
        if os.fork() == 0:
            mark()
except OSError:
    os._exit(0)
os.write(w, b"x")
time.sleep(2)
os.set_blocking(r, False)
got = 0
try:
    while True:
        data = os.read(r, 65536)
        got += len(data)
        if not data:
            break
except OSError:
    pass
if got >= 400:
    pwned(got, "processes")
""",
        says,
        timeout=8.0,
    ),
    Attack(
        "double_forked_daemon",
        "works on after its run",
        DAEMON + "daemon(lambda: time.sleep(30))\n",
        survives,
        timeout=5.0,
        lasting=True,
    ),
    Attack(
        "daemon_holds_the_pipe",
        "holds up whoever reads its output",
        DAEMON + "daemon(lambda: time.sleep(9), keep=True)\nprint('done')\n",
        either(slower(7.0), survives),
        timeout=15.0,
        lasting=True,
    ),
    Attack(
        "daemon_ignores_signals",
        "works on after its run, whatever it is asked to do",
        DAEMON
        + """
def stay():
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    end = time.time() + 30
    while time.time() < end:
        try:
            time.sleep(1)
        except BaseException:
            pass
daemon(stay)
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True:
    time.sleep(1)
""",
        survives,
        timeout=1.5,
        lasting=True,
    ),
    Attack(
        "hydra",
        "is a new process before anyone has read the number of the old one",
        DAEMON
        + """
def run():
    for _ in range(200):
        if os.fork():
            os._exit(0)
        os.setsid()
        time.sleep(0.03)
daemon(run)
""",
        survives,
        timeout=4.0,
        lasting=True,
    ),
    Attack(
        "cpu_after_timeout",
        "burns the host's CPU after it was ended",
        DAEMON
        + """
def burn():
    end = time.time() + 20
    while time.time() < end:
        pass
for _ in range(3):
    daemon(burn)
burn()
""",
        survives,
        timeout=1.5,
        lasting=True,
    ),
    Attack(
        "cpu_in_many_processes",
        "gets more CPU time than it may by sharing the work out",
        """
def burn():
    mark()
    while time.process_time() < 0.7:
        pass
    os._exit(0)
for _ in range(3):
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            burn()
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit("a child was stopped")
pwned("8.4 s of CPU time")
""",
        either(says, slower(15.0)),  # no process reaches the limit by itself
        timeout=20.0,
        limits={"cpu_s": 1.0},
    ),
    Attack(
        "cpu_in_children_one_by_one",
        "gets more CPU time than it may: no single process uses much",
        """
for _ in range(10):
    child = os.fork()
    if child == 0:
        mark()
        while time.process_time() < 0.4:
            pass
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit("a child was stopped")
pwned("4 s of CPU time")
""",
        either(says, slower(15.0)),
        timeout=20.0,
        limits={"cpu_s": 1.0},
    ),
    Attack(
        "stopped_child",
        "leaves a stopped process that no polite signal ends",
        DAEMON + "daemon(lambda: (os.kill(os.getpid(), signal.SIGSTOP), time.sleep(30)))\ntime.sleep(0.3)\n",
        survives,
        timeout=5.0,
    ),
    Attack(
        "sees_processes",
        "reads the arguments of other processes",
        """
import glob
for path in glob.glob("/proc/[0-9]*/cmdline"):
    try:
        print(open(path, "rb").read())
    except OSError:
        pass
""",
        leaks,
    ),
    Attack(
        "reads_environments",
        "reads the environment of other processes",
        """
import glob
for path in glob.glob("/proc/[0-9]*/environ"):
    if path.split("/")[2] == str(os.getpid()):
        continue
    try:
        print(open(path, "rb").read())
    except OSError:
        pass
""",
        leaks,
        limits={"output_bytes": 1 << 20},
    ),
    Attack(
        "reads_its_parents",
        "reads the API keys of the process that started it",
        """
def search(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            if line.endswith(("[heap]\\n", "[stack]\\n")):
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                for at in range(begin, end, 1 << 24):
                    memory.seek(at)
                    data = memory.read(min(1 << 24, end - at))
                    for part in data.split(b"AGENTLOOP_TEST_API_KEY=")[1:]:
                        print(part[:40])
pid = os.getppid()
for _ in range(5):
    try:
        print(open(f"/proc/{pid}/environ", "rb").read())
        search(pid)
        pid = int(open(f"/proc/{pid}/status").read().split("PPid:")[1].split()[0])
    except (OSError, IndexError):
        break
""",
        leaks,
        limits={"output_bytes": 1 << 20},
    ),
    Attack("reads_its_environment", "reads the API keys that it was started with", "print(dict(os.environ))\n", leaks),
    Attack(
        "kills_a_process",
        "ends processes of the host",
        """
for number in (signal.SIGTERM, signal.SIGKILL):
    try:
        os.kill(@VICTIM@, number)
    except OSError as error:
        print(error)
time.sleep(0.2)
""",
        victim_hurt,
    ),
    Attack(
        "kills_by_pidfd",
        "ends processes of the host",
        """
try:
    signal.pidfd_send_signal(os.pidfd_open(@VICTIM@), signal.SIGKILL)
except OSError as error:
    print(error)
time.sleep(0.2)
""",
        victim_hurt,
    ),
    Attack(
        "ptraces_a_process",
        "takes over processes of the host",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
print(libc.ptrace(16, @VICTIM@, None, None), ctypes.get_errno())
time.sleep(0.2)
print(libc.ptrace(8, @VICTIM@, None, None), ctypes.get_errno())
time.sleep(0.2)
""",
        victim_hurt,
    ),
    Attack(
        "reads_memory",
        "reads the memory of processes of the host",
        """
try:
    memory = open("/proc/@VICTIM@/mem", "rb", 0)
    for line in open("/proc/@VICTIM@/maps"):
        area, rights = line.split()[:2]
        begin, end = (int(part, 16) for part in area.split("-"))
        if rights.startswith("rw") and end - begin < 1 << 25:
            try:
                memory.seek(begin)
                data = memory.read(end - begin)
            except OSError:
                continue
            if b"MEMORY:" in data:
                for part in data.split(b"MEMORY:")[1:]:
                    print(part[:40])
except OSError as error:
    print(error)
""",
        leaks,
        limits={"output_bytes": 1 << 20},
    ),
    Attack(
        "reads_memory_by_vm_readv",
        "reads the memory of processes of the host",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
try:
    maps = open("/proc/@VICTIM@/maps").read().splitlines()
except OSError as error:
    maps = []
for line in maps:
    area, rights = line.split()[:2]
    begin, end = (int(part, 16) for part in area.split("-"))
    if rights.startswith("rw") and end - begin < 1 << 25:
        buffer = ctypes.create_string_buffer(end - begin)
        local = Vector(ctypes.addressof(buffer), end - begin)
        far = Vector(begin, end - begin)
        libc.process_vm_readv(@VICTIM@, ctypes.byref(local), 1, ctypes.byref(far), 1, 0)
        for part in buffer.raw.split(b"MEMORY:")[1:]:
            print(part[:40])
""",
        leaks,
        limits={"output_bytes": 1 << 20},
    ),
    Attack(
        "takes_an_open_file",
        "takes open files and sockets out of processes of the host",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
try:
    pidfd = os.pidfd_open(@VICTIM@)
    for fd in range(3, 10):
        mine = libc.syscall(438, pidfd, fd, 0)
        if mine >= 0:
            print(os.pread(mine, 1000, 0))
except OSError as error:
    print(error)
for fd in range(3, 10):
    try:
        print(open(f"/proc/@VICTIM@/fd/{fd}").read())
    except OSError as error:
        print(error)
""",
        leaks,
    ),
    Attack(
        "changes_limits",
        "takes limits from processes of the host",
        """
import resource
for name in ("RLIMIT_NOFILE", "RLIMIT_CPU"):
    try:
        resource.prlimit(@VICTIM@, getattr(resource, name), (77, 77))
    except (OSError, ValueError) as error:
        print(error)
""",
        victim_hurt,
    ),
    Attack(
        "changes_priority",
        "starves processes of the host",
        "try:\n    os.setpriority(os.PRIO_PROCESS, @VICTIM@, 19)\nexcept OSError as error:\n    print(error)\n",
        victim_hurt,
    ),
    Attack(
        "real_time_priority",
        "runs before everything else on the host",
        """
for act in (
    lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    lambda: os.setpriority(os.PRIO_PROCESS, 0, -15),
):
    try:
        act()
        pwned()
    except OSError as error:
        print(error)
""",
        says,
    ),
    Attack(
        "sees_its_neighbour",
        "reads what another sandbox is at",
        """
import glob
name = "@NONCE@.left"
for pattern in ("/tmp/", "/dev/shm/", "/var/tmp/", "../*/", "/proc/*/cwd/", "/proc/*/root/tmp/", "/proc/*/root/dev/shm/"):
    for path in glob.glob(pattern + name):
        try:
            print(open(path).read())
        except OSError:
            pass
""",
        leaks,
        neighbour="""
for folder in ("", "/tmp/", "/dev/shm/", "/var/tmp/"):
    try:
        with open(folder + "@NONCE@.left", "w") as f:
            f.write("@NEIGHBOUR_SECRET@")
        os.chmod(folder + "@NONCE@.left", 0o644)
    except OSError:
        pass
mark("@NEIGHBOUR@")
time.sleep(20)
""",
    ),
    Attack(
        "kills_its_neighbour",
        "ends another sandbox's processes",
        """
import glob
for path in glob.glob("/proc/[0-9]*/comm"):
    try:
        if open(path).read() == "@NEIGHBOUR@\\n":
            os.kill(int(path.split("/")[2]), signal.SIGKILL)
    except OSError:
        pass
time.sleep(0.3)
""",
        lambda outcome, host: None if host.alive(host.neighbour) else "the neighbour is gone",
        neighbour='mark("@NEIGHBOUR@")\ntime.sleep(20)\n',
    ),
    Attack(
        "reads_what_was_left",
        "reads what an earlier run left",
        """
import glob
for pattern in ("/tmp/", "/dev/shm/", "/var/tmp/", "./", "../*/"):
    for path in glob.glob(pattern + "@NONCE@.left"):
        print(open(path).read())
""",
        leaks,
        earlier="""
for folder in ("", "/tmp/", "/dev/shm/", "/var/tmp/"):
    try:
        with open(folder + "@NONCE@.left", "w") as f:
            f.write("@EARLIER_SECRET@")
    except OSError:
        pass
""",
    ),
)
