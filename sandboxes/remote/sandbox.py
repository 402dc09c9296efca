"""The kind `remote`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from agentloop.sandboxes.base import Layer, Limits, Result, Sandbox, SandboxError, Status
from agentloop.sandboxes.paths import inside
from agentloop.sandboxes.remote.config import RemoteConfig
from agentloop.sandboxes.remote.endpoints import Endpoint, Endpoints, Failed, Reply, StillThere, refusal
from agentloop.sandboxes.remote.protocol import Extension, RunCodeRequest, RunCodeResponse, encode, result_of
from agentloop.sandboxes.remote.session import RemoteSession

logger = logging.getLogger(__name__)


class RemoteSandbox(Sandbox):
    """Each request goes to the endpoint with the fewest of ours. Concurrency is limited per process here, and per service by
    the service's own admission."""

    kind = "remote"
    Config = RemoteConfig

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self.languages = config.languages
        self._places = asyncio.Semaphore(config.max_concurrency)
        self._starting = asyncio.Lock()
        self._endpoints: Endpoints | None = None
        self._sessions: set[RemoteSession] = set()
        self._closed = False

    async def start(self) -> None:
        async with self._starting:
            if self._closed:
                raise SandboxError("remote: the sandbox is closed")
            if self._endpoints is not None:
                return
            endpoints = Endpoints(self.config)
            await endpoints.start()
            if not any(endpoint.up for endpoint in endpoints.all):
                await endpoints.close()
                raise SandboxError(
                    f"remote: no service answers: {endpoints.errors()}; start one with `agentloop sandbox serve`"
                )
            self._endpoints = endpoints

    async def started(self) -> Endpoints:
        await self.start()
        assert self._endpoints is not None
        return self._endpoints

    def session(self, limits: Limits | None = None) -> RemoteSession:
        session = RemoteSession(self, limits or self.config.limits)
        self._sessions.add(session)
        return session

    def forget(self, session: RemoteSession) -> None:
        self._sessions.discard(session)

    def request(
        self,
        code: str,
        language: str,
        stdin: str,
        files: Mapping[str, str | bytes] | None,
        fetch: Sequence[str],
        timeout: float | None,
        limits: Limits,
    ) -> RunCodeRequest:
        """The body of a request. Raises `ValueError` as `Session.run` does."""
        if language not in self.languages:
            raise ValueError(f"language {language!r}: known are {', '.join(self.languages)}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout {timeout}: expected a number of seconds above 0")
        for path in (*(files or {}), *fetch):
            inside(path)
        return RunCodeRequest(
            code=code,
            language=language,
            compile_timeout=self.config.compile_timeout_s,
            run_timeout=min(timeout or limits.timeout_s, limits.timeout_s),
            memory_limit_MB=limits.memory_mb,
            stdin=stdin,
            files=dict(encode(files or {})),
            fetch_files=list(fetch),
            agentloop=Extension(limits=limits.model_dump(exclude_none=True)),
        )

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
        wanted = limits or self.config.limits
        request = self.request(code, language, stdin, files, fetch, timeout, wanted)
        began = time.monotonic()
        try:
            async with self._places:
                place_s = time.monotonic() - began
                if begun is not None:
                    begun()
                result = await self.exchange("/run_code", request, wanted)
        except SandboxError as error:
            return Result(Status.INFRA, error=str(error), queue_s=time.monotonic() - began)
        return replace(result, queue_s=place_s + result.queue_s, state_lost=False)

    async def exchange(self, path: str, request: RunCodeRequest, limits: Limits, home: Endpoint | None = None) -> Result:
        """Have it run, at `home` or anywhere. Raises `SandboxError` if nobody answered."""
        seconds = request.run_timeout + request.compile_timeout + self.config.overhead_s
        reply, endpoint = await self.ask("POST", path, seconds, home=home, json=request.model_dump(exclude_none=True))
        if reply.status == 422 and request.language == "sh":  # SandboxFusion knows it as bash
            request = request.model_copy(update={"language": "bash"})
            reply, endpoint = await self.ask("POST", path, seconds, home=endpoint, json=request.model_dump(exclude_none=True))
        if reply.status != 200:
            kind = SandboxError if reply.status == 404 else StillThere
            raise kind(f"{endpoint.url}: it refuses the request ({reply.status}): {refusal(reply)}")
        try:
            return result_of(RunCodeResponse.model_validate_json(reply.body), limits, endpoint.url)
        except (ValidationError, ValueError, KeyError, TypeError) as error:
            raise SandboxError(f"{endpoint.url}: it answered something that is no result: {reply.body[:100]!r}") from error

    async def ask(
        self, method: str, path: str, seconds: float, *, home: Endpoint | None = None, **content: Any
    ) -> tuple[Reply, Endpoint]:
        """Send a request, again and elsewhere where that is safe, all within `seconds`. Raises `SandboxError`."""
        endpoints = await self.started()
        deadline = time.monotonic() + seconds
        failure: Failed | None = None
        failed_at: list[Endpoint] = []
        for attempt in range(self.config.max_attempts):
            endpoint = home or await self._place(endpoints, failed_at, deadline)
            if endpoint is None:
                break
            try:
                left = max(0.05, deadline - time.monotonic())
                reply = await endpoints.send(endpoint, method, path, timeout_s=left, **content)
            except Failed as error:
                failure = error
                endpoints.failed(error)
                again = not error.may_have_run or (self.config.idempotent and home is None)
                elsewhere = home is None and any(other.up and other not in (*failed_at, endpoint) for other in endpoints.all)
                wait_s = 0.0 if elsewhere else error.wait_s or 0.1 * 2**attempt
                if not again or (home is not None and not error.wait_s) or time.monotonic() + wait_s >= deadline:
                    break
                failed_at.append(endpoint)
                await asyncio.sleep(wait_s)
            else:
                endpoints.succeeded(endpoint)
                return reply, endpoint
        if failure is None:
            raise SandboxError(f"remote: no service answers: {endpoints.errors()}")
        kind = StillThere if failure.wait_s else SandboxError
        raise kind(f"remote: {failure}") from failure

    async def end(self, home: Endpoint, path: str, seconds: float) -> None:
        """End a session at `home`; also while the sandbox closes, when nothing else is sent any more. Raises `Failed`."""
        if self._endpoints is not None:
            await self._endpoints.send(home, "DELETE", path, timeout_s=seconds)

    async def _place(self, endpoints: Endpoints, avoid: list[Endpoint], deadline: float) -> Endpoint | None:
        """An endpoint that is up, waiting for one as long as the deadline allows."""
        while (endpoint := endpoints.place(avoid)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            try:
                async with asyncio.timeout(left):
                    await endpoints.wait_for_one()
            except TimeoutError:
                return None
        return endpoint

    async def layers(self) -> list[Layer]:
        """What each service says of itself; a foreign one says nothing."""
        endpoints = Endpoints(self.config)
        try:
            return [layer for endpoint in endpoints.all for layer in await _layers_of(endpoints, endpoint, self.config)]
        finally:
            await endpoints.close()

    async def close(self) -> None:
        self._closed = True
        await asyncio.gather(*(session.close() for session in list(self._sessions)))
        async with self._starting:
            endpoints, self._endpoints = self._endpoints, None
            if endpoints is not None:
                await endpoints.close()


async def _layers_of(endpoints: Endpoints, endpoint: Endpoint, config: RemoteConfig) -> list[Layer]:
    try:
        reply = await endpoints.send(endpoint, "GET", "/layers", timeout_s=config.overhead_s)
        if reply.status == 200:
            return [Layer(**{**layer, "name": f"{endpoint.url}: {layer['name']}"}) for layer in reply.json()]
        detail = "it does not say" if reply.status == 404 else f"/layers answered {reply.status}: {refusal(reply)}"
    except (Failed, ValueError, TypeError, KeyError) as error:
        detail = str(error).removeprefix(f"{endpoint.url}: ")
    return [Layer(endpoint.url, False, "whatever the service stops", detail)]
