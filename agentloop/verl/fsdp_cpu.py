"""verl's FSDP2 engine on the CPU, and the rollout beside it: `actor_rollout_ref.model.external_lib=agentloop.verl.fsdp_cpu`.

verl imports `external_lib` in every process that builds the model's config, before it looks an engine or a rollout up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from agentloop.verl import replica as replica  # registers the rollout `agentloop_local`


# verl/workers/engine/fsdp/transformer_impl.py:1143 registers the engine for cuda and npu alone.
@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])
class CPUFSDPEngineWithLMHead(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl's engine, unchanged but for the reference model."""

    engine_config: Any

    def _build_fsdp_module(self, module: Any) -> Any:
        # transformer_impl.py:459-462 gives a reference model (`forward_only`) a CPUOffloadPolicy with pinned memory, which
        # needs an accelerator. On a CPU there is nowhere to offload to, so both reasons for it are hidden while building.
        config = self.engine_config
        self.engine_config = dataclasses.replace(config, forward_only=False, offload_policy=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = config
