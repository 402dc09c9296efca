"""Services that the tests of `agentloop.sandboxes.node` run in a daemon."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from agentloop.sandboxes.base import SandboxError
from agentloop.sandboxes.node import Client, Reply, Service


class Desk(Service):
    """Answers, holds things for its clients, and fails on request."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.held: dict[Client, int] = {}
        self.begun = self.cancelled = 0

    async def call(self, client: Client, method: str, params: dict[str, Any]) -> Any:
        match method:
            case "echo":
                return {**params, "pid": os.getpid()}
            case "hold":
                self.held[client] = self.held.get(client, 0) + 1
                return None
            case "begun":
                return self.begun
            case "count":
                return {"held": sum(self.held.values()), "cancelled": self.cancelled}
            case "sleep":
                self.begun += 1
                try:
                    await asyncio.sleep(params["s"])
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
            case "pipe":
                read, write = os.pipe()
                os.write(write, b"through a passed descriptor")
                os.close(write)
                return Reply("here", (read,))
            case "fail":
                raise SandboxError("the desk is closed")
            case "bug":
                raise KeyError("a bug")
            case "die":
                os._exit(3)
        return None

    async def disconnected(self, client: Client) -> None:
        self.held.pop(client, None)


class Refuses(Service):
    """Does not start."""

    async def start(self) -> None:
        raise SandboxError("there is no desk here; buy one")

    async def call(self, client: Client, method: str, params: dict[str, Any]) -> Any:
        return None
