"""A search service with the interface of Search-R1's retrieval server.

`POST {"queries": [...], "topk": k, "return_scores": true}` is answered with
`{"result": [[{"document": {"contents": '"title"\\ntext'}, "score": 1.5}, ...], ...]}`, one list a query
(github.com/PeterGriffinJin/Search-R1, `search_r1/search/retrieval_server.py`). Documents without a score around them, and
with `title` and `text` of their own, are read too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import aiohttp

from agentloop.errors import ConfigError, ToolError, ToolInfraError
from agentloop.tools.clients import Clients
from agentloop.tools.search.corpus import title_and_text
from agentloop.tools.search.hits import Hit
from agentloop.tools.threads import run_blocking

_LONG = 200_000  # bytes from which an answer is parsed beside the event loop


class Refused(ToolError):
    """The service says that the query is wrong."""


@dataclass
class _Waiting:
    query: str
    answer: asyncio.Future[list[Hit]]


@dataclass
class _OneLoop:
    """What belongs to one event loop."""

    queues: dict[int, list[_Waiting]] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Retriever:
    """A client of one service. Queries of concurrent callers with the same `top_k` travel together."""

    def __init__(
        self, url: str, headers: Mapping[str, str], *, timeout_s: float, batch_size: int, batch_wait_s: float, max_bytes: int
    ) -> None:
        """`timeout_s`: for a query as a whole. `batch_wait_s`: how long a query waits for others. `ConfigError` for a URL that
        is none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"config.url: expected http://host:port/retrieve, got '{url}'")
        self._url = url
        self._headers = dict(headers)
        self._timeout_s = timeout_s
        self._batch_size = batch_size
        self._batch_wait_s = batch_wait_s
        self._max_bytes = max_bytes
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _OneLoop] = WeakKeyDictionary()
        self.clients = Clients(self._client)

    def _client(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        return aiohttp.ClientSession(timeout=timeout, headers=self._headers, cookie_jar=aiohttp.DummyCookieJar())

    def _here(self) -> _OneLoop:
        return self._loops.setdefault(asyncio.get_running_loop(), _OneLoop())

    async def search(self, query: str, top_k: int) -> list[Hit]:
        """The service's documents, best first, at most `top_k`.

        Raises `ToolInfraError` if the service cannot be reached, fails, or answers something else than it should;
        `TimeoutError` if it takes too long; `Refused` if it does not take the query.
        """
        here = self._here()
        waiting = _Waiting(query, asyncio.get_running_loop().create_future())
        queue = here.queues.setdefault(top_k, [])
        queue.append(waiting)
        if len(queue) >= self._batch_size:
            self._send(here, top_k)
        elif len(queue) == 1:
            asyncio.get_running_loop().call_later(self._batch_wait_s, self._send, here, top_k)
        async with asyncio.timeout(self._timeout_s):
            return await waiting.answer

    def _send(self, here: _OneLoop, top_k: int) -> None:
        batch = [waiting for waiting in here.queues.pop(top_k, []) if not waiting.answer.done()]
        if batch:
            task = asyncio.get_running_loop().create_task(self._ask_for(here, batch, top_k))
            here.tasks.add(task)
            task.add_done_callback(here.tasks.discard)
            for waiting in batch:
                waiting.answer.add_done_callback(lambda _: task.cancel() if all(w.answer.done() for w in batch) else None)

    async def _ask_for(self, here: _OneLoop, batch: list[_Waiting], top_k: int) -> None:
        try:
            answers = await self._ask([waiting.query for waiting in batch], top_k)
        except Refused as error:
            if len(batch) == 1:
                _fail(batch, error)
            else:  # one of them is wrong: each for itself
                await asyncio.gather(*(self._ask_for(here, [waiting], top_k) for waiting in batch))
        except Exception as error:
            _fail(batch, error)
        else:
            for waiting, hits in zip(batch, answers, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(hits)

    async def _ask(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        body = {"queries": queries, "topk": top_k, "return_scores": True}
        try:
            async with self.clients.get().post(self._url, json=body, allow_redirects=False) as response:
                data = bytearray()
                async for chunk in response.content.iter_any():
                    data += chunk
                    if len(data) > self._max_bytes:
                        raise ToolInfraError(f"the search service answered with more than {self._max_bytes} bytes")
                status = response.status
        except TimeoutError as error:
            raise TimeoutError(f"the search service did not answer within {self._timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ToolInfraError(f"the search service cannot be reached: {type(error).__name__}: {error}") from error
        if status in (400, 413, 422):
            raise Refused(f"Error: the search service refused the query (status {status}). Use a shorter, simpler query.")
        if status != 200:
            raise ToolInfraError(f"the search service answered with status {status}")
        if len(data) > _LONG:
            return await run_blocking(_read, data, len(queries), top_k)
        return _read(data, len(queries), top_k)


def _fail(batch: list[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)


def _read(data: bytes | bytearray, queries: int, top_k: int) -> list[list[Hit]]:
    try:
        lists = json.loads(data)["result"]
        if len(lists) != queries:
            raise ValueError(f"{len(lists)} lists for {queries} queries")
        return [[_hit(item) for item in found[:top_k]] for found in lists]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ToolInfraError(f"the search service answered something else than its interface: {error!r:.200}") from error


def _hit(item: Mapping[str, Any]) -> Hit:
    document = item.get("document", item)
    if isinstance(document, str):
        document = {"contents": document}
    score = float(item.get("score") or 0.0)
    identity = str(document.get("id") or document.get("docid") or "")
    text = document.get("text")
    if isinstance(text, str):
        return Hit(identity, str(document.get("title") or ""), text, score)
    title, rest = title_and_text(str(document["contents"]))
    return Hit(identity, title, rest, score) if rest else Hit(identity, "", title, score)
