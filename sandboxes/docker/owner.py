"""Who made a container: labels that tell a dead process's leftovers from a living one's containers."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path

SANDBOX = "agentloop.sandbox"
"""Label on every container of ours; its value is the run's id."""
OWNER = "agentloop.owner"


def labels() -> dict[str, str]:
    """The labels of this process's containers."""
    return {SANDBOX: _RUN, OWNER: f"{_place()}/{os.getpid()}/{_start_time(os.getpid())}"}


def is_leftover(found: Mapping[str, str]) -> bool:
    """Whether the process that made a container with these labels has certainly ended.

    Of a process on another machine or in another PID namespace nothing is known: its containers are left alone.
    """
    place, _, process = found.get(OWNER, "").partition("/")
    pid, _, started = process.partition("/")
    if SANDBOX not in found or place != _place() or not pid.isdigit():
        return False
    return _start_time(int(pid)) != started


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}.{boot}.{Path('/proc/self/ns/pid').stat().st_ino}"


def _start_time(pid: int) -> str | None:
    """Clock ticks from boot to the start of the process; `None` if there is none (a zombie counts as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


_RUN = uuid.uuid4().hex
