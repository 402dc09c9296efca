"""`to_frame`: what is in the frames is what the ledger had."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentloop.errors import ConfigError
from agentloop.journal import JournalWriter, Run
from agentloop.replay import to_frame
from tests.journal.conversations import conversation, decode
from tests.replay.runs import DIFFERENT, HOSTILE, STEPS, Recorded, planted_badges

pd = pytest.importorskip("pandas", reason="dataframes need pandas")

KEY = ["partition", "step", "id"]


def test_trajectories_are_those_of_the_run(recorded: Recorded) -> None:
    frame = to_frame(recorded.path).set_index(KEY)
    assert set(frame.index) == set(recorded.trajectories)
    for key, trajectory in recorded.trajectories.items():
        row = frame.loc[key]
        if not row.complete:
            assert key == ("train", 3, "trouble_3")
            assert pd.isna(row.end_reason) and math.isnan(row.reward) and math.isnan(row.total_s)
            continue
        assert (row.end_reason, row.turns, row.tokens) == (trajectory.end_reason, len(trajectory.turns), len(trajectory))
        assert row.sampled_tokens == trajectory.sampled_len
        if trajectory.reward is None:
            assert math.isnan(row.reward) and math.isnan(row["reward/answer"])
        else:
            assert (row.reward, row["reward/length"]) == (trajectory.reward.value, trajectory.reward.components["length"])
    assert str(frame.started.dtype) == "datetime64[ns, UTC]"


def test_badges_are_exactly_the_planted_ones(recorded: Recorded) -> None:
    frame = to_frame(recorded.path, partition="train")
    for row in frame.itertuples():
        assert set(row.badges) == planted_badges(row.step, row.id), (row.step, row.id)
    assert not any(to_frame(recorded.path, partition="val").badges)


def test_counts_that_stand_in_the_events(recorded: Recorded) -> None:
    frame = to_frame(recorded.path, steps=1).set_index("id")
    assert frame.parse_errors["trouble_1"] == 1
    assert frame.retries["flat_0"] == 1
    assert frame.retries["even_0"] == 0
    assert (frame.cut_turns["limits_1"], frame.cut_turns["limits_0"]) == (1, 0)
    assert (frame.min_weight_version["trouble_2"], frame.max_weight_version["trouble_2"]) == (0, 1)
    last = to_frame(recorded.path, steps=3, ids="trouble_3").iloc[0]
    assert last.parse_errors is pd.NA, "known when it has ended"


def test_the_train_side_is_there_as_far_as_it_has_arrived(recorded: Recorded) -> None:
    frame = to_frame(recorded.path, partition="train").set_index(["step", "id"])
    arrived = frame["train/step"].notna()
    assert [int(arrived[step].sum()) for step in STEPS] == [15, 7, 0]
    assert frame["train/diff_max"][DIFFERENT] == pytest.approx(1.4)
    assert frame["train/advantage"][(1, "flat_0")] == 0
    assert math.isnan(frame["train/advantage"][(3, "flat_0")])
    without = to_frame(recorded.path, train_side=False)
    assert not [name for name in without if name.startswith("train/")]


def test_a_row_a_turn(recorded: Recorded) -> None:
    frame = to_frame(recorded.path, "turn").set_index([*KEY, "turn"])
    for (partition, step, key), trajectory in recorded.trajectories.items():
        if (step, key) == (3, "trouble_3"):
            continue
        for turn in trajectory.turns:
            row = frame.loc[(partition, step, key, turn.index)]
            assert (row.start, row.end, row.stop_reason) == (turn.start, turn.end, turn.stop_reason)
            assert row.generate_s == pytest.approx(turn.generate_s)
            (segment,) = [s for s in trajectory.segments if s.start == turn.start and s.ids]
            assert row.log_prob == pytest.approx(np.mean(segment.log_probs or []), rel=1e-5)
            assert (row.tool_calls, row.parse_errors) == (len(turn.calls), "\n".join(turn.parse_errors))
    assert math.isnan(frame.loc[("train", 3, "trouble_3", 0)].tools_s)
    assert not frame.mixed_versions.any(), "the weights changed between turns, not within them"
    assert frame["train/diff_max"].max() == pytest.approx(1.4)


def test_a_row_a_call(recorded: Recorded) -> None:
    frame = to_frame(recorded.path, "call")
    assert len(frame) == sum(len(turn.calls) for t in recorded.trajectories.values() for turn in t.turns)
    failed = frame[~frame.ok]
    assert set(failed.id) == {"limits_2"} and set(failed.status) == {"error"}
    hostile = frame[frame.name == "read_page"]
    assert hostile.text.iloc[0] == "index.html: " + HOSTILE.replace("\ud800", "\ufffd"), "the tools replace it"
    assert hostile.arguments.iloc[0] == {"path": "index.html"}
    assert (frame[frame.name == "look_up"].attempts == 2).all()
    two = frame[(frame.id == "limits_3") & (frame.step == 1)]
    assert list(two.call) == [0, 1]


def test_a_row_a_token(recorded: Recorded) -> None:
    frame = to_frame(recorded.path, "token", steps=1, partition="train")
    for key, part in frame.groupby("id", observed=True):
        trajectory = recorded.trajectories["train", 1, key]
        assert list(part.token_id) == trajectory.input_ids
        assert list(part["mask"])[trajectory.prompt_len :] == trajectory.response_mask
        assert part.log_prob.isna().tolist() == [not mask for mask in part["mask"]]
    mine = frame[frame.id == DIFFERENT[1]]
    big = mine[mine["train/diff"].abs() > 0.5]
    assert list(big.position) == recorded.big_differences
    assert set(big.origin) == {"sampled"}
    prompt = mine[mine.origin == "prompt"]
    assert prompt["train/mask"].isna().all() and prompt["train/log_prob"].isna().all() and prompt.weight_version.isna().all()
    flat = frame[frame.id == "flat_0"]
    assert "日本語".encode() in b"".join(flat.piece)
    assert "\\xe6" in set(flat.text), "a split character is shown as the byte that it is"


def test_what_is_not_recorded_is_missing(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as writer:
        conversation(writer, 1, log_probs=False)
        conversation(writer, 2, stop_after="start")
    tokens = to_frame(tmp_path, "token")
    assert tokens.log_prob.isna().all() and tokens.text.isna().all()
    assert not [name for name in tokens if name.startswith("train/")]
    turns = to_frame(tmp_path, "turn")
    assert turns.text.isna().all() and turns.log_prob.isna().all()
    assert list(turns.reward) == [0.5, -0.25, pytest.approx(math.nan, nan_ok=True)]
    assert to_frame(tmp_path, "call", ids="u2_2").empty
    assert "name" in to_frame(tmp_path, "call", ids="u2_2")


def test_damage_is_left_out_with_a_warning(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, decode=decode) as writer:
        for seed in range(3):
            conversation(writer, seed)
    (path,) = tmp_path.rglob("*.tok")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="left out: .*u2_2|left out: .*tok"):
        frame = to_frame(tmp_path, "token")
    assert set(frame.id) == {"u0_0", "u1_1"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"by": "turns"}, "no rows by 'turns'; did you mean 'turn'"),
        ({"steps": 7}, "no trajectories of step 7; it has steps 1 to 3"),
        ({"ids": "even_9"}, "no trajectory 'even_9'; did you mean 'even_"),
        ({"partition": "training"}, "no partition 'training'; did you mean 'train'"),
    ],
)
def test_wrong_arguments_are_one_sentence(recorded: Recorded, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        to_frame(recorded.path, **arguments)


def test_runs_are_found_by_name(recorded: Recorded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len(to_frame(Run(recorded.path), steps=[1, 2], partition="train")) == 32
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mini").symlink_to(recorded.path)
    monkeypatch.chdir(tmp_path)
    assert len(to_frame("mini", steps=3, partition="val")) == 2
    with pytest.raises(ConfigError, match="did you mean 'mini'"):
        to_frame("minni")
