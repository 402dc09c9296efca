"""One of our sessions as an Inspect `SandboxEnvironment`, for Inspect's own checks of sandboxes.

Inspect's interface is a container's: commands with arguments, any path, files as the command's user sees them. Ours is a
session's: code, a working folder, files as the host sees them. So commands and files go through a few lines of Python that run
in the session, and `put` and `get` only carry the bytes.
"""

from __future__ import annotations

import ast
import errno
import json
import uuid
from typing import Any

from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUserUnsupportedError,
)

from agentloop.sandboxes.base import Limits, Result, Session, Status

LIMITS = Limits(timeout_s=120.0, memory_mb=1024, disk_mb=512, output_bytes=10 * 2**20, processes=64)
TIMEOUT_S = 60.0
PART = 8 * 2**20
"""Bytes of a file that are carried at once."""

RUN = """
import json as _json, os as _os, subprocess as _subprocess
def _run(command, cwd, env, stdin):
    try:
        with open(stdin, "rb") if stdin else open(_os.devnull, "rb") as source:
            done = _subprocess.run(command, cwd=cwd, env={{**_os.environ, **env}}, stdin=source)
        return done.returncode if done.returncode >= 0 else 128 - done.returncode
    except OSError as error:
        return [error.errno, str(error)]
    finally:
        if stdin:
            _os.unlink(stdin)
_json.dumps(_run(**_json.loads({arguments!r})))
"""
WRITE = """
import json as _json, os as _os
def _write(path, parts):
    try:
        _os.makedirs(_os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as target:
            for part in parts:
                with open(part, "rb") as source:
                    target.write(source.read())
    except OSError as error:
        return [error.errno, str(error)]
    finally:
        for part in parts:
            _os.unlink(part)
_json.dumps(_write(**_json.loads({arguments!r})))
"""
READ = """
import json as _json, os as _os
def _read(path, name, part, most):
    try:
        with open(path, "rb") as source:
            if _os.fstat(source.fileno()).st_size > most:
                return -1
            count = 0
            while data := source.read(part):
                with open(name + str(count), "wb") as target:
                    target.write(data)
                count += 1
            return count
    except OSError as error:
        return [error.errno, str(error)]
_json.dumps(_read(**_json.loads({arguments!r})))
"""


class SessionEnvironment(SandboxEnvironment):
    """Belongs to the session, which its owner opens and closes."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    @classmethod
    async def sample_cleanup(cls, *arguments: Any, **named: Any) -> None:
        """The owner of the session closes it."""

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        if user is not None:
            raise SandboxUserUnsupportedError("a session has one user, without a name and without any right")
        stdin = None
        if input is not None:
            stdin = _name()
            await self.session.put(stdin, input)
        arguments = {"command": cmd, "cwd": cwd, "env": env or {}, "stdin": stdin}
        result = await self._do(RUN, arguments, timeout=float(timeout or TIMEOUT_S))
        if result.status is Status.TIMEOUT:
            raise TimeoutError(result.error)
        if result.status is Status.OUTPUT_LIMIT:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, result.stdout)
        outcome = _outcome(result)
        if isinstance(outcome, list):
            if outcome[0] in (errno.EACCES, errno.EPERM):
                raise PermissionError(*outcome)
            return ExecResult(False, 127, result.stdout, outcome[1])
        return ExecResult(outcome == 0, outcome, result.stdout, result.stderr)

    async def write_file(self, file: str, contents: str | bytes) -> None:
        data = contents.encode() if isinstance(contents, str) else contents
        parts = []
        for at in range(0, len(data), PART):
            parts.append(_name())
            await self.session.put(parts[-1], data[at : at + PART])
        _raise(_outcome(await self._do(WRITE, {"path": file, "parts": parts})), file)

    async def read_file(self, file: str, text: bool = True) -> Any:
        name, most = _name(), SandboxEnvironmentLimits.MAX_READ_FILE_SIZE
        count = _outcome(await self._do(READ, {"path": file, "name": name, "part": PART, "most": most}))
        _raise(count, file)
        if count < 0:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        data = b"".join([await self.session.get(f"{name}{number}") for number in range(count)])
        await self.session.run(f"import os as _os\nfor _n in range({count}): _os.unlink({name!r} + str(_n))")
        return data.decode() if text else data

    async def _do(self, code: str, arguments: dict[str, Any], timeout: float = TIMEOUT_S) -> Result:
        return await self.session.run(code.format(arguments=json.dumps(arguments)), timeout=timeout)


def _name() -> str:
    return f".inspect-{uuid.uuid4().hex}"


def _outcome(result: Result) -> Any:
    """What the lines of Python came to: their last value, which is JSON."""
    if result.status is not Status.OK or result.value is None:
        raise RuntimeError(f"{result.status}: {result.error} {result.stderr[-500:]}")
    return json.loads(ast.literal_eval(result.value))


def _raise(outcome: Any, file: str) -> None:
    if isinstance(outcome, list):
        raise OSError(outcome[0], outcome[1], file)
