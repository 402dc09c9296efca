"""The two batch contracts, field by field against what verl's own code makes of the same conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from agentloop.batch import group_uid, row_key, to_dataproto, to_rows
from agentloop.errors import LedgerError
from agentloop.trajectory import Reward, Trajectory
from tests.verl.support import verl_output, verl_worker

Build = Callable[..., Trajectory]
P, R = 12, 24


def verl_dataproto(trajectories: list[Trajectory], tokenizer: Any) -> Any:
    worker = verl_worker(tokenizer, P, R)

    async def rows() -> list[Any]:
        return [await worker._agent_loop_postprocess(verl_output(t), False, raw_prompt=t.sample.messages) for t in trajectories]

    return worker._postprocess(asyncio.run(rows()))


def same(ours: Any, verls: Any) -> None:
    """Equal in type, shape and value."""
    if isinstance(verls, torch.Tensor):
        assert ours.dtype == verls.dtype
        assert ours.shape == verls.shape
        assert torch.equal(ours, verls)
    elif isinstance(verls, np.ndarray):
        assert ours.dtype == verls.dtype
        assert ours.tolist() == verls.tolist()
    else:
        assert ours == verls


@pytest.mark.parametrize("log_probs", [True, False])
@pytest.mark.parametrize("scored", [True, False])
def test_the_padded_batch_is_verls(build: Build, tokenizer: Any, log_probs: bool, scored: bool) -> None:
    shapes = [((5, 3), (4, 0)), ((24, 0),), ((1, 1), (1, 1), (1, 0)), ((6, 9),)]
    trajectories = [
        build(
            sibling=i,
            prompt=(7, 12, 1, 4)[i],
            turns=turns,
            log_probs=log_probs,
            reward=Reward(0.25 * i, info={"acc": float(i), "pred": f"{i}"}) if scored else None,
        )
        for i, turns in enumerate(shapes)
    ]
    ours = to_dataproto(trajectories, prompt_length=P, response_length=R, pad_token_id=tokenizer.pad_token_id)
    verls = verl_dataproto(trajectories, tokenizer)
    assert set(ours.batch.keys()) == set(verls.batch.keys())
    for name in verls.batch.keys():  # noqa: SIM118  a TensorDict iterates over rows
        same(ours.batch[name], verls.batch[name])
    extra = {"uid", "end_reason"} | (set() if scored else {"reward_extra_info"})
    assert set(ours.non_tensor_batch) - extra == set(verls.non_tensor_batch) - extra
    for name in set(verls.non_tensor_batch) - extra:
        same(ours.non_tensor_batch[name], verls.non_tensor_batch[name])
    assert ours.meta_info == verls.meta_info
    ours.check_consistency()


def test_a_padding_token_other_than_zero_pads_both_sides(build: Build) -> None:
    batch = to_dataproto([build()], prompt_length=P, response_length=R, pad_token_id=99).batch
    assert batch["prompts"][0, :5].tolist() == [99] * 5
    assert batch["responses"][0, 14:].tolist() == [99] * 10


def test_what_does_not_fit_is_refused_and_never_cut(build: Build) -> None:
    with pytest.raises(LedgerError, match="a prompt of 13 tokens for 12 places"):
        to_dataproto([build(prompt=13)], prompt_length=P, response_length=R, pad_token_id=0)
    with pytest.raises(LedgerError, match="a response of 25 tokens for 24 places"):
        to_dataproto([build(turns=((25, 0),))], prompt_length=P, response_length=R, pad_token_id=0)
    with pytest.raises(LedgerError, match="lack log-probabilities"):
        to_dataproto([build(), build(log_probs=False)], prompt_length=P, response_length=R, pad_token_id=0)


def test_a_masked_trajectory_leaves_a_filler_row(build: Build) -> None:
    good = build(sibling=0, reward=Reward(1.0, info={"acc": 1.0, "pred": "7"}))
    for broken in (build(sibling=1, masked=True), build(sibling=1, masked=True, prompt=40, turns=())):
        batch = to_dataproto([broken, good], prompt_length=P, response_length=R, pad_token_id=0)
        assert batch.batch["response_mask"][0].sum() == 0
        assert batch.batch["attention_mask"][0, P:].sum() == 1
        assert batch.batch["attention_mask"][0, :P].sum() >= 1
        assert batch.batch["rm_scores"][0].sum() == 0
        assert batch.batch["rollout_log_probs"][0].abs().sum() == 0
        assert batch.non_tensor_batch["uid"].tolist() == ["g0-masked-1", "g0"]
        assert batch.non_tensor_batch["acc"].tolist() == [0.0, 1.0]
        assert batch.non_tensor_batch["pred"].tolist() == ["", "7"]
        assert batch.meta_info["reward_extra_keys"] == ["acc", "pred"]


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_healthy_siblings_get_the_advantages_they_would_have_alone(build: Build, norm_by_std: bool) -> None:
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    rewards = [0.0, 1.0, 1.0, 0.25]
    group = [build(sibling=i, reward=Reward(value)) for i, value in enumerate(rewards)]
    other = [build(uid="g1", sibling=i, reward=Reward(float(i))) for i in range(3)]
    broken = [build(sibling=4, masked=True), build(sibling=5, masked=True, turns=())]

    def advantages(trajectories: list[Trajectory]) -> torch.Tensor:
        data = to_dataproto(trajectories, prompt_length=P, response_length=R, pad_token_id=0)
        scores, _ = compute_grpo_outcome_advantage(
            data.batch["rm_scores"].clone(),
            data.batch["response_mask"],
            data.non_tensor_batch["uid"],
            norm_adv_by_std_in_grpo=norm_by_std,
        )
        return scores

    mixed = [*group[:2], broken[0], *group[2:], broken[1], *other]
    with_broken, alone = advantages(mixed), advantages([*group, *other])
    assert torch.equal(with_broken[[0, 1, 3, 4, 6, 7, 8]], alone)
    assert with_broken[[2, 5]].abs().sum() == 0
    assert alone.abs().sum() > 0


@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_a_filler_row_adds_nothing_to_verls_loss_and_no_nan(build: Build, mode: str) -> None:
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.trainer.ppo.metric_utils import compute_data_metrics

    trajectories = [build(sibling=i, reward=Reward(float(i))) for i in range(2)]
    data = to_dataproto([*trajectories, build(sibling=2, masked=True)], prompt_length=P, response_length=R, pad_token_id=0)
    loss_mat = torch.rand(3, R, requires_grad=True)
    mask = data.batch["response_mask"]
    whole = agg_loss(loss_mat, mask, mode)
    assert torch.isclose(whole, agg_loss(loss_mat[:2], mask[:2], mode))
    whole.backward()
    assert loss_mat.grad is not None
    assert loss_mat.grad[2].abs().sum() == 0

    data.batch["token_level_scores"] = data.batch["token_level_rewards"] = data.batch["rm_scores"]
    data.batch["advantages"] = data.batch["returns"] = data.batch["rm_scores"]
    metrics = compute_data_metrics(data, use_critic=False)
    assert all(np.isfinite(value) for value in metrics.values())


class _Queue:
    """Takes what verl's worker puts into TransferQueue."""

    async def async_kv_batch_put(self, keys: list[str], fields: Any, tags: list[Any], partition_id: str) -> None:
        self.keys, self.fields, self.tags, self.partition_id = keys, fields, tags, partition_id


@pytest.mark.parametrize("log_probs", [True, False])
@pytest.mark.parametrize("scored", [True, False])
def test_the_row_is_verls(build: Build, tokenizer: Any, log_probs: bool, scored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import verl.trainer.ppo.v1.agent_loop_tq as tq_module

    trajectory = build(sibling=1, log_probs=log_probs, reward=Reward(0.75, info={"acc": 1.0}) if scored else None)
    queue = _Queue()
    monkeypatch.setattr(tq_module, "tq", queue)
    plain = verl_worker(tokenizer, P, R)
    worker_class = tq_module.AgentLoopWorkerTQ.__ray_metadata__.modified_class
    worker = worker_class.__new__(worker_class)
    worker.__dict__.update(plain.__dict__)
    row = {**trajectory.sample.fields, "uid": "g0", "session_id": 1, "global_steps": 2}
    asyncio.run(worker._agent_loop_postprocess(verl_output(trajectory), False, **row))
    verls = {name: queue.fields[0][name] for name in queue.fields[0].keys()}  # noqa: SIM118  unwraps non-tensors

    fields, tag = to_rows(trajectory)
    assert queue.keys == [row_key(trajectory)] == ["g0_1_0"]
    assert queue.tags == [tag]
    assert set(fields) == set(verls.keys())
    for name, value in fields.items():
        theirs = verls[name]
        if name == "extra_fields":
            ours = {key: item for key, item in value.items() if key in theirs}
            assert ours == dict(theirs)
            assert set(value) - set(theirs) <= {"end_reason", "reward_extra_info"}
        else:
            same(value, theirs)


def test_a_masked_trajectory_has_no_row(build: Build) -> None:
    with pytest.raises(LedgerError, match="has no row"):
        to_rows(build(masked=True))


def test_routed_experts_cover_the_sequence_in_both_contracts(build: Build, tokenizer: Any) -> None:
    trajectory = build(reward=Reward(1.0))
    recorded = np.random.default_rng(0).integers(0, 60, (len(trajectory) - 1, 2, 4))
    trajectory.turns[-1].engine_data = {"routed_experts": recorded}
    output = verl_output(trajectory)
    output.routed_experts = recorded
    row, _ = to_rows(trajectory)
    same(row["routed_experts"], output.model_copy().as_dict()["routed_experts"])

    worker = verl_worker(tokenizer, P, R)
    padded = asyncio.run(worker._agent_loop_postprocess(output, False, raw_prompt=[]))
    batch = to_dataproto([trajectory, build(masked=True)], prompt_length=P, response_length=R, pad_token_id=0)
    same(batch.batch["routed_experts"][:1], padded.routed_experts)
    assert batch.batch["routed_experts"][1].sum() == 0


def test_group_uid_is_the_samples_unless_masked(build: Build) -> None:
    assert group_uid(build()) == "g0"
    assert group_uid(build(masked=True, sibling=3)) not in ("g0", group_uid(build(masked=True, sibling=2)))
