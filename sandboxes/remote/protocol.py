"""What goes over the wire: SandboxFusion's `/run_code`, and what agentloop's own service adds to it.

Request and answer are those of https://github.com/bytedance/SandboxFusion (sandbox/server/sandbox_api.py). Both have one key
more, `agentloop`, which their side ignores: in the request it asks for exact results and may name limits; in the answer it
holds what their format has no room for (the last expression's value, `oom`, `output_limit`, what was cut).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, Field

from agentloop.sandboxes.base import Limits, Result, Status

_PLAIN = tuple(field.name for field in fields(Result) if field.name not in ("status", "stdout", "stderr", "files"))
_PIPE_BYTES = 64 * 1024
"""What a Linux pipe holds. SandboxFusion reads none of it before the process ends, so whoever writes more hangs until its
timeout: there a timeout after so much output says nothing of the code's speed."""


class Extension(BaseModel):
    """`agentloop` in a request."""

    limits: dict[str, Any] = Field(default_factory=dict)
    """Fields of `Limits` that are to differ from the service's own."""


class RunCodeRequest(BaseModel):
    code: str
    language: str
    compile_timeout: float = Field(10.0, gt=0)
    run_timeout: float = Field(10.0, gt=0)
    memory_limit_MB: int = -1
    """-1: the service's own."""
    stdin: str | None = None
    files: dict[str, str | None] = Field(default_factory=dict)
    """Path to base64."""
    fetch_files: list[str] = Field(default_factory=list)
    args: list[str] = Field(default_factory=list)
    agentloop: Extension | None = None


class CommandRunResult(BaseModel):
    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    execution_time: float | None = None
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None


class RunCodeResponse(BaseModel):
    status: Literal["Success", "Failed", "SandboxError"]
    message: str = ""
    compile_result: CommandRunResult | None = None
    run_result: CommandRunResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, str] = Field(default_factory=dict)
    agentloop: dict[str, Any] | None = None


def encode(files: Mapping[str, str | bytes]) -> dict[str, str]:
    """File contents as base64."""
    return {path: base64.b64encode(d.encode() if isinstance(d, str) else d).decode() for path, d in files.items()}


def decode(files: Mapping[str, str | None]) -> dict[str, bytes]:
    """File contents from base64. Raises `ValueError` naming the file."""
    found = {}
    for path, data in files.items():
        try:
            found[path] = base64.b64decode(data or "", validate=True)
        except binascii.Error as error:
            raise ValueError(f"file {path!r}: not valid base64") from error
    return found


def answer(result: Result, *, exact: bool, pod: str | None = None) -> RunCodeResponse:
    """A result in SandboxFusion's words; with `exact` in ours too."""
    infra, timeout = result.status is Status.INFRA, result.status is Status.TIMEOUT
    stderr, code = result.stderr, result.exit_code
    if result.status in (Status.OOM, Status.OUTPUT_LIMIT):
        code = code or 137
        stderr = stderr if exact else f"{stderr}{result.error}\n"
    elif result.status is Status.ERROR:
        code = code or 1
    run = CommandRunResult(
        status="Error" if infra else "TimeLimitExceeded" if timeout else "Finished",
        execution_time=result.run_s,
        return_code=None if infra or timeout else code or 0,
        stdout=result.stdout,
        stderr=stderr,
    )
    return RunCodeResponse(
        status="SandboxError" if infra else "Success" if result.ok else "Failed",
        message=result.error if infra else "",
        run_result=run,
        executor_pod_name=pod,
        files=encode(result.files),
        agentloop={"status": result.status.value, **{name: getattr(result, name) for name in _PLAIN}} if exact else None,
    )


def result_of(response: RunCodeResponse, limits: Limits, url: str) -> Result:
    """The result that a service answered. What is the service's own failure becomes `infra`, whatever it looks like."""
    run, compiled = response.run_result, response.compile_result
    if response.agentloop is not None and run is not None:
        said = response.agentloop
        plain = {name: said[name] for name in _PLAIN if name in said}
        files = decode(response.files)
        return Result(Status(said["status"]), stdout=run.stdout or "", stderr=run.stderr or "", files=files, **plain)
    if response.status == "SandboxError" or (run is None and compiled is None):
        return Result(Status.INFRA, error=f"{url}: {_line(response.message) or 'the service failed and does not say how'}")
    if compiled is not None and (compiled.status != "Finished" or compiled.return_code != 0):
        return _judged(compiled, limits, url, "compiling it ")
    if run is None:
        return Result(Status.INFRA, error=f"{url}: the service compiled the code and says nothing of running it")
    found = _judged(run, limits, url, "it ")
    return _with_files(found, decode(response.files))


def _judged(command: CommandRunResult, limits: Limits, url: str, what: str) -> Result:
    """One command's outcome, as the service tells it."""
    out, out_cut = _capped(command.stdout, limits.output_bytes)
    err, err_cut = _capped(command.stderr, limits.output_bytes)
    kept: dict[str, Any] = {"stdout": out, "stderr": err, "stdout_cut": out_cut, "stderr_cut": err_cut}
    kept["run_s"] = command.execution_time or 0.0
    code = command.return_code
    if command.status == "Error":
        return Result(Status.INFRA, error=f"{url}: {_line(command.stderr) or 'the service could not run it'}", **kept)
    if command.status == "TimeLimitExceeded":
        if max(len(command.stdout or ""), len(command.stderr or "")) >= _PIPE_BYTES:
            error = f"{what}wrote more than the service reads before its end, and hung"
            return Result(Status.OUTPUT_LIMIT, error=error, **kept)
        return Result(Status.TIMEOUT, error=f"{what}ran longer than it may and was killed", **kept)
    if code is None:
        return Result(Status.INFRA, error=f"{url}: the service does not say how it ended", **kept)
    if code != 0 and (command.stderr or "").rstrip().rpartition("\n")[2].startswith("MemoryError"):
        return Result(Status.OOM, exit_code=code, error=f"{what}needed more memory than it may have", **kept)
    if out_cut or err_cut:
        error = f"{what}wrote more than {limits.output_bytes} bytes"
        return Result(Status.OUTPUT_LIMIT, exit_code=code, error=error, **kept)
    if code != 0:
        error = f"signal {-code} ended it" if code < 0 else f"{what}ended with exit status {code}"
        return Result(Status.ERROR, exit_code=code, error=error, **kept)
    return Result(Status.OK, exit_code=0, **kept)


def _with_files(result: Result, files: dict[str, bytes]) -> Result:
    result.files.update(files)
    return result


def _capped(text: str | None, limit: int) -> tuple[str, int]:
    """Beginning and end of a text of more than `limit` bytes, and how many were left out."""
    data = (text or "").encode(errors="replace")
    if len(data) <= limit:
        return text or "", 0
    tail = limit // 2
    kept = data[: limit - tail] + data[len(data) - tail :]
    return kept.decode(errors="ignore"), len(data) - limit


def _line(text: str | None) -> str:
    return " ".join((text or "").split())[-400:]
