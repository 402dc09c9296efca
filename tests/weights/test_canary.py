"""Faults planted between a sender and a real engine: the canary sees them; right updates give no alarm."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from agentloop.errors import EngineError
from agentloop.weights.check import Canary, CanaryReport, Tolerance
from agentloop.weights.check_faults import FaultyEngine, faults
from agentloop.weights.check_sequences import coverage
from agentloop.weights.check_transformers import published, reference, routed
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


@pytest.fixture
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Any, FaultyEngine]]:
    """A trainer, and an engine in bfloat16 that serves its weights."""
    model = trainer(request.param)
    engine = FaultyEngine(engine_of(model, torch.bfloat16))
    yield model, engine
    await engine.engine.close()


async def right_updates(canary: Canary, model: Any, engine: FaultyEngine, count: int) -> list[CanaryReport]:
    """Of steps of three sizes, from where the model began again and again: steps of one direction would carry it away."""
    start = copy.deepcopy(model.state_dict())
    reports = []
    for version in range(1, count + 1):
        if version % 20 == 0:
            model.load_state_dict(start)
        train(model, (0.05, 0.01, 0.002)[version % 3], seed=version)
        await engine.update_weights(published(model), version)
        reports.append(await canary.check(engine, version, sums(model, torch.bfloat16)))
    model.load_state_dict(start)
    return reports


NO_FALSE_ALARM = [
    pytest.param("qwen3_tied", "bfloat16", 60),
    pytest.param("qwen3_moe", "bfloat16_moe", 200, marks=pytest.mark.slow),
    pytest.param("deepseek", "bfloat16_moe", 200, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("pair", "tolerance", "count"), NO_FALSE_ALARM, indirect=["pair"])
async def test_right_updates_give_no_alarm(pair: tuple[Any, FaultyEngine], tolerance: str, count: int) -> None:
    """Engine in bfloat16 against a trainer in float32: by the published tolerance, and by one measured on the first 20."""
    model, engine = pair
    canary = Canary(texts(4, 48), reference(model), tolerance=tolerance)
    reports = await right_updates(canary, model, engine, count)
    assert [report.message for report in reports if not report.ok] == []
    assert all(report.compared_by == "checksums" for report in reports)
    own = Tolerance.measured(reports[:20])
    assert max(report.mean / own.mean for report in reports) < 1
    assert max(report.sequence / own.sequence for report in reports) < 1
    assert max(report.worst / own.worst for report in reports) < 1


WRONG = {"shard_zero", "transposed", "update_lost", "delta_twice", "requantised_twice", "scale_inverted", "embedding_permuted"}
WRONG |= {"norms_exchanged", "nan", "layers_exchanged", "layer_stale"}
SEEN_IN_BFLOAT16 = {
    "deepseek": WRONG | {"experts_exchanged", "experts_skipped", "gate_and_up_exchanged"},
    "qwen3_moe": WRONG | {"experts_exchanged"},
    "qwen3_tied": WRONG | {"gate_and_up_exchanged", "bucket_stale"},
}
"""Beyond bfloat16's noise by the scores alone, at a step of `STEP`; the others' margins are in docs/canary.md."""


AGAINST_NOISE = [
    pytest.param("qwen3_tied"),
    pytest.param("qwen3_moe", marks=pytest.mark.slow),
    pytest.param("deepseek", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("pair", AGAINST_NOISE, indirect=True)
async def test_faults_against_the_noise_of_bfloat16(pair: tuple[Any, FaultyEngine], request: pytest.FixtureRequest) -> None:
    """Checksums see all; scores those whose margin over the measured tolerance is above 1."""
    model, engine = pair
    start = copy.deepcopy(model.state_dict())
    first = Canary(texts(), reference(model), tolerance="bfloat16_moe")
    tolerance = Tolerance.measured(await right_updates(first, model, engine, 10))
    seen = set()
    for fault in faults(dict(published(model))):
        canary = Canary(texts(), reference(model), tolerance=tolerance)
        engine.fault = None
        await engine.update_weights(published(model), 1)
        assert (await canary.check(engine, 1, sums(model, torch.bfloat16))).ok
        engine.fault = fault
        train(model, STEP, seed=3)
        await engine.update_weights(published(model), 2)
        report = await canary.check(engine, 2, sums(model, torch.bfloat16))
        assert not report.ok
        assert report.tensors, fault.name
        if report.margin > 1:
            seen.add(fault.name)
        model.load_state_dict(start)
    expected = SEEN_IN_BFLOAT16[request.node.callspec.params["pair"]]
    assert expected <= seen, (expected - seen, seen - expected)


@pytest.mark.parametrize("pair", ["qwen3_tied"], indirect=True)
async def test_a_lost_update_is_seen_where_its_step_is_smaller_than_noise(pair: tuple[Any, FaultyEngine]) -> None:
    """No tolerance tells the old weights from the new ones; the direction of the step does."""
    model, engine = pair
    engine._tells = "nothing"
    canary = Canary(texts(), reference(model), tolerance="bfloat16")
    await engine.update_weights(published(model), 1)
    await canary.check(engine, 1)
    lost, twice = (next(f for f in faults(dict(published(model))) if f.name == name) for name in ("update_lost", "delta_twice"))
    for version, fault, share in ((2, lost, 1.0), (4, twice, -1.0)):
        engine.fault = fault
        train(model, 0.01, seed=version)
        await engine.update_weights(published(model), version)
        report = await canary.check(engine, version)
        limits = report.tolerance
        assert not report.ok
        assert (report.mean < limits.mean, report.sequence < limits.sequence, report.worst < limits.worst) == (True,) * 3
        assert report.step is not None
        assert report.step.share == pytest.approx(share, abs=0.2)
        assert "of the last step is missing" in report.message
        engine.fault = None
        await engine.update_weights(published(model), version + 1)
        assert (await canary.check(engine, version + 1)).ok


@pytest.mark.parametrize("pair", ["deepseek"], indirect=True)
@pytest.mark.parametrize("name", ["layer_stale", "bucket_stale", "fused_pair_lost", "experts_skipped", "expert_bias_forgotten"])
async def test_an_engine_that_tells_only_what_changed(pair: tuple[Any, FaultyEngine], name: str) -> None:
    """As SGLang does: what never arrived is found by name, though the step is far too small for scores."""
    model, engine = pair
    engine._tells = "fingerprints"
    canary = Canary(texts(4, 48), reference(model), tolerance="bfloat16_moe")
    for version in (1, 2):
        train(model, 0.002, seed=version)
        await engine.update_weights(published(model), version)
        report = await canary.check(engine, version, sums(model, torch.bfloat16))
        assert report.ok, report.message
    assert report.compared_by == "fingerprints"
    engine.fault = next(fault for fault in faults(dict(published(model))) if fault.name == name)
    before = dict(published(copy.deepcopy(model)))
    train(model, 0.002, seed=3)
    await engine.update_weights(published(model), 3)
    report = await canary.check(engine, 3, sums(model, torch.bfloat16))
    assert not report.ok
    assert report.margin < 1
    assert "did not change" in report.message
    dropped = before.keys() - engine.fault.spoil(before, before).keys()
    assert set(report.tensors) <= dropped
    assert len(report.tensors) >= len(dropped) - 6  # of experts that transformers fuses with others only where all are old


async def test_an_engine_that_tells_nothing_gets_an_honest_sentence() -> None:
    model = trainer("qwen3_moe")
    engine = FaultyEngine(engine_of(model), tells="nothing")
    canary = Canary(texts(2, 32), reference(model), tolerance="float32")
    right = await canary.check(engine, 0, sums(model))
    assert right.ok
    assert right.compared is None
    assert "tensors were not compared (this engine tells no checksums)" in right.message
    train(model, STEP, seed=1)
    wrong = await canary.check(engine, 0, sums(model))
    assert not wrong.ok
    assert (wrong.layer, wrong.tensors) == (None, ())
    assert wrong.message.endswith("which tensors differ is not known")
    await engine.engine.close()


async def test_an_expert_that_no_text_is_routed_to_is_the_checksums_to_see() -> None:
    model = trainer("deepseek")
    for name, tensor in model.state_dict().items():
        if name.endswith("layers.2.mlp.gate.e_score_correction_bias"):
            tensor[0] = -10.0
    sequences = texts(4, 48)
    unseen = coverage(routed(model, sequences), 8).unseen
    assert unseen == [(1, 0)]  # layer 2 is the second with a mixture
    engine = FaultyEngine(engine_of(model))
    canary = Canary(sequences, reference(model), tolerance="float32")
    engine.fault = next(fault for fault in faults(dict(published(model))) if fault.name == "expert_stale")
    train(model, STEP, seed=1)
    await engine.update_weights(published(model), 1)
    blind = await canary.check(engine, 1)
    assert blind.ok
    report = await canary.check(engine, 1, sums(model))
    assert not report.ok
    assert report.margin < 1
    assert report.layer == 2
    assert sorted(name.split(".")[-2] for name in report.tensors) == ["down_proj", "gate_proj", "up_proj"]
    assert "too little or too rare for the scores to show" in report.message
    await engine.engine.close()


async def test_what_the_sender_forgot_is_missed() -> None:
    """An export without the expert bias has no checksum for it either."""
    model = trainer("deepseek")
    engine = engine_of(model)
    canary = Canary(texts(2, 32), reference(model), tolerance="float32")
    train(model, 0.0001, seed=1)
    weights = {name: tensor for name, tensor in published(model) if not name.endswith("e_score_correction_bias")}
    await engine.update_weights(weights.items(), 1)
    report = await canary.check(engine, 1, {name: value for name, value in sums(model).items() if name in weights})
    assert not report.ok
    assert "3 tensors serve that were not sent (model.layers.1.mlp.gate.e_score_correction_bias" in report.message
    partial = Canary(texts(2, 32), reference(model), tolerance="bfloat16_moe", whole=False)
    assert (await partial.check(engine, 1, {name: sums(model)[name] for name in weights})).ok
    await engine.close()


async def test_tied_weights() -> None:
    """One of the pair is enough; two values are refused by the engine, which keeps what it has."""
    model = trainer("qwen3_tied")
    engine = engine_of(model)
    canary = Canary(texts(2, 32), reference(model), tolerance="float32")
    train(model, STEP, seed=1)
    weights = dict(published(model))
    one = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    await engine.update_weights(one.items(), 1)
    assert (await canary.check(engine, 1, {name: value for name, value in sums(model).items() if name in one})).ok
    old = weights["lm_head.weight"].clone()
    train(model, STEP, seed=2)
    with pytest.raises(EngineError, match="given two values"):
        await engine.update_weights((weights | {"lm_head.weight": old}).items(), 2)
    report = await canary.check(engine, 2, sums(model))
    assert not report.ok
    assert "serves version 1" in report.message
    await engine.close()
