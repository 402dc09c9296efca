"""A control group, read and written through files that are already open: inside there is no path to them."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

OWN = 2
"""Processes of a place that run no code: the template and the launcher."""
SLACK_MB = 16
"""Above `memory_mb`, for pages that an interpreter shares with the zygote until it writes to them."""


@dataclass
class Group:
    """Files by name: `memory`, `swap`, `peak`, `usage`, `events`, `pids`, `cpu`, `procs…`; those that there are."""

    version: int = 0
    """1, 2, or 0 for none."""
    fds: dict[str, int] = field(default_factory=dict)
    base: int = 0
    """Bytes in use before any code ran; without a group: those of one process, shared or not."""
    ended_us: int = 0
    """CPU microseconds of processes that have ended, for where there is no group."""
    limited: tuple[int, int] | None = None

    def enter(self) -> None:
        """Move this process in; what it forks is born there."""
        for name in [name for name in self.fds if name.startswith("procs")]:
            self._write(name, 0)
            os.close(self.fds.pop(name))

    def settle(self) -> None:
        """What is in use now is the place's own, not the code's."""
        self.base = self._number("usage") or 0
        if self.version == 0:
            with open("/proc/self/statm") as f:
                words = f.read().split()
            self.base = (int(words[1]) - int(words[2])) * os.sysconf("SC_PAGE_SIZE")

    def limit(self, memory_mb: int, processes: int) -> None:
        """Hold what runs here to this much over all its processes. Raises `OSError` if it cannot be."""
        if self.limited != (memory_mb, processes):
            most = self.base + (memory_mb + SLACK_MB) * 2**20
            if self.version == 1:  # memory and memory + swap: neither may ever pass the other
                with contextlib.suppress(OSError):
                    self._write("swap", most)
            self._write("memory", most)
            self._write("swap", most if self.version == 1 else 0)
            self._write("pids", processes + OWN)
            self.limited = (memory_mb, processes)
        with contextlib.suppress(OSError):  # v2 before Linux 6.12 keeps its peak
            self._write("peak", 0)

    def cpu_s(self) -> float | None:
        """CPU seconds of all processes so far; from /proc where there is no group."""
        if self.version == 0:
            running = _proc_cpu_s()
            return None if running is None else running + self.ended_us / 1e6
        if self.version == 1:
            value = self._number("cpu")
            return None if value is None else value / 1e9
        value = self._field("cpu", b"usage_usec")
        return None if value is None else value / 1e6

    def kills(self) -> int:
        """Processes that were killed for memory so far."""
        return self._field("events", b"oom_kill") or 0

    def peak_mb(self) -> float | None:
        value = self._number("peak")
        return None if value is None else max(0, value - self.base) / 2**20

    def excess(self, memory_mb: int, processes: int, home: str) -> str:
        """What is over its limit now, `memory` or `processes`: a watch, where the kernel does not hold them itself."""
        memory = None if "memory" in self.fds else memory_mb
        count = None if "pids" in self.fds else processes
        if memory is None and count is None:
            return ""
        own, shared, found, threads = 0, 0, 0, 0
        for name in os.listdir("/proc"):
            if name.isdigit() and name != "1":
                with contextlib.suppress(OSError, KeyError):
                    fields = _fields(f"/proc/{name}/status")
                    own += fields["RssAnon"]
                    shared += fields["RssShmem"]
                    threads += fields["Threads"]
                    found += 1
        disk = os.statvfs(home)
        used = own + (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        room = found * self.base + (memory or 0) * 2**20 - used
        if memory is not None and (room < 0 or (shared > room and _shared_once() > room)):
            return "memory"
        return "processes" if count is not None and threads > count else ""

    def _read(self, name: str) -> bytes:
        return os.pread(self.fds[name], 4096, 0) if name in self.fds else b""

    def _number(self, name: str) -> int | None:
        try:
            return int(self._read(name))
        except (OSError, ValueError):
            return None

    def _field(self, name: str, key: bytes) -> int | None:
        for line in self._read(name).splitlines():
            words = line.split()
            if len(words) == 2 and words[0] == key:
                return int(words[1])
        return None

    def _write(self, name: str, value: int) -> None:
        if name in self.fds:
            os.pwrite(self.fds[name], str(value).encode(), 0)


def _fields(path: str) -> dict[str, int]:
    """The numbers in a file of lines such as `Threads: 3` or `RssAnon: 12 kB`; kB in bytes."""
    found = {}
    with open(path) as f:
        for line in f:
            name, _, value = line.partition(":")
            words = value.split()
            if words and words[0].isdigit():
                found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def _shared_once() -> int:
    """Bytes of shared memory that processes have mapped, each counted once: slow, for when their sum is suspicious."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            with contextlib.suppress(OSError):
                total += _fields(f"/proc/{name}/smaps_rollup").get("Pss_Shmem", 0)
    return total


def _proc_cpu_s() -> float | None:
    """Of all processes of this PID namespace but the first, and of those that it has reaped."""
    ticks = 0
    try:
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    with open(f"/proc/{name}/stat") as f:
                        words = f.read().rpartition(")")[2].split()
                except OSError:
                    continue
                ticks += sum(map(int, words[13:15] if name == "1" else words[11:15]))
    except OSError:
        return None
    return ticks / os.sysconf("SC_CLK_TCK")
