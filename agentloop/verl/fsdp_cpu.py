"""verl's FSDP2 engine on the CPU, and the rollout beside it: `actor_rollout_ref.model.external_lib=agentloop.verl.fsdp_cpu`.

verl imports `external_lib` in every process that builds the model's config, before it looks an engine or a rollout up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from verl.utils import fsdp_utils
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


_save = fsdp_utils.fsdp2_sharded_save_to_cpu


def _saved_apart(model: Any) -> tuple[dict[str, tuple[Any, Any]], Any]:
    """verl's, with copies: what `.cpu()` gives of a tensor in main memory is the tensor itself (fsdp_utils.py:1180), so the old
    policy that `separate_async` saves between two syncs would follow the weights, and its probabilities be the new ones."""
    state, spec = _save(model)
    return {name: (tensor.clone(), own) for name, (tensor, own) in state.items()}, spec


# experimental/separation/engine_workers.py:99 imports it by name whenever it first saves.
fsdp_utils.fsdp2_sharded_save_to_cpu = _saved_apart
