"""Tools that the tests of this room share: ours, verl's, and functions; each as a user would write it."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from pydantic import BaseModel, Field

from agentloop.errors import ToolInfraError
from agentloop.tools import BaseTool, ToolResult, tool


class Counter(BaseTool):
    """Counts up, from where the dataset row says."""

    name = "counter"

    class Arguments(BaseModel):
        by: int = Field(1, description="how much")

    def __init__(self, config: Any = None, tool_schema: Any = None) -> None:
        super().__init__(config, tool_schema)
        self.log: list[tuple[str, str]] = []
        """(what happened, instance id)"""

    async def create(self, instance_id: str, start: int = 0) -> None:  # type: ignore[override]
        self.log.append(("create", instance_id))
        self.instances[instance_id] = start

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
        self.log.append(("execute", instance_id))
        self.instances[instance_id] += parameters.get("by", 1)
        return ToolResult(str(self.instances[instance_id]), reward=0.25, metrics={"steps": 1})

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        self.log.append(("calc_reward", instance_id))
        return float(self.instances[instance_id])

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self.log.append(("release", instance_id))
        await super().release(instance_id)


class Sleeper(BaseTool):
    """Takes its time, and remembers how it ended."""

    name = "sleeper"

    class Arguments(BaseModel):
        seconds: float = 60.0

    def __init__(self, config: Any = None, tool_schema: Any = None) -> None:
        super().__init__(config, tool_schema)
        self.ended: list[str] = []
        self.running = 0
        self.most = 0
        self.released = 0

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> str:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(parameters["seconds"])
            self.ended.append("awake")
            return "awake"
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        finally:
            self.running -= 1

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        self.released += 1


class Flaky(BaseTool):
    """Fails as often as its config says, then answers."""

    name = "flaky"

    class Arguments(BaseModel):
        pass

    def __init__(self, config: Any = None, tool_schema: Any = None) -> None:
        super().__init__(config, tool_schema)
        self.failures = int(self.config.get("failures", 1))
        self.error: type[Exception] = {"infra": ToolInfraError, "value": ValueError, "timeout": TimeoutError}[
            self.config.get("error", "infra")
        ]
        self.tries = 0

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> str:
        self.tries += 1
        if self.tries <= self.failures:
            raise self.error(f"try {self.tries}")
        return "at last"


@tool
def repeat(text: str, times: int = 2, end: Literal["", "!"] = "") -> str:
    """Repeat a text.

    Args:
        text: What to repeat.
        times: How often.
        end: What to put at the end.
    """
    return text * times + end
