"""`http_tool`: an operation of an HTTP service, described by an OpenAPI document, as a tool."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, urljoin

import aiohttp
from pydantic import Field
from yarl import URL

from agentloop.config import Strict, validate
from agentloop.errors import ConfigError, ToolInfraError, nearest
from agentloop.tools.base import BaseTool, ToolResult, ToolSchema
from agentloop.tools.clients import Clients
from agentloop.tools.http_tool.guard import AddressRefused, GuardedResolver, Hosts, NotAllowed
from agentloop.tools.http_tool.request import Request, build_request
from agentloop.tools.http_tool.spec import FORBIDDEN_HEADERS, Operation, read_operation
from agentloop.tools.names import NAME
from agentloop.tools.secrets import FromEnvironment, Setting, redact, resolve

MAX_REDIRECTS = 3
_SLOW = {"punycode", "idna", "unicode_escape", "raw_unicode_escape"}  # Python's, of no service, and up to quadratic
_MAX_DESCRIPTION = 1000
_MAX_ERROR = 2000  # characters of an error's body
_OURS = {"401", "407", "408", "425", "429"}
"""Of 4xx, those that a better call would not mend: credentials, and «not now»."""


class HttpToolConfig(Strict):
    spec: Path
    """The OpenAPI document, JSON or YAML, version 3.0 or 3.1."""
    operation: str
    """Which of its operations: the `operationId`."""
    allowed_hosts: list[str]
    """Hosts that may be reached: `api.example.com` or `api.example.com:8443`, exactly. The document's own is not allowed by
    itself."""
    allowed_networks: list[str] = Field(default_factory=list)
    """Addresses that are not public and may be reached all the same: `10.0.0.0/8`."""
    server: str | None = None
    """In place of the document's first server."""
    name: str | None = None
    """The tool's name; by default the `operationId`."""
    description: str | None = None
    """In place of the document's."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Arguments that the model neither sees nor sets, by name; `{env: NAME}` for what is secret."""
    headers: dict[str, Setting] = Field(default_factory=dict)
    """Sent with every request; `{env: NAME}` for what is secret."""
    query: dict[str, Setting] = Field(default_factory=dict)
    """The same in the URL's query."""
    timeout_s: float = Field(20.0, gt=0)
    """For the whole request, redirects included."""
    max_response_bytes: int = Field(50_000, ge=1)
    """What is longer is cut off while it is read."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    kind: str
    """Its content type."""
    body: bytes
    cut: bool
    """There was more."""
    target: str | None
    """Where it redirects to."""


class HttpTool(BaseTool):
    """One operation of a service."""

    def __init__(self, config: Mapping[str, Any] | None = None, tool_schema: Any = None) -> None:
        """Reads the document; nothing is sent. `ConfigError` for all that is wrong."""
        given = {key: value for key, value in (config or {}).items() if key != "type"}
        settings = validate(HttpToolConfig, given, "config")
        self._settings = settings
        self._operation = read_operation(settings.spec, settings.operation, settings.server)
        self._hosts = Hosts(settings.allowed_hosts, settings.allowed_networks)
        _check_server(self._hosts, self._operation)
        for name in settings.headers:
            if name.lower() in FORBIDDEN_HEADERS:
                raise ConfigError(f"config.headers: '{name}' is set by the client itself")
        self._headers, hidden_headers = resolve(settings.headers, "config.headers")
        self._query, hidden_query = resolve(settings.query, "config.query")
        self._fixed, hidden_fixed = _fixed(settings, self._operation)
        self._hidden = _forms((*hidden_headers, *hidden_query, *hidden_fixed))
        super().__init__(config, tool_schema)
        if tool_schema is not None:
            _check_schema(self.tool_schema, self._operation, self._fixed)
        self._clients = Clients(self._client)

    def get_openai_tool_schema(self) -> Any:
        name = self._settings.name or self._operation.id
        if not NAME.fullmatch(name):
            key = "config.name: " if self._settings.name else ""
            raise ConfigError(f"{key}'{name}' cannot be a tool's name (letters, digits, _ and -); set config.name")
        description = self._settings.description or self._operation.description
        if len(description) > _MAX_DESCRIPTION:
            description = description[: _MAX_DESCRIPTION - 1] + "…"
        parameters = self._operation.arguments_schema({**self._fixed, **dict.fromkeys(self._query)})
        return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}

    def _client(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(resolver=GuardedResolver(self._hosts), use_dns_cache=False)
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> None:
        assert instance_id is not None
        self.instances[instance_id] = True
        self._clients.enter()

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        if self.instances.pop(instance_id, None):
            await self._clients.leave()

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
        given = {key: value for key, value in parameters.items() if key not in self._fixed}
        request = build_request(self._operation, {**given, **self._fixed}, self._query, self._headers)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await self._exchange(request)
        # «from None»: the client's own errors may name the URL with what is secret in it
        except NotAllowed as error:
            return ToolResult(f"Error: the service sends the request elsewhere, which is not followed: {error}", error=True)
        except TimeoutError:
            raise TimeoutError(f"no answer within {self._settings.timeout_s:g} s") from None
        except (AddressRefused, aiohttp.ClientError, OSError, ValueError) as error:
            problem = redact(f"{type(error).__name__}: {error}", self._hidden)
            raise ToolInfraError(f"the service cannot be reached: {problem}") from None
        status, body = answer.status, answer.body
        if status >= 500 or str(status) in _OURS:
            raise ToolInfraError(f"the service answered with status {status}")
        text = redact(_text(answer.kind, body), self._hidden, cut=answer.cut)
        if answer.cut:
            text += f"\n[… the answer is longer than {self._settings.max_response_bytes} bytes; the rest was left out …]"
        metrics = {"status": float(status), "bytes": float(len(body))}
        if status >= 300:
            if len(text) > _MAX_ERROR:
                text = text[:_MAX_ERROR] + "…"
            return ToolResult(f"Error: {_status(status)}\n{text}".strip(), error=True, metrics=metrics)
        return ToolResult(text or f"Done: {_status(status)}, no content.", metrics=metrics)

    async def _exchange(self, request: Request) -> _Answer:
        """The answer, after redirects within `allowed_hosts`; `NotAllowed` for one that is not followed."""
        answer = await self._ask(request)
        for _ in range(MAX_REDIRECTS):
            if answer.target is None:
                return answer
            request = _redirected(request, answer)
            self._hosts.check(URL(request.url, encoded=True))
            answer = await self._ask(request)
        if answer.target is not None:
            raise NotAllowed(f"more than {MAX_REDIRECTS} redirects")
        return answer

    async def _ask(self, request: Request) -> _Answer:
        headers = {**request.headers, "Accept-Encoding": "identity"}  # a compressed answer would be cut before it grows
        url = URL(request.url, encoded=True)
        asked = self._clients.get().request(request.method, url, headers=headers, data=request.body, allow_redirects=False)
        async with asked as response:
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise ValueError("the answer is compressed, which was not asked for")
            body, cut = await _read(response, self._settings.max_response_bytes)
            target = response.headers.get("Location") if response.status in (301, 302, 303, 307, 308) else None
            return _Answer(response.status, response.headers.get("Content-Type", ""), body, cut, target)


def _redirected(request: Request, answer: _Answer) -> Request:
    if request.method not in ("GET", "HEAD"):
        raise NotAllowed(f"status {answer.status} for a {request.method}")
    url = str(URL(urljoin(request.url, answer.target or "")))
    if _origin(url) == _origin(request.url):
        return Request(request.method, url, request.headers, request.body)
    if request.url.startswith("https:") and not url.startswith("https:"):
        raise NotAllowed("from https:// to http://")
    return Request(request.method, url)  # what was meant for one host is no other's


async def _read(response: aiohttp.ClientResponse, limit: int) -> tuple[bytes, bool]:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > limit:
            response.close()  # the rest is not waited for
            return bytes(data[:limit]), True
    return bytes(data), False


def _text(content_type: str, body: bytes) -> str:
    kind, _, rest = content_type.lower().partition(";")
    kind = kind.strip()
    charset = rest.partition("charset=")[2].partition(";")[0].strip(' "') or "utf-8"
    textual = kind.startswith("text/") or kind.endswith(("json", "xml", "yaml", "javascript", "x-www-form-urlencoded", "csv"))
    if not textual and (kind or b"\0" in body):
        return f"[the answer is no text: {kind or 'binary data'}, {len(body)} bytes]" if body else ""
    if charset.replace("-", "_") in _SLOW:
        charset = "utf-8"
    try:
        return body.decode(charset, errors="replace").strip()
    except (LookupError, UnicodeError):
        return body.decode(errors="replace").strip()


def _status(status: int) -> str:
    try:
        return f"status {status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"status {status}"


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = URL(url)
    return parts.scheme, parts.host, parts.port


def _forms(secrets: tuple[str, ...]) -> tuple[str, ...]:
    """The secrets, also as a URL and as JSON have them."""
    ways = (str, quote, quote_plus, lambda secret: quote(secret, safe=""), lambda secret: json.dumps(secret)[1:-1])
    return tuple({way(secret) for secret in secrets for way in ways})


def _check_server(hosts: Hosts, operation: Operation) -> None:
    try:
        hosts.check(URL(operation.server))
    except (NotAllowed, ValueError) as error:
        raise ConfigError(f"config.allowed_hosts: the service's host {error}") from error


def _fixed(settings: HttpToolConfig, operation: Operation) -> tuple[dict[str, Any], tuple[str, ...]]:
    known = [parameter.argument for parameter in operation.parameters]
    for name in settings.fixed:
        if name not in known:
            raise ConfigError(f"config.fixed: the operation has no argument '{name}'; {nearest(name, known)}")
    secret: dict[str, Setting] = {
        name: validate(FromEnvironment, value, f"config.fixed.{name}")
        for name, value in settings.fixed.items()
        if isinstance(value, Mapping) and "env" in value
    }
    values, hidden = resolve(secret, "config.fixed")
    return {**settings.fixed, **values}, hidden


def _check_schema(schema: ToolSchema, operation: Operation, fixed: Mapping[str, Any]) -> None:
    known = {parameter.argument: parameter for parameter in operation.parameters if parameter.argument not in fixed}
    where = "key 'tool_schema.function.parameters"
    for name in schema.function.parameters.properties:
        if name not in known:
            raise ConfigError(f"{where}.properties': the operation has no argument '{name}'; {nearest(name, known)}")
    for name, parameter in known.items():
        if parameter.required and name not in schema.function.parameters.required:
            raise ConfigError(f"{where}.required': the operation needs '{name}'; list it, or set it in config.fixed")
