"""What a trajectory is worth."""

from __future__ import annotations

from typing import Protocol

from agentloop.trajectory import Reward, Sample, Trajectory


class RewardFunction(Protocol):
    """Scores one ended trajectory. Raising is a failure of the reward, not a reward of 0: the loop ends the trajectory
    with an infrastructure failure and masks it."""

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        """`text` is the content of the model's last turn, without reasoning and the end-of-turn token."""
        ...
