"""One attempt at a call: the tool runs, and whatever becomes of it is a value."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import logging
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from agentloop.errors import ToolError, ToolInfraError
from agentloop.tools.base import InvalidArguments, ToolLike, to_answer
from agentloop.tools.session import CANCEL_GRACE_S
from agentloop.tools.threads import Slot, current_slot
from agentloop.trajectory import CallStatus

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_ERROR = 300  # characters of an exception's message that the model is told
_SHORTEST_WAIT_S = 0.01


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one attempt came to."""

    status: CallStatus
    text: str
    reward: float = 0.0
    metrics: Mapping[str, Any] | None = None
    reported: bool = False
    """The tool answered, if only to say that the call was wrong: no retry and no `on_error`."""
    late: bool = False
    """It was the call's end that cut it off, not the tool's own timeout."""

    @property
    def answered(self) -> bool:
        return self.status is CallStatus.OK or self.reported


async def attempt(
    tool: ToolLike,
    instance_id: str,
    arguments: Any,
    kwargs: Mapping[str, Any],
    slot: Slot,
    *,
    timeout: float | None,
    end: float,
    limit: float,
) -> Outcome:
    """Run the tool once, for at most `timeout` seconds of its own and not beyond `end` on the event loop's clock; `limit` is
    what that means in seconds since the call began."""
    # A copy: a tool may change what it is given, and the record keeps what the model wrote.
    arguments = copy.deepcopy(arguments)
    context = contextvars.copy_context()
    context.run(current_slot.set, slot)
    loop = asyncio.get_running_loop()

    async def execute() -> Any:
        return await tool.execute(instance_id, arguments, **kwargs)

    what = f"tool '{tool.name}'"
    slot.start()
    task = loop.create_task(execute(), context=context)
    try:
        while not task.done():
            left = end - loop.time()
            own = left if timeout is None else timeout - slot.ran
            if left <= 0 or own <= 0:
                await _stop(task, slot, what)
                return too_late(tool.name, limit) if left <= 0 or timeout is None else ran_too_long(tool.name, timeout)
            # While the tool is queueing `own` stands still: look again then.
            await asyncio.wait({task}, timeout=min(left, max(own, _SHORTEST_WAIT_S)))
    except asyncio.CancelledError:
        await _stop(task, slot, what)
        raise
    return _outcome(tool.name, task)


def _outcome(name: str, task: asyncio.Task[Any]) -> Outcome:
    what = f"tool '{name}'"
    try:
        response, reward, metrics = to_answer(task.result())
    except InvalidArguments as error:
        return Outcome(CallStatus.INVALID_ARGUMENTS, invalid(name, str(error)), reported=True)
    except TimeoutError as error:
        logger.warning("%s: timeout inside the tool", what, exc_info=True)
        return Outcome(CallStatus.TIMEOUT, f"The tool '{name}' timed out: {brief(error)}.")
    except ToolInfraError as error:
        logger.warning("%s: infrastructure failure", what, exc_info=True)
        return Outcome(CallStatus.INFRA, f"The tool '{name}' is not available: {brief(error)}")
    except ToolError as error:
        return Outcome(CallStatus.ERROR, str(error) or f"The tool '{name}' failed.")
    except (Exception, asyncio.CancelledError) as error:
        logger.warning("%s: raised", what, exc_info=True)
        return Outcome(CallStatus.ERROR, f"The tool '{name}' failed: {brief(error)}")
    if getattr(response, "image", None) or getattr(response, "video", None):
        return Outcome(CallStatus.ERROR, f"The tool '{name}' answered with an image or a video; only text is read.")
    wrong = bool(getattr(response, "error", False))
    status = CallStatus.ERROR if wrong else CallStatus.OK
    return Outcome(status, response.text or "", reward, metrics, reported=wrong)


async def _stop(task: asyncio.Task[Any], slot: Slot, what: str) -> None:
    slot.hold()  # for as long as it goes on, even if the wait for its end is cancelled too
    task.add_done_callback(lambda _: slot.let_go())
    await settle(task, what)


# -- what the model is told -------------------------------------------------------------------------------------------------


def too_late(name: str, limit: float) -> Outcome:
    text = f"The tool '{name}' did not answer within {max(0.0, round(limit, 2)):g} s."
    return Outcome(CallStatus.TIMEOUT, text, late=True)


def ran_too_long(name: str, timeout: float) -> Outcome:
    return Outcome(CallStatus.TIMEOUT, f"The tool '{name}' did not answer within {timeout:g} s and was stopped.")


def refused(name: str, why: str) -> Outcome:
    return Outcome(CallStatus.INFRA, f"The tool '{name}' is not available: {why}.")


def invalid(name: str, problem: str) -> str:
    return f"Invalid arguments for the tool '{name}': {problem}."


def brief(error: BaseException) -> str:
    """One line of an exception, for the model and for messages."""
    line = (str(error).strip().splitlines() or [""])[0].strip()
    text = line if isinstance(error, ToolError) else f"{type(error).__name__}: {line}"
    text = text if line else type(error).__name__
    return text if len(text) <= _MAX_ERROR else text[: _MAX_ERROR - 1] + "…"


# -- waiting ------------------------------------------------------------------------------------------------------------------


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


async def bounded(awaitable: Awaitable[T], timeout: float | None, what: str) -> T:
    """Wait for it, `TimeoutError` after `timeout` seconds even if it does not let itself be cancelled."""
    coroutine: Coroutine[Any, Any, T] = _awaited(awaitable)
    task = asyncio.create_task(coroutine)
    try:
        await asyncio.wait({task}, timeout=timeout)
    except asyncio.CancelledError:
        await settle(task, what)
        raise
    if not task.done():
        await settle(task, what)
        raise TimeoutError(f"{what} took longer than {timeout:g} s")
    if task.cancelled():
        raise ToolError(f"{what} cancelled itself")
    return task.result()


async def settle(task: asyncio.Task[Any], what: str) -> None:
    """Cancel and wait a moment. One that does not end is reported and left behind."""
    task.cancel()
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else asks for it
    if not task.done():
        await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
    if task.done():
        if not task.cancelled() and task.exception() is not None:
            logger.debug("%s: raised while it was cancelled", what, exc_info=task.exception())
    else:
        logger.warning("%s does not end although it was cancelled; it is left behind", what)
