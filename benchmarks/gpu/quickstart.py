"""The quickstart's training through verl with SGLang on one or two GPUs: does it learn, and do the two sides agree?

`python -m benchmarks.gpu.quickstart sync|sglang_async|colocate_async|two_gpus|separate_async` trains (about 6 minutes, most
of it start-up) and reports the held-out accuracy before and after, and per step how far the log-probabilities of rollout and
trainer are apart: as verl measures it (`training/rollout_*`, of probabilities), and by turn from the run's train side
(`logprobs_by_turn`: the trainer's step, the turn or `all`, then the figures of `agentloop consistency`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from agentloop.consistency import consistency
from agentloop.journal import Run
from benchmarks.report import Aim, report

CONFIG = "examples/quickstart/quickstart_gpu.yaml"
CORRECTION = ["algorithm.rollout_correction.rollout_is=token", "algorithm.rollout_correction.rollout_is_threshold=2.0"]
MODES: dict[str, list[str]] = {
    "sync": [],
    "sglang_async": ["actor_rollout_ref.rollout.name=sglang_async"],
    "colocate_async": ["trainer.v1.trainer_mode=colocate_async", *CORRECTION],
    "two_gpus": [
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=64",
    ],
    # Training on one GPU and rollout on the other; weights travel through NCCL (verl's engine for it needs cupy).
    "separate_async": [
        "trainer.v1.trainer_mode=separate_async",
        "trainer.v1.separate_async.parameter_sync_step=1",
        "actor_rollout_ref.hybrid_engine=false",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
        *CORRECTION,
    ],
}
SHOWN = {
    "probs_diff_max": r"training/rollout_probs_diff_max:([\d.e+-]+)",
    "probs_diff_mean": r"training/rollout_probs_diff_mean:([\d.e+-]+)",
    "probs_pearson": r"training/rollout_actor_probs_pearson_corr:([\d.e+-]+)",
    "staleness_mean": r"trajectory_staleness/mean:np\.float64\(([\d.e+-]+)\)",
    "is_fraction_clipped_high": r"rollout_is_ratio_fraction_high:([\d.e+-]+)",
    "step_s": r"timing_s/step:([\d.e+-]+)",
    "train_side_s": r"agentloop/train_side_s:([\d.e+-]+)",
    "gen_s": r"timing_s/gen:([\d.e+-]+)",
}


def figures(run_dir: Path) -> dict[str, Any]:
    """The run's summary, and verl's metrics of every step by name."""
    log = (run_dir / "verl.log").read_text(errors="replace")
    steps = [line for line in log.splitlines() if re.search(r"step:\d+ - ", line)]
    series: dict[str, list[float]] = {}
    for name, pattern in SHOWN.items():
        found = [re.search(pattern, line) for line in steps]
        values = [round(float(match[1].rstrip(".")), 6) for match in found if match]
        if values:
            series[name] = values
    result = {"summary": json.loads((run_dir / "summary.json").read_text()), "per_step": series}
    return result | logprobs_by_turn(run_dir)


def logprobs_by_turn(run_dir: Path) -> dict[str, Any]:
    """Trainer against rollout by the trainer's step and turn; nothing if the run has no train side."""
    found = consistency(Run(run_dir))
    if not found.arrived:
        return {}
    by_turn = {step.name: {**{turn.name: turn.figures for turn in step.turns}, "all": step.figures} for step in found.steps}
    return {
        "logprobs_by_turn": {
            step: {turn: figures.to_dict() for turn, figures in turns.items()} for step, turns in by_turn.items()
        },
        "logprobs_sampled_by": {step.name: step.sampled_by for step in found.steps},
        "train_side_arrived": [found.arrived, found.expected],
    }


def aims(result: dict[str, Any]) -> list[Aim]:
    gain = result["summary"]["accuracy_after"] - result["summary"]["accuracy_before"]
    return [Aim("held-out accuracy gained", round(gain, 3), "at least 0.3", gain >= 0.3)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the quickstart with SGLang and report.")
    parser.add_argument("mode", choices=list(MODES))
    parser.add_argument("--run-dir", type=Path, default=None, help="default: runs/gpu_quickstart_MODE")
    parser.add_argument("--no-train-side", action="store_true", help="do not record the trainer's log-probabilities")
    args = parser.parse_args()
    run_dir = args.run_dir or Path(f"runs/gpu_quickstart_{args.mode}")
    command = [sys.executable, "-m", "examples.quickstart.run", "--config", CONFIG, "--run-dir", str(run_dir)]
    options = ["--no-controls", *([] if args.no_train_side else ["--train-side"])]
    status = subprocess.run([*command, *options, *MODES[args.mode]], check=False).returncode
    if status:
        return status
    result = figures(run_dir)
    report(f"gpu_quickstart_{args.mode}", result, aims(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
