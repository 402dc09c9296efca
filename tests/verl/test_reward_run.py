"""A run of the real `verl.trainer.main_ppo` that scores with our reward manager and credits turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.journal import Run
from tests.verl.test_main_ppo import train

REWARD = """
reward: agentloop.rewards.turns:TurnReward
kwargs:
  turn: "{folder}/turn.py:even"
  outcome:
    reward: agentloop.rewards.composite:CompositeReward
    kwargs:
      parts:
        length: {{reward: "agentloop.rewards.length:LengthReward", kwargs: {{max_tokens: 64, buffer_tokens: 32}}, weight: 0.5}}
        tools: {{reward: "agentloop.rewards.tool_use:ToolUseReward", kwargs: {{error: -0.25, no_call: -0.5}}}}
"""

TURN = """
def even(turn, trajectory, sample):
    return float((turn.end - turn.start) % 2 == 0) / 4
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_turns_are_scored_and_credited(tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text(REWARD.format(folder=tmp_path))
    (tmp_path / "turn.py").write_text(TURN)
    steps = train(
        tmp_path,
        "algorithm.adv_estimator=agentloop_turns",
        "+algorithm.turn_outcome_weight=0.5",
        "reward.custom_reward_function.path=null",
        "reward.reward_manager.source=importlib",
        "reward.reward_manager.name=AgentloopRewardManager",
        "reward.reward_manager.module.path=pkg://agentloop.verl.reward_manager",
        f"+reward.reward_kwargs.file={tmp_path}/reward.yaml",
    )
    assert len(steps) == 2
    run = Run(tmp_path / "run")
    rewards = [run.load(row).reward for row in run.trajectories()]
    assert rewards and all(reward is not None for reward in rewards)
    for reward in rewards:
        assert reward is not None
        assert {"outcome/length", "outcome/tools", "turns"} <= reward.components.keys()
        assert reward.value == pytest.approx(reward.components["outcome"] + reward.components["turns"])
    assert any(reward.turns for reward in rewards if reward is not None)
