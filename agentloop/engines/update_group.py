"""A process group of its own between a trainer, which is rank 0, and the processes of engines, to broadcast weights over.

It is made as SGLang 0.5.12 makes its side (`srt/utils/common.py`, `init_custom_process_group`; the names of the keys in the
store must agree), beside whatever default group a process has or has not.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


class UpdateGroup:
    """One rank's end of the group. Everything here blocks: call it in a thread."""

    def __init__(self, address: str, port: int, *, rank: int, ranks: int, name: str, backend: str, timeout_s: float) -> None:
        """Meet the other ranks at `address:port`, where rank 0 listens. Raises `RuntimeError` (torch's) if they do not all come
        within `timeout_s`, which is also how long a broadcast may take."""
        from torch import distributed as dist
        from torch.distributed import distributed_c10d as c10d

        timeout = timedelta(seconds=timeout_s)
        host = f"[{address}]" if ":" in address else address
        store, rank, ranks = next(c10d.rendezvous(f"tcp://{host}:{port}", rank, ranks, timeout=timeout))
        store.set_timeout(timeout)
        self._group: Any
        self._group, _ = c10d._new_process_group_helper(
            ranks, rank, [], dist.Backend(backend), dist.PrefixStore(name, store), group_name=name, timeout=timeout
        )
        c10d._world.pg_group_ranks[self._group] = {each: each for each in range(ranks)}

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """From rank 0 into the others' tensors, one after the other. Raises `RuntimeError` if a rank is gone or late."""
        import torch
        from torch import distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        for work in [self._group.broadcast([tensor], options) for tensor in tensors]:
            work.wait()
        if tensors and tensors[0].is_cuda:
            torch.cuda.current_stream(tensors[0].device).synchronize()

    def abort(self) -> None:
        """Have a broadcast that waits for a rank which is gone end with an error."""
        with contextlib.suppress(Exception):
            self._group.abort()

    def close(self) -> None:
        from torch import distributed as dist

        with contextlib.suppress(Exception):
            dist.destroy_process_group(self._group)


@runtime_checkable
class GroupMember(Protocol):
    """How the processes of one engine take part. Every method may raise `EngineError`."""

    async def ranks(self) -> int:
        """How many processes take part."""
        ...

    async def join(self, address: str, port: int, *, first: int, ranks: int, name: str, backend: str) -> None:
        """Have them meet the others, as ranks `first` and the following ones of `ranks`. Returns when all are there."""
        ...

    async def begin(self) -> None:
        """End what runs, let nothing start, empty the caches."""
        ...

    async def receive(self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], *, name: str) -> None:
        """Take one broadcast for each of these tensors, and put them into the model."""
        ...

    async def end(self, version: int) -> None:
        """All has landed: these are the weights of `version`; go on. An engine that never hears this answers nobody."""
        ...

    async def cancel(self) -> None:
        """Nothing was received since `begin`: go on with the weights of before."""
        ...

    async def leave(self, name: str) -> None:
        """Let go of the group."""
        ...


@runtime_checkable
class JoinsGroups(Protocol):
    """An engine that takes weights over a process group."""

    def group_member(self) -> GroupMember: ...


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
