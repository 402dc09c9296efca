"""A tool as users of verl have it: a subclass of verl's own `BaseTool`. Needs verl."""

from __future__ import annotations

from typing import Any

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse


class Tally(BaseTool):  # type: ignore[misc]
    """Adds up, from the row's `start`."""

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None) -> None:
        super().__init__(config, tool_schema)
        self.log: list[tuple[str, str]] = []
        self.totals: dict[str, int] = {}

    def get_openai_tool_schema(self) -> OpenAIFunctionToolSchema:
        parameters = {"type": "object", "properties": {"by": {"type": "integer"}}, "required": ["by"]}
        function = {"name": "tally", "description": "Add up.", "parameters": parameters}
        return OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        instance_id, response = await super().create(instance_id)
        self.totals[instance_id] = kwargs.get("create_kwargs", {}).get("start", 0)
        self.log.append(("create", instance_id))
        return instance_id, response

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        self.log.append(("execute", instance_id))
        self.totals[instance_id] += parameters["by"]
        return ToolResponse(text=str(self.totals[instance_id])), 0.5, {"n": 1}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        self.log.append(("calc_reward", instance_id))
        return float(self.totals[instance_id])

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self.log.append(("release", instance_id))
        del self.totals[instance_id]
