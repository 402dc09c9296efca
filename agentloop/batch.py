"""Trajectories to training data: verl's padded `DataProto`, and the unpadded rows of its V1 trainer.

Both come from the same ledger, segment by segment, so a mask or a log-probability is where its token is by construction.
Fields, types, shapes and padding are those that verl 0.9.1 writes itself: `AgentLoopWorker._agent_loop_postprocess` and
`_postprocess` in `verl/experimental/agent_loop/agent_loop.py` (padded), `AgentLoopWorkerTQ._agent_loop_postprocess` in
`verl/trainer/ppo/v1/agent_loop_tq.py` (rows). Nothing is ever cut: what does not fit is a `LedgerError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agentloop.errors import LedgerError
from agentloop.trajectory import Origin, Trajectory

if TYPE_CHECKING:
    import torch
    from verl.protocol import DataProto


EXTRA_KEYS = ("turn_scores", "tool_rewards", "min_global_steps", "max_global_steps", "extras")
"""Columns that verl's `_postprocess` always writes, so that batches of different loops can be joined."""


def group_uid(trajectory: Trajectory) -> str:
    """The group of its row: `sample.uid`, and one of its own for a masked one, so that no baseline sees it."""
    return f"{trajectory.sample.uid}-masked-{trajectory.sibling}" if trajectory.masked else trajectory.sample.uid


def num_turns(trajectory: Trajectory) -> int:
    """Chat turns as verl's `ToolAgentLoop` counts them: the prompt, every generation, and every answer to one."""
    answered = {segment.turn for segment in trajectory.segments if segment.origin is Origin.OBSERVATION}
    return 1 + len(trajectory.turns) + len(answered)


def weight_versions(trajectory: Trajectory) -> tuple[int, int]:
    """Oldest and newest weights that generated it. Where the engine cannot tell, the version that a synchronous trainer
    serves during `step`: the one before."""
    newest = [turn.weight_version for turn in trajectory.turns if turn.weight_version is not None]
    oldest = [turn.min_weight_version for turn in trajectory.turns if turn.min_weight_version is not None]
    if not newest:
        unknown = max(trajectory.step - 1, 0)
        return unknown, unknown
    return min(newest + oldest), max(newest)


def reward_extra_info(trajectory: Trajectory) -> dict[str, Any]:
    """What the reward wants logged beside its value: `Reward.info` first, then the components that it does not name."""
    if trajectory.reward is None:
        return {}
    info = dict(trajectory.reward.info)
    return info | {name: value for name, value in trajectory.reward.components.items() if name not in info}


def token_rewards(trajectory: Trajectory) -> list[tuple[int, float]]:
    """The reward as (place in the response, value), each place once; the values add up to `Reward.value`.

    Each turn's own reward (`Reward.turns`) is on its last sampled token, all the rest on the last token of the response. verl's
    outcome estimators (GRPO) sum over the response; `agentloop_turns` and GAE see the places. Empty for a masked trajectory.
    """
    if trajectory.masked or trajectory.reward is None:
        return []
    reward = trajectory.reward
    placed: dict[int, float] = {}
    for turn, value in zip(trajectory.turns, reward.turns, strict=False):
        if value and turn.end > turn.start:
            placed[turn.end - 1 - trajectory.prompt_len] = value
    last = trajectory.response_len - 1
    placed[last] = reward.value - sum(value for place, value in placed.items() if place != last)
    return sorted(placed.items())


def loop_metrics(trajectory: Trajectory) -> dict[str, float | int]:
    """The fields of verl's `AgentLoopMetrics`, in seconds; `num_preempted` is -1 where the engine does not tell."""
    told = [turn.engine_data for turn in trajectory.turns if isinstance(turn.engine_data, Mapping)]
    preempted = [int(data["num_preempted"]) for data in told if data.get("num_preempted") is not None]
    return {
        "generate_sequences": sum(turn.generate_s for turn in trajectory.turns),
        "tool_calls": sum(turn.tools_s for turn in trajectory.turns),
        "compute_score": trajectory.score_s,
        "num_preempted": sum(preempted) if preempted else -1,
    }


def extra_fields(trajectory: Trajectory) -> dict[str, Any]:
    """verl's per-trajectory extras, with `end_reason` of ours."""
    oldest, newest = weight_versions(trajectory)
    return {
        "turn_scores": [],
        "tool_rewards": [record.reward for record in trajectory.calls],
        "min_global_steps": oldest,
        "max_global_steps": newest,
        "reward_extra_info": reward_extra_info(trajectory),
        "end_reason": None if trajectory.end_reason is None else trajectory.end_reason.value,
    }


def routed_experts(trajectory: Trajectory) -> NDArray[np.int16] | None:
    """[tokens so far, layers, top-k] as the engine recorded it with its last generation, or `None`.

    An engine that records routing puts it into `Generation.data["routed_experts"]`; each generation's record covers the
    trajectory from its first token, so the last one is all of it.
    """
    for turn in reversed(trajectory.turns):
        data = turn.engine_data
        if isinstance(data, Mapping) and data.get("routed_experts") is not None:
            recorded = data["routed_experts"]
            array = np.asarray(recorded.numpy() if hasattr(recorded, "numpy") else recorded)
            if array.ndim != 3:
                raise LedgerError(f"trajectory {trajectory.id}: routed experts of shape {array.shape}, expected 3 axes")
            return array.astype(np.int16, copy=False)
    return None


# -- padded ---------------------------------------------------------------------------------------------------------------


def to_dataproto(
    trajectories: Sequence[Trajectory], *, prompt_length: int, response_length: int, pad_token_id: int
) -> DataProto:
    """The padded batch of verl's legacy trainer: one row a trajectory, in order.

    With B rows, P = `prompt_length`, R = `response_length`:

    - int64: `prompts` [B, P], padded left; `responses` and `response_mask` [B, R], padded right; `input_ids`,
      `attention_mask`, `position_ids` [B, P + R].
    - float32 [B, R]: `rollout_log_probs` if every sampled token has one; `rm_scores` (see `token_rewards`) if every row that
      counts has a reward.
    - int16 [B, P + R, layers, top-k]: `routed_experts`, if the engine recorded them.
    - columns: `__num_turns__` int32, `multi_modal_inputs`, `raw_prompt`, verl's extras, `end_reason`, every key of the
      rewards' extra info, and `uid`.
    - `meta_info`: `metrics` (one dict a row), and with `rm_scores` also `reward_extra_keys`.

    A masked trajectory gets a filler: one padding token as its response, an all-zero `response_mask`, score 0, and a `uid`
    of its own. Raises `LedgerError` for a row that does not fit, and where only some rows have log-probabilities.
    """
    import torch
    from tensordict import TensorDict
    from verl.protocol import DataProto

    if not trajectories:
        raise LedgerError("a batch needs at least one trajectory")
    for trajectory in trajectories:
        _check(trajectory, prompt_length, response_length)
    rows, width = len(trajectories), prompt_length + response_length
    input_ids: NDArray[np.int64] = np.full((rows, width), pad_token_id, dtype=np.int64)
    response_mask: NDArray[np.int64] = np.zeros((rows, response_length), dtype=np.int64)
    log_probs: NDArray[np.float32] | None = None
    if _have_log_probs(trajectories):
        log_probs = np.zeros((rows, response_length), dtype=np.float32)
    prompt_lens: NDArray[np.int64] = np.empty((rows, 1), dtype=np.int64)
    response_lens: NDArray[np.int64] = np.empty((rows, 1), dtype=np.int64)
    for row, trajectory in enumerate(trajectories):
        if trajectory.masked:
            # A prompt that does not fit is no part of a row that only holds the place.
            prompt = trajectory.prompt_ids if 0 < trajectory.prompt_len <= prompt_length else [pad_token_id]
            input_ids[row, prompt_length - len(prompt) : prompt_length] = prompt
            prompt_lens[row], response_lens[row] = len(prompt), 1
            continue
        first = prompt_length - trajectory.prompt_len
        input_ids[row, first : first + len(trajectory)] = trajectory.input_ids
        prompt_lens[row], response_lens[row] = trajectory.prompt_len, trajectory.response_len
        for segment in trajectory.segments[1:]:
            if segment.origin is Origin.SAMPLED:
                span = slice(segment.start - trajectory.prompt_len, segment.end - trajectory.prompt_len)
                response_mask[row, span] = 1
                if log_probs is not None:
                    log_probs[row, span] = segment.log_probs

    place: NDArray[np.int64] = np.arange(width, dtype=np.int64)[None, :]
    begin: NDArray[np.int64] = prompt_length - prompt_lens
    end: NDArray[np.int64] = prompt_length + response_lens
    tensors: dict[str, NDArray[Any]] = {
        "prompts": np.ascontiguousarray(input_ids[:, :prompt_length]),
        "responses": np.ascontiguousarray(input_ids[:, prompt_length:]),
        "response_mask": response_mask,
        "input_ids": input_ids,
        "attention_mask": ((place >= begin) & (place < end)).astype(np.int64),
        # As `compute_position_id_with_mask`: 0 up to the first token, then counting, and constant after the last one.
        "position_ids": np.clip(place - begin, 0, end - begin - 1),
    }
    if log_probs is not None:
        tensors["rollout_log_probs"] = log_probs
    experts = _padded_experts(trajectories, prompt_length, width)
    if experts is not None:
        tensors["routed_experts"] = experts
    scored = all(trajectory.reward is not None for trajectory in trajectories if not trajectory.masked)
    if scored:
        rm_scores: NDArray[np.float32] = np.zeros((rows, response_length), dtype=np.float32)
        for row, trajectory in enumerate(trajectories):
            for place, value in token_rewards(trajectory):
                rm_scores[row, place] = value
        tensors["rm_scores"] = rm_scores

    columns, reward_keys = _columns(trajectories)
    meta_info: dict[str, Any] = {"metrics": [loop_metrics(trajectory) for trajectory in trajectories]}
    if scored:
        meta_info["reward_extra_keys"] = reward_keys
    batch = TensorDict({name: torch.from_numpy(array) for name, array in tensors.items()}, batch_size=rows)
    return DataProto(batch=batch, non_tensor_batch=columns, meta_info=meta_info)


def _check(trajectory: Trajectory, prompt_length: int, response_length: int) -> None:
    if trajectory.masked:
        return
    if not trajectory.sampled_len:
        raise LedgerError(f"trajectory {trajectory.id}: nothing was sampled, yet it is not masked")
    if trajectory.prompt_len > prompt_length:
        raise LedgerError(f"trajectory {trajectory.id}: a prompt of {trajectory.prompt_len} tokens for {prompt_length} places")
    if trajectory.response_len > response_length:
        raise LedgerError(
            f"trajectory {trajectory.id}: a response of {trajectory.response_len} tokens for {response_length} places"
        )


def _have_log_probs(trajectories: Sequence[Trajectory]) -> bool:
    """Whether all sampled segments have log-probabilities; `LedgerError` if only some do."""
    sampled = [s for t in trajectories if not t.masked for s in t.segments if s.origin is Origin.SAMPLED]
    have = sum(segment.log_probs is not None for segment in sampled)
    if 0 < have < len(sampled):
        raise LedgerError(f"{len(sampled) - have} of {len(sampled)} generations of one batch lack log-probabilities")
    return have > 0


def _padded_experts(trajectories: Sequence[Trajectory], prompt_length: int, width: int) -> NDArray[np.int16] | None:
    recorded = [None if trajectory.masked else routed_experts(trajectory) for trajectory in trajectories]
    example = next((array for array in recorded if array is not None), None)
    if example is None:
        return None
    experts = np.zeros((len(trajectories), width, *example.shape[1:]), dtype=np.int16)
    for row, (trajectory, array) in enumerate(zip(trajectories, recorded, strict=True)):
        if array is not None:
            count = min(len(array), len(trajectory))
            first = prompt_length - trajectory.prompt_len
            experts[row, first : first + count] = array[:count]
    return experts


def _columns(trajectories: Sequence[Trajectory]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The non-tensor columns, and the names of those that come from the rewards."""
    columns: dict[str, NDArray[Any]] = {"__num_turns__": np.array([num_turns(t) for t in trajectories], dtype=np.int32)}
    extras = [extra_fields(trajectory) for trajectory in trajectories]
    infos = [extra["reward_extra_info"] for extra in extras]
    # verl takes the keys of its first row; a filler has none, and rewards may differ in what they report.
    blanks = {key: blank(value) for info in reversed(infos) for key, value in info.items()}
    reward_keys = list(dict.fromkeys(key for info in infos for key in info))
    for key in reward_keys:
        columns[key] = np.array([info.get(key, blanks[key]) for info in infos])
    columns["multi_modal_inputs"] = _objects([{} for _ in trajectories])
    for key in dict.fromkeys([*EXTRA_KEYS, *extras[0]]):
        columns[key] = _objects([extra.get(key) for extra in extras])
    columns["raw_prompt"] = _objects([t.sample.messages for t in trajectories])
    columns["uid"] = _objects([group_uid(t) for t in trajectories])
    return columns, reward_keys


def blank(value: Any) -> Any:
    """What stands for a value of this kind in a row that has none: verl averages numbers and leaves text alone."""
    if isinstance(value, str):
        return ""
    return type(value)(0) if isinstance(value, (bool, int, float)) else None


def _objects(values: Sequence[Any]) -> NDArray[Any]:
    column: NDArray[Any] = np.empty(len(values), dtype=object)
    column[:] = values
    return column


# -- rows -----------------------------------------------------------------------------------------------------------------


def row_key(trajectory: Trajectory) -> str:
    """Its key in TransferQueue: `{uid}_{sibling}_0`, since a trajectory is one row."""
    return f"{trajectory.sample.uid}_{trajectory.sibling}_0"


def to_rows(trajectory: Trajectory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trajectory as one row of verl's V1 contract: `(fields, tag)`, to be put under `row_key`.

    Unpadded, with T tokens of which R are the response: int64 `prompts` [T - R], `responses`, `response_mask`, `loss_mask`
    [R], `input_ids`, `position_ids` [T]; float32 [R] `rollout_log_probs` if recorded and `rm_scores` (see
    `token_rewards`) if scored; int16 `routed_experts` [T, layers, top-k] if recorded. Beside them `num_turns`, `metrics`,
    `extra_fields`, `multi_modal_inputs`, and the dataset's own columns (`sample.fields`) with `uid`, `global_steps` and
    `session_id`. The tag is all integers but for `status`. A masked trajectory has no row: `LedgerError`.
    """
    import torch

    if trajectory.masked or not trajectory.sampled_len:
        raise LedgerError(f"trajectory {trajectory.id}: a trajectory that is masked or has nothing sampled has no row")
    ids = torch.tensor(trajectory.input_ids, dtype=torch.int64)
    mask = torch.tensor(trajectory.response_mask, dtype=torch.int64)
    fields: dict[str, Any] = {
        **{name: value for name, value in trajectory.sample.fields.items() if name not in ("agent_name", "multi_modal_data")},
        "uid": trajectory.sample.uid,
        "global_steps": trajectory.step,
        "session_id": trajectory.sibling,
        "prompts": ids[: trajectory.prompt_len].clone(),
        "responses": ids[trajectory.prompt_len :].clone(),
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": ids,
        "position_ids": torch.arange(len(ids), dtype=torch.int64),
        "num_turns": num_turns(trajectory),
        "metrics": loop_metrics(trajectory),
        "extra_fields": extra_fields(trajectory),
        "multi_modal_inputs": {},
    }
    log_probs = trajectory.rollout_log_probs
    if log_probs is not None:
        fields["rollout_log_probs"] = torch.tensor(log_probs, dtype=torch.float32)
    if trajectory.reward is not None:
        fields["rm_scores"] = torch.zeros(trajectory.response_len, dtype=torch.float32)
        for place, value in token_rewards(trajectory):
            fields["rm_scores"][place] = value
    experts = routed_experts(trajectory)
    if experts is not None:
        fields["routed_experts"] = _aligned(experts, len(ids))
    oldest, newest = weight_versions(trajectory)
    tag = {
        "status": "success",
        "prompt_len": trajectory.prompt_len,
        "response_len": trajectory.response_len,
        "seq_len": len(ids),
        "global_steps": trajectory.step,
        "min_global_steps": oldest,
        "max_global_steps": newest,
    }
    return fields, tag


def _aligned(experts: NDArray[np.int16], length: int) -> torch.Tensor:
    """Over the whole sequence; the last tokens were never fed to the model and stay zero, as in `AgentLoopOutput.as_dict`."""
    import torch

    aligned = torch.zeros((length, *experts.shape[1:]), dtype=torch.int16)
    count = min(len(experts), length)
    aligned[:count] = torch.from_numpy(np.ascontiguousarray(experts[:count]))
    return aligned
