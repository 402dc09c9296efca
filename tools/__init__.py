"""Tools: what the model can call, and the policies under which it does."""

from agentloop.tools.base import BaseTool, InvalidArguments, ToolResponse, ToolResult, ToolSchema, ToolSet
from agentloop.tools.function import FunctionTool, load_function_file, tool
from agentloop.tools.policy import CircuitBreaker, RateLimit, ToolPolicy
from agentloop.tools.registry import ToolRegistry
from agentloop.tools.session import ToolSession, ToolSessions
from agentloop.tools.threads import queueing, run_blocking

__all__ = [
    "BaseTool",
    "CircuitBreaker",
    "FunctionTool",
    "InvalidArguments",
    "RateLimit",
    "ToolPolicy",
    "ToolRegistry",
    "ToolResponse",
    "ToolResult",
    "ToolSchema",
    "ToolSession",
    "ToolSessions",
    "ToolSet",
    "load_function_file",
    "queueing",
    "run_blocking",
    "tool",
]
