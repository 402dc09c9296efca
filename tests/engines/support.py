"""A Qwen3 small enough to be built in a test, and a tokenizer of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 260
EOS = 257


def tiny_model(seed: int = 0, **settings: Any) -> Any:
    """2 layers, 64 wide, random weights large enough for distributions that are neither flat nor certain."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 96,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.12,
            **settings,
        }
    )
    return Qwen3ForCausalLM(config).eval()


def tiny_tokenizer() -> Any:
    """One token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<start>", "<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@torch.inference_mode()
def plain_log_probs(model: Any, prompt: Sequence[int], sampled: Sequence[int], temperature: float = 1.0) -> list[float]:
    """What one forward over the whole sequence, without any cache, says of the sampled tokens."""
    ids = torch.tensor([[*prompt, *sampled]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
    chosen = torch.tensor(list(sampled))[:, None]
    return torch.log_softmax(logits, dim=-1).gather(1, chosen)[:, 0].tolist()


async def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something holds; a test that waits in vain fails."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - what is waited for happens in another thread
            await asyncio.sleep(0.002)
