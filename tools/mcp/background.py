"""An event loop in a thread of its own, where every MCP session of the process lives.

So a session may serve several event loops, a tools file can be read where a loop runs already, and the SDK's cancel scopes
are entered and left by one task in one loop, whoever calls.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: tuple[int, asyncio.AbstractEventLoop] | None = None  # of which process, and the loop
_at_exit: set[Any] = set()

EXIT_S = 5.0
"""How long the interpreter's exit waits for servers to be stopped."""


def submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run in the background loop; blocking to wait for."""
    return asyncio.run_coroutine_threadsafe(work, _background())


async def away(work: Coroutine[Any, Any, T]) -> T:
    """Run in the background loop and wait; a cancelled wait cancels the work."""
    return await asyncio.wrap_future(submit(work))


def close_at_exit(thing: Any) -> None:
    """`thing.close()` is awaited when the interpreter exits, unless `closed` is called before."""
    _at_exit.add(thing)


def closed(thing: Any) -> None:
    _at_exit.discard(thing)


def _background() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None or _loop[0] != os.getpid():  # threads do not survive a fork
            loop = asyncio.SelectorEventLoop()
            threading.Thread(target=loop.run_forever, name="agentloop-mcp", daemon=True).start()
            if _loop is None:
                atexit.register(_close_all)
            _at_exit.clear()
            _loop = (os.getpid(), loop)
        return _loop[1]


def _close_all() -> None:
    things = list(_at_exit)
    if _loop is None or _loop[0] != os.getpid() or not things:
        return

    async def close() -> None:
        await asyncio.gather(*(thing.close() for thing in things), return_exceptions=True)

    try:
        submit(close()).result(EXIT_S)
    except Exception:  # the process ends; its servers' input ends with it
        return
