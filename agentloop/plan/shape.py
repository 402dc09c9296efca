"""A model's shape from its `config.json`: how many parameters each part has, and what one token leaves in the cache.

The counts are those of transformers' models (`modeling_qwen3.py`, `modeling_qwen3_moe.py`, `modeling_deepseek_v3.py`), tensor
by tensor, and tested against them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, nearest

FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3")
FP8_BLOCK = 128
"""Side of the square of weights that shares one fp32 scale in DeepSeek's FP8 checkpoints."""


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters of one part of a layer, by how tensor parallelism treats them."""

    split: int = 0
    """Of matrices that are cut over tensor-parallel ranks."""
    whole: int = 0
    """Of norms, routers and MLA's down projections, which every tensor-parallel rank has whole."""
    small: int = 0
    """Those of `split` and `whole` that stay in 16 bits when weights are quantised: norms, routers, biases."""

    @property
    def count(self) -> int:
        return self.split + self.whole

    def __add__(self, other: Part) -> Part:
        return Part(self.split + other.split, self.whole + other.whole, self.small + other.small)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model. Lengths are in elements."""

    family: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dense_ffn: int
    tied: bool
    attention_bias: bool
    positions: int
    moe_layers: tuple[int, ...] = ()
    """Numbers of the layers with experts."""
    experts: int = 0
    expert_ffn: int = 0
    experts_per_token: int = 0
    shared_ffn: int = 0
    """Of the shared experts together; 0 without."""
    expert_bias: bool = False
    q_lora: int | None = None
    kv_lora: int | None = None
    """Rank of MLA's latent; `None` for grouped-query attention."""
    rope_dim: int = 0
    nope_dim: int = 0
    v_dim: int = 0
    mtp_layers: int = 0
    """Multi-token prediction layers that the checkpoint has beyond `layers`."""

    @property
    def mla(self) -> bool:
        return self.kv_lora is not None

    # -- parameters -----------------------------------------------------------------------------------------------------------

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        return 0 if self.tied else self.vocabulary * self.hidden

    @cached_property
    def attention(self) -> Part:
        """Of one layer, with its norms."""
        h, norms = self.hidden, 2 * self.hidden
        if self.kv_lora is not None:
            query = self.heads * (self.nope_dim + self.rope_dim)
            split = self.kv_lora * self.heads * (self.nope_dim + self.v_dim) + self.heads * self.v_dim * h
            whole = h * (self.kv_lora + self.rope_dim)
            small = self.kv_lora + norms
            biases = self.kv_lora + self.rope_dim + h
            if self.q_lora is None:
                split += h * query
            else:
                split += self.q_lora * query
                whole += h * self.q_lora
                small += self.q_lora
                biases += self.q_lora
            small += biases if self.attention_bias else 0
            return Part(split, whole + small, small)
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        split = h * (query + 2 * keys) + query * h
        small = 2 * self.head_dim + norms
        cut = query + 2 * keys if self.attention_bias else 0
        return Part(split + cut, small + (h if self.attention_bias else 0), small + cut + (h if self.attention_bias else 0))

    @property
    def dense_mlp(self) -> Part:
        return Part(3 * self.hidden * self.dense_ffn)

    @property
    def expert_tensors(self) -> int:
        """Weights of routed experts that a checkpoint has: three an expert (gate, up, down)."""
        return 3 * self.experts * len(self.moe_layers)

    @property
    def routed(self) -> int:
        """Parameters of all routed experts of one layer."""
        return self.experts * 3 * self.hidden * self.expert_ffn

    @property
    def beside_experts(self) -> Part:
        """Of a layer with experts: router, its bias (no parameter, but in the checkpoint) and shared experts."""
        router = self.experts * self.hidden
        return Part(3 * self.hidden * self.shared_ffn, router, router)

    def layer(self, number: int) -> tuple[Part, int]:
        """Parameters of one layer: all but the routed experts, and those."""
        if number in self._moe:
            return self.attention + self.beside_experts, self.routed
        return self.attention + self.dense_mlp, 0

    def routes(self, number: int) -> bool:
        """Whether a layer has experts."""
        return number in self._moe

    @cached_property
    def _moe(self) -> frozenset[int]:
        return frozenset(self.moe_layers)

    @cached_property
    def parameters(self) -> int:
        """As transformers counts them: without expert biases and MTP layers."""
        layers = sum(part.count + routed for part, routed in map(self.layer, range(self.layers)))
        return self.embedding + self.head + self.hidden + layers

    @property
    def expert_biases(self) -> int:
        return len(self.moe_layers) * self.experts if self.expert_bias else 0

    @cached_property
    def active(self) -> int:
        """Parameters that one token goes through: of the routed experts those that it is routed to. Embedding and head are
        counted whole, as in Qwen's «A3B» and DeepSeek's «37B»."""
        idle = self.experts - self.experts_per_token
        return self.parameters - len(self.moe_layers) * idle * 3 * self.hidden * self.expert_ffn

    @property
    def mtp_parameters(self) -> int:
        """Of the MTP layers, whose embedding and head are the model's: a layer, its projection [2h, h] and three norms."""
        if not self.mtp_layers:
            return 0
        part, routed = self.layer(self.layers - 1)
        return self.mtp_layers * (part.count + routed + 2 * self.hidden * self.hidden + 3 * self.hidden)

    # -- bytes ----------------------------------------------------------------------------------------------------------------

    def weight_bytes(self, dtype: str) -> int:
        """Of the checkpoint as the engine is given it, expert biases (fp32) with it."""
        small = self.embedding + self.head + self.hidden
        small += sum(self.layer(number)[0].small for number in range(self.layers))
        return quantised(self.parameters - small, dtype) + 2 * small + 4 * self.expert_biases

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        """On all tensor-parallel ranks together, if none is a copy: 2 x kv heads x head dim a layer, or MLA's latent and its
        rotary part."""
        width = self.kv_lora + self.rope_dim if self.kv_lora is not None else 2 * self.kv_heads * self.head_dim
        return self.layers * width * (1 if dtype == "fp8" else 2)


def quantised(count: int, dtype: str) -> int:
    """Bytes of `count` weights of matrices."""
    return count + -(-count // FP8_BLOCK**2) * 4 if dtype == "fp8" else count * 2


def read_shape(source: str | Path | Mapping[str, Any]) -> ModelShape:
    """From a `config.json`, a folder with one, or its content. `ConfigError` for what is missing, or not of a known family."""
    where, data = "model", source
    if not isinstance(source, Mapping):
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        where = str(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; the model is a config.json of Hugging Face, or a folder with one")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping at the top")
    family = data.get("model_type")
    if family == "deepseek_v32":
        raise ConfigError(
            f"{where}: model_type 'deepseek_v32' has an indexer beside its attention, which the plan does not count"
        )
    if family not in FAMILIES:
        raise ConfigError(f"{where}: key 'model_type' is {family!r}; {nearest(str(family), FAMILIES)}")
    return _deepseek(data, where) if family == "deepseek_v3" else _qwen(data, where, family)


def _size(data: Mapping[str, Any], key: str, where: str, default: int | None = None, least: int = 1) -> int:
    value = data.get(key, default)
    if value is None:
        raise ConfigError(f"{where}: key '{key}' is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where}: key '{key}' is {value!r}; it must be a whole number of at least {least}")
    return value


def _common(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads = _size(data, "num_attention_heads", where)
    return {
        "vocabulary": _size(data, "vocab_size", where),
        "hidden": _size(data, "hidden_size", where),
        "layers": _size(data, "num_hidden_layers", where),
        "heads": heads,
        "kv_heads": _size(data, "num_key_value_heads", where, heads),
        "dense_ffn": _size(data, "intermediate_size", where),
        "tied": bool(data.get("tie_word_embeddings", False)),
        "attention_bias": bool(data.get("attention_bias", False)),
        "positions": _size(data, "max_position_embeddings", where, 4096),
    }


def _qwen(data: Mapping[str, Any], where: str, family: str) -> ModelShape:
    common = _common(data, where)
    head_dim = _size(data, "head_dim", where, common["hidden"] // common["heads"])
    if family == "qwen3":
        return ModelShape(family, head_dim=head_dim, **common)
    step = _size(data, "decoder_sparse_step", where, 1)
    # transformers 5 writes the second name, and Qwen's own files have the first.
    experts = _size(data, "num_local_experts" if "num_local_experts" in data else "num_experts", where, least=0)
    dense = set(data.get("mlp_only_layers") or ())
    moe = tuple(i for i in range(common["layers"]) if experts and i not in dense and (i + 1) % step == 0)
    return ModelShape(
        family,
        head_dim=head_dim,
        moe_layers=moe,
        experts=experts,
        expert_ffn=_size(data, "moe_intermediate_size", where),
        experts_per_token=_size(data, "num_experts_per_tok", where),
        **common,
    )


def _deepseek(data: Mapping[str, Any], where: str) -> ModelShape:
    common = _common(data, where)
    first, freq = _size(data, "first_k_dense_replace", where, least=0), _size(data, "moe_layer_freq", where, 1)
    moe = tuple(i for i in range(common["layers"]) if i >= first and i % freq == 0)
    q_lora = data.get("q_lora_rank")
    expert_ffn = _size(data, "moe_intermediate_size", where)
    return ModelShape(
        "deepseek_v3",
        head_dim=_size(data, "v_head_dim", where),
        moe_layers=moe,
        experts=_size(data, "n_routed_experts", where),
        expert_ffn=expert_ffn,
        experts_per_token=_size(data, "num_experts_per_tok", where),
        shared_ffn=expert_ffn * _size(data, "n_shared_experts", where, 0, least=0),
        expert_bias=True,
        q_lora=None if q_lora is None else _size(data, "q_lora_rank", where),
        kv_lora=_size(data, "kv_lora_rank", where),
        rope_dim=_size(data, "qk_rope_head_dim", where),
        nope_dim=_size(data, "qk_nope_head_dim", where),
        v_dim=_size(data, "v_head_dim", where),
        mtp_layers=_size(data, "num_nextn_predict_layers", where, 0, least=0),
        **common,
    )
