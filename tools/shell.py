"""`shell`: runs shell commands that the model wrote, in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from agentloop.errors import ConfigError
from agentloop.tools.base import ToolResult
from agentloop.tools.shown import shown
from agentloop.tools.workspace import SandboxConfig, SandboxTool


class ShellConfig(SandboxConfig):
    shell: Literal["bash", "sh"] = "bash"


class Shell(SandboxTool):
    """Run a shell command in the working folder. Files are kept from call to call; variables and `cd` are not. The answer is
    what the command writes, and its exit status if that is not 0."""

    name = "shell"
    Config = ShellConfig
    settings: ShellConfig

    class Arguments(BaseModel):
        command: str = Field(description="The command, or a script of several lines")

    def __init__(self, config: Mapping[str, Any] | None = None, tool_schema: Any = None) -> None:
        super().__init__(config, tool_schema)
        if self.settings.shell not in self.languages:
            known = ", ".join(self.languages)
            raise ConfigError(f"key 'config.shell': this sandbox runs no {self.settings.shell}; it runs {known}")

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> ToolResult:
        workspace = self.workspace(instance_id)
        result = await workspace.run(parameters["command"], self.settings.shell)
        return shown(result, self.limits, workspace.take_notice())
