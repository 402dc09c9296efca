"""`calculator`: exact arithmetic for a model.

Nothing that the model writes is evaluated as code: `tools/expression.py` has a parser of its own and builds sympy numbers,
within bounds on length, depth, digits and steps that keep any input under a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from agentloop.errors import ConfigError, nearest
from agentloop.tools.base import BaseTool, ToolResult
from agentloop.tools.expression import ExpressionError, calculate
from agentloop.tools.threads import run_blocking


class Calculator(BaseTool):
    """Evaluates an arithmetic expression exactly."""

    name = "calculator"
    description = (
        "Evaluate an arithmetic expression exactly. Operators: + - * / // % ** and parentheses. Functions: sqrt, abs, min, "
        "max, round, floor, ceil, gcd, lcm, factorial, exp, log(x, base), ln, log2, log10, sin, cos, tan. Constants: pi, e."
    )

    class Arguments(BaseModel):
        expression: str = Field(description="The expression, for example (12 + 7) * 3 / 4")

    def __init__(self, config: Mapping[str, Any] | None = None, tool_schema: Any = None) -> None:
        for key in config or {}:
            if key != "type":
                raise ConfigError(f"unknown key 'config.{key}'; {nearest(key, ['type'])}")
        super().__init__(config, tool_schema)
        calculate("sqrt(2)")  # imports sympy now, not in the first trajectory

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
        try:
            return ToolResult(await run_blocking(calculate, parameters["expression"]))
        except ExpressionError as error:
            return ToolResult(f"Error: {error}", error=True)
