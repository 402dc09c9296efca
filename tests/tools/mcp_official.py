"""A server made with the official SDK: `python mcp_official.py`, or `python mcp_official.py PORT` for streamable HTTP."""

from __future__ import annotations

import os
import sys

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("stock")
_stock = {"apple": 3}


@server.tool()
def take(what: str, amount: int = 1) -> dict[str, int]:
    """Take something from the stock."""
    if what not in _stock:
        raise ToolError(f"there is no {what}")
    _stock[what] -= amount
    return {"left": _stock[what]}


@server.tool()
def large(size: int) -> str:
    """A long text."""
    return "x" * size


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run(transport="streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
