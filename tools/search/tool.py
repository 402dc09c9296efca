"""`search`: documents for a query, from a local corpus (BM25) or from a search service."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from agentloop.config import Strict, validate
from agentloop.errors import ConfigError, nearest
from agentloop.tools.base import BaseTool, InvalidArguments, ToolResult
from agentloop.tools.schema import of_model
from agentloop.tools.search.build import Build, default_cache
from agentloop.tools.search.corpus import Columns
from agentloop.tools.search.hits import Hit, as_text
from agentloop.tools.search.index import words
from agentloop.tools.search.retriever import Refused, Retriever
from agentloop.tools.secrets import Setting, redact, resolve
from agentloop.tools.threads import run_blocking

MAX_QUERY_CHARS = 1000


class _Answers(Strict):
    """What both kinds of search have in common."""

    top_k: int = Field(3, ge=1, le=100)
    """Documents in an answer where the model does not say how many."""
    max_top_k: int = Field(10, ge=1, le=100)
    """The most that the model may ask for."""
    snippet_chars: int = Field(800, ge=50, le=100_000)
    """Characters of each document that the model is shown."""


class LocalConfig(_Answers):
    corpus: Path
    """A file, or a folder: `.txt`, `.md` (a document each), `.jsonl`, `.parquet` (a document a row)."""
    columns: Columns = Columns()
    cache: Path | None = None
    """Where indexes are kept; by default `~/.cache/agentloop/search`."""


class ServiceConfig(_Answers):
    url: str
    """Of a service with the interface of Search-R1's retrieval server."""
    headers: dict[str, Setting] = Field(default_factory=dict)
    timeout_s: float = Field(20.0, gt=0)
    batch_size: int = Field(32, ge=1)
    """Queries of concurrent calls that are sent in one request."""
    batch_wait_s: float = Field(0.005, ge=0)
    """How long a query waits for others to travel with."""
    max_response_bytes: int = Field(8_000_000, ge=1)


class Search(BaseTool):
    """Search a collection of documents; the answer shows the best matches."""

    name = "search"

    class Arguments(BaseModel):
        query: str = Field(description="What to look for: a few words.", max_length=MAX_QUERY_CHARS)
        top_k: int = Field(3, description="How many documents to show.", ge=1)

    def __init__(self, config: Mapping[str, Any] | None = None, tool_schema: Any = None) -> None:
        """Begins to build the index if the cache does not have it, and waits for it; not where an event loop runs: there
        the first `create` waits."""
        given = {key: value for key, value in (config or {}).items() if key != "type"}
        self._settings = _settings(given)
        self._build: Build | None = None
        self._service: Retriever | None = None
        self._hidden: tuple[str, ...] = ()
        if isinstance(self._settings, ServiceConfig):
            headers, self._hidden = resolve(self._settings.headers, "config.headers")
            self._service = Retriever(
                self._settings.url,
                headers,
                timeout_s=self._settings.timeout_s,
                batch_size=self._settings.batch_size,
                batch_wait_s=self._settings.batch_wait_s,
                max_bytes=self._settings.max_response_bytes,
            )
        super().__init__(config, tool_schema)
        if isinstance(self._settings, LocalConfig):
            self._build = Build(self._settings.corpus, self._settings.columns, self._settings.cache or default_cache())
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                self._build.index()

    def get_openai_tool_schema(self) -> Any:
        parameters = of_model(self.Arguments)
        parameters["properties"]["top_k"].update(maximum=self._settings.max_top_k, default=self._settings.top_k)
        description = " ".join((type(self).__doc__ or "").split())
        return {"type": "function", "function": {"name": self.name, "description": description, "parameters": parameters}}

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> None:
        if self._build is not None:
            await run_blocking(self._build.index)
        elif self._service is not None:
            assert instance_id is not None
            self.instances[instance_id] = True
            self._service.clients.enter()

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
        query = str(parameters.get("query", ""))[:MAX_QUERY_CHARS]
        if not words(query):
            raise InvalidArguments("argument 'query' holds no word to search for")
        top_k = min(max(1, int(parameters.get("top_k", self._settings.top_k))), self._settings.max_top_k)
        if self._service is not None:
            try:
                hits = await self._service.search(query, top_k)
            except Refused as error:
                return ToolResult(str(error), error=True)
            text = redact(as_text(hits, query, self._settings.snippet_chars), self._hidden)
        else:
            hits, text = await run_blocking(self._search, query, top_k)
        return ToolResult(text, metrics={"hits": len(hits)})

    def _search(self, query: str, top_k: int) -> tuple[list[Hit], str]:
        assert self._build is not None
        hits = self._build.index().search(query, top_k)
        return hits, as_text(hits, query, self._settings.snippet_chars)

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        if self.instances.pop(instance_id, None) and self._service is not None:
            await self._service.clients.leave()


def _settings(given: Mapping[str, Any]) -> LocalConfig | ServiceConfig:
    if ("corpus" in given) == ("url" in given):
        unknown = [key for key in given if key not in {*LocalConfig.model_fields, *ServiceConfig.model_fields}]
        if unknown:
            raise ConfigError(f"unknown key 'config.{unknown[0]}'; {nearest(unknown[0], ['corpus', 'url'])}")
        both = ", not both" if "url" in given else ""
        raise ConfigError(f"config: give either 'corpus' (a folder) or 'url' (a search service){both}")
    settings: LocalConfig | ServiceConfig
    settings = validate(LocalConfig, given, "config") if "corpus" in given else validate(ServiceConfig, given, "config")
    if settings.top_k > settings.max_top_k:
        raise ConfigError(f"config: top_k ({settings.top_k}) is more than max_top_k ({settings.max_top_k})")
    return settings
