"""What a sandbox is: where code runs that nobody has read.

    async with load_sandbox("process") as sandbox:
        once = await sandbox.run("print(6 * 7)")
        async with sandbox.session(Limits(timeout_s=5.0)) as session:
            await session.run("x = 6")
            result = await session.run("x * 7")     # result.value == "42"

A run always ends with a `Result`, whatever the code does. What the code did wrong and what the machinery did wrong are told
apart: `Status.INFRA` is never the code's doing, and nothing else is ever the machinery's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import ClassVar, Self

from pydantic import Field

from agentloop.config import Strict
from agentloop.errors import ToolInfraError


class SandboxError(ToolInfraError):
    """The sandbox itself failed or cannot start; the message says what to do about it."""


LOST_BEFORE = "the session's variables and files are gone, with a run that was cancelled"
"""The `Result.error` of a run that went well itself."""


def lost_before(error: str) -> str:
    """The `error` of a run before which everything was lost."""
    return f"{error}; {LOST_BEFORE}" if error else LOST_BEFORE


class Status(StrEnum):
    """How a run ended. The first that applies, from the top, where several do."""

    INFRA = "infra"
    """The machinery failed; nothing is known of the code. Never a reward of 0."""
    TIMEOUT = "timeout"
    """Its wall-clock or CPU time ran out and it was killed."""
    OOM = "oom"
    """It asked for more memory than it may have: killed for it, or ended by the `MemoryError` that it got."""
    OUTPUT_LIMIT = "output_limit"
    """It wrote more than `Limits.output_bytes` to stdout or stderr. What was kept is in the result; the run was killed."""
    ERROR = "error"
    """It raised, exited with a status other than 0, or died by a signal of its own making."""
    OK = "ok"


class Limits(Strict):
    """What one session, or one stateless run, may use. A sandbox holds each of them or refuses to start."""

    timeout_s: float = Field(10.0, gt=0, le=3600)
    """Wall-clock seconds of one run, from the moment it starts in the sandbox (waiting for a place is not in it)."""
    cpu_s: float | None = Field(None, gt=0)
    """CPU seconds of one run, over all its processes; `None`: as many as `timeout_s`."""
    memory_mb: int = Field(512, ge=16)
    """MiB over all processes of the session together, files in memory included."""
    processes: int = Field(32, ge=1)
    """Processes and threads of the session together."""
    output_bytes: int = Field(64 * 1024, ge=0)
    """Kept of stdout, and as much of stderr, of one run."""
    value_bytes: int = Field(16 * 1024, ge=0)
    """Kept of the last expression's value."""
    disk_mb: int = Field(64, ge=1)
    """MiB of files in the working folder and `/tmp` together."""
    files: int = Field(4096, ge=16)
    """Files and folders (inodes) there."""
    open_files: int = Field(256, ge=16)
    """Open files of one process."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one run."""

    status: Status
    stdout: str = ""
    """At most `Limits.output_bytes` of it, decoded as UTF-8 with replacement characters; its beginning and end if cut."""
    stderr: str = ""
    value: str | None = None
    """`repr` of the last expression, as a notebook would show it; `None` if the code did not end with one or it is `None`."""
    exit_code: int | None = None
    """0 to 255 as the process left, negative: the signal that ended it; `None` if it was not allowed to end, and for a run
    of a session whose interpreter lives on without an error (0 in `OK`)."""
    error: str = ""
    """One sentence for whoever reads the result: which limit was hit, which machinery failed. Empty if `OK`, unless it is
    `LOST_BEFORE`; other errors may end with that."""
    stdout_cut: int = 0
    """Bytes of stdout that were written and not kept, as far as was read."""
    stderr_cut: int = 0
    value_cut: int = 0
    state_lost: bool = False
    """The session's interpreter had to be killed: its variables are gone (its files are not, unless `error` says so) and the
    next run begins in a fresh one. Of a run that was cancelled, which has no result, the next one's tells it."""
    queue_s: float = 0.0
    """Seconds waiting for a place."""
    run_s: float = 0.0
    """Wall-clock seconds from the start of the run to its end."""
    cpu_s: float | None = None
    """CPU seconds of the run, over all its processes, where the kind can tell."""
    peak_memory_mb: float | None = None
    """Highest memory use of the session so far, over all its processes, where the kind can tell."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The files that `fetch` named and that were there."""

    @property
    def ok(self) -> bool:
        return self.status is Status.OK


@dataclass(frozen=True, slots=True)
class Layer:
    """One line of defence, as found at start."""

    name: str
    """`network namespace`, `seccomp`, `cgroup memory`, …"""
    active: bool
    stops: str
    """What it is there for, in a few words: «fork bombs», «reading the host's files»."""
    detail: str = ""
    """Why it is not active, or how it is held («cgroup v1»)."""


class Session(ABC):
    """A place of its own for one trajectory: a working folder, and an interpreter that keeps its variables between runs.

    Runs of one session are one after the other (a second waits for the first). `async with` opens and closes it; `close`
    ends every process and removes every file that it made, also when a run is under way or the caller is cancelled.
    """

    @abstractmethod
    async def open(self) -> None:
        """Take a place, waiting for one if all are taken. Raises `SandboxError` if there is none to be had."""

    @abstractmethod
    async def run(
        self,
        code: str,
        *,
        language: str = "python",
        stdin: str = "",
        files: Mapping[str, str | bytes] | None = None,
        fetch: Sequence[str] = (),
        timeout: float | None = None,
    ) -> Result:
        """Run `code` and say how it ended; never raises for anything that the code or the machinery did.

        `python` runs in the session's interpreter and keeps its variables; any other language is a process of its own in the
        same working folder. `files` are written first, as by `put`; `fetch` are read afterwards, as by `get`, and missing or
        unfit ones left out. `timeout` replaces `Limits.timeout_s` and cannot exceed it. Cancelling kills the run. Raises
        `ValueError` for an unknown language and for paths that leave the working folder.
        """

    @abstractmethod
    async def put(self, path: str, data: str | bytes) -> None:
        """Write a file in the working folder, with its folders. `path` is relative to it. Raises `ValueError` for a path that
        leaves it, `IsADirectoryError`, `OSError` if the disk limit is reached, `SandboxError`."""

    @abstractmethod
    async def get(self, path: str, *, max_bytes: int = 16 * 2**20) -> bytes:
        """Read a regular file of the working folder. No symbolic link is followed anywhere in `path`. Raises `ValueError`
        for a path that leaves the folder or a file larger than `max_bytes`, `FileNotFoundError`, `IsADirectoryError`,
        `PermissionError` for what is no regular file, `SandboxError`."""

    @abstractmethod
    async def close(self) -> None:
        """End everything that the session holds; safe to call twice. Never raises: what cannot be cleaned up is logged."""

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Sandbox(ABC):
    """Makes sessions, and runs code without one. One object serves a whole process; `async with` starts and closes it.

    How many runs and sessions there may be at once is the kind's configuration, which also says its scope: the process, the
    node (all processes of one user on one machine share one pool), or the cluster.
    """

    kind: ClassVar[str]
    languages: tuple[str, ...] = ("python",)

    @abstractmethod
    async def start(self) -> None:
        """Make ready: check the layers of defence, warm the pool. Raises `SandboxError` if a required layer is missing, with
        what to install or to configure. Called by `async with`, and by the first use otherwise; safe to call twice."""

    @abstractmethod
    def session(self, limits: Limits | None = None) -> Session:
        """A session, not opened yet. Without `limits` the sandbox's own."""

    @abstractmethod
    async def run(
        self,
        code: str,
        *,
        language: str = "python",
        stdin: str = "",
        files: Mapping[str, str | bytes] | None = None,
        fetch: Sequence[str] = (),
        timeout: float | None = None,
        limits: Limits | None = None,
        begun: Callable[[], None] | None = None,
    ) -> Result:
        """Run `code` in a place of its own that is gone afterwards. Otherwise as `Session.run`. `begun` is called when the
        wait for that place is over, as far as this side can tell."""

    @abstractmethod
    async def layers(self) -> list[Layer]:
        """The lines of defence of this kind on this machine, each as a probe found it. Starts nothing that lasts."""

    @abstractmethod
    async def close(self) -> None:
        """End every session and everything that the sandbox holds; safe to call twice."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
