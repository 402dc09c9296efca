"""Make the starting model from nothing: `python -m examples.code_math.pretrain`.

As in the quickstart: a tokenizer from the task's own text; a small Qwen3 that learns the whole skill from right transcripts; a
short second training on transcripts with bad habits (`demonstrations.HABITS`), which spoils it. What is written is the spoiled
model. Floating-point sums depend on the machine, so a model that is made again is not the same bit by bit; the tokenizer is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from examples.code_math.conversation import PIECES, SCHEMA, SYSTEM, encode
from examples.code_math.demonstrations import HABITS, Interpreter, Tell, broken_json, no_end_tag, skilled, solve, spoiled
from examples.code_math.evaluate import CODE_MATH, MODEL
from examples.code_math.make_data import held_out
from examples.code_math.task import Problem, problems
from examples.quickstart.conversation import TAGS, Transcript, train_tokenizer
from examples.quickstart.evaluate import Report, measure, show
from examples.quickstart.pretrain import batches, build_model, save, train
from examples.quickstart.task import distinct

SEED, SPOIL_SEED = 1, 0
STEPS, BATCH = 800, 48
SPOIL_STEPS, SPOIL_BATCH = 220, 32
SLIPS = 0.08
"""Of the right transcripts that begin with a call that fails."""
BAD_SHARE = 0.66
"""Of the transcripts that a habit applies to. More than half, so that the most likely answer is the bad one; not nearly all,
so that of eight tries one is good."""
SKILL = 0.97
"""Accuracy that the skilled model must have: what is not learnt here, reinforcement learning will not find."""
SPOILED = (0.4, 0.6)
"""Range of accuracy that the spoiled model must be in."""


def corpus(seed: int, tell: Tell, count: int = 4000) -> Iterator[str]:
    """What the tokenizer learns from: the opening of a conversation, questions, calls and what is answered to them."""
    yield "\n".join(["system", SYSTEM, "", "# Tools", json.dumps(SCHEMA), "user", "assistant", ""] * 4)
    for index, problem in enumerate(itertools.islice(problems(seed, "train"), count)):
        transcripts = [solve(problem), broken_json(problem, tell), no_end_tag(problem, tell)]
        transcripts += [HABITS[problem.kind](problem, tell)] if index % 10 == 0 else []
        parts = [problem.question]
        for exchange in itertools.chain(*transcripts):
            parts += [exchange.written, exchange.answer or ""]
        yield "\n".join(re.sub("|".join(TAGS), "", part) for part in parts)


def learn(folder: Path, tell: Tell, *, steps: int, seed: int) -> Report:
    """Train tokenizer and model on right transcripts into `folder`; how good it is at held-out problems."""
    tokenizer = train_tokenizer(corpus(seed, tell), PIECES)
    torch.manual_seed(seed)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    draw = random.Random(seed)

    def demonstrate(problem: Problem) -> Transcript:
        return skilled(problem, tell, draw, SLIPS)

    source = batches(tokenizer, problems(f"skill/{seed}", "train"), demonstrate, size=BATCH, seed=seed, spell=encode)
    train(model, source, steps=steps, muon_lr=0.02, adam_lr=3e-3)
    save(model, tokenizer, folder)
    return measure(CODE_MATH, folder, choice())


def spoil(folder: Path, target: Path, tell: Tell, *, steps: int, seed: int) -> Report:
    """Train the model in `folder` on transcripts with bad habits into `target`; how good it is now."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="sdpa")
    draw = random.Random(seed)

    def demonstrate(problem: Problem) -> Transcript:
        return spoiled(problem, tell, draw, BAD_SHARE)

    source = batches(tokenizer, problems(f"spoil/{seed}", "train"), demonstrate, size=SPOIL_BATCH, seed=seed, spell=encode)
    train(model, source, steps=steps, muon_lr=0.004, adam_lr=1e-3)
    save(model, tokenizer, target)
    return measure(CODE_MATH, target, choice())


def choice(count: int = 256) -> list[Problem]:
    """Held-out problems to judge a model by while it is made: none of those that the example reports on."""
    reported = {problem.code for problem in held_out()}
    drawn = distinct(2 * count, problems("choice", "held_out"))
    return [problem for problem in drawn if problem.code not in reported][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the starting model of code_math from nothing.")
    parser.add_argument("folder", type=Path, nargs="?", default=MODEL, help="where the spoiled model goes")
    parser.add_argument("--skilled", type=Path, default=Path("runs/code_math_pretrain"), help="where the one before goes")
    parser.add_argument("--spoil-only", action="store_true", help="start from the skilled model that is there already")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--spoil-steps", type=int, default=SPOIL_STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--spoil-seed", type=int, default=SPOIL_SEED)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with Interpreter() as tell:
        if not args.spoil_only:
            able = learn(args.skilled, tell, steps=args.steps, seed=args.seed)
            show(able, "skilled", CODE_MATH)
            if able.accuracy < SKILL:
                raise SystemExit(f"the skill is only {able.accuracy:.3f}, it must be {SKILL}: train for more --steps")
        weak = spoil(args.skilled, args.folder, tell, steps=args.spoil_steps, seed=args.spoil_seed)
    show(weak, "spoiled", CODE_MATH)
    low, high = SPOILED
    if not low <= weak.accuracy <= high:
        raise SystemExit(f"the spoiled model's accuracy is {weak.accuracy:.3f}, not {low} to {high}: change --spoil-steps")


if __name__ == "__main__":
    main()
