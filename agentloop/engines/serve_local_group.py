"""The local server's end of weights over a process group, as SGLang 0.5.12 does it (`srt/model_executor/model_runner.py`):
each call takes one broadcast for each tensor and puts them into the model at once, so an update that ends half-way leaves
some of each."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import torch

from agentloop.engines.local import LocalEngine
from agentloop.engines.update_group import UpdateGroup
from agentloop.errors import EngineError

TIMEOUT_S = 60.0


class UpdateGroups:
    """The groups that a local engine is in, by name. The answers are SGLang's: whether it succeeded, and a sentence."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._groups: dict[str, UpdateGroup] = {}

    async def join(self, body: Mapping[str, Any]) -> tuple[bool, str]:
        def meet() -> UpdateGroup:
            return UpdateGroup(
                body["master_address"],
                int(body["master_port"]),
                rank=int(body["rank_offset"]),
                ranks=int(body["world_size"]),
                name=body["group_name"],
                backend=body.get("backend", "nccl"),
                timeout_s=TIMEOUT_S,
            )

        try:
            self._groups[body["group_name"]] = await asyncio.to_thread(meet)
        except (RuntimeError, ValueError) as error:
            return False, f"Failed to initialize custom process group: {error}."
        return True, "Succeeded to initialize custom process group."

    async def leave(self, body: Mapping[str, Any]) -> tuple[bool, str]:
        group = self._groups.pop(body["group_name"], None)
        if group is None:
            return False, "The group to be destroyed does not exist."
        await asyncio.to_thread(group.close)
        return True, "Succeeded to destroy custom process group."

    async def receive(self, body: Mapping[str, Any]) -> tuple[bool, str]:
        group = self._groups.get(body["group_name"])
        if group is None:
            return (
                False,
                f"Group {body['group_name']} not in {list(self._groups)}. Please call `init_weights_update_group` first.",
            )
        tensors = [
            torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in zip(body["dtypes"], body["shapes"], strict=True)
        ]
        try:
            await asyncio.to_thread(group.broadcast, tensors)
            named = list(zip(body["names"], tensors, strict=True))
            await self._engine.update_weights(named, self._engine.weight_version)
        except (EngineError, RuntimeError) as error:
            return False, f"Failed to update parameter online: {error}. Please discard the whole weights."
        return True, "Succeeded to update parameter online."
