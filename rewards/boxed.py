"""The answer in a `\\boxed{…}`, compared with a number."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from agentloop.trajectory import Reward, Sample, Trajectory

_BOX = re.compile(r"\\boxed\s*\{")
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_PLAIN = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}` of `text`, braces balanced and escaped ones (`\{`) not counted; `None` if there
    is no box or the last one is never closed. Linear in the length of `text`.

    >>> last_boxed(r"first \boxed{1}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = max((opening.end() for opening in _BOX.finditer(text)), default=None)
    if start is None:
        return None
    depth, at = 1, start
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at].strip()
        at += 1
    return None


def canonical_number(text: str) -> str | None:
    r"""A decimal number in one spelling, so that equal numbers are equal strings; `None` if `text` is anything else.

    Takes a sign, thousands separators (`1,234`, `1{,}234`, `1\,234`), decimals, and surrounding space or `$`. No floating
    point is involved, so every digit counts, however many there are.

    >>> canonical_number("-1,234.50"), canonical_number("+007"), canonical_number("-0.0"), canonical_number("1/2")
    ('-1234.5', '7', '0', None)
    """
    text = text.strip().strip("$").strip().replace("\N{MINUS SIGN}", "-")
    grouped = text.replace("{,}", ",").replace("\\,", ",").replace("\\!", "")
    sign = grouped[:1] if grouped[:1] in ("-", "+") else ""
    body = grouped[len(sign) :].lstrip()
    if not (_PLAIN.fullmatch(body) or _GROUPED.fullmatch(body)):
        return None
    whole, _, fraction = body.replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if sign == "-" and number != "0" else number


def grade_boxed_number(text: str, ground_truth: Any) -> Reward:
    """1.0 if the last box of `text` holds the number `ground_truth`, else 0.0; `info` says what was seen.

    `ground_truth` is a number or its text. Raises `ValueError` if it is no number: then no answer could ever be right.
    """
    expected = _expected(ground_truth)
    boxed = last_boxed(text)
    answer = None if boxed is None else canonical_number(boxed)
    if boxed is None:
        verdict = "no_box"
    elif answer is None:
        verdict = "not_a_number"
    else:
        verdict = "correct" if answer == expected else "wrong"
    value = float(verdict == "correct")
    return Reward(value, {"correct": value}, {"answer": boxed, "expected": expected, "verdict": verdict})


def _expected(ground_truth: Any) -> str:
    if isinstance(ground_truth, float):
        ground_truth = format(Decimal(repr(ground_truth)), "f")  # 1e+20 written out
    expected = canonical_number(str(ground_truth))
    if expected is None:
        raise ValueError(f"the ground truth {str(ground_truth)[:80]!r} is not a number")
    return expected


class BoxedNumber:
    r"""Reward 1.0 for the right number in the last `\boxed{…}` of the last turn, else 0.0. Sees only that turn's text."""

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        return grade_boxed_number(text, sample.ground_truth)


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> dict[str, Any]:
    """The same in verl's signature, for `reward.custom_reward_function`: verl then passes the text of all turns."""
    reward = grade_boxed_number(solution_str, ground_truth)
    return {"score": reward.value, **reward.components, "verdict": reward.info["verdict"]}
