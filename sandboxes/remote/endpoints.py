"""The services: which takes the next request, which take none, and one request to one of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from agentloop.sandboxes.base import SandboxError
from agentloop.sandboxes.remote.config import RemoteConfig

logger = logging.getLogger(__name__)

_KEEPALIVE_S = 2.0
"""Idle connections are closed here before a server does it (uvicorn: 5 s), or a request may meet a closing one."""
_WAIT_S = 1.0
"""Wait after a 429 without Retry-After."""
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes

    def json(self) -> Any:
        """Raises `ValueError`."""
        return orjson.loads(self.body)


class Failed(Exception):
    """A request that got no usable answer."""

    def __init__(
        self, endpoint: Endpoint, why: str, *, may_have_run: bool, wait_s: float = 0.0, decisive: bool = False
    ) -> None:
        super().__init__(f"{endpoint.url}: {why}")
        self.endpoint = endpoint
        self.may_have_run = may_have_run
        self.wait_s = wait_s
        """The service is busy and says when to come again; no fault of it."""
        self.decisive = decisive
        """Nothing listens there."""


class StillThere(SandboxError):
    """The request came to nothing, and nothing was lost: the service was too busy, or refuses such a request."""


@dataclass(eq=False, slots=True)
class Endpoint:
    url: str
    up: bool = False
    seen: bool = False
    """It was up before."""
    failures: int = 0
    """In a row."""
    error: str = "no answer yet"
    running: int = 0
    """Requests of ours that are there, open sessions included."""
    served: int = 0


class Endpoints:
    """All services. Made and closed in the event loop that uses it."""

    def __init__(self, config: RemoteConfig) -> None:
        self._config = config
        self.all = [Endpoint(url) for url in config.endpoints]
        bearer = config.bearer()
        self._headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        self._session: aiohttp.ClientSession | None = None
        self._prober: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    # who takes the next one

    def place(self, avoid: Collection[Endpoint] = ()) -> Endpoint | None:
        """The least loaded one that is up; those in `avoid` only if there is no other."""
        usable = [endpoint for endpoint in self.all if endpoint.up]
        better = [endpoint for endpoint in usable if endpoint not in avoid] or usable
        return min(better, key=lambda endpoint: (endpoint.running, endpoint.served)) if better else None

    async def wait_for_one(self) -> None:
        """Until a probe has succeeded somewhere; the caller bounds it."""
        self._changed.clear()
        await self._changed.wait()

    def succeeded(self, endpoint: Endpoint) -> None:
        endpoint.failures = 0

    def failed(self, failure: Failed) -> None:
        """Count it, and eject the endpoint after too many in a row."""
        endpoint = failure.endpoint
        if failure.wait_s > 0:
            return
        endpoint.failures += 1
        endpoint.error = str(failure).removeprefix(f"{endpoint.url}: ")
        if endpoint.up and (failure.decisive or endpoint.failures >= self._config.failures_to_eject):
            endpoint.up = False
            logger.warning("%s gets no more code to run until it answers a probe: %s", endpoint.url, endpoint.error)

    def errors(self) -> str:
        return "; ".join(f"{endpoint.url} ({endpoint.error})" for endpoint in self.all)

    # probes

    async def start(self) -> None:
        """Probe all once, and from then on in the background."""
        await asyncio.gather(*(self.probe(endpoint) for endpoint in self.all))
        self._prober = asyncio.create_task(self._watch(), name="remote-sandbox-probes")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.probe_interval_s)
            # Of those that are up the requests tell enough.
            await asyncio.gather(*(self.probe(endpoint) for endpoint in self.all if not endpoint.up))

    async def probe(self, endpoint: Endpoint) -> None:
        try:
            reply = await self.send(endpoint, "GET", "/v1/ping", timeout_s=self._config.probe_timeout_s)
            if reply.status != 200:
                raise Failed(endpoint, f"/v1/ping answered {reply.status}", may_have_run=False)
        except Failed as failure:
            endpoint.error = str(failure).removeprefix(f"{endpoint.url}: ")
            return
        if not endpoint.up and endpoint.seen:
            logger.warning("%s is back and gets code to run again", endpoint.url)
        endpoint.up = endpoint.seen = True
        endpoint.failures = 0
        self._changed.set()

    # one request

    async def send(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        *,
        timeout_s: float,
        json: Any = None,
        data: bytes | None = None,
        query: dict[str, str] | None = None,
    ) -> Reply:
        """Send once. Raises `Failed`; of the statuses 429, 503 and other 5xx are failures, the rest is the caller's."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        body, kind = (orjson.dumps(json), "application/json") if json is not None else (data, "application/octet-stream")
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, self._config.connect_timeout_s))
        endpoint.running += 1
        endpoint.served += 1
        try:
            async with self._session.request(
                method, endpoint.url + path, data=body, timeout=timeout, headers={"Content-Type": kind}, params=query
            ) as response:
                reply = Reply(response.status, await response.read())
        except aiohttp.ConnectionTimeoutError as error:
            raise Failed(endpoint, "no connection in time", may_have_run=False) from error
        except TimeoutError as error:
            raise Failed(endpoint, f"no answer within {timeout_s:.1f} s", may_have_run=True) from error
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, ConnectionRefusedError)
            why = (error.os_error.strerror if error.os_error else "") or str(error)
            raise Failed(endpoint, why, may_have_run=False, decisive=refused) from error
        except aiohttp.ClientError as error:
            why = f"the connection was lost: {error or type(error).__name__}"
            raise Failed(endpoint, why, may_have_run=True) from error
        finally:
            endpoint.running -= 1
        wait_s = _retry_after(response.headers.get("Retry-After"))
        if reply.status == 429 or (reply.status == 503 and wait_s is not None):
            why = f"{path} answered {reply.status}: {_message(reply)}"
            raise Failed(endpoint, why, may_have_run=False, wait_s=wait_s or _WAIT_S)
        if reply.status >= 500 and reply.status != 507:
            raise Failed(endpoint, f"{path} answered {reply.status}: {_message(reply)}", may_have_run=True)
        return reply

    async def close(self) -> None:
        if self._prober is not None:
            self._prober.cancel()
            await asyncio.gather(self._prober, return_exceptions=True)
            self._prober = None
        if self._session is not None:
            await self._session.close()
            self._session = None
            await asyncio.sleep(0)


def _retry_after(value: str | None) -> float | None:
    try:
        return min(_LONGEST_WAIT_S, max(0.05, float(value))) if value is not None else None
    except ValueError:  # a date
        return _WAIT_S


def _message(reply: Reply) -> str:
    return refusal(reply) or "no reason given"


def refusal(reply: Reply) -> str:
    """What a service says is wrong, in one line."""
    try:
        said = reply.json()
    except ValueError:
        said = reply.body.decode(errors="replace")
    while isinstance(said, dict):
        said = next((said[name] for name in ("message", "detail", "error") if said.get(name)), "")
    return " ".join(str(said).split())[:400]
