"""`mcp`: the tools of an MCP server as tools of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import mcp_types

from agentloop.errors import ConfigError, ToolError, ToolInfraError, nearest
from agentloop.tools.base import BaseTool, ToolResult, ToolSet
from agentloop.tools.mcp.background import away, submit
from agentloop.tools.mcp.config import HttpServer, ServerConfig, read_config
from agentloop.tools.mcp.connection import MAX_TOOLS, Connection
from agentloop.tools.mcp.schema import import_schema
from agentloop.tools.names import NAME
from agentloop.tools.secrets import redact, resolve
from agentloop.tools.session import current_session
from agentloop.tools.threads import queueing


class McpServer(ToolSet):
    """The tools of one server. Starts it once to learn them; with `scope: process` it then stays."""

    def __init__(self, config: Mapping[str, Any] | None = None, tool_schema: Any = None) -> None:
        """Blocks until the server has listed its tools. `ConfigError` if it does not, or lists what cannot be used."""
        self._config = read_config({key: value for key, value in (config or {}).items() if key != "type"})
        self._sessions = _Sessions(self._config)
        self.tools = [McpTool(self._sessions, *found) for found in _import(self._config, self._listed())]

    def _listed(self) -> list[mcp_types.Tool]:
        async def listed() -> list[mcp_types.Tool]:
            connection = self._sessions.shared
            try:
                return await connection.tools()
            finally:
                if self._config.scope == "trajectory":
                    await connection.close()

        try:
            return submit(listed()).result()
        except ToolInfraError as error:
            said = "\n".join(getattr(error, "__notes__", [])).splitlines()[-1:]
            last = f"; its last words: {said[0].strip()}" if said else ""
            raise ConfigError(f"the MCP server {_label(self._config)} cannot be used: {error}{last}") from error


class McpTool(BaseTool):
    """One tool of a server."""

    def __init__(self, sessions: _Sessions, name: str, schema: dict[str, Any]) -> None:
        """`name` is the server's; the model's is in `schema`."""
        super().__init__(tool_schema=schema)
        self._sessions = sessions
        self._remote_name = name

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> None:
        assert instance_id is not None
        key = current_session.get() or instance_id
        self.instances[instance_id] = key
        self._sessions.enter(key)

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
        connection = self._sessions.of(self.instances[instance_id])
        try:
            with queueing():  # a start has a limit of its own, and waits for those of other trajectories
                await away(connection.ready())
            result = await away(connection.call(self._remote_name, parameters))
        except ToolError as error:
            raise type(error)(self._readable(str(error))) from error
        text = self._readable(_as_text(result))
        if result.is_error:
            return ToolResult(text or "Error: the tool failed and did not say why.", error=True)
        return ToolResult(text)

    def _readable(self, text: str) -> str:
        return _shorten(redact(text, self._sessions.hidden), self._sessions.config.max_output_chars)

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        if (key := self.instances.pop(instance_id, None)) is not None:
            await self._sessions.leave(key)

    async def close(self) -> None:
        await away(self._sessions.shared.close())


class _Sessions:
    """The sessions of a server by trajectory: the same one for all of its tools in one trajectory."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        settings = config.headers if isinstance(config, HttpServer) else config.env
        self.hidden = resolve(settings, "config")[1]
        """Secrets that the server knows from us, and that the model is not to read."""
        self.shared = Connection(config, _label(config))
        self._own: dict[str, tuple[Connection, int]] = {}
        """By trajectory: its connection, and how many tools it is created for."""

    def enter(self, key: str) -> None:
        if self.config.scope == "trajectory":
            connection, users = self._own.get(key) or (Connection(self.config, _label(self.config)), 0)
            self._own[key] = connection, users + 1

    def of(self, key: str) -> Connection:
        return self._own[key][0] if self.config.scope == "trajectory" else self.shared

    async def leave(self, key: str) -> None:
        if self.config.scope != "trajectory":
            return
        connection, users = self._own.pop(key)
        if users > 1:
            self._own[key] = connection, users - 1
        else:
            await away(connection.close())


def _label(config: ServerConfig) -> str:
    return config.url if isinstance(config, HttpServer) else " ".join([config.command, *config.args])[:100]


def _import(config: ServerConfig, listed: list[mcp_types.Tool]) -> list[tuple[str, dict[str, Any]]]:
    """(the server's name, our schema) of every tool that is wanted."""
    known = [tool.name for tool in listed]
    if len(known) > MAX_TOOLS:
        raise ConfigError(f"the MCP server {_label(config)} has more than {MAX_TOOLS} tools")
    for key, names in (("include", config.include or []), ("exclude", config.exclude), ("rename", list(config.rename))):
        for name in names:
            if name not in known:
                raise ConfigError(f"config.{key}: the MCP server has no tool '{name}'; {nearest(name, known)}")
    found = []
    for tool in listed:
        if tool.name in config.exclude or (config.include is not None and tool.name not in config.include):
            continue
        name = config.rename.get(tool.name, config.prefix + tool.name)
        where = f"the MCP server's tool '{tool.name[:80]}'"
        if not NAME.fullmatch(name):
            raise ConfigError(f"{where}: '{name[:80]}' cannot be a tool's name; give it one with 'rename', or use 'exclude'")
        try:
            found.append((tool.name, import_schema(name, tool.description, tool.input_schema)))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    if not found:
        raise ConfigError(f"the MCP server {_label(config)} has no tools" + (" that are not left out" if known else ""))
    return found


def _as_text(result: mcp_types.CallToolResult) -> str:
    """What a model can read of an answer. Nothing that it links to is fetched."""
    parts = [_block(block) for block in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(parts)


def _block(block: mcp_types.ContentBlock) -> str:
    if isinstance(block, mcp_types.TextContent):
        return block.text
    if isinstance(block, mcp_types.ResourceLink):
        return f"[a link, not followed: {block.name} {block.uri}]"
    if isinstance(block, mcp_types.EmbeddedResource):
        if isinstance(block.resource, mcp_types.TextResourceContents):
            return block.resource.text
        return f"[left out: {block.resource.mime_type or 'binary data'}]"
    return f"[left out: {block.type} {block.mime_type}]"


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}\n[… {len(text) - 2 * head} characters left out …]\n{text[-head:]}"
