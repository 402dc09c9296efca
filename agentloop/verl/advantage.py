"""GRPO for the legacy trainer, which must be given a row for every trajectory, a masked one too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, register_adv_est

NAME = "agentloop_grpo"


@register_adv_est(NAME)  # type: ignore[untyped-decorator]
def grpo_without_fillers(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, config: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's GRPO, with a group of its own for every row whose response mask is all zero.

    The legacy trainer keeps its own `uid` column and refuses another one (`union_numpy_dict` in `verl/protocol.py`), so a
    filler cannot bring its group along; here it is told by its mask. Shapes as `compute_grpo_outcome_advantage`.
    """
    groups = np.array(index, dtype=object)
    for row in torch.nonzero(response_mask.sum(dim=-1) == 0).flatten().tolist():
        groups[row] = f"{groups[row]}-masked-{row}"
    by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
    advantages: tuple[torch.Tensor, torch.Tensor] = compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, groups, norm_adv_by_std_in_grpo=by_std
    )
    return advantages
