"""The real `verl.trainer.main_ppo` on the CPU, with the local engine as its rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from agentloop.consistency import consistency
from agentloop.journal import Run
from agentloop.trajectory import MIXED
from agentloop.verl.launch import make_plan
from agentloop.verl.process import parse_metrics, run
from tests.verl.assets import make_data, make_model, make_reward, run_file

OURS = {"agentloop/end/final_answer", "agentloop/tools/timeout", "agentloop/generate_s/p95"}
"""Some of the metrics that agentloop adds, in every logger of verl's."""
VERLS_LOOP = "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null"


def train(folder: Path, *overrides: str) -> list[dict[str, float]]:
    """verl's metrics of each step."""
    make_model(folder / "model")
    make_data(folder / "data.parquet")
    make_reward(folder / "reward.py")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_file(folder)))
    plan = make_plan(path, overrides)
    log = folder / "verl.log"
    status = run(plan.command, plan.env, log)
    assert status == 0, log.read_text()[-4000:]
    lines = [line for line in log.read_text().splitlines() if "step:" in line and "timing_s/step:" in line]
    return [parse_metrics(line) for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([VERLS_LOOP], id="verls-own-loop"),
        pytest.param(
            [
                "actor_rollout_ref.rollout.free_cache_engine=true",
                "actor_rollout_ref.actor.use_kl_loss=true",
                "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
            ],
            id="sleep-and-wake-with-a-reference-model",
        ),
        pytest.param(["actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora.merge=true"], id="merged-lora"),
        pytest.param(["trainer.v1.trainer_mode=colocate_async"], id="colocate-async"),
    ],
)
def test_rollout_and_trainer_agree(tmp_path: Path, overrides: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "tensorboard"))
    steps = train(tmp_path, *overrides, "trainer.logger=[console,tensorboard,wandb]")
    assert len(steps) == 2
    stale = any("async" in override for override in overrides)  # sampled by weights that are older by a step
    for metrics in steps:
        assert metrics["training/rollout_probs_diff_max"] < (0.02 if stale else 1e-4)
        assert metrics["actor/grad_norm"] > 0
        if VERLS_LOOP not in overrides:
            assert metrics.keys() >= OURS
    if VERLS_LOOP not in overrides:
        for pattern in ("tensorboard/**/events.*", "wandb/offline-run-*/run-*.wandb"):
            (events,) = tmp_path.glob(pattern)
            assert all(name.encode() in events.read_bytes() for name in OURS), pattern


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trainer_and_rollout_apart(tmp_path: Path) -> None:
    """Answers of up to 900 tokens, of a model that rarely stops, on a server that takes four at a time: some are
    usually being generated when an update comes (that one is cut then, and goes on, tests/verl/test_client.py is sure of)."""
    steps = train(
        tmp_path,
        "trainer.v1.trainer_mode=separate_async",
        "trainer.v1.separate_async.parameter_sync_step=1",
        "data.max_response_length=900",
        "actor_rollout_ref.rollout.engine_kwargs.agentloop_local.max_slots=4",
        "trainer.v1.separate_async.num_warmup_batches=2",
        "trainer.total_training_steps=3",
        "agentloop.train_side=true",
    )
    assert len(steps) == 3
    for metrics in steps:
        assert metrics["training/rollout_probs_diff_max"] < 0.05
        assert 0 <= metrics["training/off_policy/trajectory_staleness/max"] <= 3
        assert metrics["actor/grad_norm"] > 0
        assert metrics.keys() >= OURS
    run = Run(tmp_path / "run")
    found = consistency(run)
    assert [(step.step, step.trajectories) for step in found.steps] == [(step, 16) for step in (1, 2, 3)]
    assert found.arrived == 48, "whatever step they were begun in"
    turns = [[version for version, _ in turn.versions] for row in run.trajectories() for turn in run.load(row).turns]
    for versions in turns:
        assert MIXED not in versions and versions == sorted(v for v in versions if isinstance(v, int))
