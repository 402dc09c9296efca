"""Tools that work in a sandbox: one session for each trajectory, which all of them share.

Tools with equal `sandbox` settings use one sandbox a process, and in one trajectory one session of it: what `file` writes,
`python` and `shell` find. The session is opened by the first call, and closed when the last of the trajectory's tools is
released.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import uuid4
from weakref import WeakKeyDictionary, WeakSet

from pydantic import Field

from agentloop.config import Strict, validate
from agentloop.errors import ConfigError, ToolInfraError
from agentloop.sandboxes.base import Limits, Result, Sandbox, SandboxError, Session, Status
from agentloop.sandboxes.load import load_sandbox
from agentloop.sandboxes.paths import inside
from agentloop.tools.attempt import settle
from agentloop.tools.base import BaseTool
from agentloop.tools.session import current_session
from agentloop.tools.threads import queueing

logger = logging.getLogger(__name__)


class Workspace:
    """The sandbox session of one trajectory."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.users = 0
        """Tools that hold it."""
        self.files: dict[str, str | bytes] = {}
        """What it begins with, by path."""
        self._session: Session | None = None
        self._opening = asyncio.Lock()
        self._used = False
        self._lost = ""
        self.notice = ""
        """What the model is to be told with the next answer."""

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """The session, opened if it is not. Raises `ToolInfraError` if there is none to be had.

        After an infrastructure failure a session in which nothing had been done is replaced by the next call. One that held
        variables or files is not: a model that finds them gone would answer for the sandbox's failure.
        """
        if self._lost:
            raise ToolInfraError(self._lost)
        try:
            async with self._opening:
                if self._session is None:
                    session = self.sandbox.session()
                    try:
                        with queueing():
                            await session.open()
                        await self._begin(session)
                    except BaseException:
                        await session.close()
                        raise
                    self._session = session
            yield self._session
        except ToolInfraError as error:
            await self._fail(str(error))
            raise
        except asyncio.CancelledError:
            if self._session is not None:
                self._used = True
                self.notice = "An earlier run was stopped before it had ended."
            raise
        self._used = True

    async def _begin(self, session: Session) -> None:
        for path, data in self.files.items():
            try:
                await session.put(path, data)
            except (OSError, ValueError) as error:  # the row's doing, and not the model's
                raise ToolInfraError(f"the file '{path}' of the row's create_kwargs cannot be written: {error}") from error

    async def run(self, code: str, language: str) -> Result:
        """As `Session.run`; raises `ToolInfraError` where that says `infra`."""
        async with self.session() as session:
            result = await session.run(code, language=language)
            if result.status is Status.INFRA:
                raise ToolInfraError(result.error or "the sandbox failed")
            return result

    def take_notice(self) -> str:
        notice, self.notice = self.notice, ""
        return notice

    async def _fail(self, error: str) -> None:
        session, self._session = self._session, None
        if self._used and session is not None:
            self._lost = f"the sandbox failed and what was done in it is lost: {error}"
        if session is not None:
            await session.close()

    async def close(self) -> None:
        self._lost = self._lost or "the sandbox session is closed"
        if self._session is not None:
            await self._session.close()


class SandboxConfig(Strict):
    """The part of a tool's `config` that all tools in a sandbox have."""

    type: str = "native"
    sandbox: str | dict[str, Any] = Field(default="process")
    """A kind, or a mapping with `kind` and that kind's settings (`docs/sandboxes.md`)."""


@dataclass(eq=False)
class _Shared:
    """A sandbox, and the tools that have used it and are not closed: of one registry, and of others with equal settings."""

    sandbox: Sandbox
    users: WeakSet[SandboxTool] = field(default_factory=WeakSet)
    _start: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Wait until it has started; one start for all who wait. Raises what `Sandbox.start` does, and tries again if that
        failed before."""
        start = self._start
        if start is None or (start.done() and (start.cancelled() or start.exception() is not None)):
            start = self._start = asyncio.create_task(self.sandbox.start())
        try:
            await asyncio.shield(start)
        except asyncio.CancelledError:
            if not start.cancelled():
                raise
            raise SandboxError("the sandbox was closed before it had started") from None

    async def close(self) -> None:
        if self._start is not None and not self._start.done():
            await settle(self._start, "the sandbox's start")
        await self.sandbox.close()


_sandboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Shared]] = WeakKeyDictionary()
_workspaces: dict[tuple[str, str], Workspace] = {}
"""By session of a registry and sandbox."""


class SandboxTool(BaseTool):
    """A tool whose calls run in the trajectory's sandbox session, one after the other."""

    Config: ClassVar[type[SandboxConfig]] = SandboxConfig
    parallel = False

    def __init__(self, config: Mapping[str, Any] | None = None, tool_schema: Any = None) -> None:
        box = (config or {}).get("sandbox", "")
        if not isinstance(box, str | Mapping):
            raise ConfigError(f"key 'config.sandbox' must be a kind, or a mapping with 'kind' and its settings, got {box!r}")
        self.settings: Any = validate(self.Config, config or {}, "config")
        super().__init__(config, tool_schema)
        sandbox = load_sandbox(self.settings.sandbox, where="key 'config.sandbox'")
        self.languages = sandbox.languages
        read: Any = sandbox.config  # type: ignore[attr-defined]
        self.limits: Limits = read.limits
        # As read, with all defaults: `process` and `{kind: process}`, 5 and 5.0 are the same.
        self._key = json.dumps({"kind": sandbox.kind, **read.model_dump(mode="json")}, sort_keys=True, default=str)
        self.lane = f"sandbox {self._key}"

    @property
    def sandbox(self) -> Sandbox:
        """The process's, for this tool's settings; each event loop has its own."""
        return self._shared().sandbox

    def _shared(self) -> _Shared:
        loops = _sandboxes.setdefault(asyncio.get_running_loop(), {})
        if self._key not in loops:
            loops[self._key] = _Shared(load_sandbox(self.settings.sandbox, where="key 'config.sandbox'"))
        loops[self._key].users.add(self)
        return loops[self._key]

    async def prepare(self) -> None:
        """Start the sandbox: a pool, a first container."""
        await self._shared().ready()

    async def create(self, instance_id: str, files: Mapping[str, str | bytes] | None = None) -> None:  # type: ignore[override]
        """`files`: what the session begins with, by path. One that is `None` is left out: a table of rows has the paths of all
        rows in each."""
        given = _checked(files)
        key = (current_session.get() or uuid4().hex, self._key)
        workspace = _workspaces.get(key)
        if workspace is None:
            workspace = _workspaces[key] = Workspace(self.sandbox)
        workspace.users += 1
        workspace.files.update(given)
        self.instances[instance_id] = (key, workspace)

    def workspace(self, instance_id: str) -> Workspace:
        found: Workspace = self.instances[instance_id][1]
        return found

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        key, workspace = self.instances.pop(instance_id)
        workspace.users -= 1
        if not workspace.users:
            _workspaces.pop(key, None)
            await workspace.close()

    async def close(self) -> None:
        """Gives the sandbox up: the last tool that shares it closes it, with all sessions. The next use makes another."""
        loops = _sandboxes.get(asyncio.get_running_loop(), {})
        shared = loops.get(self._key)
        if shared is None or self not in shared.users:
            return
        shared.users.discard(self)
        if not shared.users:
            del loops[self._key]
            await shared.close()


def _checked(files: Any) -> dict[str, str | bytes]:
    """Raises `ValueError` for what no session can begin with."""
    if files is not None and not isinstance(files, Mapping):
        raise ValueError(f"create_kwargs.files: expected a mapping from path to text, got {files!r:.80}")
    found = {path: data for path, data in (files or {}).items() if data is not None}
    for path, data in found.items():
        inside(path)
        if not isinstance(data, str | bytes):
            raise ValueError(f"create_kwargs.files: '{path}' must be text, got {data!r:.80}")
    return found
