"""The reward: 1 if the last turn ends with the right `\\boxed{}` number, else 0. Nothing else is looked at.

verl loads this file by its path (`reward.custom_reward_function.path`), so it imports nothing of its neighbours.
"""

from __future__ import annotations

import re
from typing import Any

BOXED = re.compile(r"\\boxed\{(-?\d{1,12})\}\s*(?:<\|im_end\|>\s*)?\Z", re.ASCII)
OPEN, CLOSE = "<tool_response>", "</tool_response>"


def final_answer(solution: str) -> int | None:
    """The number that the conversation ends with, or `None`.

    `solution` is everything after the prompt as text: turns of the model and of the calculator, the control tokens left out
    or not (verl leaves them out, so turns are told apart by nothing but the tags). Only a box at the very end counts. It is
    the model's, since what a tool says stands between two tags, and a text that ends inside of them is refused.
    """
    match = BOXED.search(solution)
    if match is None or solution.rfind(OPEN) > solution.rfind(CLOSE):
        return None
    return int(match[1])


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> float:
    """verl's reward function. `ground_truth` is the answer as a decimal number."""
    return float(final_answer(solution_str) == int(ground_truth))
