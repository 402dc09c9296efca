"""What must hold among the trajectories of one step: siblings, prompts, and log-probabilities that cannot both be right."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from agentloop.audit.report import Finding
from agentloop.audit.subject import Subject, first_difference
from agentloop.audit.texts import CONTROL
from agentloop.trajectory import StopReason

_MANY_SIBLINGS = 4096
"""Sibling numbers above this are drawn at random (verl's legacy worker does not tell them), and have gaps."""
_NEAR_ZERO = -1e-4
_ENOUGH = 16
"""Log-probabilities from which a distribution can be judged."""
_USUAL = 0.8
"""Share of prompts that must begin alike before another beginning is odd."""


def check_step(subjects: Sequence[Subject], *, whole: bool) -> Iterator[Finding]:
    """Trajectories of one partition and step. `whole`: all of them are there."""
    yield from _unique(subjects)
    groups: dict[str, list[Subject]] = defaultdict(list)
    for subject in subjects:
        groups[subject.uid].append(subject)
    for members in groups.values():
        yield from _group(members)
        if whole:
            yield from _all_there(members)
        yield from _stale(members)
    yield from _beginnings(subjects)
    yield from _zeros(subjects)
    yield from _scored(subjects)
    yield from _learned_stops(subjects)
    yield from _one_text_an_id(subjects)


def _unique(subjects: Sequence[Subject]) -> Iterator[Finding]:
    seen: dict[str, Subject] = {}
    for subject in subjects:
        if subject.id in seen:
            yield subject.finding("identity", "two trajectories of one step have this id")
        seen[subject.id] = subject


def _group(members: Sequence[Subject]) -> Iterator[Finding]:
    """`members` are of one uid, attempts that were given up included."""
    prompts = Counter(_prompt(member).tobytes() for member in members if member.prompt_len)
    if len(prompts) > 1:
        usual = prompts.most_common(1)[0][0]
        known: NDArray[np.uint32] = np.frombuffer(usual, np.uint32)
        tie = list(prompts.values()).count(prompts[usual]) > 1
        if tie:  # then the one that is a whole and not a part of another, or the first sibling's
            known = max((np.frombuffer(prompt, np.uint32) for prompt in prompts), key=len)
            first = _prompt(next(member for member in members if member.prompt_len))
            known = known if _ends_with(known, first) else first
        for member in members:
            prompt = _prompt(member)
            if not len(prompt) or np.array_equal(prompt, known):
                continue
            if len(prompt) < len(known) and _ends_with(known, prompt):
                message = f"the prompt lost its first {len(known) - len(prompt)} tokens, which its siblings have"
                yield member.finding("prompt", message, 0, expected=f"token {int(known[0])}")
            at = first_difference(prompt, known)
            message = "its prompt is not that of its siblings"
            wanted = f"token {int(known[at])}" if at < len(known) else "the prompt's end"
            yield member.finding("group", message, min(at, len(member) - 1), expected=wanted)
    first = members[0]
    for member in members:
        if member.sample.messages != first.sample.messages:
            yield member.finding("group", "its sample's messages are not those of its siblings")
    yield from _seeds(members)
    temperatures = Counter((member.sampling or {}).get("temperature") for member in members)
    temperatures.pop(None, None)
    if len(temperatures) > 1:
        usual_temperature = temperatures.most_common(1)[0][0]
        for member in members:
            own = (member.sampling or {}).get("temperature")
            if own is not None and own != usual_temperature:
                yield member.finding(
                    "group", f"it was sampled at temperature {own}", expected=f"{usual_temperature}, as its siblings"
                )


def _seeds(members: Sequence[Subject]) -> Iterator[Finding]:
    """Siblings with one seed would be one sample, twice."""
    seen: dict[tuple[int, int], Subject] = {}
    for member in sorted(members, key=lambda member: (member.sibling, member.attempt)):
        for turn in member.turns:
            if turn.seed is None or turn.end == turn.start:
                continue
            other = seen.setdefault((turn.index, turn.seed), member)
            if other is not member and other.id != member.id:
                message = f"turn {turn.index} was sampled with the seed of {other.id}"
                yield member.finding("group", message, min(turn.start, len(member) - 1), expected="a seed of its own")
                break


def _all_there(members: Sequence[Subject]) -> Iterator[Finding]:
    numbers = sorted({member.sibling for member in members})
    if numbers[-1] < _MANY_SIBLINGS and numbers != list(range(len(numbers))):
        missing = next(i for i, number in enumerate([*numbers, -1]) if i != number)
        member = next(member for member in members if member.sibling == numbers[-1])
        yield member.finding("group", f"sibling {missing} of {member.uid} is missing: there are {numbers}")


def _prompt(subject: Subject) -> NDArray[np.uint32]:
    return subject.ids[: subject.prompt_len]


def _ends_with(whole: NDArray[np.uint32], part: NDArray[np.uint32]) -> bool:
    return len(part) <= len(whole) and np.array_equal(whole[len(whole) - len(part) :], part)


def _beginnings(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """Prompts of one template begin with one token, once."""
    by_template: dict[tuple[str, bytes], list[Subject]] = defaultdict(list)
    for subject in subjects:
        if subject.prompt_len > 3:  # the last two tokens are the opening of the model's turn, which a template has one of
            by_template[subject.template, _prompt(subject)[-2:].tobytes()].append(subject)
    for members in by_template.values():
        distinct = {_prompt(member).tobytes() for member in members}
        firsts = Counter(int(np.frombuffer(prompt, np.uint32)[0]) for prompt in distinct)
        usual, count = firsts.most_common(1)[0]
        control = any(m.pieces is not None and CONTROL.fullmatch(m.pieces.text(0, 1)) for m in members if m.ids[0] == usual)
        if count < 2 or 2 * count <= len(distinct) or (not control and (count < 3 or count < _USUAL * len(distinct))):
            continue
        doubled = {prompt for prompt in distinct if (np.frombuffer(prompt, np.uint32)[:2] == usual).all()}
        for member in members:
            if int(member.ids[0]) != usual:
                message = f"the prompt does not begin as the other {count} of its template do: its beginning is lost"
                yield member.finding("prompt", message, 0, expected=f"token {usual}")
            elif _prompt(member).tobytes() in doubled and len(doubled) <= (1 - _USUAL) * len(distinct):
                yield member.finding("prompt", "the prompt's first token comes twice", 1, expected=f"token {usual} once")


def _zeros(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """A log-probability of exactly 0 where no other comes near it is a blank that somebody filled in."""
    # Bits, because log-softmax gives +0.0 and a made-up -0.0 is nobody's blank.
    values = [subject.log_probs for subject in subjects]
    if not values:
        return
    every = np.concatenate(values)
    some = every[~np.isnan(every)]
    blank = (some == 0) & ~np.signbit(some)
    if not blank.any():
        return
    others = some[~blank]
    greedy = any((subject.sampling or {}).get("temperature", 1.0) < 0.2 for subject in subjects)
    told = all(subject.sampling is not None for subject in subjects)
    if len(others) == 0 and not (told and len(some) >= _ENOUGH):
        return
    if greedy or (len(others) and (len(others) < min(_ENOUGH, 3 * int(blank.sum())) or (others > _NEAR_ZERO).any())):
        return
    for subject in subjects:
        own = subject.log_probs
        at = np.flatnonzero((own == 0) & ~np.signbit(own))
        if len(at):
            message = f"its log-probability is exactly 0, as of {len(at)} tokens here, and no other comes near 0"
            yield subject.finding("log_probs", message, int(at[0]), expected="its own log-probability")


def _stale(members: Sequence[Subject]) -> Iterator[Finding]:
    """Two turns of different tokens that have the same log-probabilities: one of them has the other's."""
    by_start: dict[bytes, list[tuple[Subject, int, int]]] = defaultdict(list)
    spans = 0
    for member in sorted(members, key=lambda member: (member.sibling, member.attempt)):
        for _, start, end in member.spans():
            values = member.log_probs[start:end]
            if len(values) < 3 or np.isnan(values).any():
                continue
            spans += 1
            by_start[values[:3].tobytes()].append((member, start, end))
    pairs = [alike for alike in by_start.values() if len(alike) > 1]
    for alike in pairs:
        # Numbers that come again everywhere were made up, by place or by turn.
        own = len({member.sibling for member, _, _ in alike}) == 1
        if not own and (len(alike) > 2 or len(pairs) > 1 or spans < 6):
            continue
        if len(alike) == spans and (spans > 2 or not _irregular(*alike[0])):
            continue
        first, begin, stop = alike[0]
        for member, start, end in alike[1:]:
            n = min(end - start, stop - begin)
            values = member.log_probs[start : start + n]
            if not np.array_equal(values, first.log_probs[begin : begin + n]) or len(np.unique(values)) < 3:
                continue
            differs = np.flatnonzero(member.ids[start : start + n] != first.ids[begin : begin + n])
            if len(differs) >= min(2, n):
                message = (
                    f"its log-probabilities are those of other tokens: token {begin + int(differs[0])} of {first.id} "
                    f"and what follows it"
                )
                yield member.finding("log_probs", message, start + int(differs[0]), expected="its own log-probability")


def _irregular(subject: Subject, start: int, end: int) -> bool:
    """Nobody would have made these numbers up by counting."""
    steps = np.diff(subject.log_probs[start:end].astype(np.float64))
    return len(steps) >= 4 and len(np.unique(np.round(steps, 5))) > 0.9 * len(steps)


def _scored(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """Of one step all are scored, or none is."""
    counted = [subject for subject in subjects if subject.complete and not subject.masked]
    scored = [s for s in counted if s.reward is not None and set(s.reward.components) != {"penalty"}]
    if scored:
        for subject in counted:
            if subject.reward is None:
                yield subject.finding("reward", "it has no reward, and others of its step have one")


def _learned_stops(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """Where the record does not say which tokens end a turn: those that most turns end in, and that are nowhere else."""
    untold = [subject for subject in subjects if subject.stop_ids is None]
    ends: Counter[int] = Counter()
    inner: set[int] = set()
    turns = 0
    for subject in untold:
        for turn, start, end in subject.spans():
            inner.update(np.unique(subject.ids[start : end - 1]).tolist())
            if turn.stop_reason is StopReason.STOP:
                ends[int(subject.ids[end - 1])] += 1
                turns += 1
    known = {token for token, count in ends.items() if count > 1 and token not in inner}
    covered = sum(ends[token] for token in known)
    if turns < 8 or covered == turns or covered < _USUAL * turns:
        return
    for subject in untold:
        for turn, _, end in subject.spans():
            if turn.stop_reason is StopReason.STOP and int(subject.ids[end - 1]) not in known:
                message = f"turn {turn.index} is said to have stopped by itself and does not end as the other turns do"
                yield subject.finding("end_of_turn", message, end - 1, expected=f"one of {sorted(known)}")
                break


def _one_text_an_id(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """A token id stands for the same bytes everywhere: of records in which each token has its own."""
    spoken = [subject for subject in subjects if subject.pieces is not None and subject.pieces.told and len(subject)]
    if not spoken:
        return
    marks = [_fingerprints(subject) for subject in spoken]
    ids = np.concatenate([subject.ids for subject in spoken]).astype(np.uint64)
    mark = np.concatenate(marks)
    order = np.lexsort((mark, ids))
    ids, mark = ids[order], mark[order]
    new: NDArray[np.bool_] = np.ones(len(ids), bool)
    new[1:] = (ids[1:] != ids[:-1]) | (mark[1:] != mark[:-1])
    starts = np.flatnonzero(new)
    kinds, shown = ids[starts], mark[starts]
    if len(np.unique(kinds)) == len(kinds):
        return
    counts: NDArray[np.int64] = np.diff(np.append(starts, len(ids)))
    usual: dict[int, tuple[int, int]] = {}
    for token, seen, count in zip(kinds.tolist(), shown.tolist(), counts.tolist(), strict=True):
        if token not in usual or usual[token][0] < count:
            usual[token] = (count, seen)
    several = {token for token, number in Counter(kinds.tolist()).items() if number > 1}
    for subject, own in zip(spoken, marks, strict=True):
        for at in np.flatnonzero(np.isin(subject.ids, np.array(sorted(several), np.uint32))).tolist():
            if int(own[at]) != usual[int(subject.ids[at])][1]:
                message = "this token id has another text here than everywhere else: the ids are not those of the text"
                yield subject.finding("prefix", message, at)
                break


def _fingerprints(subject: Subject) -> NDArray[np.uint64]:
    """A number for the bytes of each token, (n,)."""
    pieces = subject.pieces
    assert pieces is not None
    data = np.frombuffer(pieces.data, np.uint8).astype(np.uint64)
    starts, lens = pieces.offsets[:-1], pieces.lens.astype(np.int64)
    place = np.arange(len(data), dtype=np.uint64) - np.repeat(starts, lens).astype(np.uint64)
    weights = (place * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0xD1B54A32D192ED03)) | np.uint64(1)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((data + np.uint64(1)) * weights, dtype=np.uint64)])
    return sums[pieces.offsets[1:]] - sums[starts]
