"""`mcp`: the tools of an MCP server, over stdio or streamable HTTP, by the official SDK."""

from agentloop.tools.mcp.server import McpServer, McpTool

__all__ = ["McpServer", "McpTool"]
