"""HTTP clients for tools: one for each event loop, kept for as long as somebody uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from weakref import WeakKeyDictionary

import aiohttp


class Clients:
    """One tool's clients. A tool `enter`s in `create` and `leave`s in `release`, so that connections are reused while
    trajectories overlap, and none outlives them."""

    def __init__(self, make: Callable[[], aiohttp.ClientSession]) -> None:
        self._make = make
        self._here: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[int, aiohttp.ClientSession | None]] = WeakKeyDictionary()

    def enter(self) -> None:
        users, client = self._state()
        self._here[asyncio.get_running_loop()] = users + 1, client

    async def leave(self) -> None:
        users, client = self._state()
        gone = users <= 1
        self._here[asyncio.get_running_loop()] = max(0, users - 1), None if gone else client
        if gone and client is not None:
            await client.close()

    def get(self) -> aiohttp.ClientSession:
        users, client = self._state()
        if client is None:
            client = self._make()
            self._here[asyncio.get_running_loop()] = users, client
        return client

    def _state(self) -> tuple[int, aiohttp.ClientSession | None]:
        return self._here.get(asyncio.get_running_loop(), (0, None))
