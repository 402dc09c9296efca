"""Bugs planted in padded batches of the real assembly: found against the trajectories, and in it alone where it tells."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentloop.audit import Report, audit_batch, read_batch
from agentloop.batch import to_dataproto, to_rows
from agentloop.errors import ConfigError
from agentloop.journal import Run
from agentloop.trajectory import EndReason, Origin, State, Trajectory
from agentloop.verl.train_side import add_row_keys
from tests.audit.planted import pieces_of, rebuilt, write
from tests.audit.rollouts import Maker, renderer_of

NAME = "qwen-like"
P, R = 320, 1200
VICTIM = 5


@cache
def step() -> tuple[Trajectory, ...]:
    """Three groups of four; two of the last group were given up."""
    maker = Maker(NAME, 1, plain=True)
    trajectories = [t for g in range(3) for t in maker.group(f"g{g}", 4)]
    for place in (10, 11):
        lost = trajectories[place] = rebuilt(trajectories[place], pieces_of(trajectories[place]))
        lost.masked, lost.reward, lost.state, lost.end_reason = True, None, State.FAILED, EndReason.ENGINE_FAILURE
    return tuple(trajectories)


def pad() -> int:
    return int(renderer_of(NAME)[0].convert_tokens_to_ids("<|endoftext|>"))


def make() -> Any:
    """The batch, with advantages as verl computes them."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    data = to_dataproto(step(), prompt_length=P, response_length=R, pad_token_id=pad())
    advantages, _ = compute_grpo_outcome_advantage(
        data.batch["rm_scores"].clone(), data.batch["response_mask"], data.non_tensor_batch["uid"]
    )
    data.batch["advantages"] = advantages
    return data


def lost_prompt_tokens(b: Any) -> None:
    t = step()[VICTIM]
    first = P - t.prompt_len
    b.batch["prompts"][VICTIM, : first + 7] = pad()
    b.batch["input_ids"][VICTIM, : first + 7] = pad()
    b.batch["attention_mask"][VICTIM, : first + 7] = 0
    b.batch["position_ids"][VICTIM] = (b.batch["attention_mask"][VICTIM].cumsum(0) - 1).clip(min=0)


def retokenised(b: Any) -> None:
    """Two tokens of the first turn as one, and what follows moves up."""
    t = step()[VICTIM]
    ids = t.response_ids
    again = [*ids[:3], 400, *ids[5:]]
    b.batch["responses"][VICTIM] = torch.tensor([*again, *[pad()] * (R - len(again))])
    b.batch["input_ids"][VICTIM, P:] = b.batch["responses"][VICTIM]


def shift(name: str, by: int) -> Callable[[Any], None]:
    def plant(b: Any) -> None:
        row = torch.roll(b.batch[name][VICTIM], by, 0)
        row[0 if by > 0 else -1] = 0
        b.batch[name][VICTIM] = row

    return plant


def observation(t: Trajectory) -> slice:
    segment = next(s for s in t.segments if s.origin is Origin.OBSERVATION)
    return slice(segment.start - t.prompt_len, segment.end - t.prompt_len)


def tool_tokens_trained(b: Any) -> None:
    b.batch["response_mask"][VICTIM, observation(step()[VICTIM])] = 1


def padding_trained(b: Any) -> None:
    b.batch["response_mask"][VICTIM, step()[VICTIM].response_len] = 1


def sampled_not_trained(b: Any) -> None:
    b.batch["response_mask"][VICTIM, 2] = 0


def before_temperature(b: Any) -> None:
    b.batch["rollout_log_probs"][VICTIM] *= 0.7


def stale(b: Any) -> None:
    """Those of the sibling before."""
    n = min(t.turns[0].end - t.turns[0].start for t in step()[VICTIM - 1 : VICTIM + 1])
    b.batch["rollout_log_probs"][VICTIM, :n] = b.batch["rollout_log_probs"][VICTIM - 1, :n]


def log_prob(value: float) -> Callable[[Any], None]:
    def plant(b: Any) -> None:
        b.batch["rollout_log_probs"][VICTIM, 2] = value

    return plant


def reward_to(place: Callable[[Trajectory], int]) -> Callable[[Any], None]:
    def plant(b: Any) -> None:
        row = b.batch["rm_scores"][rewarded()]
        value = row.sum()
        row.zero_()
        row[place(step()[rewarded()])] = value

    return plant


def rewarded() -> int:
    return next(i for i, t in enumerate(step()) if t.reward is not None and t.reward.value > 0 and t.sibling)


def reward_twice(b: Any) -> None:
    t = step()[rewarded()]
    assert t.reward is not None
    b.batch["rm_scores"][rewarded(), t.turns[0].end - 1 - t.prompt_len] += t.reward.value


def rewards_swapped(b: Any) -> None:
    i = rewarded()
    j = next(k for k, t in enumerate(step()) if t.reward is not None and t.reward.value != (step()[i].reward or t.reward).value)
    for row, other in ((i, j), (j, i)):
        value = (step()[other].reward or step()[row].reward).value  # type: ignore[union-attr]
        b.batch["rm_scores"][row].zero_()
        b.batch["rm_scores"][row, step()[row].response_len - 1] = value


def reward_nan(b: Any) -> None:
    b.batch["rm_scores"][rewarded(), step()[rewarded()].response_len - 1] = float("nan")


def siblings_swapped(b: Any) -> None:
    for name in ("prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask", "rollout_log_probs"):
        b.batch[name][[VICTIM, VICTIM + 1]] = b.batch[name][[VICTIM + 1, VICTIM]]


def sibling_of_another_prompt(b: Any) -> None:
    for name in b.batch.keys():  # noqa: SIM118
        b.batch[name][VICTIM] = b.batch[name][0]


def wrong_positions(b: Any) -> None:
    """As if there were no padding."""
    b.batch["position_ids"][VICTIM] = torch.arange(P + R)


def positions_off_by_one(b: Any) -> None:
    first = P - step()[VICTIM].prompt_len
    b.batch["position_ids"][VICTIM, first:] += 1


def attention_over_padding(b: Any) -> None:
    b.batch["attention_mask"][VICTIM, P + step()[VICTIM].response_len :] = 1
    b.batch["position_ids"][VICTIM] = (b.batch["attention_mask"][VICTIM].cumsum(0) - 1).clip(min=0)


def attention_over_padding_before(b: Any) -> None:
    b.batch["attention_mask"][VICTIM, P - step()[VICTIM].prompt_len - 1] = 1
    b.batch["position_ids"][VICTIM] = (b.batch["attention_mask"][VICTIM].cumsum(0) - 1).clip(min=0)


def attention_misses_the_last_token(b: Any) -> None:
    b.batch["attention_mask"][VICTIM, P + step()[VICTIM].response_len - 1] = 0


def attention_has_a_hole(b: Any) -> None:
    b.batch["attention_mask"][VICTIM, P + 4] = 0


def prompt_padded_on_the_right(b: Any) -> None:
    n = step()[VICTIM].prompt_len
    for name in ("prompts", "input_ids", "attention_mask"):
        b.batch[name][VICTIM, :P] = torch.roll(b.batch[name][VICTIM, :P], n - P, 0)


def response_cut(b: Any) -> None:
    n = step()[VICTIM].response_len
    b.batch["responses"][VICTIM, n - 4 :] = pad()
    b.batch["input_ids"][VICTIM, P + n - 4 :] = pad()
    for name in ("response_mask", "rollout_log_probs", "advantages"):
        b.batch[name][VICTIM, n - 4 :] = 0
    b.batch["attention_mask"][VICTIM, P + n - 4 :] = 0


def filler_trained(b: Any) -> None:
    b.batch["response_mask"][11, 0] = 1


def filler_in_the_baseline(b: Any) -> None:
    b.non_tensor_batch["uid"][11] = "g2"


def baseline_with_fillers(b: Any) -> None:
    """As verl's own GRPO has it, with a reward of 0 for those that were given up."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    groups = np.array([t.sample.uid for t in step()], dtype=object)
    advantages, _ = compute_grpo_outcome_advantage(b.batch["rm_scores"].clone(), b.batch["response_mask"], groups)
    b.batch["advantages"] = advantages


def filler_rewarded(b: Any) -> None:
    b.batch["rm_scores"][11, 0] = 1.0


def advantage_varies(b: Any) -> None:
    b.batch["advantages"][VICTIM, 3] += 0.25


def advantage_of_no_formula(b: Any) -> None:
    b.batch["advantages"][VICTIM] = b.batch["response_mask"][VICTIM] * 0.77


def advantage_on_tool_tokens(b: Any) -> None:
    b.batch["advantages"][VICTIM, observation(step()[VICTIM])] = 1.0


def advantage_nan(b: Any) -> None:
    b.batch["advantages"][VICTIM, 3] = float("nan")


def group_of_another(b: Any) -> None:
    b.non_tensor_batch["uid"][VICTIM] = "g0"


def turns_miscounted(b: Any) -> None:
    b.non_tensor_batch["__num_turns__"][VICTIM] += 9


def versions_of_another(b: Any) -> None:
    b.non_tensor_batch["min_global_steps"][VICTIM] = 7


def prompt_not_in_input(b: Any) -> None:
    b.batch["input_ids"][VICTIM, P - 1] += 1


def reward_column_of_another_row(b: Any) -> None:
    column = b.non_tensor_batch["length"]
    column[[VICTIM, VICTIM + 1]] = column[[VICTIM + 1, VICTIM]]


def last(t: Trajectory) -> int:
    return t.response_len - 1


Row = tuple[Callable[[Any], None], str, int, int | None, bool]
"""The bug, its invariant, its row, its first token as a place in the response (or, below 0, in the prompt: -1 is the last), and
whether the batch alone shows it."""


def bugs() -> list[Row]:
    t = step()[VICTIM]
    r = step()[rewarded()]
    n = t.prompt_len
    end = t.turns[0].end - n
    seen = observation(t).start
    return [
        (lost_prompt_tokens, "prompt", VICTIM, -n, True),
        (retokenised, "prefix", VICTIM, 3, False),
        (shift("response_mask", 1), "mask", VICTIM, 0, True),
        (shift("response_mask", -1), "mask", VICTIM, end - 1, True),
        (tool_tokens_trained, "mask", VICTIM, seen, False),
        (padding_trained, "mask", VICTIM, t.response_len, True),
        (sampled_not_trained, "mask", VICTIM, 2, False),
        (shift("rollout_log_probs", 1), "log_probs", VICTIM, 0, True),
        (shift("rollout_log_probs", -1), "log_probs", VICTIM, 0, False),
        (before_temperature, "log_probs", VICTIM, 0, False),
        (stale, "log_probs", VICTIM, 0, False),
        (log_prob(0.0), "log_probs", VICTIM, 2, True),
        (log_prob(float("nan")), "log_probs", VICTIM, 2, True),
        (log_prob(0.5), "log_probs", VICTIM, 2, True),
        (reward_to(lambda t: R - 1), "reward", rewarded(), R - 1, True),
        (reward_to(lambda t: t.response_len), "reward", rewarded(), r.response_len, True),
        (reward_to(lambda t: 1), "reward", rewarded(), 1, True),
        (
            reward_to(lambda t: t.turns[0].end - 1 - t.prompt_len),
            "reward",
            rewarded(),
            r.turns[0].end - 1 - r.prompt_len,
            False,
        ),
        (reward_twice, "reward", rewarded(), None, False),
        (rewards_swapped, "reward", rewarded(), None, False),
        (reward_nan, "reward", rewarded(), r.response_len - 1, True),
        (siblings_swapped, "rows", VICTIM, None, False),
        (sibling_of_another_prompt, "group", VICTIM, None, True),
        (wrong_positions, "positions", VICTIM, None, True),
        (positions_off_by_one, "positions", VICTIM, -n, True),
        (attention_over_padding, "padding", VICTIM, t.response_len, True),
        (attention_over_padding_before, "padding", VICTIM, -n - 1, True),
        (attention_misses_the_last_token, "padding", VICTIM, t.response_len - 1, True),
        (attention_has_a_hole, "padding", VICTIM, 4, True),
        (prompt_padded_on_the_right, "padding", VICTIM, None, True),
        (response_cut, "lengths", VICTIM, t.response_len - 4, False),
        (filler_trained, "masked", 11, None, True),
        (filler_in_the_baseline, "masked", 11, None, True),
        (baseline_with_fillers, "advantages", 8, 0, True),
        (filler_rewarded, "masked", 11, None, True),
        (advantage_varies, "advantages", VICTIM, 3, True),
        (advantage_of_no_formula, "advantages", VICTIM, 0, True),
        (advantage_on_tool_tokens, "advantages", VICTIM, seen, True),
        (advantage_nan, "advantages", VICTIM, 3, True),
        (group_of_another, "group", VICTIM, None, True),
        (turns_miscounted, "turns", VICTIM, None, True),
        (versions_of_another, "weight_versions", VICTIM, None, True),
        (prompt_not_in_input, "shape", VICTIM, None, True),
        (reward_column_of_another_row, "reward", VICTIM, None, True),
    ]


def check(report: Report, row: Row, against: bool) -> None:
    _, invariant, number, place, _ = row
    named = [f for f in report.of(invariant) if f.row == number]
    assert named, f"{invariant} of row {number} was not found:\n{report.render()}"
    if place is not None:
        token = step()[number].prompt_len + place
        if invariant in ("prompt", "positions", "padding") and not against:
            return  # counted from where the prompt begins, as far as the batch tells
        if invariant == "prompt":
            token = 0
        assert token in {f.token for f in named}, report.render()


def test_the_good_batch_is_good(tmp_path: Path) -> None:
    batch = make()
    audit_batch(batch).raise_if_any()
    report = audit_batch(batch, list(step()))
    report.raise_if_any()
    assert (report.rows, report.trajectories) == (12, 12)
    audit_batch(batch, list(step()), estimator="grpo").raise_if_any()
    audit_batch([to_rows(t) for t in step() if not t.masked], [t for t in step() if not t.masked]).raise_if_any()
    audit_batch(batch, Run(write(tmp_path, NAME, step()))).raise_if_any()
    batch.reorder(torch.randperm(12))
    audit_batch(batch, tmp_path).raise_if_any()


@pytest.mark.parametrize("row", bugs(), ids=lambda row: row[0].__qualname__.replace(".<locals>.plant", ""))
def test_a_bug_in_a_batch_is_found(row: Row) -> None:
    plant, *_, alone = row
    batch = make()
    plant(batch)
    check(audit_batch(batch, list(step())), row, True)
    if alone:
        check(audit_batch(batch), row, False)


@pytest.mark.parametrize("row", bugs(), ids=lambda row: row[0].__qualname__.replace(".<locals>.plant", ""))
def test_a_bug_is_found_against_the_record_in_any_order(row: Row, run: Path) -> None:
    plant, invariant, number, *_ = row
    batch = make()
    add_row_keys(batch, step())
    plant(batch)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    batch.reorder(order)
    report = audit_batch(batch, run)
    assert int((order == number).nonzero()) in {f.row for f in report.of(invariant)}, report.render()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("run"), NAME, step())


def test_a_width_that_is_off_by_one_is_found() -> None:
    for name in ("response_mask", "attention_mask", "rm_scores", "position_ids", "rollout_log_probs"):
        batch = make()
        tensors = {key: batch.batch[key] for key in batch.batch.keys()}  # noqa: SIM118
        tensors[name] = tensors[name][:, 1:]
        report = audit_batch(tensors, list(step()))
        assert report.of("shape")[0].column == name


def test_rows_of_the_other_contract() -> None:
    good = [t for t in step() if not t.masked]
    rows = [to_rows(t) for t in good]
    fields, tag = rows[VICTIM]
    for change, invariant in (
        ({"response_mask": torch.roll(fields["response_mask"], 1)}, "mask"),
        ({"loss_mask": torch.ones_like(fields["loss_mask"])}, "mask"),
        ({"position_ids": fields["position_ids"] + 1}, "positions"),
        ({"input_ids": fields["input_ids"].flip(0)}, "shape"),
        ({"rollout_log_probs": torch.roll(fields["rollout_log_probs"], 1)}, "log_probs"),
        ({"responses": fields["responses"][:-1]}, "shape"),
    ):
        changed = [*rows[:VICTIM], ({**fields, **change}, tag), *rows[VICTIM + 1 :]]
        report = audit_batch(changed, good)
        assert VICTIM in {f.row for f in report.of(invariant)}, report.render()
    report = audit_batch([*rows[:VICTIM], (fields, {**tag, "response_len": 3}), *rows[VICTIM + 1 :]], good)
    assert report.of("lengths")[0].row == VICTIM


def test_files(tmp_path: Path) -> None:
    batch = make()
    batch.save_to_disk(tmp_path / "good.pkl")
    torch.save({key: batch.batch[key] for key in batch.batch.keys()}, tmp_path / "good.pt")  # noqa: SIM118
    np.savez(tmp_path / "good.npz", **{k: batch.batch[k].numpy() for k in batch.batch.keys()})  # noqa: SIM118
    for name in ("good.pkl", "good.pt", "good.npz"):
        audit_batch(read_batch(tmp_path / name), list(step())).raise_if_any()
    (tmp_path / "bad.pkl").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"bad.pkl: not readable as a batch"):
        read_batch(tmp_path / "bad.pkl")
    torch.save({"prompts": torch.zeros(2, 3)}, tmp_path / "half.pt")
    with pytest.raises(ConfigError, match="no tensor 'responses'"):
        read_batch(tmp_path / "half.pt")
    with pytest.raises(ConfigError, match="no such file"):
        read_batch(tmp_path / "gone.pt")
    with pytest.raises(ConfigError, match="got int"):
        audit_batch(3)


def with_trainer(seed: int = 0) -> Any:
    """The batch with the trainer's log-probabilities, a little off as another kernel's are."""
    batch = make()
    noise = torch.randn(batch.batch["rollout_log_probs"].shape, generator=torch.Generator().manual_seed(seed)) * 0.01
    batch.batch["old_log_probs"] = (batch.batch["rollout_log_probs"] + noise).clip(max=0)
    batch.batch["token_level_scores"] = batch.batch["rm_scores"].clone()
    return batch


def test_the_trainers_log_probs_are_held_against_the_rollouts() -> None:
    audit_batch(with_trainer()).raise_if_any()
    audit_batch(with_trainer(), list(step())).raise_if_any()
    batch = with_trainer()
    batch.batch["rollout_log_probs"] *= 0.95  # as before a temperature a little below 1, everywhere
    assert "correlation" in audit_batch(batch).of("log_probs")[0].message
    batch = with_trainer()
    values, mask = batch.batch["rollout_log_probs"][VICTIM], batch.batch["response_mask"][VICTIM] == 1
    values[mask] = torch.roll(values[mask], 1)
    finding = audit_batch(batch).of("log_probs")[0]
    assert (finding.row, finding.place) == (VICTIM, 0)
    assert "shifted by one" in finding.message
    batch = with_trainer()
    turn = step()[VICTIM].turns[1]
    span = slice(turn.start - step()[VICTIM].prompt_len, turn.end - step()[VICTIM].prompt_len)
    batch.batch["rollout_log_probs"][VICTIM, span] = batch.batch["rollout_log_probs"][VICTIM, span].flip(0)
    finding = audit_batch(batch).of("log_probs")[0]
    assert (finding.row, finding.turn) == (VICTIM, 1)


def test_scores_that_are_not_the_rewards() -> None:
    batch = with_trainer()
    batch.batch["token_level_scores"][VICTIM, 3] += 1
    assert audit_batch(batch).of("reward")[0].row == VICTIM
