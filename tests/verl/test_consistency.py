"""Trainer against rollout in verl: settings, and a step that is judged where verl's batch passes, before its weights change."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from agentloop.batch import row_key, to_dataproto, to_rows
from agentloop.consistency import ConsistencyError, Thresholds, consistency, read_events
from agentloop.errors import ConfigError
from agentloop.journal import Run
from agentloop.trajectory import Reward
from agentloop.verl.consistency import StepJudge
from agentloop.verl.settings import read_settings
from agentloop.verl.train_side import TrainSideWriter, add_row_keys, install, rows_of_fields
from tests.verl.support import conversation, verl_config

LEGACY = {"trainer.use_v1": False}


def test_settings() -> None:
    assert read_settings(verl_config()).consistency == Thresholds()
    given = {
        "agentloop.consistency.max_k3": 0.01,
        "agentloop.consistency.action": "stop",
        "agentloop.consistency.clip": [0.8, 1.25],
    }
    settings = read_settings(verl_config(**given))
    assert settings.consistency == Thresholds(max_k3=0.01, action="stop", clip=(0.8, 1.25))
    with pytest.raises(ConfigError, match="did you mean 'max_mean_abs'"):
        read_settings(verl_config(**{"agentloop.consistency.mean_abs": 1}))
    for key, value, message in (
        ("actor_rollout_ref.rollout.calculate_log_probs", False, "calculate_log_probs=true"),
        ("algorithm.rollout_correction.bypass_mode", True, "bypass_mode=true"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_settings(verl_config(**given, **{key: value}))
        read_settings(verl_config(**{key: value}))


class Trainer:
    """verl's legacy trainer in its step 2, with what it is given to train on."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, thresholds: Thresholds, *, train_side: bool = True
    ) -> None:
        from verl.protocol import DataProto
        from verl.trainer.ppo.ray_trainer import RayPPOTrainer

        self.trained: list[Any] = []

        def update_actor(trainer: Any, batch: Any) -> Any:
            self.trained.append(batch)
            return DataProto.from_single_dict(data={}, meta_info={"metrics": {"actor/loss": [1.0]}})

        monkeypatch.setattr(RayPPOTrainer, "_update_actor", lambda self, batch: update_actor(self, batch))
        self.trainer: Any = RayPPOTrainer.__new__(RayPPOTrainer)
        self.trainer.global_steps = 2
        self.told = [
            conversation(
                uid=f"g-{i // 4}", sibling=i % 4, reward=Reward(float(i)), masked=i == 1, turns=((5 + i, 3), (4, 2), (6, 0))
            )
            for i in range(8)
        ]
        self.batch: Any = to_dataproto(self.told, prompt_length=16, response_length=64, pad_token_id=0)
        add_row_keys(self.batch, self.told)
        self.batch.batch["old_log_probs"] = self.batch.batch["rollout_log_probs"] + 0.01
        self.batch.batch["advantages"] = self.batch.batch["response_mask"] * 2.0
        self.judge = StepJudge(thresholds, folder)
        install(verl_config(**LEGACY), TrainSideWriter(folder, 1) if train_side else None, self.judge)

    def drift(self, row: int, turn: int, by: float) -> None:
        trajectory = self.told[row]
        start, end = (at - trajectory.prompt_len for at in (trajectory.turns[turn].start, trajectory.turns[turn].end))
        self.batch.batch["old_log_probs"][row, start:end] += by

    def step(self) -> dict[str, Any]:
        result: dict[str, Any] = self.trainer._update_actor(self.batch).meta_info["metrics"]
        return result


@pytest.fixture(name="make")
def _make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *args, **kwargs: Trainer(tmp_path, monkeypatch, *args, **kwargs)


def test_the_figures_are_among_verls_metrics_and_in_the_record(tmp_path: Path, make: Any) -> None:
    from verl.utils.metric import reduce_metrics

    trainer = make(Thresholds())
    metrics = reduce_metrics(trainer.step())
    sampled = sum(t.sampled_len for t in trainer.told if not t.masked)
    assert metrics["actor/loss"] == 1.0 and "agentloop/train_side_s" in metrics
    assert metrics["agentloop/consistency/tokens"] == sampled
    assert metrics["agentloop/consistency/mean_abs"] == pytest.approx(0.01, rel=1e-4)
    assert metrics["agentloop/consistency/beyond"] == 0
    (event,) = read_events(tmp_path)
    assert (event["step"], event["update"], event["action"], event["beyond"]) == (2, 0, None, [])
    groups = event["report"]["by"]
    assert [group["name"] for group in groups["turn"]] == ["0", "1", "2"]
    assert [group["name"] for group in groups["staleness"]] == ["0"], "sampled by version 1, trained in step 2"


def test_a_step_beyond_a_threshold_stops_the_run_before_it_trains(tmp_path: Path, make: Any) -> None:
    trainer = make(Thresholds(max_mean_abs=0.05, action="stop"))
    trainer.drift(6, 1, -2.0)
    with pytest.raises(ConsistencyError) as error:
        trainer.step()
    assert trainer.trained == [], "the actor was not updated"
    sentence = str(error.value)
    assert sentence.startswith("step 2: trainer and rollout are too far apart: mean_abs is 0.")
    assert "beyond agentloop.consistency.max_mean_abs=0.05; worst turn: turn 1 of trajectory g-1_2 (max_abs 1.99" in sentence
    (event,) = read_events(tmp_path)
    assert event["action"] == "stop" and event["beyond"][0]["sentence"] == sentence
    assert (tmp_path / "train_side" / "step_000002.u0.g1.rows").is_file(), "what it was judged by can be looked at"


def test_a_warning_does_not_stop(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(Thresholds(max_abs=1.0))
    trainer.drift(6, 1, -2.0)
    with caplog.at_level(logging.WARNING):
        assert trainer.step()["agentloop/consistency/beyond"] == 1
    assert len(trainer.trained) == 1 and "max_abs is 1.99" in caplog.text and "trajectory g-1_2" in caplog.text


def test_thresholds_need_no_train_side(tmp_path: Path, make: Any) -> None:
    trainer = make(Thresholds(max_abs=0.5, action="stop"), train_side=False)
    assert "agentloop/train_side_s" not in trainer.step() and not (tmp_path / "train_side").exists()
    trainer.drift(0, 0, 1.0)
    with pytest.raises(ConsistencyError, match="turn 0 of trajectory g-0_0"):
        trainer.step()


def test_what_rejection_sampling_took_out_is_judged_all_the_same(make: Any) -> None:
    trainer = make(Thresholds(max_abs=0.5, action="stop"))
    trainer.drift(6, 1, 3.0)
    trainer.batch.batch["response_mask"][6] = 0
    with pytest.raises(ConsistencyError, match="turn 1 of trajectory g-1_2"):
        trainer.step()


def test_a_batch_that_cannot_be_compared_stops_a_run_that_would_stop(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(Thresholds(max_abs=0.5, action="stop"))
    del trainer.batch.batch["old_log_probs"]
    with pytest.raises(ConsistencyError, match="step 2: trainer and rollout could not be compared: KeyError"):
        trainer.step()
    trainer = make(Thresholds(max_abs=0.5))
    del trainer.batch.batch["old_log_probs"]
    assert trainer.step().keys() <= {"actor/loss", "agentloop/train_side_s"} and trainer.judge.errors == 1
    assert "could not be compared; training goes on" in caplog.text


def test_a_dataproto_is_compared_with_and_without_our_keys(make: Any) -> None:
    trainer = make(Thresholds())
    trainer.drift(6, 1, -2.0)
    found = consistency(trainer.batch, step=2)
    assert (found.worst_turns[0]["id"], found.worst_turns[0]["turn"]) == ("g-1_2", 1)
    assert found.trajectories == 7, "a masked one has a filler"
    for name in ("agentloop_row", "agentloop_sampled"):
        del trainer.batch.non_tensor_batch[name]
    again = consistency(trainer.batch, step=2)
    assert again.all == found.all and again.worst_turns[0]["turn"] == 1


def test_the_record_and_the_batch_agree_on_where(tmp_path: Path, make: Any) -> None:
    from agentloop.journal import JournalWriter

    trainer = make(Thresholds())
    with JournalWriter(tmp_path) as writer:
        for trajectory in trainer.told:
            writer.trajectory_start(trajectory)
            for turn in trajectory.turns:
                writer.turn(trajectory, turn)
                writer.observation(trajectory, turn)
            writer.trajectory_end(trajectory)
    trainer.drift(3, 2, 0.7)
    trainer.step()
    record, (event,) = consistency(Run(tmp_path)), read_events(tmp_path)
    told = event["report"]["all"]
    assert record.all.ratio == pytest.approx(told.pop("ratio"))
    assert {name: value for name, value in record.all.to_dict().items() if name != "ratio"} == pytest.approx(told)
    for tokens in (record.worst_tokens, event["report"]["worst_tokens"]):
        first = trainer.told[3].turns[2].start - trainer.told[3].prompt_len
        assert {(token["id"], token["turn"]) for token in tokens[:6]} == {("g-0_3", 2)}
        assert sorted(token["response_position"] for token in tokens[:6]) == list(range(first, first + 6))


def test_rows_of_the_v1_contract_are_compared_as_the_padded_batch_is(make: Any) -> None:
    """Rows as the rollout workers put them into TransferQueue, with what the trainer adds, after rejection sampling."""
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    trainer = make(Thresholds())
    trainer.drift(6, 1, -2.0)
    padded = consistency(trainer.batch, step=2)
    fields, real = [], []
    for place, trajectory in enumerate(trainer.told):
        if trajectory.masked:
            continue
        row, tag = to_rows(trajectory)
        row["old_log_probs"] = trainer.batch.batch["old_log_probs"][place, : trajectory.response_len]
        if place == 6:
            row["response_mask"] = row["response_mask"] * 0
        names = ("responses", "response_mask", "loss_mask", "rollout_log_probs", "old_log_probs")
        fields.append({name: row[name] for name in names})
        real.append((row_key(trajectory), tag))
    found = consistency(rows_of_fields(real, list_of_dict_to_tensordict(fields)), step=2)
    assert found.all == padded.all and found.by == padded.by and found.worst_turns == padded.worst_turns


def test_a_batch_of_another_loop_is_compared_too() -> None:
    """Nothing but both sides and a mask; the step is the batch's own."""
    import torch
    from verl.protocol import DataProto

    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    rollout = -torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) * mask
    trainer = rollout.clone()
    trainer[0, 6] -= 1.5
    fields = {"old_log_probs": trainer, "rollout_log_probs": rollout, "response_mask": mask}
    batch = DataProto.from_dict(fields, meta_info={"global_steps": 7})
    found = consistency(batch)
    assert (found.all.tokens, found.steps[0].step, [group.name for group in found.by["turn"]]) == (7, 7, ["0", "1"])
    worst = found.worst_tokens[0]
    assert (worst["turn"], worst["response_position"], worst["in_turn"], worst["token_id"]) == (1, 6, 1, None)
    assert worst["diff"] == pytest.approx(-1.5)
    assert [group.name for group in found.by["staleness"]] == ["not recorded"]
