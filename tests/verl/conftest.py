"""Fixtures of the verl tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agentloop.trajectory import Trajectory
from tests.verl.support import conversation, verl_config

FUNCTION = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kw):
    if ground_truth == "boom":
        raise ValueError("the reward is broken")
    return {"score": len(solution_str) / 100, "acc": 1, "source": data_source, "truth": ground_truth,
            "turns": int(extra_info["num_turns"]), "index": extra_info["index"], "rewards": len(extra_info["tool_rewards"])}
"""


@pytest.fixture
def handle(tokenizer: Any, tmp_path: Path) -> Any:
    """verl's reward loop with a custom function, called in this process as a Ray actor would be."""
    from verl.trainer.ppo.reward import load_reward_manager

    (tmp_path / "reward.py").write_text(FUNCTION)
    config = verl_config(**{"reward.custom_reward_function.path": str(tmp_path / "reward.py")})

    class Handle:
        def __init__(self) -> None:
            self.seen: list[Any] = []

            async def compute_score(data: Any) -> Any:
                self.seen.append(data)
                return await load_reward_manager(config, tokenizer).run_single(data)

            self.compute_score = SimpleNamespace(remote=compute_score)

    return Handle()


@pytest.fixture
def build() -> Callable[..., Trajectory]:
    """Builds ledgers by hand, see `conversation`."""
    return conversation
