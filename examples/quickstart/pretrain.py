"""Make the quickstart's starting model from nothing: `python -m examples.quickstart.pretrain`.

Three parts, on a CPU: a tokenizer from the task's own text; a small Qwen3 that learns the whole skill from right transcripts;
a short second training on transcripts with bad habits (`demonstrations.HABITS`), which spoils it. What is written is the
spoiled model: it knows how, and mostly does it wrong. Reinforcement learning then has to find that out from the rewards.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.quickstart.conversation import encode, prompt_text, save_tokenizer, train_tokenizer
from examples.quickstart.demonstrations import Transcript, solve, spoiled
from examples.quickstart.task import Problem, problems

MODEL = Path(__file__).parent / "model"
BATCH = 64
POOL = 16
"""Batches that are drawn together and sorted by length, so that a batch holds little padding."""

Demonstrate = Callable[[Problem], Transcript]
Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, both [batch, length]; labels are -100 wherever nothing is trained."""


def corpus(seed: int, count: int) -> Iterator[str]:
    """What the tokenizer learns from: plain problems, transcripts, and the opening of a conversation."""
    draw = random.Random(seed)
    for problem in itertools.islice(problems(seed, "train"), count):
        yield "\n".join([problem.question, *(piece.text for piece in spoiled(problem, draw, share=0.5))])


def build_tokenizer(seed: int, count: int = 4000) -> PreTrainedTokenizerFast:
    """Trained twice over: the first one only renders the prompts that the second one learns from."""
    first = train_tokenizer(corpus(seed, 1))
    openings = [prompt_text(first, problem.question) for problem in itertools.islice(problems(seed, "train"), 200)]
    return train_tokenizer([*openings, *corpus(seed, count)])


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Qwen3 with 0.9 M parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, demonstrate: Demonstrate, seed: int) -> Iterator[Batch]:
    """Endless batches of demonstrations of train problems."""
    source = problems(f"pretrain/{seed}", "train")
    shuffle = random.Random(seed)
    while True:
        pool = sorted(
            encode_all(tokenizer, demonstrate, list(itertools.islice(source, BATCH * POOL))), key=lambda row: len(row[0])
        )
        chunks = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        shuffle.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in chunk])
            labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in chunk])
            yield ids, labels


def encode_all(
    tokenizer: PreTrainedTokenizerFast, demonstrate: Demonstrate, chosen: list[Problem]
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of one demonstration per problem. Every piece is encoded by itself, as a rollout would have it."""
    transcripts = [demonstrate(problem) for problem in chosen]
    prompts = encode(tokenizer, [prompt_text(tokenizer, problem.question) for problem in chosen])
    pieces = iter(encode(tokenizer, [piece.text for transcript in transcripts for piece in transcript]))
    rows = []
    for prompt, transcript in zip(prompts, transcripts, strict=True):
        ids, labels = list(prompt), [-100] * len(prompt)
        for piece in transcript:
            written = next(pieces)
            ids += written
            labels += written if piece.trained else [-100] * len(written)
        rows.append((ids, labels))
    return rows


def train(
    model: Qwen3ForCausalLM,
    source: Iterator[Batch],
    *,
    steps: int,
    muon_lr: float,
    adam_lr: float,
    after: Callable[[int], None],
) -> None:
    """`steps` steps with a short warm-up and a linear decay over the last half; `after(step)` runs after each.

    Muon for the matrices and AdamW for the rest: on this model that needs about half the steps of AdamW alone.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=adam_lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started, total = time.monotonic(), 0.0
    for step, (ids, labels) in enumerate(itertools.islice(source, steps), 1):
        scale = min(1.0, step / 20, 0.02 + 2 * (1 - step / steps))
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
        model.train()
        hidden = model.model(ids).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        trained = targets != -100
        loss = F.cross_entropy(model.lm_head(hidden[trained]), targets[trained])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        total += loss.item()
        if step % 25 == 0:
            print(f"step {step:4d}  loss {total / 25:.4f}  {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0
        after(step)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
