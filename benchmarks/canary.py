"""How far beyond its tolerance each planted fault is, against the noise of right updates.

`python -m benchmarks.canary [--updates 200]`

Tiny models of three families on the real local engine, in float32 and in bfloat16, against a trainer in float32. Faults are
planted between sender and engine (`agentloop.weights.check_faults`) in an update whose step moves each element by 5 % of its
tensor's standard deviation, and once more by 0.2 %. A margin above 1 is alarm by the scores alone; checksums are asked apart.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import math
from typing import Any

import torch

from agentloop.weights.check import TOLERANCES, Canary, CanaryReport, Tolerance
from agentloop.weights.check_faults import Fault, FaultyEngine, faults
from agentloop.weights.check_sequences import coverage
from agentloop.weights.check_transformers import published, reference, routed
from benchmarks.report import Aim, report
from tests.weights.canary_support import engine_of, sums, texts, train, trainer

MODELS = ("deepseek", "qwen3_moe", "qwen3_tied")
STEPS = (0.05, 0.002)
FIRST = 20
"""Right updates on which a tolerance is measured."""


async def right_updates(canary: Canary, model: Any, engine: FaultyEngine, count: int, dtype: torch.dtype) -> list[CanaryReport]:
    start = copy.deepcopy(model.state_dict())
    reports = []
    for version in range(1, count + 1):
        if version % 20 == 0:
            model.load_state_dict(start)
        train(model, (0.05, 0.01, 0.002)[version % 3], seed=version)
        await engine.update_weights(published(model), version)
        reports.append(await canary.check(engine, version, sums(model, dtype)))
    model.load_state_dict(start)
    return reports


async def planted(
    fault: Fault, model: Any, engine: FaultyEngine, step: float, tolerance: Tolerance, dtype: torch.dtype
) -> CanaryReport:
    """A right update, then one with the fault."""
    start = copy.deepcopy(model.state_dict())
    canary = Canary(texts(), reference(model), tolerance=tolerance)
    engine.fault = None
    await engine.update_weights(published(model), 1)
    await canary.check(engine, 1, sums(model, dtype))
    engine.fault = fault
    train(model, step, seed=3)
    await engine.update_weights(published(model), 2)
    found = await canary.check(engine, 2, sums(model, dtype))
    model.load_state_dict(start)
    return found


def largest(reports: list[CanaryReport]) -> dict[str, float]:
    return {name: float(f"{max(getattr(one, name) for one in reports):.3g}") for name in ("mean", "sequence", "worst")}


def shown(margin: float) -> float | str:
    """Two digits; JSON has no infinity."""
    return "no number" if math.isinf(margin) else float(f"{margin:.2g}")


async def measure(name: str, updates: int) -> dict[str, Any]:
    model = trainer(name)
    figures: dict[str, Any] = {"tokens": sum(len(ids) - 1 for ids in texts())}
    if name != "qwen3_tied":
        reached = coverage(routed(model, texts()), 8)
        figures["experts_reached"] = reached.share
        figures["tokens_of_the_rarest_expert"] = reached.rarest
    margins: dict[str, dict[str, Any]] = {}
    for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        engine = FaultyEngine(engine_of(model, dtype))
        named = "float32" if kind == "float32" else "bfloat16" if name == "qwen3_tied" else "bfloat16_moe"
        count = FIRST if kind == "float32" else updates
        reports = await right_updates(Canary(texts(), reference(model), tolerance=named), model, engine, count, dtype)
        steps = [abs(one.step.share) / one.step.limit for one in reports if one.step is not None]
        figures[kind] = {
            "right_updates": count,
            "alarms": sum(not one.ok for one in reports),
            "noise": largest(reports),
            "noise_of_the_first": largest(reports[:FIRST]),
            "step_over_its_limit": round(max(steps), 3),
        }
        tolerance = TOLERANCES["float32"] if kind == "float32" else Tolerance.measured(reports[:FIRST])
        figures[kind]["tolerance"] = {"mean": tolerance.mean, "sequence": tolerance.sequence, "worst": tolerance.worst}
        for fault in faults(dict(published(model))):
            row = margins.setdefault(fault.name, {})
            for step in STEPS:
                found = await planted(fault, model, engine, step, tolerance, dtype)
                row[f"{kind}_step_{step:g}"] = shown(found.margin)
                row["tensors"] = min(row.get("tensors", len(found.tensors)), len(found.tensors))
                row["layer"] = found.layer
        await engine.engine.close()
    figures["margins"] = margins
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=200, help="right ones, in bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = {name: asyncio.run(measure(name, arguments.updates)) for name in MODELS}
    rows = [(name, fault, row) for name, of in figures.items() for fault, row in of["margins"].items()]
    alarms = sum(of["bfloat16"]["alarms"] + of["float32"]["alarms"] for of in figures.values())
    missed = sum(row["tensors"] == 0 for _, _, row in rows)
    unseen = {fault for _, fault, row in rows if row["float32_step_0.05"] != "no number" and row["float32_step_0.05"] <= 1}
    report(
        "canary",
        figures,
        [
            Aim("alarms in right updates", alarms, "0", alarms == 0),
            Aim("faults that checksums miss", missed, "0", missed == 0),
            Aim(
                "kinds of faults that scores in float32 miss", len(unseen), "at most 1: one element", unseen <= {"one_element"}
            ),
        ],
    )


if __name__ == "__main__":
    main()
