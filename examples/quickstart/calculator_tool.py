"""The quickstart's calculator: one operation on two whole numbers per call."""

from __future__ import annotations

import re
from typing import Any

from agentloop.tools.base import BaseTool, ToolResult
from examples.quickstart.task import APPLY

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "One operation on two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "such as a + b, a - b or a * b"}},
            "required": ["expression"],
        },
    },
}
"""Part of every prompt, and the tokenizer spells it in two tokens: the model has to be made anew if it changes."""

OPERATION = re.compile(r"\s*(-?\d{1,9})\s*([-+*])\s*(-?\d{1,9})\s*", re.ASCII)
REFUSAL = "Error: one operation on two numbers per call."
"""Never repeats what the model wrote, so a call cannot place text in its answer."""


def calculate(expression: str) -> int | None:
    """The result of `a + b`, `a - b` or `a * b` on whole numbers; `None` for anything else."""
    match = OPERATION.fullmatch(expression)
    if match is None:
        return None
    left, operator, right = match.groups()
    return APPLY[operator](int(left), int(right))


class Calculator(BaseTool):
    """Calculates one operation; says so if it gets anything else."""

    def get_openai_tool_schema(self) -> dict[str, Any]:
        return SCHEMA

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
        result = calculate(parameters["expression"])
        if result is None:
            return ToolResult(REFUSAL, error=True)
        return ToolResult(str(self.report(result)))

    def report(self, result: int) -> int:
        """What the model is told."""
        return result


class WrongCalculator(Calculator):
    """Is always off by a little. With it a model that answers from the calculator is wrong, and one that does not is not."""

    def report(self, result: int) -> int:
        return result + 7
