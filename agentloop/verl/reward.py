"""verl's reward loop as a `RewardFunction`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from agentloop.batch import extra_fields, num_turns
from agentloop.trajectory import Origin, Reward, Sample, Trajectory

OURS = "agentloop"
"""Key among the extras, and so in a reward function's `extra_info`: the trajectory and the text of its last turn."""
TURN_REWARDS = "agentloop_turn_rewards"
"""Key of a reward's extra info: `Reward.turns`. Taken out before verl sees it."""


class VerlReward:
    """Scores through verl's reward loop workers, so that `reward.custom_reward_function` and every reward manager of verl
    work unchanged.

    What is sent is what `AgentLoopWorker._compute_score` sends (`verl/experimental/agent_loop/agent_loop.py`): one
    `DataProto` row with the tokens, the dataset's columns, `__num_turns__`, and the trajectory's extras as
    `tool_extra_fields`, which verl's managers merge into `extra_info`; `end_reason` is among them, and under `agentloop` the
    trajectory itself (without log-probabilities, the engine's data and the row) and the last turn's text, for rewards of
    ours. `reward_score` becomes the value; `reward_extra_info` the info, its numbers also the components. Whatever the worker
    raises passes on.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        """`handles` are actors with `compute_score(DataProto) -> dict`; each call goes to one of them at random, as verl
        does it."""
        self._handles = list(handles)

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        result = await random.choice(self._handles).compute_score.remote(self.request(trajectory, text))
        info = dict(result.get("reward_extra_info") or {})
        turns = tuple(float(value) for value in info.pop(TURN_REWARDS, ()))
        components = {
            str(name): float(value)
            for name, value in info.items()
            if isinstance(value, int | float | np.number) and not isinstance(value, bool)
        }
        return Reward(value=float(result["reward_score"]), components=components, info=info, turns=turns)

    @staticmethod
    def request(trajectory: Trajectory, text: str = "") -> Any:
        """The row that verl's reward managers read."""
        from tensordict import TensorDict
        from verl.protocol import DataProto

        ids = torch.tensor([trajectory.input_ids], dtype=torch.int64)
        tensors = {
            "prompts": ids[:, : trajectory.prompt_len],
            "responses": ids[:, trajectory.prompt_len :],
            "attention_mask": torch.ones_like(ids),
            "input_ids": ids,
            "position_ids": torch.arange(ids.shape[1], dtype=torch.int64)[None, :],
        }
        extras = {key: value for key, value in extra_fields(trajectory).items() if key != "reward_extra_info"}
        extras[OURS] = {"trajectory": _without_weight(trajectory), "text": text}
        columns: dict[str, Any] = {name: _one(value) for name, value in _columns(trajectory).items()}
        columns["__num_turns__"] = np.array([num_turns(trajectory)])
        columns["tool_extra_fields"] = _one(extras)
        columns["prompt_len"] = np.array([trajectory.prompt_len])
        columns["response_len"] = np.array([trajectory.response_len])
        return DataProto(batch=TensorDict(tensors, batch_size=1), non_tensor_batch=columns)


def _without_weight(trajectory: Trajectory) -> Trajectory:
    """A copy for the reward's process, without what is large and no reward reads."""
    copy = Trajectory(
        replace(trajectory.sample, fields={}), sibling=trajectory.sibling, step=trajectory.step, validate=trajectory.validate
    )
    copy.attempt, copy.state, copy.end_reason = trajectory.attempt, trajectory.state, trajectory.end_reason
    copy.error, copy.total_s = trajectory.error, trajectory.total_s
    turns = iter(trajectory.turns)
    for segment in trajectory.segments:
        if segment.origin is Origin.PROMPT:
            copy.append_prompt(segment.ids)
        elif segment.origin is Origin.SAMPLED:
            while len(copy.turns) < segment.turn:  # turns in which nothing was sampled have no segment
                copy.append_sampled((), None, replace(next(turns), engine_data=None))
            copy.append_sampled(segment.ids, None, replace(next(turns), engine_data=None))
        else:
            copy.append(segment.origin, segment.ids)
    for turn in turns:
        copy.append_sampled((), None, replace(turn, engine_data=None))
    return copy


def _columns(trajectory: Trajectory) -> dict[str, Any]:
    """The dataset's columns, and what a worker adds to them. A function may write into its `extra_info`, so it gets a copy."""
    row = {name: value for name, value in trajectory.sample.fields.items() if not isinstance(value, torch.Tensor)}
    row.setdefault("data_source", trajectory.sample.data_source)
    row.setdefault("reward_model", {"ground_truth": trajectory.sample.ground_truth})
    row["extra_info"] = dict(row.get("extra_info") or {})
    row["raw_prompt"] = trajectory.sample.messages
    return row | {"uid": trajectory.sample.uid, "session_id": trajectory.sibling, "global_steps": trajectory.step}


def _one(value: Any) -> np.ndarray[Any, Any]:
    """A column of one row. numpy would make an array of a list, so the cell is filled by hand."""
    column: np.ndarray[Any, Any] = np.empty(1, dtype=object)
    column[0] = value
    return column
