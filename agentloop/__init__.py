"""agentloop: agentic multi-turn rollouts for reinforcement learning."""

__version__ = "0.1.0"
