"""The sandboxes that the suites of `test_sandboxes*.py` put to the test. A kind joins with one entry in `KINDS`."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

from agentloop.sandboxes.base import Limits, Result, Sandbox, Session
from agentloop.sandboxes.load import load_sandbox
from tests.conformance.attacks.base import Outcome

T = TypeVar("T")


class Ahead(Generic[T]):
    """Does what tests will ask for, in their order, some of it ahead of them: most of their time is waiting.

    `names` are what will be asked for, at most `several` of them are under way at once.
    """

    def __init__(self, names: Sequence[str], act: Callable[[str], Coroutine[Any, Any, T]], several: int) -> None:
        self._names, self._act, self._several = list(dict.fromkeys(names)), act, several
        self._tasks: dict[str, asyncio.Task[T]] = {}

    async def get(self, name: str) -> T:
        at = self._names.index(name)
        for following in self._names[at : at + self._several]:
            if following not in self._tasks:
                self._tasks[following] = asyncio.create_task(self._act(following))
        return await self._tasks[name]

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


def asked_for(request: pytest.FixtureRequest, argument: str, **others: Any) -> list[str]:
    """The values of a test's `argument` in this run, of those tests of the module whose other parameters are `others`."""
    found: list[str] = []
    for item in request.session.items:
        parameters: Mapping[str, Any] = (
            item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        )
        if item.path == request.path and argument in parameters and others.items() <= parameters.items():
            found.append(str(parameters[argument]))
    return found


@dataclass(frozen=True)
class Kind:
    """One sandbox under test, in its default configuration, and in what it may differ from the others."""

    start: Callable[[], AbstractAsyncContextManager[Sandbox]]
    unavailable: Callable[[], str | None] = lambda: None
    """Why it cannot be had here: the tests are skipped with this sentence."""
    sessions: int = 8
    """So many sessions may be open at once."""
    stops_all: bool = True
    """Stops every attack. Off: may let through those whose layer its probe says is missing."""


@asynccontextmanager
async def by_config(config: Mapping[str, Any]) -> AsyncIterator[Sandbox]:
    async with load_sandbox(config, where="tests/conformance/sandboxes.py") as sandbox:
        yield sandbox


def not_root() -> str | None:
    return None if os.geteuid() == 0 else "the kind 'process' needs root"


def no_bubblewrap() -> str | None:
    return None if shutil.which("bwrap") else "bubblewrap is not installed here"


@functools.cache
def no_docker() -> str | None:
    try:
        import docker

        client = docker.from_env(timeout=5)
        client.ping()
        client.images.get("agentloop-sandbox:latest")
    except ImportError:
        return "the package docker is not installed here"
    except Exception as error:  # the SDK raises requests' errors, its own, and others
        return f"no Docker engine with the image answers here (.ci/with-sandboxes starts one): {str(error)[:200]}"
    return None


MOST = Limits(timeout_s=600.0, memory_mb=2048, disk_mb=1024, files=65536, output_bytes=16 * 2**20, processes=64)
"""What the service gives at most; without being asked, clients get the usual limits."""


WITHOUT = 'umount --lazy --recursive /sys/fs/cgroup; exec setpriv --bounding-set=-all,+setfcap --inh-caps=-all "$@"'
"""Without control groups, and without any capability but the one that root needs to give itself another number in a user name
space: how whoever is not root finds most machines."""


@asynccontextmanager
async def served(kind: str = "process", *, unprivileged: bool = False) -> AsyncIterator[Sandbox]:
    """A kind behind `agentloop sandbox serve`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "sandbox.yaml")
        config.write_text(json.dumps({"kind": kind, "scope": "process", "limits": MOST.model_dump()}))  # noqa: ASYNC240
        prefix = ("unshare", "--mount", "sh", "-c", WITHOUT, "sh") if unprivileged else ()
        service = await asyncio.create_subprocess_exec(
            *prefix,
            sys.executable,
            *("-m", "agentloop.cli", "sandbox", "serve", "--config", str(config), "--port", "0", "--max-concurrency", "8"),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert service.stdout is not None
            line = (await asyncio.wait_for(service.stdout.readline(), 60)).decode()
            assert "http://" in line, f"the service did not start: {line}"
            async with by_config({"kind": "remote", "endpoints": [line.split()[-1]]}) as sandbox:
                yield sandbox
        finally:
            service.terminate()
            await asyncio.wait_for(service.wait(), 60)


KINDS: dict[str, Kind] = {
    "process": Kind(lambda: by_config({"kind": "process", "scope": "process"}), unavailable=not_root),
    "bubblewrap": Kind(
        lambda: by_config({"kind": "bubblewrap", "scope": "process"}), unavailable=no_bubblewrap, stops_all=False
    ),
    "docker": Kind(lambda: by_config({"kind": "docker", "scope": "process"}), unavailable=no_docker),
    "remote": Kind(served, unavailable=not_root),
    "bubblewrap_unprivileged": Kind(
        lambda: served("bubblewrap", unprivileged=True), unavailable=lambda: no_bubblewrap() or not_root(), stops_all=False
    ),
}


def available(name: str) -> Kind:
    """The kind; skips the test if it cannot be had here."""
    kind = KINDS[name]
    if reason := kind.unavailable():
        pytest.skip(reason)
    return kind


def outcome_of(result: Result) -> Outcome:
    return Outcome(
        status=result.status.value,
        stdout=result.stdout,
        stderr=result.stderr,
        value=result.value,
        error=result.error,
        files=dict(result.files),
    )


class SandboxPlace:
    """A session as a place for attacks; without one every run is on its own."""

    def __init__(self, sandbox: Sandbox, limits: Mapping[str, Any], session: Session | None) -> None:
        self._sandbox = sandbox
        self._limits = limits
        self._session = session

    async def run(
        self, code: str, *, timeout: float, fetch: tuple[str, ...] = (), files: Mapping[str, str] | None = None
    ) -> Outcome:
        if self._session is not None:
            return outcome_of(await self._session.run(code, timeout=timeout, fetch=fetch, files=files))
        limits = Limits(**{**self._limits, "timeout_s": timeout})
        result = await self._sandbox.run(code, limits=limits, fetch=fetch, files=files)
        return replace(outcome_of(result), queue_s=result.queue_s)  # a session's place was waited for when it was opened

    async def put(self, path: str, data: str) -> None:
        assert self._session is not None
        await self._session.put(path, data)

    async def get(self, path: str) -> bytes:
        assert self._session is not None
        return await self._session.get(path)


class SandboxTarget:
    """A sandbox as what is attacked."""

    def __init__(self, name: str, sandbox: Sandbox) -> None:
        self.name = name
        self.sandbox = sandbox

    @asynccontextmanager
    async def place(self, limits: Mapping[str, Any], *, lasting: bool) -> AsyncIterator[SandboxPlace]:
        if lasting:
            async with self.sandbox.session(Limits(**{"timeout_s": 30.0, **limits})) as session:
                yield SandboxPlace(self.sandbox, limits, session)
        else:
            yield SandboxPlace(self.sandbox, limits, None)
