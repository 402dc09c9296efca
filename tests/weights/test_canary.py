"""Faults planted between a sender and a real engine: the canary sees them; right updates give no alarm."""

from __future__ import annotations

import pytest
import torch

from agentloop.weights.check import Canary, CanaryReport, Tolerance
from agentloop.weights.check_faults import FaultyEngine, faults
from agentloop.weights.check_transformers import published, reference
from tests.weights.canary_support import engine_of, sums, texts, train, trainer

MODELS = ("deepseek", "qwen3_moe", "qwen3_tied")
STEP = 0.05
"""Of the update that goes wrong, in standard deviations of each tensor."""


async def report_of(name: str, fault_name: str, dtype: torch.dtype, tolerance: Tolerance | str) -> CanaryReport:
    """A right update, then one with the fault, and what the canary says of it."""
    model = trainer(name)
    engine = FaultyEngine(engine_of(model, dtype))
    canary = Canary(texts(4, 48), reference(model), tolerance=tolerance)
    await engine.update_weights(published(model), 1)
    first = await canary.check(engine, 1, sums(model, dtype))
    assert first.ok, first.message
    engine.fault = next(fault for fault in faults(dict(published(model))) if fault.name == fault_name)
    train(model, STEP, seed=3)
    await engine.update_weights(published(model), 2)
    report = await canary.check(engine, 2, sums(model, dtype))
    await engine.engine.close()
    return report


def names_of(name: str) -> list[str]:
    return [fault.name for fault in faults(dict(published(trainer(name))))]


CASES = [(model, fault) for model in MODELS for fault in names_of(model)]
OUTSIDE = {"embedding_permuted", "head_stale"}
TOO_SMALL = {"one_element"}


@pytest.mark.parametrize(("model", "fault"), CASES)
async def test_every_fault_is_seen_by_scores_and_by_checksums(model: str, fault: str) -> None:
    report = await report_of(model, fault, torch.float32, "float32")
    assert not report.ok
    assert report.margin > 1 or fault in TOO_SMALL, report.message
    assert report.tensors
    assert (report.layer is None) == (fault in OUTSIDE), report.message
    assert report.message.startswith("version 2 is not what serves")
    assert report.tensors[0] in report.message
    assert report.layer is None or f" {report.layer}" in report.message
