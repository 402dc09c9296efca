"""`agentloop plan` against what SGLang takes on a GPU: `python -m benchmarks.gpu.plan_check`, two to three minutes on an H200.

For a dense model (Qwen3-8B's shape) and a mixture of experts with latent attention (DeepSeek-V3's shape, 14 billion
parameters), both with random weights: bytes of weights and of the cache, told by how much memory is free before and after each
is put to sleep, and the tokens that the cache takes. Exits with 3 where SGLang or a GPU is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from agentloop.plan import make_plan, question
from benchmarks.gpu.engine_support import Result, missing
from benchmarks.gpu.models import QWEN3_8B, write_model
from benchmarks.gpu.throughput import SETTINGS
from benchmarks.report import RESULTS, Aim

FRACTION = 0.6
NEAR = 0.1
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 129_280,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 16_384,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_deepseek(folder: Path) -> None:
    """A folder as `write_model` makes it, with the configuration of a small DeepSeek-V3."""
    from transformers import DeepseekV3Config

    write_model(folder, QWEN3_8B | {"vocab_size": DEEPSEEK["vocab_size"]})
    DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], **DEEPSEEK).save_pretrained(folder)
    path = folder / "config.json"
    # transformers 5 leaves these out, and SGLang 0.5.12 reads them.
    path.write_text(json.dumps({"moe_layer_freq": 1, "topk_method": "noaux_tc", **json.loads(path.read_text())}))


def free() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


async def settled() -> int:
    """Free memory, once it no longer grows: that of a process that has just ended comes back a moment later."""
    before, now = -1, free()
    while now > before:
        await asyncio.sleep(1.0)
        before, now = now, free()
    return now


async def slept(engine: Any) -> dict[str, int]:
    """Bytes that the cache and the weights give back. A first request makes what SGLang allocates only then."""
    from agentloop.engines.base import Sampling

    await engine.generate([1, 2, 3, 4], Sampling(4), trajectory_id="warm")
    awake = free()
    await engine.sleep(["kv_cache"])
    without = free()
    await engine.sleep(["weights"])
    return {"kv_cache": without - awake, "weights": free() - without}


def tokens(engine: Any) -> int | None:
    """That the cache takes, where this SGLang tells."""
    told = getattr(getattr(engine._engine, "_scheduler_init_result", None), "scheduler_infos", None)
    return told[0].get("max_total_num_tokens") if told else None


async def measure(folder: Path) -> dict[str, Any]:
    from agentloop.engines.sglang import SGLangEngine

    before = await settled()
    began = perf_counter()
    # Few graphs: they are in neither figure.
    settings = {**SETTINGS, "mem_fraction_static": FRACTION, "enable_memory_saver": True, "cuda_graph_max_bs": 8}
    engine = SGLangEngine.load(str(folder), settings=settings, ignore_eos=True)
    try:
        after = free()
        found: dict[str, Any] = {
            "start_s": round(perf_counter() - began, 1),
            "free_before": before,
            "taken": before - after,
            "tokens": tokens(engine),
        }
        print(found, flush=True)
        found |= await slept(engine)
    finally:
        await engine.close()
    return found


def planned(folder: Path, measured: dict[str, Any]) -> dict[str, Any]:
    made = make_plan(
        question(
            {
                "model": str(folder),
                "cluster": {"gpus": 1, "gpu": "h200", "memory_gib": measured["free_before"] / 2**30},
                "lengths": {"prompt": 512, "response": 512},
                "rollout": {"tensor": 1, "data": 1, "mem_fraction": FRACTION},
            }
        )
    )
    rollout = made["rollout"]
    return {
        "weights": rollout["per_gpu"]["weights"],
        "kv_cache": rollout["per_gpu"]["kv_cache"],
        "tokens": rollout["cache_tokens_per_engine"],
    }


def aims(figures: Mapping[str, Any]) -> list[Aim]:
    found = []
    for model, told in figures.get("models", {}).items():
        for part, value in told["planned"].items():
            measured = told["measured"][part]
            if measured:
                off = abs(value / measured - 1)
                found.append(
                    Aim(f"{model}: {part}, plan over measured", round(value / measured, 4), "within 10 %", off <= NEAR)
                )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description="The plan's memory against SGLang's.").parse_args(argv)
    if why := missing():
        print(f"{why}: nothing was measured", file=sys.stderr)
        return 3
    result = Result("gpu_plan_check", aims, RESULTS, command="python -m benchmarks.gpu.plan_check", mem_fraction=FRACTION)
    for name, write in (("qwen3_8b", lambda folder: write_model(folder, QWEN3_8B)), ("deepseek_v3_14b", write_deepseek)):
        with result.step(name), tempfile.TemporaryDirectory(prefix="plan-") as folder:
            path = Path(folder)
            write(path)
            measured = asyncio.run(measure(path))
            result.under("models", name, measured=measured, planned=planned(path, measured))
    result.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
