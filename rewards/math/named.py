"""What an answer says beside its value: names (`x = 5`), chains of equations, running numbers (`k ∈ ℤ`), signs (`±`)."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import mpmath  # type: ignore[import-untyped, unused-ignore]

from agentloop.expressions.tree import Node, names, written
from agentloop.expressions.value import Huge, NoNumber, Number, Undefined, value
from agentloop.rewards.math.units import annotation

_RUNNING = "running number"
_MAPS = tuple("fghFGHPQTW")


def named(node: Node) -> tuple[str, Node]:
    """What a chain of equations names, and what it says that is; `("", node)` for anything else.

    `x = 2 + 3 = 5` is 5 with the name `x`: the last side is what is said. Approximations behind an exact value are dropped.
    """
    if node.op == "mul" and len(node.args) == 2 and node.args[1].op == "tuple" and _is_capital(node.args[0]):  # P(1, 2)
        return written(node.args[0]), node.args[1]
    if node.op != "rel":
        return "", node
    operators = node.text.split()
    if operators == ["equiv"] and _is_name(node.args[0]):  # x ≡ 2 (mod 7)
        return written(node.args[0]), node.args[1]
    sides = list(node.args)
    if "approx" in operators:
        first = operators.index("approx")
        if first == 0 and _is_name(sides[0]):
            operators[0] = "="
            if "approx" in operators:
                first = operators.index("approx")
                operators, sides = operators[:first], sides[: first + 1]
        elif first == 0 and not _near(*sides[:2]):
            return "", Node("nothing")
        else:
            operators, sides = operators[:first], sides[: first + 1]
    if len(sides) == 1:
        return "", sides[0]
    if any(operator != "=" for operator in operators):
        if operators == ["in"] and _is_name(sides[0]) and sides[1].op in ("tuple", "set", "union", "inter", "diff", "space"):
            return "", Node("union", (sides[1],)) if sides[1].op == "tuple" and sides[0].op == "sym" else sides[1]
        return "", Node("rel", tuple(sides), " ".join(operators))
    name = ""
    if _is_name(sides[0]) and not (len(sides) == 2 and _is_name(sides[1]) and sides[0].op == "sym" and sides[1].op == "sym"):
        name = written(sides[0])
        sides = sides[1:]
    elif len(sides) == 2 and _is_name(sides[1]) and not names(sides[0]):  # 5 = x
        return written(sides[1]), sides[0]
    if any(not _near(one, two) for one, two in pairwise(sides)):  # 6 = 5
        return "", Node("nothing")
    if len(sides) == 2 and _is_combination(sides[0]) and not names(sides[1]):
        return written(sides[0]), sides[1]
    if len(sides) != 2 or name or not (names(sides[0]) or names(sides[1])):
        return name, sides[-1]
    return "", Node("rel", tuple(sides), " ".join(operators))


def relates(node: Node) -> bool:
    """`m + n = 5`: an equation as well as a value with a name."""
    return node.op == "rel" and node.text == "=" and len(node.args) == 2 and _is_combination(node.args[0])


def _is_combination(node: Node) -> bool:
    """`m + n`, `a/b`: made of symbols alone, each once, and none of them an unknown of a curve."""
    if node.op not in ("add", "div") or not all(arg.op == "sym" for arg in node.args):
        return False
    found = [arg.text for arg in node.args]
    return len(set(found)) == len(found) and not {"x", "y", "z", "t", "r"} & set(found)


def differ_in_place(gold: Node, answer: Node) -> bool:
    """`f(2) = 3` beside `f(3) = 3`, `f'(x) = 2x` beside `f(x) = 2x`, `a_{10} = 5` beside `a_{11} = 5`."""
    one, two = gold.args[0], answer.args[0]
    if one.op == two.op == "mul" and len(one.args) == len(two.args) == 2:
        functions = one.args[0].text, two.args[0].text
        if functions[0] != functions[1] and functions[0].rstrip("'") == functions[1].rstrip("'"):
            return True
        return one != two and {one.args[1].op, two.args[1].op} <= {"num", "rel", "inter", "union"}
    if one.op != "sym" or two.op != "sym" or one == two:
        return False
    (letter, _, place), (other, _, there) = one.text.partition("_"), two.text.partition("_")
    return letter == other and place.isdigit() and there.isdigit()


def of_one_argument(gold: Node, answer: Node) -> tuple[Node, Node]:
    """`f(n) = n` beside `f(x) = x`: the argument has one name."""
    said, other = (_argument_of(side) for side in (gold, answer))
    if said and other and said != other and said not in names(answer):
        answer = replaced(answer, other, said)
    return gold, answer


def _argument_of(node: Node) -> str:
    """`n`, of `f(n) = …`."""
    if node.op != "rel" or node.args[0].op != "mul" or len(node.args[0].args) != 2 or node.text != "=":
        return ""
    function, argument = node.args[0].args
    return argument.text if function.op == argument.op == "sym" and function.text in _MAPS else ""


def unchained(whole: Node, said: Node) -> Node:
    """`x = y = 1` beside several values: `x = 1, y = 1`."""
    if whole.op != "rel" or len(whole.args) < 3 or {*whole.text.split()} != {"="}:
        return said
    *unknowns, last = whole.args
    if names(last) or any(side.op != "sym" for side in unknowns):
        return said
    return Node("list", tuple(Node("rel", (side, last), "=") for side in unknowns))


def _near(exact: Node, rounded: Node) -> bool:
    """`√2 ≈ 1.41` is a rounding, `5 ≈ 6` is two answers."""
    marks, (exact, rounded) = zip(*map(annotation, (exact, rounded)), strict=True)
    if names(exact) or names(rounded) or (all(marks) and marks[0] != marks[1]) or "%" in marks:
        return True
    try:
        one, two = value(exact), value(rounded)
    except (NoNumber, Undefined, Huge):
        return True
    with mpmath.workdps(30):
        return bool(abs(_float(one) - _float(two)) <= abs(_float(one)) / 20)


def _float(found: Number) -> Number:
    return mpmath.mpf(found.numerator) / found.denominator if isinstance(found, Fraction) else found


def _is_name(node: Node) -> bool:
    """A symbol, a function of symbols, a pair of names, a ratio or fraction of segments, |AB|."""
    if node.op == "sym":
        return True
    if (
        node.op == "mul"
        and node.args[0] == Node("sym", (), "m")
        and all(arg.text.startswith("\\angle ") for arg in node.args[1:2])
    ):
        return True  # m∠A
    if node.op == "mul":
        if len(node.args) == 2 and _letter(node.args[0]) in "fghFGHPQTWpq" and node.args[1].op in ("sym", "num"):
            return True  # f(x)
        if node.args[0] == Node("sym", (), "P") and len(node.args) == 2 and node.args[1].op in ("inter", "union", "rel"):
            return True  # P(A ∩ B), P(X = 3)
        return all(arg.op == "sym" and arg.text[:1].isupper() for arg in node.args)  # AB
    if node.op == "call":
        return (node.text in ("abs", "det") and _is_name(node.args[0])) or node.text in ("max", "min")
    if node.op in ("div", "ratio", "tuple"):
        if node.op == "div" and all(arg.op == "mul" and arg.args[0] == Node("sym", (), "d") for arg in node.args):
            return True  # dy/dx
        return all(_is_name(arg) and (node.op != "div" or _letter(arg).isupper() or "_" in arg.text) for arg in node.args)
    return node.op == "opaque" and node.text in ("overline", "accent", "prime")


def _is_capital(node: Node) -> bool:
    return node.op == "sym" and len(node.text) == 1 and node.text.isupper()


def _letter(node: Node) -> str:
    while node.args:
        node = node.args[0]
    return node.text[:1] or "?"


def is_variable(name: str) -> bool:
    """`sym:x()`: one letter, as `written` has it."""
    return name.startswith("sym:") and len(name) == len("sym:x()") and name[4].islower()


def renamed(node: Node) -> Node:
    """`kπ, k ∈ ℤ`: the running number has one name, whatever it is called."""
    if node.op == "opaque" and node.text == "builder" and node.args[0].op not in ("sym", "rel"):
        condition = node.args[1]
        if condition.op == "rel" and condition.text == "in" and condition.args[1].op == "space":
            node = Node("list", node.args)  # {kπ | k ∈ ℤ}
    if node.op != "list":
        return node
    running = [item for item in node.args if item.op == "rel" and item.text == "in" and item.args[1].op == "space"]
    if len(running) != 1 or running[0].args[0].op != "sym":
        return node
    name = running[0].args[0].text
    return replaced(node, name, _RUNNING)


def with_any_period(gold: Node, answer: Node) -> tuple[Node, Node]:
    """Where only one side says `k ∈ ℤ`, the other's one name of that kind is the running number."""
    for said, other in ((gold, answer), (answer, gold)):
        if said.op == "list" and len(said.args) == 2 and _RUNNING in names(said) and other.op != "list":
            says = next((arg for arg in said.args if not (arg.op == "rel" and arg.text == "in")), said)
            running = names(named(other)[1]) & {"k", "n", "m", "l", "K", "N"}
            if len(running) == 1 and _RUNNING not in names(other):
                other = replaced(other, running.pop(), _RUNNING)
                return (says, other) if said is gold else (other, says)
    return gold, answer


def replaced(node: Node, name: str, new: str) -> Node:
    if node.op == "sym" and node.text == name:
        return Node("sym", (), new)
    return Node(node.op, tuple(replaced(arg, name, new) for arg in node.args), node.text, node.value)


def expanded(node: Node) -> Node:
    """`±` as the list of its two values."""
    signs = [part for part in node.walk() if part.op in ("pm", "plusminus")]
    if not signs or node.op in ("list", "set") or len(signs) > 3:
        if node.op in ("list", "set") and signs:
            items: list[Node] = []
            for arg in node.args:
                found = expanded(named(arg)[1])
                items += found.args if found.op == "list" else (found,)
            return Node(node.op, tuple(items), node.text)
        return node
    return Node("list", (_signed(node, 1), _signed(node, -1)))


def _signed(node: Node, sign: int) -> Node:
    args = tuple(_signed(arg, sign) for arg in node.args)
    if node.op == "pm":
        return args[0] if sign > 0 else Node("neg", args)
    if node.op == "plusminus":
        return Node("add", (args[0], args[1] if sign > 0 else Node("neg", (args[1],))))
    return Node(node.op, args, node.text, node.value)
