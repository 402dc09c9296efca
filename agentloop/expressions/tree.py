"""The tree that mathematical text is read into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_DEPTH = 60
"""Nested brackets, powers and commands."""
MAX_LENGTH = 4000
"""Characters of one expression."""
MAX_DIGITS = 2000
"""Digits of one number."""


class Unreadable(ValueError):
    """The text is no expression of the grammar; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation and what it is applied to.

    | op | text | args |
    |---|---|---|
    | `num` | the literal | none; `value` is exact |
    | `sym` | name, with subscript (`x_1`) and primes | none |
    | `const` | `pi`, `e`, `i`, `inf` | none |
    | `add`, `mul` | | two or more |
    | `neg`, `fact`, `percent`, `degree`, `pm` | | one |
    | `div`, `pow`, `plusminus` | | two |
    | `call` | name of the function | its arguments; `log` of two: (value, base) |
    | `opaque` | `sum`, `int`, `overline`, … | parts of what is only compared in writing |
    | `tuple` | its brackets, such as `(]` | items |
    | `set`, `list` | `list`: its separator, if `;` | items; a `list` stands without braces |
    | `matrix`, `row` | | rows, items |
    | `rel` | operators, joined by spaces (`< <=`) | one more than operators |
    | `union`, `inter`, `diff`, `ratio` | | two or more |
    | `base` | digits | none; `value` is the base |
    | `unit` | the annotation (`cm`, `apples`) | the quantity |
    | `space` | `R`, `Q`, `Z`, `N`, `C` | none |
    """

    op: str
    args: tuple[Node, ...] = ()
    text: str = ""
    value: Fraction | None = None

    def walk(self) -> Iterator[Node]:
        yield self
        for arg in self.args:
            yield from arg.walk()


def number(value: int | Fraction, text: str = "") -> Node:
    return Node("num", (), text or str(value), Fraction(value))


def names(node: Node) -> set[str]:
    """The symbols of a tree."""
    return {part.text for part in node.walk() if part.op == "sym"}


def written(node: Node) -> str:
    """A canonical spelling: equal trees have equal ones, whatever the order of sums, products, sets and lists."""
    if node.op == "num":
        return str(node.value)
    parts = [written(arg) for arg in node.args]
    if node.op in ("add", "mul", "set", "union", "inter"):
        parts.sort()
    return f"{node.op}:{node.text}({','.join(parts)})"
