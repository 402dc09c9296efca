"""Weights over a process group between the trainer's rank 0 and the engines' processes: other GPUs, other hosts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any

from agentloop.engines.update_group import GroupMember, JoinsGroups, UpdateGroup, free_port
from agentloop.errors import ConfigError, EngineError
from agentloop.waiting import to_the_end
from agentloop.weights.export import Bucket
from agentloop.weights.sync_guard import GuardedEngine, Holds
from agentloop.weights.sync_plans import SendPlan
from agentloop.weights.sync_stream import Stream

if TYPE_CHECKING:
    import torch

_COUNT = itertools.count()


class DistributedPlan(SendPlan):
    """Broadcast every tensor from the trainer's rank 0 into the engines' processes, bucket by bucket: each bucket is one call,
    so what must be loaded together is.

    The group is made at the first sync and kept; after a failure it is made anew. Engines are paused before the first bucket
    and go on after the last one, when every engine has loaded everything. They load bucket by bucket, so a failure in between
    leaves them with some of each: they stay paused, also if the trainer dies, and are refused until a sync has landed.
    """

    name = "distributed"

    def __init__(
        self,
        *,
        backend: str = "nccl",
        address: str = "127.0.0.1",
        port: int | None = None,
        device: torch.device | str | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        """`backend`: `nccl`, or `gloo` for engines on CPUs. `address`: this host's, as the engines' hosts reach it; `port`: a
        free one, unless given. `device`: where tensors are sent from (NCCL: this process's GPU); default: where they are.
        `timeout_s`: for a rank that is gone or late to be noticed."""
        if backend not in ("nccl", "gloo"):
            raise ConfigError(f"backend: '{backend}' carries no weights; known are: gloo, nccl")
        self._backend, self._address, self._port, self._device = backend, address, port, device
        self._timeout_s = timeout_s
        self._group: UpdateGroup | None = None
        self._name = ""
        self._members: list[GroupMember] = []
        self._of: list[Any] = []

    async def send(self, stream: Stream, engines: Sequence[GuardedEngine], version: int) -> None:
        await self._join(engines)
        begun, sent = False, False
        try:
            begun = True
            await asyncio.gather(*(member.begin() for member in self._members))
            async for bucket in stream:
                if not sent:
                    sent = True
                    for guard in engines:
                        guard.holds = Holds.UNKNOWN
                await self._broadcast(bucket)
            if not sent:
                raise EngineError("the export is empty")
            await asyncio.gather(*(member.end(version) for member in self._members))
        except BaseException:
            await to_the_end(self._give_up(cancel=begun and not sent))
            raise
        for guard in engines:
            guard.holds = Holds.NEW

    async def _join(self, engines: Sequence[GuardedEngine]) -> None:
        if self._group is not None and [guard.engine for guard in engines] == self._of:
            return
        await self._leave()
        members: list[GroupMember] = []
        for guard in engines:
            if not isinstance(guard.engine, JoinsGroups):
                raise ConfigError(
                    f"engine '{guard.name}' ({type(guard.engine).__name__}) takes no weights over a process group; "
                    "send it tensors, or a folder"
                )
            members.append(guard.engine.group_member())
        sizes = [await member.ranks() for member in members]
        first = [1 + sum(sizes[:number]) for number in range(len(sizes))]
        port, ranks = self._port or free_port(), 1 + sum(sizes)
        name = f"agentloop-weights-{next(_COUNT)}-{port}"

        def join() -> UpdateGroup:
            where = (self._address, port)
            return UpdateGroup(*where, rank=0, ranks=ranks, name=name, backend=self._backend, timeout_s=self._timeout_s)

        self._name, self._members, self._of = name, members, [guard.engine for guard in engines]
        mine = asyncio.ensure_future(asyncio.to_thread(join))
        theirs = (
            member.join(self._address, port, first=at, ranks=ranks, name=name, backend=self._backend)
            for member, at in zip(members, first, strict=True)
        )
        await _all_or_first_error(mine, *theirs)
        self._group = mine.result()

    async def _broadcast(self, bucket: Bucket) -> None:
        group = self._group
        assert group is not None
        tensors = [tensor.contiguous() if self._device is None else tensor.to(self._device) for _, tensor in bucket.tensors]
        names = [name for name, _ in bucket.tensors]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        mine = asyncio.to_thread(group.broadcast, tensors)
        theirs = (member.receive(names, dtypes, shapes, name=self._name) for member in self._members)
        await _all_or_first_error(mine, *theirs)

    async def _give_up(self, *, cancel: bool) -> None:
        if cancel:
            for member in self._members:
                with contextlib.suppress(EngineError):
                    await member.cancel()
        await self._leave()

    async def _leave(self) -> None:
        group, members = self._group, self._members
        self._group, self._members, self._of = None, [], []
        if group is None:
            return
        await asyncio.to_thread(group.abort)
        for member in members:
            with contextlib.suppress(EngineError):
                await member.leave(self._name)
        await asyncio.to_thread(group.close)

    async def close(self) -> None:
        await self._leave()


async def _all_or_first_error(*work: Awaitable[Any]) -> None:
    """Wait for all; at the first error leave the others to end by themselves (the group's time-out sees to it)."""
    tasks = [asyncio.ensure_future(each) for each in work]
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in left:
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
    failed = [error for task in done if (error := task.exception()) is not None]
    for error in failed:  # what an engine says is more than what the process group does
        if isinstance(error, EngineError):
            raise error
    if failed:
        raise EngineError(f"the process group failed: {str(failed[0]).splitlines()[0]}") from failed[0]
