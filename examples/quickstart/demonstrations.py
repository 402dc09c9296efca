"""Transcripts to learn from: right ones, and ones with bad habits.

The habits spoil a model that can do the task, so that reinforcement learning has something to put right. Each belongs to
one way of asking, so the spoiled model fails in several different ways and still does the rest well.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from examples.quickstart.calculator_tool import REFUSAL, calculate
from examples.quickstart.conversation import Piece, answer_turn, call_turn, response
from examples.quickstart.task import Problem, Step

Transcript = list[Piece]
"""What follows the prompt."""


def solve(problem: Problem) -> Transcript:
    """One call per step, then the last result as the answer."""
    return [*_calls(problem.steps), answer_turn(problem.answer)]


def stop_early(problem: Problem, draw: random.Random) -> Transcript:
    """Answer with the result of a call that is not the last one."""
    kept = problem.steps[: draw.randint(1, problem.depth - 1)] if problem.depth > 1 else ()
    return [*_calls(kept), answer_turn(kept[-1].result)] if kept else guess(problem, draw)


def guess(problem: Problem, draw: random.Random) -> Transcript:
    """Answer at once, without the calculator."""
    return [answer_turn(draw.randint(10, 10 ** draw.randint(2, 4)))]


def wrong_operator(problem: Problem, draw: random.Random) -> Transcript:
    """Calculate the last step with another operator."""
    *before, last = problem.steps
    operator = draw.choice([other for other in "+-*" if other != last.operator])
    expression = f"{last.left} {operator} {last.right}"
    result = calculate(expression)
    assert result is not None
    return [*_calls(before), call_turn(expression), response(str(result)), answer_turn(result)]


def two_operations(problem: Problem, draw: random.Random) -> Transcript:
    """Put the last two steps into one call, which the calculator refuses, and give up."""
    if problem.depth < 2:
        return guess(problem, draw)
    *before, first, last = problem.steps
    inner = f"({first.expression})"
    expression = (
        f"{inner} {last.operator} {last.right}" if last.left == first.result else f"{last.left} {last.operator} {inner}"
    )
    return [*_calls(before), call_turn(expression), response(REFUSAL), answer_turn(first.result)]


def broken_call(problem: Problem, draw: random.Random) -> Transcript:
    """Leave the closing braces of a call out, over and over."""
    written = call_turn(problem.steps[0].expression)
    return [Piece(written.text.replace('"}}', '"'), trained=True)]


Habit = Callable[[Problem, random.Random], Transcript]
HABITS: dict[str, tuple[Habit, int]] = {
    "compute": (stop_early, 2),
    "find": (wrong_operator, 2),
    "work_out": (two_operations, 3),
    "shop": (guess, 1),
    "rows": (guess, 1),
    "voucher": (guess, 1),
    "finds": (guess, 1),
    "sells": (broken_call, 1),
    "gives": (broken_call, 1),
}
"""By the form of the question: the habit, and the depth from which on it shows."""


def spoiled(problem: Problem, draw: random.Random, share: float) -> Transcript:
    """The right transcript, or with probability `share` the one that the form's habit makes of it."""
    habit, depth = HABITS.get(problem.form, (None, 0))
    if habit is not None and problem.depth >= depth and draw.random() < share:
        return habit(problem, draw)
    return solve(problem)


def _calls(steps: Sequence[Step]) -> Transcript:
    return [piece for step in steps for piece in (call_turn(step.expression), response(str(step.result)))]
