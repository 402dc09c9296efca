"""The `bubblewrap` kind: as `process`, for hosts where we are not root.

bubblewrap makes a user namespace in which the zygote may do what it needs root for elsewhere; everything else is the same:
one pool a node, a preloaded zygote, a launcher a place. What is missing: an own uid per place (user namespaces, seccomp and
PID 1's immunity stand in for it), and, where no control group may be written, limits over all processes that the kernel holds:
they are counted 20 times a second instead, and a place that is over them is killed.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from agentloop.errors import nearest
from agentloop.sandboxes.base import Layer
from agentloop.sandboxes.process.bwrap import BWRAP_REQUIRED, BWRAP_STOPS, probe
from agentloop.sandboxes.process.sandbox import PoolConfig, PoolSandbox


class BubblewrapConfig(PoolConfig):
    """The pool's settings; sandboxes with the same ones share one pool a node."""

    require: list[str] = Field(list(BWRAP_REQUIRED))
    """Layers without which it refuses to start. Add `cgroup memory` and `cgroup pids` where groups may be written."""

    @field_validator("require")
    @classmethod
    def _known_layers(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in BWRAP_STOPS:
                raise ValueError(f"there is no layer {name!r}; {nearest(name, BWRAP_STOPS)}")
        return names


class BubblewrapSandbox(PoolSandbox):
    """Code in a process of its own, forked from a preloaded one in a user namespace; needs no privilege."""

    kind: ClassVar[str] = "bubblewrap"
    Config = BubblewrapConfig

    def __init__(self, config: BubblewrapConfig | None = None) -> None:
        super().__init__(config or BubblewrapConfig())

    async def _probe(self) -> list[Layer]:
        return await probe()
