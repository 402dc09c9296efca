"""The quickstart's calculator: one operation on two whole numbers per call."""

from __future__ import annotations

import re
from typing import Any

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
OPERATION = re.compile(r"\s*(-?\d{1,9})\s*([-+*])\s*(-?\d{1,9})\s*")
REFUSAL = "Error: one operation on two numbers per call."
"""Never repeats what the model wrote, so a call cannot place text in its answer."""


def calculate(expression: str) -> str | None:
    """The result of `a + b`, `a - b` or `a * b` on whole numbers; `None` for anything else."""
    match = OPERATION.fullmatch(expression)
    if match is None:
        return None
    left, operator, right = match.groups()
    return str(APPLY[operator](int(left), int(right)))
