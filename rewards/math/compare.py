"""Whether an answer says the same as the ground truth.

Equality is exact: rational numbers as fractions, other constants to 95 digits, functions at several points. A decimal is not
taken for the number that it approximates, unless it has 15 digits or more, which is how a program writes what has more.

It is symmetric but for what one side may leave out or add:

- a unit or another annotation, a percent or degree sign, or the name in `x = 5` may be missing on either side;
- `6 pm` for `6` is right, `6` for `6 pm` is not;
- a ground truth that is a choice (`C`) is met by `C. x = 42`, and the other way round.
"""

from __future__ import annotations

from fractions import Fraction

import mpmath  # type: ignore[import-untyped, unused-ignore]

from agentloop.expressions.tree import Node, names, number, written
from agentloop.expressions.value import Huge, NoNumber, Undefined, is_real, points, proportional, same_function, value
from agentloop.expressions.words import UNITS
from agentloop.rewards.math.answers import Answer, read_answer
from agentloop.rewards.math.intervals import NoSet, intervals
from agentloop.rewards.math.matrices import of_matrices
from agentloop.rewards.math.named import (
    differ_in_place,
    expanded,
    is_variable,
    named,
    of_one_argument,
    relates,
    renamed,
    replaced,
    unchained,
    with_any_period,
)
from agentloop.rewards.math.rational import proportional_above
from agentloop.rewards.math.units import POWERS, annotation, in_units_of, letters, unit

MAX_ITEMS = 60
"""Items of a list or set that are matched in any order."""
_INFINITY = Node("const", (), "inf")
_ORDER = {"<": 1, "<=": 1, ">": -1, ">=": -1}


def equal(gold: str, answer: str) -> bool:
    """Whether `answer` says what `gold` says."""
    return same_answer(read_answer(gold), read_answer(answer))


def same_answer(gold: Answer, answer: Answer) -> bool:
    if gold.choice and answer.choice and (gold.lone or answer.lone):
        return gold.choice == answer.choice
    if gold.words and sorted(gold.words.split(" and ")) == sorted(answer.words.split(" and ")):
        return True
    if gold.choices and gold.choices == answer.choices:
        return True
    if gold.time and answer.time:
        return _same_time(gold.time, answer.time)
    if gold.time and gold.time[3]:  # am or pm was asked for
        return False
    return any(same(one, two) for one in gold.trees for two in answer.trees)


def _same_time(gold: tuple[int, int, int, bool], answer: tuple[int, int, int, bool]) -> bool:
    """Where only the answer says am or pm, the ground truth may be of twelve hours."""
    if gold[:3] == answer[:3]:
        return gold[3] <= answer[3] or gold[0] > 12
    return answer[3] and not gold[3] and (gold[0] % 12, *gold[1:3]) == (answer[0] % 12, *answer[1:3])


def same(gold: Node, answer: Node) -> bool:
    """Whether two trees say the same."""
    try:
        return _same(gold, answer)
    except Undefined:
        return False
    except (Huge, NoNumber):
        return written(gold) == written(answer)


def _same(gold: Node, answer: Node) -> bool:
    gold, answer = with_any_period(renamed(gold), renamed(answer))
    whole = gold, answer
    if all(side.op == "rel" and side.text == "=" and len(side.args) == 2 for side in whole) and (
        sorted(map(written, gold.args)) == sorted(map(written, answer.args))  # AB = CD
    ):
        return True
    gold, answer = of_one_argument(gold, answer)
    whole = gold, answer
    gold_name, gold = named(gold)
    name, answer = named(answer)
    if (
        gold_name != name
        and all(side.op == "rel" and side.text == "=" for side in whole)
        and (any(relates(side) for side in whole) or differ_in_place(*whole))
    ):
        return _same_equation(*whole)
    if bool(gold_name) != bool(name) and "rel" in (gold.op, answer.op) and all(side.text == "=" for side in whole):
        return _same_equation(*whole)
    if gold_name and name and gold_name != name and is_variable(gold_name) and is_variable(name) and not names(gold):
        return False
    if {"list", "tuple"} & {gold.op, answer.op}:
        gold, answer = unchained(whole[0], gold), unchained(whole[1], answer)
    gold, answer = of_matrices(expanded(gold)), of_matrices(expanded(answer))
    kinds = {gold.op, answer.op}
    if kinds & {"rel", "union", "inter", "diff", "space"} or any(_is_set_of_numbers(side) for side in (gold, answer)):
        return _same_relation(gold, answer)
    if kinds & {"list", "set", "tuple", "matrix"}:
        return _same_collection(gold, answer)
    if "base" in kinds:
        return _same_base(gold, answer)
    if "ratio" in kinds:
        return _same_ratio(gold, answer)
    return _same_quantity(gold, answer)


def _is_set_of_numbers(node: Node) -> bool:
    """`{x | x > 1}`; `x > 1 and x < 2`"""
    if node.op == "list":
        return all(arg.op == "rel" and set(arg.text.split()) <= {*_ORDER, "!="} for arg in node.args)
    return node.text == "builder"


# -- quantities -------------------------------------------------------------------------------------------------------------


def _same_quantity(gold: Node, answer: Node) -> bool:
    gold_mark, gold = annotation(gold)
    mark, answer = annotation(answer)
    if (angles := _in_radians(gold_mark, gold, mark, answer)) is not None and _same_number(*angles):
        return True
    if gold.op in ("list", "set", "tuple", "matrix", "rel", "union", "base", "ratio") or answer.op in ("list", "rel", "set"):
        return (not gold_mark or not mark or _same_unit(gold_mark, mark) == 1) and _same(gold, answer)
    if gold_mark == mark or not gold_mark or not mark:
        factor = Fraction(1)
        if (gold_mark == "%") != (mark == "%"):  # 10 % is 0.1, and 10 where per cent is understood
            percent, other = (gold, answer) if gold_mark == "%" else (answer, gold)
            if same(Node("div", (percent, number(100))), other):
                return True
    else:
        found = _same_unit(gold_mark, mark)
        if found is None:
            return _letter_unit(gold, gold_mark, answer, mark)
        factor = found
    if factor != 1:
        answer = Node("mul", (answer, number(factor)))
    if (gold_mark and _letter_unit(gold, gold_mark, answer, mark)) or (mark and _letter_unit(answer, mark, gold, gold_mark)):
        return True
    if not gold_mark and not mark and (_compound(gold, answer) or _compound(answer, gold)):
        return True
    return _same_number(gold, answer)


def _in_radians(gold_mark: str, gold: Node, mark: str, answer: Node) -> tuple[Node, Node] | None:
    """Degrees on one side and radians on the other, where both are named: `π/2` alone is not said to be an angle."""
    sides = ((gold_mark, gold), (mark, answer))
    for (one_mark, one), (other_mark, other) in (sides, sides[::-1]):
        if one_mark == "degree" and UNITS.get(other_mark, ("",))[0] == "radian":
            return Node("div", (Node("mul", (one, Node("const", (), "pi"))), number(180))), other
    return None


def _letter_unit(gold: Node, gold_mark: str, answer: Node, mark: str) -> bool:
    """`5 m` without `\\text`: the unit was read as a symbol."""
    found = None if mark else letters(answer)
    if found is None:
        return False
    quantity = in_units_of(found[0], found[1], unit(gold_mark))
    return quantity is not None and same(gold, quantity)


def _compound(quantity: Node, bare: Node) -> bool:
    """`9.8 m/s^2` for `9.8`: a unit of letters that is a quotient can hardly be anything else."""
    found = letters(quantity) if quantity.op == "div" and not names(bare) else None
    return found is not None and not names(found[0]) and same(found[0], bare)


def _same_unit(gold: str, answer: str) -> Fraction | None:
    """By what a quantity in `answer` is multiplied to be one in `gold`; `None` if they measure different things."""
    one, two = unit(gold), unit(answer)
    if one[0] == two[0]:
        return two[1] / one[1]
    left, right = set(gold.split()), set(answer.split())
    known = {word for word in left | right if word in UNITS or word in POWERS or word in ("%", "degree")}
    return Fraction(1) if (left <= right or right <= left) and not known - (left & right) else None


def _same_number(gold: Node, answer: Node) -> bool:
    if gold.op == answer.op == "add" and _ends_in("C", "c", gold, answer):
        gold, answer = replaced(gold, "c", "C"), replaced(answer, "c", "C")
    try:
        if same_function(gold, answer):
            return True
    except NoNumber:
        if gold.op in ("list", "set", "tuple", "matrix", "rel") or answer.op in ("list", "set", "tuple", "matrix", "rel"):
            return False
        raise
    return _rounded_from(gold, answer) or _rounded_from(answer, gold)


def _ends_in(one: str, two: str, gold: Node, answer: Node) -> bool:
    """The constant of integration is `one` on one side and `two` on the other."""
    found = [{one, two} & names(side) for side in (gold, answer)]
    terms = [arg.text for side in (gold, answer) for arg in side.args if arg.op == "sym" and arg.text in (one, two)]
    return len(terms) == 2 and [len(each) for each in found] == [1, 1] and found[0] != found[1]


def _rounded_from(decimal: Node, other: Node) -> bool:
    """A decimal of 15 or more significant digits, which is how a program writes a number, and an exact one that has the same
    15 digits. Two decimals are compared as they stand."""
    sign, literal = (-1, decimal.args[0]) if decimal.op == "neg" else (1, decimal)
    if not _is_decimal(literal) or literal.value is None or names(other):
        return False
    if len(literal.text.replace(".", "").lstrip("0")) < 15 or _is_decimal(other.args[0] if other.op == "neg" else other):
        return False
    found = value(other)
    if not is_real(found):
        return False
    with mpmath.workdps(110):
        exact = mpmath.mpf(found.numerator) / found.denominator if isinstance(found, Fraction) else found.real
        given = mpmath.mpf((sign * literal.value).numerator) / literal.value.denominator
        if given == 0:
            return False
        last = mpmath.mpf(10) ** (mpmath.floor(mpmath.log10(abs(given))) - 14)
        return bool(abs(exact - given) <= last * 0.51)


def _is_decimal(node: Node) -> bool:
    return node.op == "num" and "." in node.text and "e" not in node.text.lower() and "(" not in node.text


def _same_base(gold: Node, answer: Node) -> bool:
    if gold.op == answer.op == "base":
        return gold.value == answer.value and gold.text.lstrip("0") == answer.text.lstrip("0")
    based, other = (gold, answer) if gold.op == "base" else (answer, gold)
    return based.value == 10 and _same(number(int(based.text)), other)


def _same_ratio(gold: Node, answer: Node) -> bool:
    if gold.op == answer.op == "ratio" and len(gold.args) == len(answer.args):
        first = zip(gold.args, answer.args, strict=True)
        if all(same(one, two) for one, two in first):
            return True
        scale = [Node("div", pair) for pair in zip(gold.args, answer.args, strict=True)]
        return all(same(scale[0], other) for other in scale[1:])
    ratio, other = (gold, answer) if gold.op == "ratio" else (answer, gold)
    return len(ratio.args) == 2 and other.op != "ratio" and _same(Node("div", ratio.args), other)


# -- collections ------------------------------------------------------------------------------------------------------------


def _same_collection(gold: Node, answer: Node) -> bool:
    gold, answer = _single(gold), _single(answer)
    if gold.op not in ("list", "set", "tuple", "matrix") and answer.op not in ("list", "set", "tuple", "matrix"):
        return _same(gold, answer)
    if "unit" in (gold.op, answer.op) or "degree" in (gold.op, answer.op) or "percent" in (gold.op, answer.op):
        gold_mark, one = annotation(gold)
        mark, two = annotation(answer)
        return (not gold_mark or not mark or _same_unit(gold_mark, mark) == 1) and _same(one, two)
    kinds = {gold.op, answer.op}
    if "matrix" in kinds:
        return _same_matrix(gold, answer)
    if not kinds <= {"list", "set", "tuple"}:
        return False
    gold, answer = _without_repeats(gold), _without_repeats(answer)
    if len(gold.args) != len(answer.args):
        return False
    if gold.op == answer.op == "tuple":
        if gold.text != answer.text and len(gold.args) == 2 and _INFINITY in (*gold.walk(), *answer.walk()):
            return _same_relation(gold, answer)  # no matter whether infinity is said to belong
        brackets = gold.text == answer.text or (len(gold.args) > 2 and {gold.text, answer.text} <= {"()", "[]"})
        return brackets and _in_order(gold.args, answer.args)
    if kinds == {"set", "tuple"}:
        return len(gold.args) == 0
    if kinds == {"list", "tuple"}:
        written_as = (gold if gold.op == "tuple" else answer).text
        if written_as == "[]" and len(gold.args) == 2:  # an interval
            return False
        return written_as in ("()", "[]") and _in_order(gold.args, answer.args)
    return _in_any_order(gold, answer)


def _single(node: Node) -> Node:
    """`{4}` and `[4]` are 4; `{∅}` is not ∅."""
    if node.op == "set" and len(node.args) == 1 and node.args[0].op == "set":
        return node
    return _single(node.args[0]) if node.op in ("set", "tuple", "list") and len(node.args) == 1 else node


def _without_repeats(node: Node) -> Node:
    """A solution that is listed twice is one solution: of sets, and of lists of pairs and the like."""
    if node.op == "tuple" or (node.op == "list" and any(arg.op != "tuple" for arg in node.args)):
        return node
    kept = {written(arg): arg for arg in node.args}
    return Node(node.op, tuple(kept.values()), node.text)


def _in_order(gold: tuple[Node, ...], answer: tuple[Node, ...]) -> bool:
    return len(gold) == len(answer) and all(same(one, two) for one, two in zip(gold, answer, strict=True))


def _in_any_order(gold: Node, answer: Node) -> bool:
    if len(gold.args) > MAX_ITEMS:
        return _in_order(gold.args, answer.args)
    gold_names, names_ = [named(arg)[0] for arg in gold.args], [named(arg)[0] for arg in answer.args]
    distinct = len(set(gold_names)) > 1, len(set(names_)) > 1
    if all(gold_names) and all(names_) and all(distinct):
        if set(gold_names) != set(names_) or len(set(names_)) != len(names_):
            return _numbered(gold_names) and _numbered(names_) and _match(_values(gold), _values(answer))
        by_name = dict(zip(names_, answer.args, strict=True))
        return all(same(arg, by_name[name]) for name, arg in zip(gold_names, gold.args, strict=True))
    if (distinct[0] and all(gold_names) and not any(names_)) or (distinct[1] and all(names_) and not any(gold_names)):
        numbered = _numbered(gold_names if distinct[0] else names_)
        return _match(_values(gold), _values(answer)) if numbered else _in_order(gold.args, answer.args)
    return _match(gold.args, answer.args)


def _values(node: Node) -> tuple[Node, ...]:
    """The items without their names."""
    return tuple(named(arg)[1] for arg in node.args)


def _numbered(found: list[str]) -> bool:
    """`x_1`, `x_2`, …: several values of one unknown."""
    return len({name.partition("_")[0] for name in found}) == 1


def _match(gold: tuple[Node, ...], answer: tuple[Node, ...]) -> bool:
    left = list(answer)
    for one in gold:
        for place, two in enumerate(left):
            if (one.op == "set") == (two.op == "set") and same(one, two):
                del left[place]
                break
        else:
            return False
    return not left


def _same_matrix(gold: Node, answer: Node) -> bool:
    if gold.op == answer.op:
        if len(gold.args) != len(answer.args):
            return False
        return all(_in_order(one.args, two.args) for one, two in zip(gold.args, answer.args, strict=True))
    matrix, other = (gold, answer) if gold.op == "matrix" else (answer, gold)
    if len(matrix.args) == 1:
        entries = matrix.args[0].args
    elif all(len(row.args) == 1 for row in matrix.args):
        entries = tuple(row.args[0] for row in matrix.args)
    else:  # [[1, 2], [3, 4]]
        if other.op not in ("tuple", "list") or len(other.args) != len(matrix.args):
            return False
        rows = zip(matrix.args, other.args, strict=True)
        return all(two.op == "tuple" and _in_order(one.args, two.args) for one, two in rows)
    return other.op in ("tuple", "list") and other.text in ("()", "[]", "") and _in_order(entries, other.args)


# -- equations, inequalities, sets of real numbers --------------------------------------------------------------------------


def _same_relation(gold: Node, answer: Node) -> bool:
    equations = [node.op == "rel" and node.text == "=" for node in (gold, answer)]
    if all(equations):
        return _same_equation(gold, answer)
    if any(equations):
        return False
    try:
        return intervals(gold) == intervals(answer)
    except NoSet:
        pass
    if gold.op == answer.op == "rel":
        if gold.text == answer.text and _in_order(gold.args, answer.args):
            return True
        return _same_inequality(gold, answer)
    if gold.op == answer.op and len(gold.args) == len(answer.args) and gold.text == answer.text:
        return _match(gold.args, answer.args) if gold.op in ("union", "inter") else _in_order(gold.args, answer.args)
    return False


def _difference(node: Node) -> Node:
    return Node("add", (node.args[0], Node("neg", (node.args[1],))))


def _same_equation(gold: Node, answer: Node) -> bool:
    one, two = _difference(gold), _difference(answer)
    try:
        return proportional(one, two) or proportional_above(one, two)
    except NoNumber:
        return _in_order(gold.args, answer.args) or _in_order(gold.args, answer.args[::-1])


def _same_inequality(gold: Node, answer: Node) -> bool:
    """Of several unknowns: the same up to a factor, whose sign turns the relation round."""
    if gold.text not in _ORDER or answer.text not in _ORDER:
        return False
    if ("=" in gold.text) != ("=" in answer.text):
        return False
    one, two = _difference(gold), _difference(answer)
    if not proportional(one, two):
        return False
    for point in points(names(one)):
        try:
            left, right = value(one, point, digits=50), value(two, point, digits=50)
        except Undefined:
            continue
        if left != 0 and is_real(left) and is_real(right):
            turned = bool((left.real > 0) != (right.real > 0))
            return (_ORDER[gold.text] == _ORDER[answer.text]) != turned
    return False
