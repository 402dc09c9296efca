"""What verl loads in every process: `VERL_USE_EXTERNAL_MODULES=agentloop.verl.plugin`, or the entry point in `verl.plugins`.

It does nothing unless `VERL_PLATFORM=cpu` asks for the CPU platform. It runs inside `import verl`, in every Ray worker, so
it imports nothing that verl has not imported yet. The rollout and the training engine are registered later, by
`actor_rollout_ref.model.external_lib` (`agentloop.verl.replica` or `agentloop.verl.fsdp_cpu`), in the processes that need them.
"""

from __future__ import annotations

import os

if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from agentloop.verl import platform as platform
