"""`submit`: the final answer as a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from agentloop.config import Strict, validate
from agentloop.tools.base import BaseTool, InvalidArguments, ToolResult


class SubmitConfig(Strict):
    type: str = "native"


class Submit(BaseTool):
    """Give your final answer. The conversation ends with it."""

    name = "submit"
    final = True

    class Arguments(BaseModel):
        answer: str = Field(description="The final answer, and nothing else")

    def __init__(self, config: Mapping[str, Any] | None = None, tool_schema: Any = None) -> None:
        validate(SubmitConfig, config or {}, "config")
        super().__init__(config, tool_schema)

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
        if not parameters["answer"].strip():
            raise InvalidArguments("the answer is empty")
        return ToolResult(parameters["answer"])
