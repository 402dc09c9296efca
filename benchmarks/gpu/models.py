"""Models with random weights for measurements of speed: an architecture's shape, and a tokenizer that knows every id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu.trace import word

TOKENIZER = Path(__file__).parent.parent.parent / "examples" / "quickstart" / "model"
QWEN3_8B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""Qwen/Qwen3-8B's config.json."""
TINY: dict[str, Any] = {
    "vocab_size": 21_000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
"""For a CPU, to see that all of it runs."""


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A folder with `config.json` and a tokenizer, and no weights: for `load_format=dummy`, or to be initialised at random.

    The tokenizer is the quickstart's, with a word for every id that it lacks, so that whatever is sampled has a text."""
    from transformers import Qwen3Config

    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {added["content"]: added["id"] for added in tokenizer["added_tokens"]}  # else there are holes
    first = len(vocabulary)
    vocabulary |= {f"Ġ{word(number)}": first + number for number in range(shape["vocab_size"] - first)}
    tokenizer["model"]["ignore_merges"] = True  # a whole word of the vocabulary is one token
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    end = next(added["id"] for added in tokenizer["added_tokens"] if added["content"] == "<|im_end|>")
    Qwen3Config(architectures=["Qwen3ForCausalLM"], eos_token_id=end, **shape).save_pretrained(folder)


def random_model(folder: Path) -> Any:
    """A transformers model of the folder's shape with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa").eval()
