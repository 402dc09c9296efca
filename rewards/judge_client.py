"""Asking a judge: an OpenAI-compatible chat endpoint, with a cache, limits and retries."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from asyncio_throttle import Throttler
from pydantic import Field, field_validator

from agentloop.config import Strict
from agentloop.errors import AgentloopError, ConfigError
from agentloop.tools.policy import RateLimit, ToolPolicy

if TYPE_CHECKING:
    import aiohttp

_RETRIED = (408, 409, 425, 429)
"""Statuses that say «later», besides those from 500 on."""
_MAX_REPLY = 1 << 20
_MAX_CACHED = 100_000


class JudgeError(AgentloopError):
    """The judge could not be asked, or did not answer in time. Nothing is known of the answer that was to be judged."""


class EndpointSettings(Strict):
    """Where the judge is, and how hard it may be pressed."""

    endpoint: str
    """Up to and with `/v1`: `http://judge:8000/v1`."""
    model: str
    api_key_env: str | None = None
    """Name of the environment variable that holds the key. The key is in no log, no message and no cache."""
    temperature: float = Field(0.0, ge=0)
    max_tokens: int | None = Field(16, ge=1)
    """Of the judge's reply; a judge that reasons needs room for it. `null` leaves it to the service."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further keys of the request (`{chat_template_kwargs: {enable_thinking: false}}`)."""
    timeout_s: float = Field(20.0, gt=0)
    """Of one attempt."""
    deadline_s: float = Field(50.0, gt=0)
    """Of one question with everything: waiting for a place, attempts, waits between. Keep it below the loop's `score_s`."""
    retries: int = Field(3, ge=0)
    """Further attempts after a failed connection, a timeout, status 429 or 5xx, or a reply that is no chat completion."""
    max_concurrency: int = Field(32, ge=1)
    """Questions at the same time, in this process."""
    rate_limit: RateLimit | None = None
    """Attempts in a period, in this process: `10/1s`, `600/min` or `{calls: 10, period: 1.0}`. Divide by the number of reward
    workers."""
    cache: str | None = "memory"
    """`memory`, a folder (shared by processes, kept between runs), or none."""

    @field_validator("rate_limit", mode="before")
    @classmethod
    def _as_tools_write_it(cls, value: Any) -> Any:
        return ToolPolicy(rate_limit=value).rate_limit if isinstance(value, str) else value

    @field_validator("endpoint")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("expected a URL such as 'http://judge:8000/v1'")
        if url.username or url.password:
            raise ValueError("a URL with a password in it would be logged; name the key's variable in 'api_key_env'")
        return value.rstrip("/")


class JudgeClient:
    """Asks for chat completions. One object serves a process; each event loop has connections and limits of its own."""

    def __init__(self, settings: EndpointSettings) -> None:
        """Raises `ConfigError` if the key's variable is not set."""
        self.settings = settings
        self._key = ""
        if settings.api_key_env is not None:
            self._key = os.environ.get(settings.api_key_env, "")
            if not self._key:
                raise ConfigError(
                    f"reward judge: key 'api_key_env': the environment variable {settings.api_key_env} is not set"
                )
        self._cache = _Cache(settings.cache)
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Local] = WeakKeyDictionary()

    async def ask(self, messages: list[dict[str, str]]) -> str:
        """The text of the judge's reply, from the cache if the same was asked before. Raises `JudgeError`."""
        settings = self.settings
        body = {
            "model": settings.model,
            "messages": messages,
            "temperature": settings.temperature,
            **({} if settings.max_tokens is None else {"max_tokens": settings.max_tokens}),
            **settings.extra_body,
        }
        key = hashlib.sha256(json.dumps([settings.endpoint, body], sort_keys=True).encode()).hexdigest()
        local = self._local()
        try:
            async with asyncio.timeout(settings.deadline_s), local.alone(key):
                found = await self._cache.get(key)
                if found is None:
                    found = await self._attempts(local, body)
                    await self._cache.put(key, found)
                return found
        except TimeoutError:
            raise JudgeError(f"the judge at {settings.endpoint} did not answer within {settings.deadline_s:g} s") from None

    async def close(self) -> None:
        """Close the connections of this event loop."""
        local = self._loops.pop(asyncio.get_running_loop(), None)
        if local is not None and local.session is not None:
            await local.session.close()

    def _local(self) -> _Local:
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops[loop] = _Local(self.settings)
        return self._loops[loop]

    async def _attempts(self, local: _Local, body: Mapping[str, Any]) -> str:
        for attempt in range(self.settings.retries + 1):
            try:
                async with local.place():
                    return await self._attempt(local, body)
            except _Later as error:
                if attempt == self.settings.retries:
                    raise JudgeError(f"the judge at {self.settings.endpoint} failed: {error}") from None
                wait = max(error.after_s, 0.5 * 2**attempt * random.uniform(0.5, 1.5))
                await asyncio.sleep(wait)
        raise AssertionError

    async def _attempt(self, local: _Local, body: Mapping[str, Any]) -> str:
        import aiohttp

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with (
                asyncio.timeout(self.settings.timeout_s),
                local.open_session().post(
                    f"{self.settings.endpoint}/chat/completions", json=body, headers=headers, allow_redirects=False
                ) as reply,
            ):
                raw = await reply.content.read(_MAX_REPLY)
                while len(raw) < _MAX_REPLY and (more := await reply.content.read(_MAX_REPLY - len(raw))):
                    raw += more
        except TimeoutError:
            raise _Later(f"no answer within {self.settings.timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise _Later(self._hidden(f"{type(error).__name__}: {error}")) from None
        if reply.status != 200:
            said = f"status {reply.status}: {self._hidden(raw.decode(errors='replace'))[:200]}"
            if reply.status in _RETRIED or reply.status >= 500:
                raise _Later(said, _seconds(reply.headers.get("Retry-After")))
            raise JudgeError(f"the judge at {self.settings.endpoint} answered {said}")
        try:
            choice = json.loads(raw)["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _Later("its reply is no chat completion") from None
        if choice.get("finish_reason") == "length":
            raise JudgeError(f"the judge's reply was cut at {self.settings.max_tokens} tokens; raise 'max_tokens'")
        if not isinstance(content, str):
            raise _Later("its reply has no text")
        return content

    def _hidden(self, text: str) -> str:
        """`text` without the key, which some services quote."""
        return text.replace(self._key, "***") if self._key else text


class _Later(Exception):
    """A failure that may pass."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 0), 0.0), 3600.0)
    except ValueError:  # a date
        return 0.0


class _Local:
    """What belongs to one event loop."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.session: aiohttp.ClientSession | None = None
        self._places = asyncio.Semaphore(settings.max_concurrency)
        self._throttler = None
        if settings.rate_limit is not None:
            rate = settings.rate_limit
            interval = min(0.05, rate.period / 10)
            self._throttler = Throttler(rate_limit=rate.calls, period=rate.period, retry_interval=interval)
        self._in_order = asyncio.Lock()
        self._asked: dict[str, tuple[asyncio.Lock, int]] = {}

    def open_session(self) -> aiohttp.ClientSession:
        if self.session is None or self.session.closed:
            import aiohttp

            self.session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0)
            )
        return self.session

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        async with self._places:
            if self._throttler is not None:
                async with self._in_order:  # asyncio-throttle polls and keeps no order
                    await self._throttler.acquire()
            yield

    @asynccontextmanager
    async def alone(self, key: str) -> AsyncIterator[None]:
        """Only one asks the same at a time; the others find it in the cache."""
        lock, waiting = self._asked.get(key, (asyncio.Lock(), 0))
        self._asked[key] = (lock, waiting + 1)
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._asked.pop(key)
            if waiting > 1:
                self._asked[key] = (lock, waiting - 1)


class _Cache:
    def __init__(self, where: str | None) -> None:
        self._memory: OrderedDict[str, str] | None = OrderedDict() if where == "memory" else None
        self._folder = None if where is None or where == "memory" else Path(where).expanduser()

    async def get(self, key: str) -> str | None:
        if self._memory is not None:
            return self._memory.get(key)
        return None if self._folder is None else await asyncio.to_thread(self._read, key)

    async def put(self, key: str, reply: str) -> None:
        if self._memory is not None:
            self._memory[key] = reply
            if len(self._memory) > _MAX_CACHED:
                self._memory.popitem(last=False)
        elif self._folder is not None:
            await asyncio.to_thread(self._write, key, reply)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.json"

    def _read(self, key: str) -> str | None:
        try:
            reply = json.loads(self._path(key).read_text(encoding="utf-8"))["reply"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return reply if isinstance(reply, str) else None

    def _write(self, key: str, reply: str) -> None:
        path = self._path(key)
        own = path.with_name(f"{path.name}.{os.getpid()}.{random.randrange(1 << 30)}")
        with suppress(OSError):  # a full disk costs the cache, not the verdict
            path.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps({"reply": reply}), encoding="utf-8")
            os.replace(own, path)
