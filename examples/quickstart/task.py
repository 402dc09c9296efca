"""The task: arithmetic that the model cannot do in its head.

A `Problem` is an expression tree with a question about it: the bare expression, or a short story. The calculator takes one
operation per call, so a problem of depth n needs n calls. Everything derives from a seed, and whether a problem may be
trained on or is held out depends on its expression alone, so no two sets of different splits ever share one.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

Operator = Literal["+", "-", "*"]
Split = Literal["train", "held_out"]

APPLY: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
LARGEST = 99_999
"""No result on the way is larger, and none is negative."""
SMALLEST_ANSWER = 10
STORY_SHARE = 0.3
OPERATIONS = (1, 1, 2, 2, 2, 2, 3, 3, 3, 4)
"""How many operations a bare expression has, drawn evenly from these."""
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the calculator and its result."""

    left: int
    operator: Operator
    right: int
    result: int

    @property
    def expression(self) -> str:
        return f"{self.left} {self.operator} {self.right}"


@dataclass(frozen=True, slots=True)
class Operation:
    operator: Operator
    left: Node
    right: Node


Node = int | Operation


@dataclass(frozen=True, slots=True)
class Problem:
    question: str
    expression: str
    """The whole of it in one line, with brackets where they are needed."""
    steps: tuple[Step, ...]
    """The calls that solve it, innermost and leftmost first."""
    form: str
    """How it is asked: one of `PHRASES` or the name of a story."""

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def depth(self) -> int:
        """Calls needed."""
        return len(self.steps)

    @property
    def split(self) -> Split:
        return "held_out" if zlib.crc32(self.expression.encode()) % HELD_OUT_ONE_IN == 0 else "train"


PHRASES = {"what_is": "What is {}?", "compute": "Compute {}.", "find": "Find {}.", "work_out": "Work out {}."}

NAMES = ("Ana", "Ben", "Mia", "Leo", "Zoe", "Sam", "Ida", "Max")
THINGS = ("apples", "pens", "books", "coins", "cards", "eggs", "cups", "nails")
BOXES = ("box", "bag", "crate", "shelf")

STORIES: dict[str, tuple[str, Callable[[int, int, int, int, int], Node]]] = {
    "more": (
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have?",
        lambda a, b, c, d, e: Operation("+", a, b),
    ),
    "finds": (
        "Each {box} holds {a} {things}. {name} fills {b} and finds {c} more {things}. How many {things} in all?",
        lambda a, b, c, d, e: Operation("+", Operation("*", a, b), c),
    ),
    "sells": (
        "{name} has {a} {things} and buys {b} more. Then {name} sells all of them for {c} dollars each. How many dollars?",
        lambda a, b, c, d, e: Operation("*", Operation("+", a, b), c),
    ),
    "loses": (
        "Each {box} holds {a} {things}. {name} fills {b} and loses {c} {things}. How many {things} are left?",
        lambda a, b, c, d, e: Operation("-", Operation("*", a, b), c),
    ),
    "gives": (
        "{name} has {a} {things}, buys {b} more and gives away {c}. How many {things} are left?",
        lambda a, b, c, d, e: Operation("-", Operation("+", a, b), c),
    ),
    "rows": (
        "A {box} has {a} rows of {b} {things} and {c} extra. {name} has {d} of them. How many {things} in all?",
        lambda a, b, c, d, e: Operation("*", Operation("+", Operation("*", a, b), c), d),
    ),
    "shop": (
        "{name} buys {a} {things} at {b} dollars each and {c} pears at {d} dollars each. How many dollars in all?",
        lambda a, b, c, d, e: Operation("+", Operation("*", a, b), Operation("*", c, d)),
    ),
    "voucher": (
        "{name} buys {a} {things} at {b} dollars each and {c} pears at {d} dollars each with a voucher of {e} dollars. "
        "How many dollars are left to pay?",
        lambda a, b, c, d, e: Operation("-", Operation("+", Operation("*", a, b), Operation("*", c, d)), e),
    ),
}


def value(node: Node) -> int:
    return node if isinstance(node, int) else APPLY[node.operator](value(node.left), value(node.right))


def steps(node: Node) -> list[Step]:
    """The operations of a tree in the order of their calls."""
    if isinstance(node, int):
        return []
    left, right = value(node.left), value(node.right)
    return [*steps(node.left), *steps(node.right), Step(left, node.operator, right, APPLY[node.operator](left, right))]


def write(node: Node, outer: int = 0, is_right: bool = False) -> str:
    """The expression as people write it: brackets only where the order of operations needs them."""
    if isinstance(node, int):
        return str(node)
    rank = 2 if node.operator == "*" else 1
    text = f"{write(node.left, rank)} {node.operator} {write(node.right, rank, True)}"
    return f"({text})" if rank < outer or (rank == outer and is_right) else text


def problems(seed: int | str, split: Split) -> Iterator[Problem]:
    """Endless problems of one split; the same seed gives the same ones. A question may come twice."""
    draw = random.Random(f"{seed}/{split}")
    while True:
        problem = _problem(draw)
        if problem is not None and problem.split == split:
            yield problem


class Asked(Protocol):
    """A problem of this task or another."""

    @property
    def question(self) -> str: ...


P = TypeVar("P", bound=Asked)


def distinct(count: int, source: Iterable[P]) -> list[P]:
    """The first `count` problems with different questions."""
    found: dict[str, P] = {}
    for problem in source:
        found.setdefault(problem.question, problem)
        if len(found) == count:
            break
    return list(found.values())


def _problem(draw: random.Random) -> Problem | None:
    """One try; `None` if the numbers do not make a fair problem."""
    if draw.random() < STORY_SHARE:
        form = draw.choice(tuple(STORIES))
        text, build = STORIES[form]
        a, b, c, d, e = (_number(draw) for _ in range(5))
        tree = build(a, b, c, d, e)
        names = {"name": draw.choice(NAMES), "things": draw.choice(THINGS), "box": draw.choice(BOXES)}
        question = text.format(a=a, b=b, c=c, d=d, e=e, **names)
    else:
        form = draw.choice(tuple(PHRASES))
        tree = _tree(draw, draw.choice(OPERATIONS))
        question = PHRASES[form].format(write(tree))
    problem = Problem(question, write(tree), tuple(steps(tree)), form)
    return problem if _is_fair(problem) else None


def _is_fair(problem: Problem) -> bool:
    """Results stay in range, and the answer is neither small nor a number that can be read off on the way."""
    seen = {number for step in problem.steps for number in (step.left, step.right)}
    in_range = all(0 <= step.result <= LARGEST for step in problem.steps)
    return in_range and problem.answer >= SMALLEST_ANSWER and problem.answer not in seen


def _number(draw: random.Random) -> int:
    return draw.randint(2, 99)


def _tree(draw: random.Random, operations: int) -> Node:
    """Mostly a chain, sometimes two branches."""
    if operations == 0:
        return _number(draw)
    lopsided = draw.random() < 0.8
    on_the_left = draw.choice((0, operations - 1)) if lopsided else draw.randint(0, operations - 1)
    operator: Operator = draw.choice(("+", "+", "-", "*", "*"))
    return Operation(operator, _tree(draw, on_the_left), _tree(draw, operations - 1 - on_the_left))
