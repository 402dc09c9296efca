"""What the tokens say: the prompt against the sample's messages, what follows a turn against what its calls came to.

Templates may trim, escape or normalise what messages say, so text is looked for in several forms, from the exact one to
letters and digits alone; glue is compared only where all of it was found as it is.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agentloop.audit.report import Finding
from agentloop.audit.subject import OBSERVATION, Subject
from agentloop.chat.text import clean
from agentloop.trajectory import Turn

CONTROL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""What control tokens look like in text."""
_BOS = re.compile(r"(?i)^(<s>|<bos>|<[|｜](begin[_▁]of[_▁](text|sentence)|startoftext|start_of_text)[|｜]>)$")
CUT = re.compile(r"(?i)\[… \d+ tokens left out …\]")
"""`agentloop.tools.cut`."""
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{3,100}")
"""What no format of calls writes otherwise."""
_UNKNOWN = re.compile("<unk>|\ufffd")
_ALIKE = 3
"""Pieces of glue that must be the same before another one is odd for its white space."""
_UNANIMOUS = 8
"""… and for its control tokens."""
_TELLING = 8
"""Characters that an answer must have to be known by its text among other text."""


@dataclass(frozen=True, slots=True)
class Glue:
    """What a template wrote at one place."""

    subject: Subject
    kind: tuple[Any, ...]
    """Places of one kind have the same glue."""
    text: str
    base: str
    """The text from `token` on."""
    offset: int
    """Where the glue begins in it."""
    token: int


def check_texts(subject: Subject, glue: list[Glue]) -> Iterator[Finding]:
    """Of one trajectory; what its template wrote is added to `glue`."""
    if subject.pieces is None or not len(subject):
        return
    yield from _bos(subject)
    yield from _prompt(subject, glue)
    opening = _last(CONTROL, subject.pieces.text(0, subject.prompt_len))
    for turn in subject.turns:
        yield from _observation(subject, turn, opening, glue)


# -- the prompt -----------------------------------------------------------------------------------------------------------


def _bos(subject: Subject) -> Iterator[Finding]:
    assert subject.pieces is not None
    if _BOS.match(subject.pieces.text(0, 1)):
        again = np.flatnonzero((subject.ids[1:] == subject.ids[0]) & ~subject.sampled[1:])
        if len(again):
            yield subject.finding("prompt", "BOS stands here again", int(again[0]) + 1, expected="one BOS, at the beginning")


def _prompt(subject: Subject, glue: list[Glue]) -> Iterator[Finding]:
    assert subject.pieces is not None
    whole = subject.pieces.text(0, subject.prompt_len)
    at = 0
    exact: list[tuple[int, int]] | None = []
    for number, message in enumerate(subject.sample.messages):
        if not isinstance(message, Mapping) or message.get("role") not in ("system", "user"):
            exact = None if message.get("role") != "tool" else exact  # turns of the model are changed by many templates
            continue
        text = clean(_content(message))
        found = find(whole, text, at)
        if found is None and find(whole, text, 0) is None:
            place = _parting(whole, text, at)
            token = subject.pieces.token_at(0, whole, place) if place < len(whole) else subject.prompt_len - 1
            said = f"message {number} ({message['role']}) is not in the prompt as the sample has it"
            yield subject.finding("prompt", said, token, expected=repr(_short(text)))
            return
        if found is None or not found.exact:
            exact = None
        elif exact is not None:
            exact.append((found.start, found.end))
            at = found.end
    if exact:
        roles = tuple(message.get("role") for message in subject.sample.messages)
        kind = ("prompt", subject.template, roles, subject.sample.tools)
        last = 0
        for place, (start, end) in enumerate([*exact, (len(whole), len(whole))]):
            glue.append(_glue(subject, (*kind, place), whole, last, start, 0))
            last = end


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
    return content if isinstance(content, str) else ""


# -- what follows a turn --------------------------------------------------------------------------------------------------


def _observation(subject: Subject, turn: Turn, opening: re.Match[str] | None, glue: list[Glue]) -> Iterator[Finding]:
    """`opening`: the prompt's last control token, which begins the opening of the model's turn."""
    pieces = subject.pieces
    assert pieces is not None
    first, until = subject.after(turn)
    if until <= first or not subject.complete:
        return
    texts = [(record.call.name, record.call.id, clean(record.text)) for record in turn.calls]
    texts += [("", "", clean(f"Error: {error}")) for error in turn.parse_errors]
    whole = pieces.text(first, until)
    at, exact = 0, True
    bounds: list[tuple[int, int]] = []
    begins = _observed(subject, first, until)
    for name, id_, text in texts:
        if not text.strip():
            exact = False
            continue
        # Not before the tokens that came out of messages: the glue may say the same.
        begin = next((begin for begin, end in begins if end > at), at)
        found = find(whole, text, max(at, begin))
        if found is None and (early := find(whole, text, at)) is not None:  # escapes at its beginning count as the template's
            found = replace(early, exact=False)
        if found is None and not id_ and (CUT.search(whole) or find(whole, text[:_TELLING], 0)):  # of this cut nothing tells
            exact = False
            continue
        if found is None:
            yield _other_answer(subject, turn, whole, text, id_ or name, max(at, begin))
            return
        exact &= found.exact and text == text.strip()
        bounds.append((found.start, found.end))
        at = found.end
    if not texts and subject.sampling is not None:
        yield subject.finding("observation", f"turn {turn.index} called nothing, and tokens follow it before the next", first)
        return
    if not texts or not exact:
        return
    last = 0
    closed = turn.closed_by_template
    for place, (start, end) in enumerate([*bounds, (len(whole), len(whole))]):
        where: Any = ("first", closed) if place == 0 else "last" if place == len(bounds) else "between"
        glue.append(_glue(subject, ("after a turn", subject.template, where), whole, last, start, first, texts))
        last = end
    match = _last(CONTROL, whole[bounds[-1][1] :])
    ours, its = (found.string[found.start() :] if found is not None else "" for found in (match, opening))
    if ours != its and _no_space(ours) == _no_space(its) and ours:
        start = len(whole) - len(ours)
        char = next((i for i, (a, b) in enumerate(zip(ours, its, strict=False)) if a != b), min(len(ours), len(its)))
        token = min(pieces.token_at(first, whole, start + char), until - 1)
        yield subject.finding(
            "observation", "the opening of the next turn is not the prompt's", token, expected=repr(its[char:])
        )


def check_calls(subject: Subject) -> Finding | None:
    """The first call that does not stand in what the model wrote in its turn."""
    if subject.pieces is None:
        return None
    return next((finding for turn in subject.turns for finding in _asked_for(subject, turn)), None)


def _asked_for(subject: Subject, turn: Turn) -> Iterator[Finding]:
    """Of a call its name, and what of its arguments is plain."""
    assert subject.pieces is not None
    said = subject.pieces.text(min(turn.start, len(subject)), min(turn.end, len(subject)))
    for record in turn.calls:
        values = record.call.arguments.values() if isinstance(record.call.arguments, Mapping) else ()
        for plain in (record.call.name, *values):
            if isinstance(plain, str) and _PLAIN.fullmatch(plain) and find(said, plain, 0) is None:
                message = (
                    f"the call {record.call.id} says {_short(plain)!r}, which the model did not write in turn {turn.index}"
                )
                yield subject.finding("observation", message, min(turn.end, len(subject) - 1), turn=turn.index)
                return


def _observed(subject: Subject, first: int, until: int) -> list[tuple[int, int]]:
    """The characters of each run of observation tokens, counted from token `first` on."""
    pieces = subject.pieces
    assert pieces is not None
    runs = [(part.start, part.end) for part in subject.parts if part.origin == OBSERVATION and first <= part.start < until]
    return [(len(pieces.text(first, start)), len(pieces.text(first, min(end, until)))) for start, end in runs]


def _other_answer(subject: Subject, turn: Turn, whole: str, text: str, call: str, at: int) -> Finding:
    """The finding for an answer that is not there."""
    pieces = subject.pieces
    assert pieces is not None
    first, until = subject.after(turn)
    sampled = pieces.text(turn.start, turn.end)
    among = find(sampled, text, 0) if len(text) >= _TELLING else None
    if among is not None and among.exact:
        token = pieces.token_at(turn.start, sampled, among.start)
        return subject.finding("mask", f"the answer to {call} is marked as sampled", token, expected="observation")
    place = _parting(whole, text, at)
    observed = np.flatnonzero(subject.origin[first:until] == OBSERVATION)
    token = pieces.token_at(first, whole, place) if place < len(whole) else until - 1
    if len(observed) and token < first + observed[0]:
        token = first + int(observed[0])
    message = f"what follows turn {turn.index} does not say what its call {call} came to"
    return subject.finding("observation", message, token, expected=repr(_short(text)))


# -- glue -----------------------------------------------------------------------------------------------------------------


def check_glue(glue: Sequence[Glue]) -> Iterator[Finding]:
    """Places of one kind have one glue: an odd one differs in white space, or in control tokens."""
    by_kind: dict[tuple[Any, ...], list[Glue]] = defaultdict(list)
    for item in glue:
        by_kind[item.kind].append(item)
    for items in by_kind.values():
        counts = Counter(item.text for item in items)
        if len(counts) == 1:
            continue
        usual, most = counts.most_common(1)[0]
        for item in items:
            if item.text == usual:
                continue
            count = counts[item.text]
            spaced = _no_space(item.text) == _no_space(usual)
            torn = CONTROL.findall(item.text) != CONTROL.findall(usual)
            torn &= item.kind[0] != "prompt" and most >= _UNANIMOUS and most >= 0.9 * len(items)
            if torn or (spaced and most >= _ALIKE and count * 3 <= most):
                char = next(
                    (i for i, (a, b) in enumerate(zip(item.text, usual, strict=False)) if a != b),
                    min(len(item.text), len(usual)),
                )
                subject = item.subject
                assert subject.pieces is not None
                token = min(subject.pieces.token_at(item.token, item.base, item.offset + char), len(subject) - 1)
                what = "prompt" if item.kind[0] == "prompt" else "observation"
                message = f"the template's glue is not that of the other {most} places of its kind"
                yield subject.finding(what, message, token, expected=repr(_short(usual[char:])))


def _glue(
    subject: Subject,
    kind: tuple[Any, ...],
    whole: str,
    start: int,
    end: int,
    token: int,
    texts: Sequence[tuple[str, str, str]] = (),
) -> Glue:
    text = whole[start:end]
    for name, id_, _ in texts:  # some templates write these beside the answer
        for known in filter(None, (name, id_)):
            text = re.sub(rf"(?<!\w){re.escape(known)}(?!\w)", "·", text)
    return Glue(subject, kind, text, whole, start, token)


# -- looking for text -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    start: int
    end: int
    exact: bool


def find(whole: str, text: str, at: int) -> Found | None:
    """Where `text` stands in `whole` from character `at` on, in one of the forms that templates and tokenizers give it."""
    place = whole.find(text, at)
    if place >= 0:
        return Found(place, place + len(text), True)
    for form in _forms(text):
        place = whole.find(form, at)
        if place >= 0:
            return Found(place, place + len(form), False)
    rest = whole[at:]
    for bare in (_no_space, _letters):
        if bare(text).casefold() in bare(rest).casefold():
            return Found(at, at, False)
    return None


def _forms(text: str) -> Iterator[str]:
    yield text.strip()
    for plain in (False, True):
        yield json.dumps(text, ensure_ascii=plain)[1:-1]
        yield json.dumps(text.strip(), ensure_ascii=plain)[1:-1]
    yield unicodedata.normalize("NFC", text).strip()


def _no_space(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _letters(text: str) -> str:
    """ASCII letters and digits, for tokenizers that lose others."""
    return re.sub("[^A-Za-z0-9]", "", _UNKNOWN.sub("", text))


def _parting(whole: str, text: str, at: int) -> int:
    """The character of `whole` at which it stops to say `text`: after the longest beginning of `text` that stands there."""
    text = text.strip()
    low, high, place = 0, len(text), -1
    while low < high:  # the longest beginning that is found: each one's beginnings are found too
        middle = (low + high + 1) // 2
        found = whole.find(text[:middle], at)
        if found >= 0:
            low, place = middle, found
        else:
            high = middle - 1
    return place + low if low else at


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = None
    for match in pattern.finditer(text):
        found = match
    return found


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
