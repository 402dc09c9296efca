"""Make the quickstart's starting model from nothing: `python -m examples.quickstart.pretrain`.

Three parts, on a CPU: a tokenizer from the task's own text; a small Qwen3 that learns the whole skill from right transcripts;
a short second training on transcripts with bad habits (`demonstrations.HABITS`), which spoils it. What is written is the
spoiled model: it knows how, and mostly does it wrong. Reinforcement learning then has to find that out from the rewards.

A step of the first training takes about 0.6 s on two idle cores and 0.1 s on a GPU. Floating-point sums depend on the machine,
so a model that is made again is not the same bit by bit; the tokenizer is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from agentloop.chat import Renderer, load_renderer
from examples.quickstart.calculator_tool import REFUSAL, SCHEMA
from examples.quickstart.conversation import SYSTEM, TAGS, Transcript, encode, save_tokenizer, train_tokenizer
from examples.quickstart.demonstrations import broken_call, solve, spoiled
from examples.quickstart.evaluate import MODEL, Report, evaluate, show
from examples.quickstart.make_data import held_out
from examples.quickstart.task import Problem, distinct, problems

SEED, SPOIL_SEED = 2, 0
STEPS, BATCH = 1500, 64
SPOIL_STEPS, SPOIL_BATCH = 300, 32
SKILL = 0.97
"""Accuracy that the skilled model must have: what is not learnt here, reinforcement learning will not find."""
SPOILED = (0.4, 0.58)
"""Range of accuracy that the spoiled model must be in."""
BAD_SHARE = 0.66
"""Of the transcripts that a habit applies to. More than half, so that the most likely answer is the bad one; not nearly all,
so that of eight tries one is good."""
SHALLOW_SHARE = 0.3
"""Of the problems with one or two calls that are kept: deeper ones take longer to learn."""
POOL = 16
"""Batches that are drawn together and sorted by length, so that a batch holds little padding."""

P = TypeVar("P")
"""A problem of one task or another."""
Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, both [batch, length]; labels are -100 wherever nothing is trained."""


def corpus(seed: int, count: int = 4000) -> Iterator[str]:
    """What the tokenizer learns from: the opening of a conversation, questions, calls and what is answered to them. No
    control tokens: they never take part in merges."""
    yield "\n".join(["system", SYSTEM, "", "# Tools", json.dumps(SCHEMA), "user", "assistant", ""] * 4)
    for problem in itertools.islice(problems(seed, "train"), count):
        parts = [problem.question, REFUSAL]
        for exchange in (*solve(problem), *broken_call(problem)):
            parts += [exchange.written, exchange.answer or ""]
        yield "\n".join(re.sub("|".join(TAGS), "", part) for part in parts)


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


def deeper(source: Iterator[Problem], seed: int) -> Iterator[Problem]:
    """Without some of the shallow problems."""
    draw = random.Random(seed)
    return (problem for problem in source if problem.depth > 2 or draw.random() < SHALLOW_SHARE)


def batches(
    tokenizer: PreTrainedTokenizerFast,
    source: Iterator[P],
    demonstrate: Callable[[P], Transcript],
    *,
    size: int,
    seed: int,
    spell: Callable[[PreTrainedTokenizerFast, Renderer, P, Transcript], tuple[list[int], list[int]]],
) -> Iterator[Batch]:
    """Endless batches of demonstrations of the problems in `source`; `spell` makes ids and labels of one."""
    renderer = load_renderer(tokenizer)
    shuffle = random.Random(seed)
    while True:
        pool = [spell(tokenizer, renderer, problem, demonstrate(problem)) for problem in itertools.islice(source, size * POOL)]
        pool.sort(key=lambda row: len(row[0]))
        chunks = [pool[start : start + size] for start in range(0, len(pool), size)]
        shuffle.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in chunk])
            labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in chunk])
            yield ids, labels


def train(
    model: Qwen3ForCausalLM,
    source: Iterator[Batch],
    *,
    steps: int,
    muon_lr: float,
    adam_lr: float,
) -> None:
    """`steps` steps of Muon for the matrices and AdamW for the rest, with a short warm-up and a linear decay over the last
    half."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=adam_lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started, total = time.monotonic(), 0.0
    for step, batch in enumerate(itertools.islice(source, steps), 1):
        ids, labels = (part.to(model.device) for part in batch)
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


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.cpu()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def learn(folder: Path, *, steps: int, seed: int, device: str) -> Report:
    """Train tokenizer and model on right transcripts into `folder`; how good it is at held-out problems."""
    tokenizer = train_tokenizer(corpus(seed))
    torch.manual_seed(seed)
    model = build_model(tokenizer).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    source = deeper(problems(f"skill/{seed}", "train"), seed)
    train(
        model, batches(tokenizer, source, solve, size=BATCH, seed=seed, spell=encode), steps=steps, muon_lr=0.02, adam_lr=3e-3
    )
    save(model, tokenizer, folder)
    return evaluate(folder, choice())


def spoil(folder: Path, target: Path, *, steps: int, seed: int, device: str) -> Report:
    """Train the model in `folder` on transcripts with bad habits into `target`; how good it is now."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="sdpa").to(device)
    draw = random.Random(seed)

    def demonstrate(problem: Problem) -> Transcript:
        return spoiled(problem, draw, BAD_SHARE)

    source = batches(tokenizer, problems(f"spoil/{seed}", "train"), demonstrate, size=SPOIL_BATCH, seed=seed, spell=encode)
    train(model, source, steps=steps, muon_lr=0.004, adam_lr=1e-3)
    save(model, tokenizer, target)
    return evaluate(target, choice())


def choice(count: int = 256) -> list[Problem]:
    """Held-out problems to judge a model by while it is made: not the ones that the quickstart reports on."""
    reported = {problem.question for problem in held_out()}
    return [problem for problem in distinct(2 * count, problems("choice", "held_out")) if problem.question not in reported][
        :count
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's starting model from nothing.")
    parser.add_argument("folder", type=Path, nargs="?", default=MODEL, help="where the spoiled model goes")
    parser.add_argument("--skilled", type=Path, default=Path("runs/pretrain/skilled"), help="where the one before goes")
    parser.add_argument("--spoil-only", action="store_true", help="start from the skilled model that is there already")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--spoil-steps", type=int, default=SPOIL_STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--spoil-seed", type=int, default=SPOIL_SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.spoil_only:
        skilled = learn(args.skilled, steps=args.steps, seed=args.seed, device=args.device)
        show(skilled, "skilled")
        if skilled.accuracy < SKILL:
            raise SystemExit(f"the skill is only {skilled.accuracy:.3f}, it must be {SKILL}: train for more --steps")
    weak = spoil(args.skilled, args.folder, steps=args.spoil_steps, seed=args.spoil_seed, device=args.device)
    show(weak, "spoiled")
    low, high = SPOILED
    if not low <= weak.accuracy <= high:
        raise SystemExit(f"the spoiled model's accuracy is {weak.accuracy:.3f}, not {low} to {high}: change --spoil-steps")


if __name__ == "__main__":
    main()
