"""What verl's trainer computes, written beside the journal: the setting, the wrapped method, and whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from agentloop.batch import to_dataproto
from agentloop.consistency import consistency, read_events
from agentloop.errors import ConfigError
from agentloop.journal import Run
from agentloop.trajectory import Reward
from agentloop.verl.settings import read_settings
from agentloop.verl.train_side import TrainSideWriter, add_row_keys, check_trainer, install
from tests.verl.assets import QUICKSTART, run_file
from tests.verl.support import conversation, verl_config

TRAINERS = [
    {"trainer.v1.trainer_mode": "sync"},
    {"trainer.v1.trainer_mode": "colocate_async"},
    {"trainer.v1.trainer_mode": "separate_async"},
    {"trainer.use_v1": False},
]


def test_it_is_off_unless_asked_for() -> None:
    assert not read_settings(verl_config()).train_side
    assert read_settings(verl_config(**{"agentloop.train_side": True})).train_side
    with pytest.raises(ConfigError, match="did you mean 'train_side'"):
        read_settings(verl_config(**{"agentloop.trainside": True}))
    with pytest.raises(ConfigError, match="'train_side' is true and 'journal' false"):
        read_settings(verl_config(**{"agentloop.train_side": True, "agentloop.journal": False}))


@pytest.mark.parametrize("settings", TRAINERS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_it_is_put_in_once_and_taken_out_again(settings: dict[str, Any], tmp_path: Path) -> None:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.v1 import get_trainer_cls

    config = verl_config(**settings)
    mode = settings.get("trainer.v1.trainer_mode")
    trainer, name = (get_trainer_cls(mode), "_compute_advantage") if mode else (RayPPOTrainer, "_update_actor")
    before = getattr(trainer, name)
    install(config, TrainSideWriter(tmp_path, 1))
    undo = install(config, TrainSideWriter(tmp_path, 1))
    assert getattr(trainer, name).__wrapped__ is before
    undo()
    assert getattr(trainer, name) is before


def test_another_verl_is_refused_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a verl would be that passes the batch in another way."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    config = verl_config()
    check_trainer(config)
    monkeypatch.setattr(get_trainer_cls("sync"), "_compute_advantage", lambda self, data: data)
    with pytest.raises(
        ConfigError, match=r"PPOTrainerSync._compute_advantage\(batch, metrics\) of verl 0.9.1.*train_side=false"
    ):
        check_trainer(config)


def test_the_legacy_batch_is_taken_apart_without_fillers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own batch, in another order than it was made, as after balancing."""
    import torch
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer

    told = [
        conversation(uid="g-0", sibling=i, reward=Reward(float(i)), masked=i == 1, turns=((5 + i, 3), (4, 0))) for i in range(4)
    ]
    batch = to_dataproto(told, prompt_length=16, response_length=32, pad_token_id=0)
    add_row_keys(batch, told)
    batch.batch["old_log_probs"] = batch.batch["rollout_log_probs"] + 0.5
    batch.batch["advantages"] = batch.batch["response_mask"] * 2.0
    batch.reorder(torch.tensor([3, 1, 0, 2]))
    seen: list[Any] = []
    monkeypatch.setattr(RayPPOTrainer, "_update_actor", _update_actor(seen))
    trainer = RayPPOTrainer.__new__(RayPPOTrainer)
    trainer.global_steps = 2
    _journal(tmp_path, told)
    install(verl_config(**{"trainer.use_v1": False}), TrainSideWriter(tmp_path, 1))
    assert trainer._update_actor(batch) == "updated" and seen == [batch]
    side = Run(tmp_path).train_side(2)
    assert (side.arrived, side.expected) == (3, 3)
    trained = {t.recorded.row.sibling: t for t in side}
    assert trained.keys() == {0, 2, 3}
    for sibling, both in trained.items():
        assert len(both.old_log_probs) == told[sibling].response_len
        assert both.response_mask.tolist() == told[sibling].response_mask
        np.testing.assert_allclose((both.old_log_probs - both.rollout_log_probs)[both.sampled], 0.5, rtol=1e-5)


def _update_actor(seen: list[Any]) -> Any:
    def update_actor(self: Any, batch: Any) -> str:
        seen.append(batch)
        return "updated"

    return update_actor


def _journal(folder: Path, told: list[Any]) -> None:
    from agentloop.journal import JournalWriter

    with JournalWriter(folder) as writer:
        for trajectory in told:
            writer.trajectory_start(trajectory)
            for turn in trajectory.turns:
                writer.turn(trajectory, turn)
                writer.observation(trajectory, turn)
            writer.trajectory_end(trajectory)


def test_a_disk_that_fails_does_not_stop_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "train_side").write_text("in the way")
    writer = TrainSideWriter(tmp_path, 1)
    writer.write(lambda: [], step=3, update=0, recomputed=True)
    assert writer.errors == 1
    assert "the train side of step 3 could not be written" in caplog.text


def quickstart(folder: Path, *overrides: str) -> tuple[int, str]:
    """Two steps of the quickstart, of which the second samples with weights that the first has changed; exit status and log."""
    from agentloop.verl.launch import make_plan
    from agentloop.verl.process import run
    from examples.quickstart import make_data

    train, val = make_data.write(folder / "data", seed=1, train_rows=64, held_out_rows=8)
    shutil.copytree(QUICKSTART, folder / "model")
    content = run_file(folder)
    content["agentloop"] |= {"tools": "examples/quickstart/tools.yaml", "loop": {"max_turns": 4}, "train_side": True}
    content["agentloop"]["consistency"] = {"max_abs": 0.0}
    content["verl"]["data"] |= {
        **{"train_files": str(train), "val_files": str(val), "max_prompt_length": 128, "max_response_length": 256},
        "train_batch_size": 8,
    }
    content["verl"]["actor_rollout_ref"]["actor"]["ppo_mini_batch_size"] = 8
    content["verl"]["reward"]["custom_reward_function"]["path"] = "examples/quickstart/reward.py"
    path, log = folder / "run.yaml", folder / "verl.log"
    path.write_text(yaml.safe_dump(content))
    plan = make_plan(path, overrides)
    return run(plan.command, plan.env, log), log.read_text()


def metrics_of(log: str) -> list[dict[str, float]]:
    """verl's, by step."""
    from agentloop.verl.process import parse_metrics

    return [parse_metrics(line) for line in log.splitlines() if "step:" in line and "timing_s/step:" in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="sync"),
        pytest.param(["trainer.use_v1=false"], id="legacy"),
        pytest.param(
            ["trainer.v1.trainer_mode=colocate_async", "algorithm.rollout_correction.rollout_is=token"], id="colocate-async"
        ),
    ],
)
def test_both_sides_agree_turn_by_turn_in_a_run(tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    status, log = quickstart(tmp_path, *overrides)
    assert status == 0, log[-4000:]
    metrics = metrics_of(log)
    run, asynchronous = Run(tmp_path / "run"), any("async" in override for override in overrides)
    found = consistency(run)
    assert [step.step for step in found.steps] == [1, 2]
    assert found.arrived == sum(step.trajectories for step in found.steps) == 64
    assert asynchronous or found.missing == {}
    events = read_events(run.path)
    assert [(event["step"], event["action"]) for event in events] == [(1, "warn"), (2, "warn")], "beyond the lowest threshold"
    for step, told, event in zip(found.steps, metrics, events, strict=True):
        figures = step.figures
        assert {"0", "1"} <= {turn.name for turn in step.turns}, "the model uses its tool"
        assert figures.tokens == sum(turn.figures.tokens for turn in step.turns) > 0
        assert (figures.not_recorded, figures.infinite, step.misplaced, found.findings) == (0, 0, 0, ())
        assert step.sampled_by is not None and figures.max_abs is not None and figures.correlation is not None
        stale = step.sampled_by[0] < step.step - 1
        assert stale or figures.max_abs < 1e-3
        assert stale or figures.correlation > 0.99999
        # What verl itself says of the same tokens.
        assert told["training/rollout_probs_diff_max"] == pytest.approx(figures.probs_max_abs, rel=1e-2, abs=1e-6)
        assert "agentloop/train_side_s" in told
        # What the running trainer said, of its batch in memory, is what the record says afterwards.
        for name in ("tokens", "max_abs", "mean_abs", "k3"):
            assert told[f"agentloop/consistency/{name}"] == pytest.approx(getattr(figures, name), rel=1e-3, abs=1e-9)
            assert event["report"]["all"][name] == pytest.approx(getattr(figures, name))
        assert told["agentloop/consistency/beyond"] == 1
        assert [group["name"] for group in event["report"]["by"]["turn"]] == [turn.name for turn in step.turns]
    assert "agentloop.consistency.max_abs=0" in log
    second = found.steps[1].sampled_by
    assert second is not None and asynchronous == (second[0] == 0)
    advantages = []
    for trained in run.train_side(1):
        assert (trained.response_mask == trained.sampled).all()
        assert (trained.advantages[~trained.sampled] == 0).all()
        assert len(set(trained.advantages[trained.sampled])) == 1, "GRPO: one for the whole trajectory"
        advantages.append((trained.recorded.row.uid, trained.recorded.row.reward, trained.advantages[trained.sampled][0]))
        assert (trained.rollout_is_weights is not None) == asynchronous
    for uid in {uid for uid, *_ in advantages}:
        group = sorted((reward, advantage) for at, reward, advantage in advantages if at == uid)
        assert [advantage for _, advantage in group] == sorted(advantage for _, advantage in group), (
            "more reward, more advantage"
        )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_beyond_a_threshold_ends_before_its_weights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    status, log = quickstart(tmp_path, "+agentloop.consistency.action=stop")
    assert status != 0
    assert metrics_of(log) == [], "the first step was not ended"
    assert "ConsistencyError: step 1: trainer and rollout are too far apart: max_abs is " in log
    assert "worst turn: turn " in log
    (event,) = read_events(tmp_path / "run")
    assert (event["step"], event["action"]) == (1, "stop")
    assert [row.step for row in Run(tmp_path / "run").trajectories("train")] == [1] * 32, "what was sampled is in the record"
