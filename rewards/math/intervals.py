"""Sets of real numbers with known ends, from intervals, unions and inequalities, in one canonical form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cmp_to_key
from typing import Any

import mpmath  # type: ignore[import-untyped, unused-ignore]

from agentloop.expressions.tree import Node, names
from agentloop.expressions.value import Huge, NoNumber, Undefined, is_real, same_value, value


class NoSet(ValueError):
    """It is no set of real numbers whose ends are known."""


@dataclass(frozen=True, slots=True)
class Piece:
    """From `low` to `high`, each with whether it belongs."""

    low: Any
    low_in: bool
    high: Any
    high_in: bool


class Intervals:
    """Pieces in order, none touching the next."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces: list[Piece] = []
        for piece in sorted(pieces, key=cmp_to_key(_by_low)):
            order = _compare(piece.low, piece.high)
            if order > 0 or (order == 0 and not (piece.low_in and piece.high_in)):
                continue
            last = self.pieces[-1] if self.pieces else None
            if last is not None:
                gap = _compare(piece.low, last.high)
                if gap < 0 or (gap == 0 and (piece.low_in or last.high_in)):
                    further = _compare(piece.high, last.high)
                    high_in = piece.high_in if further > 0 else last.high_in or (further == 0 and piece.high_in)
                    self.pieces[-1] = Piece(last.low, last.low_in, piece.high if further > 0 else last.high, high_in)
                    continue
            self.pieces.append(piece)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Intervals)
            and len(self.pieces) == len(other.pieces)
            and all(
                one.low_in == two.low_in
                and one.high_in == two.high_in
                and same_value(one.low, two.low)
                and same_value(one.high, two.high)
                for one, two in zip(self.pieces, other.pieces, strict=True)
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def complement(self) -> Intervals:
        pieces: list[Piece] = []
        low, low_in = -mpmath.inf, False
        for piece in self.pieces:
            pieces.append(Piece(low, low_in, piece.low, not piece.low_in))
            low, low_in = piece.high, not piece.high_in
        if low != mpmath.inf:
            pieces.append(Piece(low, low_in, mpmath.inf, False))
        return Intervals([p for p in pieces if not (_infinite(p.low) and _infinite(p.high) and p.low == p.high)])

    def meet(self, other: Intervals) -> Intervals:
        outside = Intervals([*self.complement().pieces, *other.complement().pieces])
        return outside.complement()


def intervals(node: Node) -> Intervals:
    """The set that a tree describes. Raises `NoSet`."""
    try:
        return _intervals(node)
    except (NoNumber, Undefined, Huge) as error:
        raise NoSet(str(error)) from error


def _intervals(node: Node) -> Intervals:
    if node.op == "tuple" and len(node.args) == 2:
        low, high = (_real(arg) for arg in node.args)
        low_in, high_in = node.text[0] == "[" and not _infinite(low), node.text[1] == "]" and not _infinite(high)
        interval = Intervals([Piece(low, low_in, high, high_in)])
        if not interval.pieces:
            raise NoSet("a point rather than an interval: it would have nothing in it")
        return interval
    if node.op == "set" or (node.op == "list" and node.text != ";"):
        if all(arg.op == "rel" and arg.text != "=" for arg in node.args) and node.args and node.op == "list":
            return _together(node)
        if node.op == "list" and node.args[0].op == "rel" and node.args[0].text == "!=" and len(node.args[0].args) == 2:
            unknown, ends = node.args[0].args[0], node.args[1:]  # x ≠ 1, 2
            if all(end.op != "rel" for end in ends):
                return _together(Node("list", (node.args[0], *(Node("rel", (unknown, end), "!=") for end in ends))))
        if any(arg.op == "tuple" for arg in node.args) and node.op == "list" and len(node.args) > 1:
            return Intervals([piece for arg in node.args for piece in _intervals(arg).pieces])  # (1, 2) or (3, 4)
        found = [_real(arg) for arg in node.args]
        return Intervals([Piece(point, True, point, True) for point in found])
    if node.op == "union":
        return Intervals([piece for arg in node.args for piece in _intervals(arg).pieces])
    if node.op == "inter":
        result = _intervals(node.args[0])
        for arg in node.args[1:]:
            result = result.meet(_intervals(arg))
        return result
    if node.op == "diff":
        return _intervals(node.args[0]).meet(_intervals(node.args[1]).complement())
    if node.op == "space" and node.text == "R":
        return Intervals([Piece(-mpmath.inf, False, mpmath.inf, False)])
    if node.op == "space" and node.text in ("R+", "R_+", "R++"):
        return Intervals([Piece(mpmath.mpf(0), False, mpmath.inf, False)])
    if node.op == "opaque" and node.text == "builder":
        return _built(node)
    if node.op == "rel":
        return _relation(node)
    raise NoSet(f"a {node.op}")


def _together(node: Node) -> Intervals:
    """`x < 1 or x > 2` is a union. With «and» or a comma it is what holds together, if anything does."""
    parts = [_intervals(arg) for arg in node.args]
    union = Intervals([piece for part in parts for piece in part.pieces])
    if len({*map(_unknown, node.args)}) != 1:
        raise NoSet("conditions on several unknowns")
    if node.text == "or":
        return union
    common = parts[0]
    for part in parts[1:]:
        common = common.meet(part)
    return common if common.pieces else union


def _unknown(node: Node) -> str:
    return ",".join(sorted(names(node)))


def _built(node: Node) -> Intervals:
    """`{x ∈ ℝ | 0 < x}`"""
    what, condition = node.args
    if what.op == "rel" and what.text == "in":
        return _intervals(condition).meet(_intervals(what.args[1]))
    if what.op != "sym":
        raise NoSet("a set of something else than its unknown")
    return _intervals(condition)


def _relation(node: Node) -> Intervals:
    operators = node.text.split()
    if operators == ["in"] and not names(node.args[1]):
        return _intervals(node.args[1])
    if not set(operators) <= {"<", "<=", ">", ">=", "!="}:
        raise NoSet(f"the relation {node.text}")
    unknown = [place for place, side in enumerate(node.args) if names(side)]
    if len(unknown) != 1:
        raise NoSet("one side with the unknown is needed")
    place = unknown[0]
    middle = node.args[place]
    inner = middle.args[0] if middle.op == "call" and middle.text == "abs" else middle
    if not (inner.op == "sym" or (inner.op == "mul" and inner.args[0].op == "sym" and inner.args[0].text in "fghFGP")):
        return _solved(node)
    result = Intervals([Piece(-mpmath.inf, False, mpmath.inf, False)])
    if place > 0:
        if place > 1:
            raise NoSet("a longer chain")
        result = result.meet(_side(_turned(operators[0]), _real(node.args[0])))
    if place < len(node.args) - 1:
        if place < len(node.args) - 2:
            raise NoSet("a longer chain")
        result = result.meet(_side(operators[place], _real(node.args[place + 1])))
    if inner is middle:
        return result
    positive = result.meet(Intervals([Piece(_zero(), True, mpmath.inf, False)]))
    mirrored = [Piece(-piece.high, piece.high_in, -piece.low, piece.low_in) for piece in positive.pieces]
    return Intervals([*positive.pieces, *mirrored])


def _solved(node: Node) -> Intervals:
    """An inequality of one unknown that does not stand alone, as sympy solves it over the real numbers."""
    import sympy

    from agentloop.expressions.build import build

    unknowns = names(node)
    if len(unknowns) != 1 or len(node.args) != 2 or sum(1 for _ in node.walk()) > 60:
        raise NoSet("it is no inequality of one unknown")
    try:
        relation = build(node)
        (unknown,) = relation.free_symbols
        real = sympy.Symbol("x", real=True)
        found = sympy.solve_univariate_inequality(relation.subs(unknown, real), real, relational=False)
    except (NotImplementedError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise NoSet(str(error)) from error
    pieces: list[Piece] = []
    for part in found.args if isinstance(found, sympy.Union) else (found,):
        if isinstance(part, sympy.FiniteSet):
            ends = [_number(end) for end in part.args]
            pieces += [Piece(end, True, end, True) for end in ends]
        elif isinstance(part, sympy.Interval):
            low_in, high_in = not bool(part.left_open), not bool(part.right_open)
            pieces.append(Piece(_number(part.start), low_in, _number(part.end), high_in))
        elif part is not sympy.S.EmptySet:
            raise NoSet("no intervals")
    return Intervals(pieces)


def _number(end: Any) -> Any:
    with mpmath.workdps(120):
        return mpmath.mpf(str(end.evalf(120))) if end.is_finite else (mpmath.inf if end.is_extended_positive else -mpmath.inf)


def _zero() -> Any:
    return mpmath.mpf(0)


def _turned(operator: str) -> str:
    return {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(operator, operator)


def _side(operator: str, end: Any) -> Intervals:
    """`x operator end`."""
    if operator == "!=":
        return Intervals([Piece(end, True, end, True)]).complement()
    if operator in ("<", "<="):
        return Intervals([Piece(-mpmath.inf, False, end, operator == "<=" and not _infinite(end))])
    return Intervals([Piece(end, operator == ">=" and not _infinite(end), mpmath.inf, False)])


def _real(node: Node) -> Any:
    found = value(node)
    if not is_real(found):
        raise NoSet("not a real number")
    return found if not isinstance(found, mpmath.mpc) else found.real


def _infinite(found: Any) -> bool:
    return isinstance(found, mpmath.mpf) and bool(mpmath.isinf(found))


def _compare(left: Any, right: Any) -> int:
    if same_value(left, right):
        return 0
    with mpmath.workdps(110):
        one = left if isinstance(left, mpmath.mpf) else mpmath.mpf(left.numerator) / left.denominator
        two = right if isinstance(right, mpmath.mpf) else mpmath.mpf(right.numerator) / right.denominator
        return -1 if one < two else 1


def _by_low(left: Piece, right: Piece) -> int:
    return _compare(left.low, right.low) or int(right.low_in) - int(left.low_in)
