"""Arithmetic expressions: parsed without `eval`, computed exactly with sympy, bounded in size and time.

Grammar and precedence are Python's (`-2**2` is -4, `2**3**2` is 512, `//` and `%` round down); `^` is a power, and
`×`, `·`, `÷`, `−` are what they look like. Decimals are exact: `0.1 + 0.2` is 3/10.

Every value is a sympy number or a constant expression (`sqrt(2)`, `2*pi`). The bounds are checked before an operation
wherever its result could be large, and after each one on what came out. `sympify` and `parse_expr` are not used: they
call `eval`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from agentloop.errors import nearest

MAX_LENGTH = 500
"""Characters of an expression."""
MAX_DEPTH = 40
"""Nested parentheses, signs and powers."""
MAX_DIGITS = 1000
"""Digits of any number, before or after the point, numerator or denominator."""
MAX_IRRATIONAL_STEPS = 40
"""Operations whose result is irrational; they cost more than the exact ones."""
MAX_ROOT_DIGITS = 60
"""Digits of a number whose root is taken, unless the root is exact: sympy looks for factors of it."""
PLACES = 15
"""Significant digits of a decimal approximation."""


class ExpressionError(ValueError):
    """The expression cannot be evaluated; the message tells the model why."""


def calculate(text: str) -> str:
    """The value of an expression: an integer as such, a fraction as `7/4 = 1.75` or `1/3 ≈ 0.333333333333333`, another
    number as `2*sqrt(2) ≈ 2.82842712474619`. Raises `ExpressionError`."""
    try:
        return _show(_Parser(text).parse())
    except ArithmeticError as error:  # mpmath, wherever sympy asks it: what it divides by cannot be told from 0
        raise ExpressionError("the result cannot be computed precisely enough") from error


# -- tokens -------------------------------------------------------------------------------------------------------------


class _Token(NamedTuple):
    kind: str  # number, name, op, end
    text: str
    at: int


_ALIASES = str.maketrans({"×": "*", "·": "*", "∙": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "^": "\ue000"})
_POWER = "\ue000"  # `^` after translation; a character of its own, so that `**` stays two characters
_PATTERN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-zπ√_][A-Za-z0-9_]*)|(?P<op>\*\*|//|[-+*/%(),\ue000]))"
)


def _tokens(text: str) -> list[_Token]:
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"the expression has {len(text)} characters, at most {MAX_LENGTH} are allowed")
    if not text:
        raise ExpressionError("the expression is empty")
    source = text.translate(_ALIASES)
    tokens: list[_Token] = []
    at = 0
    while at < len(source):
        match = _PATTERN.match(source, at)
        if match is None:
            rest = text[at:].lstrip()
            if rest[:1] == "=":
                raise ExpressionError("'=' is not allowed; give only the expression to evaluate")
            raise ExpressionError(f"unexpected '{rest[:1]}' at position {len(text) - len(rest) + 1}")
        kind = str(match.lastgroup)
        word = match[kind]
        tokens.append(_Token(kind, "**" if word == _POWER else word, match.start(kind)))
        at = match.end()
    tokens.append(_Token("end", "", len(source)))
    return tokens


# -- parser: computes while it goes ---------------------------------------------------------------------------------------


class _Parser:
    """Recursive descent, precedence as in Python's grammar (docs.python.org/3/reference/expressions.html)."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._next = 0
        self._depth = 0
        self._numbers = _Numbers()

    def parse(self) -> Any:
        value = self._sum()
        token = self._peek()
        if token.kind == "end":
            return value
        if token.text == ",":
            raise ExpressionError("a comma may only separate a function's arguments; write 1234, not 1,234")
        if token.text == ")":
            raise ExpressionError(f"')' at position {token.at + 1} has no '('")
        raise ExpressionError(f"an operator is missing before '{token.text}' at position {token.at + 1}")

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, *texts: str) -> str | None:
        token = self._peek()
        if token.kind == "op" and token.text in texts:
            self._next += 1
            return token.text
        return None

    def _deeper(self, parse: Callable[[], Any]) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ExpressionError(f"the expression is nested more than {MAX_DEPTH} deep")
        value = parse()
        self._depth -= 1
        return value

    def _sum(self) -> Any:
        value = self._product()
        while sign := self._take("+", "-"):
            value = self._numbers.binary(sign, value, self._product())
        return value

    def _product(self) -> Any:
        value = self._signed()
        while sign := self._take("*", "/", "//", "%"):
            value = self._numbers.binary(sign, value, self._signed())
        return value

    def _signed(self) -> Any:
        if sign := self._take("+", "-"):
            value = self._deeper(self._signed)
            return -value if sign == "-" else value
        return self._power()

    def _power(self) -> Any:
        base = self._atom()
        if self._take("**"):
            return self._numbers.binary("**", base, self._deeper(self._signed))
        return base

    def _atom(self) -> Any:
        token = self._peek()
        self._next += 1
        if token.kind == "number":
            return self._numbers.literal(token.text)
        if token.kind == "name":
            return self._named(token)
        if token.text == "(":
            value = self._deeper(self._sum)
            self._close(token)
            return value
        self._next -= 1
        if token.kind == "end":
            raise ExpressionError("the expression ends where a number was expected")
        raise ExpressionError(f"a number was expected, not '{token.text}' at position {token.at + 1}")

    def _named(self, token: _Token) -> Any:
        name = {"π": "pi", "√": "sqrt"}.get(token.text, token.text)
        name = name if name in CONSTANTS or name in FUNCTIONS else name.lower()
        if name in CONSTANTS:
            return self._numbers.constant(name)
        if name not in FUNCTIONS:
            raise ExpressionError(f"'{token.text[:40]}' is neither a function nor a constant; {nearest(name[:40], _NAMES)}")
        opening = self._peek()
        if not self._take("("):
            raise ExpressionError(f"'{name}' is a function; write {name}(…)")
        arguments = []
        if not self._take(")"):
            arguments.append(self._deeper(self._sum))
            while self._take(","):
                arguments.append(self._deeper(self._sum))
            self._close(opening)
        return self._numbers.call(name, arguments)

    def _close(self, opening: _Token) -> None:
        if not self._take(")"):
            raise ExpressionError(f"the '(' at position {opening.at + 1} is not closed")


# -- numbers --------------------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[int, int]] = {
    "sqrt": (1, 1),
    "abs": (1, 1),
    "min": (1, 50),
    "max": (1, 50),
    "round": (1, 2),
    "floor": (1, 1),
    "ceil": (1, 1),
    "gcd": (1, 50),
    "lcm": (1, 50),
    "factorial": (1, 1),
    "exp": (1, 1),
    "log": (1, 2),
    "ln": (1, 1),
    "log2": (1, 1),
    "log10": (1, 1),
    "sin": (1, 1),
    "cos": (1, 1),
    "tan": (1, 1),
}
"""Names and how many arguments they take, at least and at most."""
CONSTANTS = ("pi", "e")
_NAMES = (*FUNCTIONS, *CONSTANTS)


def _digits(number: int) -> int:
    """Decimal digits, within one, without writing the number out."""
    return number.bit_length() * 30103 // 100000 + 1  # log10(2)


def _too_large() -> ExpressionError:
    return ExpressionError(f"a number with more than {MAX_DIGITS} digits would come out")


class _Numbers:
    """The operations on sympy numbers, with their bounds."""

    def __init__(self) -> None:
        import sympy

        self._sp = sympy
        self._steps = 0

    # -- values --

    def literal(self, text: str) -> Any:
        mantissa, _, exponent = text.lower().partition("e")
        if len(exponent) > 6 or abs(int(exponent or 0)) > MAX_DIGITS or len(mantissa) > MAX_DIGITS:
            raise ExpressionError(f"the number {text[:20]}… has more than {MAX_DIGITS} digits")
        value = Fraction(text)
        return self._checked(self._sp.Rational(value.numerator, value.denominator))

    def constant(self, name: str) -> Any:
        return self._sp.pi if name == "pi" else self._sp.E

    def _checked(self, value: Any) -> Any:
        """`value`, if it is a real number within the bounds."""
        if value.is_Rational:
            if max(_digits(int(value.p)), _digits(int(value.q))) > MAX_DIGITS:
                raise _too_large()
            return value
        self._steps += 1
        if self._steps > MAX_IRRATIONAL_STEPS:
            raise ExpressionError(f"more than {MAX_IRRATIONAL_STEPS} steps with irrational numbers")
        if self._weight(value) > MAX_DIGITS:
            raise _too_large()
        self._approximate(value)
        return value

    def _weight(self, value: Any) -> int:
        """Digits of all rational numbers in an expression."""
        return sum(max(_digits(int(atom.p)), _digits(int(atom.q))) for atom in value.atoms(self._sp.Rational))

    def _approximate(self, value: Any, places: int = 30) -> Any:
        """A sympy Float; `ExpressionError` if the value is not real or out of bounds."""
        number = value.evalf(places, maxn=4 * places)
        if not number.is_Float and not number.is_Rational:
            if number.has(self._sp.I) or value.is_real is False:
                raise ExpressionError("the result is not a real number")
            raise ExpressionError("the result is not a number")
        if number != 0 and abs(self._exponent(number)) > MAX_DIGITS:
            raise _too_large()
        return number

    def _exponent(self, number: Any) -> int:
        """Decimal exponent of a non-zero Float or Rational."""
        if number.is_Float:
            _, mantissa, power, bits = number._mpf_
            return (power + bits) * 30103 // 100000 if mantissa else 0  # log10(2)
        return _digits(int(number.p)) - _digits(int(number.q))

    def _is_zero(self, value: Any) -> bool:
        if value.is_Rational:
            return bool(value == 0)
        number = self._approximate(value)
        return bool(number == 0) or self._exponent(number) < -25

    def _integer(self, value: Any, name: str) -> int:
        if not value.is_Integer:
            raise ExpressionError(f"{name} takes whole numbers, not {_show(value)[:60]}")
        return int(value)

    # -- operators --

    def binary(self, sign: str, left: Any, right: Any) -> Any:
        if sign == "+":
            return self._checked(left + right)
        if sign == "-":
            return self._checked(left - right)
        if sign == "*":
            return self._checked(left * right)
        if sign == "**":
            return self._power(left, right)
        if self._is_zero(right):
            raise ExpressionError("division by zero")
        if sign == "/":
            return self._checked(left / right)
        quotient = self._floor(self._checked(left / right))
        return quotient if sign == "//" else self._checked(left - right * quotient)

    def _power(self, base: Any, exponent: Any) -> Any:
        if base.is_Rational and base == 0:
            if self._approximate(exponent) < 0:
                raise ExpressionError("division by zero")
            return self._sp.Integer(1 if exponent == 0 else 0)
        if base.is_Rational and base < 0 and not exponent.is_Integer:
            raise ExpressionError("a negative number to a power that is not whole is not a real number")
        if base in (1, -1) and exponent.is_Integer:
            return base if int(exponent) % 2 else self._sp.Integer(1)
        self._check_logarithms(exponent)
        size = abs(self._approximate(exponent))
        if size * self._weight(base) > 2 * MAX_DIGITS and not self._small_base(base, size):
            raise _too_large()
        if base == self._sp.E:
            return self._exp(exponent)
        if not exponent.is_Integer and self._weight(base) > MAX_ROOT_DIGITS:
            return self._exact_root(base, exponent)
        return self._checked(base**exponent)

    def _exact_root(self, base: Any, exponent: Any) -> Any:
        if base.is_Rational and exponent.is_Rational and exponent.q <= 64:
            over, over_exact = self._sp.integer_nthroot(int(base.p), int(exponent.q))
            under, under_exact = self._sp.integer_nthroot(int(base.q), int(exponent.q))
            if over_exact and under_exact:
                return self._power(self._sp.Rational(over, under), self._sp.Integer(exponent.p))
        raise ExpressionError(f"the root of a number with more than {MAX_ROOT_DIGITS} digits is taken only if it is exact")

    def _small_base(self, base: Any, size: Any) -> bool:
        """Integers of few digits, whose weight says too little: 2**3000 has 904 digits."""
        return bool(base.is_Integer) and size * math.log10(abs(int(base))) <= MAX_DIGITS

    def _check_logarithms(self, exponent: Any) -> None:
        """In an exponent sympy takes factors into logarithms, however deep they stand: 10**20*log(3) as log(3**10**20)."""
        for term in exponent.atoms(self._sp.Mul):
            coefficient, rest = term.as_coeff_Mul()
            weight = sum(self._weight(log.args[0]) for log in self._sp.Mul.make_args(rest) if isinstance(log, self._sp.log))
            if abs(coefficient) * weight > 2 * MAX_DIGITS:
                raise _too_large()

    def _exp(self, value: Any) -> Any:
        self._check_logarithms(value)
        # Term by term: sympy splits the exponential of a sum, and exp(n*log(m)) is the integer m**n.
        for term in self._sp.Add.make_args(value):
            if abs(self._approximate(term)) > MAX_DIGITS * math.log(10):
                raise _too_large()
        return self._checked(self._sp.exp(value))

    # -- functions --

    def call(self, name: str, arguments: list[Any]) -> Any:
        least, most = FUNCTIONS[name]
        if not least <= len(arguments) <= most:
            count = str(least) if least == most else f"{least} to {most}"
            raise ExpressionError(f"{name} takes {count} argument{'s' if most > 1 else ''}, not {len(arguments)}")
        return getattr(self, f"_{name}")(*arguments)

    def _sqrt(self, value: Any) -> Any:
        if self._less(value, self._sp.Integer(0)):
            raise ExpressionError("the square root of a negative number is not a real number")
        return self._power(value, self._sp.Rational(1, 2))

    def _less(self, left: Any, right: Any) -> bool:
        if left.is_Rational and right.is_Rational:
            return bool(left < right)
        return bool(self._approximate(left - right) < 0)

    def _abs(self, value: Any) -> Any:
        return -value if self._less(value, self._sp.Integer(0)) else value

    def _min(self, *values: Any) -> Any:
        least = values[0]
        for value in values[1:]:
            least = value if self._less(value, least) else least
        return least

    def _max(self, *values: Any) -> Any:
        most = values[0]
        for value in values[1:]:
            most = value if self._less(most, value) else most
        return most

    def _floor(self, value: Any) -> Any:
        if value.is_Rational:
            return self._sp.Integer(int(value.p) // int(value.q))
        near = self._approximate(value, places=60)
        if self._exponent(near) > 30:
            raise ExpressionError(f"{_show(value)[:60]} is too large to be rounded to a whole number")
        whole = self._sp.Integer(int(self._sp.floor(near)))
        # Within 1e-25 of the next integer it is taken to be that integer, in a form that sympy did not simplify.
        return whole + 1 if near - whole > 1 - self._sp.Float("1e-25") else whole

    def _ceil(self, value: Any) -> Any:
        return -self._floor(-value)

    def _round(self, value: Any, places: Any = None) -> Any:
        """Half to even, as Python's `round`."""
        count = 0 if places is None else self._integer(places, "round")
        if abs(count) > MAX_DIGITS // 2:
            raise ExpressionError(f"round takes at most {MAX_DIGITS // 2} places")
        scale = self._sp.Integer(10) ** count
        scaled = self._checked(value * scale)
        whole = self._floor(scaled)
        rest = scaled - whole
        half = self._sp.Rational(1, 2)
        if self._less(half, rest) or (rest == half and int(whole) % 2):
            whole += 1
        return self._checked(whole / scale)

    def _gcd(self, *values: Any) -> Any:
        return self._sp.Integer(math.gcd(*(self._integer(value, "gcd") for value in values)))

    def _lcm(self, *values: Any) -> Any:
        result = 1
        for value in values:
            result = math.lcm(result, self._integer(value, "lcm"))
            if _digits(result) > MAX_DIGITS:
                raise _too_large()
        return self._sp.Integer(result)

    def _factorial(self, value: Any) -> Any:
        count = self._integer(value, "factorial")
        if count < 0:
            raise ExpressionError("factorial takes no negative numbers")
        if count > MAX_DIGITS or math.lgamma(count + 1) / math.log(10) > MAX_DIGITS:
            raise _too_large()
        return self._sp.Integer(math.factorial(count))

    def _log(self, value: Any, base: Any = None) -> Any:
        zero = self._sp.Integer(0)
        if not self._less(zero, value):
            raise ExpressionError("the logarithm takes only positive numbers")
        if base is None:
            return self._checked(self._sp.log(value))
        if not self._less(zero, base) or base == 1:
            raise ExpressionError("the base of a logarithm must be positive and not 1")
        return self._checked(self._sp.log(value, base))

    def _ln(self, value: Any) -> Any:
        return self._log(value)

    def _log2(self, value: Any) -> Any:
        return self._log(value, self._sp.Integer(2))

    def _log10(self, value: Any) -> Any:
        return self._log(value, self._sp.Integer(10))

    def _sin(self, value: Any) -> Any:
        return self._checked(self._sp.sin(value))

    def _cos(self, value: Any) -> Any:
        return self._checked(self._sp.cos(value))

    def _tan(self, value: Any) -> Any:
        if self._is_zero(self._sp.cos(value)):
            raise ExpressionError("the tangent is not defined there")
        return self._checked(self._sp.tan(value))


# -- showing --------------------------------------------------------------------------------------------------------------


def _show(value: Any) -> str:
    if value.is_Integer:
        return str(int(value))
    if not value.is_Rational:
        return f"{value} ≈ {_decimal(value)}"
    exact = f"{int(value.p)}/{int(value.q)}"
    approximate = _decimal(value)
    same = "e" not in approximate and Fraction(approximate) == Fraction(int(value.p), int(value.q))
    return f"{exact} {'=' if same else '≈'} {approximate}"


def _decimal(value: Any) -> str:
    text = str(value.evalf(PLACES))
    mantissa, mark, exponent = text.partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return mantissa + mark + exponent
