"""A small DeepSeek-V3 (latent attention, experts, random weights) on SGLang, beside the trainer's transformers model.

`python -m benchmarks.gpu.deepseek [--part routing,updates] [--sizes 1,8,30] [--budget-s 360] [--gpus 2]`

- routing: decode log-probabilities against transformers on the same tokens, and again with the experts that SGLang recorded
  replayed in transformers' forward.
- updates: new weights for a serving engine, of about 1, 8 and 30 · 10⁹ bytes: from the trainer's tensors on the same GPU, under
  one name for each expert, and from disk, by `Engine.update_weights` and by SGLang itself; where the time goes; beside copying
  the bytes and beside a restart. After each the scores must be those of transformers with the same weights, and for the
  smallest size those of an engine that was restarted with them.
- two (with `--gpus 2`): an update over NCCL from this process to an engine on the other GPU, and an engine on both.

Results are written after every step; a step that fails or for which no time is left is told under `not_run`, with what refused
and why. How decoding compares with scoring on one engine is measured by `python -m benchmarks.gpu.engine_moe deepseek_v3`.
Exits with 3 where SGLang or a GPU is missing. `--engine local` runs it on a CPU with a tiny model, which proves the code.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import os
import statistics
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from agentloop.engines.base import Engine, Sampling
from benchmarks.gpu.deepseek_model import (
    SHAPES,
    TINY,
    Named,
    log_probs,
    per_expert,
    read_checkpoint,
    recorded,
    replayed,
    shift,
    trainer,
    write_checkpoint,
    write_folder,
)
from benchmarks.gpu.engine_support import SETTINGS, Result, arguments, command, failure, refused, summary
from benchmarks.gpu.weights import copy_bandwidth, furthest, prompt
from benchmarks.report import Aim

PARTS = ("routing", "updates", "two")
REQUESTS, NEW_TOKENS = 64, 64
UPDATES = 3
SCORED = 8
"""Sequences of 64 tokens that are scored after an update."""
START_S, DISK_S_PER_GB = 60.0, 2.5
"""What a start takes, and writing a checkpoint and reading it three times: whether there is time left."""


class Split:
    """Where the time of an update goes: making the tensors, handing them over, and SGLang's loading."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.convert_s = self.pieces_s = self.load_s = 0.0
        self.pieces = 0

    def weights(self, weights: Iterable[Named]) -> Iterator[Named]:
        source = iter(weights)
        while True:
            began = perf_counter()
            item = next(source, None)
            self.convert_s += perf_counter() - began
            if item is None:
                return
            yield item

    async def update(self, weights: Iterable[Named], version: int) -> dict[str, Any]:
        """The update's seconds in all, and their parts where the engine is SGLang in this process."""
        manager: Any = getattr(self.engine, "_manager", None)
        whole: Any = getattr(self.engine, "_load_piece", None)
        known = manager is not None and whole is not None
        if known:
            theirs = manager.update_weights_from_tensor

            async def load_piece(piece: Any) -> None:
                began = perf_counter()
                await whole(piece)
                self.pieces_s += perf_counter() - began
                self.pieces += 1

            async def load(request: Any, http: Any) -> Any:
                began = perf_counter()
                try:
                    return await theirs(request, http)
                finally:
                    self.load_s += perf_counter() - began

            self.engine._load_piece, manager.update_weights_from_tensor = load_piece, load
        began = perf_counter()
        try:
            await self.engine.update_weights(self.weights(weights), version)
        finally:
            took = perf_counter() - began
            if known:
                del self.engine._load_piece, manager.update_weights_from_tensor
        told: dict[str, Any] = {"s": round(took, 4), "convert_s": round(self.convert_s, 4)}
        if known:
            told |= {
                "pieces": self.pieces,
                "hand_over_s": round(self.pieces_s - self.load_s, 4),
                "load_s": round(self.load_s, 4),
                "rest_s": round(took - self.convert_s - self.pieces_s, 4),
            }
        return told


def start(kind: str, folder: Path, load_format: str, more: dict[str, Any] | None = None, *, weight_version: int = 0) -> Engine:
    if kind == "local":
        from agentloop.engines.local import LocalEngine

        return LocalEngine.load(str(folder), stop_token_ids=(), threads=1, weight_version=weight_version)
    from agentloop.engines.sglang import SGLangEngine

    settings = {
        **SETTINGS,
        "dtype": "bfloat16",
        "load_format": load_format,
        "mem_fraction_static": 0.6,
        # Few keys and values and few graphs: nothing here needs more, and the trainer is on the same GPU.
        "max_total_tokens": 65_536,
        "cuda_graph_max_bs": 64,
        "enable_return_routed_experts": True,
        "log_level": "warning",
    } | (more or {})
    return SGLangEngine.load(str(folder), settings=settings, ignore_eos=True, weight_version=weight_version)


class Bench(Result):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args.name, aims, args.results, command=command("deepseek"), engine=args.engine)
        self.args = args
        self.kind: str = args.engine
        self.device = "cuda" if self.kind == "sglang" else "cpu"

    def left(self) -> float:
        """Seconds of the budget."""
        return float(self.args.budget_s) - self.seconds

    def size(self, size: str, **figures: Any) -> None:
        self.under("sizes", size, **figures)

    async def attempt(self, step: str, call: Callable[[], Awaitable[None]], needs_s: float = 0.0) -> bool:
        """Whether the step ran to its end. Its failure is told and ends nothing else."""
        if self.left() < needs_s:
            self.refuse(step, f"{max(0.0, self.left()):.0f} s were left of the budget, and it takes about {needs_s:.0f} s")
            return False
        try:
            await asyncio.wait_for(call(), timeout=max(30.0, self.left()))
        except Exception as error:
            traceback.print_exc()
            self.refuse(step, failure(error))
            return False
        return True

    # -- one size -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        sizes = self.args.sizes if {"routing", "updates"}.intersection(self.args.part) else []
        for number, size in enumerate(sizes):
            later = START_S * (len(sizes) - number - 1)
            with tempfile.TemporaryDirectory(prefix="deepseek-") as folder:
                step = lambda size=size, folder=folder, later=later, first=not number: self.one(  # noqa: E731
                    size, Path(folder), later, first
                )
                await self.attempt(f"size {size}", step, needs_s=START_S if number else 0.0)
            self.forget()
        if "two" in self.args.part:
            await self.attempt("two", self.two)

    def forget(self) -> None:
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    async def one(self, size: str, folder: Path, later_s: float, first: bool) -> None:
        shape = SHAPES[size] if self.kind == "sglang" else TINY
        config = shape.config("bfloat16" if self.kind == "sglang" else "float32")
        write_folder(folder, config)
        began = perf_counter()
        model = trainer(config, self.device)
        tensors = list(per_expert(model.state_dict().items()))
        moved = sum(tensor.nbytes for _, tensor in tensors)
        bandwidth = copy_bandwidth(self.kind, self.device)
        self.forget()
        self.size(
            size,
            bytes=moved,
            tensors=len(tensors),
            layers=shape.layers,
            experts=shape.experts,
            expert_width=shape.width,
            hidden=shape.hidden,
            trainer_s=round(perf_counter() - began, 1),
            copy_gb_per_s=round(bandwidth / 1e9, 1),
            copy_s=round(moved / bandwidth, 5),
        )
        del tensors
        disk = self.kind == "local" or first or self.left() > START_S + later_s + DISK_S_PER_GB * moved / 1e9
        if disk:
            began = perf_counter()
            write_checkpoint(folder, per_expert(model.state_dict().items()))
            self.size(size, write_checkpoint_s=round(perf_counter() - began, 1))
        began = perf_counter()
        engine = start(self.kind, folder, "auto" if disk else "dummy")
        self.size(size, **{"start_from_disk_s" if disk else "start_with_dummy_s": round(perf_counter() - began, 1)})
        side = Side(self, size, engine, model, folder)
        try:
            await side.engine.generate(prompt(64, 5), Sampling(8), trajectory_id="warm")
            if first and "routing" in self.args.part:
                await self.attempt("routing", side.routing)
            if "updates" in self.args.part:
                await self.attempt(f"updates of {size} from tensors", side.from_tensors)
                if disk:
                    await self.attempt(f"updates of {size} from disk", side.from_disk)
                else:
                    self.refuse(f"updates of {size} from disk", "not enough of the budget was left for a checkpoint")
                if first:
                    await self.attempt(f"restart of {size}", side.restart, needs_s=30.0)
        finally:
            await side.engine.close()

    async def two(self) -> None:
        import torch

        from benchmarks.gpu.deepseek_two import over_nccl, tensor_parallel

        if self.kind != "sglang" or self.args.gpus < 2 or torch.cuda.device_count() < 2:
            there = torch.cuda.device_count()
            self.refuse("two", f"needs SGLang and two GPUs: --gpus is {self.args.gpus}, and there are {there}")
            return
        # SGLang compares the free memory of its GPUs at the start, and the trainer is on one of them.
        os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
        for name, part, size in (("nccl", over_nccl, "8"), ("tensor_parallel", tensor_parallel, "1")):

            async def step(name: str = name, part: Any = part, size: str = size) -> None:
                with tempfile.TemporaryDirectory(prefix="deepseek-") as folder:
                    self.note(**{name: await part(Path(folder), size)})

            await self.attempt(name, step)
            self.forget()


class Side:
    """One size's engine and trainer, with the same weights, and what is measured on them."""

    def __init__(self, bench: Bench, size: str, engine: Any, model: Any, folder: Path) -> None:
        self.bench, self.size, self.engine, self.model, self.folder = bench, size, engine, model, folder
        self.version = 0
        self.ids = [prompt(64, 100 + number) for number in range(SCORED)]

    def names(self) -> Iterator[Named]:
        """The trainer's weights as the engine takes them: the local engine is a transformers model itself."""
        tensors = self.model.state_dict().items()
        return iter(tensors) if self.bench.kind == "local" else per_expert(tensors)

    async def scores(self) -> list[float]:
        return [value for ids in self.ids for value in await self.engine.score(ids)]

    def reference(self) -> list[float]:
        return [value for ids in self.ids for value in log_probs(self.model, ids)]

    async def landed(self) -> dict[str, float]:
        """How far the engine's scores are from those of the trainer, whose weights it should have."""
        return summary(apart(await self.scores(), self.reference()))

    async def update(self) -> dict[str, Any]:
        self.version += 1
        return await Split(self.engine).update(self.names(), self.version)

    async def routing(self) -> None:
        """Decoding on the engine against one forward in transformers, each with its own experts and with the engine's."""
        prompts = [prompt(8 + number, number) for number in range(REQUESTS)]
        answers = await asyncio.gather(
            *(self.engine.generate(ids, Sampling(NEW_TOKENS), trajectory_id=f"r{n}") for n, ids in enumerate(prompts))
        )
        began = perf_counter()
        models = {"bfloat16": self.model, "float32": copy.deepcopy(self.model).float()}
        if self.bench.kind == "local":
            models.pop("bfloat16")
        scored: list[float] = []
        plain: dict[str, list[float]] = {name: [] for name in models}
        again: dict[str, list[float]] = {name: [] for name in models}
        alike: dict[str, list[float]] = {name: [] for name in models}
        otherwise: dict[str, list[float]] = {name: [] for name in models}
        dense, unusable = self.model.config.first_k_dense_replace, 0
        for ids, answer in zip(prompts, answers, strict=True):
            whole, begin = ids + answer.ids, len(ids)
            scored += apart(answer.log_probs, (await self.engine.score(whole))[begin - 1 :])
            for name, model in models.items():
                with recorded(model) as own:
                    values = log_probs(model, whole, begin)
                plain[name] += apart(answer.log_probs, values)
                chosen = (answer.data or {}).get("routed_experts")
                mine = np.stack([own[layer].numpy() for layer in sorted(own)], axis=1)  # [tokens, mixed layers, experts]
                if chosen is None:  # the local engine records none; it is this very model
                    chosen = np.concatenate([np.zeros_like(mine[:, :1]).repeat(dense, axis=1), mine], axis=1)
                theirs = chosen[: len(mine), dense:]
                differs = np.ones(mine.shape[:2], dtype=bool)  # what was not recorded counts as another choice
                differs[: len(theirs)] = (np.sort(mine[: len(theirs)], axis=-1) != np.sort(theirs, axis=-1)).any(axis=-1)
                otherwise[name].append(float(differs.mean()))
                try:
                    with replayed(model, chosen):
                        again[name] += apart(answer.log_probs, log_probs(model, whole, begin))
                except ValueError as error:
                    unusable += 1
                    print(f"           request {answer.ids[:4]}…: {error}", flush=True)
                alike[name] += [
                    difference
                    for place, difference in enumerate(apart(answer.log_probs, values))
                    if not differs[: begin + place].any()
                ]
        told: dict[str, Any] = {
            "requests": REQUESTS,
            "tokens_each": NEW_TOKENS,
            "decode_against_score": summary(scored),
            "unusable_records": unusable,
        }
        for name in models:
            told[f"transformers_{name}"] = {
                "own_experts": summary(plain[name]),
                "own_experts_where_all_were_alike": summary(alike[name]),
                "experts_replayed": summary(again[name]),
                "share_of_tokens_and_layers_routed_otherwise": round(float(np.mean(otherwise[name])), 5),
            }
        self.bench.note(routing={**told, "transformers_s": round(perf_counter() - began, 1)})

    async def from_tensors(self) -> None:
        """To other weights and back, and to them again; the scores after each."""
        first = await self.scores() if self.version or self.bench.figures["sizes"][self.size].get("start_from_disk_s") else None
        if first is None:  # it was started with weights that nobody else has
            await self.update()
            first = await self.scores()
        found: list[dict[str, Any]] = []
        landed = [summary(apart(first, self.reference()))]
        there: list[float] = []
        back: list[float] = []
        for number in range(UPDATES + 1):
            shift(self.model, -1 if number % 2 else 1)
            found.append(await self.update())
            values = await self.scores()
            landed.append(summary(apart(values, self.reference())))
            (back if number % 2 else there).extend(values)
        usual = statistics.median(told["s"] for told in found)
        half = len(first)
        bytes_, copied = (self.bench.figures["sizes"][self.size][key] for key in ("bytes", "copy_s"))
        self.bench.size(
            self.size,
            from_tensors=found,
            from_tensors_s=usual,
            from_tensors_gb_per_s=round(bytes_ / usual / 1e9, 1),
            from_tensors_over_copy=round(usual / copied, 1),
            scores_moved=round(furthest(first, there[:half]), 4),
            scores_moved_mean=round(float(np.mean(apart(first, there[:half]))), 4),
            scores_back=round(furthest(first, back[:half]), 6),
            scores_there_again=round(furthest(there[:half], there[half:]), 6),
            against_transformers=landed,
        )

    async def from_disk(self) -> None:
        """The checkpoint that was written at the start, through our own update and by SGLang's reader."""
        began_with = await self.scores()
        self.version += 1
        ours = await Split(self.engine).update(
            read_checkpoint(self.folder) if self.bench.kind == "sglang" else self.names(), self.version
        )
        values = await self.scores()
        found: dict[str, Any] = {"from_disk": ours, "from_disk_scores_moved": round(furthest(began_with, values), 6)}
        self.bench.size(self.size, **found)
        if self.bench.kind != "sglang":
            return
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput  # type: ignore[import-not-found, unused-ignore]

        shift(self.model, 1)
        await self.update()
        shift(self.model, -1)
        await self.engine._drain()
        began = perf_counter()
        request = UpdateWeightFromDiskReqInput(model_path=str(self.folder), load_format="auto")
        success, message, _ = await self.engine._control(self.engine._manager.update_weights_from_disk(request, None))
        took = perf_counter() - began
        if not success:
            raise RuntimeError(f"update_weights_from_disk: {message}")
        self.bench.size(
            self.size,
            from_disk_by_sglang_s=round(took, 3),
            from_disk_by_sglang_apart=round(furthest(values, await self.scores()), 6),
        )

    async def restart(self) -> None:
        """An engine started with other weights against one that was updated to them."""
        shift(self.model, 1)
        await self.update()
        updated = await self.scores()
        write_checkpoint(self.folder, per_expert(self.model.state_dict().items()))
        began = perf_counter()
        await self.engine.close()
        self.engine = start(self.bench.kind, self.folder, "auto")
        took = perf_counter() - began
        told: dict[str, Any] = {
            "restart_s": round(took, 2),
            "scores_after_restart": round(furthest(updated, await self.scores()), 6),
        }
        usual = self.bench.figures["sizes"][self.size].get("from_tensors_s")
        if usual:
            told["restart_over_hot_update"] = round(took / usual, 1)
        self.bench.size(self.size, **told)


def apart(some: Sequence[float] | None, others: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(some or (), others, strict=True)]


def aims(figures: Mapping[str, Any]) -> list[Aim]:
    found = []
    told = figures.get("routing", {}).get("transformers_bfloat16") or figures.get("routing", {}).get("transformers_float32")
    if told:
        own, again = told["own_experts"], told["experts_replayed"]
        found.append(
            Aim(
                "replayed experts: largest difference over that with own experts",
                ratio(again["max"], own["max"]),
                "at most 1",
                again["max"] <= own["max"],
            )
        )
        found.append(Aim("replayed experts: mean difference", again["mean"], "at most 0.02", again["mean"] <= 0.02))
    for size, of in figures.get("sizes", {}).items():
        if "restart_over_hot_update" in of:
            times = of["restart_over_hot_update"]
            found.append(Aim(f"{size}: restart over hot update, times", times, "above 1", times > 1))
        for key, name in (
            ("scores_back", "scores after an update and back"),
            ("scores_there_again", "scores after the same update twice"),
            ("scores_after_restart", "hot update against restart"),
            ("from_disk_by_sglang_apart", "from disk by SGLang against from disk by us"),
        ):
            if key in of:
                found.append(Aim(f"{size}: {name}, largest difference", of[key], "0", of[key] == 0))
        if "against_transformers" in of:
            worst, moved = max(one["mean"] for one in of["against_transformers"]), of["scores_moved_mean"]
            found.append(
                Aim(
                    f"{size}: scores against transformers after each update, mean, over how far an update moves them",
                    ratio(worst, moved),
                    "at most 0.1",
                    worst <= 0.1 * moved,
                )
            )
    return found


def ratio(one: float, other: float) -> float:
    return round(one / other, 4) if other else (0.0 if one == 0 else float("inf"))


def listed(known: Iterable[str]) -> Callable[[str], list[str]]:
    names = list(known)

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(names)}")
        return chosen

    return parse


def asked(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A small DeepSeek-V3 on SGLang.")
    parser.add_argument("--part", type=listed(PARTS), default=list(PARTS), help="default: all, two only with --gpus 2")
    parser.add_argument("--sizes", type=listed(SHAPES), default=list(SHAPES), help="of the weights, in 10⁹ bytes; default: all")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=360.0, help="nothing is started that would go beyond")
    return arguments(parser, "deepseek", argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = asked(argv)
    if refused(args):
        return 3
    bench = Bench(args)
    asyncio.run(bench.run())
    bench.report()
    from benchmarks.gpu.deepseek_two import stuck

    if stuck():
        sys.stdout.flush()
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
