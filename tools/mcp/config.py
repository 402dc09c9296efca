"""What a tools file says about an MCP server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from agentloop.config import Strict, validate
from agentloop.errors import ConfigError, nearest
from agentloop.tools.secrets import Setting, resolve


class _Server(Strict):
    scope: Literal["trajectory", "process"] = "trajectory"
    """`trajectory`: a session (with stdio: a server) for each trajectory that calls one of its tools. `process`: one for all
    trajectories of a process, for servers that keep nothing from call to call."""
    include: list[str] | None = None
    """The server's tools that are imported, by the server's names; by default all."""
    exclude: list[str] = Field(default_factory=list)
    prefix: str = ""
    """Put before the tools' names."""
    rename: dict[str, str] = Field(default_factory=dict)
    """From the server's name to the one that the model sees; without the prefix."""
    start_timeout_s: float = Field(30.0, gt=0)
    """For starting the server and the protocol's first messages."""
    call_timeout_s: float = Field(60.0, gt=0)
    """For one call. A server that is silent after it is probed, and started anew if it stays so."""
    max_output_chars: int = Field(20_000, ge=100)
    """A longer answer loses its middle."""
    max_message_bytes: int = Field(1_000_000, ge=1000)
    """A longer message of the server is thrown away as it is read; the model is told."""


class StdioServer(_Server):
    command: str
    args: list[str] = Field(default_factory=list)
    env: dict[str, Setting] = Field(default_factory=dict)
    """The server's environment: this, what `inherit_env` names, and nothing else."""
    inherit_env: list[str] = Field(default_factory=list)
    """Variables that are handed on where they are set, such as `PATH` and `HOME`."""
    cwd: Path | None = None
    stderr: Path | None = None
    """A file to which the server's standard error is appended (its first 10 MB). The last lines are logged in any case when
    the server is lost."""


class HttpServer(_Server):
    url: str
    """The streamable HTTP endpoint."""
    headers: dict[str, Setting] = Field(default_factory=dict)


ServerConfig = StdioServer | HttpServer


def read_config(given: Mapping[str, Any]) -> ServerConfig:
    """`ConfigError` for whatever is wrong without asking the server."""
    if ("command" in given) == ("url" in given):
        unknown = [key for key in given if key not in {*StdioServer.model_fields, *HttpServer.model_fields}]
        if unknown:
            raise ConfigError(f"unknown key 'config.{unknown[0]}'; {nearest(unknown[0], ['command', 'url'])}")
        both = ", not both" if "url" in given else ""
        raise ConfigError(f"config: give either 'command' (a server to start) or 'url' (one that runs){both}")
    if "url" in given:
        http = validate(HttpServer, given, "config")
        parts = urlsplit(http.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"config.url: expected http://host:port/mcp, got '{http.url}'")
        resolve(http.headers, "config.headers")
        return http
    stdio = validate(StdioServer, given, "config")
    if executable(stdio) is None:
        raise ConfigError(f"config.command: there is no program '{stdio.command}'")
    if stdio.cwd is not None and not stdio.cwd.is_dir():
        raise ConfigError(f"config.cwd: {stdio.cwd}: no such folder")
    resolve(stdio.env, "config.env")
    return stdio


def executable(server: StdioServer) -> str | None:
    """The program's path, looked up in our own `PATH` (the server may not have one)."""
    return shutil.which(server.command)


def environment(server: StdioServer) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in server.inherit_env if name in os.environ}
    return {**inherited, **resolve(server.env, "config.env")[0]}
