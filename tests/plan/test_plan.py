"""Layouts, memory and the weight sync: against figures worked out by hand, and what was measured on an H200."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentloop.cli import build
from agentloop.errors import ConfigError
from agentloop.plan import make_plan, question, read_plan, render
from agentloop.plan.trainer import TrainerLayout, choose, layer_activations
from tests.plan.shapes import DEEPSEEK_V3, QWEN3_8B, QWEN3_30B_A3B

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GIB = 2**30


def plan(model: dict[str, Any] = DEEPSEEK_V3, **given: Any) -> dict[str, Any]:
    return make_plan(question({"model": model, **given}))


def test_deepseek_v3_on_512_h100s() -> None:
    made = plan(cluster={"gpus": 512, "gpu": "h100"})
    assert made["fits"]
    assert made["changes"] == []
    layout = made["trainer"]["layout"]
    assert layout["tensor"] * layout["pipeline"] * layout["data"] == 512
    assert layout["expert"] * layout["pipeline"] * layout["expert_data"] == 512
    assert sum(made["trainer"]["stage_layers"]) == 61
    per = made["trainer"]["per_gpu"]
    assert per["total"] < 75.2 * GIB
    assert per["gradients"] == 2 * per["weights"]
    rollout = made["rollout"]
    engine = rollout["layout"]["engine_gpus"]
    assert rollout["per_gpu"]["weights"] * engine > made["model"]["weights_bytes"]["bfloat16"]  # copies of the attention
    assert rollout["per_gpu"]["kv_bytes_per_token"] == 70_272
    assert rollout["cache_tokens_per_engine"] >= rollout["wanted_tokens_per_engine"] == 64 * 10_240
    assert made["sync"]["bytes"] == pytest.approx(1.342e12, rel=0.001)
    # 1.342 TB over one 50 GB/s card, and over the eight cards of a node.
    assert made["sync"]["total_s"]["plain"] == pytest.approx(26.84, rel=0.001)
    assert made["sync"]["gather_s"]["by_node"] == pytest.approx(3.355, rel=0.001)
    # 58 layers of 256 experts of three weights, which take longer.
    assert made["sync"]["total_s"]["by_node"] == made["sync"]["load_s"] == pytest.approx(44_544 * 0.13e-3, rel=0.1)


def test_the_trainers_state_is_megatrons_formula() -> None:
    """6 bytes a parameter, and 12 over the data-parallel ranks."""
    asked = question(
        {
            "model": QWEN3_8B,
            "cluster": {"gpus": 8, "gpu": "h200"},
            "trainer": {"tensor": 1, "pipeline": 1, "expert": 1},
        }
    )
    stage = choose(asked).stages[0]
    parameters = asked.shape.parameters
    assert stage["parameters"] == parameters
    assert stage["weights"] + stage["gradients"] == 6 * parameters
    assert stage["optimizer"] == 12 * parameters / 8


def test_every_parameter_is_on_some_rank_once() -> None:
    for model, sizes in ((DEEPSEEK_V3, (4, 8, 32)), (QWEN3_30B_A3B, (2, 4, 8)), (QWEN3_8B, (8, 3, 1))):
        tensor, pipeline, expert = sizes
        gpus = tensor * pipeline * expert
        asked = question({"model": model, "cluster": {"gpus": gpus, "gpus_per_node": 8 if gpus % 8 == 0 else gpus}})
        layout = TrainerLayout(asked, tensor, pipeline, expert, asked.config.trainer)
        whole = asked.shape
        cut = routed = copied = 0
        for number in range(pipeline):
            for layer in layout.stage_layers(number):
                part, experts = whole.layer(layer)
                cut, copied, routed = cut + part.split, copied + part.whole, routed + experts
        on_ranks = sum(stage["parameters"] for stage in layout.stages)
        ends = whole.embedding + whole.head
        assert on_ranks == pytest.approx((cut + ends) / tensor + copied + whole.hidden + routed / expert, abs=100)
        assert cut + copied + routed + ends + whole.hidden == whole.parameters


def test_activations_of_a_dense_layer_are_near_korthikantis() -> None:
    """Their 34 s b h a layer counts dropout's masks and a GELU of width 4 h; a layer of Qwen3-8B has three matrices of 3 h and
    fewer keys. So the two agree in magnitude, and sequence parallelism divides both."""
    shape = question({"model": QWEN3_8B, "cluster": {"gpus": 8}}).shape
    one = layer_activations(shape, 0, 1, 1)
    assert 20 * shape.hidden < one < 40 * shape.hidden
    assert layer_activations(shape, 0, 1, 4) == one / 4


def test_recomputation_keeps_a_layers_input_alone() -> None:
    sizes = {"tensor": 1, "pipeline": 2, "expert": 1, "micro_batch_tokens": 8192}
    cluster = {"gpus": 8, "gpu": "h200"}
    full = choose(question({"model": QWEN3_8B, "cluster": cluster, "trainer": {**sizes, "recompute": "full"}}))
    none = choose(question({"model": QWEN3_8B, "cluster": cluster, "trainer": {**sizes, "recompute": "none"}}))
    layer = 8192 * layer_activations(full.question.shape, 0, 1, 1)
    assert full.stages[0]["activations"] == 2 * 18 * 8192 * 2 * 4096 + layer  # two micro-batches under way on the first stage
    assert none.stages[0]["activations"] == 2 * 18 * layer


def test_the_cache_is_what_an_h200_freed() -> None:
    """The conformance run put SGLang's cache to sleep (`benchmarks/gpu/engine_support.py`: mem_fraction_static 0.3)."""
    measured = json.loads((RESULTS / "gpu_engine_conformance.json").read_text())["figures"]["memory"]["free_gib"]
    model = json.loads((RESULTS.parents[1] / "examples" / "quickstart" / "model" / "config.json").read_text())
    made = plan(
        model,
        cluster={"gpus": 1, "gpu": "h200"},
        lengths={"prompt": 512, "response": 512},
        rollout={"mem_fraction": 0.3},
    )
    freed = measured["without_kv_cache"] - measured["awake"]
    assert made["rollout"]["per_gpu"]["kv_cache"] / GIB == pytest.approx(freed, rel=0.1)


def test_a_hot_update_loads_as_fast_as_was_measured() -> None:
    measured = json.loads((RESULTS / "gpu_weights.json").read_text())["figures"]["hot_update_s"]
    made = plan(QWEN3_8B, cluster={"gpus": 1, "gpu": "h200"})
    assert made["sync"]["load_s"] == pytest.approx(sorted(measured)[1], rel=0.3)
    assert made["sync"]["gather_s"]["plain"] == made["sync"]["send_s"]["plain"] == 0  # one GPU has it all


@pytest.mark.parametrize("size", ["8", "30"])
def test_experts_load_as_slowly_as_was_measured(size: str) -> None:
    """An expert's weight goes into a fused one by itself, and thousands of them take longer than their bytes."""
    from benchmarks.gpu.deepseek_model import SHAPES

    measured = json.loads((RESULTS / "gpu_deepseek.json").read_text())["figures"]["sizes"][size]
    made = plan(
        json.loads(SHAPES[size].config("bfloat16").to_json_string()),
        cluster={"gpus": 1, "gpu": "h200"},
        lengths={"prompt": 512, "response": 512},
    )
    assert made["sync"]["bytes"] == pytest.approx(measured["bytes"], rel=0.01)
    assert made["sync"]["load_s"] == pytest.approx(measured["from_tensors_s"], rel=0.3)


def test_grouped_query_caches_are_cut_over_ranks_and_latents_are_not() -> None:
    def per_token(model: dict[str, Any], tensor: int) -> int:
        made = plan(model, cluster={"gpus": 16, "gpu": "h200"}, rollout={"tensor": tensor, "data": 1})
        return int(made["rollout"]["per_gpu"]["kv_bytes_per_token"])

    assert [per_token(QWEN3_8B, tensor) for tensor in (1, 2, 8, 16)] == [147_456, 73_728, 18_432, 18_432]
    assert {per_token(DEEPSEEK_V3, tensor) for tensor in (8, 16)} == {70_272}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"cluster": {"gpus": 64}}, r"the trainer takes .* GiB of 75.2 GiB a GPU; set trainer.optimizer_on_cpu=true"),
        ({"cluster": {"gpus": 16}}, r"the trainer takes .*; no layout of 16 GPUs fits, \d+ do"),
        ({"cluster": {"gpus": 16}}, r"the rollout's weights take .* a GPU; set rollout.weights=fp8"),
        ({"cluster": {"gpus": 512}, "trainer": {"tensor": 3}}, "sizes are impossible: TP 3 x PP 1 .* does not divide 512 GPUs"),
        ({"cluster": {"gpus": 512}, "trainer": {"pipeline": 4, "expert": 8}}, "leave trainer.{tensor,pipeline,expert} open"),
        ({"cluster": {"gpus": 512}, "rollout": {"tensor": 8, "data": 1}}, "leave rollout.{tensor,data,expert} open"),
        ({"cluster": {"gpus": 512}, "rollout": {"sequences": 500_000}}, r"the cache|the rollout's cache takes .* tokens of"),
        ({"model": QWEN3_8B, "cluster": {"gpus": 2, "gpu": "h200"}, "trainer": {"offload": False}}, "set trainer.offload=true"),
    ],
)
def test_what_does_not_fit_says_what_to_change(given: dict[str, Any], sentence: str) -> None:
    made = plan(**given)
    assert not made["fits"]
    assert any(re.search(sentence, change) for change in made["changes"]), made["changes"]


def test_a_sync_that_does_not_fit_is_told() -> None:
    """Each part fits in its own time; the weights of both and the buckets do not."""
    made = plan(cluster={"gpus": 512}, sync={"bucket_mib": 8192})
    assert made["trainer"]["fits"] and made["rollout"]["fits"] and not made["fits"]
    assert "a weight sync takes" in made["changes"][0]
    assert made["sync"]["peak_bytes"] > made["cluster"]["usable_bytes"]


def test_the_documented_plan_is_what_the_command_prints() -> None:
    root = RESULTS.parents[1]
    name = "examples/plan/deepseek_v3_512_h100.yaml"
    assert render(make_plan(read_plan(root / name)), name) in (root / "docs" / "deepseek.md").read_text()
    assert json.loads((root / "examples" / "plan" / "deepseek_v3" / "config.json").read_text()).items() >= DEEPSEEK_V3.items()


def test_the_change_that_is_named_makes_it_fit() -> None:
    assert plan(cluster={"gpus": 64}, trainer={"optimizer_on_cpu": True})["trainer"]["fits"]
    assert plan(cluster={"gpus": 16}, rollout={"weights": "fp8"})["rollout"]["fits"]


def test_own_gpus_for_the_rollout_are_sent_to() -> None:
    made = plan(cluster={"gpus": 512}, placement="separate", rollout={"gpus": 128, "weights": "fp8"})
    assert (made["trainer"]["gpus"], made["rollout"]["gpus"]) == (384, 128)
    assert made["sync"]["bytes"] == pytest.approx(673.2e9, rel=0.001)
    assert made["sync"]["send_s"]["plain"] == pytest.approx(673.2e9 / 50e9, rel=0.001)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"cluster": {"gpus": 12}}, "12 GPUs do not make whole nodes of 8"),
        ({"cluster": {"gpu": "h1000"}}, "key 'cluster.gpu': no GPU 'h1000'; did you mean 'h100'?"),
        ({"trainer": {"tensr": 8}}, "unknown key 'trainer.tensr'; did you mean 'tensor'?"),
        ({"lengths": {"prompt": 200_000}}, "the model's max_position_embeddings is 163840"),
        ({"placement": "separate", "trainer": {"gpus": 8}, "rollout": {"gpus": 8}}, "take 8 and 8 GPUs of their own"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")):
        plan(**given)


def test_the_command_prints_text_and_json_and_says_by_its_status_what_fits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    (tmp_path / "plan.yaml").write_text("model: config.json\ncluster: {gpus: 512, gpu: h100}\n")
    runner = CliRunner()
    told = runner.invoke(build("plan"), ["plan", str(tmp_path / "plan.yaml")])
    assert told.exit_code == 0, told.output
    for piece in ("671.03 billion parameters, 37.55 billion active", "70,272 bytes a token", "Everything fits", "Assumed:"):
        assert piece in told.output
    broken = runner.invoke(build("plan"), ["plan", str(tmp_path / "config.json"), "cluster=["])
    assert isinstance(broken.exception, ConfigError)
    alone = runner.invoke(build("plan"), ["plan", str(tmp_path / "config.json"), "cluster.gpus=64", "--json"])
    assert alone.exit_code == 1
    made = json.loads(alone.output)
    assert made["cluster"]["gpus"] == 64
    assert made == json.loads(json.dumps(make_plan(read_plan(tmp_path, ["cluster.gpus=64"]))))
