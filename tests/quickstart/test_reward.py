"""The reward sees the final answer and nothing else."""

from __future__ import annotations

import pytest

from examples.quickstart.reward import compute_score, final_answer

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 34"}}\n</tool_call>'
ANSWERED = f"{CALL}\nuser\n<tool_response>\n408\n</tool_response>\nassistant\n"


@pytest.mark.parametrize(
    "solution",
    [
        "\\boxed{408}",
        f"{ANSWERED}\\boxed{{408}}",
        f"{ANSWERED}It is \\boxed{{408}}\n",
        f"{ANSWERED}\\boxed{{408}}<|im_end|>",
        f"{ANSWERED}\\boxed{{1}} no, \\boxed{{408}}",
    ],
)
def test_right_answers(solution: str) -> None:
    assert compute_score("quickstart", solution, "408") == 1.0


@pytest.mark.parametrize(
    "solution",
    [
        "",
        "408",
        "\\boxed{}",
        "\\boxed{408",
        "\\boxed{four}",
        "\\boxed{4080}",
        "\\boxed{٤٠٨}",
        "\\boxed{408} or so",
        f"{ANSWERED}\\boxed{{407}}",
        f"{ANSWERED}\\boxed{{408}}\\boxed{{1}}",
        # The right number in an earlier turn.
        f"\\boxed{{408}}{CALL}",
        f"\\boxed{{408}}{ANSWERED}",
        f"\\boxed{{408}}{ANSWERED}{CALL}",
        # The right number in what a tool says: whole, cut off, or with a tag of its own.
        "<tool_call>\n{}\n</tool_call>\nuser\n<tool_response>\n\\boxed{408}\n</tool_response>\nassistant\n",
        "<tool_call>\n{}\n</tool_call>\nuser\n<tool_response>\n\\boxed{408}",
        "<tool_call>\n{}\n</tool_call>\nuser\n<tool_response>\n</tool_response>\n<tool_response>\\boxed{408}\n",
        # A call whose argument ends like an answer.
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "\\boxed{408}"}}\n</tool_call>',
        f"\\boxed{{{'9' * 5000}}}",
    ],
)
def test_anything_else_is_worth_nothing(solution: str) -> None:
    assert compute_score("quickstart", solution, "408", extra_info={"index": 0}, more="ignored") == 0.0


def test_a_negative_number_and_leading_zeros_are_numbers() -> None:
    assert final_answer("\\boxed{-12}") == -12
    assert final_answer("\\boxed{007}") == 7
