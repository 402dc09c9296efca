"""The CPU platform and the rollout in fresh processes: inactive unless asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys

LOOK = """
import json, os, sys
import verl
from verl.plugin.platform.platform_manager import PlatformRegistry, get_platform
seen = {"cpu": PlatformRegistry.get("cpu") is not None, "device": get_platform().device_name,
        "heavy": [m for m in sys.modules if m.startswith("agentloop.verl.") and m != "agentloop.verl.plugin"]}
print(json.dumps(seen))
"""

REGISTERED = """
import json, torch
import verl
from agentloop.verl import fsdp_cpu
from verl.utils.device import get_torch_device, get_device_id, auto_set_device
from verl.workers.engine.base import EngineRegistry
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import get_rollout_replica_class
device = get_torch_device()
device.empty_cache(); device.synchronize(); device.reset_peak_memory_stats()
print(json.dumps({
    "engine": EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__,
    "adapter": get_rollout_class("agentloop_local").__name__,
    "replica": get_rollout_replica_class("agentloop_local").__name__,
    "id": str(get_device_id()),
    "peak": device.max_memory_allocated() > 1 << 20,
    "stream": device.current_stream is torch.cpu.current_stream,
}))
"""


SAVED = """
import json, torch
import verl
from agentloop.verl import fsdp_cpu
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from verl.utils.fsdp_utils import fsdp2_sharded_load_from_cpu, fsdp2_sharded_save_to_cpu
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
model = fully_shard(torch.nn.Linear(2, 2, bias=False), mesh=init_device_mesh("cpu", (1,)))
weight = lambda: model.weight.full_tensor().tolist()
before = weight()
saved = fsdp2_sharded_save_to_cpu(model)
with torch.no_grad():
    model.weight.add_(1)
changed = weight() != before
fsdp2_sharded_load_from_cpu(model, *saved)
print(json.dumps({"changed": changed, "restored": weight() == before}))
"""


def look(code: str, **env: str) -> dict[str, object]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**kept, **env}, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def test_inactive_unless_asked_for() -> None:
    seen = look(LOOK, VERL_USE_EXTERNAL_MODULES="agentloop.verl.plugin")
    assert seen["cpu"] is False
    assert seen["device"] != "cpu"
    assert seen["heavy"] == []


def test_registered_when_asked_for() -> None:
    seen = look(REGISTERED, VERL_USE_EXTERNAL_MODULES="agentloop.verl.plugin", VERL_PLATFORM="cpu")
    assert seen == {
        "engine": "CPUFSDPEngineWithLMHead",
        "adapter": "LocalServerAdapter",
        "replica": "LocalReplica",
        "id": "cpu",
        "peak": True,
        "stream": True,
    }


def test_a_saved_policy_does_not_follow_the_weights() -> None:
    seen = look(SAVED, VERL_USE_EXTERNAL_MODULES="agentloop.verl.plugin", VERL_PLATFORM="cpu")
    assert seen == {"changed": True, "restored": True}
