"""Tools that need something to ask: a corpus, an HTTP service, an MCP server; each made with one at hand."""

from __future__ import annotations

import functools
import http.server
import json
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from agentloop.tools.http_tool import HttpTool
from agentloop.tools.search import Search


@functools.cache
def _folder() -> Path:
    """For as long as the tests run."""
    folder = tempfile.TemporaryDirectory(prefix="agentloop-tests-")
    _kept.append(folder)
    (Path(folder.name) / "corpus").mkdir()
    (Path(folder.name) / "corpus" / "saturn.txt").write_text("Saturn has rings.")
    return Path(folder.name)


_kept: list[Any] = []


def search() -> Search:
    return Search({"corpus": str(_folder() / "corpus"), "cache": str(_folder() / "cache")})


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self.wfile.write(b"42")

    def log_message(self, *args: Any) -> None:
        return


@functools.cache
def _port() -> int:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def http_tool() -> HttpTool:
    parameter = {"name": "question", "in": "query", "required": True, "schema": {"type": "string"}}
    operation = {"operationId": "ask", "parameters": [parameter], "responses": {}}
    spec = {"openapi": "3.1.0", "servers": [{"url": f"http://127.0.0.1:{_port()}"}], "paths": {"/": {"get": operation}}}
    (_folder() / "spec.json").write_text(json.dumps(spec))
    config = {"spec": str(_folder() / "spec.json"), "operation": "ask", "allowed_hosts": [f"127.0.0.1:{_port()}"]}
    return HttpTool(config)


def mcp() -> Any:
    pytest.importorskip("mcp", reason="mcp is not installed")
    from agentloop.tools.mcp import McpServer

    server = str(Path(__file__).parent / "mcp_plain.py")
    config = {"command": sys.executable, "args": [server], "scope": "process", "include": ["echo"]}
    return McpServer(config).tools[0]
