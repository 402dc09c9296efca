"""What an attack is, what it is judged by, and how it is carried out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.conformance.attacks.host import Host

QUEUE_S = 30.0
"""So long a run may wait for a place."""
GRACE_S = 4.0
"""A run that has not come back this long after its timeout counts as hung, and is given up."""

PRELUDE = """\
import os, sys, time, signal
def mark(name="@NONCE@"):
    try:
        with open("/proc/self/comm", "w") as f:
            f.write(name)
    except OSError:
        import ctypes
        ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
def pwned(*what):
    print("PWNED", *what, flush=True)
"""
"""What every attack may use. `mark` names a process so that the host finds it; `pwned` reports success, where the host cannot
see it for itself."""


@dataclass
class Outcome:
    """What came of an attack, as the host sees it."""

    status: str = ""
    """A `Status`; of plain `subprocess` one that means the same, `infra` if it could not make sense of what came back."""
    stdout: str = ""
    stderr: str = ""
    value: str | None = None
    error: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    queue_s: float = 0.0
    """Seconds of the call that it waited for a place."""
    seconds: float = 0.0
    """How long the call took without that wait."""
    hung: bool = False
    """The run had not come back `GRACE_S` after its timeout."""
    raised: str = ""
    """The machinery raised this, which it never should."""
    survivors: tuple[int, ...] = ()
    """Processes named by `mark` that are alive after the place was closed."""
    usable: bool = True
    """A place that is still open afterwards answers a run as it should."""

    @property
    def text(self) -> str:
        """Everything that came back, in one."""
        files = "".join(data[: 1 << 20].decode(errors="replace") for data in self.files.values())
        return self.stdout + self.stderr + (self.value or "") + files


Judge = Callable[[Outcome, Host], str | None]
"""What the attack achieved, or `None` if it was stopped."""


class Place(Protocol):
    """Where code runs: a session, or what runs code without one."""

    async def run(
        self, code: str, *, timeout: float, fetch: tuple[str, ...] = (), files: Mapping[str, str] | None = None
    ) -> Outcome: ...

    async def put(self, path: str, data: str) -> None: ...

    async def get(self, path: str) -> bytes: ...


class Target(Protocol):
    """What is attacked."""

    name: str

    def place(self, limits: Mapping[str, Any], *, lasting: bool) -> AbstractAsyncContextManager[Place]:
        """A place for the attack; `lasting`: its files and processes may stay until it is closed, as a session's do."""


Step = Callable[[Place, Host, Outcome], Awaitable[None]]


@dataclass(frozen=True)
class Attack:
    name: str
    harm: str
    """What happens if it succeeds."""
    code: str
    """`PRELUDE` comes before it; `@NAME@` stands for `Host.facts`."""
    judge: Judge
    timeout: float = 10.0
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Where the default ones would take long to run into."""
    fetch: tuple[str, ...] = ()
    earlier: str = ""
    """Runs before, in a place of its own that is gone by then."""
    neighbour: str = ""
    """Runs at the same time in another place of the same target."""
    then: Step | None = None
    """What the host does in the place afterwards; needs a lasting one."""
    lasting: bool = False
    """Also tried in a session, which must be usable afterwards."""
    layer: str = ""
    """The part of a `Layer`'s name without which a kind may let it through (`bubblewrap` only)."""
    everywhere: bool = True
    """Succeeds against plain `subprocess` on any Linux as root. Off: the kernel must have what it attacks."""


# --- judges


def says(outcome: Outcome, host: Host) -> str | None:
    """The attack reports that it got there: for what leaves no trace on the host."""
    lines = [line for line in outcome.stdout.splitlines() if line.startswith("PWNED")]
    return lines[0][:200] if lines else None


def leaks(outcome: Outcome, host: Host) -> str | None:
    """A secret of the host came back."""
    for what, secret in host.secrets.items():
        if secret in outcome.text:
            return f"read {what}"
    return None


def survives(outcome: Outcome, host: Host) -> str | None:
    """Processes outlive the run, or hold it up."""
    if outcome.hung:
        return "the run did not come back"
    return f"{len(outcome.survivors)} processes outlived the run" if outcome.survivors else None


def slower(seconds: float) -> Judge:
    def judge(outcome: Outcome, host: Host) -> str | None:
        return f"took {outcome.seconds:.1f} s" if outcome.hung or outcome.seconds > seconds else None

    return judge


def heard(outcome: Outcome, host: Host) -> str | None:
    """Something of it arrived at the host's own sockets."""
    return f"reached the host by {', '.join(sorted(host.heard))}" if host.heard else None


def victim_hurt(outcome: Outcome, host: Host) -> str | None:
    return host.victim_hurt()


def written(outcome: Outcome, host: Host) -> str | None:
    paths = host.written()
    return f"wrote {', '.join(map(str, paths))}" if paths else None


def broken(outcome: Outcome, host: Host) -> str | None:
    """The machinery takes what the code did for its own failure, raises, hangs, or is of no use afterwards."""
    if outcome.raised:
        return f"raised {outcome.raised}"
    if outcome.status == "infra":
        return f"passed for a failure of the machinery: {outcome.error}"
    if outcome.hung:
        return "the run did not come back"
    return None if outcome.usable else "the place was of no use afterwards"


def either(*judges: Judge) -> Judge:
    def judge(outcome: Outcome, host: Host) -> str | None:
        return next((found for one in judges if (found := one(outcome, host))), None)

    return judge


# --- carrying out


async def carry_out(target: Target, attack: Attack, host: Host, *, lasting: bool = False) -> tuple[str | None, Outcome]:
    """What the attack achieved, and what came back. Nothing of the attack is left on this machine afterwards."""
    lasting = lasting or attack.then is not None
    try:
        if attack.earlier:
            async with target.place(attack.limits, lasting=lasting) as place:
                await place.run(host.fill(PRELUDE + attack.earlier), timeout=attack.timeout)
        async with contextlib.AsyncExitStack() as stack:
            if attack.neighbour:
                neighbour = await stack.enter_async_context(target.place({}, lasting=True))
                running = asyncio.create_task(neighbour.run(host.fill(PRELUDE + attack.neighbour), timeout=30.0))
                stack.push_async_callback(ended, running)
                await until(lambda: bool(host.alive(host.neighbour)), 10.0)
            async with target.place(attack.limits, lasting=lasting) as place:
                outcome = await bounded(place, attack, host)
                if attack.then is not None and not outcome.hung:
                    await attack.then(place, host, outcome)
                if lasting and not outcome.hung and not outcome.raised:
                    after = await place.run("print(40 + 2)", timeout=10.0)
                    outcome.usable = after.stdout == "42\n"
            await until(lambda: not survivors(host), 1.0)
            outcome.survivors = survivors(host)
            achieved = attack.judge(outcome, host)
        return achieved, outcome
    finally:
        host.sweep()


def survivors(host: Host) -> tuple[int, ...]:
    """Processes of the attack; looked for several times, since one that forks and ends again and again may slip through."""
    return next((found for _ in range(4) if (found := host.alive(host.nonce))), ())


async def bounded(place: Place, attack: Attack, host: Host) -> Outcome:
    began = time.perf_counter()
    try:
        async with asyncio.timeout(attack.timeout + 2 * GRACE_S + QUEUE_S):
            outcome = await place.run(host.fill(PRELUDE + attack.code), timeout=attack.timeout, fetch=attack.fetch)
    except TimeoutError:
        outcome = Outcome(hung=True)
    except Exception as error:
        outcome = Outcome(raised=repr(error))
    outcome.seconds = time.perf_counter() - began - outcome.queue_s
    outcome.hung = outcome.hung or outcome.seconds > attack.timeout + GRACE_S
    return outcome


async def ended(task: asyncio.Task[Outcome]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


async def until(condition: Callable[[], bool], seconds: float) -> None:
    """Returns when the condition holds, or after some seconds."""
    end = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < end:  # noqa: ASYNC110 - the condition is the kernel's
        await asyncio.sleep(0.02)


def kill(pids: tuple[int, ...]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes() -> list[Path]:
    return [path for path in Path("/proc").iterdir() if path.name.isdigit()]
