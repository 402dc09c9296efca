"""Advantages by turn, for verl's registry: `algorithm.adv_estimator=agentloop_turns`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from verl.trainer.ppo.core_algos import register_adv_est

from agentloop.errors import ConfigError

NAME = "agentloop_turns"
EPSILON = 1e-6
"""Added to a standard deviation, as in verl's `compute_grpo_outcome_advantage`."""


@register_adv_est(NAME)  # type: ignore[untyped-decorator]
def turn_advantage(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, config: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""MT-GRPO (arXiv 2505.11821), for any number of turns: a turn is credited with its own reward beside the outcome.

    With $r_{i,k}$ the reward of turn k of sibling i, $K_i$ its turns, and the outcome $R_i$ what its last turn brought (the
    trajectory's reward stands there, with the last turn's own):

    $$A_{i,k} = \hat A^T_{i,k} + \lambda\,\hat A^O_i \quad (k < K_i), \qquad A_{i,K_i} = \hat A^O_i$$

    $\hat A^O$ is $R$ less its mean over the group, divided by its standard deviation (unbiased, plus 1e-6; not divided with
    `algorithm.norm_adv_by_std_in_grpo=False`); $\hat A^T_{\cdot,k}$ is the same of $r_{\cdot,k}$ over the siblings that have a
    turn k which is not their last, and 0 where only one has. $\lambda$ is `+algorithm.turn_outcome_weight`, by default 1:
    without rewards of turns this is GRPO.

    Example. A group of three, without division by the standard deviation and with $\lambda = 1/2$:

    | sibling | turn 1 | turn 2 | turn 3 | outcome | A of turn 1 | of turn 2 | of turn 3 |
    |---|---|---|---|---|---|---|---|
    | 0 | 0.5 | 0.25 | 1 (last) | 1 | (0.5 - 0.2) + 0.3 = 0.6 | (0.25 - 0.5) + 0.3 = 0.05 | 0.6 |
    | 1 | 0.1 | 0.75 | 0 (last) | 0 | (0.1 - 0.2) - 0.2 = -0.3 | (0.75 - 0.5) - 0.2 = 0.05 | -0.4 |
    | 2 | 0 | 0.2 (last) | | 0.2 | (0 - 0.2) - 0.1 = -0.3 | -0.2 | |

    The outcomes' mean is 0.4, so $\hat A^O$ is 0.6, -0.4, -0.2; the mean of turn 1 is 0.2; turn 2 counts for siblings 0 and 1
    alone, with mean 0.5.

    `token_level_rewards` and `response_mask` [B, R], `index` [B] the groups. A turn is a run of ones in the mask; the rewards
    from its first token to the next turn's belong to it (`agentloop.batch.token_rewards` places them). A row without a mask
    has no part in its group and no advantage. Returns advantages and returns, the same [B, R] tensor, 0 outside the mask.
    """
    settings: Any = {} if config is None else config
    _refuse_holes(settings)
    weight = float(settings.get("turn_outcome_weight", 1.0))
    by_std = bool(settings.get("norm_adv_by_std_in_grpo", True))
    advantages = torch.zeros_like(token_level_rewards)
    groups: dict[Any, list[int]] = defaultdict(list)
    for row, group in enumerate(index):
        groups[group].append(row)
    with torch.no_grad():
        starts = [_starts(mask) for mask in response_mask]
        for rows in groups.values():
            kept = [row for row in rows if starts[row]]
            rewards = {row: _by_turn(token_level_rewards[row], starts[row]) for row in kept}
            outcomes = _normalized([rewards[row][-1] for row in kept], by_std)
            own: dict[tuple[int, int], float] = {}
            for k in range(max((len(rewards[row]) for row in kept), default=1) - 1):
                having = [row for row in kept if len(rewards[row]) > k + 1]
                if len(having) > 1:
                    values = _normalized([rewards[row][k] for row in having], by_std)
                    own |= {(row, k): value for row, value in zip(having, values, strict=True)}
            for row, outcome in zip(kept, outcomes, strict=True):
                places = [*starts[row], response_mask.shape[1]]
                last = len(starts[row]) - 1
                for k in range(last + 1):
                    value = outcome if k == last else own.get((row, k), 0.0) + weight * outcome
                    advantages[row, places[k] : places[k + 1]] = value
        advantages = advantages * response_mask
    return advantages, advantages


def _starts(mask: torch.Tensor) -> list[int]:
    """Where the runs of ones begin."""
    before = torch.cat([mask.new_zeros(1), mask[:-1]])
    return [int(place) for place in torch.nonzero((mask > 0) & (before == 0)).flatten()]


def _by_turn(rewards: torch.Tensor, starts: Sequence[int]) -> list[float]:
    ends = [*starts[1:], len(rewards)]
    first = [0, *starts[1:]]
    return [float(rewards[start:end].sum()) for start, end in zip(first, ends, strict=True)]


def _normalized(values: Sequence[float], by_std: bool) -> list[float]:
    """Less the mean and divided by the standard deviation; a single one stays as it is, as in verl's GRPO."""
    if len(values) < 2:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    centred = tensor - tensor.mean()
    return list((centred / (tensor.std() + EPSILON) if by_std else centred).tolist())


def _refuse_holes(settings: Any) -> None:
    """Rejection of single tokens makes holes in the mask, and a hole would look like the end of a turn."""
    correction = settings.get("rollout_correction") or {}
    rejection = str(correction.get("rollout_rs") or "")
    if "token" in rejection:
        raise ConfigError(
            f"algorithm.rollout_correction.rollout_rs={rejection}: rejecting single tokens breaks turns apart, so it does not "
            f"go with adv_estimator={NAME}; use a sequence-level one"
        )
