"""A tiny trainer, steps of training, and a real engine for the canary's tests."""

from __future__ import annotations

import copy
from typing import Any

import torch

from agentloop.engines.local import LocalEngine
from agentloop.weights.check_transformers import published
from agentloop.weights.checksum import checksum
from tests.weights.models import MODELS

VOCABULARY = 250
ONLY = {
    "deepseek": {"v_head_dim": 16, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},  # o_proj is square
    "qwen3_moe": {"head_dim": 16},  # q_proj and o_proj are
    "qwen3_tied": {"head_dim": 16},
}


def trainer(name: str) -> Any:
    """A transformers model in float32 with random weights, the same at every call, one of whose matrices is square."""
    import transformers

    kind, config = MODELS[name]
    classes = {
        "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    torch.manual_seed(5)
    made = classes[kind][1](classes[kind][0](**{**config, **ONLY[name], "initializer_range": 0.05})).eval()
    for tensor_name, tensor in made.state_dict().items():
        if tensor_name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.randn_like(tensor) * 0.01)
        elif tensor.dim() == 1:
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return made


def engine_of(model: Any, dtype: torch.dtype = torch.float32) -> LocalEngine:
    """A local engine with a model of its own, of the same weights."""
    return LocalEngine(copy.deepcopy(model).to(dtype))


def train(model: Any, size: float, seed: int) -> None:
    """A step that moves each element by about `size` of its tensor's standard deviation."""
    noise = torch.Generator().manual_seed(seed)
    done = set()
    for tensor in model.state_dict().values():
        if tensor.data_ptr() not in done:  # tied tensors once
            done.add(tensor.data_ptr())
            tensor.add_(torch.randn(tensor.shape, generator=noise) * tensor.std() * size)


def sums(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """What a sender in `dtype` says that it sent."""
    return {name: checksum(tensor, dtype=dtype) for name, tensor in published(model)}


def texts(count: int = 8, length: int = 64) -> list[list[int]]:
    ids: list[list[int]] = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    return ids
