"""The host that attacks are aimed at: secrets, sockets, a process to hurt, folders to write to. All is gone afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

ENV_SECRET = "env" + secrets.token_hex(12)
os.environ["AGENTLOOP_TEST_API_KEY"] = ENV_SECRET  # before any sandbox is started

VICTIM = """
import sys, time
secret = sys.stdin.readline().strip()
held = ["MEMORY:" + secret for _ in range(2000)]
handle = open(sys.argv[1])
print("ready", flush=True)
time.sleep(300)
"""
"""Its secrets: `argv` and environment, what its memory holds, and an open file that is deleted."""


class Host:
    """One for each attack on each target."""

    def __init__(self) -> None:
        self.nonce = "at" + secrets.token_hex(5)
        """Names processes and files of the attack: in its code."""
        self.neighbour = "nb" + secrets.token_hex(5)
        """Names the neighbour's process."""
        token = secrets.token_hex(8)
        self.secrets = {
            "a file": f"file-{token}",
            "another process's arguments": f"argv-{token}",
            "another process's environment": f"environ-{token}",
            "another process's memory": f"memory-{token}",
            "another process's open file": f"handle-{token}",
            "the neighbour's files": f"neighbour-{token}",
            "what an earlier run left": f"earlier-{token}",
            "the environment": ENV_SECRET,
        }
        with contextlib.suppress(OSError):
            self.secrets["/etc/shadow"] = Path("/etc/shadow").read_text().splitlines()[0]
        self.heard: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="agentloop-attack-"))
        self.folder.chmod(0o755)
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        (self.folder / "secret").write_text(self.secrets["a file"])
        (self.folder / "open").mkdir()
        (self.folder / "open").chmod(0o777)
        self.secret_files = [self.folder / "secret"]
        places = ("/tmp", "/var/tmp", "/dev/shm", str(Path.home()), "/run", "/srv")
        self.places = [folder for folder in map(Path, places) if os.access(folder, os.W_OK)]
        for place in self.places:
            path = place / f"secret-{self.nonce}"
            path.write_text(self.secrets["a file"])
            path.chmod(0o644)
            self._stack.callback(path.unlink, missing_ok=True)
            self.secret_files.append(path)
        outside = [self.folder / "open", *self.places, Path(sysconfig.get_paths()["purelib"]), Path("/etc"), Path("/")]
        self.outside = [folder / f"written-{self.nonce}" for folder in outside]
        self._listen()
        self._start_victim()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _listen(self) -> None:
        unix = self.folder / "open" / "socket"
        self.abstract = f"agentloop-{self.nonce}"
        listeners = {
            "TCP": (socket.AF_INET, socket.SOCK_STREAM, ("0.0.0.0", 0)),
            "UDP": (socket.AF_INET, socket.SOCK_DGRAM, ("0.0.0.0", 0)),
            "unix socket": (socket.AF_UNIX, socket.SOCK_STREAM, str(unix)),
            "abstract socket": (socket.AF_UNIX, socket.SOCK_STREAM, "\0" + self.abstract),
        }
        selector = selectors.DefaultSelector()
        self.ports: dict[str, int] = {}
        for name, (family, kind, address) in listeners.items():
            listener = self._stack.enter_context(socket.socket(family, kind))
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen(16)
            if family == socket.AF_INET:
                self.ports[name] = listener.getsockname()[1]
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ, (name, kind == socket.SOCK_STREAM))
        unix.chmod(0o777)
        self.unix = unix
        over = threading.Event()
        thread = threading.Thread(target=self._serve, args=(selector, over), daemon=True)
        thread.start()
        self._stack.callback(selector.close)
        self._stack.callback(thread.join)
        self._stack.callback(over.set)

    def _serve(self, selector: selectors.BaseSelector, over: threading.Event) -> None:
        while not over.is_set():
            for key, _ in selector.select(0.05):
                name, stream = key.data
                with contextlib.suppress(OSError):
                    if stream:
                        connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
                        connection.close()
                        self.heard.add(name)
                    else:
                        data = key.fileobj.recv(4096)  # type: ignore[union-attr]
                        if self.nonce.encode() in data:
                            self.heard.add(name)

    def _start_victim(self) -> None:
        handle = self.folder / "handle"
        handle.write_text(self.secrets["another process's open file"])
        victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", VICTIM, str(handle), self.secrets["another process's arguments"]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "TOKEN": self.secrets["another process's environment"]},
            text=True,
        )
        self.victim = victim
        self._stack.callback(self._end_victim)
        assert victim.stdin is not None and victim.stdout is not None
        victim.stdin.write(self.secrets["another process's memory"] + "\n")
        victim.stdin.close()
        assert victim.stdout.readline() == "ready\n"
        handle.unlink()
        self._limits = Path(f"/proc/{victim.pid}/limits").read_text()

    def _end_victim(self) -> None:
        self.victim.kill()
        self.victim.wait()
        assert self.victim.stdout is not None
        self.victim.stdout.close()

    def victim_hurt(self) -> str | None:
        if self.victim.poll() is not None:
            return "killed a process of the host"
        if Path(f"/proc/{self.victim.pid}/limits").read_text() != self._limits:
            return "changed the limits of a process of the host"
        if os.getpriority(os.PRIO_PROCESS, self.victim.pid) != os.getpriority(os.PRIO_PROCESS, 0):
            return "changed the priority of a process of the host"
        return None

    def written(self) -> list[Path]:
        """What there is outside of the working folder that the attack wrote."""
        return [path for path in self.outside if path.exists()]

    def alive(self, name: str) -> tuple[int, ...]:
        """Processes that `mark` gave this name; those that have ended and wait to be collected are none."""
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                with contextlib.suppress(OSError):
                    if (path / "comm").read_text() == name + "\n" and ") Z" not in (path / "stat").read_text():
                        found.append(int(path.name))
        return tuple(found)

    @property
    def ipc_key(self) -> int:
        return int(self.nonce[2:9], 16)

    def shared_segments(self) -> int:
        """How many System V shared memory segments with the attack's key the host has."""
        lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        return sum(int(line.split()[0]) == self.ipc_key for line in lines)

    def fill(self, code: str) -> str:
        """The code with what it needs to know of this host."""
        addresses = ["127.0.0.1", "::1"]
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect(("192.0.2.1", 9))  # sends nothing
            addresses.append(route.getsockname()[0])
        facts = {
            "NONCE": self.nonce,
            "NEIGHBOUR": self.neighbour,
            "NEIGHBOUR_SECRET": self.secrets["the neighbour's files"],
            "EARLIER_SECRET": self.secrets["what an earlier run left"],
            "VICTIM": str(self.victim.pid),
            "TCP": str(self.ports["TCP"]),
            "UDP": str(self.ports["UDP"]),
            "ADDRESSES": repr(addresses),
            "UNIX": str(self.unix),
            "ABSTRACT": self.abstract,
            "FOLDER": str(self.folder),
            "SECRET_FILES": repr([str(path) for path in self.secret_files]),
            "OUTSIDE": repr([str(path) for path in self.outside]),
            "KEY": str(self.ipc_key),
        }
        for name, value in facts.items():
            code = code.replace(f"@{name}@", value)
        return code

    def sweep(self) -> None:
        """End and remove what the attack left on this machine."""
        for _ in range(100):
            found = (*self.alive(self.nonce), *self.alive(self.neighbour))
            if not found:
                break
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for path in self.written():
            path.unlink()
        for place in self.places:
            for path in place.glob(f"*{self.nonce}.left"):
                path.unlink()
        for group in Path("/sys/fs/cgroup").glob(f"*/{self.nonce}"):
            group.rmdir()
        libc = ctypes.CDLL(None)
        segment = libc.shmget(self.ipc_key, 0, 0)
        if segment >= 0:
            libc.shmctl(segment, 0, None)
