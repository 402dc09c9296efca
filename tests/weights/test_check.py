"""The canary's parts: checksums, statistics, tolerances, what changed, which sequences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentloop.engines.local import LocalEngine
from agentloop.engines.scripted import ScriptedEngine
from agentloop.engines.sglang_protocol import fingerprints
from agentloop.errors import ConfigError, EngineError
from agentloop.weights.check import TOLERANCES, Canary, Tolerance, statistics
from agentloop.weights.check_sequences import coverage, pick, random_sequences
from agentloop.weights.check_step import Scores, missing_step
from agentloop.weights.check_tensors import changes, compare
from agentloop.weights.check_transformers import published, reference, routed
from agentloop.weights.checksum import CHUNK_BYTES, checksum
from tests.weights.canary_support import engine_of, sums, texts, train, trainer

# -- checksums


def test_a_checksum_is_of_dtype_shape_and_values() -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert checksum(weight) == checksum(weight.clone()) == checksum(weight.t().contiguous().t())
    others = [weight.t(), weight.reshape(4, 6), weight.double(), weight.view(torch.int32), -weight, weight[:5]]
    assert len({checksum(tensor) for tensor in (weight, *others)}) == 7
    assert checksum(weight, dtype=torch.bfloat16) == checksum(weight.bfloat16())
    assert checksum(torch.tensor([1, 2]), dtype=torch.bfloat16) == checksum(torch.tensor([1, 2]))
    assert checksum(torch.tensor(1.0)) != checksum(torch.ones(1))
    assert checksum(torch.empty(0)) != checksum(torch.empty(0, 3))
    assert checksum(weight.to(torch.float8_e4m3fn)) != checksum(weight.to(torch.float8_e4m3fn).view(torch.uint8))


def test_a_checksum_does_not_depend_on_how_a_tensor_is_cut_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
    whole = [checksum(weight), checksum(weight, dtype=torch.bfloat16)]
    assert weight.nbytes < CHUNK_BYTES
    monkeypatch.setattr("agentloop.weights.checksum.CHUNK_BYTES", 64)
    assert [checksum(weight), checksum(weight, dtype=torch.bfloat16)] == whole


async def test_a_local_engine_tells_what_it_serves_under_every_name() -> None:
    model = trainer("deepseek")
    engine = engine_of(model)
    assert await engine.weight_checksums() == sums(model)
    fused = ["model.layers.1.mlp.experts.gate_up_proj", "no.such.weight"]
    assert await engine.weight_checksums(fused) == {fused[0]: checksum(model.state_dict()[fused[0]])}
    prints = await engine.weight_fingerprints()
    assert prints.keys() == model.state_dict().keys()
    train(model, 0.01, seed=1)
    await engine.update_weights(published(model), 1)
    assert await engine.weight_checksums() == sums(model)
    after = await engine.weight_fingerprints()
    assert all(after[name] != value for name, value in prints.items())
    await engine.close()


async def test_a_model_loaded_in_bfloat16_keeps_its_expert_bias_in_float32(tmp_path: Path) -> None:
    """As an export in bfloat16 does, so the checksums of the two are equal."""
    model = trainer("deepseek")
    model.save_pretrained(tmp_path)
    engine = LocalEngine.load(str(tmp_path), dtype="bfloat16")
    sent = {name: tensor if name.endswith("_bias") else tensor.bfloat16() for name, tensor in published(model)}
    await engine.update_weights(sent.items(), 1)
    assert await engine.weight_checksums() == {name: checksum(tensor) for name, tensor in sent.items()}
    await engine.close()


async def test_engines_that_cannot_tell_say_so() -> None:
    with pytest.raises(EngineError, match="ScriptedEngine cannot tell checksums of its weights"):
        await ScriptedEngine([]).weight_checksums()
    with pytest.raises(EngineError, match="ScriptedEngine cannot tell fingerprints"):
        await ScriptedEngine([]).weight_fingerprints()


# -- the canary


def test_statistics_of_differences() -> None:
    assert statistics([[-1.0, -2.0], [-3.0]], [[-1.5, -1.5], [-2.75]]) == pytest.approx((1.25 / 3, 0.25, 0.5))
    assert statistics([[-math.inf, -1.0]], [[-math.inf, -1.0]]) == (0.0, 0.0, 0.0)
    for odd in (math.nan, -math.inf):
        assert statistics([[-1.0]], [[odd]]) == (math.inf,) * 3


async def test_a_scripted_engine_can_be_checked() -> None:
    """Its scores are a constant; a coroutine function is a reference, too; one answer of it serves several engines."""
    asked = []

    async def scores(sequences: Any) -> list[list[float]]:
        asked.append(sequences)
        return [[-1.0] * (len(ids) - 1) for ids in sequences]

    canary = Canary([[1, 2, 3], [4, 5]], scores, tolerance="float32")
    expected = await canary.expected()
    for _ in range(2):
        report = await canary.check(ScriptedEngine([]), 0, {}, expected=expected)
        assert report.ok
        assert (report.mean, report.tokens, report.margin) == (0.0, 3, 0.0)
        assert "ScriptedEngine cannot tell checksums" in report.message
    assert len(asked) == 1
    assert not (await canary.check(ScriptedEngine([], log_prob=-1.1), 0)).ok
    other = await canary.check(ScriptedEngine([], weight_version=6), 7)
    assert not other.ok
    assert "the engine says that it serves version 6" in other.message
    assert json.loads(json.dumps(other.to_dict()))["tolerance"]["mean"] == TOLERANCES["float32"].mean


async def test_numbers_that_are_none() -> None:
    canary = Canary([[1, 2, 3]], lambda sequences: [[-1.0, math.nan]], tolerance="bfloat16")
    report = await canary.check(ScriptedEngine([]), 0)
    assert not report.ok
    assert report.message == "version 0 is not what serves: the trainer's own scores are not numbers"
    report = await Canary([[1, 2]], lambda _: [[-1.0]], tolerance="bfloat16").check(ScriptedEngine([], log_prob=math.nan), 0)
    assert not report.ok
    assert report.message.startswith("version 0 is not what serves: the engine's scores are not numbers")


async def test_checksums_of_another_dtype_are_told_from_wrong_weights() -> None:
    model = trainer("qwen3_tied")
    engine = engine_of(model, torch.bfloat16)
    report = await Canary(texts(2, 32), reference(model), tolerance="bfloat16").check(engine, 0, sums(model))
    assert not report.ok
    assert report.message.endswith("were they taken in another dtype than the engine keeps?")
    await engine.close()


async def test_a_reference_that_answers_too_little_is_an_error() -> None:
    canary = Canary([[1, 2, 3]], lambda sequences: [[-1.0]], tolerance="float32")
    with pytest.raises(EngineError, match="the trainer did not give the canary one log-probability for each token"):
        await canary.check(ScriptedEngine([]), 0)


def test_what_a_canary_is_not_made_of() -> None:
    with pytest.raises(ConfigError, match="unknown tolerance 'bfloat61': "):
        Canary([[1, 2]], lambda sequences: [], tolerance="bfloat61")
    for sequences in ([], [[1]]):
        with pytest.raises(ConfigError, match="at least one sequence, and two tokens"):
            Canary(sequences, lambda sequences: [], tolerance="float32")
    with pytest.raises(ConfigError, match="must be positive"):
        Tolerance(0.1, 0.1, 0.0, "")
    with pytest.raises(ConfigError, match="at least one report"):
        Tolerance.measured([])


# -- the step


def made(share: float, noise: float, *, step: float = 0.05, trainer_noise: float = 0.0) -> tuple[Scores, Scores]:
    """Scores of eight sequences before and after an update of which the engine missed `share`."""
    chance = np.random.default_rng(0)
    size = (8, 64)
    old, move = -chance.random(size) * 5, chance.normal(0, step, size)
    seen = [old + chance.normal(0, trainer_noise, size), old + move + chance.normal(0, trainer_noise, size)]
    got = [old + chance.normal(0, noise, size), old + (1 - share) * move + chance.normal(0, noise, size)]
    return Scores(seen[0].tolist(), got[0].tolist()), Scores(seen[1].tolist(), got[1].tolist())


@pytest.mark.parametrize("share", [1.0, -1.0, 0.5])
def test_a_missing_step_is_seen_below_the_noise(share: float) -> None:
    found = missing_step(*made(share, noise=0.05 / 3))
    assert found is not None
    assert found.share == pytest.approx(share, abs=0.1)
    assert found.beyond
    right = missing_step(*made(0.0, noise=0.05 / 3))
    assert right is not None
    assert not right.beyond


@pytest.mark.parametrize("step", [0.1, 0.05, 0.02, 0.01, 0.001])
def test_the_trainers_own_noise_is_no_missing_step(step: float) -> None:
    """It is on both sides of the regression, and makes a right engine look like one that lags."""
    found = missing_step(*made(0.0, noise=0.02, step=step, trainer_noise=0.02))
    assert found is not None
    assert not found.beyond


def test_where_nothing_can_be_said_of_a_step() -> None:
    before, now = made(1.0, noise=0.01)
    assert missing_step(Scores(before.expected[:3], before.got[:3]), Scores(now.expected[:3], now.got[:3])) is None
    assert missing_step(before, before) is None
    broken = [[math.nan] * 64, *now.got[1:]]
    assert missing_step(before, Scores(now.expected, broken)) is None


def test_one_sequence_does_not_give_alarm() -> None:
    """A token of a mixture that is routed otherwise moves all after it."""
    before, now = made(0.0, noise=0.005)
    got = [[a + 40 * (b - c) for a, b, c in zip(now.got[0], before.expected[0], now.expected[0], strict=True)], *now.got[1:]]
    found = missing_step(before, Scores(now.expected, got))
    assert found is not None
    assert not found.beyond


# -- tensors


def test_what_sglang_keeps_fused() -> None:
    layer = "model.layers.3"
    parts = {
        f"{layer}.self_attn.fused_qkv_a_proj_with_mqa.weight": [
            "self_attn.q_a_proj.weight",
            "self_attn.kv_a_proj_with_mqa.weight",
        ],
        f"{layer}.self_attn.qkv_proj.weight": [f"self_attn.{one}_proj.weight" for one in "qkv"],
        f"{layer}.mlp.experts.w13_weight": ["mlp.experts.0.gate_proj.weight", "mlp.experts.1.up_proj.weight"],
        f"{layer}.mlp.experts.w2_weight": ["mlp.experts.0.down_proj.weight", "mlp.experts.1.down_proj.weight"],
        f"{layer}.mlp.shared_experts.gate_up_proj.weight": ["mlp.shared_experts.up_proj.weight"],
        "model.norm.weight": [],
    }
    names = [f"{layer}.{name}" for of in parts.values() for name in of] + ["model.norm.weight"]
    before, after = dict.fromkeys(names, 1), dict.fromkeys(names, 2)
    old, new = dict.fromkeys(parts, "a"), dict.fromkeys(parts, "b")
    assert changes(before, after, old, new)[1] == len(names)
    assert not changes(before, after, old, new)[0]
    assert not changes(before, before, old, old)[0]
    for kept, of in parts.items():
        stale, _ = changes(before, after, old, new | {kept: "a"})
        assert stale.stale == tuple(f"{layer}.{name}" for name in of) or (kept, stale.stale) == ("model.norm.weight", (kept,))
        one_of_two_replicas, _ = changes(before, after, old, new | {kept: "a,b"})
        assert one_of_two_replicas.stale == stale.stale
        touched, _ = changes(before, before, old, old | {kept: "b"})
        assert touched.touched == stale.stale
    assert changes(before, after, {}, {}) == (changes({}, {}, {}, {})[0], 0)


def test_sglangs_answer_of_fingerprints() -> None:
    ranks = [{"checksums": {"a": "01", "b": "02"}, "parallelism_info": {}}, {"checksums": {"a": "01", "b": "03"}}]
    assert fingerprints(ranks) == {"a": "01", "b": "02,03"}
    with pytest.raises(EngineError, match="told no checksums"):
        fingerprints([])


def test_names_that_only_one_side_has() -> None:
    found = compare({"a": 1, "b": 2, "model.layers.7.c": 3}, {"a": 1, "b": 3, "d": 4})
    assert (found.differ, found.absent, found.unsent, found.layer) == (("b",), ("model.layers.7.c",), ("d",), 7)
    assert "1 tensor was sent that the engine does not know (model.layers.7.c)" in str(found)
    assert not compare({"a": 1}, {"a": 1, "d": 4}, whole=False)
    experts = {f"m.experts.{number}.{kind}_proj.weight": number for number in range(2) for kind in ("gate", "up", "down")}
    fused = {"m.experts.gate_up_proj": 1, "m.experts.down_proj": 2}
    assert not compare(fused, experts | fused)


# -- sequences


def test_random_sequences_are_the_same_everywhere() -> None:
    assert random_sequences(1000, 2, 3, seed=4) == [[241, 310, 105], [738, 405, 490]]


def test_picking_reaches_rare_experts() -> None:
    """All but one of the candidates use the same few experts."""
    candidates = [np.tile(np.array([0, 1]), (10, 2, 1)) for _ in range(30)]
    candidates[17] = candidates[17] + 4
    candidates[23] = candidates[23] + 2
    assert set(pick(candidates, 6, 3)) == {0, 17, 23}
    some = coverage([candidates[0], candidates[23]], 6)
    assert some.share == pytest.approx(4 / 6)
    assert some.unseen == [(0, 4), (0, 5), (1, 4), (1, 5)]
    assert (some.rarest, coverage([candidates[index] for index in (0, 17, 23)], 6).rarest) == (0, 10)
    with pytest.raises(ConfigError, match="the model has 0 to 3"):
        coverage(candidates, 4)
    with pytest.raises(ConfigError, match="4 sequences cannot be picked from 3"):
        pick(candidates[:3], 6, 4)


@pytest.mark.parametrize(("name", "layers", "each"), [("deepseek", 3, 2), ("qwen3_moe", 4, 2)])
def test_routing_of_a_real_model(name: str, layers: int, each: int) -> None:
    model = trainer(name)
    found = routed(model, random_sequences(250, 40, 32))
    assert [array.shape for array in found] == [(32, layers, each)] * 40
    picked = coverage([found[index] for index in pick(found, 8, 4)], 8)
    assert picked.share == coverage(found, 8).share
    assert picked.share >= coverage(found[:4], 8).share
    assert coverage(routed(trainer("qwen3_tied"), [[1, 2, 3]]), 8).share == 1.0
