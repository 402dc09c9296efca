"""Advantages by turn, against the example that is computed by hand and against verl's own GRPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from agentloop.batch import to_dataproto
from agentloop.errors import ConfigError
from agentloop.trajectory import Reward, Trajectory
from agentloop.verl.turn_advantage import NAME

Build = Callable[..., Trajectory]
P, R = 12, 24


def advantages(batch: Any, uids: list[str], estimator: str = NAME, **algorithm: Any) -> torch.Tensor:
    """Through verl's own `compute_advantage`, as both of its trainers call it."""
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    batch.non_tensor_batch["uid"] = np.array(uids, dtype=object)
    batch.batch["token_level_rewards"] = batch.batch["rm_scores"]
    config = OmegaConf.create({"adv_estimator": estimator, "norm_adv_by_std_in_grpo": True, **algorithm})
    OmegaConf.set_struct(config, True)
    by_std = config.norm_adv_by_std_in_grpo
    legacy = compute_advantage(batch, adv_estimator=estimator, norm_adv_by_std_in_grpo=by_std, config=config)
    first: torch.Tensor = legacy.batch["advantages"].clone()
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(uids)]
    v1 = compute_advantage_for_multi_trajectories(
        batch, batch_keys=keys, adv_estimator=estimator, norm_adv_by_std_in_grpo=by_std, config=config
    )
    assert torch.equal(v1.batch["advantages"], first)
    return first


def group(build: Build, *rewards: tuple[float, ...], masked: tuple[int, ...] = ()) -> Any:
    """Siblings with three tokens a turn and two of a tool between turns; of each the rewards of its turns, the last one the
    outcome."""
    trajectories = []
    for sibling, values in enumerate(rewards):
        turns = tuple((3, 2 if k < len(values) - 1 else 0) for k in range(len(values)))
        reward = Reward(sum(values), turns=(*values[:-1], 0.0))
        trajectories.append(
            build(sibling=sibling, prompt=4, turns=turns, reward=reward, masked=sibling in masked)
        )  # fmt: skip
    return to_dataproto(trajectories, prompt_length=P, response_length=R, pad_token_id=0)


def by_turn(row: torch.Tensor, turns: int) -> list[float]:
    """The one value of each turn's tokens; a turn with its answer takes 3 + 2 + 2 tokens (the template's glue)."""
    values = []
    for k in range(turns):
        own = row[7 * k : 7 * k + 3]
        assert len(set(own.tolist())) == 1
        values.append(round(own[0].item(), 6))
    used = [place for k in range(turns) for place in range(7 * k, 7 * k + 3)]
    assert not row[[place for place in range(R) if place not in used]].any()
    return values


def test_the_example_of_the_docstring(build: Build) -> None:
    batch = group(build, (0.5, 0.25, 1.0), (0.1, 0.75, 0.0), (0.0, 0.2))
    found = advantages(batch, ["g"] * 3, norm_adv_by_std_in_grpo=False, turn_outcome_weight=0.5)
    assert by_turn(found[0], 3) == [0.6, 0.05, 0.6]
    assert by_turn(found[1], 3) == [-0.3, 0.05, -0.4]
    assert by_turn(found[2], 2) == [-0.3, -0.2]


def test_divided_by_the_standard_deviation(build: Build) -> None:
    """Two siblings: mean 0.5 and 1/sqrt(2) apart, so every normalised value is 1/sqrt(2) (and 1e-6 less)."""
    found = advantages(group(build, (1.0, 0.0), (0.0, 1.0)), ["g"] * 2)
    assert by_turn(found[0], 2) == pytest.approx([0.0, -(0.5**0.5)], abs=1e-5)
    assert by_turn(found[1], 2) == pytest.approx([0.0, 0.5**0.5], abs=1e-5)


@pytest.mark.parametrize("by_std", [True, False])
def test_without_rewards_of_turns_it_is_verls_grpo(build: Build, by_std: bool) -> None:
    rewards = [(0.0, 0.0, 1.0), (0.0, 0.25), (0.5,), (0.0, 0.0, 0.0), (1.0,)]
    uids = ["a", "a", "a", "b", "c"]
    found = advantages(group(build, *rewards), uids, norm_adv_by_std_in_grpo=by_std)
    verls = advantages(group(build, *rewards), uids, "grpo", norm_adv_by_std_in_grpo=by_std)
    assert torch.allclose(found, verls, atol=1e-5)


def test_the_sum_is_what_verls_grpo_sees(build: Build) -> None:
    """By default, that is with `grpo`, rewards of turns are part of the outcome and nothing else."""
    summed = advantages(group(build, (0.5, 0.25, 0.25), (0.0, 0.0, 0.0)), ["g"] * 2, "grpo")
    plain = advantages(group(build, (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)), ["g"] * 2, "grpo")
    assert torch.allclose(summed, plain)


def test_a_turn_that_only_one_sibling_has_brings_no_credit_of_its_own(build: Build) -> None:
    found = advantages(group(build, (5.0, 0.5), (0.5,)), ["g"] * 2, norm_adv_by_std_in_grpo=False)
    assert by_turn(found[0], 2) == [0.0, 0.0]
    assert by_turn(found[1], 1) == [0.0]


def test_a_masked_sibling_has_no_part_in_the_group(build: Build) -> None:
    three = group(build, (0.5, 1.0), (9.0, 9.0), (0.0, 0.0), masked=(1,))
    two = group(build, (0.5, 1.0), (0.0, 0.0))
    found, alone = advantages(three, ["g"] * 3), advantages(two, ["g"] * 2)
    assert torch.allclose(found[[0, 2]], alone)
    assert not found[1].any()


def test_a_mask_with_holes_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="rollout_rs=token_k1: rejecting single tokens"):
        advantages(group(build, (1.0,)), ["g"], rollout_correction={"rollout_rs": "token_k1"})


def test_the_manager_registers_it() -> None:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    import agentloop.verl.manager

    assert get_adv_estimator_fn(NAME) is agentloop.verl.turn_advantage.turn_advantage
