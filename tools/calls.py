"""The tools of one trajectory at work: `RegistrySession`, which every policy is applied in."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any
from uuid import uuid4

from agentloop.errors import ConfigError, ToolInfraError, nearest
from agentloop.tools.attempt import Outcome, attempt, bounded, brief, invalid, refused, settle, too_late
from agentloop.tools.base import ToolLike, ToolSchema, accepted_kwargs, to_answer
from agentloop.tools.breaker import Breaker
from agentloop.tools.cut import TextCodec, cut_to_tokens
from agentloop.tools.gate import Gate
from agentloop.tools.policy import ToolPolicy
from agentloop.tools.schema import ArgumentCheck, Schema
from agentloop.tools.session import ToolSession, current_session, give_up_at
from agentloop.tools.threads import run_blocking
from agentloop.trajectory import CallRecord, CallStatus, ToolCall
from agentloop.waiting import to_the_end

logger = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 8.0
"""How long one `release` may take; under the loop's `release_s`, so that a hanging one is reported by name."""
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0

_LONG_TEXT = 20_000  # characters from which cutting happens beside the event loop
_NO_WAIT_S = 0.001  # less is the gate's own work
_METHODS: dict[str, tuple[Any, ...]] = {"create": ("id",), "execute": ("id", {}), "calc_reward": ("id",), "release": ("id",)}
_jitter = random.Random()  # not the module's own, which a run may have seeded


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
    breaker: Breaker
    signatures: Mapping[str, inspect.Signature]
    """Of `create`, `execute`, `calc_reward` and `release`."""
    lane: str | None
    """Calls of one trajectory in the same lane run one after the other, in the order of the turn; `None`: at any time."""
    final: bool
    """A call that ends well ends the trajectory."""


def make_entry(tool: ToolLike, policy: ToolPolicy) -> Entry:
    """Everything that is worked out once for a tool. `ConfigError` if it is not fit to be called."""
    signatures = {}
    for method, arguments in _METHODS.items():
        function = getattr(tool, method, None)
        if not callable(function):
            raise ConfigError(f"tool '{tool.name}' has no method '{method}'")
        if not inspect.iscoroutinefunction(inspect.unwrap(function)):
            raise ConfigError(f"'{method}' of tool '{tool.name}' must be 'async def'")
        signatures[method] = inspect.signature(function)
        try:
            signatures[method].bind_partial(*arguments)
        except TypeError as error:
            raise ConfigError(f"'{method}' of tool '{tool.name}' cannot be called as the registry does: {error}") from error
    schema = ToolSchema.of(tool.tool_schema).to_dict()
    parameters = schema["function"].get("parameters", {"type": "object", "properties": {}})
    parallel = getattr(tool, "parallel", True) if policy.parallel is None else policy.parallel
    return Entry(
        tool,
        tool.name,
        schema,
        policy,
        ArgumentCheck(parameters),
        Gate(tool.name, policy),
        Breaker(policy.circuit_breaker),
        signatures,
        lane=None if parallel else getattr(tool, "lane", None) or tool.name,
        final=bool(getattr(tool, "final", False)),
    )


@dataclass(slots=True)
class _Tally:
    """What one call has cost so far."""

    attempts: int = 0
    queue_s: float = 0.0
    run_s: float = 0.0
    backoff_s: float = 0.0
    waits: dict[str, float] = field(default_factory=dict)
    """Those of `queue_s` that are the cluster's and the rate limit's."""
    refused: bool = False
    probed: bool = False

    def metrics(self) -> dict[str, float]:
        """What the policies did, as the call's record shows it; only what is not 0."""
        found = {
            "retries": max(0, self.attempts - 1),
            "backoff_s": self.backoff_s,
            "breaker_open": self.refused,
            "breaker_probe": self.probed,
            **{what: seconds for what, seconds in self.waits.items() if seconds >= _NO_WAIT_S},
        }
        return {name: float(value) for name, value in found.items() if value}


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
        self._lanes: dict[str, asyncio.Lock] = {}
        self._opened = self._closed = False

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [entry.schema for entry in self._entries.values()]

    @property
    def final(self) -> frozenset[str]:
        return frozenset(name for name, entry in self._entries.items() if entry.final)

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
            await asyncio.gather(*(settle(task, "create") for task in tasks))
            raise

    async def _create(self, entry: Entry) -> None:
        """A `create` that fails is the machinery's doing, whatever it raised."""
        await _prepared(entry.tool)
        policy = entry.policy
        now = asyncio.get_running_loop().time
        end = math.inf if policy.deadline is None else now() + policy.deadline
        for number in range(policy.extra_attempts + 1):
            limit = min(policy.timeout or math.inf, end - now())
            try:
                seconds = None if limit == math.inf else max(0.0, limit)
                await bounded(self._create_once(entry), seconds, f"create of tool '{entry.name}'")
                return
            except Exception as error:
                logger.warning("tool '%s': create failed for trajectory %s", entry.name, self._trajectory_id, exc_info=True)
                backoff = _backoff(number)
                if number == policy.extra_attempts or now() + backoff >= end:
                    raise ToolInfraError(f"tool '{entry.name}' could not be created: {brief(error)}") from error
            await asyncio.sleep(backoff)

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
        await to_the_end(asyncio.gather(*(self._release(entry, instance_id) for entry, instance_id in created)))

    async def _release(self, entry: Entry, instance_id: str) -> None:
        try:
            release = entry.tool.release(instance_id, **self._kwargs[entry.name]["release"])
            await bounded(release, RELEASE_TIMEOUT_S, f"release of tool '{entry.name}'")
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
                    _, value, _ = to_answer(("", await bounded(asked, entry.policy.timeout, f"calc_reward of '{name}'")))
                except Exception as error:
                    logger.warning("tool '%s': calc_reward failed", name, exc_info=True)
                    raise ToolInfraError(f"calc_reward of tool '{name}' failed: {brief(error)}") from error
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
            return await self._fit(
                entry, CallRecord(call, CallStatus.INVALID_ARGUMENTS, invalid(entry.name, problem), attempts=0)
            )
        if entry.name not in self._instances:
            raise RuntimeError(f"tool '{entry.name}' was called outside of its trajectory's open and close")
        return await self._fit(entry, await self._run(entry, call, deadline))

    async def _run(self, entry: Entry, call: ToolCall, deadline: float) -> CallRecord:
        """Waits, attempts and retries, all of them before the call's end."""
        policy = entry.policy
        now = asyncio.get_running_loop().time
        started = now()
        end = give_up_at(deadline, started)
        if policy.deadline is not None:
            end = min(end, started + policy.deadline)
        tally = _Tally()
        # Nothing is awaited before this lock, so the calls of a lane get it in the order in which the loop makes them.
        lane = self._lanes.setdefault(entry.lane, asyncio.Lock()) if entry.lane else asyncio.Lock()
        try:
            async with asyncio.timeout_at(end):
                await lane.acquire()
        except TimeoutError:
            outcome = too_late(entry.name, end - started)
            tally.queue_s = now() - started
        else:
            try:
                tally.queue_s = now() - started
                outcome = await self._attempts(entry, call, end, end - started, tally)
            finally:
                lane.release()
        if outcome.answered:
            self._call_rewards[entry.name] = self._call_rewards.get(entry.name, 0.0) + outcome.reward
        return CallRecord(
            call,
            outcome.status,
            outcome.text,
            reward=outcome.reward,
            metrics=_numbers({**(outcome.metrics or {}), **tally.metrics(), **({"deadline": 1} if outcome.late else {})}),
            attempts=tally.attempts,
            queue_s=tally.queue_s,
            run_s=tally.run_s,
            on_error="observe" if outcome.reported or policy.on_error == "retry" else policy.on_error,
        )

    async def _attempts(self, entry: Entry, call: ToolCall, end: float, limit: float, tally: _Tally) -> Outcome:
        policy = entry.policy
        now = asyncio.get_running_loop().time
        failure: Outcome | None = None
        while True:
            if why := entry.breaker.refusal():
                tally.refused = True
                return refused(entry.name, why)
            outcome = await self._attempt(entry, call, end, limit, tally)
            if outcome.late and failure is not None:
                return failure  # a retry that was cut off says nothing new
            again = outcome.status is CallStatus.INFRA or (policy.on_error == "retry" and not outcome.answered)
            backoff = _backoff(tally.attempts - 1)
            over = outcome.late or tally.refused or self._closed or now() + backoff >= end
            if not again or over or tally.attempts > policy.extra_attempts:
                return outcome
            failure = outcome
            await asyncio.sleep(backoff)
            tally.backoff_s += backoff

    async def _attempt(self, entry: Entry, call: ToolCall, end: float, limit: float, tally: _Tally) -> Outcome:
        """Wait for a place and run the tool once."""
        now = asyncio.get_running_loop().time
        queued_at = now()
        try:
            async with asyncio.timeout_at(end):
                slot = await entry.gate.enter()
        except TimeoutError:
            return too_late(entry.name, limit)
        except ToolInfraError as error:
            tally.attempts += 1
            return refused(entry.name, brief(error))
        finally:
            tally.queue_s += now() - queued_at
        probe = answered = failed = False
        try:
            for what, seconds in slot.waits.items():
                tally.waits[what] = tally.waits.get(what, 0.0) + seconds
            if now() >= end:
                return too_late(entry.name, limit)
            if self._closed:
                return refused(entry.name, "the trajectory has ended")
            if why := entry.breaker.refusal():  # it may have opened while this call was waiting
                tally.refused = True
                return refused(entry.name, why)
            probe = entry.breaker.begin()
            tally.probed = tally.probed or probe
            tally.attempts += 1
            outcome = await attempt(
                entry.tool,
                self._instances[entry.name],
                call.arguments,
                self._kwargs[entry.name]["execute"],
                slot,
                timeout=entry.policy.timeout,
                end=end,
                limit=limit,
            )
            tally.queue_s += slot.queued
            tally.run_s += slot.ran
            failed = outcome.status is CallStatus.INFRA
            answered = not failed and outcome.status is not CallStatus.TIMEOUT
            return outcome
        finally:
            entry.breaker.end(probe=probe, answered=answered, failed=failed)
            slot.let_go()

    async def _fit(self, entry: Entry, record: CallRecord) -> CallRecord:
        record = replace(record, text=_well_formed(record.text))
        limit = entry.policy.max_response_tokens
        if limit is None or self._codec is None or entry.final:
            return record
        if len(record.text) > _LONG_TEXT:
            text, cut = await run_blocking(cut_to_tokens, record.text, limit, self._codec)
        else:
            text, cut = cut_to_tokens(record.text, limit, self._codec)
        return replace(record, text=text, cut_tokens=cut) if cut else record


def method_kwargs(entry: Entry, row: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """A row's `tools_kwargs.<tool>` as what to pass to each method; `ConfigError` beginning with `where` for unknown keys."""
    groups = {f"{method}_kwargs": method for method in _METHODS}
    for key in row:
        if key not in groups:
            raise ConfigError(f"{where}: unknown key '{key}'; {nearest(key, groups)}")
    passed: dict[str, dict[str, Any]] = {}
    for group, method in groups.items():
        given = row.get(group) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}: key '{group}' must be a mapping, got {given!r}")
        signature = entry.signatures[method]
        try:
            # verl's loop hands `create_kwargs` over as one argument of that name; the others it used to spread.
            passed[method] = accepted_kwargs(signature, given, group if method == "create" else "")
            signature.bind(*_METHODS[method], **passed[method])
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"{where}: key '{group}': {error}") from error
    return passed


# -- small parts --------------------------------------------------------------------------------------------------------


async def _prepared(tool: ToolLike) -> None:
    prepare = getattr(tool, "prepare", None)
    if not inspect.iscoroutinefunction(prepare):  # verl's tools have none
        return
    try:
        await prepare()
    except Exception as error:
        logger.warning("tool '%s' is not ready: %s", tool.name, brief(error))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite ones: one NaN would be the mean over a whole batch."""
    numbers = {str(key): float(value) for key, value in metrics.items() if isinstance(value, Real)}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _backoff(number: int) -> float:
    """Seconds before the next attempt, spread out so that what failed together does not come back together."""
    return min(FIRST_BACKOFF_S * 2.0**number, MAX_BACKOFF_S) * _jitter.uniform(0.5, 1.5)


def _well_formed(text: str) -> str:
    """Half of a surrogate pair has no UTF-8 and hence no tokens: U+FFFD takes its place, and two halves become one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
