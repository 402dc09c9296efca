"""verl's SGLang adapter in the trainer's worker. Importing this module imports SGLang."""

from __future__ import annotations

from verl.workers.rollout.sglang_rollout.sglang_rollout import ServerAdapter


class AsyncServerAdapter(ServerAdapter):  # type: ignore[misc]
    """verl's, but for adapters (LoRA): verl's worker knows by the name `sglang` that there the base weights never slept
    (engine_workers.py:775), and would wake them under another name."""

    async def resume(self, tags: list[str]) -> None:
        awake = ["weights"] if self.sleep_level == 1 else []
        tags = [tag for tag in tags if tag not in awake]
        if tags:
            await super().resume(tags)
