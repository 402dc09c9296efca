"""The ledger: what may be appended, what is derived, and that a refused append changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentloop.errors import LedgerError
from agentloop.trajectory import CallRecord, CallStatus, Origin, Sample, Segment, StopReason, ToolCall, Trajectory, Turn

SAMPLE = Sample([{"role": "user", "content": "q"}], uid="u")


def turn(trajectory: Trajectory, length: int, **changes: Any) -> Turn:
    """The turn that fits next."""
    start = len(trajectory)
    values = {"index": len(trajectory.turns), "start": start, "end": start + length, "stop_reason": StopReason.STOP, **changes}
    return Turn(**values)


def sampled(trajectory: Trajectory, ids: list[int], log_probs: list[float] | None = None) -> None:
    trajectory.append_sampled(ids, log_probs, turn(trajectory, len(ids)))


def conversation() -> Trajectory:
    """A prompt, a turn, a tool's answer in its glue, and a second turn."""
    trajectory = Trajectory(SAMPLE)
    trajectory.append_prompt([10, 11, 12])
    sampled(trajectory, [20, 21], [-0.5, -1.5])
    trajectory.append(Origin.TEMPLATE, [30])
    trajectory.append(Origin.OBSERVATION, [40, 41])
    trajectory.append(Origin.TEMPLATE, [31, 32])
    sampled(trajectory, [22], [-0.25])
    return trajectory


def state(trajectory: Trajectory) -> tuple[Any, ...]:
    """Everything that an append could have changed."""
    return (
        list(trajectory.input_ids),
        trajectory.segments,
        trajectory.rolling_hash,
        copy.deepcopy(trajectory.turns),
        trajectory.response_mask,
        trajectory.rollout_log_probs,
    )


# -- derived ---------------------------------------------------------------------------------------------------------


def test_the_arrays_of_a_conversation() -> None:
    trajectory = conversation()
    assert trajectory.input_ids == [10, 11, 12, 20, 21, 30, 40, 41, 31, 32, 22]
    assert (trajectory.prompt_ids, trajectory.prompt_len) == ([10, 11, 12], 3)
    assert (trajectory.response_ids, trajectory.response_len) == ([20, 21, 30, 40, 41, 31, 32, 22], 8)
    assert trajectory.response_mask == [1, 1, 0, 0, 0, 0, 0, 1]
    assert trajectory.rollout_log_probs == [-0.5, -1.5, 0.0, 0.0, 0.0, 0.0, 0.0, -0.25]
    assert trajectory.turn_spans == [(3, 5), (10, 11)]
    assert trajectory.sampled_len == 3
    assert len(trajectory) == 11
    assert [segment.turn for segment in trajectory.segments] == [-1, 0, 0, 0, 0, 1]
    trajectory.check()


def test_an_empty_one() -> None:
    trajectory = Trajectory(SAMPLE)
    assert (trajectory.prompt_ids, trajectory.response_ids, trajectory.response_mask) == ([], [], [])
    assert trajectory.rollout_log_probs == []
    assert len(trajectory) == trajectory.prompt_len == trajectory.response_len == 0
    trajectory.check()


def test_an_empty_generation_is_a_turn_without_a_segment() -> None:
    trajectory = Trajectory(SAMPLE)
    trajectory.append_prompt([1])
    sampled(trajectory, [], [])
    trajectory.append(Origin.TEMPLATE, [2])
    sampled(trajectory, [3], [-1.0])
    assert trajectory.turn_spans == [(1, 1), (2, 3)]
    assert trajectory.response_mask == [0, 1]
    assert [segment.turn for segment in trajectory.segments] == [-1, 0, 1]
    trajectory.check()


def test_log_probabilities_that_were_not_recorded() -> None:
    trajectory = conversation()
    sampled(trajectory, [23], None)
    assert trajectory.rollout_log_probs is None
    assert trajectory.response_mask[-1] == 1


def test_empty_glue_leaves_no_segment() -> None:
    trajectory = conversation()
    before = state(trajectory)
    trajectory.append(Origin.TEMPLATE, [])
    assert state(trajectory) == before


def test_ids_and_numbers_of_any_library_become_pythons_own() -> None:
    trajectory = Trajectory(SAMPLE)
    trajectory.append_prompt(np.array([1, 2], dtype=np.int64))
    trajectory.append_sampled(np.array([3]), np.array([-0.5], dtype=np.float32), turn(trajectory, 1))
    trajectory.append(Origin.OBSERVATION, np.array([4]))
    assert trajectory.input_ids == [1, 2, 3, 4]
    assert {type(i) for i in trajectory.input_ids} == {int}
    assert {type(x) for x in trajectory.segments[1].log_probs or ()} == {float}


def test_the_caller_may_reuse_its_lists() -> None:
    ids, log_probs = [5, 6], [-0.5, -0.5]
    trajectory = Trajectory(SAMPLE)
    trajectory.append_prompt(ids)
    sampled(trajectory, ids, log_probs)
    ids[0], log_probs[0] = 99, -99.0
    assert trajectory.input_ids == [5, 6, 5, 6]
    assert trajectory.rollout_log_probs == [-0.5, -0.5]
    trajectory.check()


def test_the_name_tells_the_group_the_sibling_and_the_attempt() -> None:
    trajectory = Trajectory(SAMPLE, sibling=3)
    assert trajectory.id == "u_3"
    trajectory.attempt = 2
    assert trajectory.id == "u_3_r2"


def test_calls_of_all_turns_in_order() -> None:
    trajectory = conversation()
    records = [CallRecord(ToolCall("t", {}, f"t{i}c0"), CallStatus.OK, "") for i in range(2)]
    for i, record in enumerate(records):
        trajectory.turns[i].calls.append(record)
    assert list(trajectory.calls) == records


def test_the_hash_is_that_of_the_tokens_however_they_were_cut_into_segments() -> None:
    one, other = Trajectory(SAMPLE), Trajectory(SAMPLE)
    for trajectory in (one, other):
        trajectory.append_prompt([1, 2])
        sampled(trajectory, [3])
    one.append(Origin.TEMPLATE, [4, 5])
    other.append(Origin.TEMPLATE, [4])
    assert one.rolling_hash != other.rolling_hash
    other.append(Origin.TEMPLATE, [5])
    assert one.rolling_hash == other.rolling_hash


# -- illegal appends -------------------------------------------------------------------------------------------------

ILLEGAL: dict[str, tuple[Callable[[Trajectory], None], str]] = {
    "a second prompt": (lambda t: t.append_prompt([1]), "only be the first segment"),
    "a turn out of order": (lambda t: t.append_sampled([1], [-1.0], turn(t, 1, index=5)), "turn 5 follows 2 turns"),
    "a turn twice": (lambda t: t.append_sampled([1], [-1.0], turn(t, 1, index=1)), "turn 1 follows 2 turns"),
    "a turn at the wrong place": (lambda t: t.append_sampled([1], [-1.0], turn(t, 1, start=0, end=1)), "its place is 11:12"),
    "a turn of the wrong length": (lambda t: t.append_sampled([1], [-1.0], turn(t, 2)), "its place is 11:12"),
    "too few log-probabilities": (lambda t: t.append_sampled([1, 2], [-1.0], turn(t, 2)), "1 log-probabilities for 2"),
    "too many log-probabilities": (lambda t: t.append_sampled([1], [-1.0, -1.0], turn(t, 1)), "2 log-probabilities for 1"),
    "log-probabilities of nothing": (lambda t: t.append_sampled([], [-1.0], turn(t, 0)), "1 log-probabilities for 0"),
    "not a number": (lambda t: t.append_sampled([1], [math.nan], turn(t, 1)), "not finite"),
    "minus infinity": (lambda t: t.append_sampled([1], [-math.inf], turn(t, 1)), "not finite"),
    "a null log-probability": (lambda t: t.append_sampled([1], [None], turn(t, 1)), "is no number"),  # type: ignore[list-item]
    "a negative id": (lambda t: t.append_sampled([1, -1], [-1.0, -1.0], turn(t, 2)), "not all token ids"),
    "an id too large": (lambda t: t.append_sampled([2**32], None, turn(t, 1)), "not all token ids"),
    "half an id": (lambda t: t.append_sampled([0.5], None, turn(t, 1)), "not all token ids"),  # type: ignore[list-item]
    "text for ids": (lambda t: t.append(Origin.TEMPLATE, "abc"), "not all token ids"),  # type: ignore[arg-type]
    "a negative id in glue": (lambda t: t.append(Origin.TEMPLATE, [7, -1]), "not all token ids"),
    "log-probabilities on a tool": (lambda t: t.append(Origin.OBSERVATION, [1], [-1.0]), "cannot carry log-probabilities"),
    "log-probabilities on glue": (lambda t: t.append(Origin.TEMPLATE, [1], [-1.0]), "cannot carry log-probabilities"),
    "empty log-probabilities on a tool": (lambda t: t.append(Origin.OBSERVATION, [1], []), "cannot carry"),
    "sampled as glue": (lambda t: t.append(Origin.SAMPLED, [1]), "an append of their own"),
    "prompt as glue": (lambda t: t.append(Origin.PROMPT, [1]), "an append of their own"),
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_an_illegal_append_raises_and_changes_nothing(what: str) -> None:
    action, says = ILLEGAL[what]
    trajectory = conversation()
    before = state(trajectory)
    with pytest.raises(LedgerError, match=says) as error:
        action(trajectory)
    assert "trajectory u_0" in str(error.value)
    assert state(trajectory) == before
    trajectory.check()
    sampled(trajectory, [50], [-1.0])  # and it goes on
    trajectory.check()


def test_nothing_comes_before_the_prompt() -> None:
    trajectory = Trajectory(SAMPLE)
    cases: list[tuple[Callable[[], None], str]] = [
        (lambda: trajectory.append_prompt([]), "the prompt is empty"),
        (lambda: trajectory.append_prompt([-1]), "not all token ids"),
        (lambda: sampled(trajectory, [1]), "before a prompt"),
        (lambda: trajectory.append(Origin.TEMPLATE, [1]), "before the first turn"),
    ]
    for action, says in cases:
        with pytest.raises(LedgerError, match=says):
            action()
        assert trajectory.segments == ()
    trajectory.append_prompt([1])
    with pytest.raises(LedgerError, match="before the first turn"):
        trajectory.append(Origin.OBSERVATION, [1])


# -- audits ----------------------------------------------------------------------------------------------------------


def test_the_prefix_audit_names_the_first_token_that_differs() -> None:
    trajectory = conversation()
    ids = list(trajectory.input_ids)
    trajectory.check_prefix(ids)
    trajectory.check_prefix([*ids, 1, 2])
    with pytest.raises(LedgerError, match="differs at token 4 of 11"):
        trajectory.check_prefix([*ids[:4], 99, *ids[5:]])
    with pytest.raises(LedgerError, match="differs at token 10 of 11"):
        trajectory.check_prefix(ids[:10])
    with pytest.raises(LedgerError, match="differs at token 0 of 11"):
        trajectory.check_prefix([])


def test_the_audit_finds_what_was_changed_behind_its_back() -> None:
    def tampered(change: Callable[[Trajectory], object]) -> Trajectory:
        trajectory = conversation()
        change(trajectory)
        return trajectory

    def replace_segment(t: Trajectory, at: int, **changes: Any) -> None:
        old = t._segments[at]
        values = {name: getattr(old, name) for name in ("origin", "ids", "start", "turn", "log_probs")}
        t._segments[at] = Segment(**{**values, **changes})

    cases: list[tuple[Callable[[Trajectory], object], str]] = [
        (lambda t: t.input_ids.append(1), "token buffer differs"),
        (lambda t: t.input_ids.__setitem__(1, 99), "token buffer differs"),
        (lambda t: replace_segment(t, 1, ids=(20, 99)), "token buffer differs"),
        (lambda t: t._segments.pop(), "token buffer differs"),
        (lambda t: t._segments.pop(2), "a segment starts at 6"),
        (lambda t: replace_segment(t, 3, log_probs=(0.0, 0.0)), "carry log-probabilities"),
        (lambda t: replace_segment(t, 1, log_probs=(0.0,)), "one log-probability a token"),
        (lambda t: setattr(t.turns[1], "start", 9), "spans differ"),
        (lambda t: t.turns.pop(), "spans differ"),
    ]
    for change, says in cases:
        with pytest.raises(LedgerError, match=says):
            tampered(change).check()


IDS = st.lists(st.integers(0, 2**32 - 1), max_size=5)
LOG_PROBS = st.floats(-50, 0, allow_nan=False)
STEP = st.one_of(
    st.tuples(st.just(Origin.SAMPLED), IDS, st.booleans()),
    st.tuples(st.sampled_from([Origin.TEMPLATE, Origin.OBSERVATION]), IDS, st.just(False)),
)


@given(prompt=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5), steps=st.lists(STEP, max_size=12), data=st.data())
def test_every_legal_sequence_keeps_all_invariants(prompt: list[int], steps: list[Any], data: st.DataObject) -> None:
    trajectory = Trajectory(SAMPLE)
    trajectory.append_prompt(prompt)
    ids, mask, log_probs, spans, recorded = list(prompt), [], [], [], True
    for origin, new, with_log_probs in steps:
        before = list(trajectory.input_ids)
        if origin is Origin.SAMPLED:
            values = data.draw(st.lists(LOG_PROBS, min_size=len(new), max_size=len(new))) if with_log_probs else None
            spans.append((len(ids), len(ids) + len(new)))
            sampled(trajectory, new, values)
            recorded = recorded and (values is not None or not new)
        elif trajectory.turns:
            values = None
            trajectory.append(origin, new)
        else:
            with pytest.raises(LedgerError):
                trajectory.append(origin, new)
            continue
        ids += new
        mask += [int(origin is Origin.SAMPLED)] * len(new)
        log_probs += values if values is not None else [0.0] * len(new)
        trajectory.check_prefix(ids)
        assert trajectory.input_ids[: len(before)] == before
        trajectory.check()
    assert trajectory.input_ids == ids
    assert trajectory.prompt_ids + trajectory.response_ids == ids
    assert trajectory.response_mask == mask
    assert trajectory.turn_spans == spans
    assert trajectory.sampled_len == sum(mask)
    assert trajectory.rollout_log_probs == (log_probs if recorded else None)
    assert [i for segment in trajectory.segments for i in segment.ids] == ids
    assert all(segment.ids for segment in trajectory.segments)
