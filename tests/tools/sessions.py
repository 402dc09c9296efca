"""A session of a registry, and one call of it, for the tests of this room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from agentloop.tools import ToolRegistry, ToolSession
from agentloop.trajectory import CallRecord, Sample, ToolCall


@asynccontextmanager
async def opened(registry: ToolRegistry, **sample: Any) -> AsyncIterator[ToolSession]:
    session = registry.session(Sample(messages=[], **sample), "row_0")
    await session.open()
    try:
        yield session
    finally:
        await session.close()


async def call(session: ToolSession, name: str, arguments: Any = None, *, within: float = 30.0) -> CallRecord:
    asked = ToolCall(name, {} if arguments is None else arguments, "t0c0")
    return await session.call(asked, deadline=asyncio.get_running_loop().time() + within)
