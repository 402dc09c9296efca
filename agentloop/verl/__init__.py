"""Everything that imports verl. Nothing in agentloop imports this package but the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentloop.verl.agent_loop import AgentloopAgentLoop as AgentloopAgentLoop
    from agentloop.verl.client import VerlEngine as VerlEngine
    from agentloop.verl.manager import AgentLoopManager as AgentLoopManager

_HOMES = {"AgentLoopManager": "manager", "AgentloopAgentLoop": "agent_loop", "VerlEngine": "client"}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: verl's plugin is loaded inside `import verl`, and must not import
    it in turn."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
