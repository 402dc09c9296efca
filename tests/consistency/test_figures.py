"""The estimators, against values computed by hand, against numpy's, and against verl's own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from agentloop.consistency import Drift, Figures
from agentloop.consistency.figures import PERCENTILES


def of(trainer: Any, rollout: Any, clip: tuple[float, float] = (0.5, 2.0)) -> Figures:
    return Drift(trainer, rollout, clip).by((np.zeros(len(trainer), np.uint8), 1))[0][0]


def test_by_hand() -> None:
    """Four tokens whose ratios are 1, 1/2, 4 and 1/8."""
    log = math.log
    rollout = np.array([log(0.5), log(0.8), log(0.2), log(0.8)])
    trainer = np.array([log(0.5), log(0.4), log(0.8), log(0.1)])
    found = of(trainer, rollout)
    differences = [0.0, -log(2), log(4), -log(8)]
    assert (found.tokens, found.not_recorded, found.infinite) == (4, 0, 0)
    assert found.max_abs == pytest.approx(log(8))
    assert found.mean == pytest.approx(-log(4) / 4) and found.k1 == pytest.approx(log(4) / 4)
    assert found.mean_abs == pytest.approx((log(2) + log(4) + log(8)) / 4)
    assert found.k2 == pytest.approx(sum(d * d for d in differences) / 8)
    assert found.k3 == pytest.approx((1 + 0.5 + 4 + 0.125) / 4 - 1 + log(4) / 4)
    assert (found.ratio_outside, found.ratio_high, found.ratio_low) == (0.5, 0.25, 0.25)
    assert found.ratio is not None and found.ratio["min"] == pytest.approx(0.125) and found.ratio["max"] == pytest.approx(4)
    assert found.ratio["p50"] == pytest.approx(0.75), "half-way between 1/2 and 1"
    assert found.ess == pytest.approx((3.625 / 4) ** 2 / ((1 + 0.25 + 4 + 1 / 64) / 4)), (
        "the 4 counts as 2, the clip range's end"
    )
    assert found.chi2 == pytest.approx((1 + 0.25 + 16 + 1 / 64) / 4 - 1)
    assert found.probs_max_abs == pytest.approx(0.7) and found.probs_mean_abs == pytest.approx((0.4 + 0.6 + 0.7) / 4)


def test_what_is_not_there_is_not_zero() -> None:
    nan, inf = float("nan"), float("inf")
    trainer = np.array([-1.0, nan, -1.0, -inf, nan])
    rollout = np.array([-1.5, -1.0, nan, -0.1, nan])
    found = of(trainer, rollout)
    assert (found.tokens, found.not_recorded, found.infinite) == (1, 3, 1)
    assert found.mean_abs == pytest.approx(0.5) and found.correlation is None, "one token varies with nothing"
    nothing = of(trainer[3:], rollout[3:])
    assert (nothing.tokens, nothing.not_recorded, nothing.infinite) == (0, 1, 1)
    assert all(value is None for name, value in nothing.to_dict().items() if name not in ("tokens", "not_recorded", "infinite"))
    assert of(np.full(3, -1.0), np.full(3, -1.25)).correlation is None, "no side varies"
    assert of(np.full(3, -0.3), np.full(3, -0.3)).probs_correlation is None


def test_far_apart_sides_do_not_overflow() -> None:
    found = of(np.array([-800.0, -1.0]), np.array([-1.0, -900.0]))
    assert found.max_abs == 899 and found.ratio is not None and found.ratio["max"] == pytest.approx(math.exp(20))
    assert all(math.isfinite(value) for value in found.ratio.values())
    assert found.k3 is not None and math.isfinite(found.k3)


def test_groups_are_those_of_numpy() -> None:
    """Labels that change at every token and labels in runs, over several chunks."""
    rng = np.random.default_rng(0)
    n = 70_001
    rollout = -rng.exponential(0.7, n)
    trainer = rollout + rng.standard_t(3, n) * 0.05
    trainer[rng.random(n) < 0.01] = np.nan
    scattered, in_runs = rng.integers(0, 5, n), np.sort(rng.integers(0, 300, n))
    in_runs[in_runs == 7] = 8
    drift = Drift(trainer, rollout)
    for labels, figures in zip((scattered, in_runs), drift.by((scattered, 5), (in_runs, 301)), strict=True):
        for label in (0, 3, 4, 7, 299 if len(figures) > 5 else 1):
            if label >= len(figures):
                continue
            own, found = labels == label, figures[label]
            there = own & np.isfinite(trainer)
            d = (trainer - rollout)[there]
            assert (found.tokens, found.not_recorded) == (there.sum(), (own & ~there).sum())
            if not there.any():
                assert found.ratio is None
                continue
            assert found.max_abs == np.abs(d).max()
            assert found.mean_abs == pytest.approx(np.abs(d).mean(), rel=1e-12)
            assert found.k3 == pytest.approx((np.expm1(d) - d).mean(), rel=1e-9)
            assert found.correlation == pytest.approx(np.corrcoef(trainer[there], rollout[there])[0, 1], abs=1e-12)
            p, q = np.exp(trainer[there]), np.exp(rollout[there])
            assert found.probs_correlation == pytest.approx(np.corrcoef(p, q)[0, 1], abs=1e-12)
            assert found.probs_max_abs == np.abs(p - q).max()
            assert found.ratio is not None
            for name, share in PERCENTILES.items():
                assert found.ratio[name] == pytest.approx(np.percentile(np.exp(d), 100 * share), rel=1e-12)


def test_as_verl_estimates_them() -> None:
    import torch
    from verl.protocol import DataProto
    from verl.trainer.ppo.rollout_corr_helper import compute_offpolicy_metrics, compute_rollout_correction_weights
    from verl.utils.debug.metrics import calculate_debug_metrics

    rng = np.random.default_rng(1)
    rollout = -rng.exponential(0.7, (16, 40))
    trainer = np.minimum(rollout + rng.normal(scale=0.4, size=rollout.shape), 0)
    mask = rng.random(rollout.shape) < 0.7
    found = of(trainer[mask], rollout[mask])
    tensors = [torch.tensor(array, dtype=torch.float64) for array in (trainer, rollout)]
    held = torch.tensor(mask, dtype=torch.float64)
    told = compute_offpolicy_metrics(*tensors, held)
    assert found.k1 == pytest.approx(told["kl"], rel=1e-6)
    assert found.k3 == pytest.approx(told["k3_kl"], rel=1e-6)
    assert found.chi2 == pytest.approx(told["chi2_token"], rel=1e-6)
    _, weights = compute_rollout_correction_weights(tensors[0] - tensors[1], held, rollout_is="token", rollout_is_threshold=2.0)
    assert found.ess == pytest.approx(weights["rollout_is_eff_sample_size"], rel=1e-6)
    assert found.ratio_high == pytest.approx(weights["rollout_is_ratio_fraction_high"], rel=1e-6)
    assert found.ratio_low == pytest.approx(weights["rollout_is_ratio_fraction_low"], rel=1e-6)
    fields = {"old_log_probs": tensors[0], "rollout_log_probs": tensors[1], "response_mask": held}
    debug = calculate_debug_metrics(DataProto.from_dict({**fields, "responses": torch.zeros(16, 40)}))
    assert found.probs_max_abs == pytest.approx(debug["training/rollout_probs_diff_max"], rel=1e-6)
    assert found.probs_mean_abs == pytest.approx(debug["training/rollout_probs_diff_mean"], rel=1e-6)
    assert found.probs_correlation == pytest.approx(debug["training/rollout_actor_probs_pearson_corr"], rel=1e-6)
