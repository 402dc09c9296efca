"""The check of the plan against a GPU: what of it needs none."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.gpu.plan_check import aims, planned, write_deepseek


def test_the_small_deepseek_is_as_sglang_reads_it_and_the_plan_is_held_against_what_was_measured(tmp_path: Path) -> None:
    write_deepseek(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["moe_layer_freq"] == 1 and config["architectures"] == ["DeepseekV3ForCausalLM"]
    told = planned(tmp_path, {"free_before": 139 << 30})
    assert 27e9 < told["weights"] < 29e9 and told["tokens"] > 1_000_000
    measured = {**told, "weights": told["weights"] * 1.2, "tokens": None}
    found = {aim.name: aim.holds for aim in aims({"models": {"m": {"planned": told, "measured": measured}}})}
    assert found == {"m: weights, plan over measured": False, "m: kv_cache, plan over measured": True}
