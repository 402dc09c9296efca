"""Transcripts to learn from: right ones, and ones with bad habits.

The habits spoil a model that can do the task, so that reinforcement learning has something to put right. Each belongs to
one way of asking, so the spoiled model fails in several different ways and still does the rest well.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from agentloop.chat.hermes import parse_text
from examples.quickstart.calculator_tool import REFUSAL, calculate
from examples.quickstart.conversation import Exchange, Transcript, call, final
from examples.quickstart.task import Problem, Step

MISTAKEN_FOR = {"+": "*", "-": "+", "*": "+"}


def solve(problem: Problem) -> Transcript:
    """One call per step, then the last result as the answer."""
    return [*_calls(problem.steps), Exchange(final(problem.answer))]


def stop_early(problem: Problem) -> Transcript:
    """Answer with the result of the last call but one."""
    kept = problem.steps[:-1]
    return [*_calls(kept), Exchange(final(kept[-1].result))]


def guess(problem: Problem) -> Transcript:
    """Answer at once, without the calculator, with a number of the question."""
    return [_give_up(problem)]


def wrong_operator(problem: Problem) -> Transcript:
    """Calculate the last step with another operator."""
    *before, last = problem.steps
    expression = f"{last.left} {MISTAKEN_FOR[last.operator]} {last.right}"
    result = calculate(expression)
    assert result is not None
    return [*_calls(before), Exchange(call(expression), str(result)), Exchange(final(result))]


def two_operations(problem: Problem) -> Transcript:
    """Put the last two steps into one call, which the calculator refuses, and give up."""
    *before, first, last = problem.steps
    inner = f"({first.expression})"
    expression = (
        f"{inner} {last.operator} {last.right}" if last.left == first.result else f"{last.left} {last.operator} {inner}"
    )
    return [*_calls(before), Exchange(call(expression), REFUSAL), _give_up(problem)]


def broken_call(problem: Problem) -> Transcript:
    """Leave the closing braces of the first call out, and give up when told so."""
    written = call(problem.steps[0].expression).replace("}}", "")
    return [Exchange(written, f"Error: {parse_text(written).errors[0]}"), _give_up(problem)]


Habit = Callable[[Problem], Transcript]
HABITS: dict[str, tuple[Habit, int]] = {
    "compute": (stop_early, 2),
    "find": (guess, 2),
    "work_out": (two_operations, 3),
    "shop": (guess, 1),
    "rows": (guess, 1),
    "voucher": (wrong_operator, 1),
    "finds": (broken_call, 1),
    "sells": (broken_call, 1),
    "gives": (broken_call, 1),
}
"""By the form of the question: the habit, and the depth from which on it shows."""


def spoiled(problem: Problem, draw: random.Random, share: float) -> Transcript:
    """The right transcript, or with probability `share` the one that the form's habit makes of it."""
    habit, depth = HABITS.get(problem.form, (None, 0))
    if habit is not None and problem.depth >= depth and draw.random() < share:
        return habit(problem)
    return solve(problem)


def _calls(steps: Sequence[Step]) -> list[Exchange]:
    return [Exchange(call(step.expression), str(step.result)) for step in steps]


def _give_up(problem: Problem) -> Exchange:
    return Exchange(final(problem.steps[0].left))
