"""Any reward of agentloop as a reward manager of verl.

```
reward.reward_manager.source=importlib
reward.reward_manager.name=AgentloopRewardManager
reward.reward_manager.module.path=pkg://agentloop.verl.reward_manager
+reward.reward_kwargs.reward=agentloop.rewards.math:MathReward
+reward.reward_kwargs.kwargs.some_key=value
```

`+reward.reward_kwargs.file=reward.yaml` takes `reward` and `kwargs` from a file instead. The manager is in verl's registry as
`agentloop` too, once this module is imported (`source=register` needs that in the trainer's and the workers' processes).
"""

from __future__ import annotations

from typing import Any

import torch
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from agentloop.config import validate
from agentloop.data.rows import sample_from_row
from agentloop.errors import ConfigError
from agentloop.rewards.spec import bind_tokenizer, plain
from agentloop.trajectory import Origin, StopReason, Trajectory, Turn
from agentloop.verl.reward import OURS
from agentloop.verl.reward_function import RewardChoice, check_reward, extra_info_of, refuse_without_trajectory

NAME = "agentloop"
_WHERE = "reward.reward_kwargs"


@register(NAME)
class AgentloopRewardManager(RewardManagerBase):  # type: ignore[misc]
    """Scores rows with the reward that `reward.reward_kwargs` names. Rewards that decode get the model's tokenizer."""

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        """As verl makes its managers. Raises `ConfigError` if the reward cannot be loaded, or a function is configured too."""
        super().__init__(config, tokenizer, compute_score)
        if (config.reward.get("custom_reward_function") or {}).get("path"):
            raise ConfigError(
                "reward.custom_reward_function.path: the reward manager 'agentloop' scores with reward.reward_kwargs; "
                "drop one of both"
            )
        given = plain(config.reward.get("reward_kwargs") or {})
        self.reward = validate(RewardChoice, given, _WHERE).load(_WHERE)
        bind_tokenizer([self.reward], tokenizer)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """`reward_score` and `reward_extra_info` of the last row, as verl's own managers do. Raises what the reward raises."""
        item = data[-1:][0]
        extras = item.non_tensor_batch.get("tool_extra_fields") or {}
        ours = extras.get(OURS)
        if ours is not None:
            trajectory, text = ours["trajectory"], ours["text"]
        else:
            trajectory, complete = self._trajectory(item)
            if not complete:
                refuse_without_trajectory(self.reward, "verl hands over a response of several turns without them")
            text = await self.loop.run_in_executor(None, self._text, trajectory)
        reward = check_reward(await self.reward(trajectory, trajectory.sample, text))
        info = {"score": reward.value, **extra_info_of(reward, by_turn=ours is not None)}
        return {"reward_score": reward.value, "reward_extra_info": info}

    def _trajectory(self, item: Any) -> tuple[Trajectory, bool]:
        """A row of verl's own loops, and whether nothing is missing: a response of several turns has calls that it does not
        tell of. Its turns are the runs of ones in `response_mask`, where there is one."""
        row = item.non_tensor_batch
        trajectory = Trajectory(sample_from_row(row, uid=str(row.get("uid", "0"))))
        prompt, response = item.batch["prompts"], item.batch["responses"]
        attention = item.batch["attention_mask"].bool()
        trajectory.append_prompt(prompt[attention[: len(prompt)]].tolist())
        kept = attention[len(prompt) :]
        ids = response[kept]
        mask = item.batch["response_mask"][kept] if "response_mask" in item.batch.keys() else torch.ones_like(ids)  # noqa: SIM118
        at = 0
        while at < len(ids):
            run = int(torch.nonzero(torch.cat([mask[at:] != mask[at], mask.new_ones(1).bool()]))[0])
            piece = ids[at : at + run].tolist()
            if mask[at]:
                start = len(trajectory)
                trajectory.append_sampled(piece, None, Turn(len(trajectory.turns), start, start + run, StopReason.STOP))
            elif trajectory.turns:
                trajectory.append(Origin.OBSERVATION, piece)
            at += run
        return trajectory, int(row.get("__num_turns__", 2)) <= 2 and len(trajectory.turns) <= 1

    def _text(self, trajectory: Trajectory) -> str:
        """What the last turn sampled, without control tokens."""
        sampled = [segment.ids for segment in trajectory.segments if segment.origin is Origin.SAMPLED]
        return str(self.tokenizer.decode(sampled[-1], skip_special_tokens=True)) if sampled else ""
