"""Weights for SGLang in this process over a process group: `init_weights_update_group`, `update_weights_from_distributed`.

As SGLang 0.5.12 has them (`srt/managers/tokenizer_control_mixin.py`, `io_struct.py`, `srt/model_executor/model_runner.py`);
`sglang_server/group.py` does the same with servers, and says what a call means there. Read in SGLang's source, and not run yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentloop.errors import EngineError

if TYPE_CHECKING:
    from agentloop.engines.sglang import SGLangEngine


class EngineMember:
    """The scheduler processes of one `sglang.Engine`."""

    def __init__(self, engine: SGLangEngine) -> None:
        self._engine = engine
        self._open = contextlib.AsyncExitStack()

    async def ranks(self) -> int:
        arguments = self._engine._arguments
        if arguments.dp_size > 1 and not arguments.enable_dp_attention:
            raise EngineError(f"SGLang takes no weights over a process group with dp_size {arguments.dp_size}")
        if arguments.pp_size > 1:
            raise EngineError(f"with pp_size {arguments.pp_size} SGLang gives one rank to several processes")
        return int(arguments.tp_size)

    async def join(self, address: str, port: int, *, first: int, ranks: int, name: str, backend: str) -> None:
        from sglang.srt.managers.io_struct import InitWeightsUpdateGroupReqInput  # type: ignore[import-not-found, unused-ignore]

        self._engine._attach()
        request = InitWeightsUpdateGroupReqInput(
            master_address=address, master_port=port, rank_offset=first, world_size=ranks, group_name=name, backend=backend
        )
        await self._succeed(self._engine._manager.init_weights_update_group(request, None))

    async def begin(self) -> None:
        await self._open.enter_async_context(self._engine._changing)
        self._engine._gate.reasons.add("weights")
        await self._engine._quieten()

    async def receive(self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], *, name: str) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightsFromDistributedReqInput  # type: ignore[import-not-found, unused-ignore]

        self._engine._broken = "the last update of its weights failed"
        request = UpdateWeightsFromDistributedReqInput(
            names=list(names),
            dtypes=list(dtypes),
            shapes=[list(shape) for shape in shapes],
            group_name=name,
            flush_cache=False,
        )
        await self._succeed(self._engine._manager.update_weights_from_distributed(request, None))

    async def end(self, version: int) -> None:
        engine = self._engine
        engine._broken, engine._version = None, version
        engine._manager.server_args.weight_version = str(version)
        await self.cancel()

    async def cancel(self) -> None:
        try:
            await self._engine._go_on()
        finally:
            self._engine._gate.let("weights")
            await self._open.aclose()

    async def leave(self, name: str) -> None:
        from sglang.srt.managers.io_struct import DestroyWeightsUpdateGroupReqInput  # type: ignore[import-not-found, unused-ignore]

        await self._open.aclose()  # where an update has failed half-way: the next one must get in
        self._engine._gate.let("weights")
        request = DestroyWeightsUpdateGroupReqInput(group_name=name)
        await self._engine._control(self._engine._manager.destroy_weights_update_group(request, None))

    async def _succeed(self, call: Any) -> None:
        success, message = await self._engine._control(call)
        if not success:
            raise EngineError(f"SGLang did not take the weights: {message}")
