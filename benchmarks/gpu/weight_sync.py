"""The weight path as a job uses it, on SGLang: Megatron's shards of a small DeepSeek-V3, the sharding manager with each of its
plans, and the canary.

`python -m benchmarks.gpu.weight_sync [--plans tensors,distributed,disk,restart] [--gpus 2] [--faults 40] [--budget-s 420]`

- plans: a few syncs by each. Rollouts are under way when a sync begins, and none of their answers may have tokens of two
  versions; after it the canary scores engine and trainer. On one GPU the process group of `distributed` is gloo's, since NCCL
  wants a GPU for each rank; with `--gpus 2` the engine is on the second one and the group is NCCL's.
- faults: planted between the sender and SGLang in a step that moves each element by 5 % of its tensor's standard deviation; how
  far beyond its tolerance each is, which is measured on right updates before. And one sync by the manager that must be refused,
  with the one after it.

The trainer is a transformers model; after each step shards for two tensor, two pipeline and two expert parallel ranks are cut
from it. Results are written after every step; what fails is told under `not_run`. Exits with 3 where SGLang or a GPU is
missing. `--engine local` runs it on a CPU with a tiny model, which proves the code.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from agentloop.engines.base import Engine, Generation, Sampling
from agentloop.weights import (
    DiskPlan,
    DistributedPlan,
    HfTensors,
    Layout,
    MegatronSGLangShardingManager,
    RestartPlan,
    SendPlan,
    Shard,
    ShardSource,
    TensorsPlan,
    WeightsRefused,
    hf_config,
    shape_of,
    to_shard,
)
from agentloop.weights.check import TOLERANCES, Canary, CanaryReport, Tolerance
from agentloop.weights.check_faults import Fault, FaultyEngine, faults
from agentloop.weights.check_sequences import coverage, random_sequences
from agentloop.weights.check_transformers import published, reference, routed
from agentloop.weights.checksum import checksum
from agentloop.weights.shape import load_config
from benchmarks.gpu.deepseek import listed, start
from benchmarks.gpu.deepseek_model import SHAPES, TINY, trainer, write_checkpoint, write_folder
from benchmarks.gpu.engine_support import Result, arguments, command, refused
from benchmarks.gpu.weights import prompt
from benchmarks.report import Aim

PLANS = ("tensors", "distributed", "disk", "restart")
SYNCS = {"restart": 1}
"""How many by a plan; 3 of the others."""
ROLLOUTS = 16
NEW_TOKENS = {"sglang": 256, "local": 48}
STEP = 0.05
RIGHT = 20
"""Right updates on which the tolerance is measured."""


class Job:
    """The trainer's side."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.dtype = torch.bfloat16 if kind == "sglang" else torch.float32
        shape = SHAPES["1"] if kind == "sglang" else TINY
        write_folder(folder, shape.config(str(self.dtype).removeprefix("torch.")))
        self.config = hf_config(load_config(folder), dtype=self.dtype, mtp=False)
        self.shape = shape_of(self.config)
        half = self.shape.layers // 2
        self.layout = Layout(tp=2, pp=2, ep=2, chunk_layers=(self.shape.layers - half, half))
        device = "cuda:0" if kind == "sglang" else "cpu"
        self.model = trainer(shape.config(str(self.dtype).removeprefix("torch.")), device)
        self.noise = torch.Generator(device).manual_seed(7)
        self.sequences = random_sequences(self.shape.vocab, 16, 64)
        self.shards: list[Shard] = []
        self.cut()

    def cut(self) -> None:
        weights = HfTensors(dict(published(self.model)))
        places = list(self.layout.chunks(moe=True))
        self.shards = [Shard(at, to_shard(weights, self.layout, at, self.shape)) for at in places]

    def train(self, size: float = STEP) -> None:
        """A step that moves each element by about `size` of its tensor's standard deviation."""
        for tensor in self.model.state_dict().values():
            spread = tensor.float().std()
            tensor.add_(torch.randn(tensor.shape, generator=self.noise, device=tensor.device) * spread * size)

    def source(self) -> ShardSource:
        return ShardSource(self.shards, self.layout, self.shape)

    def sums(self) -> dict[str, int]:
        return {name: checksum(tensor) for name, tensor in published(self.model)}

    def canary(self, tolerance: Tolerance | str) -> Canary:
        return Canary(self.sequences, reference(self.model), tolerance=tolerance)


def told(report: Any) -> dict[str, Any]:
    """Of a `CanaryReport`; JSON has no infinity."""
    numbers = {name: getattr(report, name) for name in ("mean", "sequence", "worst", "margin")}
    return {
        "ok": report.ok,
        **{name: float(f"{number:.4g}") if math.isfinite(number) else "no number" for name, number in numbers.items()},
        "tensors": len(report.tensors),
        "layer": report.layer,
        "compared": report.compared,
        "compared_by": report.compared_by,
    }


class Bench(Result):
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        super().__init__(args.name, aims, args.results, command=command("weight_sync"), engine=args.engine, gpus=args.gpus)
        self.args, self.folder_of_model, self.kind = args, folder / "model", str(args.engine)
        self.home = folder
        began = perf_counter()
        self.job = Job(self.folder_of_model, self.kind)
        moved = sum(tensor.nbytes for _, tensor in published(self.job.model))
        found = coverage(routed(self.job.model, self.job.sequences), self.job.shape.experts)
        write_checkpoint(self.folder_of_model, published(self.job.model))
        self.note(bytes=moved, experts_reached=found.share, trainer_s=round(perf_counter() - began, 1))
        self.more = {"base_gpu_id": 1} if args.gpus > 1 else {}
        self.engine: Engine = self.begin(self.folder_of_model, 0)

    def begin(self, folder: Path, version: int) -> Engine:
        began = perf_counter()
        engine = start(self.kind, folder, "auto", self.more, weight_version=version)
        self.say({"started_s": round(perf_counter() - began, 1)})
        return engine

    async def again(self, folder: Path, version: int) -> Engine:
        return self.begin(folder, version)

    def plan(self, name: str) -> SendPlan:
        if name == "tensors":
            return TensorsPlan()
        if name == "distributed":
            nccl = self.args.gpus > 1
            return DistributedPlan(backend="nccl" if nccl else "gloo", device="cuda:0" if nccl else None, timeout_s=60.0)
        target = self.home / name
        if name == "disk":
            return DiskPlan(target, self.job.config, beside=self.folder_of_model)
        return RestartPlan(target, self.job.config, self.again, beside=self.folder_of_model)

    def manager(self, engine: Engine, plan: SendPlan, tolerance: Tolerance | str) -> MegatronSGLangShardingManager:
        check = self.job.canary(tolerance)
        return MegatronSGLangShardingManager({"a": engine}, self.job.source, plan, check=check, dtype=self.job.dtype)

    @property
    def named_tolerance(self) -> str:
        return "bfloat16_moe" if self.kind == "sglang" else "float32"

    # -- plans --------------------------------------------------------------------------------------------------------

    async def syncs(self, name: str) -> None:
        manager = self.manager(self.engine, self.plan(name), self.named_tolerance)
        try:
            for _ in range(SYNCS.get(name, 3)):
                self.job.train()
                self.job.cut()
                before = manager.version
                rollouts = [asyncio.ensure_future(self.rollout(manager.engine, number)) for number in range(ROLLOUTS)]
                await asyncio.sleep(0.3 if self.kind == "sglang" else 0.02)
                try:
                    report = await manager.sync()
                finally:
                    answers = await asyncio.gather(*rollouts, return_exceptions=True)
                assert report is not None
                after = await self.rollout(manager.engine, ROLLOUTS)
                made = [answer for answer in answers if isinstance(answer, Generation)]
                row = {
                    **{key: round(value, 4) if isinstance(value, float) else value for key, value in report.to_dict().items()},
                    "canary": told(report.checks["a"]),
                    "answers": len(made),
                    "cut_short": sum(len(answer.ids) < NEW_TOKENS[self.kind] for answer in made),
                    "tokens_of_two_versions": sum(
                        answer.min_weight_version not in (None, answer.weight_version) for answer in made
                    ),
                    "of_neither_version": sum(answer.weight_version not in (before, report.version) for answer in made),
                    "answers_after": after.weight_version,
                }
                self.figures.setdefault("plans", {}).setdefault(name, []).append(row)
                self.say({name: row})
        finally:
            self.engine = manager.engine.engine
            await manager.close()

    async def rollout(self, engine: Engine, number: int) -> Generation:
        answer = await engine.generate(prompt(32, number), Sampling(NEW_TOKENS[self.kind]), trajectory_id=f"r{number}")
        await engine.release(f"r{number}")
        return answer

    # -- faults -------------------------------------------------------------------------------------------------------

    async def planted(self) -> None:
        tells = "fingerprints" if self.kind == "sglang" else "checksums"
        engine = FaultyEngine(self.engine, tells=tells)  # type: ignore[arg-type]
        version = engine.weight_version or 0
        canary, reports = self.job.canary(self.named_tolerance), []
        for _ in range(RIGHT):
            version += 1
            self.job.train((0.05, 0.01, 0.002)[version % 3])
            reports.append(await self.update(engine, canary, version))
        tolerance = Tolerance.measured(reports)
        noise = {name: max(getattr(one, name) for one in reports) for name in ("mean", "sequence", "worst")}
        found: dict[str, Any] = {
            "right_updates": RIGHT,
            "alarms": sum(not one.ok for one in reports),
            "noise": {name: round(value, 5) for name, value in noise.items()},
            "named_tolerance": self.named_tolerance,
            "compared_by": reports[-1].compared_by,
        }
        self.note(faults=found)
        margins = found.setdefault("planted", {})
        for fault in faults(dict(published(self.job.model)))[: self.args.faults]:
            if self.seconds > self.args.budget_s:
                self.refuse(f"fault {fault.name}", "no time was left of the budget")
                continue
            version += 2
            with self.step(f"fault {fault.name}"):
                report = await self.one(engine, fault, tolerance, version)
                named = replace(report, tolerance=TOLERANCES[self.named_tolerance])
                margins[fault.name] = {
                    **told(report),
                    "margin_of_the_named_tolerance": told(named)["margin"],
                    "message": report.message,
                }
                self.say({fault.name: margins[fault.name]})
        engine.fault = None
        await self.update(engine, canary, version + 1)
        await self.refusal(engine, tolerance)

    async def update(self, engine: FaultyEngine, canary: Canary, version: int) -> CanaryReport:
        await engine.update_weights(published(self.job.model), version)
        return await canary.check(engine, version, self.job.sums())

    async def one(self, engine: FaultyEngine, fault: Fault, tolerance: Tolerance, version: int) -> CanaryReport:
        """A right update, then one with the fault."""
        before = copy.deepcopy(self.job.model.state_dict())
        canary, engine.fault = self.job.canary(tolerance), None
        await self.update(engine, canary, version)
        engine.fault = fault
        self.job.train()
        found = await self.update(engine, canary, version + 1)
        self.job.model.load_state_dict(before)
        return found

    async def refusal(self, engine: FaultyEngine, tolerance: Tolerance) -> None:
        """By the manager: a sync with a fault is refused and so are rollouts; the next one serves again."""
        manager = self.manager(engine, TensorsPlan(), tolerance)
        with self.step("refusal"):
            self.job.cut()
            await manager.sync()
            skipped = next(fault for fault in faults(dict(published(self.job.model))) if fault.name == "experts_skipped")
            engine.fault = skipped
            self.job.train()
            self.job.cut()
            said = ["", ""]
            try:
                await manager.sync()
            except WeightsRefused as error:
                said[0] = str(error)
            try:
                await self.rollout(manager.engine, 0)
            except WeightsRefused as error:
                said[1] = str(error)
            engine.fault = None
            report = await manager.sync()
            answer = await self.rollout(manager.engine, 0)
            assert report is not None
            serves = answer.weight_version == report.version
            self.note(refusal={"sync": said[0], "rollout_refused": bool(said[1]), "serves_after_the_next": serves})
        await manager.close()

    async def run(self) -> None:
        try:
            for name in self.args.plans:
                with self.step(name):
                    await self.syncs(name)
            if self.args.faults:
                with self.step("faults"):
                    await self.planted()
        finally:
            await self.engine.close()


def aims(figures: Mapping[str, Any]) -> list[Aim]:
    found = []
    for name, rows in figures.get("plans", {}).items():
        mixed = sum(row["tokens_of_two_versions"] + row["of_neither_version"] for row in rows)
        found.append(Aim(f"{name}: answers of two versions, or of neither", mixed, "0", mixed == 0))
        off = sum(not row["canary"]["ok"] or row["answers_after"] != row["version"] for row in rows)
        found.append(Aim(f"{name}: syncs that did not land", off, "0", off == 0))
    told = figures.get("faults", {})
    if "alarms" in told:
        found.append(Aim("right updates: alarms", told["alarms"], "0", told["alarms"] == 0))
    if planted := told.get("planted"):
        missed = sorted(name for name, row in planted.items() if row["ok"])
        found.append(Aim(f"planted faults that were not found, of {len(planted)}", len(missed), "0", not missed))
    if "refusal" in figures:
        kept = bool(figures["refusal"]["sync"]) and figures["refusal"]["rollout_refused"]
        kept = kept and figures["refusal"]["serves_after_the_next"]
        found.append(Aim("a sync with a fault is refused, rollouts too, and the next one serves", int(kept), "1", kept))
    return found


def asked(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The weight path on SGLang.")
    parser.add_argument("--plans", type=listed(PLANS), default=list(PLANS), help="default: all")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--faults", type=int, default=40, help="how many at most; 0: none")
    parser.add_argument("--budget-s", type=float, default=420.0, help="no fault is planted after so many seconds")
    return arguments(parser, "weight_sync", argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = asked(argv)
    if refused(args):
        return 3
    with tempfile.TemporaryDirectory(prefix="weight-sync-") as folder:
        bench = Bench(args, Path(folder))
        asyncio.run(bench.run())
        bench.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
