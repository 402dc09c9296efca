"""Parts that the verl tests share: ledgers built by hand, and verl's own post-processing of the same conversations."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig

from agentloop.trajectory import (
    CallRecord,
    CallStatus,
    EndReason,
    Origin,
    Reward,
    Sample,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)


def conversation(
    *,
    uid: str = "g0",
    sibling: int = 0,
    prompt: int = 7,
    turns: tuple[tuple[int, int], ...] = ((5, 3), (4, 0)),
    reward: Reward | None = None,
    masked: bool = False,
    log_probs: bool = True,
    seed: int = 0,
    validate: bool = False,
) -> Trajectory:
    """A ledger with `prompt` tokens and for every turn (sampled tokens, tokens of the tool's answer)."""
    rng = random.Random(f"{uid}/{sibling}/{seed}")
    messages = [{"role": "user", "content": f"question {uid}"}]
    row = {
        "raw_prompt": messages,
        "data_source": "tests",
        "reward_model": {"style": "rule", "ground_truth": "7"},
        "extra_info": {"index": 3},
        "index": 3,
    }
    sample = Sample(messages=messages, uid=uid, data_source="tests", ground_truth="7", fields=row)
    trajectory = Trajectory(sample, sibling=sibling, step=2, validate=validate)
    trajectory.append_prompt([rng.randrange(3, 500) for _ in range(prompt)])
    for index, (sampled, observed) in enumerate(turns):
        start = len(trajectory)
        turn = Turn(
            index, start, start + sampled, StopReason.STOP, weight_version=1, min_weight_version=1, generate_s=0.5, tools_s=0.25
        )
        values = [-rng.random() for _ in range(sampled)] if log_probs else None
        trajectory.append_sampled([rng.randrange(3, 500) for _ in range(sampled)], values, turn)
        if observed:
            turn.calls.append(CallRecord(ToolCall("calculator", {}), CallStatus.OK, "7", reward=0.5))
            trajectory.append(Origin.OBSERVATION, [rng.randrange(3, 500) for _ in range(observed)])
            trajectory.append(Origin.TEMPLATE, [1, 2])
    trajectory.end_reason = EndReason.ENGINE_FAILURE if masked else EndReason.FINAL_ANSWER
    trajectory.reward = None if masked else reward
    trajectory.masked = masked
    trajectory.score_s = 0.125
    return trajectory


def verl_output(trajectory: Trajectory) -> Any:
    """The same conversation as verl's own loops would hand it over."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

    reward = trajectory.reward
    return AgentLoopOutput(
        prompt_ids=trajectory.prompt_ids,
        response_ids=trajectory.response_ids,
        response_mask=trajectory.response_mask,
        response_logprobs=trajectory.rollout_log_probs,
        reward_score=None if reward is None else reward.value,
        num_turns=1 + len(trajectory.turns) + sum(1 for turn in trajectory.turns if turn.calls),
        metrics=AgentLoopMetrics(
            generate_sequences=sum(turn.generate_s for turn in trajectory.turns),
            tool_calls=sum(turn.tools_s for turn in trajectory.turns),
            compute_score=trajectory.score_s,
            num_preempted=-1,
        ),
        extra_fields={
            "turn_scores": [],
            "tool_rewards": [record.reward for record in trajectory.calls],
            "min_global_steps": 1,
            "max_global_steps": 1,
            **({} if reward is None else {"reward_extra_info": dict(reward.info)}),
        },
    )


def verl_worker(tokenizer: Any, prompt_length: int, response_length: int) -> Any:
    """verl's real worker, with what its post-processing reads."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    worker = AgentLoopWorker.__new__(AgentLoopWorker)
    worker.tokenizer = tokenizer
    worker.processor = None
    worker.mm_processor_kwargs = {}
    worker.rollout_config = SimpleNamespace(prompt_length=prompt_length, response_length=response_length)
    worker.reward_loop_worker_handles = None
    worker.distillation_enabled = False
    return worker


def verl_config(**overrides: Any) -> DictConfig:
    """verl's own configuration, composed as its command line does it, with a few small sizes and dotted overrides."""
    from hydra import compose, initialize_config_module

    dotted = {
        "actor_rollout_ref.model.path": "no-model",
        "data.max_prompt_length": 64,
        "data.max_response_length": 48,
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "trainer.experiment_name": "tests",
        **overrides,
    }
    with initialize_config_module("verl.trainer.config", version_base=None):
        composed: DictConfig = compose("ppo_trainer", [f"++{key}={value}" for key, value in dotted.items()])
    return composed
