"""The task: questions that a calculator cannot answer and a line or four of Python can.

Everything derives from a seed. Whether a problem may be trained on or is held out depends on its program alone, so no two sets
of different splits ever share one.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from examples.quickstart.task import HELD_OUT_ONE_IN, NAMES, SMALLEST_ANSWER, THINGS, Split

LARGEST = 9_999_999
"""No answer is larger."""
PLAIN, OTHER = 0, 1
"""The two ways to ask, by their place in `PHRASES`."""


@dataclass(frozen=True, slots=True)
class Problem:
    question: str
    code: str
    """A program whose last expression is the answer."""
    answer: int
    """Calculated here, not by the program."""
    kind: str
    """A key of `PHRASES`."""
    phrase: int
    """How it is asked: `PLAIN` or `OTHER`."""

    @property
    def depth(self) -> int:
        """Lines of the program."""
        return self.code.count("\n") + 1

    @property
    def split(self) -> Split:
        return "held_out" if zlib.crc32(self.code.encode()) % HELD_OUT_ONE_IN == 0 else "train"


PHRASES = {
    "squares": ("What is the sum of the squares of {listed}?", "Square {listed} and add up the results."),
    "cubes": ("What is the sum of the cubes of {listed}?", "Cube {listed} and add up the results."),
    "steps": (
        "Count from {a} to {end} in steps of {b}. What is the sum of all these numbers?",
        "Add up the numbers from {a} to {end} in steps of {b}.",
    ),
    "multiples": (
        "How many numbers from 1 to {end} are multiples of {a} but not of {b}?",
        "Count the numbers up to {end} that {a} divides and {b} does not.",
    ),
    "divisor": (
        "What is the greatest common divisor of {a} and {b}?",
        "Find the largest number that divides both {a} and {b}.",
    ),
    "multiple": (
        "What is the least common multiple of {a} and {b}?",
        "Find the smallest number that both {a} and {b} divide.",
    ),
    "digits": ("What is the sum of the digits of {a} ** {b}?", "Add up the digits of {a} ** {b}."),
    "remainder": (
        "What is the remainder of {a} ** {b} divided by {c}?",
        "Divide {a} ** {b} by {c}. What is left over?",
    ),
    "savings": (
        "{name} saves {a} coins in the first week, and each week {b} more than in the week before. "
        "How many coins in {c} weeks?",
        "{name} runs {a} miles in the first year, and each year {b} more than in the year before. How many miles in {c} years?",
    ),
    "shop": (
        "{name} buys {a} {things} at {b} dollars each, {c} pears at {d} and {e} plums at {f}. How many dollars in all?",
        "{a} {things} cost {b} dollars each, {c} pears {d} and {e} plums {f}. How many dollars does {name} pay for them?",
    ),
    "pond": (
        "A pond has {a} frogs. Each year their number {grows} and then {b} {leave}. How many frogs after {c} years?",
        "{name} has {a} fish. Every month their number {grows} and then {b} {leave}. How many fish after {c} months?",
    ),
    "sequence": (
        "A list begins with {a} and {b}; each further number is the sum of the two before. What is number {c}?",
        "Begin with {a} and {b} and go on with the sum of the last two numbers. What is number {c} of the list?",
    ),
}

Made = tuple[dict[str, object], str, int]
"""What the phrase is filled with, the program, the answer."""


def _powers(draw: random.Random, power: int) -> Made:
    numbers = [draw.randint(11, 99) for _ in range(draw.randint(3, 5))]
    listed = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    return {"listed": listed}, f"sum(n ** {power} for n in {numbers})", sum(n**power for n in numbers)


def _steps(draw: random.Random) -> Made:
    a, b = draw.randint(2, 99), draw.randint(3, 29)
    end = a + b * draw.randint(8, 60)
    return {"a": a, "b": b, "end": end}, f"sum(range({a}, {end} + 1, {b}))", sum(range(a, end + 1, b))


def _multiples(draw: random.Random) -> Made:
    a, b, end = draw.randint(3, 29), draw.randint(2, 9), draw.randint(1000, 9999)
    code = f"sum(n % {a} == 0 and n % {b} > 0 for n in range(1, {end} + 1))"
    return {"a": a, "b": b, "end": end}, code, end // a - end // math.lcm(a, b)


def _divisor(draw: random.Random) -> Made:
    common = draw.randint(12, 99)
    a, b = (common * draw.randint(3, 99) for _ in range(2))
    return {"a": a, "b": b}, f"import math\nmath.gcd({a}, {b})", math.gcd(a, b)


def _multiple(draw: random.Random) -> Made:
    a, b = (draw.randint(12, 999) for _ in range(2))
    return {"a": a, "b": b}, f"import math\nmath.lcm({a}, {b})", math.lcm(a, b)


def _digits(draw: random.Random) -> Made:
    a, b = draw.randint(12, 99), draw.randint(10, 99)
    return {"a": a, "b": b}, f"sum(int(d) for d in str({a} ** {b}))", sum(map(int, str(a**b)))


def _remainder(draw: random.Random) -> Made:
    a, b, c = draw.randint(12, 99), draw.randint(12, 99), draw.randint(101, 999)
    return {"a": a, "b": b, "c": c}, f"{a} ** {b} % {c}", pow(a, b, c)


def _savings(draw: random.Random) -> Made:
    a, b, c = draw.randint(11, 99), draw.randint(2, 29), draw.randint(11, 60)
    return {"a": a, "b": b, "c": c}, f"sum({a} + {b} * k for k in range({c}))", sum(a + b * k for k in range(c))


def _shop(draw: random.Random) -> Made:
    a, b, c, d, e, f = (draw.randint(2, 99) for _ in range(6))
    words: dict[str, object] = {"a": a, "b": b, "c": c, "d": d, "e": e, "f": f}
    return words, f"sum(n * p for n, p in [({a}, {b}), ({c}, {d}), ({e}, {f})])", a * b + c * d + e * f


def _pond(draw: random.Random) -> Made:
    (grows, factor), (leave, sign) = draw.choice((("doubles", 2), ("triples", 3))), draw.choice((("leave", "-"), ("come", "+")))
    a, b, c = draw.randint(20, 99), draw.randint(2, 19), draw.randint(3, 9)
    number = a
    for _ in range(c):
        number = number * factor + (b if sign == "+" else -b)
    code = f"n = {a}\nfor _ in range({c}):\n    n = n * {factor} {sign} {b}\nn"
    return {"a": a, "b": b, "c": c, "grows": grows, "leave": leave}, code, number


def _sequence(draw: random.Random) -> Made:
    a, b, c = draw.randint(2, 29), draw.randint(2, 29), draw.randint(10, 20)
    now, following = a, b
    for _ in range(c - 1):
        now, following = following, now + following
    code = f"a, b = {a}, {b}\nfor _ in range({c} - 1):\n    a, b = b, a + b\na"
    return {"a": a, "b": b, "c": c}, code, now


MAKE: dict[str, Callable[[random.Random], Made]] = {
    "squares": partial(_powers, power=2),
    "cubes": partial(_powers, power=3),
    "steps": _steps,
    "multiples": _multiples,
    "divisor": _divisor,
    "multiple": _multiple,
    "digits": _digits,
    "remainder": _remainder,
    "savings": _savings,
    "shop": _shop,
    "pond": _pond,
    "sequence": _sequence,
}


def problems(seed: int | str, split: Split) -> Iterator[Problem]:
    """Endless problems of one split; the same seed gives the same ones. A question may come twice."""
    draw = random.Random(f"{seed}/{split}")
    while True:
        kind, phrase = draw.choice(tuple(MAKE)), draw.choice((PLAIN, OTHER))
        words, code, answer = MAKE[kind](draw)
        names = {"name": draw.choice(NAMES), "things": draw.choice(THINGS)}
        problem = Problem(PHRASES[kind][phrase].format(**names | words), code, answer, kind, phrase)
        if problem.split == split and _is_fair(problem):
            yield problem


def _is_fair(problem: Problem) -> bool:
    """The answer is neither small nor huge, nor a number that can be read off the question."""
    stands_there = str(problem.answer) in "".join(c if c.isdigit() else " " for c in problem.question).split()
    return SMALLEST_ANSWER <= problem.answer <= LARGEST and not stands_there
