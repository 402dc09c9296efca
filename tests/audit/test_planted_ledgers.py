"""Bugs planted in ledgers: each is found, by its invariant and at its first token, in memory and in the record of a run."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from agentloop.audit import Report, audit_run, audit_trajectories
from agentloop.journal import token_bytes
from agentloop.trajectory import EndReason, Origin, Reward, State, StopReason, Trajectory, Turn
from tests.audit.planted import moved, pieces_of, rebuilt, segment_at, write
from tests.audit.rollouts import Maker, renderer_of

NAME = "qwen-like"


@dataclass
class Planted:
    """A step with a bug in it."""

    trajectories: list[Trajectory]
    invariant: str
    victim: str
    token: int | None = None
    """The first token that is wrong; `None`: it is about no token."""
    only_record: bool = False
    """Only the record can show it."""
    only_memory: bool = False
    """The record has not got it."""


@cache
def step(name: str = NAME) -> tuple[Trajectory, ...]:
    maker = Maker(name, 1, plain=True)
    return tuple(t for g in range(3) for t in maker.group(f"g{g}", 4))


def victim_of(trajectories: list[Trajectory]) -> int:
    """One with at least three turns that ended with an answer."""
    return next(
        i for i, t in enumerate(trajectories) if len(t.turns) >= 3 and t.end_reason is EndReason.FINAL_ANSWER and t.sibling == 1
    )


def with_victim(make: Callable[[Trajectory], Trajectory], invariant: str, token: Callable[[Trajectory], int] | None) -> Planted:
    trajectories = list(step())
    at = victim_of(trajectories)
    good = trajectories[at]
    trajectories[at] = make(good)
    return Planted(trajectories, invariant, good.id, None if token is None else token(good))


def changed_turn(t: Trajectory, index: int, **fields: Any) -> Trajectory:
    made = rebuilt(t, pieces_of(t))
    made.turns[index] = replace(made.turns[index], **fields)
    return made


def start(turn: int, plus: int = 0) -> Callable[[Trajectory], int]:
    return lambda t: t.turns[turn].start + plus


def end(turn: int, plus: int = 0) -> Callable[[Trajectory], int]:
    return lambda t: t.turns[turn].end + plus


# -- the bugs -------------------------------------------------------------------------------------------------------------


def retokenised_history() -> Planted:
    """Turn 0 as the tokenizer would write it anew: the same text, other ids, and turns that lie accordingly."""
    tokenizer, _ = renderer_of(NAME)
    byte_of = {token_bytes(tokenizer)(i): i for i in range(len(tokenizer))}

    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        at = segment_at(t, Origin.SAMPLED, 0)
        origin, ids, turn, _ = pieces[at]
        text = b"".join(token_bytes(tokenizer)(i) for i in ids[:-1])
        again = [byte_of[bytes([byte])] for byte in text] + [ids[-1]]
        pieces[at] = (origin, again, turn, [-0.5 - random.Random(i).random() for i in range(len(again))])
        turns = moved(t, t.turns[1].start, len(again) - len(ids), crc=False)
        turns[0] = replace(turns[0], end=turns[0].start + len(again), max_tokens=4000)
        return rebuilt(t, pieces, turns)

    return with_victim(make, "prefix", start(0))


def segment_changed_by_hand() -> Planted:
    """One that keeps what was appended beside what it says."""

    def make(t: Trajectory) -> Trajectory:
        made = rebuilt(t, pieces_of(t))
        at = segment_at(t, Origin.SAMPLED, 0)
        ids = list(t.segments[at].ids)
        ids[4] += 1
        made._ids[t.segments[at].start + 4] += 1
        made._segments = [*t.segments[:at], replace(t.segments[at], ids=tuple(ids)), *t.segments[at + 1 :]]
        return made

    planted = with_victim(make, "prefix", start(0, 4))
    planted.only_memory = True
    return planted


def history_changed_in_place() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        at = segment_at(t, Origin.OBSERVATION, 0)
        pieces[at][1][0] += 1  # type: ignore[index]
        return rebuilt(t, pieces)

    return with_victim(make, "prefix", start(0))


def mask_shifted_by_one() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        at = segment_at(t, Origin.SAMPLED, 1)
        (o1, before, t1, _), (o2, ids, t2, values) = pieces[at - 1], pieces[at]
        o3, after, t3, _ = pieces[at + 1]
        assert values is not None
        pieces[at - 1] = (o1, [*before, ids[0]], t1, None)
        pieces[at] = (o2, [*ids[1:], after[0]], t2, values)
        pieces[at + 1] = (o3, after[1:], t3, None)
        return rebuilt(t, pieces)

    return with_victim(make, "mask", start(1))


def tool_tokens_trained() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        at = segment_at(t, Origin.OBSERVATION, 0)
        _, ids, turn, _ = pieces[at]
        pieces[at] = (Origin.SAMPLED, ids, turn, [0.0] * len(ids))
        return rebuilt(t, pieces)

    return with_victim(make, "mask", lambda t: t.segments[segment_at(t, Origin.OBSERVATION, 0)].start)


def tool_tokens_trained_as_part_of_the_turn() -> Planted:
    """The turn says so too, and every number is there."""

    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        at = segment_at(t, Origin.SAMPLED, 0)
        stop = segment_at(t, Origin.SAMPLED, 1)
        ids = [i for piece in pieces[at:stop] for i in piece[1]]
        values = [*(pieces[at][3] or ()), *(-random.Random(i).expovariate(1) for i in range(len(ids) - len(pieces[at][1])))]
        turns = list(t.turns)
        turns[0] = replace(turns[0], end=turns[0].start + len(ids))
        return rebuilt(t, [*pieces[:at], (Origin.SAMPLED, ids, 0, values), *pieces[stop:]], turns)

    return with_victim(make, "mask", end(0))


def prompt_trained() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        _, ids, _, _ = pieces[0]
        pieces[:1] = [(Origin.PROMPT, ids[:-5], -1, None), (Origin.SAMPLED, ids[-5:], 0, [-0.5] * 5)]
        return rebuilt(t, pieces)

    return with_victim(make, "mask", start(0, -5))


def log_prob_of_a_tools_token() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        at = segment_at(t, Origin.OBSERVATION, 0)
        origin, ids, turn, _ = pieces[at]
        pieces[at] = (origin, ids, turn, [-1.0] * len(ids))
        return rebuilt(t, pieces)

    return with_victim(make, "log_probs", lambda t: t.segments[segment_at(t, Origin.OBSERVATION, 0)].start)


def values_of_turn(index: int, change: Callable[[list[float]], list[float]], invariant: str, at: int) -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        place = segment_at(t, Origin.SAMPLED, index)
        origin, ids, turn, values = pieces[place]
        assert values is not None
        pieces[place] = (origin, ids, turn, change(list(values)))
        return rebuilt(t, pieces)

    return with_victim(make, invariant, start(index, at))


def log_prob_nan() -> Planted:
    return values_of_turn(1, lambda v: [*v[:2], float("nan"), *v[3:]], "log_probs", 2)


def log_prob_minus_infinity() -> Planted:
    return values_of_turn(1, lambda v: [*v[:2], float("-inf"), *v[3:]], "log_probs", 2)


def log_prob_above_zero() -> Planted:
    return values_of_turn(1, lambda v: [*v[:2], 0.7, *v[3:]], "log_probs", 2)


def probability_instead_of_its_logarithm() -> Planted:
    return values_of_turn(1, lambda v: [2.718281828**x for x in v], "log_probs", 0)


def one_log_prob_is_zero() -> Planted:
    return values_of_turn(1, lambda v: [*v[:2], 0.0, *v[3:]], "log_probs", 2)


def turn_without_log_probs() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        place = segment_at(t, Origin.SAMPLED, 1)
        pieces[place] = (*pieces[place][:3], None)
        return rebuilt(t, pieces)

    return with_victim(make, "log_probs", start(1))


def stale_log_probs_after_a_retry() -> Planted:
    """The second attempt has other tokens, and the first one's numbers."""
    trajectories = list(step())
    at = victim_of(trajectories)
    first, again = trajectories[at], trajectories[at + 1]
    failed = rebuilt(first, pieces_of(first))
    failed.masked, failed.reward, failed.state, failed.end_reason = True, None, State.FAILED, EndReason.TOOL_FAILURE
    pieces = pieces_of(again)
    place = segment_at(again, Origin.SAMPLED, 0)
    origin, ids, turn, values = pieces[place]
    old = first.segments[segment_at(first, Origin.SAMPLED, 0)]
    assert values is not None
    assert old.log_probs is not None
    n = min(len(values), len(old.log_probs))
    pieces[place] = (origin, ids, turn, [*old.log_probs[:n], *values[n:]])
    retried = rebuilt(again, pieces)
    retried.sibling, retried.attempt = first.sibling, 1
    for turn_ in retried.turns:
        turn_.seed = None
    differs = next(i for i in range(n) if ids[i] != old.ids[i])
    trajectories[at : at + 1] = [failed, retried]
    return Planted(trajectories, "log_probs", retried.id, again.turns[0].start + differs)


def lost_end_of_turn_token() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        place = segment_at(t, Origin.SAMPLED, 1)
        origin, ids, turn, values = pieces[place]
        assert values is not None
        pieces[place] = (origin, ids[:-1], turn, values[:-1])
        turns = moved(t, t.turns[2].start, -1)
        turns[1] = replace(turns[1], end=turns[1].end - 1)
        return rebuilt(t, pieces, turns)

    return with_victim(make, "end_of_turn", end(1, -2))


def doubled_end_of_turn_token() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        place = segment_at(t, Origin.TEMPLATE, 1)
        origin, ids, turn, _ = pieces[place]
        pieces[place] = (origin, [t.input_ids[t.turns[1].end - 1], *ids], turn, None)
        return rebuilt(t, pieces, moved(t, t.turns[2].start, 1))

    return with_victim(make, "end_of_turn", end(1))


def cut_but_said_stop() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        origin, ids, turn, values = pieces[-1]
        assert values is not None
        pieces[-1] = (origin, ids[:-2], turn, values[:-2])
        turns = [*t.turns[:-1], replace(t.turns[-1], end=t.turns[-1].end - 2)]
        return rebuilt(t, pieces, turns)

    return with_victim(make, "end_of_turn", end(-1, -3))


def cut_but_counts_as_finished() -> Planted:
    return with_victim(
        lambda t: changed_turn(t, -1, stop_reason=StopReason.LENGTH, max_tokens=None), "end_of_turn", end(-1, -1)
    )


def forced_token_marked_sampled() -> Planted:
    """A turn was cut; the closing that the renderer wrote counts as the model's."""

    def make(t: Trajectory) -> Trajectory:
        return changed_turn(t, 1, stop_reason=StopReason.LENGTH, max_tokens=t.turns[1].end - t.turns[1].start - 1)

    return with_victim(make, "mask", end(1, -1))


def aborted_tokens_kept() -> Planted:
    return with_victim(lambda t: changed_turn(t, 1, stop_reason=StopReason.ABORTED), "end_of_turn", start(1))


def weight_version_falls() -> Planted:
    return with_victim(lambda t: changed_turn(t, 0, weight_version=9, min_weight_version=9), "weight_versions", start(1))


def weight_versions_mixed_and_not_labelled() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        turn = t.turns[-1]
        newest = (turn.weight_version or 0) + 1
        return changed_turn(t, -1, weight_version=newest, version_runs=((newest, turn.end - turn.start),))

    return with_victim(make, "weight_versions", start(-1))


def weight_versions_of_too_few_tokens() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        turn = t.turns[-1]
        return changed_turn(t, -1, version_runs=((turn.weight_version, turn.end - turn.start - 1),))

    return with_victim(make, "weight_versions", start(-1))


def turn_missing() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = [piece for piece in pieces_of(t) if piece[2] != 1]
        gone = t.turns[2].start - t.turns[1].start
        turns = [turn for turn in moved(t, t.turns[2].start, -gone) if turn.index != 1]
        return rebuilt(t, pieces, turns)

    return with_victim(make, "turns", start(1))


def turn_missing_and_numbered_anew() -> Planted:
    """The engine was given the whole conversation, of which the ledger has lost a turn."""

    def make(t: Trajectory) -> Trajectory:
        pieces = [(o, ids, k - (k > 1), v) for o, ids, k, v in pieces_of(t) if k != 1]
        gone = t.turns[2].start - t.turns[1].start
        turns = [turn for turn in moved(t, t.turns[2].start, -gone, crc=False) if turn.index != 1]
        turns = [replace(turn, index=i, calls=turn.calls if i == 0 else []) for i, turn in enumerate(turns)]
        return rebuilt(t, pieces, turns)

    return with_victim(make, "prefix", start(0))


def answer_lost() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = [piece for piece in pieces_of(t) if piece[2] != 1 or piece[0] is Origin.SAMPLED]
        return rebuilt(t, pieces, moved(t, t.turns[2].start, t.turns[1].end - t.turns[2].start))

    return with_victim(make, "observation", end(1))


def answer_of_another_call() -> Planted:
    """Two turns' answers have changed places, in the tokens and not in what the tools said."""

    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        a, b = segment_at(t, Origin.OBSERVATION, 0), segment_at(t, Origin.OBSERVATION, 1)
        pieces[a], pieces[b] = (pieces[a][0], pieces[b][1], 0, None), (pieces[b][0], pieces[a][1], 1, None)
        grown = len(pieces[a][1]) - len(pieces[b][1])
        turns = [replace(turn, prompt_crc=None) for turn in t.turns]
        turns[1] = replace(turns[1], start=turns[1].start + grown, end=turns[1].end + grown)
        return rebuilt(t, pieces, turns)

    def first(t: Trajectory) -> int:
        a, b = (t.segments[segment_at(t, Origin.OBSERVATION, turn)] for turn in (0, 1))
        return a.start + next(i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y)

    return with_victim(make, "observation", first)


def call_of_another_turn() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        return changed_turn(t, 1, calls=list(t.turns[0].calls))

    return with_victim(make, "observation", end(1))


def template_drifts_by_a_line_end() -> Planted:
    tokenizer, _ = renderer_of(NAME)

    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        place = segment_at(t, Origin.TEMPLATE, 1)
        newline = tokenizer.encode("\n", add_special_tokens=False)
        origin, ids, turn, _ = pieces[place]
        assert list(ids[:1]) == newline
        pieces[place] = (origin, ids[1:], turn, None)
        return rebuilt(t, pieces, moved(t, t.turns[2].start, -1))

    return with_victim(make, "observation", end(1))


def opening_drifts_by_a_line_end() -> Planted:
    """In the opening of the model's turn, everywhere."""
    trajectories = []
    tokenizer, _ = renderer_of(NAME)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    for t in step():
        pieces, made, turns = [], t, list(t.turns)
        for place, piece in enumerate(pieces_of(t)):
            following = t.segments[place + 1] if place + 1 < len(t.segments) else None
            if piece[0] is Origin.TEMPLATE and following is not None and following.origin is Origin.SAMPLED:
                piece = (piece[0], [*piece[1], *newline], piece[2], None)
                turns = [
                    replace(
                        turn,
                        start=turn.start + (turn.index > piece[2]),
                        end=turn.end + (turn.index > piece[2]),
                        prompt_crc=None,
                    )
                    for turn in turns
                ]
            pieces.append(piece)
        made = rebuilt(t, pieces, turns)
        trajectories.append(made)
    first = next(t for t in step() if len(t.turns) > 1)
    return Planted(trajectories, "observation", first.id, first.turns[1].start)


def left_truncated_prompt() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        pieces = pieces_of(t)
        pieces[0] = (Origin.PROMPT, pieces[0][1][7:], -1, None)
        return rebuilt(t, pieces, moved(t, 0, -7))

    return with_victim(make, "prompt", lambda t: 0)


def left_truncated_prompt_of_all_siblings() -> Planted:
    trajectories = []
    for t in step():
        if t.sample.uid == "g1":
            pieces = pieces_of(t)
            pieces[0] = (Origin.PROMPT, pieces[0][1][1:], -1, None)
            t = rebuilt(t, pieces, moved(t, 0, -1))
        trajectories.append(t)
    return Planted(trajectories, "prompt", "g1_0", 0)


def sibling_of_another_prompt() -> Planted:
    trajectories = list(step())
    stranger = copy.copy(trajectories[5])
    stranger.sample, stranger.sibling = trajectories[0].sample, 2
    trajectories[2] = stranger
    wanted, got = trajectories[0].prompt_ids, stranger.prompt_ids
    at = next(i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b)
    return Planted(trajectories, "group", stranger.id, at)


def sibling_missing() -> Planted:
    trajectories = [t for t in step() if t.id != "g1_1"]
    return Planted(trajectories, "group", "g1_3", only_record=True)  # a caller may audit some of a group


def sibling_at_another_temperature() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        made = rebuilt(t, pieces_of(t))
        made.sampling = {**(t.sampling or {}), "temperature": 0.2}
        return made

    return with_victim(make, "group", None)


def same_id_twice() -> Planted:
    trajectories = list(step())
    other = copy.copy(trajectories[3])
    return Planted([*trajectories, other], "identity", other.id)


def reward_nan() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        made = rebuilt(t, pieces_of(t))
        made.reward = Reward(float("nan"), {"right": 1.0})
        return made

    return with_victim(make, "reward", None)


def reward_lost() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        made = rebuilt(t, pieces_of(t))
        made.reward = None
        return made

    return with_victim(make, "reward", None)


def failed_but_trained() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        made = rebuilt(t, pieces_of(t))
        made.state, made.end_reason = State.FAILED, EndReason.ENGINE_FAILURE
        return made

    return with_victim(make, "masked", None)


def masked_but_rewarded() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        made = rebuilt(t, pieces_of(t))
        made.state, made.masked, made.end_reason = State.FAILED, True, EndReason.ENGINE_FAILURE
        return made

    return with_victim(make, "masked", None)


def seed_of_a_sibling() -> Planted:
    trajectories = list(step())
    at = victim_of(trajectories)
    return with_victim(lambda t: changed_turn(t, 0, seed=trajectories[at - 1].turns[0].seed), "group", start(0))


def call_that_the_model_did_not_write() -> Planted:
    def make(t: Trajectory) -> Trajectory:
        record = t.turns[1].calls[0]
        other = replace(record, call=replace(record.call, arguments={"key": "0.123999"}))
        return changed_turn(t, 1, calls=[other])

    return with_victim(make, "observation", end(1))


def turn_over_its_budget() -> Planted:
    return with_victim(lambda t: changed_turn(t, 1, max_tokens=3), "lengths", start(1, 3))


BUGS: list[Callable[[], Planted]] = [
    retokenised_history,
    segment_changed_by_hand,
    history_changed_in_place,
    mask_shifted_by_one,
    tool_tokens_trained,
    tool_tokens_trained_as_part_of_the_turn,
    prompt_trained,
    log_prob_of_a_tools_token,
    log_prob_nan,
    log_prob_minus_infinity,
    log_prob_above_zero,
    probability_instead_of_its_logarithm,
    one_log_prob_is_zero,
    turn_without_log_probs,
    stale_log_probs_after_a_retry,
    lost_end_of_turn_token,
    doubled_end_of_turn_token,
    cut_but_said_stop,
    cut_but_counts_as_finished,
    forced_token_marked_sampled,
    aborted_tokens_kept,
    weight_version_falls,
    weight_versions_mixed_and_not_labelled,
    weight_versions_of_too_few_tokens,
    turn_missing,
    turn_missing_and_numbered_anew,
    answer_lost,
    answer_of_another_call,
    call_of_another_turn,
    template_drifts_by_a_line_end,
    opening_drifts_by_a_line_end,
    left_truncated_prompt,
    left_truncated_prompt_of_all_siblings,
    sibling_of_another_prompt,
    sibling_missing,
    sibling_at_another_temperature,
    same_id_twice,
    reward_nan,
    reward_lost,
    failed_but_trained,
    masked_but_rewarded,
    seed_of_a_sibling,
    call_that_the_model_did_not_write,
    turn_over_its_budget,
]


def found(report: Report, planted: Planted) -> None:
    named = [f for f in report.of(planted.invariant) if f.trajectory == planted.victim]
    assert named, f"{planted.invariant} of {planted.victim} was not found:\n{report.render()}"
    assert named[0].token == planted.token, report.render()
    if planted.token is not None:
        victim = next(t for t in planted.trajectories if t.id == planted.victim)
        assert named[0].token_id in (victim.input_ids[planted.token : planted.token + 1] or [None])


def test_the_good_step_is_good(tmp_path: Path) -> None:
    tokenizer, renderer = renderer_of(NAME)
    good = list(step())
    audit_trajectories(good, decode=token_bytes(tokenizer)).raise_if_any()
    tools = Maker(NAME, 1, plain=True).loop.tools
    assert tools is not None
    schemas = tools.session(good[0].sample, "x").schemas
    report = audit_run(write(tmp_path, NAME, good, tools=schemas), renderer=renderer)
    report.raise_if_any()
    assert report.trajectories == 12
    assert report.tokens == sum(len(t) for t in good)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_in_a_ledger_is_found(bug: Callable[[], Planted], tmp_path: Path) -> None:
    planted = bug()
    tokenizer, _ = renderer_of(NAME)
    if not planted.only_record:
        found(audit_trajectories(planted.trajectories, decode=token_bytes(tokenizer)), planted)
    if planted.only_memory:
        return
    report = audit_run(write(tmp_path, NAME, planted.trajectories))
    found(report, planted)
    others = {f.trajectory for f in report.findings} - {planted.victim}
    if bug not in (opening_drifts_by_a_line_end, left_truncated_prompt_of_all_siblings):
        assert not others, f"others are accused: {report.render()}"


def test_a_doubled_bos_is_found() -> None:
    name = "llama-like"
    tokenizer, _ = renderer_of(name)
    good = list(step(name))
    pieces = pieces_of(good[0])
    pieces[0] = (Origin.PROMPT, [pieces[0][1][0], *pieces[0][1]], -1, None)
    bad = rebuilt(good[0], pieces, moved(good[0], 0, 1))
    audit_trajectories(good, decode=token_bytes(tokenizer)).raise_if_any()
    for trajectories in ([bad, *good[1:]], [bad]):
        report = audit_trajectories(trajectories, decode=token_bytes(tokenizer))
        assert [(f.trajectory, f.token) for f in report.of("prompt")] == [(bad.id, 1)]


def test_what_an_engine_was_really_given_is_held_against_the_ledger() -> None:
    maker = Maker(NAME, 1, plain=True)
    trajectory = maker.group("g0", 1)[0]
    given = [list(call.ids or ()) for call in maker.engine.calls]
    audit_trajectories([trajectory], prompts={trajectory.id: given}).raise_if_any()
    given[2][trajectory.turns[0].start + 3] += 1
    report = audit_trajectories([trajectory], prompts={trajectory.id: given})
    assert [(f.token, f.turn) for f in report.of("prefix")] == [(trajectory.turns[0].start + 3, 0)]
    report = audit_trajectories([trajectory], prompts={trajectory.id: given[:1]})
    assert report.of("prefix")[0].token == trajectory.turns[1].start


def test_a_renderer_finds_what_majorities_cannot(tmp_path: Path) -> None:
    """Glue that is wrong in the same way everywhere."""
    planted = opening_drifts_by_a_line_end()
    _, renderer = renderer_of(NAME)
    one = [t for t in planted.trajectories if t.id == planted.victim]
    report = audit_run(write(tmp_path, NAME, one), renderer=renderer)
    assert report.of("observation")[0].token == planted.token
    assert isinstance(report.of("observation")[0].expected, str)


def test_turns_are_named(tmp_path: Path) -> None:
    planted = log_prob_nan()
    finding = audit_run(write(tmp_path, NAME, planted.trajectories)).findings[0]
    assert (finding.turn, finding.step, finding.partition) == (1, 1, "train")
    assert finding.text
    assert f"turn 1, token {planted.token} (" in str(finding)
    assert isinstance(Turn, type)
