"""The local engine beside plain `model.generate`: tokens a second, time to the first token, and what kept keys and values
save over 8 turns.

    python -m benchmarks.local_engine [--model FOLDER] [--threads N]

Without `--model`, a model of the quickstart's shape (Qwen3, 0.85 M parameters) with random weights. No stop tokens, so
every generation has its full length. Each figure is the best of three runs, which shared machines disturb least.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import torch

from agentloop.engines.base import Sampling
from agentloop.engines.local import LocalEngine
from benchmarks.report import Aim, report

NEW_TOKENS = 64
TURNS = 8
TURN_TOKENS = 12
OBSERVATION_TOKENS = 10


def quickstart_model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=600,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def load(path: str | None) -> Any:
    """A fresh copy of the model: the engine changes the attention of the one it is given."""
    if path is None:
        model = quickstart_model()
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    return model


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(50, 200))] for _ in range(count)]


def plain(model: Any, batch: list[list[int]], new_tokens: int) -> list[list[int]]:
    """`model.generate`, padded on the left as its documentation says."""
    width = max(map(len, batch))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True, top_k=0, pad_token_id=0)
    rows: list[list[int]] = out[:, width:].tolist()
    return rows


async def together(engine: LocalEngine, batch: list[list[int]], new_tokens: int) -> None:
    sampling = Sampling(new_tokens)
    await asyncio.gather(*(engine.generate(ids, sampling, trajectory_id=f"{i}") for i, ids in enumerate(batch)))
    for i in range(len(batch)):
        await engine.release(f"{i}")


async def conversation(engine: LocalEngine, name: str, ids: list[int], turns: int, *, reuse: bool) -> None:
    for turn in range(turns):
        generation = await engine.generate(ids, Sampling(TURN_TOKENS, seed=turn), trajectory_id=name)
        ids = ids + generation.ids + ids[:OBSERVATION_TOKENS]
        if not reuse:
            await engine.release(name)
    await engine.release(name)


def plain_conversations(model: Any, batch: list[list[int]], turns: int) -> None:
    """All conversations in step; every turn begins from nothing, since `generate` keeps nothing."""
    for _ in range(turns):
        answers = plain(model, batch, TURN_TOKENS)
        batch = [ids + answer + ids[:OBSERVATION_TOKENS] for ids, answer in zip(batch, answers, strict=True)]


async def best(*runs: Callable[[], Awaitable[None]], repeats: int = 3) -> list[float]:
    """Seconds of the quickest round of each, after one to warm up; they take turns, so that a busy spell hits all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, seconds in zip(runs, times, strict=True):
            began = time.perf_counter()
            await run()
            seconds.append(time.perf_counter() - began)
    return [min(seconds[1:]) for seconds in times]


async def measure(path: str | None, threads: int) -> tuple[dict[str, Any], list[Aim]]:
    engine = LocalEngine(load(path), threads=threads, stop_token_ids=())
    model = load(path)
    vocabulary = model.get_input_embeddings().num_embeddings
    figures: dict[str, Any] = {
        "threads": threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt_tokens": "50-200",
        "new_tokens": NEW_TOKENS,
        "turns": TURNS,
        "turn_tokens": TURN_TOKENS,
    }
    aims = []
    for count in (1, 16):
        batch = prompts(count, vocabulary)
        tokens = count * NEW_TOKENS

        async def ours_once(new_tokens: int, batch: list[list[int]] = batch) -> None:
            await together(engine, batch, new_tokens)

        async def theirs_once(new_tokens: int, batch: list[list[int]] = batch) -> None:
            plain(model, batch, new_tokens)

        ours, theirs = (
            tokens / seconds for seconds in await best(partial(ours_once, NEW_TOKENS), partial(theirs_once, NEW_TOKENS))
        )
        first, their_first = await best(partial(ours_once, 1), partial(theirs_once, 1), repeats=5)
        figures[f"at_{count}"] = {
            "tokens_per_s": round(ours),
            "generate_tokens_per_s": round(theirs),
            "first_token_ms": round(first * 1e3, 1),
            "generate_first_token_ms": round(their_first * 1e3, 1),
        }
        aims.append(Aim(f"tokens/s beside generate, {count} at a time", round(ours / theirs, 2), "at least 1", ours >= theirs))
        print(f"{count} at a time: {figures[f'at_{count}']}", flush=True)

    batch = prompts(16, vocabulary)
    tokens = len(batch) * TURNS * TURN_TOKENS

    async def multi_turn(conversations: list[list[int]], turns: int, reuse: bool) -> None:
        await asyncio.gather(*(conversation(engine, str(i), ids, turns, reuse=reuse) for i, ids in enumerate(conversations)))

    async def plain_turns() -> None:
        plain_conversations(model, batch, TURNS)

    kept, dropped, generate = await best(
        partial(multi_turn, batch, TURNS, True), partial(multi_turn, batch, TURNS, False), plain_turns
    )
    figures["8_turns_at_16"] = {
        "kept_tokens_per_s": round(tokens / kept),
        "dropped_tokens_per_s": round(tokens / dropped),
        "generate_tokens_per_s": round(tokens / generate),
    }
    aims.append(Aim("speed-up by kept keys and values, 8 turns", round(dropped / kept, 2), "above 1", kept < dropped))
    print(f"8 turns, 16 at a time: {figures['8_turns_at_16']}", flush=True)

    many = prompts(64, vocabulary)
    (seconds,) = await best(partial(multi_turn, many, 6, True))
    rate = len(many) * 6 * TURN_TOKENS / seconds
    figures["6_turns_at_64"] = {"tokens_per_s": round(rate)}
    aims.append(Aim("sampled tokens/s, 64 conversations of 6 turns", round(rate), "at least 3000", rate >= 3000))
    print(f"6 turns, 64 at a time: {figures['6_turns_at_64']}", flush=True)
    await engine.close()
    return figures, aims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a transformers model; default: random weights of the quickstart's shape")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    figures, aims = asyncio.run(measure(arguments.model, arguments.threads))
    report("local_engine", figures=figures, aims=aims)


if __name__ == "__main__":
    main()
