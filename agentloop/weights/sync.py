"""After an actor update: export, send, switch. The weight sync from Megatron to the engines that generate."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, runtime_checkable

from agentloop.engines.base import Engine, Sampling
from agentloop.errors import AgentloopError, ConfigError, EngineError
from agentloop.waiting import to_the_end
from agentloop.weights.export import BUCKET_BYTES
from agentloop.weights.source import Source
from agentloop.weights.sync_guard import GuardedEngine, Holds, SyncFailed, WeightsRefused
from agentloop.weights.sync_plans import SendPlan
from agentloop.weights.sync_stream import Stream

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)
T = TypeVar("T")
PROBE_S = 60.0
"""Until an engine must have answered one token, where a failed sync left it its old weights."""


class CheckReport(Protocol):
    """What a check found."""

    @property
    def ok(self) -> bool: ...

    @property
    def message(self) -> str:
        """One sentence."""
        ...


class Check(Protocol):
    """What looks at an engine after an update; `agentloop.weights.check.Canary` is one."""

    async def expected(self) -> Any:
        """The trainer's side, asked for once a sync on every rank of the trainer, before anything is sent. What it raises or
        answers on ranks without engines is passed over."""
        ...

    async def check(self, engine: Engine, version: int, sent: Mapping[str, int] | None, *, expected: Any) -> CheckReport:
        """`sent`: the checksum of every tensor that was exported; `None` where the manager takes none. `expected`: what
        `expected` answered."""
        ...


@dataclass(frozen=True)
class SyncReport:
    """One sync that landed."""

    version: int
    plan: str
    buckets: int
    tensors: int
    nbytes: int
    seconds: float
    """All of it, the check included; the engines answered nobody for so long."""
    send_s: float
    convert_s: float
    """In the converting thread: gathering, converting, checksums; of this, sending covered all but what is in `send_s`."""
    checks: Mapping[str, CheckReport] = field(default_factory=dict)
    """By engine."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the checks."""
        return {key: value for key, value in vars(self).items() if key != "checks"}


class MegatronSGLangShardingManager:
    """Keeps the weights of engines at those of a trainer.

    As a context manager around a rollout, in the style of verl's sharding managers: entering counts a training step, wakes the
    engines and syncs if that is due; leaving puts them to sleep. Or by calls: `due(step)`, `sync()`.

    On the trainer's rank 0 it has the engines; on its other ranks it has none, and takes part in the export only (`group`).
    Rollouts go through `manager.engines`: those hold requests back while weights change, and refuse them where no whole and
    checked weights serve. After a sync that failed either the old version goes on serving, on every engine, or none answers
    until a sync has landed; `SyncFailed` says which.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine] | Sequence[Engine],
        source: Callable[[], Source],
        plan: SendPlan,
        *,
        every: int = 1,
        bucket_bytes: int = BUCKET_BYTES,
        dtype: torch.dtype | None = None,
        fp8: bool = False,
        check: Check | None = None,
        checksums: bool | None = None,
        sleep: Sequence[str] = (),
        serves: bool = True,
        timeout_s: float = 1800.0,
        group: ProcessGroup | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`source` is called once a sync, in a thread: for example `lambda: GatheredSource(shards(), layout, shape)`.

        `every`: training steps from one sync to the next. `bucket_bytes`, `dtype`, `fp8`: as for `export`; the dtype should be
        the engines', or their checksums cannot be those of what was sent. `check` looks at every engine after an update; it
        goes to all ranks where the trainer's side is a collective.
        `checksums`: take those of what is sent (default: if there is a check; about a second a GB, while sending goes on).
        `sleep`: what is freed between rollouts; with `weights` among it every entering syncs, since what an engine freed is
        not there any more. `serves=False`: the engines were started with weights that mean nothing (SGLang's
        `load_format=dummy`), and are refused until a sync has landed. `timeout_s`: until everything must have landed.
        `group`: the trainer's ranks, where there is more than one; they learn from its rank 0 how the sync went. `loop`: where
        the engines live, for `with` and `run`; default: a thread of the manager's own.
        """
        named = engines if isinstance(engines, Mapping) else {str(number): each for number, each in enumerate(engines)}
        if not named and group is None:
            raise ConfigError("a sharding manager has no engine, which only ranks beside the first of a `group` may have")
        if every < 1:
            raise ConfigError(f"every is {every}; a sync is due every 1 or more training steps")
        self.engines: dict[str, GuardedEngine] = {name: GuardedEngine(name, engine) for name, engine in named.items()}
        self.plan, self.every = plan, every
        self.sent: Mapping[str, int] = {}
        """Checksums of what the last sync that landed has sent."""
        self.last: SyncReport | None = None
        self._source, self._check = source, check
        self._options: dict[str, Any] = {"bucket_bytes": bucket_bytes, "dtype": dtype, "fp8": fp8}
        self._options["checksums"] = (check is not None) if checksums is None else checksums
        self._sleep, self._timeout_s, self._group = tuple(sleep), timeout_s, group
        self._version: int | None = None
        self._step = 0
        self._synced_step: int | None = None
        self._slept: set[str] = set()
        self._one = asyncio.Lock()
        self._loop = loop
        self._thread: threading.Thread | None = None
        if not serves:
            for guard in self.engines.values():
                guard.refuse(f"engine '{guard.name}' was started with weights that mean nothing, and no sync has landed yet")

    # -- what can be asked --------------------------------------------------------------------------------------------

    @property
    def engine(self) -> GuardedEngine:
        """The only engine."""
        (only,) = self.engines.values()
        return only

    @property
    def version(self) -> int:
        """Of the weights that serve, or served last. Raised by one for each sync that landed."""
        if self._version is None:
            self._version = max((guard.engine.weight_version or 0 for guard in self.engines.values()), default=0)
        return self._version

    @property
    def refusal(self) -> str | None:
        """Why rollouts are refused, if they are."""
        return next((guard.refusal for guard in self.engines.values() if guard.refusal is not None), None)

    def due(self, step: int | None = None) -> bool:
        """Whether the rollout of this training step (default: the step last entered) needs a sync first: the first one, every
        `every` steps, after one that failed, when rollouts are refused, and when the weights were freed."""
        if self._synced_step is None or self.refusal is not None or "weights" in self._sleep:
            return True
        return (self._step if step is None else step) - self._synced_step >= self.every

    # -- syncing ------------------------------------------------------------------------------------------------------

    async def sync(self, *, source: Callable[[], Source] | None = None, step: int | None = None) -> SyncReport | None:
        """Export, send, check, switch; what serves then is `version`, one more than before. None on a rank without engines.

        `source`: another one for this time. The trainer must not step meanwhile. A collective on the ranks of `group`: each
        walks the export to its end, also where something failed, and all of them raise or none does.

        Raises `SyncFailed`, or `WeightsRefused` where everything landed and the check did not pass.
        """
        async with self._one:
            stream = Stream(source or self._source, **self._options, collective=self._group is not None)
            self._synced_step = None
            try:
                if not self.engines:
                    await self._follow(stream)
                    report = None
                else:
                    report = await self._lead(stream)
            finally:
                await stream.finish()
            self._synced_step = self._step if step is None else step
            return report

    async def _lead(self, stream: Stream) -> SyncReport:
        began = perf_counter()
        if self._version is None:
            await self._each(_ask_version)
        target = self.version + 1
        before = {guard.name: guard.refusal for guard in self.engines.values()}
        for guard in self.engines.values():
            guard.hold()
            guard.holds = Holds.OLD if guard.refusal is None else guard.holds
        try:
            async with asyncio.timeout(self._timeout_s):
                expected = None if self._check is None else await self._check.expected()
                await self._each(self._quieten)
                await self._wake("weights")
                sending = perf_counter()
                await self.plan.send(stream, list(self.engines.values()), target)
                sent_s = perf_counter() - sending
                await self._wake("kv_cache")
                self._refuse_half(target)
                checks = await self._checked(target, stream, expected)
        except BaseException as error:
            raise await to_the_end(self._fail(error, stream, target, before)) from error
        await to_the_end(self._land(stream, target))
        self.last = SyncReport(
            version=target,
            plan=self.plan.name,
            buckets=stream.buckets,
            tensors=stream.tensors,
            nbytes=stream.nbytes,
            seconds=perf_counter() - began,
            send_s=sent_s,
            convert_s=stream.convert_s,
            checks=checks,
        )
        return self.last

    async def _land(self, stream: Stream, target: int) -> None:
        await stream.finish()
        await self._tell(None)
        self._version, self.sent = target, stream.sent
        for guard in self.engines.values():
            guard.serve(target)
        with contextlib.suppress(OSError):
            await self.plan.landed()

    async def _follow(self, stream: Stream) -> None:
        failed: BaseException | None = None
        if self._check is not None:
            with contextlib.suppress(AgentloopError):
                await self._check.expected()
        try:
            async for _ in stream:
                pass
        except AgentloopError as error:
            failed = error
        except (RuntimeError, OSError) as error:
            raise SyncFailed(f"the sync failed: another of the trainer's ranks is gone ({_first_line(error)})") from error
        await stream.finish()
        told = await self._tell(None)
        if told is None and failed is not None:
            told = f"the sync failed: {failed}"
        if told is not None:
            raise SyncFailed(told)

    async def _tell(self, outcome: str | None) -> str | None:
        """From the trainer's rank 0 to the others: why the sync failed, or that it has not."""
        group = self._group
        if group is None:
            return outcome

        def tell() -> str | None:
            from torch import distributed as dist

            box = [outcome]
            dist.broadcast_object_list(box, group=group, group_src=0)
            return box[0]

        try:
            told: str | None = await to_the_end(asyncio.to_thread(tell))
            return told
        except (RuntimeError, OSError) as error:
            if self.engines:
                logger.warning("a rank of the trainer did not learn how the sync went: %s", _first_line(error))
                return outcome
            return f"the sync failed: the trainer's first rank is gone ({_first_line(error)})"

    async def _quieten(self, guard: GuardedEngine) -> None:
        """End what runs, with its tokens so far: no answer goes on under weights that were not checked yet."""
        if guard.refusal is None:
            await guard.engine.abort_all()
        await guard.hold_back(False)

    def _refuse_half(self, target: int) -> None:
        for guard in self.engines.values():
            has = guard.engine.weight_version
            if guard.holds is not Holds.NEW or (has is not None and has != target):
                raise EngineError(f"engine '{guard.name}' has weights of version {has}, not {target}, after the update")

    async def _checked(self, target: int, stream: Stream, expected: Any) -> dict[str, CheckReport]:
        if self._check is None:
            return {}
        reports: dict[str, CheckReport] = {}
        for guard in self.engines.values():
            sent = stream.sent if self._options["checksums"] else None
            report = await self._check.check(guard.engine, target, sent, expected=expected)
            reports[guard.name] = report
            if not report.ok:
                raise WeightsRefused(f"engine '{guard.name}', version {target}: {report.message}")
        return reports

    async def _fail(self, error: BaseException, stream: Stream, target: int, before: Mapping[str, str | None]) -> BaseException:
        """Leave every engine with the old version, or refused; what to raise."""
        await stream.finish()
        why = f"it took longer than {self._timeout_s:g} s" if isinstance(error, TimeoutError) else _first_line(error)
        raised: BaseException
        if all(guard.holds is Holds.OLD for guard in self.engines.values()):
            with contextlib.suppress(EngineError):
                await self._wake("kv_cache")
            lost = []
            for guard in self.engines.values():
                gone = before[guard.name] or await self._gone(guard)
                if gone is None:
                    guard.serve(None)
                    continue
                lost.append(gone)
                guard.refuse(gone)
            rest = f"version {self.version} goes on serving" if len(lost) < len(self.engines) else "no engine serves"
            raised = SyncFailed("; ".join([f"the sync to version {target} failed: {why}", rest, *lost]))
        else:
            passed = isinstance(error, WeightsRefused)
            told = why if passed else f"the sync to version {target} failed: {why}"
            told += "; no engine serves until a sync lands and passes"
            for guard in self.engines.values():
                guard.refuse(told)
                guard.holds = Holds.UNKNOWN
            raised = WeightsRefused(told) if passed else SyncFailed(told)
        await self._each(lambda guard: guard.hold_back(guard.refusal is not None))
        await self._tell(str(raised))
        if not isinstance(error, Exception):  # a cancellation, an interrupt: that goes up
            logger.error("%s", raised)
            return error
        return raised

    async def _gone(self, guard: GuardedEngine) -> str | None:
        """Why an engine that should serve its old weights does not."""
        has = guard.engine.weight_version
        if has is not None and self._version is not None and has != self._version:
            return f"engine '{guard.name}' has weights of version {has}"
        try:
            async with asyncio.timeout(PROBE_S):
                if isinstance(guard.engine, _Probes):
                    await guard.engine.probe()
                else:
                    await guard.engine.generate([0], Sampling(1, temperature=0.0, log_probs=False), trajectory_id="weight-sync")
                    await guard.engine.release("weight-sync")
        except (EngineError, TimeoutError) as error:
            return f"engine '{guard.name}' does not answer: {str(error) or type(error).__name__}"
        return None

    async def _each(self, act: Callable[[GuardedEngine], Coroutine[Any, Any, None]]) -> None:
        for guard in self.engines.values():
            try:
                await act(guard)
            except EngineError as error:  # it will say so again where that matters
                logger.warning("engine '%s': %s", guard.name, error)

    # -- around a rollout ---------------------------------------------------------------------------------------------

    async def enter(self, step: int | None = None) -> None:
        """Wake the engines, with the weights of this step (default: one more than last time) where a sync is due. Raises as
        `sync` does; who catches a `SyncFailed` after which the old version serves may roll out with that, and the next
        entering tries again."""
        self._step = self._step + 1 if step is None else step
        if self.due():
            await self.sync()
        else:
            await self._wake("kv_cache")

    async def leave(self) -> None:
        """Free what `sleep` names."""
        if self._sleep:
            self._slept.update(self._sleep)
            await self._each(lambda guard: guard.engine.sleep(self._sleep))

    async def _wake(self, tag: str) -> None:
        """Weights before the update, keys and values after it, as SGLang wants it."""
        if tag in self._slept:
            for guard in self.engines.values():
                await guard.engine.wake((tag,))
            self._slept.discard(tag)

    async def __aenter__(self) -> Self:
        await self.enter()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.leave()

    def __enter__(self) -> Self:
        self.run(self.enter())
        return self

    def __exit__(self, *error: object) -> None:
        self.run(self.leave())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine of the manager's or of an engine's, from a thread without an event loop."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="agentloop-weight-sync", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def replace(self, name: str, engine: Engine) -> None:
        """Put another engine in the place of one that is gone. It is refused until a sync has landed."""
        guard = self.engines[name]
        guard.engine, guard.holds = engine, Holds.UNKNOWN
        guard.refuse(f"engine '{name}' is a new one, and no sync has landed yet")

    async def close(self) -> None:
        """Let go of what the plan keeps. The engines are their owner's to close."""
        await self.plan.close()
        if self._thread is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)


@runtime_checkable
class _TellsVersion(Protocol):
    """An engine of processes that outlive this one, such as servers: after a restart of the trainer they have a version."""

    async def ask_version(self) -> int | None: ...


@runtime_checkable
class _Probes(Protocol):
    """An engine that is not asked by `generate` whether it answers."""

    async def probe(self) -> None: ...


async def _ask_version(guard: GuardedEngine) -> None:
    if isinstance(guard.engine, _TellsVersion):
        await guard.engine.ask_version()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
