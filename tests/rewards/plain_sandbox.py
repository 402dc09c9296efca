"""A sandbox that is none: a plain subprocess and a temporary folder. What holds in it holds by the grader alone."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import ClassVar

from agentloop.config import Strict
from agentloop.sandboxes import Layer, Limits, Result, Sandbox, Session, Status


class PlainSandbox(Sandbox):
    """Stateless runs only, with a time limit and an output limit."""

    kind: ClassVar[str] = "plain"

    class Config(Strict):
        limits: Limits = Limits()

    def __init__(self, config: Config | None = None) -> None:
        self.codes: list[str] = []
        """All code that was run."""

    async def start(self) -> None: ...

    def session(self, limits: Limits | None = None) -> Session:
        raise NotImplementedError

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
    ) -> Result:
        self.codes.append(code)
        limits = limits or Limits()
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "main.py"), "w") as file:  # noqa: ASYNC230  a few kB
                file.write(code)
            environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
            started = perf_counter()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "main.py",
                cwd=folder,
                env=environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            try:
                async with asyncio.timeout(timeout or limits.timeout_s):
                    out, err = await process.communicate(stdin.encode())
            except TimeoutError:
                return Result(Status.TIMEOUT, error="out of time", run_s=perf_counter() - started)
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, 9)
                    await process.wait()
            cut = max(len(out), len(err)) > limits.output_bytes
            status = Status.OUTPUT_LIMIT if cut else Status.OK if process.returncode == 0 else Status.ERROR
            return Result(
                status,
                out[: limits.output_bytes].decode(errors="replace"),
                err[: limits.output_bytes].decode(errors="replace"),
                exit_code=process.returncode,
                run_s=perf_counter() - started,
            )

    async def layers(self) -> list[Layer]:
        return []

    async def close(self) -> None: ...


class DownSandbox(PlainSandbox):
    """A sandbox whose machinery fails."""

    async def run(self, code: str, **_: object) -> Result:  # type: ignore[override]
        return Result(Status.INFRA, error="no place to run")
