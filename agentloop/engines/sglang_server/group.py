"""Weights for SGLang servers over a process group: `/init_weights_update_group`, `/update_weights_from_distributed`.

As SGLang 0.5.12 has them (`srt/entrypoints/http_server.py`, `srt/model_executor/model_runner.py`): the scheduler of rank
`rank_offset + tp_rank` takes one broadcast from rank 0 for every tensor of a call, then loads them. A call that fails leaves
some of them loaded, so a server stays paused from `begin` to `end` and answers nobody in between, also if the trainer dies.
Run against the local server; not run against SGLang itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agentloop.engines.sglang_server.http import ServerLost
from agentloop.errors import EngineError

if TYPE_CHECKING:
    from agentloop.engines.sglang_server.engine import SGLangServerEngine


class ServerMember:
    """All servers of one engine."""

    def __init__(self, engine: SGLangServerEngine, *, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._sizes: dict[str, int] = {}
        """Ranks by address."""

    async def ranks(self) -> int:
        """Raises `EngineError` for a server that is gone, and for one whose ranks SGLang cannot number (more than one replica
        or pipeline stage in it)."""
        self._sizes = {}
        for url in await self._engine.workers():
            info = await self._ask(url, "/server_info", None)
            if not isinstance(info, Mapping):
                raise EngineError(f"{url}: /server_info answered what no SGLang server does")
            if info.get("dp_size", 1) > 1 and not info.get("enable_dp_attention"):
                raise EngineError(f"{url}: SGLang takes no weights over a process group with dp_size {info['dp_size']}")
            if info.get("pp_size", 1) > 1:
                raise EngineError(f"{url}: with pp_size {info['pp_size']} SGLang gives one rank to several processes")
            self._sizes[url] = int(info.get("tp_size", 1))
        return sum(self._sizes.values())

    async def join(self, address: str, port: int, *, first: int, ranks: int, name: str, backend: str) -> None:
        bodies = []
        for url, size in self._sizes.items():
            body = {"master_address": address, "master_port": port, "rank_offset": first, "world_size": ranks}
            bodies.append((url, {**body, "group_name": name, "backend": backend}))
            first += size
        await asyncio.gather(*(self._succeed(url, "/init_weights_update_group", body) for url, body in bodies))

    async def begin(self) -> None:
        self._engine.changing(True)
        await self._all("/pause_generation", {"mode": "abort"})
        await self._all(f"/flush_cache?timeout={self._timeout_s / 2:g}", {})

    async def receive(self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], *, name: str) -> None:
        body = {"names": list(names), "dtypes": list(dtypes), "shapes": [list(shape) for shape in shapes]}
        body |= {"group_name": name, "flush_cache": False}
        await asyncio.gather(*(self._succeed(url, "/update_weights_from_distributed", body) for url in self._sizes))

    async def end(self, version: int) -> None:
        await self._all(f"/flush_cache?timeout={self._timeout_s / 2:g}", {})
        await asyncio.gather(
            *(self._succeed(url, "/update_weight_version", {"new_version": str(version)}) for url in self._sizes)
        )
        await self._all("/continue_generation", {})
        self._engine.changing(False, version)

    async def cancel(self) -> None:
        try:
            await self._all("/continue_generation", {})
        finally:
            self._engine.changing(False)

    async def leave(self, name: str) -> None:
        await self._all("/destroy_weights_update_group", {"group_name": name})

    async def _all(self, path: str, body: Mapping[str, Any]) -> None:
        await asyncio.gather(*(self._ask(url, path, body) for url in self._sizes))

    async def _succeed(self, url: str, path: str, body: Mapping[str, Any]) -> None:
        answer = await self._ask(url, path, body)
        if not (isinstance(answer, Mapping) and answer.get("success")):
            raise EngineError(f"{url}: {path} failed: {answer}")

    async def _ask(self, url: str, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            return await self._engine.ask(url, path, body, timeout_s=self._timeout_s)
        except ServerLost as error:
            raise EngineError(str(error)) from error
