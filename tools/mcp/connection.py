"""One session with an MCP server: opened when it is needed, opened again when it was lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx2
import mcp_types
from mcp import Client
from mcp.shared.exceptions import MCPError
from pydantic import ValidationError

from agentloop.errors import ToolError, ToolInfraError
from agentloop.tools.mcp import background
from agentloop.tools.mcp.config import HttpServer, ServerConfig, environment, executable
from agentloop.tools.mcp.http import http_transport
from agentloop.tools.mcp.stdio import TOO_LARGE, UNREADABLE, ServerLog, stdio_transport
from agentloop.tools.secrets import resolve

logger = logging.getLogger(__name__)

MAX_TOOLS = 128
PROBE_S = 5.0
"""How long a server that let a call time out may take to answer something simple."""
_STOP_S = 6.0

_starting = asyncio.Semaphore(max(4, os.cpu_count() or 1))
"""Servers that start at the same time: a batch of trajectories would start one each, and none would be ready in time."""

_LOST = (anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.EndOfStream, httpx2.HTTPError, OSError, RuntimeError)


@dataclass(eq=False)
class _Live:
    """One life of the session. Its task enters and leaves the SDK's contexts; others only call."""

    over: asyncio.Event = field(default_factory=asyncio.Event)
    client: Client | None = None
    task: asyncio.Task[None] | None = None


class Connection:
    """Every method runs in the background loop."""

    def __init__(self, server: ServerConfig, name: str) -> None:
        """`name`: how log messages call the server."""
        self._server = server
        self._name = name
        self._log = ServerLog(None if isinstance(server, HttpServer) else server.stderr)
        self._opening = asyncio.Lock()
        self._live: _Live | None = None
        self._probes: set[asyncio.Task[None]] = set()

    # -- life -----------------------------------------------------------------------------------------------------------

    async def _client(self) -> tuple[_Live, Client]:
        async with self._opening:
            if self._live is not None and not self._live.over.is_set():
                assert self._live.client is not None
                return self._live, self._live.client
            async with _starting:
                return await self._start()

    async def ready(self) -> None:
        """Waits until there is a session. Raises `ToolInfraError`."""
        await self._client()

    async def _start(self) -> tuple[_Live, Client]:
        live = _Live()
        ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        live.task = asyncio.create_task(self._own(live, ready))
        try:
            async with asyncio.timeout(self._server.start_timeout_s):
                live.client = await asyncio.shield(ready)
        except BaseException as error:
            live.task.cancel()
            await asyncio.wait({live.task}, timeout=_STOP_S)
            if ready.done() and not ready.cancelled():
                ready.exception()
            if isinstance(error, TimeoutError):
                raise self._failure(f"it did not start within {self._server.start_timeout_s:g} s") from error
            if isinstance(error, Exception):
                raise self._failure(f"it did not start: {_why(error)}") from error
            raise
        self._live = live
        background.close_at_exit(self)
        return live, live.client

    async def _own(self, live: _Live, ready: asyncio.Future[Client]) -> None:
        try:
            # cache=None: nothing is answered from memory
            async with Client(self._transport(live), cache=None) as client:
                if not ready.done():
                    ready.set_result(client)
                await live.over.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            elif not live.over.is_set():
                logger.warning("MCP server '%s': the session broke: %s", self._name, _why(error))
        finally:
            live.over.set()

    def _transport(self, live: _Live) -> Any:
        server = self._server
        if isinstance(server, HttpServer):
            headers, _ = resolve(server.headers, "config.headers")
            return http_transport(server.url, headers=headers, max_message_bytes=server.max_message_bytes)

        def ended() -> None:
            if live.client is not None and not live.over.is_set():
                logger.warning("MCP server '%s' went away%s", self._name, self._said())
            live.over.set()

        return stdio_transport(
            [executable(server) or server.command, *server.args],
            env=environment(server),
            cwd=server.cwd,
            log=self._log,
            max_message_bytes=server.max_message_bytes,
            ended=ended,
        )

    async def close(self) -> None:
        """Ends the session, and a server that it started. It can be used again."""
        background.closed(self)
        for probe in self._probes:
            probe.cancel()
        async with self._opening:  # a start that is being given up takes its server with it first
            live, self._live = self._live, None
        if live is not None and live.task is not None:
            live.over.set()
            await asyncio.wait({live.task}, timeout=_STOP_S)
            live.task.cancel()

    def _failure(self, problem: str) -> ToolInfraError:
        """What the server said goes into a note: logs show it, and a model does not."""
        error = ToolInfraError(problem)
        if tail := self._log.tail():
            error.add_note(f"its last words:\n{tail}")
        return error

    def _said(self) -> str:
        tail = self._log.tail()
        return f"; its last words:\n{tail}" if tail else ""

    # -- requests -------------------------------------------------------------------------------------------------------

    async def tools(self) -> list[mcp_types.Tool]:
        """All tools of the server. Raises `ToolInfraError`."""
        _, client = await self._client()
        found: list[mcp_types.Tool] = []
        try:
            async with asyncio.timeout(self._server.start_timeout_s):
                cursor = None
                while True:
                    page = await client.list_tools(cursor=cursor)
                    found += page.tools
                    cursor = page.next_cursor
                    if cursor is None or len(found) > MAX_TOOLS:
                        return found
        except (TimeoutError, MCPError, ValidationError, *_LOST) as error:
            raise self._failure(f"it did not list its tools: {_why(error)}") from error

    async def call(self, tool: str, arguments: dict[str, Any]) -> mcp_types.CallToolResult:
        """Raises `ToolError` with what the server has against the call, `TimeoutError`, and `ToolInfraError` if the server is
        gone, cannot be started or does not speak MCP."""
        live, client = await self._client()
        params = mcp_types.CallToolRequestParams(name=tool, arguments=arguments)
        try:
            async with asyncio.timeout(self._server.call_timeout_s):
                # Not `call_tool`: that checks the answer against a schema of the server's, with regular expressions of its.
                return await client.session.send_request(mcp_types.CallToolRequest(params=params), mcp_types.CallToolResult)
        except TimeoutError as error:
            self._suspect(live, client)
            raise TimeoutError(f"no answer within {self._server.call_timeout_s:g} s") from error
        except asyncio.CancelledError:
            self._suspect(live, client)
            raise
        except MCPError as error:
            raise self._judge(live, error) from error
        except ValidationError as error:
            raise ToolInfraError(f"the answer is not what MCP says: {_why(error)}") from error
        except _LOST as error:
            live.over.set()
            raise ToolInfraError(f"the connection was lost: {_why(error)}") from error

    def _judge(self, live: _Live, error: MCPError) -> ToolError:
        # The SDK's words: -32000 (`CONNECTION_CLOSED`) alone is what servers use for errors of their own.
        ended = {(mcp_types.CONNECTION_CLOSED, "Connection closed"), (mcp_types.INVALID_REQUEST, "Session terminated")}
        lost = live.over.is_set() or (error.code, error.message) in ended
        if lost:
            live.over.set()
            return ToolInfraError(f"the connection was lost: {error.message}")
        if isinstance(self._server, HttpServer) and error.message == "Server returned an error response":  # the SDK's words
            live.over.set()
            return ToolInfraError("the server answered with an HTTP error")
        if error.code == TOO_LARGE or "the answer is larger than" in error.message:
            return ToolError(f"Error: the answer is larger than {self._server.max_message_bytes} bytes. Ask for less.")
        if error.code == UNREADABLE:
            return ToolInfraError(error.message)
        return ToolError(f"Error: {error.message}")

    def _suspect(self, live: _Live, client: Client) -> None:
        """A server that hangs is given up, so that the next call finds a new one; one that is only slow is kept."""

        async def probe() -> None:
            try:
                async with asyncio.timeout(PROBE_S):
                    await client.list_tools(cache_mode="bypass")
            except (TimeoutError, MCPError, ValidationError, *_LOST):
                if not live.over.is_set():
                    logger.warning("MCP server '%s' hangs and is given up%s", self._name, self._said())
                live.over.set()

        if not live.over.is_set():
            task = asyncio.create_task(probe())
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)


def _why(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    if isinstance(error, ValidationError):
        return f"{error.error_count()} fields are wrong"
    with contextlib.suppress(Exception):
        if text := str(error):
            return text.splitlines()[0][:300]
    return type(error).__name__
