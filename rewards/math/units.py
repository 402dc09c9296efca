"""What a quantity is measured in: dimensions and a factor, of a unit in words (`km/h`, `square feet`) or of letters that were
read as symbols (`20 m/s`)."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from agentloop.expressions.tree import Node, number
from agentloop.expressions.words import UNITS

_COMPOUND = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_LETTERS = {letter: letter.casefold() for letter in ("m", "s", "h", "g", "L", "l", "N", "J", "W", "V")}
"""Single letters that may be units, as `UNITS` has them."""
_TOKEN = re.compile(r"\^-?[0-9]+|/|[^\s/^*·]+")

Unit = tuple[str, Fraction]
"""Dimensions, such as `length^1 time^-1`, and the factor to their base units; of words that are no unit the words."""


def unit(text: str) -> Unit:
    """Of `cm`, `cm ^2`, `square feet`, `cubic m`, `km / h`, `meters per second`; of anything else its words."""
    dimensions: Counter[str] = Counter()
    factor = Fraction(1)
    sign, prefix = 1, 1
    last: tuple[str, Fraction, int] | None = None
    words = _TOKEN.findall(" ".join(_COMPOUND.get(word, word) for word in text.split()))
    for at, word in enumerate(words):
        if word in ("/", "per"):
            sign, last = -1, None
        elif last is not None and (word[0] == "^" or word in ("squared", "cubed")):
            more = (int(word[1:]) if word[0] == "^" else POWERS[word]) - 1
            if abs(more) > 9:
                return _words(text)
            dimensions[last[0]] += last[2] * more
            factor *= last[1] ** (last[2] * more)
            last = None
        elif word in POWERS and at + 1 < len(words):
            prefix = POWERS[word]
        elif word in UNITS:
            dimension, size, _ = UNITS[word]
            dimensions[dimension] += sign * prefix
            factor *= Fraction(size) ** (sign * prefix)
            last = (dimension, Fraction(size), sign) if prefix == 1 else None
            sign = prefix = 1
        else:
            return _words(text)
    return _based(dimensions, factor) if dimensions else ("", factor)


def _words(text: str) -> Unit:
    return " ".join(word.removesuffix("s") for word in text.split()), Fraction(1)


def _based(dimensions: Counter[str], factor: Fraction) -> Unit:
    """With litres as cubes of a length."""
    litres = dimensions.pop("volume", 0)
    dimensions["length"] += 3 * litres
    return _named(dimensions), factor * Fraction(1, 1000) ** litres


def _named(dimensions: Counter[str]) -> str:
    return " ".join(f"{name}^{power}" for name, power in sorted(dimensions.items()) if power)


def letters(node: Node) -> tuple[Node, Unit] | None:
    """A product that ends in letters which may be units, as the quantity before them and their unit; `None` if it is none."""
    if node.op == "neg":
        inner = letters(node.args[0])
        return inner and (Node("neg", (inner[0],)), inner[1])
    if node.op == "div":
        above, below = letters(node.args[0]), _measure(node.args[1])
        if above is None or below is None:
            return None
        held = Counter(dict(_parsed(above[1][0])))
        held.subtract(below[0])
        return above[0], _based(held, above[1][1] / below[1])
    if node.op != "mul":
        return None
    rest, dimensions, factor = list(node.args), Counter[str](), Fraction(1)
    while len(rest) > 1 and (measure := _measure(rest[-1])) is not None:
        dimensions.update(measure[0])
        factor *= measure[1]
        rest.pop()
    if not dimensions:
        return None
    return (rest[0] if len(rest) == 1 else Node("mul", tuple(rest))), _based(dimensions, factor)


def _parsed(named: str) -> list[tuple[str, int]]:
    return [(name, int(power)) for name, _, power in (part.partition("^") for part in named.split())]


def _measure(node: Node) -> tuple[Counter[str], Fraction] | None:
    """Dimensions and factor of letters alone."""
    if node.op == "sym" and node.text in _LETTERS:
        dimension, size, _ = UNITS[_LETTERS[node.text]]
        return Counter({dimension: 1}), Fraction(size)
    if node.op == "pow" and node.args[1].op == "num" and node.args[1].value in (2, 3):
        inner = _measure(node.args[0])
        power = int(node.args[1].value or 1)
        return inner and (Counter({name: count * power for name, count in inner[0].items()}), inner[1] ** power)
    if node.op in ("mul", "div"):
        held, factor = Counter[str](), Fraction(1)
        for at, arg in enumerate(node.args):
            inner = _measure(arg)
            if inner is None:
                return None
            sign = -1 if node.op == "div" and at else 1
            for name, count in inner[0].items():
                held[name] += sign * count
            factor *= inner[1] ** sign
        return held, factor
    return None


def in_units_of(quantity: Node, own: Unit, other: Unit) -> Node | None:
    """`quantity` of the unit `own`, in the unit `other`; `None` if they measure different things."""
    if not own[0] or own[0] != other[0]:
        return None
    factor = own[1] / other[1]
    return quantity if factor == 1 else Node("mul", (quantity, number(factor)))


def annotation(node: Node) -> tuple[str, Node]:
    """A unit, `%` or `degree`, and what it stands at; a sign before it belongs to the number."""
    if node.op == "neg":
        mark, inner = annotation(node.args[0])
        return mark, Node("neg", (inner,))
    if node.op == "unit":
        inner_mark, inner = annotation(node.args[0])
        if node.text.casefold() in ("c", "f") and inner_mark == "degree":
            return f"degree {node.text.casefold()}", inner
        return node.text, inner
    if node.op == "percent":
        return "%", node.args[0]
    if node.op == "degree":
        return "degree", node.args[0]
    return "", node
