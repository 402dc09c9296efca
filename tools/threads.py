"""Blocking functions beside the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Slot:
    """A place under a tool's `max_concurrency`, held by the call and by every thread that the call started."""

    def __init__(self, loop: asyncio.AbstractEventLoop, semaphore: asyncio.Semaphore | None) -> None:
        self._loop = loop
        self._semaphore = semaphore
        self._holders = 1

    def hold(self) -> None:
        self._holders += 1

    def let_go(self) -> None:
        """On the event loop's thread only."""
        self._holders -= 1
        if self._holders == 0 and self._semaphore is not None:
            self._semaphore.release()

    def let_go_from_thread(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self.let_go)
        except RuntimeError:  # the loop was closed before the thread ended; nobody waits any more
            return


current_slot: contextvars.ContextVar[Slot | None] = contextvars.ContextVar("agentloop_tool_slot", default=None)


async def run_blocking(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run a blocking function in a thread of its own and wait for it.

    A thread cannot be killed. If the wait is cancelled (a timeout, a cancelled run), the call is over and the thread goes on
    until the function returns; until then it keeps its place under `max_concurrency`. It does not keep the process alive.
    """
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()
    slot = current_slot.get()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            done.set_result(context.run(function, *args, **kwargs))
        except StopIteration as error:  # a future cannot carry it
            done.set_exception(RuntimeError(f"StopIteration: {error}"))
        except BaseException as error:
            done.set_exception(error)
        finally:
            if slot is not None:
                slot.let_go_from_thread()

    if slot is not None:
        slot.hold()
    threading.Thread(target=work, name=f"tool-{getattr(function, '__name__', 'call')}", daemon=True).start()
    return await asyncio.wrap_future(done)
