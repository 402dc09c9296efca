r"""The answer in what a model wrote. Every scan is linear in the length of the text.

An answer is marked by `\boxed{…}`, `<answer>…</answer>`, a line `#### …`, or words (`the answer is …`, `Final answer: …`). The
last mark counts. What stands together with it counts too: boxes that are joined by a comma, `and`, `or` or nothing are one
answer with several parts, so that `\boxed{4} or \boxed{5}` is no way to be right twice. A later mark in a sentence of its own
is a correction. Without a mark the last mathematics or number of the text is taken, unless that is switched off.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from agentloop.expressions.read import parse
from agentloop.expressions.tokens import group
from agentloop.expressions.tree import Unreadable
from agentloop.expressions.words import FUNCTIONS, JOINING, PERCENT, UNITS

MAX_TEXT = 200_000
"""Characters, from the end, in which an answer is looked for."""
MAX_ANSWER = 20_000
"""Characters of one answer."""

_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s*(?=\{)")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_HASH = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)$", re.MULTILINE)
_PHRASE = re.compile(
    r"(?:(?:(?:final|correct|right)[ \t]+)?(?:answers?|result)|(?:correct|right|best)[ \t]+(?:option|choice))"
    r"(?:\*\*)?[ \t]*(?::|\bis\b|\bare\b|=)(?:[ \t]*:)?(?:\*\*)?[ \t]*",
    re.IGNORECASE,
)
_WEAK = re.compile(r"(?:therefore|thus|hence|so)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s+[A-Z<\[*]|\s*$|\s*\n)|<\|")
_JOIN = re.compile(r"\b(?:and|or)\b|,|;", re.IGNORECASE)
_HEDGE = re.compile(r"[\s.,;$]*(?:or|alternatively|maybe|perhaps|possibly)\b", re.IGNORECASE)
_DENIED = re.compile(r"(?:\bnot|n't|\bnever|\bneither|\bnor)\s*\$?$", re.IGNORECASE)
_EMPTY_GAP = re.compile(r"(?:[^\w\\]|\\[^A-Za-z]|\\q?quad)*")
_PERCENT_AFTER = re.compile(r"\}?\$?\s*(?:\\?%|percent\b|pct\b)")
_NUMBER = re.compile(
    r"(?<![\w.\\{^])[-−]?[$€£]?(?:[0-9]+(?:,[0-9]{3}(?![0-9]))+|[0-9]+)(?:[.,/][0-9]+)?(?![0-9]|[.,][0-9])"
    r"(?:\s?(?:\\?%|percent\b|pct\b)|([A-Za-z]{1,10})(?![A-Za-z0-9_])|(?![A-Za-z_]))"
)
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}")
_KNOWN = {*UNITS, *PERCENT, *JOINING, *FUNCTIONS, "am", "pm", "text", "pi"}
_MATH_ENDS = (("$$", "$$"), ("$", "$"), ("\\[", "\\]"), ("\\(", "\\)"))


@dataclass(frozen=True, slots=True)
class Found:
    """What was found."""

    parts: tuple[str, ...]
    """Usually one; several if the final answer has several marks. None: nothing was found."""
    how: str
    """`box`, `tag`, `hash`, `phrase`, `unmarked`, `truncated` or `none`."""


@dataclass(frozen=True, slots=True)
class _Mark:
    start: int
    end: int
    content: str
    how: str


def find_answer(text: str, *, marked_only: bool = False) -> Found:
    """The final answer of `text`. What stands before a `</think>` is not looked at, nor anything if one never comes."""
    text = text[-MAX_TEXT:]
    thought = text.rfind("</think>")
    if thought >= 0:
        text = text[thought + len("</think>") :]
    elif "<think>" in text:
        return Found((), "truncated")
    marks = sorted([*_boxes(text), *_tags(text), *_hashes(text)], key=lambda mark: mark.start)
    if marks and marks[-1].how == "truncated":
        return Found((), "truncated")
    after = marks[-1].end if marks else 0
    phrase = _phrase(text, after)
    if phrase is not None:
        return Found((phrase,), "phrase")
    if not marks:
        return Found((), "none") if marked_only else _unmarked(text)
    marks = _outermost(marks)
    joined = [marks[-1]]
    for mark in reversed(marks[:-1]):
        if not _joined(text[mark.end : joined[-1].start]):
            break
        joined.append(mark)
    parts = [mark.content + (" \\%" if _PERCENT_AFTER.match(text, mark.end) else "") for mark in reversed(joined)]
    return Found(tuple(dict.fromkeys(parts)), marks[-1].how)


def _outermost(marks: list[_Mark]) -> list[_Mark]:
    """Without marks within others; a tag that holds a box is what that says."""
    kept: list[_Mark] = []
    for mark in marks:
        if kept and mark.end <= kept[-1].end:
            continue
        if mark.how in ("tag", "hash"):
            inner = find_answer(mark.content, marked_only=True) if "boxed" in mark.content else None
            if inner is not None and inner.how == "box" and len(inner.parts) == 1:
                mark = _Mark(mark.start, mark.end, inner.parts[0], mark.how)
        kept.append(mark)
    return kept


def _joined(gap: str) -> bool:
    if _EMPTY_GAP.fullmatch(gap):
        return True
    if len(gap) > 400:
        return False
    if _HEDGE.match(gap):
        return True
    return len(gap) <= 100 and "\n\n" not in gap and not _SENTENCE_END.search(gap.strip() + " x") and bool(_JOIN.search(gap))


def _boxes(text: str) -> list[_Mark]:
    """The boxes, outermost only. One that is never closed is `truncated`, unless the last brace of the text was to close it."""
    marks: list[_Mark] = []
    at = 0
    while opening := _BOX.search(text, at):
        inside = group(text, opening.end())
        if inside is None:
            start = opening.end() + 1
            end = _loose_end(text, start)
            if end is None:
                marks.append(_Mark(opening.start(), len(text), "", "truncated"))
                break
            inside = (text[start:end], end + 1)
        content, at = inside
        marks.append(_Mark(opening.start(), at, _unboxed(content.strip())[:MAX_ANSWER], "box"))
    return marks


def _unboxed(content: str) -> str:
    while (nested := _BOX.match(content)) and (inside := group(content, nested.end())) and not content[inside[1] :].strip():
        content = inside[0].strip()
    return content


def _loose_end(text: str, start: int) -> int | None:
    """Where a box ends whose closing brace has a backslash too many (`\\boxed{5\\}`): at the first `}` that nothing opened."""
    depth = 0
    for at in range(start, min(len(text), start + MAX_ANSWER)):
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            if depth == 0:
                return at
            depth -= 1
    return None


def _tags(text: str) -> list[_Mark]:
    marks: list[_Mark] = []
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag
        elif opened is not None:
            marks.append(_Mark(opened.start(), tag.end(), text[opened.end() : tag.start()].strip()[:MAX_ANSWER], "tag"))
            opened = None
    if opened is not None:
        marks.append(_Mark(opened.start(), len(text), "", "truncated"))
    return marks


def _hashes(text: str) -> list[_Mark]:
    return [_Mark(match.start(), match.end(), match[1].strip()[:MAX_ANSWER], "hash") for match in _HASH.finditer(text)]


def _phrase(text: str, after: int) -> str | None:
    """What follows the last «answer is» behind every other mark, if it can be an answer: it has mathematics, or is short."""
    last = None
    for match in _PHRASE.finditer(text, after):
        last = match
    if last is None:
        return None
    rest = text[last.end() : last.end() + MAX_ANSWER]
    if not rest.strip() or rest[:1] == "\n":
        rest = rest.lstrip()
    if rest.startswith(("$$", "\\[")):
        end = rest.find("$$" if rest[0] == "$" else "\\]", 2)
        content = rest[: end + 2] if end >= 0 else rest
    else:
        stop = _SENTENCE_END.search(rest)
        content = rest[: stop.start()] if stop else rest
    content = content.strip().strip("*").strip()
    if not content:
        return None
    pieces = _spans(content)
    if pieces and not _reads(content):  # a sentence: its last mathematics
        return " , ".join(pieces)
    if not pieces and (after > 0 or len(content.split()) > 30):
        return None
    return content


def _reads(content: str) -> bool:
    try:
        parse(content)
    except Unreadable:
        return False
    return True


def _unmarked(text: str) -> Found:
    stripped = text.strip()
    if len(stripped) <= 120 and "\n" not in stripped and len(stripped.split()) <= 4:
        words = _WORD.findall(stripped)
        if not _NUMBER.search(stripped) or all(word.casefold() in _KNOWN for word in words):
            return Found((stripped,), "unmarked") if stripped else Found((), "none")
    pieces = _spans(text)
    return Found((" , ".join(pieces),), "unmarked") if pieces else Found((), "none")


def _spans(text: str) -> list[str]:
    """The last mathematics or number of `text`, with those that stand joined to it."""
    spans = _math(text)
    inside = [(start, end) for start, end, _ in spans]
    place = 0
    for match in _NUMBER.finditer(text):
        while place < len(inside) and inside[place][1] <= match.start():
            place += 1
        if place == len(inside) or match.end() <= inside[place][0]:
            if match[1] is None:
                spans.append((match.start(), match.end(), match[0]))
            elif match[1].casefold() in UNITS:
                spans.append((match.start(), match.end(), f"{text[match.start() : match.start(1)]} \\text{{{match[1]}}}"))
    spans.sort()
    if not spans:
        return []
    pieces: list[str] = []
    begin = len(text)
    for start, end, content in reversed(spans):
        gap = text[end:begin] if pieces else ""
        if pieces and (_JOIN.sub("", gap).strip(" .$") or (gap.strip() and not _JOIN.search(gap)) or "\n" in gap):
            break
        if not pieces and _PERCENT_AFTER.match(text, end):
            content += " \\%"
        if _DENIED.search(text[max(0, start - 12) : start]):
            return []
        if not content:  # mathematics that is not closed in its line
            break
        pieces.append(content)
        begin = start
    return pieces[::-1]


def _math(text: str) -> list[tuple[int, int, str]]:
    """`$…$`, `$$…$$`, `\\[…\\]` and `\\(…\\)` with what they hold. A `$` with no partner in its line is money."""
    spans: list[tuple[int, int, str]] = []
    at = 0
    while at < len(text):
        char = text[at]
        if char not in "$\\":
            following = [place for place in (text.find("$", at), text.find("\\", at)) if place >= 0]
            if not following:
                break
            at = min(following)
            continue
        for opening, closing in _MATH_ENDS:
            if text.startswith(opening, at):
                start = at + len(opening)
                limit = _line_end(text, start) if opening in ("$", "\\(") else len(text)
                end = _closing(text, closing, start, limit)
                if end >= 0:
                    if text[start:end].strip():
                        spans.append((at, end + len(closing), text[start:end].strip()[:MAX_ANSWER]))
                    at = end + len(closing)
                elif limit < len(text) and not text[start:limit].strip() and closing in text[limit:]:
                    far = _closing(text, closing, limit, len(text))
                    spans.append((at, max(far, limit) + len(closing), ""))
                    at = max(far, limit) + len(closing)
                else:
                    at = start
                break
        else:
            at += 2 if char == "\\" else 1
    return spans


def _closing(text: str, closing: str, start: int, limit: int) -> int:
    """Where `closing` next stands, not behind a backslash of its own if it is a `$`."""
    end = text.find(closing, start, limit)
    while end > 0 and closing[0] == "$" and text[end - 1] == "\\":
        end = text.find(closing, end + 1, limit)
    return end


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end
