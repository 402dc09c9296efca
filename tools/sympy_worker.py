"""One operation of `sympy_math`, in a worker process that is killed at its limit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import sympy

from agentloop.expressions import Node, Unreadable, parse
from agentloop.expressions.build import build, symbol

MAX_TEXT = 4000
"""Characters of a result."""

sys.setrecursionlimit(10_000)  # of this process alone


class _Wrong(ValueError):
    """The arguments are wrong; the message tells the model what to do."""


def work(payload: dict[str, Any]) -> dict[str, str]:
    """`{"text": …}`, or `{"error": …}` with a sentence for the model."""
    try:
        text = _OPERATIONS[payload["operation"]](payload)
    except Unreadable as error:
        return {"error": f"the expression cannot be read: {error}"}
    except _Wrong as error:
        return {"error": str(error)}
    except RecursionError:
        return {"error": "the expression is nested too deep"}
    except (NotImplementedError, ValueError, TypeError, ArithmeticError, AttributeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        return {"error": f"sympy cannot do this: {reason or type(error).__name__}"}
    if len(text) > MAX_TEXT:
        return {"error": f"the result has {len(text)} characters, at most {MAX_TEXT} are shown; ask for less"}
    return {"text": text}


def _expressions(payload: dict[str, Any]) -> list[Any]:
    """One or more, separated by commas or semicolons; a chain `a = b = c` is none."""
    tree = parse(payload["expression"])
    items = tree.args if tree.op in ("list", "set") or (tree.op == "tuple" and tree.text in ("[]", "()")) else (tree,)
    return [build(item) for item in items]


def _expression(payload: dict[str, Any]) -> Any:
    found = _expressions(payload)
    if len(found) != 1:
        raise _Wrong(f"{payload['operation']} takes one expression, not {len(found)}")
    if isinstance(found[0], sympy.core.relational.Relational) or found[0] in (sympy.true, sympy.false):
        raise _Wrong(f"{payload['operation']} takes an expression without '=' or '<'")
    return found[0]


def _variables(payload: dict[str, Any], expressions: list[Any]) -> list[Any]:
    """Those asked for, or those that occur."""
    free = sorted(set().union(*(e.free_symbols for e in expressions)), key=lambda s: s.name)
    if not payload.get("variable"):
        return free
    tree = parse(payload["variable"])
    items: tuple[Node, ...] = tree.args if tree.op in ("list", "tuple", "set") else (tree,)
    if any(item.op != "sym" for item in items):
        raise _Wrong(f"'{payload['variable'][:40]}' is no variable; e, i and pi are constants")
    return [symbol(item.text) for item in items]


def _variable(payload: dict[str, Any], expression: Any) -> Any:
    found = _variables(payload, [expression])
    if len(found) > 1:
        raise _Wrong(f"give 'variable': one of {', '.join(s.name for s in found)}")
    return found[0] if found else sympy.Symbol("x")


def _point(payload: dict[str, Any], key: str, default: int = 0) -> Any:
    text = payload.get(key)
    return build(parse(text)) if text else sympy.Integer(default)


def _solve(payload: dict[str, Any]) -> str:
    equations = _expressions(payload)
    for equation in equations:
        if equation is sympy.true or equation is sympy.false:
            return "no solution" if equation is sympy.false else "true for every value"
    variables = _variables(payload, equations)
    if not variables:
        raise _Wrong("there is no variable to solve for")
    if any(isinstance(e, sympy.core.relational.Relational) and not isinstance(e, sympy.Eq) for e in equations):
        if len(variables) != 1:
            raise _Wrong("inequalities can be solved for one variable only")
        real = sympy.Symbol(variables[0].name, real=True)
        conditions = [equation.subs(variables[0], real) for equation in equations]
        return str(sympy.reduce_inequalities(conditions, [real])).replace("oo", "infinity")
    single = len(equations) == len(variables) == 1
    found = sympy.solve(equations[0] if single else equations, variables[0] if single else variables, dict=True)
    if not found:
        if single and sympy.solveset(_zero(equations[0]), variables[0]) is not sympy.S.EmptySet:
            raise _Wrong("no closed form was found; try to simplify or factor first")
        return "no solution" if single else "no solution was found"
    lines = [", ".join(f"{name} = {_root(one[name])}" for name in sorted(one, key=str)) for one in found]
    return "\n".join(line or "true for every value" for line in lines)


def _zero(equation: Any) -> Any:
    return equation.lhs - equation.rhs if isinstance(equation, sympy.Eq) else equation


def _root(value: Any) -> str:
    """A root that has no closed form as a decimal."""
    return f"{sympy.N(value, 15)} (approximately)" if value.has(sympy.polys.rootoftools.ComplexRootOf) else str(value)


def _integrate(payload: dict[str, Any]) -> str:
    expression = _expression(payload)
    variable = _variable(payload, expression)
    if bool(payload.get("lower")) != bool(payload.get("upper")):
        raise _Wrong("give both 'lower' and 'upper', or neither")
    if payload.get("lower"):
        result = sympy.integrate(expression, (variable, _point(payload, "lower"), _point(payload, "upper")))
    else:
        result = sympy.integrate(expression, variable)
    if result.has(sympy.Integral):
        raise _Wrong("no closed form was found; try 'evaluate' at numbers, or simplify the integrand first")
    return _shown(result)


def _differentiate(payload: dict[str, Any]) -> str:
    expression = _expression(payload)
    order = payload.get("order") or 1
    return str(sympy.diff(expression, _variable(payload, expression), order))


def _limit(payload: dict[str, Any]) -> str:
    expression = _expression(payload)
    if not payload.get("point"):
        raise _Wrong("give 'point', where the limit is taken, such as 0 or infinity")
    direction = {"left": "-", "right": "+"}.get(payload.get("direction") or "", "+-")
    point = _point(payload, "point")
    if point in (sympy.oo, -sympy.oo):
        direction = "+" if point == -sympy.oo else "-"
    result = sympy.limit(expression, _variable(payload, expression), point, direction)
    if result.has(sympy.zoo, sympy.nan) or isinstance(result, sympy.AccumBounds):
        raise _Wrong("the limit does not exist; try 'direction': left or right")
    return _shown(result)


def _series(payload: dict[str, Any]) -> str:
    expression = _expression(payload)
    return str(sympy.series(expression, _variable(payload, expression), _point(payload, "point"), payload.get("order") or 6))


def _evaluate(payload: dict[str, Any]) -> str:
    expression = _expression(payload)
    if expression.free_symbols:
        names = ", ".join(sorted(s.name for s in expression.free_symbols))
        raise _Wrong(f"evaluate takes numbers only, and {names} has no value")
    return str(sympy.N(expression, payload.get("digits") or 15))


def _shown(result: Any) -> str:
    """With a decimal, where it is a number that is not whole."""
    if result.is_number and not result.is_Integer and result.is_finite and not result.is_Float:
        return f"{result} ≈ {sympy.N(result, 15)}"
    return str(result)


_OPERATIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "solve": _solve,
    "simplify": lambda payload: _shown(sympy.simplify(_expression(payload))),
    "expand": lambda payload: str(sympy.expand(_expression(payload))),
    "factor": lambda payload: str(_factored(_expression(payload))),
    "integrate": _integrate,
    "differentiate": _differentiate,
    "limit": _limit,
    "series": _series,
    "evaluate": _evaluate,
}


def _factored(expression: Any) -> Any:
    if expression.is_Integer:
        return sympy.Mul(*(sympy.Pow(p, k, evaluate=False) for p, k in sympy.factorint(expression).items()), evaluate=False)
    return sympy.factor(expression)
