"""JSON over HTTP to one server, with failures sorted by what may be done about them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal

import aiohttp
import orjson
from pydantic import SecretStr

from agentloop.engines.sglang_server.config import SGLangServerConfig
from agentloop.errors import EngineError

KEEPALIVE_S = 2.0
"""Idle connections are closed here before the server does it (uvicorn: 5 s), or a request may meet a closing one."""


class ServerLost(Exception):
    """The server did not answer, or failed. What was asked may be asked elsewhere."""

    def __init__(self, url: str, why: str, *, sent: bool = True, refused: bool = False, status: int | None = None) -> None:
        super().__init__(f"{url}: {why}")
        self.why = why
        self.sent = sent
        """False if nothing can have reached it."""
        self.refused = refused
        """Nothing listens there."""
        self.status = status
        """What it answered, if it did: 429 or 503 (too much to do), 500 (it failed this one request), 502 and others."""


class ServerRefused(EngineError):
    """The server answered that the request is wrong: another one would answer the same."""


class Http:
    """One connection pool for all servers. Made and closed in the event loop that uses it."""

    def __init__(self, config: SGLangServerConfig) -> None:
        self._connect_s = config.connect_timeout_s
        self._keys = {"key": _bearer(config.api_key), "admin": _bearer(config.admin_api_key or config.api_key)}
        self._session: aiohttp.ClientSession | None = None

    async def get(self, url: str, path: str, *, timeout_s: float, key: Literal["key", "admin"] = "key") -> Any:
        return await self._ask("GET", url, path, None, timeout_s, key, {})

    async def post(
        self,
        url: str,
        path: str,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        key: Literal["key", "admin"] = "admin",
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The answer's JSON, `None` for an empty one. `key`: which of the two API keys the path wants.

        Raises `ServerLost` (no connection, connection lost, no answer within `timeout_s`, status 429 or 5xx, an answer that
        is no JSON) and `ServerRefused` (every other status that is no success)."""
        return await self._ask("POST", url, path, orjson.dumps(body), timeout_s, key, headers or {})

    async def _ask(
        self,
        method: str,
        url: str,
        path: str,
        body: bytes | None,
        timeout_s: float,
        key: str,
        headers: Mapping[str, str],
    ) -> Any:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, headers={"Content-Type": "application/json"})
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=self._connect_s)
        try:
            async with self._session.request(
                method, url + path, data=body, timeout=timeout, headers={**self._keys[key], **headers}
            ) as response:
                content = await response.read()
        except aiohttp.ServerTimeoutError as error:  # of the connect
            raise ServerLost(url, f"no connection within {self._connect_s:g} s", sent=False) from error
        except TimeoutError as error:
            raise ServerLost(url, f"no answer to {path} within {timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, ConnectionRefusedError)
            raise ServerLost(url, _reason(error), sent=False, refused=refused) from error
        except aiohttp.ClientError as error:
            raise ServerLost(url, f"the connection was lost: {error or type(error).__name__}") from error
        if response.ok:
            return _json(url, path, content)
        why = f"{path} answered {response.status}: {_message(content)}"
        if response.status == 429 or response.status >= 500:
            raise ServerLost(url, why, status=response.status)
        raise ServerRefused(f"{url}: {why}")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            await asyncio.sleep(0)


def _reason(error: aiohttp.ClientConnectorError) -> str:
    return (error.os_error.strerror or str(error.os_error)) if error.os_error else str(error)


def _bearer(key: SecretStr | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}


def _json(url: str, path: str, content: bytes) -> Any:
    """`/health` and `/flush_cache` answer text or nothing, the others JSON."""
    if not content or path.startswith(("/health", "/readiness", "/flush_cache")):
        return None
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ServerLost(url, f"{path} answered no JSON: {content[:80]!r}") from error


def _message(content: bytes) -> str:
    """What SGLang says is wrong: `{"error": {"message": …}}` of `/generate`, `{"message": …}` of the others; else the text."""
    try:
        data = orjson.loads(content)
    except orjson.JSONDecodeError:
        data = content.decode(errors="replace")
    while isinstance(data, dict):
        data = next((data[name] for name in ("error", "message", "detail") if data.get(name)), str(data))
    text = " ".join(str(data).split())
    return text if len(text) <= 400 else f"{text[:200]} … {text[-200:]}"
