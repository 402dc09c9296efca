"""The boxed number: what counts as the answer, and when two numbers are equal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentloop.rewards import BoxedNumber, canonical_number, last_boxed
from agentloop.rewards.boxed import compute_score
from agentloop.trajectory import Sample, Trajectory


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{1}, no: \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed { 7 }", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{1} and then \boxed{2", None),
        (r"\boxed{1\}", None),
        ("\\boxed{1\\", None),
        (r"boxed{5}", None),
        (r"\boxed 5", None),
        ("5", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("+42", "42"),
        ("-42", "-42"),
        ("\N{MINUS SIGN}42", "-42"),
        ("- 42", "-42"),
        ("007", "7"),
        ("-0.00", "0"),
        ("3.", "3"),
        (".5", "0.5"),
        ("3.1400", "3.14"),
        ("1,234,567.80", "1234567.8"),
        (r"1{,}234", "1234"),
        (r"1\,234", "1234"),
        ("$1,234$", "1234"),
        ("12,34", None),
        ("1,2345", None),
        (",123", None),
        ("1.2.3", None),
        ("--1", None),
        ("1e3", None),
        ("1/2", None),
        ("0x10", None),
        ("5 apples", None),
        ("1_000", None),
        ("٣", None),
        ("inf", None),
        ("nan", None),
        ("-", None),
        (".", None),
        ("", None),
        ("9" * 10_000, "9" * 10_000),
        ("1\n2", None),
    ],
)
def test_canonical_number(text: str, number: str | None) -> None:
    assert canonical_number(text) == number


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=6))
def test_every_spelling_of_a_number_is_one(number: Any) -> None:
    spellings = {f"{number:f}", f"{number:,f}", f" {number:f}000 ", f"${number:f}$"}
    assert len({canonical_number(spelling) for spelling in spellings}) == 1


@given(st.text(alphabet=st.sampled_from("\\boxed{} 01,.-$"), max_size=200))
def test_whatever_a_model_writes_gets_a_value(text: str) -> None:
    assert compute_score("arith", text, "1")["score"] in (0.0, 1.0)


@pytest.mark.parametrize("text", ["\\boxed" + " " * 200_000, "\\boxed{" * 50_000, "\\boxed{" + "{" * 200_000, "\\" * 200_001])
def test_long_hostile_text_takes_linear_time(text: str) -> None:
    assert last_boxed(text) is None


async def score(text: str, truth: Any) -> tuple[float, str]:
    sample = Sample([{"role": "user", "content": "q"}], ground_truth=truth)
    reward = await BoxedNumber()(Trajectory(sample), sample, text)
    assert reward.components == {"correct": reward.value}
    return reward.value, reward.info["verdict"]


async def test_the_verdicts() -> None:
    assert await score(r"so \boxed{1,024}", "1024") == (1.0, "correct")
    assert await score(r"so \boxed{1024.0}", 1024) == (1.0, "correct")
    assert await score(r"so \boxed{-1024}", 1024) == (0.0, "wrong")
    assert await score(r"so \boxed{x}", 1024) == (0.0, "not_a_number")
    assert await score("so 1024", 1024) == (0.0, "no_box")
    assert await score(r"\boxed{0.1}", 0.1) == (1.0, "correct")
    assert await score(r"\boxed{0.10000000000000001}", 0.1) == (0.0, "wrong")
    assert await score(r"\boxed{100000000000000000000}", 1e20) == (1.0, "correct")


@pytest.mark.parametrize("truth", [None, "", "x", float("inf")])
async def test_a_ground_truth_that_is_no_number_is_a_failure_not_a_zero(truth: Any) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        await score(r"\boxed{1}", truth)
