"""A tool of one's own, its reward and its data: an odometer, which calculates with three digits and starts again at 000."""

import random
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from agentloop.tools import BaseTool, ToolResult
from examples.quickstart.conversation import messages

SCHEMA = {
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


def turn(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 1_000


class Odometer(BaseTool):
    def get_openai_tool_schema(self) -> dict[str, Any]:
        return SCHEMA

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
        match = re.fullmatch(r"\s*(\d{1,9})\s*([-+*])\s*(\d{1,9})\s*", parameters["expression"])
        if match is None:
            return ToolResult("Error: one operation on two numbers per call.", error=True)
        return ToolResult(str(turn(int(match[1]), match[2], int(match[3]))))


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    match = re.search(r"\\boxed\{(\d+)\}\s*$", solution_str)
    return float(match is not None and match[1] == ground_truth)


def row(draw: random.Random) -> dict[str, Any]:
    a, b, c, operator = draw.randint(2, 99), draw.randint(2, 99), draw.randint(2, 99), draw.choice("+-")
    question = draw.choice(["What is {}?", "Compute {}."]).format(f"{a} * {b} {operator} {c}")
    answer = turn(turn(a, "*", b), operator, c)
    return {
        "prompt": messages(question),
        "reward_model": {"ground_truth": str(answer)},
        "data_source": "odometer",
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed, count in (("train", 1, 1024), ("val", 0, 128)):
        draw = random.Random(seed)
        pd.DataFrame([row(draw) for _ in range(count)]).to_parquet(folder / f"{name}.parquet")
