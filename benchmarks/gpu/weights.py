"""New weights for a serving engine: a hot update against restarting it, and against copying the bytes.

`python -m benchmarks.gpu.weights [--requests N]`, three to four minutes on an H200, most of it SGLang starting twice.

A checkpoint of Qwen3-8B's shape with random weights is served; other weights, in GPU memory as a trainer on the same host
has them, replace it: with an idle engine, and while requests decode, in each of `update_mode`'s ways. The scores afterwards
say whether the engine is the other model. Exits with 3 where SGLang or a GPU is missing. `--engine local` runs the same on
a CPU with a tiny model, which proves the code and no speed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from agentloop.engines.base import Engine, Sampling
from agentloop.generate import generate
from agentloop.trajectory import MIXED, version_runs
from benchmarks.gpu.engine_support import Result, arguments, command, refused
from benchmarks.gpu.models import QWEN3_8B, TINY, write_model
from benchmarks.gpu.throughput import SETTINGS
from benchmarks.report import Aim

Tensors = dict[str, Any]
MODES = ("abort", "retract", "in_place")
IDLE_UPDATES = 3
TOKENS = {"sglang": 768, "local": 400}
"""Of each request that decodes while the weights change."""
WAIT_S = {"sglang": 2.0, "local": 0.1}
"""From sending the requests to the update: all of them decode by then."""
COPY_BYTES = {"sglang": 4 << 30, "local": 64 << 20}


def random_tensors(folder: Path, device: str, seed: int) -> Tensors:
    """A tensor for every weight of the folder's model, under its name in a checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator(device).manual_seed(seed)

    def filled(name: str, like: Any) -> Any:
        tensor = torch.empty(like.shape, dtype=config.dtype, device=device)
        return tensor.fill_(1.0) if "norm" in name else tensor.normal_(0.0, 0.02, generator=generator)

    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: filled(name, like) for name, like in model.state_dict().items() if name not in tied}


def write_checkpoint(folder: Path, tensors: Tensors) -> float:
    """Seconds that it took."""
    from safetensors.torch import save_file

    began = perf_counter()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return perf_counter() - began


def start(kind: str, folder: Path, mode: str = "abort") -> Engine:
    if kind == "local":
        from agentloop.engines.local import LocalEngine

        return LocalEngine.load(str(folder), stop_token_ids=(), max_len=2048, threads=1)
    from agentloop.engines.sglang import SGLangEngine

    # Retracted requests are computed again with the logits of every token: 4.6 GiB in one piece at this vocabulary.
    os.environ.setdefault("SGLANG_ENABLE_LOGITS_PROCESSER_CHUNK", "1")
    settings = {**SETTINGS, "load_format": "auto", "mem_fraction_static": 0.55}
    return SGLangEngine.load(str(folder), settings=settings, ignore_eos=True, update_mode=mode)


def copy_bandwidth(kind: str, device: str) -> float:
    """Bytes a second that are read and written again within the device's memory; the best of five."""
    import torch

    count = COPY_BYTES[kind] // 2
    source = torch.zeros(count, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        began = perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, source.nbytes / (perf_counter() - began))
    return best


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def furthest(some: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


class Bench(Result):
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.kind: str = args.engine
        self.device = "cuda" if self.kind == "sglang" else "cpu"
        model = "Qwen3-8B's shape, random weights, bfloat16" if self.kind == "sglang" else "tiny, random weights"
        super().__init__(args.name, aims, args.results, command=command("weights"), engine=self.kind, model=model)

    def run(self) -> None:
        write_model(self.folder, QWEN3_8B if self.kind == "sglang" else TINY)
        first, second = (random_tensors(self.folder, self.device, seed) for seed in (0, 1))
        moved = sum(tensor.nbytes for tensor in first.values())
        written = write_checkpoint(self.folder, first)
        self.note(bytes=moved, write_checkpoint_s=round(written, 2))
        bandwidth = copy_bandwidth(self.kind, self.device)
        self.note(copy_gb_per_s=round(bandwidth / 1e9, 1), copy_s=round(moved / bandwidth, 5))
        began = perf_counter()
        engine = start(self.kind, self.folder)
        self.note(first_start_s=round(perf_counter() - began, 2))
        asyncio.run(self.updates(engine, first, second))

    async def updates(self, engine: Any, first: Tensors, second: Tensors) -> None:
        ids = prompt(64, 5)
        try:
            await engine.generate(ids, Sampling(16), trajectory_id="warm")
            of_first = await engine.score(ids)
            took = []
            for version in range(1, IDLE_UPDATES + 1):
                began = perf_counter()
                await engine.update_weights(iter((second if version % 2 else first).items()), version)
                took.append(perf_counter() - began)
            of_second = await engine.score(ids)
            await engine.update_weights(iter(first.items()), IDLE_UPDATES + 1)
            self.note(
                hot_update_s=[round(seconds, 4) for seconds in took],
                hot_update_over_copy=round(statistics.median(took) / self.figures["copy_s"], 1),
                scores_moved=round(furthest(of_first, of_second), 4),
                scores_back=round(furthest(of_first, await engine.score(ids)), 6),
            )
            await self.in_flight(engine, first, second)
        finally:
            began = perf_counter()
            await engine.close()
        write_checkpoint(self.folder, second)
        engine = (
            await asyncio.to_thread(start, self.kind, self.folder) if self.kind == "local" else start(self.kind, self.folder)
        )
        restart = perf_counter() - began
        try:
            self.note(
                restart_s=round(restart, 2),
                restart_over_hot_update=round(restart / statistics.median(self.figures["hot_update_s"]), 1),
                scores_after_restart=round(furthest(of_second, await engine.score(ids)), 6),
            )
        finally:
            await engine.close()

    async def in_flight(self, engine: Any, first: Tensors, second: Tensors) -> None:
        """Requests that decode while the weights change, in each way; they go on to their end as the loop has them."""
        count, tokens = self.args.requests, TOKENS[self.kind]

        async def all_of_them(name: str) -> list[Any]:
            asked = (generate(engine, prompt(32, i), Sampling(tokens, seed=i), f"{name}-{i}") for i in range(count))
            return list(await asyncio.gather(*asked))

        began = perf_counter()
        await all_of_them("undisturbed")
        told: dict[str, Any] = {"requests": count, "tokens_each": tokens, "undisturbed_s": round(perf_counter() - began, 3)}
        usual, version = getattr(engine, "config", None), 100
        for mode in modes(self.kind):
            if usual is not None:
                engine.config = usual.model_copy(update={"update_mode": mode})
            began = perf_counter()
            asked = asyncio.create_task(all_of_them(mode))
            await asyncio.sleep(WAIT_S[self.kind])
            at = perf_counter()
            await engine.update_weights(iter(second.items()), version)
            updated = perf_counter()
            answers = await asked
            told[mode] = {
                "update_s": round(updated - at, 4),
                "all_answered_s": round(perf_counter() - began, 3),
                "tokens_short": sum(tokens - len(answer.ids) for answer in answers),
                **versions(answers, version),
            }
            await engine.update_weights(iter(first.items()), version + 1)
            version += 2
        if usual is not None:
            engine.config = usual
        self.note(in_flight=told)


def modes(kind: str) -> Iterator[str]:
    yield from MODES if kind == "sglang" else ("abort",)


def versions(answers: Sequence[Any], version: int) -> dict[str, Any]:
    """How the tokens of requests that lived through an update are labelled."""
    runs = [a.version_runs or version_runs(a.min_weight_version, a.weight_version, len(a.ids)) for a in answers]
    named = [[told for told, _ in run] for run in runs]
    return {
        "of_both_versions_exactly": sum(len(told) > 1 and MIXED not in told for told in named),
        "marked_as_mixed": sum(MIXED in told for told in named),
        "labelled_with_the_new_version_alone": sum(told == [version] for told in named),
    }


def aims(figures: Mapping[str, Any]) -> list[Aim]:
    found = []
    if "restart_over_hot_update" in figures:
        times = figures["restart_over_hot_update"]
        found.append(Aim("restart over hot update, times", times, "above 1", times > 1))
    if "scores_back" in figures:
        moved, back = figures["scores_moved"], figures["scores_back"]
        found.append(
            Aim(
                "scores after an update and back, over how far they moved",
                round(back / moved, 6),
                "at most 0.02",
                back <= 0.02 * moved,
            )
        )
    for mode in MODES:
        told = figures.get("in_flight", {}).get(mode)
        if told:
            wrong = told["labelled_with_the_new_version_alone"] + told["tokens_short"]
            found.append(
                Aim(
                    f"{mode}: answers that span the update and are labelled with its version, and tokens lost",
                    wrong,
                    "0",
                    wrong == 0,
                )
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Weight updates of a serving engine.")
    parser.add_argument("--requests", type=int, default=64, help="that decode while the weights change")
    args = arguments(parser, "weights", argv)
    if refused(args):
        return 3
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        bench = Bench(args, Path(folder))
        bench.run()
    bench.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
