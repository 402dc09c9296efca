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

import asyncio
import secrets
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, DictConfigWrap

from agentloop.batch import blank, extra_fields, loop_metrics, num_turns, reward_extra_info, routed_experts
from agentloop.data.rows import content_key, sample_from_row
from agentloop.errors import ConfigError
from agentloop.loop import AgentLoop
from agentloop.trajectory import Trajectory
from agentloop.verl.client import VerlEngine
from agentloop.verl.settings import RolloutSettings, read_settings
from agentloop.verl.worker import FLUSH_S, build_loop, run_meta


class Process:
    """What the trajectories of one of verl's worker processes share: the loop with its tools, and the journal's writer."""

    def __init__(self, config: Any, llm_client: Any, tokenizer: Any, reward_handles: Any) -> None:
        self.settings: RolloutSettings = read_settings(config)
        if self.settings.train_side or self.settings.consistency.limits:
            key = "train_side" if self.settings.train_side else "consistency"
            raise ConfigError(
                f"agentloop: key '{key}' needs our manager in the trainer's process "
                "(actor_rollout_ref.rollout.agent.agent_loop_manager_class=agentloop.verl.AgentLoopManager)"
            )
        self.journal: Any = None
        if self.settings.journal:
            from agentloop.journal import JournalWriter, next_generation, token_bytes

            # No part of ours is there before the workers are, so they find their generation together.
            self.journal = JournalWriter(
                self.settings.run_dir,
                f"w-{uuid4().hex[:8]}",
                generation=next_generation(self.settings.run_dir, _start_of_the_run()),
                decode=token_bytes(tokenizer),
                meta=run_meta(config, self.settings),
            )
        self.loop: AgentLoop = build_loop(
            VerlEngine(llm_client), self.settings, tokenizer, reward_handles=reward_handles, recorder=self.journal
        )
        self.blanks: dict[str, Any] = {}
        """What stands for each key of the rewards' extra info in a row that has none."""
        self._running = 0

    async def run(self, *args: Any, **kwargs: Any) -> Trajectory:
        """As `AgentLoop.run`. The last one that runs here waits for the journal: verl may end the process after it."""
        self._running += 1
        try:
            trajectory = await self.loop.run(*args, **kwargs)
        finally:
            self._running -= 1
        if self.journal is not None and not self._running:
            await asyncio.to_thread(self.journal.flush, FLUSH_S)
        return trajectory


_processes: WeakKeyDictionary[Any, Process] = WeakKeyDictionary()
"""By LLM client: verl makes an agent loop anew for every trajectory, and tools must live as long as the worker."""


class AgentloopAgentLoop(AgentLoopBase):  # type: ignore[misc]
    """One trajectory, handed over as verl's `AgentLoopOutput`."""

    def __init__(self, trainer_config: DictConfigWrap, server_manager: Any, tokenizer: Any, **kwargs: Any) -> None:
        """As `AgentLoopBase`, whose own token builder is not made: it would be paid for with every trajectory."""
        if server_manager not in _processes:
            worker = _verls_call().get("self")
            handles = getattr(worker, "reward_loop_worker_handles", None)
            _processes[server_manager] = Process(trainer_config.config, server_manager, tokenizer, handles)
        self.process = _processes[server_manager]
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """`kwargs` are the dataset's columns, with verl's `uid`, `global_steps` and `session_id`.

        A masked trajectory cannot be left out, and raising would make verl throw its whole group away, so it comes back with
        score 0, an all-zero mask, and one padding token as its response. It has no gradient, but verl counts its 0 in the
        group's baseline: use the manager where that matters. Scored by verl's reward loop workers, as verl does it itself;
        where there are none the trainer scores.
        """
        asked: Mapping[str, Any] = _verls_call().get("trajectory") or {}
        step = max(int(kwargs.get("global_steps", asked.get("step", 0))), 0)
        validate = bool(asked.get("validate", False))
        settings = self.process.settings
        sample = sample_from_row(kwargs, uid=str(kwargs.get("uid", "0")), system_prompt=settings.system_prompt)
        when = "val" if validate else f"train/{step}"
        sample = replace(sample, seed_key=f"{when}/{kwargs.get('index', 0)}/{content_key(sample)}")
        sampling = replace(
            settings.train,
            temperature=float(sampling_params.get("temperature", 1.0)),
            top_p=float(sampling_params.get("top_p", 1.0)),
            top_k=int(sampling_params.get("top_k", -1)),
            log_probs=bool(sampling_params.get("logprobs", False)),
        )
        # The legacy worker does not say which sibling this is; two of them must not share their seeds, nor their records.
        legacy = "session_id" not in kwargs
        sibling = secrets.randbits(31) if legacy else int(kwargs["session_id"])
        trajectory = await self.process.run(sample, sampling=sampling, sibling=sibling, step=step, validate=validate)
        return self.output(trajectory, log_probs=sampling.log_probs, legacy=legacy)

    def output(self, trajectory: Trajectory, *, log_probs: bool = True, legacy: bool = False) -> AgentLoopOutput:
        """The trajectory in verl's shape."""
        extras = {name: value for name, value in extra_fields(trajectory).items() if name != "reward_extra_info"}
        common = {
            "num_turns": num_turns(trajectory),
            "metrics": AgentLoopMetrics(**loop_metrics(trajectory)),
            "extra_fields": extras,
        }
        if trajectory.masked:
            fits = 0 < trajectory.prompt_len <= self.process.settings.prompt_length
            # verl's padded batch wants in each row what is in its first one (`_postprocess`, agent_loop.py:1111). It is put
            # together when all its trajectories have ended, and so has the blanks of those that end after this one.
            extras["reward_extra_info"] = self.process.blanks if legacy else {}
            return AgentLoopOutput(
                prompt_ids=trajectory.prompt_ids if fits else [self.pad_token_id],
                response_ids=[self.pad_token_id],
                response_mask=[0],
                response_logprobs=[0.0] if log_probs else None,
                reward_score=0.0,
                **common,
            )
        if trajectory.reward is not None:
            extras["reward_extra_info"] = info = reward_extra_info(trajectory)
            self.process.blanks.update({key: blank(value) for key, value in info.items() if key not in self.process.blanks})
        return AgentLoopOutput(
            prompt_ids=trajectory.prompt_ids,
            response_ids=trajectory.response_ids,
            response_mask=trajectory.response_mask,
            response_logprobs=trajectory.rollout_log_probs,
            routed_experts=routed_experts(trajectory),
            reward_score=None if trajectory.reward is None else trajectory.reward.value,
            **common,
        )


def _verls_call() -> dict[str, Any]:
    """The variables of the call of verl's that this one is made in, `AgentLoopWorker._run_agent_loop`
    (`verl/experimental/agent_loop/agent_loop.py:636`); empty if there is none.

    Only there are `self`, with the reward loop workers' handles, and `trajectory`, with the step and whether this is
    validation: verl tells its agent loops nothing of either, and they are needed to score and to keep validation apart."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "_run_agent_loop":
            return dict(frame.f_locals)
    return {}


def _start_of_the_run() -> str:
    """What all processes of one start have in common, and no other start has."""
    import ray

    if not ray.is_initialized():
        return uuid4().hex
    context = ray.get_runtime_context()
    return f"{context.get_session_name()}/{context.get_job_id()}"
