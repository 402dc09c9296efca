"""Our loop inside verl's own agent loop framework, for those who keep verl's manager.

A YAML file for `actor_rollout_ref.rollout.agent.agent_loop_config_path`:

```
- name: agentloop
  _target_: agentloop.verl.agent_loop.AgentloopAgentLoop
```

Rows with `agent_name: agentloop` then run through `AgentLoop`; `rollout.agent.default_agent_loop=agentloop` makes it the
default. Settings are those of the manager (`agentloop.verl.settings`). There is no group here: verl calls each trajectory by
itself and knows no masked one, see `AgentloopAgentLoop.run`.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, DictConfigWrap

from agentloop.batch import extra_fields, loop_metrics, num_turns, routed_experts
from agentloop.data.rows import content_key, sample_from_row
from agentloop.loop import AgentLoop
from agentloop.trajectory import Trajectory
from agentloop.verl.client import VerlEngine
from agentloop.verl.settings import RolloutSettings, read_settings
from agentloop.verl.worker import build_loop

_built: WeakKeyDictionary[Any, tuple[RolloutSettings, AgentLoop]] = WeakKeyDictionary()
"""By LLM client: verl makes an agent loop anew for every trajectory, and tools must live as long as the worker."""


class AgentloopAgentLoop(AgentLoopBase):  # type: ignore[misc]
    """One trajectory, handed over as verl's `AgentLoopOutput`."""

    def __init__(self, trainer_config: DictConfigWrap, server_manager: Any, tokenizer: Any, **kwargs: Any) -> None:
        """As `AgentLoopBase`, whose own token builder is not made: it would be paid for with every trajectory."""
        if server_manager not in _built:
            settings = read_settings(trainer_config.config)
            _built[server_manager] = (settings, build_loop(VerlEngine(server_manager), settings, tokenizer))
        self.settings, self.agent = _built[server_manager]
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """`kwargs` are the dataset's columns, with verl's `uid`, `global_steps` and `session_id`.

        verl scores the output itself, through its reward loop. A masked trajectory cannot be left out, and raising would
        make verl throw its whole group away, so it comes back with score 0, an all-zero mask, and one padding token as its
        response. It has no gradient, but verl counts its 0 in the group's baseline: use the manager where that matters.
        """
        step = int(kwargs.get("global_steps", 0))
        sample = sample_from_row(kwargs, uid=str(kwargs.get("uid", "0")), system_prompt=self.settings.system_prompt)
        sample = replace(sample, seed_key=f"{step}/{kwargs.get('index', 0)}/{content_key(sample)}")
        sampling = replace(
            self.settings.train,
            temperature=float(sampling_params.get("temperature", 1.0)),
            top_p=float(sampling_params.get("top_p", 1.0)),
            top_k=int(sampling_params.get("top_k", -1)),
            log_probs=bool(sampling_params.get("logprobs", False)),
        )
        # The legacy worker does not say which sibling this is; two of them must not share their seeds.
        sibling = int(kwargs["session_id"]) if "session_id" in kwargs else random.getrandbits(31)
        trajectory = await self.agent.run(sample, sampling=sampling, sibling=sibling, step=step)
        return self.output(trajectory, log_probs=sampling.log_probs)

    def output(self, trajectory: Trajectory, *, log_probs: bool = True) -> AgentLoopOutput:
        """The trajectory in verl's shape."""
        extras = {name: value for name, value in extra_fields(trajectory).items() if name != "reward_extra_info"}
        common = {
            "num_turns": num_turns(trajectory),
            "metrics": AgentLoopMetrics(**loop_metrics(trajectory)),
            "extra_fields": extras,
        }
        if trajectory.masked:
            fits = 0 < trajectory.prompt_len <= self.settings.prompt_length
            extras["reward_extra_info"] = {}
            return AgentLoopOutput(
                prompt_ids=trajectory.prompt_ids if fits else [self.pad_token_id],
                response_ids=[self.pad_token_id],
                response_mask=[0],
                response_logprobs=[0.0] if log_probs else None,
                reward_score=0.0,
                **common,
            )
        return AgentLoopOutput(
            prompt_ids=trajectory.prompt_ids,
            response_ids=trajectory.response_ids,
            response_mask=trajectory.response_mask,
            response_logprobs=trajectory.rollout_log_probs,
            routed_experts=routed_experts(trajectory),
            **common,
        )
