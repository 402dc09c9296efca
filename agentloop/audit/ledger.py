"""What must hold in one trajectory, whatever the others are."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentloop.audit.report import Finding
from agentloop.audit.subject import PROMPT, SAMPLED, Subject, first_difference
from agentloop.journal.recorded import ORIGINS
from agentloop.trajectory import MIXED, CallStatus, EndReason, StopReason, Turn

ABOVE_ZERO = 1e-3
"""How far above 0 a log-probability may be: float error of a log-softmax in a short type."""
FAR_ABOVE_ZERO = 0.5
"""The same for the trainer's, which are told as they are and only compared."""
BELOW_ALL = -1e4
"""No finite logits give less; placeholders do."""
_CALL_ID = re.compile(r"^t(\d{4})c(\d{3})$")
_MASKED_REASONS = ("aborted",)
"""End reasons that no setting of the loop scores."""


def check_trajectory(subject: Subject) -> Iterator[Finding]:
    """All that can be said of one trajectory by itself, without its text."""
    yield from subject.found
    yield from _identity(subject)
    if not len(subject):
        return
    broken = False
    for finding in _layout(subject):
        broken = True
        yield finding
    yield from _masked(subject)
    yield from _reward(subject)
    if broken:  # places mean nothing from there on
        return
    yield from _prefix(subject)
    yield from _mask(subject)
    yield from _log_probs(subject)
    yield from _versions(subject)
    yield from _end_of_turn(subject)
    yield from _lengths(subject)
    yield from _answered(subject)


def _identity(subject: Subject) -> Iterator[Finding]:
    tail = f"_r{subject.attempt}" if subject.attempt else ""
    wanted = f"{subject.uid}_{subject.sibling}{tail}"
    if subject.id != wanted:
        yield subject.finding("identity", f"its uid, sibling and attempt make another id than {subject.id!r}", expected=wanted)


def _layout(subject: Subject) -> Iterator[Finding]:
    """Segments lie end to end, turns are all there, and each one's span is its sampled segment."""
    parts, turns = subject.parts, subject.turns
    for number, turn in enumerate(turns):
        if turn.index != number:
            missing = turn.index > number
            message = f"turn {number} is missing" if missing else f"turn {turn.index} comes again as number {number}"
            yield subject.finding("turns", message, min(turn.start, len(subject) - 1), turn=number)
            return
    for part in parts:
        if part.claimed_start != part.start:
            message = f"a segment stands at token {part.start} and says that it begins at {part.claimed_start}"
            yield subject.finding("prefix", message, part.start)
            return
    if parts[0].origin != PROMPT:
        yield subject.finding("prefix", "it does not begin with a prompt", 0, expected="a prompt segment")
        return
    last = -1
    for number, part in enumerate(parts):
        if number and part.origin == PROMPT:
            yield subject.finding("prefix", "there is a second prompt", part.start)
            return
        if part.turn < last or part.turn >= len(turns):
            yield subject.finding(
                "turns", f"a segment of turn {part.turn} follows turn {last}, of {len(turns)} turns", part.start
            )
            return
        last = part.turn
    spans = [(turn.start, turn.end) for turn in turns if turn.end != turn.start]
    sampled = [(part.start, part.end) for part in parts if part.origin == SAMPLED]
    if spans == sampled:
        return
    inside: NDArray[np.bool_] = np.zeros(len(subject) + 1, bool)
    for start, end in spans:
        inside[max(start, 0) : max(end, 0)] = True
    at = first_difference(inside[:-1], subject.sampled)
    if at < len(subject):
        what = _name(subject, at)
        message = "a token that no turn sampled is marked as sampled"
        if not subject.sampled[at]:
            message = f"a token that a turn sampled is marked as {what}"
        yield subject.finding("mask", message, at, expected="untrained" if subject.sampled[at] else "sampled")
        return
    at = next((a[0] for a, b in zip(spans, sampled, strict=False) if a != b), len(subject) - 1)
    yield subject.finding("turns", "its turns do not lie where its sampled tokens do", min(at, len(subject) - 1))


def _name(subject: Subject, at: int) -> str:
    return ORIGINS[int(subject.origin[at])].value


def _prefix(subject: Subject) -> Iterator[Finding]:
    """What the engine was given before each turn is what is there now."""
    ids = np.ascontiguousarray(subject.ids, "<u4")
    known, good = 0, 0
    crc = 0
    for turn in subject.turns:
        crc = zlib.crc32(ids[known : turn.start].tobytes(), crc)
        known = turn.start
        if turn.prompt_crc is not None and turn.prompt_crc != crc:
            message = (
                f"turn {turn.index} was sampled after other tokens than these {turn.start}: "
                f"the first that was changed is among tokens {good} to {turn.start - 1}"
            )
            yield subject.finding("prefix", message, good)
            return
        good = turn.start
        if turn.cached_tokens > turn.start:
            message = f"the engine reused {turn.cached_tokens} tokens for a prompt of {turn.start}: it was given another"
            yield subject.finding("prefix", message, turn.start)
            return
    for (turn, start, end), text in zip(subject.spans(), _texts(subject), strict=False):
        if text is None or subject.pieces is None:
            continue
        now = subject.pieces.text(start, end)
        if now != text:
            char = next((i for i, (a, b) in enumerate(zip(now, text, strict=False)) if a != b), min(len(now), len(text)))
            at = min(subject.pieces.token_at(start, now, char), end - 1)
            message = f"turn {turn.index} has another text than the record says"
            yield subject.finding("prefix", message, at, expected=repr(text[char : char + 20]))
            return


def _texts(subject: Subject) -> Iterator[str | None]:
    """The recorded texts of the turns that sampled something."""
    for turn, text in zip(subject.turns, subject.texts, strict=False):
        if turn.end > turn.start:
            yield text


def _mask(subject: Subject) -> Iterator[Finding]:
    claim = subject.mask_claim
    if claim is not None:
        said: NDArray[np.int64] = np.repeat(np.array([run[0] for run in claim], np.int64), [run[1] for run in claim])
        at = first_difference(said, subject.sampled.astype(np.int64))
        if at < max(len(said), len(subject)):
            mask = str(said[at]) if at < len(said) else "at its end"
            message = f"the record's mask is {mask} at {'the end' if at >= len(subject) else f'a {_name(subject, at)} token'}"
            yield subject.finding("mask", message, at)
            return
    stop_ids = subject.stop_ids
    if not stop_ids:
        return
    stops = np.isin(subject.ids, np.array(stop_ids, np.uint32))
    for turn, start, end in subject.spans():
        early = np.flatnonzero(stops[start : end - 1])
        if len(early):
            message = f"turn {turn.index} goes on after its end-of-turn token: what follows it was not sampled"
            yield subject.finding("mask", message, start + int(early[0]) + 1, expected="not sampled")
            return
        limit = turn.max_tokens
        if turn.stop_reason is StopReason.LENGTH and stops[end - 1] and limit is not None and end - start != limit:
            message = f"turn {turn.index} was cut by its length and ends in an end-of-turn token: that one was not sampled"
            yield subject.finding("mask", message, end - 1, expected="template, not sampled")
            return


def _log_probs(subject: Subject) -> Iterator[Finding]:
    values, sampled = subject.log_probs, subject.sampled
    there = ~np.isnan(values)
    wrong = np.flatnonzero(there & ~sampled)
    if len(wrong):
        at = int(wrong[0])
        yield subject.finding("log_probs", f"a token of the {_name(subject, at)} has a log-probability", at, expected="none")
        return
    asked = (subject.sampling or {}).get("log_probs")
    if asked or there.any():
        wrong = np.flatnonzero(sampled & ~there)
        if len(wrong):
            yield subject.finding("log_probs", "a sampled token has no log-probability", int(wrong[0]), expected="a number")
            return
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero(there & ((values > ABOVE_ZERO) | (values < BELOW_ALL)))
    if len(wrong):
        at = int(wrong[0])
        yield subject.finding("log_probs", f"its log-probability is {float(values[at]):g}", at, expected="finite and at most 0")


def _versions(subject: Subject) -> Iterator[Finding]:
    newest: int | None = None
    for turn in subject.turns:
        sampled, at = turn.end - turn.start, turn.start
        runs = turn.versions
        if sum(count for _, count in runs) != sampled or any(count < 1 for _, count in runs):
            yield _about_turn(
                subject, turn, f"the versions of turn {turn.index} are of {sum(c for _, c in runs)} tokens, not {sampled}", at
            )
            return
        first, last = turn.min_weight_version, turn.weight_version
        if first is not None and last is not None and first > last:
            yield _about_turn(subject, turn, f"turn {turn.index} began with version {first} and ended with {last}", at)
            return
        if first is not None and newest is not None and first < newest:
            yield _about_turn(subject, turn, f"turn {turn.index} was sampled by version {first}, after version {newest}", at)
            return
        plain = [version for version, _ in runs if isinstance(version, int)]
        told = bool(runs) and len(plain) == len(runs) and first is not None and last is not None
        if told and (plain[0] != first or plain[-1] != last):
            message = (
                f"turn {turn.index} began with version {first} and ended with {last}: its tokens are labelled {_short(plain)}"
            )
            wrong = at if plain[0] != first else turn.end - 1
            yield _about_turn(subject, turn, message, wrong, expected=f"{first} … {last}, or '{MIXED}'")
            return
        before: int | None = newest
        for version, count in runs:
            if isinstance(version, int):
                if before is not None and version < before:
                    yield _about_turn(subject, turn, f"version {version} follows version {before}", at)
                    return
                before = version
            at += count
        newest = max((v for v in (newest, last, before) if v is not None), default=None)
    if subject.version_claim is not None:
        said, now = _merged(subject.version_claim), _merged(_version_runs(subject))
        if said != now:
            same = next((i for i, (x, y) in enumerate(zip(said, now, strict=False)) if x != y), min(len(said), len(now)))
            at = sum(count for _, count in now[:same])
            if same < min(len(said), len(now)) and said[same][0] == now[same][0]:
                at += min(said[same][1], now[same][1])
            message = "the versions at the record's end are others than the turns'"
            yield subject.finding(
                "weight_versions", message, min(at, len(subject) - 1), expected=str(now[same][0]) if same < len(now) else None
            )


def _version_runs(subject: Subject) -> Iterator[tuple[int | str | None, int]]:
    """Versions of all tokens as the turns have them."""
    at = 0
    for turn in subject.turns:
        yield None, turn.start - at
        yield from turn.versions
        at = turn.end
    yield None, len(subject) - at


def _merged(runs: Iterable[Sequence[Any]]) -> list[tuple[Any, int]]:
    """Without empty runs, and neighbours of one value as one."""
    merged: list[tuple[Any, int]] = []
    for value, count in runs:
        if merged and merged[-1][0] == value:
            merged[-1] = (value, merged[-1][1] + count)
        elif count:
            merged.append((value, count))
    return merged


def _short(values: list[int]) -> str:
    return ", ".join(map(str, values[:4])) + (", …" if len(values) > 4 else "")


def _about_turn(subject: Subject, turn: Turn, message: str, at: int, expected: str | None = None) -> Finding:
    at = min(at, len(subject) - 1)
    return subject.finding("weight_versions", message, at, turn=turn.index, expected=expected)


def _end_of_turn(subject: Subject) -> Iterator[Finding]:
    stop_ids, sampling = subject.stop_ids, subject.sampling or {}
    for turn, start, end in subject.spans():
        last_turn = turn.index == len(subject.turns) - 1
        if turn.stop_reason is StopReason.ABORTED and not subject.masked and (subject.complete or not last_turn):
            message = f"turn {turn.index} was aborted, and its tokens are kept as if it had ended"
            yield subject.finding("end_of_turn", message, start)
            return
        if stop_ids is None:
            continue
        last = int(subject.ids[end - 1])
        if turn.stop_reason is StopReason.STOP and last not in stop_ids and not sampling.get("stop"):
            message = f"turn {turn.index} is said to have stopped by itself and does not end in an end-of-turn token"
            yield subject.finding("end_of_turn", message, end - 1, expected=f"one of {list(stop_ids)}")
            return
        first, until = subject.after(turn)
        if until > first and subject.complete and not (last_turn and subject.masked):
            if turn.closed_by_template != (last != stop_ids[0]):
                said = "closed by the template" if turn.closed_by_template else "not closed by the template"
                yield subject.finding(
                    "end_of_turn", f"turn {turn.index} is said to be {said}, and ends in token {last}", end - 1
                )
                return
            if last in stop_ids and int(subject.ids[first]) in stop_ids and int(subject.ids[first]) == last:
                yield subject.finding("end_of_turn", f"turn {turn.index} has its end-of-turn token twice", first)
                return
            if last not in stop_ids and not np.isin(subject.ids[first : first + 4], np.array(stop_ids, np.uint32)).any():
                message = f"turn {turn.index} was cut before its end-of-turn token, and nothing closes it"
                yield subject.finding("end_of_turn", message, first, expected=f"one of {list(stop_ids)}")
                return
    yield from _finished(subject)


def _finished(subject: Subject) -> Iterator[Finding]:
    if subject.end_reason != EndReason.FINAL_ANSWER or not subject.turns:
        return
    turn = subject.turns[-1]
    submitted = any(record.status is CallStatus.OK for record in turn.calls)
    if turn.stop_reason is not StopReason.STOP and not submitted:
        message = f"it counts as finished, and its last turn ended as '{turn.stop_reason.value}'"
        yield subject.finding("end_of_turn", message, turn.end - 1, expected="the end reason 'token_limit'")
    elif turn.end < len(subject):
        yield subject.finding("end_of_turn", "it counts as finished, and tokens follow its last turn", turn.end)


def _lengths(subject: Subject) -> Iterator[Finding]:
    loop = subject.loop
    for turn, start, end in subject.spans():
        for limit, name in ((turn.max_tokens, "it was asked for"), (loop.get("max_turn_tokens"), "max_turn_tokens allows")):
            if limit is not None and end - start > limit:
                message = f"turn {turn.index} has {end - start} sampled tokens, more than {name} ({limit})"
                yield subject.finding("lengths", message, start + int(limit))
                return
    if subject.masked:
        return
    most, prompt = loop.get("max_response_tokens"), loop.get("max_prompt_tokens")
    if most is not None and len(subject) - subject.prompt_len > most:
        message = f"the response has {len(subject) - subject.prompt_len} tokens, max_response_tokens is {most}"
        yield subject.finding("lengths", message, subject.prompt_len + int(most))
    elif prompt is not None and subject.prompt_len > prompt:
        yield subject.finding(
            "lengths", f"the prompt has {subject.prompt_len} tokens, max_prompt_tokens is {prompt}", int(prompt)
        )
    elif loop.get("max_turns") is not None and len(subject.turns) > loop["max_turns"]:
        at = min(subject.turns[int(loop["max_turns"])].start, len(subject) - 1)
        yield subject.finding("lengths", f"there are {len(subject.turns)} turns, max_turns is {loop['max_turns']}", at)


def _reward(subject: Subject) -> Iterator[Finding]:
    reward = subject.reward
    if reward is None:
        return
    parts = {"value": reward.value, **{f"component '{name}'": value for name, value in reward.components.items()}}
    parts |= {f"reward of turn {k}": value for k, value in enumerate(reward.turns)}
    for name, value in parts.items():
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            yield subject.finding("reward", f"its {name} is {value!r}", expected="a finite number")
            return
    if set(reward.components) == {"penalty"} and reward.value != reward.components["penalty"]:
        message = f"its value is {reward.value:g}, and it is made of a penalty of {reward.components['penalty']:g} alone"
        yield subject.finding("reward", message, expected=f"{reward.components['penalty']:g}")
    if len(reward.turns) > len(subject.turns):
        yield subject.finding("reward", f"{len(reward.turns)} turns are rewarded, and there are {len(subject.turns)}")


def _masked(subject: Subject) -> Iterator[Finding]:
    if not subject.complete:
        return
    if subject.masked:
        if subject.reward is not None:
            yield subject.finding("masked", f"it was given up ({subject.end_reason}) and has a reward", expected="none")
        elif subject.state == "done":
            yield subject.finding("masked", "it is masked, and its state is 'done'", expected="'failed' or 'aborted'")
        return
    policy = subject.loop.get("on_cutoff") or {}
    if subject.state in ("failed", "aborted"):
        yield subject.finding("masked", f"its state is '{subject.state}' and it is trained", expected="masked")
    elif subject.end_reason in _MASKED_REASONS or policy.get(subject.end_reason) == "mask":
        yield subject.finding("masked", f"it ended as '{subject.end_reason}' and is trained", expected="masked")
    elif not subject.sampled.any():
        yield subject.finding("masked", "nothing was sampled, and it is not masked", expected="masked")


def _answered(subject: Subject) -> Iterator[Finding]:
    """Between two turns there is something, and calls are of the turn that they say."""
    for turn in subject.turns:
        places = []
        for record in turn.calls:
            match = _CALL_ID.match(record.call.id)
            if match is None:
                continue
            if int(match[1]) != turn.index:
                message = f"turn {turn.index} has the call {record.call.id} of another turn"
                yield subject.finding("observation", message, min(turn.end, len(subject) - 1), turn=turn.index)
                return
            places.append(int(match[2]))
        if places != sorted(set(places)):
            message = f"the calls of turn {turn.index} are not in the order in which they were written"
            yield subject.finding("observation", message, min(turn.end, len(subject) - 1), turn=turn.index)
            return
        first, until = subject.after(turn)
        following = any(other.end > other.start for other in subject.turns[turn.index + 1 :])
        if following and turn.end > turn.start and until == first:
            message = f"turn {turn.index + 1} follows turn {turn.index} with nothing between"
            yield subject.finding("observation", message, first, expected="template or observation tokens")
            return
