"""What SGLang in this process really does with the quickstart's model: `python -m benchmarks.gpu.engine_conformance`.

About two minutes on an H200, most of it starting SGLang and its first kernels. `tests/conformance` says whether the engine
keeps its promises; this says by how much: how far the log-probabilities of decoding, of `score` and of transformers are apart,
how much of eight turns the prefix cache serves, how long an abort, updates of the weights, and sleep and wake take.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Awaitable
from time import perf_counter
from typing import Any, TypeVar

from agentloop.engines.base import Sampling
from agentloop.trajectory import StopReason
from benchmarks.gpu.engine_support import MODEL, SETTINGS, or_exit, summary
from benchmarks.report import Aim, report

T = TypeVar("T")
REQUESTS, NEW_TOKENS, TURNS = 64, 64, 8
DEVICE = "cuda"
"""Of the models in transformers."""


async def timed(call: Awaitable[T]) -> tuple[T, float]:
    """The result and the milliseconds that it took."""
    began = perf_counter()
    result = await call
    return result, round(1000 * (perf_counter() - began), 2)


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def plain(model: Any, ids: list[int], start: int) -> list[float]:
    """What transformers says of `ids[start:]` in one forward without a cache."""
    import torch

    with torch.inference_mode():
        tokens = torch.tensor([ids], device=model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, start - 1 : -1].float()
        return [float(x) for x in torch.log_softmax(logits, dim=-1).gather(1, tokens[0, start:, None])[:, 0]]


def apart(some: list[float], others: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(some, others, strict=True)]


async def log_probs(engine: Any, models: dict[str, Any]) -> dict[str, Any]:
    """Decode log-probabilities against `score` and against transformers, on the same tokens, at temperature 1."""
    prompts = [prompt(8 + i, i) for i in range(REQUESTS)]
    answers = await asyncio.gather(
        *(engine.generate(ids, Sampling(NEW_TOKENS), trajectory_id=f"lp{i}") for i, ids in enumerate(prompts))
    )
    differences: dict[str, list[float]] = {"score": [], **{name: [] for name in models}}
    scored: dict[str, list[float]] = {name: [] for name in models}
    for ids, answer in zip(prompts, answers, strict=True):
        whole, start = ids + answer.ids, len(ids)
        score = (await engine.score(whole))[start - 1 :]
        differences["score"] += apart(answer.log_probs, score)
        for name, model in models.items():
            reference = plain(model, whole, start)
            differences[name] += apart(answer.log_probs, reference)
            scored[name] += apart(score, reference)
    return {
        **{f"decode_against_{name}": summary(values) for name, values in differences.items()},
        **{f"score_against_{name}": summary(values) for name, values in scored.items()},
    }


async def prefix_cache(engine: Any) -> dict[str, Any]:
    """Cached tokens of turns 2 to 8 over all that the turn before left computed (all but its last token)."""
    cached = ideal = 0

    async def conversation(i: int) -> None:
        nonlocal cached, ideal
        ids, before = prompt(64, 1000 + i), 0
        for turn in range(TURNS):
            answer = await engine.generate(ids, Sampling(48), trajectory_id=f"turns{i}")
            if turn:
                cached += answer.cached_tokens
                ideal += before - 1
            before = len(ids) + len(answer.ids)
            ids = ids + answer.ids + prompt(16, 100 * i + turn)

    _, milliseconds = await timed(asyncio.gather(*(conversation(i) for i in range(32))))
    return {"cached_tokens": cached, "ideal_tokens": ideal, "share": round(cached / ideal, 4), "ms": milliseconds}


async def aborts(engine: Any) -> dict[str, Any]:
    """256 long requests, cancelled: until SGLang's scheduler has none left."""
    tasks = [asyncio.create_task(engine.generate(prompt(32, i), Sampling(900), trajectory_id=f"gone{i}")) for i in range(256)]
    running = 0
    for _ in range(100):
        await asyncio.sleep(0.02)
        running = max(running, await engine.running())
        if running >= len(tasks):
            break
    began = perf_counter()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    left = await engine.running() + engine.in_flight
    while left and perf_counter() - began < 20:
        await asyncio.sleep(0.005)
        left = await engine.running() + engine.in_flight
    return {"running_before": running, "left": left, "ms_until_idle": round(1000 * (perf_counter() - began), 2)}


async def updates(engine: Any, trained: Any, other: Any) -> dict[str, Any]:
    """An update with requests in flight, and whether the engine then is the other model; then the first weights again."""
    ids = prompt(64, 5)
    before = await engine.score(ids)
    tasks = [asyncio.create_task(engine.generate(prompt(32, i), Sampling(900), trajectory_id=f"up{i}")) for i in range(32)]
    await asyncio.sleep(0.3)
    _, busy_ms = await timed(engine.update_weights(other.named_parameters(), 1))
    ended = await asyncio.gather(*tasks)
    during = {
        "aborted": sum(answer.stop_reason is StopReason.ABORTED for answer in ended),
        "of": len(ended),
        "tokens_kept": sum(len(answer.ids) for answer in ended),
        "versions": sorted({str(answer.weight_version) for answer in ended}),
    }
    after = await engine.score(ids)
    answer = await engine.generate(ids, Sampling(32), trajectory_id="after")
    _, idle_ms = await timed(engine.update_weights(trained.named_parameters(), 2))
    again = await engine.score(ids)
    return {
        "bytes": sum(parameter.nbytes for parameter in other.parameters()),
        "ms_with_32_requests": busy_ms,
        "ms_idle": idle_ms,
        "requests_in_flight": during,
        "version_after": answer.weight_version,
        "cached_after": answer.cached_tokens,
        "score_moved": summary(apart(before, after)),
        "score_against_the_new_model": summary(apart(after, plain(other, ids, 1))),
        "score_back_again": summary(apart(before, again)),
    }


async def update_modes(engine: Any, trained: Any, other: Any) -> dict[str, Any]:
    """Updates that requests live through: their versions, and whether a new turn of theirs is wholly of the new weights."""
    usual, told = engine.config, {}
    version = 10
    for mode in ("in_place", "retract"):
        engine.config = usual.model_copy(update={"update_mode": mode})
        tasks = [asyncio.create_task(engine.generate(prompt(32, i), Sampling(900), trajectory_id=f"on{i}")) for i in range(32)]
        await asyncio.sleep(0.3)
        _, milliseconds = await timed(engine.update_weights(other.named_parameters(), version))
        ended = await asyncio.gather(*tasks)
        ids = prompt(32, 0) + ended[0].ids[:100]
        answer = await engine.generate(ids, Sampling(64), trajectory_id="on0")
        told[mode] = {
            "ms": milliseconds,
            "complete": sum(len(one.ids) == 900 for one in ended),
            "marked_as_mixed": sum(one.min_weight_version != one.weight_version for one in ended),
            "of": len(ended),
            "next_turn_cached": answer.cached_tokens,
            "next_turn_against_the_new_model": summary(apart(answer.log_probs, plain(other, ids + answer.ids, len(ids)))),
        }
        engine.config = usual
        await engine.update_weights(trained.named_parameters(), version + 1)
        version += 2
    return told


async def memory(engine: Any) -> dict[str, Any]:
    import torch

    def free_gib() -> float:
        return round(float(torch.cuda.mem_get_info()[0]) / 2**30, 2)

    ids = prompt(64, 6)
    before, awake = await engine.score(ids), free_gib()
    _, kv_sleep = await timed(engine.sleep(["kv_cache"]))
    without_kv = free_gib()
    _, weights_sleep = await timed(engine.sleep(["weights"]))
    asleep = free_gib()
    _, weights_wake = await timed(engine.wake(["weights"]))
    _, kv_wake = await timed(engine.wake(["kv_cache"]))
    return {
        "free_gib": {"awake": awake, "without_kv_cache": without_kv, "asleep": asleep, "awake_again": free_gib()},
        "ms": {"kv_sleep": kv_sleep, "weights_sleep": weights_sleep, "weights_wake": weights_wake, "kv_wake": kv_wake},
        "score_afterwards": summary(apart(before, await engine.score(ids))),
    }


async def measure() -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from agentloop.engines.sglang import SGLangEngine

    def reference(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).to(DEVICE).eval()

    began = perf_counter()
    settings = {**SETTINGS, "dtype": "bfloat16", "enable_memory_saver": True, "enable_weights_cpu_backup": True}
    engine = SGLangEngine.load(str(MODEL), settings=settings, ignore_eos=True)
    started = perf_counter() - began
    try:
        trained = reference(torch.bfloat16)
        other = reference(torch.bfloat16)
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(parameter[:, torch.randperm(parameter.shape[1], device=parameter.device)])
        models = {"transformers_bfloat16": trained, "transformers_float32": reference(torch.float32)}
        _, first = await timed(engine.generate(prompt(8, 0), Sampling(8), trajectory_id="first"))
        figures: dict[str, Any] = {"start_s": round(started, 1), "first_request_ms": first}
        figures["log_probs"] = await log_probs(engine, models)
        figures["prefix_cache"] = await prefix_cache(engine)
        figures["abort"] = await aborts(engine)
        figures["weights"] = await updates(engine, trained, other)
        figures["update_modes"] = await update_modes(engine, trained, other)
        figures["memory"] = await memory(engine)
    finally:
        _, closing = await timed(engine.close())
    return {**figures, "close_ms": closing}


def aims(figures: dict[str, Any]) -> list[Aim]:
    decode = figures["log_probs"]["decode_against_score"]["mean"]
    share = figures["prefix_cache"]["share"]
    left, version = figures["abort"]["left"], figures["weights"]["version_after"]
    new = figures["weights"]["score_against_the_new_model"]["mean"]
    lived = sum(min(told["complete"], told["marked_as_mixed"]) for told in figures["update_modes"].values())
    return [
        Aim("decode against score, mean difference", decode, "at most 0.02", decode <= 0.02),
        Aim("prefix cache over 8 turns, share of the ideal", share, "at least 0.99", share >= 0.99),
        Aim("requests left after 256 were cancelled", left, "0", left == 0),
        Aim("weight version after an update", version, "1", version == 1),
        Aim("updates in place and by retraction that every request lived through", lived, "64 of 64", lived == 64),
        Aim("score after an update against the new model, mean difference", new, "at most 0.1", new <= 0.1),
    ]


def main() -> int:
    or_exit()
    figures = asyncio.run(measure())
    report("gpu_engine_conformance", figures, aims(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
