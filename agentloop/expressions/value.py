"""What a tree is worth: exactly where it is rational, else to many digits, and at chosen values of its symbols.

Every step is bounded. What would be too large to compute is `Huge`; what has no value (a division by zero) is `Undefined`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import mpmath  # type: ignore[import-untyped, unused-ignore]

from agentloop.expressions.tree import Node, names, written

Number: TypeAlias = Any
"""A `Fraction`, or mpmath's `mpf` or `mpc`."""

DIGITS = 110
"""Significant digits of what is not rational."""
MAX_BITS = 250_000
"""Of an exact numerator or denominator."""
MAX_EXPONENT = 5_000_000
"""Bits of the binary exponent of a number that is not exact."""


class Undefined(ArithmeticError):
    """It has no value."""


class Huge(ArithmeticError):
    """Its value is too large, or too much work, to be computed."""


class NoNumber(ArithmeticError):
    """It is no number: a list, a relation, a unit."""


def value(node: Node, symbols: Mapping[str, Number] | None = None, *, digits: int = DIGITS) -> Number:
    """The value of a tree, its symbols replaced. Raises `Undefined`, `Huge`, `NoNumber`."""
    with mpmath.workdps(digits):
        try:
            found = _Computer(symbols or {}).of(node)
        except ZeroDivisionError as error:
            raise Undefined("division by zero") from error
        except (OverflowError, MemoryError) as error:
            raise Huge(str(error)) from error
        except (ValueError, TypeError, mpmath.libmp.NoConvergence) as error:
            raise Undefined(str(error)) from error
        if not isinstance(found, Fraction):
            found = _checked(found)
        return found


def same_value(left: Number, right: Number, digits: int = DIGITS) -> bool:
    """Equal: exactly if both are rational, else to all but a few of `digits`."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    with mpmath.workdps(digits):
        one, two = _complex(left), _complex(right)
        if mpmath.isinf(one) or mpmath.isinf(two):
            return bool(one == two)
        size = max(abs(one), abs(two))
        return bool(abs(one - two) <= size * mpmath.mpf(10) ** (15 - digits) or size < mpmath.mpf(10) ** (10 - digits))


def is_real(found: Number) -> bool:
    if isinstance(found, (Fraction, mpmath.mpf)):
        return True
    return bool(abs(found.imag) <= abs(found) * mpmath.mpf(10) ** -30)


_POINTS = (
    (Fraction(3, 7), Fraction(-2, 31)),
    (Fraction(11, 13), Fraction(1, 17)),
    (Fraction(19, 7), Fraction(5, 11)),
    (Fraction(43, 11), Fraction(17, 23)),
    (Fraction(131, 17), Fraction(29, 13)),
    (Fraction(-17, 11), Fraction(-3, 19)),
    (Fraction(-5, 9), Fraction(1, 29)),
)
"""Where symbols are tried: the first symbol (in alphabetical order) takes the first of a pair, the next ones move on by the
second, so that no two are alike."""


def points(symbols: set[str]) -> list[dict[str, Fraction]]:
    order = sorted(symbols)
    return [{name: start + step * place * (place + 2) for place, name in enumerate(order)} for start, step in _POINTS]


def same_function(left: Node, right: Node) -> bool:
    """Whether two trees have the same values wherever they were tried: without symbols to `DIGITS` digits, else at several
    points, positive and negative, where both are real (or, if that is so nowhere, complex). Raises `NoNumber`, `Huge`."""
    symbols = names(left) | names(right)
    if not symbols:
        return same_value(value(left), value(right))
    agreed: list[bool] = []
    unreal: list[bool] = []
    for point in points(symbols):
        try:
            one, two = value(left, point, digits=50), value(right, point, digits=50)
        except Undefined:
            continue
        (agreed if is_real(one) and is_real(two) else unreal).append(same_value(one, two, 50))
        if agreed and not agreed[-1]:
            return False
    return all(agreed) if len(agreed) >= 2 else len(unreal) >= 2 and all(unreal)


def proportional(left: Node, right: Node) -> bool:
    """Whether one is a constant multiple of the other: two equations `left = 0` and `right = 0` say the same."""
    symbols = names(left) | names(right)
    if not symbols or names(left) != names(right):
        return False
    ratios: list[Number] = []
    for point in points(symbols):
        try:
            one, two = value(left, point, digits=50), value(right, point, digits=50)
        except Undefined:
            continue
        with mpmath.workdps(50):
            if _complex(one) == 0 or _complex(two) == 0:
                if _complex(one) != _complex(two):
                    return False
                continue
            exact = isinstance(one, Fraction) and isinstance(two, Fraction)
            ratios.append(one / two if exact else _complex(one) / _complex(two))
    return len(ratios) >= 3 and all(same_value(ratios[0], ratio, 50) for ratio in ratios[1:])


# -- computing ------------------------------------------------------------------------------------------------------------


def _complex(found: Number) -> Any:
    if isinstance(found, Fraction):
        return mpmath.mpf(found.numerator) / found.denominator
    return found


def _checked(found: Number) -> Number:
    """`found` within the bounds and, if it is not exact, finite."""
    if isinstance(found, Fraction):
        if max(found.numerator.bit_length(), found.denominator.bit_length()) > MAX_BITS:
            raise Huge("a number too large to be exact")
        return found
    if isinstance(found, mpmath.mpc) and found.imag == 0:
        found = found.real
    for part in (found.real, found.imag):
        if mpmath.isnan(part):
            raise Undefined("not a number")
        if not mpmath.isinf(part) and part != 0 and abs(mpmath.mag(part)) > MAX_EXPONENT:
            raise Huge("a number too large")
    return found


class _Computer:
    def __init__(self, symbols: Mapping[str, Number]) -> None:
        self._symbols = symbols
        self._steps = 0

    def of(self, node: Node) -> Number:
        self._steps += 1
        if self._steps > 5000:
            raise Huge("too many steps")
        method = getattr(self, f"_{node.op}", None)
        if method is None:
            raise NoNumber(f"a {node.op} is no number")
        return _checked(method(node))

    # -- atoms --

    def _num(self, node: Node) -> Number:
        return node.value

    def _const(self, node: Node) -> Number:
        if node.text == "inf":
            return mpmath.inf
        return {"pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1)}[node.text]

    def _sym(self, node: Node) -> Number:
        if node.text not in self._symbols:
            raise NoNumber(f"'{node.text}' has no value")
        return self._symbols[node.text]

    def _opaque(self, node: Node) -> Number:
        """What is compared in writing alone has a value that its writing determines."""
        digest = hashlib.sha256(written(node).encode()).digest()
        return Fraction(int.from_bytes(digest[:6], "big") + 1, 2**40)

    def _base(self, node: Node) -> Number:
        raise NoNumber("a number in another base")

    # -- arithmetic --

    def _add(self, node: Node) -> Number:
        found = self.of(node.args[0])
        for arg in node.args[1:]:
            found = _checked(_plus(found, self.of(arg)))
        return found

    def _mul(self, node: Node) -> Number:
        found = self.of(node.args[0])
        for arg in node.args[1:]:
            found = _checked(_multiply(found, self.of(arg)))
        return found

    def _neg(self, node: Node) -> Number:
        return -self.of(node.args[0])

    def _div(self, node: Node) -> Number:
        top, bottom = (self.of(arg) for arg in node.args)
        if bottom == 0:
            raise Undefined("division by zero")
        if isinstance(top, Fraction) and isinstance(bottom, Fraction):
            return top / bottom
        return _complex(top) / _complex(bottom)

    def _percent(self, node: Node) -> Number:
        return _multiply(self.of(node.args[0]), Fraction(1, 100))

    def _degree(self, node: Node) -> Number:
        return _complex(self.of(node.args[0])) * mpmath.pi / 180

    def _fact(self, node: Node) -> Number:
        found = self.of(node.args[0])
        if not isinstance(found, Fraction) or found.denominator != 1:
            if isinstance(found, Fraction) and found < 1000:
                return mpmath.gamma(_complex(found) + 1)
            raise Undefined("the factorial of what is no whole number")
        if found < 0:
            raise Undefined("the factorial of a negative number")
        if found > 20_000:
            raise Huge("a factorial too large")
        return Fraction(math.factorial(int(found)))

    def _pow(self, node: Node) -> Number:
        return _power(self.of(node.args[0]), self.of(node.args[1]))

    # -- functions --

    def _call(self, node: Node) -> Number:
        if node.args and node.args[0].op == "matrix":
            raise NoNumber("of a matrix")
        arguments = [self.of(arg) for arg in node.args]
        if any(not isinstance(a, Fraction) and mpmath.isinf(a) for a in arguments):
            raise Undefined("a function of infinity")
        function = _FUNCTIONS.get(node.text)
        if function is None:
            digest = hashlib.sha256(written(node).encode()).digest()
            return Fraction(int.from_bytes(digest[:6], "big") + 1, 2**40)
        return function(*arguments)


def _plus(left: Number, right: Number) -> Number:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left + right
    return _complex(left) + _complex(right)


def _multiply(left: Number, right: Number) -> Number:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left * right
    return _complex(left) * _complex(right)


def _bits(found: Fraction) -> int:
    return max(found.numerator.bit_length(), found.denominator.bit_length())


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if base == 0:
            if exponent <= 0:
                raise Undefined("0 to a power that is not positive")
            return base
        if exponent.denominator == 1:
            if base in (1, -1):
                return base if base == 1 or exponent.numerator % 2 else Fraction(1)
            if _bits(base) * abs(exponent.numerator) <= MAX_BITS:
                return base**exponent.numerator
            raise Huge("a power too large to be exact")
        if exponent.denominator <= 64 and base > 0:
            root = _exact_root(base, exponent.denominator)
            if root is not None:
                return _power(root, Fraction(exponent.numerator))
    if base == 0:
        if _complex(exponent).real <= 0:
            raise Undefined("0 to a power that is not positive")
        return Fraction(0)
    base, exponent = _complex(base), _complex(exponent)
    if mpmath.isinf(base) or mpmath.isinf(exponent):
        raise Undefined("a power of infinity")
    if mpmath.mag(exponent) > 40 or abs(mpmath.mag(base)) * abs(exponent) > MAX_EXPONENT:
        raise Huge("a power too large")
    return mpmath.power(base, exponent)


def _exact_root(base: Fraction, degree: int) -> Fraction | None:
    parts = []
    for part in (base.numerator, base.denominator):
        if part.bit_length() > 20_000:
            return None
        root = math.isqrt(part) if degree == 2 else _integer_root(part, degree)
        if root**degree != part:
            return None
        parts.append(root)
    return Fraction(parts[0], parts[1])


def _integer_root(number: int, degree: int) -> int:
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle - 1)
    return low


def _sqrt(found: Number) -> Number:
    return _root(found, Fraction(2))


def _root(found: Number, degree: Number) -> Number:
    if isinstance(found, Fraction) and found < 0 and isinstance(degree, Fraction) and degree.denominator == 1 and degree % 2:
        return -_root(-found, degree)  # the real one: \sqrt[3]{-8} is -2
    if degree == 0:
        raise Undefined("the zeroth root")
    if isinstance(found, Fraction) and found == 0:
        return found
    if degree == 2 and not isinstance(found, Fraction):
        return mpmath.sqrt(found)
    if isinstance(found, Fraction) and found < 0 and degree == 2:
        root = _root(-found, degree)
        return mpmath.mpc(0, 1) * _complex(root)
    return _power(found, 1 / degree if isinstance(degree, Fraction) else 1 / _complex(degree))


def _log(found: Number, base: Number | None = None) -> Number:
    if found == 0 or base == 0 or base == 1:
        raise Undefined("a logarithm of 0, or to base 0 or 1")
    if isinstance(found, Fraction) and isinstance(base, Fraction) and found > 0 and base > 0:
        power = round(float(mpmath.log(_complex(found)) / mpmath.log(_complex(base))))
        if abs(power) * _bits(base) <= 20_000 and _power(base, Fraction(power)) == found:
            return Fraction(power)
    if found == 1:
        return Fraction(0)
    logarithm = mpmath.log(_complex(found))
    return logarithm if base is None else logarithm / mpmath.log(_complex(base))


def _rounding(function: Callable[[Any], Any]) -> Callable[[Number], Number]:
    def rounded(found: Number) -> Number:
        if isinstance(found, Fraction):
            return Fraction(math.floor(found) if function is mpmath.floor else math.ceil(found))
        if mpmath.mag(found) > 200:
            raise Huge("too large to be rounded")
        return Fraction(int(function(found.real)))

    return rounded


def _plain(function: Callable[[Any], Any]) -> Callable[[Number], Number]:
    def computed(found: Number) -> Number:
        found = _complex(found)
        if mpmath.mag(found) > 300:
            raise Huge("too large an argument")
        return function(found)

    return computed


def _exp(found: Number) -> Number:
    if found == 0:
        return Fraction(1)
    return _power(+mpmath.e, found)


def _abs(found: Number) -> Number:
    return abs(found)


def _choose(n: Number, k: Number) -> Number:
    if not all(isinstance(x, Fraction) and x.denominator == 1 for x in (n, k)):
        return mpmath.binomial(_complex(n), _complex(k))
    n, k = int(n), int(k)
    if n < 0 or k < 0:
        raise Undefined("a binomial coefficient of negative numbers")
    if n > 20_000:
        raise Huge("a binomial coefficient too large")
    return Fraction(math.comb(n, k))


def _whole(function: Callable[..., int]) -> Callable[..., Number]:
    def computed(*found: Number) -> Number:
        if not all(isinstance(x, Fraction) and x.denominator == 1 for x in found):
            raise Undefined("whole numbers are needed")
        return Fraction(function(*(int(x) for x in found)))

    return computed


def _extreme(function: Callable[..., Any]) -> Callable[..., Number]:
    def computed(*found: Number) -> Number:
        if any(not is_real(x) for x in found):
            raise Undefined("complex numbers have no order")
        return function(found, key=lambda x: _complex(x).real)

    return computed


_CIRCULAR = ("sin", "cos", "tan", "cot", "sec", "csc")
_HYPERBOLIC = ("sinh", "cosh", "tanh")
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "sqrt": _sqrt,
    "cbrt": lambda x: _root(x, Fraction(3)),
    "root": _root,
    "log": _log,
    "exp": _exp,
    "abs": _abs,
    "floor": _rounding(mpmath.floor),
    "ceil": _rounding(mpmath.ceil),
    "binomial": _choose,
    "gcd": _whole(math.gcd),
    "lcm": _whole(math.lcm),
    "min": _extreme(min),
    "max": _extreme(max),
    "sign": lambda x: Fraction(0) if x == 0 else x / abs(x),
    "re": lambda x: _complex(x).real,
    "im": lambda x: _complex(x).imag,
    **{name: _plain(getattr(mpmath, name)) for name in (*_CIRCULAR, *_HYPERBOLIC, "coth", "sech", "csch", "erf", "arg")},
    **{f"arc{name}": _plain(getattr(mpmath, f"a{name}")) for name in (*_CIRCULAR, *_HYPERBOLIC)},
}
"""Functions by the names of `words.FUNCTIONS`; another one is opaque: equal in writing or not equal."""
