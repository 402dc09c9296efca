"""Any reward of agentloop as a reward function of verl.

```
reward.custom_reward_function.path=pkg://agentloop.verl.reward_function
reward.custom_reward_function.name=compute_score
+reward.custom_reward_function.reward_kwargs.reward=agentloop.rewards.tool_use:ToolUseReward
+reward.custom_reward_function.reward_kwargs.kwargs.error=-0.1
```

`+….reward_kwargs.file=reward.yaml` takes `reward` and `kwargs` from a file instead. In a rollout of ours the reward sees the
trajectory; verl's own agent loops hand over text alone, and a reward that needs more then raises. See
`agentloop.verl.reward_manager` for a reward manager that does the same and sees the tokens in either case.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from agentloop.config import Strict, load_yaml, validate
from agentloop.errors import ConfigError
from agentloop.rewards.base import RewardFunction
from agentloop.rewards.spec import RewardSpec, plain, reads_trajectory
from agentloop.trajectory import Reward, Sample, Trajectory
from agentloop.verl.reward import OURS, TURN_REWARDS


class RewardChoice(Strict):
    """Which reward: `reward` and `kwargs`, or a `file` that holds them."""

    reward: str | None = None
    kwargs: dict[str, Any] | None = None
    file: str | None = None

    def spec(self, where: str) -> RewardSpec:
        """Raises `ConfigError` that begins with `where`, or with the file's name."""
        if self.file is not None:
            if self.reward is not None or self.kwargs is not None:
                raise ConfigError(f"{where}: give 'file', or 'reward' and 'kwargs', not both")
            return validate(RewardSpec, load_yaml(self.file), self.file)
        if self.reward is None:
            raise ConfigError(f"{where}: key 'reward' is missing ('package.module:name' or 'path/to/file.py:name'), or 'file'")
        return RewardSpec(reward=self.reward, kwargs=self.kwargs or {})

    def load(self, where: str) -> RewardFunction:
        """Raises `ConfigError` that begins with `where`, or with the file's name."""
        return self.spec(where).load(self.file or where)


_loaded: dict[str, RewardFunction] = {}
"""By configuration. A reward may hold a sandbox or connections, so there is one for all calls of a process."""

WHERE = "reward.custom_reward_function.reward_kwargs"
_VERLS = ("reward_router_address", "reward_model_tokenizer")
"""What verl adds where a reward model is served."""


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    reward: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    file: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """As verl calls it; `reward`, `kwargs` and `file` come from `reward_kwargs`. Answers `score`, the components and the info.

    Raises what the reward raises, and `ConfigError` for another key in `reward_kwargs`, for a reward that cannot be loaded, and
    for one that needs a trajectory where there is none.
    """
    choice = {"reward": reward, "kwargs": None if kwargs is None else plain(kwargs), "file": file}
    choice |= {name: value for name, value in more.items() if name not in _VERLS}
    key = json.dumps(choice, sort_keys=True, default=repr)
    if key not in _loaded:
        _loaded[key] = validate(RewardChoice, choice, WHERE).load(WHERE)
    function = _loaded[key]
    ours = (extra_info or {}).get(OURS)
    if ours is not None:
        trajectory, text = ours["trajectory"], ours["text"]
    else:
        refuse_without_trajectory(function, "a reward function is given text alone here")
        own = {name: value for name, value in (extra_info or {}).items() if isinstance(name, str)}
        sample = Sample([], data_source=data_source, ground_truth=ground_truth, extra_info=own)
        trajectory, text = Trajectory(sample), solution_str
    scored = check_reward(await function(trajectory, trajectory.sample, text))
    return {"score": scored.value, **extra_info_of(scored, by_turn=ours is not None)}


def refuse_without_trajectory(function: RewardFunction, why: str) -> None:
    """`ConfigError` if `function` needs turns and calls: better than a score made of turns that are not there."""
    if reads_trajectory(function):
        raise ConfigError(
            f"reward {type(function).__name__}: it needs the trajectory's turns and calls, and {why}; "
            "use agentloop.verl.AgentLoopManager or AgentloopAgentLoop for the rollout"
        )


def check_reward(reward: Any) -> Reward:
    """Raises `TypeError` or `ValueError` for what is no reward: verl would train on NaN."""
    if not isinstance(reward, Reward):
        raise TypeError(f"the reward answered {reward!r:.80}, which is no Reward")
    if not math.isfinite(reward.value):
        raise ValueError(f"the reward's value is {reward.value}, which is no finite number")
    return reward


def extra_info_of(reward: Reward, *, by_turn: bool) -> dict[str, Any]:
    """What verl logs: info, then components that it does not name. verl averages each key that is no text in validation, so all
    else becomes text. `by_turn`: the turns' rewards too, for a rollout of ours, which takes them out again."""
    numbers = (bool, int, float, np.number)
    info = {k: v if isinstance(v, (str, *numbers)) else "" if v is None else str(v) for k, v in reward.info.items()}
    found = {**info, **{name: value for name, value in reward.components.items() if name not in info}}
    found.pop("score", None)
    return {**found, TURN_REWARDS: list(reward.turns)} if by_turn and reward.turns else found
