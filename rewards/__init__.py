"""What a trajectory is worth: the interface and the rewards that we ship."""

from agentloop.rewards.base import RewardFunction
from agentloop.rewards.boxed import BoxedNumber, canonical_number, last_boxed
from agentloop.rewards.function import FunctionReward, load_reward

__all__ = ["BoxedNumber", "FunctionReward", "RewardFunction", "canonical_number", "last_boxed", "load_reward"]
