"""Why scoring differs from decoding in a mixture of experts: `python -m benchmarks.gpu.engine_moe [deepseek_v3]`.

A small mixture of experts with random weights (Qwen3's shape, or DeepSeek-V3's with its latent attention) is decoded on SGLang,
and the same tokens are scored in one prefill, both with the experts that every token was routed to. If the difference in
log-probability is due to routing, it is small wherever the two routed alike, and large where they did not. About two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.engines import sglang_protocol as protocol
from agentloop.engines.base import Sampling
from benchmarks.gpu.engine_conformance import apart, prompt
from benchmarks.gpu.engine_support import MODEL, SETTINGS, command, or_exit, summary
from benchmarks.report import report

REQUESTS, NEW_TOKENS = 64, 64
DENSE = {"qwen3_moe": 0, "deepseek_v3": 1}
"""First layers that route nothing."""
SHARED: dict[str, Any] = {
    "vocab_size": 687,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "eos_token_id": 682,
}


def write_model(kind: str, folder: Path) -> None:
    """Random weights in bfloat16, with the quickstart's tokenizer, as SGLang reads them."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    if kind == "deepseek_v3":
        latent = {"kv_lora_rank": 512, "q_lora_rank": 256, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        experts = {
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": DENSE[kind],
        }
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**SHARED, **latent, **experts))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHARED, num_experts=16, head_dim=64, norm_topk_prob=True))
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(MODEL / name, folder / name)
    path = folder / "config.json"
    # transformers 5 leaves these out, and SGLang 0.5.12 reads them.
    needed = (
        {"moe_layer_freq": 1, "topk_method": "noaux_tc"}
        if kind == "deepseek_v3"
        else {"decoder_sparse_step": 1, "mlp_only_layers": []}
    )
    path.write_text(json.dumps({**needed, **json.loads(path.read_text())}))


async def scored(engine: Any, ids: list[int]) -> tuple[list[float], Any]:
    """Log-probabilities of `ids[1:]` in one prefill, and the experts [tokens, layers, experts a token]."""
    request = {**protocol.score_request(ids, rid=protocol.new_request_id()), "return_routed_experts": True}
    answer = await engine._fly(request, scoring=True)
    return protocol.scores(answer, ids), protocol.routed_experts(answer["meta_info"]["routed_experts"], engine._experts)


async def measure(kind: str, folder: Path) -> dict[str, Any]:
    from agentloop.engines.sglang import SGLangEngine

    # A small pool of keys and values, so that it runs beside other engines.
    settings = {**SETTINGS, "mem_fraction_static": 0.6, "max_total_tokens": 131_072}
    settings |= {"dtype": "bfloat16", "enable_return_routed_experts": True}
    engine = SGLangEngine.load(str(folder), settings=settings, ignore_eos=True)
    try:
        prompts = [prompt(8 + i, i) for i in range(REQUESTS)]
        answers = await asyncio.gather(
            *(engine.generate(ids, Sampling(NEW_TOKENS), trajectory_id=str(i)) for i, ids in enumerate(prompts))
        )
        everything: list[float] = []
        alike: list[float] = []
        otherwise: list[float] = []
        shares: list[float] = []
        twice: list[float] = []
        for ids, answer in zip(prompts, answers, strict=True):
            whole, start = ids + answer.ids, len(ids)
            values, prefill = await scored(engine, whole)
            again, _ = await scored(engine, whole)
            twice += apart(values, again)
            decode = np.sort(answer.data["routed_experts"], axis=-1)
            length = min(len(decode), len(prefill))
            differs = (decode[:length] != np.sort(prefill, axis=-1)[:length]).any(axis=-1)[:, DENSE[kind] :]  # [tokens, layers]
            shares.append(float(differs.mean()))
            differences = apart(answer.log_probs or [], values[start - 1 :])
            everything += differences
            for place, difference in enumerate(differences):
                # The token at `start + place` was read off the position before it, which saw all positions up to there.
                (otherwise if differs[: start + place].any() else alike).append(difference)
    finally:
        await engine.close()
    return {
        "model": kind,
        "decode_against_score": summary(everything),
        "where_all_that_the_token_saw_was_routed_alike": summary(alike),
        "where_something_was_routed_otherwise": summary(otherwise),
        "share_of_tokens_and_layers_routed_otherwise": round(float(np.mean(shares)), 5),
        "score_against_score_again": summary(twice),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Decoding against scoring in a mixture of experts.")
    parser.add_argument("kind", nargs="?", choices=["qwen3_moe", "deepseek_v3"], default="qwen3_moe")
    kind = parser.parse_args().kind
    or_exit()
    with tempfile.TemporaryDirectory() as folder:
        write_model(kind, Path(folder))
        figures = asyncio.run(measure(kind, Path(folder)))
    report(f"gpu_engine_moe_{kind}", {"command": command("engine_moe"), **figures}, [])
    return 0


if __name__ == "__main__":
    sys.exit(main())
