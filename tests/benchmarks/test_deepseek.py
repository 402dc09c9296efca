"""The benchmark of a small DeepSeek-V3, over the local engine, and the model that it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu import deepseek_model
from benchmarks.gpu.deepseek import Bench, asked, main
from benchmarks.gpu.deepseek_model import TINY, log_probs, per_expert, recorded, replayed, shift, trainer, write_checkpoint

IDS = [5, 17, 99, 3, 250, 41, 7, 7, 120, 64]


@pytest.fixture
def model() -> Any:
    return trainer(TINY.config("float32"), "cpu")


def test_updates_are_measured_beside_a_restart_and_every_score_is_that_of_the_trainer(tmp_path: Path) -> None:
    assert main(["--engine", "local", "--sizes", "1,8", "--results", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "deepseek_local.json").read_text())
    figures = result["figures"]
    for size in ("1", "8"):
        assert figures["sizes"][size]["scores_moved"] > 1 and figures["sizes"][size]["scores_back"] == 0
        assert figures["sizes"][size]["from_disk_scores_moved"] < 1e-5
    assert figures["sizes"]["1"]["scores_after_restart"] < 1e-5
    assert figures["routing"]["transformers_float32"]["experts_replayed"]["max"] < 1e-3
    assert list(figures["not_run"]) == ["two"] and "two GPUs" in figures["not_run"]["two"]
    assert all(aim["holds"] for aim in result["aims"])


def test_what_fails_or_has_no_time_left_is_told_and_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise RuntimeError("no such call")

    monkeypatch.setattr("benchmarks.gpu.deepseek.recorded", refuses)
    argv = ["--engine", "local", "--sizes", "1,8", "--part", "routing,updates", "--results", str(tmp_path), "--budget-s", "45"]
    assert main(argv) == 0
    figures = json.loads((tmp_path / "deepseek_local.json").read_text())["figures"]
    assert figures["not_run"]["routing"].startswith("RuntimeError: no such call (at ")
    assert "were left of the budget" in figures["not_run"]["size 8"]
    assert figures["sizes"]["1"]["scores_back"] == 0


def test_the_steps_without_a_gpu_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert main([]) == 3
        assert capsys.readouterr().err == "there is no GPU here: nothing was measured\n"


def test_a_checkpoint_in_shards_has_a_weight_for_each_expert_and_is_the_same_model(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepseek_model, "SHARD_BYTES", 300_000)
    deepseek_model.write_folder(tmp_path, model.config)
    write_checkpoint(tmp_path, per_expert(model.state_dict().items()))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    named = dict(deepseek_model.read_checkpoint(tmp_path))
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in named
    assert not any(name.endswith(deepseek_model.STACKED) for name in named)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert log_probs(again, IDS) == pytest.approx(log_probs(model, IDS), abs=1e-6)


def test_shifted_weights_are_another_model_and_back_the_same_one(model: Any) -> None:
    before = log_probs(model, IDS)
    names = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shift(model, 1)
    assert all(not torch.equal(tensor, names[name]) for name, tensor in model.state_dict().items())
    assert max(abs(a - b) for a, b in zip(before, log_probs(model, IDS), strict=True)) > 0.5
    shift(model, -1)
    assert log_probs(model, IDS) == before


def test_replaying_its_own_experts_changes_nothing_and_others_do(model: Any) -> None:
    with recorded(model) as chosen:
        own = log_probs(model, IDS)
    experts = torch.stack([torch.zeros_like(chosen[1]), chosen[1], chosen[2]], dim=1)  # the first layer routes nothing
    with replayed(model, experts):
        assert log_probs(model, IDS) == pytest.approx(own, abs=1e-6)
    others = (experts + 4) % 8
    with replayed(model, others):
        assert max(abs(a - b) for a, b in zip(own, log_probs(model, IDS), strict=True)) > 0.01
    assert log_probs(model, IDS) == own
    for wrong in (experts[:-1], torch.zeros_like(experts)):
        with pytest.raises(ValueError, match="layer 1"), replayed(model, wrong):
            log_probs(model, IDS)


def test_replay_takes_a_rounded_model_back_to_the_unrounded_ones_experts(model: Any) -> None:
    """What replay is for: rounding flips routing, and with the experts forced only rounding is left."""
    import copy

    rounded = copy.deepcopy(model).to(torch.bfloat16).float()
    ids = [(7 * i * i + 3 * i) % 250 for i in range(200)]
    with recorded(model) as chosen:
        exact = log_probs(model, ids)
    with recorded(rounded) as other:
        plain = log_probs(rounded, ids)
    assert any(not torch.equal(chosen[layer].sort(-1)[0], other[layer].sort(-1)[0]) for layer in chosen), "nothing flipped"
    with replayed(rounded, torch.stack([torch.zeros_like(chosen[1]), chosen[1], chosen[2]], dim=1)):
        forced = log_probs(rounded, ids)

    def worst(values: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(exact, values, strict=True))

    assert worst(forced) < worst(plain) / 2


def test_a_size_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        asked(["--sizes", "2"])
    assert "'2' is none of 1, 8, 30" in capsys.readouterr().err


def test_the_sizes_are_about_what_they_are_called() -> None:
    for size, shape in deepseek_model.SHAPES.items():
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(shape.config("bfloat16"))
        found = sum(tensor.nbytes for tensor in whole.state_dict().values()) / 1e9
        assert float(size) * 0.9 < found < float(size) * 1.25, (size, found)
    assert Bench(asked(["--engine", "local"])).left() > 300
