"""A padded batch against the trajectories that it was made of, row by row, from what the ledger says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentloop.audit.padded import FILLER, Batch
from agentloop.audit.report import Finding
from agentloop.audit.subject import Subject, first_difference

ROW_KEY = "agentloop_row"
"""Column with `{uid}_{sibling}_0` of each row (`agentloop.verl.train_side.ROW_KEY`), empty for a masked one."""
_TOLERANCE = 1e-5


def pair(batch: Batch, subjects: Sequence[Subject], *, in_order: bool) -> tuple[list[Subject | None], list[Finding]]:
    """The trajectory of each row: by its key, else by its place (`in_order`), else by its tokens."""
    keys = batch.columns.get(ROW_KEY)
    last = {f"{s.uid}_{s.sibling}_0": s for s in sorted(subjects, key=lambda s: s.attempt)}
    if keys is not None:
        return _by_key(batch, last, [str(key) for key in keys])
    if in_order and len(subjects) == len(batch):
        return list(subjects), []
    if in_order:
        message = f"there are {len(batch)} rows for {len(subjects)} trajectories"
        paired, found = _by_tokens(batch, list(last.values()))
        return paired, [Finding("rows", message), *found]
    return _by_tokens(batch, list(last.values()))


def _by_key(batch: Batch, known: dict[str, Subject], keys: Sequence[str]) -> tuple[list[Subject | None], list[Finding]]:
    found: list[Finding] = []
    seen: dict[str, int] = {}
    paired: list[Subject | None] = []
    for row, key in enumerate(keys):
        paired.append(known.get(key))
        if not key:
            continue
        if key in seen:
            found.append(batch.finding("rows", row, ROW_KEY, f"the key {key!r} is that of row {seen[key]} too"))
        elif key not in known:
            found.append(batch.finding("rows", row, ROW_KEY, f"no trajectory has the key {key!r}"))
        seen[key] = row
    return paired, found


def _by_tokens(batch: Batch, subjects: Sequence[Subject]) -> tuple[list[Subject | None], list[Finding]]:
    """Each row's trajectory by its tokens; of those with the same tokens in their order. A row whose tokens nobody has gets
    the next of its group that no other row has."""
    by_ids: dict[bytes, list[Subject]] = defaultdict(list)
    for subject in subjects:
        if not subject.masked:
            by_ids[subject.ids.astype(np.int64).tobytes()].append(subject)
    paired: list[Subject | None] = [None] * len(batch)
    taken: set[int] = set()
    for row in range(len(batch)):
        same = by_ids.get(_tokens(batch, row).tobytes(), [])
        uid = (batch.uid(row) or "").split(FILLER)[0]
        free = [s for s in same if id(s) not in taken]
        free = [s for s in free if s.uid == uid] or free
        if len(free) > 1:  # which said the same: the one whose the rest of the row is
            free.sort(key=lambda s: sum(1 for _ in _row(batch, row, s, ())))
        if free:
            paired[row] = free[0]
            taken.add(id(free[0]))
    found: list[Finding] = []
    for row in range(len(batch)):
        if paired[row] is not None or batch.fillers[row]:
            continue
        own = batch.uid(row)
        left = [s for s in subjects if id(s) not in taken and not s.masked and (own is None or s.uid == own)]
        if left:
            paired[row] = max(left, key=lambda s: _alike(batch, row, s))
            taken.add(id(paired[row]))
        else:
            found.append(batch.finding("rows", row, "responses", "no trajectory has the tokens of this row"))
    return paired, found


def _tokens(batch: Batch, row: int) -> NDArray[np.int64]:
    ids = np.concatenate([batch.prompts[row], batch.responses[row]])
    return np.asarray(ids[batch.attention[row]], np.int64)


def _alike(batch: Batch, row: int, subject: Subject) -> float:
    """Share of the trajectory's response that the row has."""
    expected = subject.ids[subject.prompt_len :]
    n = min(len(expected), batch.responses.shape[1])
    return float((batch.responses[row, :n] == expected[:n]).mean()) if n else 0.0


def check_rows(batch: Batch, paired: Sequence[Subject | None]) -> Iterator[Finding]:
    """What of each row is not what its trajectory has."""
    for row, subject in enumerate(paired):
        if subject is None:
            continue
        if subject.masked:
            yield from _filler(batch, row, subject)
            continue
        moved = _moved(batch, row, subject, paired)
        if moved is not None:
            yield moved
            continue
        yield from _row(batch, row, subject, paired)


def _moved(batch: Batch, row: int, subject: Subject, paired: Sequence[Subject | None]) -> Finding | None:
    """The row has all tokens of another trajectory of the batch."""
    own = _tokens(batch, row)
    if np.array_equal(own, subject.ids):
        return None
    for other in paired:
        if other is not None and other is not subject and len(other) == len(own) and np.array_equal(own, other.ids):
            at = first_difference(own, subject.ids)
            message = f"the row has the tokens of {other.id}"
            place = at - subject.prompt_len if at >= subject.prompt_len else None
            return _finding(batch, row, subject, "rows", "responses", message, at, place, f"those of {subject.id}")
    return None


def _finding(
    batch: Batch,
    row: int,
    subject: Subject,
    invariant: str,
    column: str,
    message: str,
    token: int | None = None,
    place: int | None = None,
    expected: str | None = None,
) -> Finding:
    """`token`: in the trajectory. `place`: in the padded tensor."""
    about = batch.finding(invariant, row, column, message, place, expected=expected)
    turn = int(subject.turn_of[token]) if token is not None and 0 <= token < len(subject) else None
    text = None
    if token is not None and subject.pieces is not None and 0 <= token < len(subject):
        text = subject.pieces.text(token, token + 1)
    return Finding(
        invariant,
        message,
        trajectory=subject.id,
        turn=turn,
        token=token,
        token_id=about.token_id,
        text=text
        if about.token_id is not None
        and token is not None
        and token < len(subject)
        and int(subject.ids[token]) == about.token_id
        else None,
        expected=expected,
        partition=subject.partition,
        step=subject.step,
        row=row,
        column=column,
        place=place,
    )


def _row(batch: Batch, row: int, subject: Subject, paired: Sequence[Subject | None]) -> Iterator[Finding]:
    start, length = subject.prompt_len, len(subject) - subject.prompt_len
    prompt, response = subject.ids[:start].astype(np.int64), subject.ids[start:].astype(np.int64)
    width, room = batch.width, batch.responses.shape[1]
    yield from _prompt(batch, row, subject, prompt)
    if start <= width and length <= room:
        expected: NDArray[np.bool_] = np.zeros(width + room, bool)
        expected[width - start : width + length] = True
        at = first_difference(batch.attention[row], expected)
        if at < width + room:
            what = "1 on padding" if batch.attention[row, at] else "0 on a token"
            token = at - (width - start)
            yield _finding(
                batch,
                row,
                subject,
                "padding",
                "attention_mask",
                f"the attention mask is {what}",
                token,
                at,
                str(int(expected[at])),
            )
    n = min(length, room)
    own = batch.responses[row, :n]
    at = first_difference(own, response[:n])
    if at < n:
        yield _response(batch, row, subject, own, response, at)
    elif length > room:
        message = f"the response was cut: {room} of {length} tokens are there"
        yield _finding(batch, row, subject, "lengths", "responses", message, start + room, None, f"token {int(response[room])}")
    if at >= n:
        yield from _over_response(batch, row, subject, n, paired)
    yield from _labels(batch, row, subject)


def _prompt(batch: Batch, row: int, subject: Subject, prompt: NDArray[np.int64]) -> Iterator[Finding]:
    width = batch.width
    own = batch.prompts[row]
    n = min(len(prompt), width)
    if len(prompt) > width or not np.array_equal(own[width - n :], prompt[len(prompt) - n :]):
        kept = own[batch.attention[row, :width]]
        lost = len(prompt) - len(kept)
        if lost > 0 and np.array_equal(prompt[lost:], kept):
            message = f"the prompt was cut on the left: its first {lost} tokens are missing"
            yield _finding(batch, row, subject, "prompt", "prompts", message, 0, None, f"token {int(prompt[0])}")
            return
        if lost > 0 and np.array_equal(prompt[: len(kept)], kept):
            message = f"the prompt was cut on the right: its last {lost} tokens are missing"
            yield _finding(
                batch, row, subject, "prompt", "prompts", message, len(kept), None, f"token {int(prompt[len(kept)])}"
            )
            return
        if np.array_equal(own[: len(prompt)], prompt):
            yield _finding(
                batch, row, subject, "padding", "prompts", "the prompt is padded on the right", 0, 0, "padding on the left"
            )
            return
        at = first_difference(own[width - n :], prompt[len(prompt) - n :])
        message = "the prompt is not the trajectory's"
        token = len(prompt) - n + at
        yield _finding(batch, row, subject, "prompt", "prompts", message, token, width - n + at, f"token {int(prompt[token])}")


def _response(
    batch: Batch, row: int, subject: Subject, own: NDArray[np.int64], response: NDArray[np.int64], at: int
) -> Finding:
    start = subject.prompt_len
    wanted = f"token {int(response[at])}"
    if batch.padding is not None and (batch.responses[row, at:] == batch.padding).all():
        message = f"the response was cut: {at} of {len(response)} tokens are there"
        return _finding(batch, row, subject, "lengths", "responses", message, start + at, at, wanted)
    message = "the row's history is not the trajectory's: it was tokenised again, or changed"
    for by in (1, -1):
        a, b = (own[by:], response[: len(own) - by]) if by > 0 else (own[:by], response[-by : len(own)])
        if len(a) > 3 and np.array_equal(a, b):
            message = f"the response is shifted by {-by} token"
    return _finding(batch, row, subject, "prefix", "responses", message, start + at, at, wanted)


def _over_response(batch: Batch, row: int, subject: Subject, n: int, paired: Sequence[Subject | None]) -> Iterator[Finding]:
    """Mask, log-probabilities and reward; the row has the right tokens."""
    start, room = subject.prompt_len, batch.responses.shape[1]
    sampled = subject.sampled[start : start + n]
    mask = batch.tensors.get("response_mask")
    if mask is not None:
        own = mask[row] > 0
        expected = np.concatenate([sampled, np.zeros(room - n, bool)])
        wrong = own & ~expected if "rollout_is_weights" in batch.tensors else own != expected
        own = own[:n]
        if wrong.any():
            at = int(wrong.argmax())
            message = "padding is trained"
            if at < n:
                message = (
                    f"a token of the {_origin(subject, start + at)} is trained" if own[at] else "a sampled token is not trained"
                )
            for by in (1, -1):
                if np.array_equal(own[max(by, 0) : n + min(by, 0)], sampled[max(-by, 0) : n + min(-by, 0)]):
                    message += f": the mask is shifted by {by}"
            yield _finding(batch, row, subject, "mask", "response_mask", message, start + at, at, str(int(expected[at])))
    values = batch.tensors.get("rollout_log_probs")
    if values is not None and not np.isnan(subject.log_probs[subject.sampled]).any():
        expected = np.where(subject.sampled, subject.log_probs, 0.0)[start : start + n]
        yield from _values(batch, row, subject, values[row, :n], expected)
    for name in ("rm_scores", "token_level_scores"):
        if name in batch.tensors and subject.reward is not None:
            yield from _reward(batch, row, subject, name, paired, room)


def _origin(subject: Subject, at: int) -> str:
    from agentloop.journal.recorded import ORIGINS

    return ORIGINS[int(subject.origin[at])].value


def _values(batch: Batch, row: int, subject: Subject, own: NDArray[Any], expected: NDArray[Any]) -> Iterator[Finding]:
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(own - expected) <= _TOLERANCE * (1 + np.abs(expected)))
    if not wrong.any():
        return
    at = int(wrong.argmax())
    start = subject.prompt_len
    message = f"the log-probability is {float(own[at]):g}"
    n = len(own)
    for by in (1, -1):
        a, b = own[max(by, 0) : n + min(by, 0)], expected[max(-by, 0) : n + min(-by, 0)]
        if n > 3 and np.allclose(a, b, atol=1e-5):
            message += f": they are shifted by {by}"
    counted = subject.sampled[start : start + n] & (expected < -1e-3) & (own < 0)
    ratio = own[counted] / expected[counted] if counted.any() else np.ones(1)
    if len(ratio) > 2 and float(np.ptp(ratio)) < 1e-3 * abs(float(ratio.mean())) and abs(float(ratio.mean()) - 1) > 1e-3:
        message += f": all are scaled by {float(ratio.mean()):.3f}, as by a temperature"
    yield _finding(batch, row, subject, "log_probs", "rollout_log_probs", message, start + at, at, f"{float(expected[at]):g}")


def _placed(subject: Subject) -> dict[int, float]:
    """Where the reward stands in the response: each turn's own on its last token, the rest on the last of all."""
    reward = subject.reward
    assert reward is not None
    start, last = subject.prompt_len, len(subject) - subject.prompt_len - 1
    placed = {
        turn.end - 1 - start: float(value)
        for turn, value in zip(subject.turns, reward.turns, strict=False)
        if value and turn.end > turn.start
    }
    placed[last] = float(reward.value) - sum(value for place, value in placed.items() if place != last)
    return placed


def _reward(
    batch: Batch, row: int, subject: Subject, name: str, paired: Sequence[Subject | None], room: int
) -> Iterator[Finding]:
    assert subject.reward is not None
    own = batch.tensors[name][row].astype(np.float64)
    expected: NDArray[np.float64] = np.zeros(room, np.float64)
    for place, value in _placed(subject).items():
        if place < room:
            expected[place] = value
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(own - expected) <= _TOLERANCE * (1 + np.abs(expected)))
    if not wrong.any():
        return
    at = int(wrong.argmax())
    extra = wrong & (expected == 0)  # where one stands tells more than where one is missing
    if extra.any():
        at = int(extra.argmax())
    start, value, total = subject.prompt_len, float(subject.reward.value), float(own.sum())
    message = f"the reward here is {float(own[at]):g}"
    if start + at >= len(subject):
        message += ", on padding"
    if value and abs(total - 2 * value) <= _TOLERANCE * (1 + abs(value)):
        message += ": the row has its reward twice"
    elif abs(total - value) > _TOLERANCE * (1 + abs(value)):
        others = [s.id for s in paired if s is not None and s.reward is not None and abs(s.reward.value - total) < _TOLERANCE]
        message += f": the row's reward is {total:g}, and the trajectory's {value:g}"
        message += f" ({others[0]} has that)" if others else ""
    yield _finding(batch, row, subject, "reward", name, message, start + at, at, f"{float(expected[at]):g}")


def _labels(batch: Batch, row: int, subject: Subject) -> Iterator[Finding]:
    """The columns that say whose row it is."""
    columns = batch.columns
    uids = columns.get("uid")
    if uids is not None and str(uids[row]) != subject.uid:
        yield _finding(
            batch, row, subject, "group", "uid", f"the row is of the group {uids[row]!r}", expected=repr(subject.uid)
        )
    told = columns.get("__num_turns__")
    from agentloop.audit.subject import OBSERVATION

    answered = {part.turn for part in subject.parts if part.origin == OBSERVATION}
    turns = 1 + len(subject.turns) + len(answered)
    if told is not None and int(told[row]) != turns:
        yield _finding(batch, row, subject, "turns", "__num_turns__", f"__num_turns__ is {int(told[row])}", expected=str(turns))
    reason = columns.get("end_reason")
    if reason is not None and reason[row] != subject.end_reason:
        message = f"the end reason is {reason[row]!r}"
        yield _finding(batch, row, subject, "end_of_turn", "end_reason", message, expected=repr(subject.end_reason))
    newest = [turn.weight_version for turn in subject.turns if turn.weight_version is not None]
    oldest = newest + [turn.min_weight_version for turn in subject.turns if turn.min_weight_version is not None]
    for name, known in (("min_global_steps", min(oldest, default=None)), ("max_global_steps", max(newest, default=None))):
        column = columns.get(name)
        if column is not None and known is not None and newest and column[row] != known:
            message = f"{name} is {column[row]}"
            yield _finding(batch, row, subject, "weight_versions", name, message, expected=str(known))


def _filler(batch: Batch, row: int, subject: Subject) -> Iterator[Finding]:
    """The row of a masked trajectory holds a place and nothing else."""
    why = f"{subject.id} was given up ({subject.end_reason}), and its row"
    for name, what in (("response_mask", "is trained"), ("rm_scores", "has a reward"), ("token_level_scores", "has a reward"),
                       ("advantages", "has an advantage")):  # fmt: skip
        values = batch.tensors.get(name)
        if values is not None and (values[row] != 0).any():
            at = int((values[row] != 0).argmax())
            yield _finding(batch, row, subject, "masked", name, f"{why} {what}", subject.prompt_len + at, at, "0")
    uids = batch.columns.get("uid")
    if uids is not None and list(uids).count(uids[row]) > 1 and any(FILLER in str(uid) for uid in uids):
        yield _finding(batch, row, subject, "masked", "uid", f"{why} is in a group's baseline")


__all__ = ["ROW_KEY", "check_rows", "pair"]
