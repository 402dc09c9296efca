"""SGLang as verl's rollout with what our loop can use beside: `actor_rollout_ref.rollout.name=sglang_async`.

Importing this module registers it, and is refused where SGLang is not installed. Every process that looks a rollout up needs
it: `actor_rollout_ref.model.external_lib` names it for those that load the model, and
`actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module` for replicas' own workers. `agentloop train` sets both.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry

from agentloop.errors import ConfigError
from agentloop.verl.sglang_parts import SGLANG_ASYNC

if find_spec("sglang") is None:
    raise ConfigError(f"rollout.name={SGLANG_ASYNC} needs SGLang, which is not installed (pip install 'agentloop[sglang]')")


def _load() -> Any:
    RolloutReplicaRegistry.get("sglang")  # verl's own, for what it prepares before SGLang can be imported (replica.py:324)
    from agentloop.verl.sglang_server import AsyncSGLangReplica

    return AsyncSGLangReplica


RolloutReplicaRegistry.register(SGLANG_ASYNC, _load)
_ROLLOUT_REGISTRY[(SGLANG_ASYNC, "async")] = "agentloop.verl.sglang_adapter.AsyncServerAdapter"
