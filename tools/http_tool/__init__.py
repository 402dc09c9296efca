"""`http_tool`: an operation of an OpenAPI document as a tool."""

from agentloop.tools.http_tool.tool import HttpTool

__all__ = ["HttpTool"]
