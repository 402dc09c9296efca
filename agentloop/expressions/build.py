"""Trees to sympy objects, by the constructors in a table and no others, within bounds. `sympify` and `parse_expr` are not used:
they call `eval`."""

from __future__ import annotations

from typing import Any

import sympy

from agentloop.expressions.tree import Node, Unreadable

MAX_NODES = 600
MAX_RESULT_DIGITS = 2000
"""Digits of a number that building alone makes (`10^500`, `200!`)."""

_CIRCULAR = ("sin", "cos", "tan", "cot", "sec", "csc")
_HYPERBOLIC = ("sinh", "cosh", "tanh")
_FUNCTIONS: dict[str, Any] = {
    "sqrt": sympy.sqrt,
    "cbrt": lambda x: sympy.Pow(x, sympy.Rational(1, 3)),
    "root": lambda x, n: sympy.Pow(x, 1 / n),
    "log": sympy.log,
    "exp": sympy.exp,
    "abs": sympy.Abs,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "binomial": sympy.binomial,
    "gcd": sympy.gcd,
    "lcm": sympy.lcm,
    "min": sympy.Min,
    "max": sympy.Max,
    "sign": sympy.sign,
    "re": sympy.re,
    "im": sympy.im,
    "gamma": sympy.gamma,
    "erf": sympy.erf,
    "factorial": sympy.factorial,
    **{name: getattr(sympy, name) for name in (*_CIRCULAR, *_HYPERBOLIC, "coth", "sech", "csch")},
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in (*_CIRCULAR, *_HYPERBOLIC)},
}
_ARGUMENTS = {"log": (1, 2), "root": (2, 2), "binomial": (2, 2), "gcd": (2, 20), "lcm": (2, 20), "min": (1, 20), "max": (1, 20)}
_RELATIONS = {"=": sympy.Eq, "<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "!=": sympy.Ne}
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}


def build(node: Node) -> Any:
    """The sympy expression or relation of a tree. Raises `Unreadable` for what has none, and where a bound is passed."""
    if sum(1 for _ in node.walk()) > MAX_NODES:
        raise Unreadable(f"the expression has more than {MAX_NODES} parts")
    return _build(node)


def symbol(name: str) -> Any:
    """The symbol of a name as `build` makes it."""
    return sympy.Symbol(name.removeprefix("\\"))


def _build(node: Node) -> Any:
    if node.op == "num":
        assert node.value is not None
        return sympy.Rational(node.value.numerator, node.value.denominator)
    if node.op == "const":
        return _CONSTANTS[node.text]
    if node.op == "sym":
        return symbol(node.text)
    if node.op == "rel":
        if node.text not in _RELATIONS:
            raise Unreadable(f"the relation '{node.text}' cannot be used here; give one of {', '.join(_RELATIONS)}")
        return _RELATIONS[node.text](*(_build(arg) for arg in node.args))
    if node.op == "matrix":
        return sympy.ImmutableMatrix([[_build(entry) for entry in row.args] for row in node.args])
    args = [_build(arg) for arg in node.args]
    if node.op == "add":
        return sum(args[1:], args[0])
    if node.op == "mul":
        result = args[0]
        for arg in args[1:]:
            result = _bounded(result * arg)
        return result
    if node.op == "neg":
        return -args[0]
    if node.op == "div":
        if args[1] == 0:
            raise Unreadable("division by zero")
        return args[0] / args[1]
    if node.op == "pow":
        return _power(*args)
    if node.op == "fact":
        return _call("factorial", args)
    if node.op == "percent":
        return args[0] / 100
    if node.op == "degree":
        return args[0] * sympy.pi / 180
    if node.op == "call":
        return _call(node.text, args)
    raise Unreadable(f"a {_NAMES.get(node.op, node.op)} cannot be used here")


_NAMES = {"list": "list", "tuple": "tuple or interval", "set": "set", "unit": "quantity with a unit", "opaque": "sum sign"}


def _power(base: Any, exponent: Any) -> Any:
    if exponent.is_Integer and base.is_Rational and base not in (0, 1, -1):
        digits = max(int(base.p).bit_length(), int(base.q).bit_length()) * abs(int(exponent)) * 0.30103
        if digits > MAX_RESULT_DIGITS:
            raise Unreadable(f"a power with more than {MAX_RESULT_DIGITS} digits would come out")
    elif exponent.is_Rational and base.is_Rational and int(exponent.q) > 1 and abs(exponent) > 1000:
        raise Unreadable("the exponent is too large")
    if base == 0 and exponent.is_negative:
        raise Unreadable("division by zero")
    return sympy.Pow(base, exponent)


def _call(name: str, args: list[Any]) -> Any:
    if name not in _FUNCTIONS:
        raise Unreadable(f"the function '{name}' cannot be used here")
    least, most = _ARGUMENTS.get(name, (1, 1))
    if not least <= len(args) <= most:
        raise Unreadable(f"{name} takes {least if least == most else f'{least} to {most}'} arguments, not {len(args)}")
    if name in ("factorial", "binomial", "gamma") and any(arg.is_Integer and abs(int(arg)) > 700 for arg in args):
        raise Unreadable(f"{name} of a number over 700 is too large")
    if name == "exp" and args[0].is_Rational and abs(args[0]) > 10**6:
        raise Unreadable("the exponent is too large")
    return _bounded(_FUNCTIONS[name](*args))


def _bounded(value: Any) -> Any:
    if value.is_Rational and max(int(value.p).bit_length(), int(value.q).bit_length()) > MAX_RESULT_DIGITS * 10 // 3:
        raise Unreadable(f"a number with more than {MAX_RESULT_DIGITS} digits would come out")
    return value
