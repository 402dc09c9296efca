"""The tools of one trajectory at work: `RegistrySession`, which every policy is applied in."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import inspect
import logging
import math
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeVar
from uuid import uuid4

from agentloop.errors import ConfigError, ToolError, ToolInfraError, nearest
from agentloop.tools.base import InvalidArguments, ToolLike, accepted_kwargs, to_answer
from agentloop.tools.cut import TextCodec, cut_to_tokens
from agentloop.tools.policy import Gate, ToolPolicy
from agentloop.tools.schema import ArgumentCheck, Schema
from agentloop.tools.session import CANCEL_GRACE_S, ToolSession, current_session, give_up_at
from agentloop.tools.threads import Slot, current_slot, run_blocking
from agentloop.trajectory import CallRecord, CallStatus, ToolCall

logger = logging.getLogger(__name__)
T = TypeVar("T")

RELEASE_TIMEOUT_S = 8.0
"""How long one `release` may take; under the loop's `release_s`, so that a hanging one is reported by name."""
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0

_MAX_ERROR = 300  # characters of an exception's message that the model is told
_LONG_TEXT = 20_000  # characters from which cutting happens beside the event loop


@dataclass(frozen=True, slots=True)
class Entry:
    """A tool in a registry, with everything that is worked out once."""

    tool: ToolLike
    name: str
    schema: Schema
    """As the chat template gets it."""
    policy: ToolPolicy
    check: ArgumentCheck
    gate: Gate


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one attempt came to."""

    status: CallStatus
    text: str
    reward: float = 0.0
    metrics: Mapping[str, Any] | None = None
    reported: bool = False
    """The tool answered, if only to say that the call was wrong: no retry and no `on_error`."""


class RegistrySession(ToolSession):
    """See `ToolSession`. Made by `ToolRegistry.session`."""

    def __init__(
        self,
        entries: Mapping[str, Entry],
        kwargs: Mapping[str, Mapping[str, Mapping[str, Any]]],
        trajectory_id: str,
        codec: TextCodec | None,
    ) -> None:
        """`kwargs`: per tool and per method (`create`, `execute`, …) what to pass, already checked against its signature."""
        self._entries = entries
        self._kwargs = kwargs
        self._trajectory_id = trajectory_id
        self._codec = codec
        self._instances: dict[str, str] = {}
        """By tool, what its calls go to."""
        self._created: list[tuple[Entry, str]] = []
        """What `close` releases: with retries a tool may have been created more than once."""
        self._call_rewards: dict[str, float] = {}
        self._rewards: dict[str, float] | None = None
        self._opened = self._closed = False

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [entry.schema for entry in self._entries.values()]

    # -- life -----------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        if self._opened:
            raise RuntimeError(f"the tools of trajectory {self._trajectory_id} were opened before")
        self._opened = True
        context = contextvars.copy_context()
        context.run(current_session.set, f"{self._trajectory_id}-{uuid4().hex[:8]}")
        create_task = asyncio.get_running_loop().create_task
        tasks = [create_task(self._create(entry), context=context.copy()) for entry in self._entries.values()]
        if not tasks:
            return
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            await asyncio.gather(*(_settle(task, "create") for task in tasks))
            raise

    async def _create(self, entry: Entry) -> None:
        for attempt in range(entry.policy.extra_attempts + 1):
            try:
                await _bounded(self._create_once(entry), entry.policy.timeout, f"create of tool '{entry.name}'")
                return
            except Exception as error:
                logger.warning("tool '%s': create failed for trajectory %s", entry.name, self._trajectory_id, exc_info=True)
                if attempt == entry.policy.extra_attempts:
                    raise ToolInfraError(f"tool '{entry.name}' could not be created: {_brief(error)}") from error
            await asyncio.sleep(_backoff(attempt))

    async def _create_once(self, entry: Entry) -> None:
        instance_id = f"{self._trajectory_id}-{uuid4().hex[:8]}"
        returned = await entry.tool.create(instance_id, **self._kwargs[entry.name]["create"])
        instance_id = returned[0] if isinstance(returned, tuple) else returned or instance_id
        # Noted here, not by whoever waits: what was created must be released even if nobody waits any more.
        if self._closed:
            await self._release(entry, instance_id)
            return
        self._created.append((entry, instance_id))
        self._instances.setdefault(entry.name, instance_id)

    async def close(self) -> None:
        self._closed = True
        created, self._created = self._created, []
        self._instances = {}
        await asyncio.gather(*(self._release(entry, instance_id) for entry, instance_id in created))

    async def _release(self, entry: Entry, instance_id: str) -> None:
        try:
            release = entry.tool.release(instance_id, **self._kwargs[entry.name]["release"])
            await _bounded(release, RELEASE_TIMEOUT_S, f"release of tool '{entry.name}'")
        except Exception:
            logger.warning("tool '%s': release failed for trajectory %s", entry.name, self._trajectory_id, exc_info=True)

    async def rewards(self) -> dict[str, float]:
        """As `ToolSession.rewards`. Raises `ToolInfraError` if a `calc_reward` fails: a reward that is not known is not 0."""
        if self._rewards is None:
            total = dict(self._call_rewards)
            for name, instance_id in list(self._instances.items()):
                entry = self._entries[name]
                try:
                    asked = entry.tool.calc_reward(instance_id, **self._kwargs[name]["calc_reward"])
                    _, value, _ = to_answer(("", await _bounded(asked, entry.policy.timeout, f"calc_reward of '{name}'")))
                except Exception as error:
                    logger.warning("tool '%s': calc_reward failed", name, exc_info=True)
                    raise ToolInfraError(f"calc_reward of tool '{name}' failed: {_brief(error)}") from error
                total[name] = total.get(name, 0.0) + value
            self._rewards = {f"tool/{name}": value for name, value in total.items() if value != 0}
        return dict(self._rewards)

    # -- one call -------------------------------------------------------------------------------------------------------

    async def call(self, call: ToolCall, *, deadline: float) -> CallRecord:
        entry = self._entries.get(call.name)
        if entry is None:
            hint = nearest(call.name[:60], self._entries) if self._entries else "this conversation has no tools"
            text = _well_formed(f"There is no tool '{call.name[:60]}'; {hint}")
            return CallRecord(call, CallStatus.UNKNOWN_TOOL, text, attempts=0)
        problem = entry.check(call.arguments)
        if problem is not None:
            return await self._fit(entry, CallRecord(call, CallStatus.INVALID_ARGUMENTS, _invalid(entry, problem), attempts=0))
        if entry.name not in self._instances:
            raise RuntimeError(f"tool '{entry.name}' was called outside of its trajectory's open and close")
        return await self._fit(entry, await self._run(entry, call, deadline))

    async def _run(self, entry: Entry, call: ToolCall, deadline: float) -> CallRecord:
        """Attempts, waits and retries, all of them before the call's end."""
        policy = entry.policy
        now = asyncio.get_running_loop().time
        started = now()
        end = give_up_at(deadline, started)
        if policy.timeout is not None:
            end = min(end, started + policy.timeout)
        waited = ran = 0.0
        attempts = 0
        outcome = _too_late(entry, end - started)
        while True:
            queued_at = now()
            slot: Slot | None = None
            running_at: float | None = None
            try:
                async with asyncio.timeout_at(end):
                    slot = await entry.gate.enter()
                running_at = now()
                waited += running_at - queued_at
                if running_at < end:
                    attempts += 1
                    outcome = await self._attempt(entry, call, slot, end, end - started)
                    ran += now() - running_at
            except TimeoutError:
                outcome = _too_late(entry, end - started)
            finally:
                if slot is not None:
                    slot.let_go()
            if running_at is None:
                waited += now() - queued_at
            backoff = _backoff(attempts - 1)
            if not _try_again(outcome, policy) or attempts > policy.extra_attempts or now() + backoff >= end:
                break
            await asyncio.sleep(backoff)
        model_erred = outcome.status is CallStatus.INVALID_ARGUMENTS or outcome.reported
        if outcome.status is CallStatus.OK or outcome.reported:
            self._call_rewards[entry.name] = self._call_rewards.get(entry.name, 0.0) + outcome.reward
        return CallRecord(
            call,
            outcome.status,
            outcome.text,
            reward=outcome.reward,
            metrics=_numbers(outcome.metrics or {}),
            attempts=attempts,
            queue_s=waited,
            run_s=ran,
            on_error="observe" if model_erred or policy.on_error == "retry" else policy.on_error,
        )

    async def _attempt(self, entry: Entry, call: ToolCall, slot: Slot, end: float, limit: float) -> _Outcome:
        # A copy: a tool may change what it is given, and the record keeps what the model wrote.
        arguments = copy.deepcopy(call.arguments)
        instance_id = self._instances[entry.name]
        context = contextvars.copy_context()
        context.run(current_slot.set, slot)

        async def execute() -> Any:
            return await entry.tool.execute(instance_id, arguments, **self._kwargs[entry.name]["execute"])

        task = asyncio.get_running_loop().create_task(execute(), context=context)
        what = f"tool '{entry.name}'"
        try:
            await asyncio.wait({task}, timeout=max(0.0, end - asyncio.get_running_loop().time()))
        except asyncio.CancelledError:
            await self._stop(task, slot, what)
            raise
        if not task.done():
            await self._stop(task, slot, what)
            return _too_late(entry, limit)
        try:
            response, reward, metrics = to_answer(task.result())
        except InvalidArguments as error:
            return _Outcome(CallStatus.INVALID_ARGUMENTS, _invalid(entry, str(error)), reported=True)
        except TimeoutError as error:
            logger.warning("%s: timeout inside the tool", what, exc_info=True)
            return _Outcome(CallStatus.TIMEOUT, f"The tool '{entry.name}' timed out: {_brief(error)}.")
        except ToolInfraError as error:
            logger.warning("%s: infrastructure failure", what, exc_info=True)
            return _Outcome(CallStatus.INFRA, f"The tool '{entry.name}' is not available: {_brief(error)}")
        except ToolError as error:
            return _Outcome(CallStatus.ERROR, str(error) or f"The tool '{entry.name}' failed.")
        except (Exception, asyncio.CancelledError) as error:
            logger.warning("%s: raised", what, exc_info=True)
            return _Outcome(CallStatus.ERROR, f"The tool '{entry.name}' failed: {_brief(error)}")
        if getattr(response, "image", None) or getattr(response, "video", None):
            return _Outcome(CallStatus.ERROR, f"The tool '{entry.name}' answered with an image or a video; only text is read.")
        wrong = bool(getattr(response, "error", False))
        status = CallStatus.ERROR if wrong else CallStatus.OK
        return _Outcome(status, response.text or "", reward, metrics, reported=wrong)

    async def _stop(self, task: asyncio.Task[Any], slot: Slot, what: str) -> None:
        slot.hold()  # for as long as it goes on, even if the wait for its end is cancelled too
        task.add_done_callback(lambda _: slot.let_go())
        await _settle(task, what)

    async def _fit(self, entry: Entry, record: CallRecord) -> CallRecord:
        record = replace(record, text=_well_formed(record.text))
        limit = entry.policy.max_response_tokens
        if limit is None or self._codec is None:
            return record
        if len(record.text) > _LONG_TEXT:
            text, cut = await run_blocking(cut_to_tokens, record.text, limit, self._codec)
        else:
            text, cut = cut_to_tokens(record.text, limit, self._codec)
        return replace(record, text=text, cut_tokens=cut) if cut else record


def method_kwargs(tool: ToolLike, row: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """A row's `tools_kwargs.<tool>` as what to pass to each method; `ConfigError` beginning with `where` for unknown keys."""
    methods = ("create", "execute", "calc_reward", "release")
    groups = {f"{method}_kwargs": method for method in methods}
    for key in row:
        if key not in groups:
            raise ConfigError(f"{where}: unknown key '{key}'; {nearest(key, groups)}")
    passed: dict[str, dict[str, Any]] = {}
    for group, method in groups.items():
        given = row.get(group) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}: key '{group}' must be a mapping, got {given!r}")
        try:
            # verl's loop hands `create_kwargs` over as one argument of that name; the others it used to spread.
            function = getattr(tool, method)
            passed[method] = accepted_kwargs(function, given, group if method == "create" else "")
            inspect.signature(function).bind("id", *([{}] if method == "execute" else []), **passed[method])
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{where}: key '{group}': {error}") from error
    return passed


# -- small parts --------------------------------------------------------------------------------------------------------


def _try_again(outcome: _Outcome, policy: ToolPolicy) -> bool:
    if outcome.status is CallStatus.OK or outcome.reported:
        return False
    return outcome.status in (CallStatus.INFRA, CallStatus.TIMEOUT) or policy.on_error == "retry"


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite ones: one NaN would be the mean over a whole batch."""
    numbers = {str(key): float(value) for key, value in metrics.items() if isinstance(value, Real)}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _backoff(attempt: int) -> float:
    return min(FIRST_BACKOFF_S * 2.0**attempt, MAX_BACKOFF_S)


def _too_late(entry: Entry, limit: float) -> _Outcome:
    return _Outcome(CallStatus.TIMEOUT, f"The tool '{entry.name}' did not answer within {max(0.0, round(limit, 2)):g} s.")


def _invalid(entry: Entry, problem: str) -> str:
    return f"Invalid arguments for the tool '{entry.name}': {problem}."


def _well_formed(text: str) -> str:
    """Half of a surrogate pair has no UTF-8 and hence no tokens: U+FFFD takes its place, and two halves become one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _brief(error: BaseException) -> str:
    """One line of an exception, for the model and for messages."""
    line = (str(error).strip().splitlines() or [""])[0].strip()
    text = line if isinstance(error, ToolError) else f"{type(error).__name__}: {line}"
    text = text if line else type(error).__name__
    return text if len(text) <= _MAX_ERROR else text[: _MAX_ERROR - 1] + "…"


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable


async def _bounded(awaitable: Awaitable[T], timeout: float | None, what: str) -> T:
    """Wait for it, `TimeoutError` after `timeout` seconds even if it does not let itself be cancelled."""
    coroutine: Coroutine[Any, Any, T] = _awaited(awaitable)
    task = asyncio.create_task(coroutine)
    try:
        await asyncio.wait({task}, timeout=timeout)
    except asyncio.CancelledError:
        await _settle(task, what)
        raise
    if not task.done():
        await _settle(task, what)
        raise TimeoutError(f"{what} took longer than {timeout:g} s")
    if task.cancelled():
        raise ToolError(f"{what} cancelled itself")
    return task.result()


async def _settle(task: asyncio.Task[Any], what: str) -> None:
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
