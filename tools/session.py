"""The tools of one trajectory, as the loop sees them."""

from __future__ import annotations

import contextvars
from abc import ABC, abstractmethod
from typing import Any

from agentloop.trajectory import CallRecord, Sample, ToolCall

CANCEL_GRACE_S = 0.5
"""How long a cancelled tool may take to clean up before it is left behind."""

current_session: contextvars.ContextVar[str | None] = contextvars.ContextVar("agentloop_tool_session", default=None)
"""While tools are created: a name that all instances of one session see, and no other's. Tools that share something within a
trajectory find each other by it. Not set where something else than a session creates tools (verl's loop)."""


def give_up_at(deadline: float, now: float) -> float:
    """When a call that begins `now` is given up: a little before its deadline, which covers the tool's cleaning up too, and
    which whoever set it may enforce at the very moment it passes."""
    return deadline - min(CANCEL_GRACE_S, max(0.0, deadline - now) / 10)


class ToolSession(ABC):
    """Opened when a trajectory starts, closed when it ends, whatever happens in between.

    `create` of each selected tool runs at most once (at `open`), `execute` per call, `calc_reward` at most once, `release`
    exactly once for every tool that was created. No tool's failure raises here: it becomes a `CallRecord`.
    """

    @property
    @abstractmethod
    def schemas(self) -> list[dict[str, Any]]:
        """OpenAI function schemas of the tools that this trajectory may call, in the registry's order."""

    @property
    def final(self) -> frozenset[str]:
        """Names of the tools whose call, if it ends well, is the final answer."""
        return frozenset()

    @abstractmethod
    async def open(self) -> None:
        """Create the tools' instances. Raises `ToolInfraError` if one cannot be created; what was created is released by
        `close`."""

    @abstractmethod
    async def call(self, call: ToolCall, *, deadline: float) -> CallRecord:
        """Run one call, with the tool's policies. `deadline` is on the event loop's
        clock and covers all of it, so that the tool is given up at `give_up_at`. Cancellation passes through, after the
        tool has been told."""

    @abstractmethod
    async def rewards(self) -> dict[str, float]:
        """`calc_reward` of each tool, plus the sum of its calls' rewards: `{"tool/<name>": value}`; only what is not 0."""

    @abstractmethod
    async def close(self) -> None:
        """Release every instance, each with its own guard: one that raises or hangs is reported and the rest go on. To the
        end, even if whoever waits is cancelled meanwhile; that is passed on afterwards."""


class ToolSessions(ABC):
    """Opens sessions; `ToolRegistry` is the one that users have."""

    @abstractmethod
    def session(self, sample: Sample, trajectory_id: str) -> ToolSession:
        """The session of one trajectory, not opened yet. `trajectory_id` is unique within the run. `sample.tools` and
        `sample.tools_kwargs` select and configure;
        an unknown name raises `ConfigError`."""

    async def close(self) -> None:  # noqa: B027
        """Let go of what the tools hold for the whole process, once no session is open."""
