"""The local engine with latent attention and mixtures of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from agentloop.engines.base import Sampling
from agentloop.engines.local import LocalEngine
from agentloop.errors import EngineError
from tests.engines.support import plain_log_probs

EXPERT = "model.layers.1.mlp.experts.3"


def deepseek(seed: int, **changes: Any) -> Any:
    """Tiny; keys are 24 wide, values 16."""
    sizes: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "initializer_range": 0.2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(seed)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**(sizes | changes))).eval()


@pytest.mark.parametrize("v_head_dim", [16, 32])
async def test_latent_attention_is_that_of_a_plain_forward(v_head_dim: int) -> None:
    engine = LocalEngine(deepseek(1, v_head_dim=v_head_dim), stop_token_ids=())
    ids: list[int] = [3, 1, 4, 1, 5]
    for _ in range(3):
        answer = await engine.generate(ids, Sampling(8, seed=1), trajectory_id="one")
        wanted = plain_log_probs(deepseek(1, v_head_dim=v_head_dim), ids, answer.ids)
        assert answer.log_probs == pytest.approx(wanted, abs=1e-4)
        ids = [*ids, *answer.ids]
    assert answer.cached_tokens > 0
    await engine.close()


async def test_experts_come_one_by_one_as_they_are_published() -> None:
    engine = LocalEngine(deepseek(1), stop_token_ids=())
    new = deepseek(2)
    weights = {name: tensor for name, tensor in new.state_dict().items() if ".experts." not in name}
    experts = new.model.layers[1].mlp.experts
    for number in range(4):
        start = f"model.layers.1.mlp.experts.{number}"
        gate, up = experts.gate_up_proj[number].chunk(2)
        weights |= {f"{start}.gate_proj.weight": gate, f"{start}.up_proj.weight": up}
        weights[f"{start}.down_proj.weight"] = experts.down_proj[number]
    await engine.update_weights(weights.items(), 1)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    wanted = plain_log_probs(new, ids[:1], ids[1:])
    assert await engine.score(ids) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(EngineError, match=rf"'{EXPERT}\.up_proj\.weight' has shape \[16, 32\] and was given \[32, 16\]"):
        await engine.update_weights([(f"{EXPERT}.up_proj.weight", torch.zeros(32, 16))], 2)
    assert engine.weight_version == 1
    await engine.close()
