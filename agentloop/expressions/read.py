"""Mathematical text to a tree: recursive descent over LaTeX and plain text, bounded in length and depth, never evaluated.

What is accepted, from the outside in: lists (`1, 2 and 3`), relations (`1 \\le x < 2`), unions of sets, ratios (`2:3`), sums,
products (also without a sign), powers, and as atoms numbers, symbols, functions, `\\frac`, `\\sqrt`, `\\binom`, brackets,
intervals, sets, matrices. After a quantity its unit or another annotation may stand (`5 \\text{ cm}`), before it a few words
that change nothing (`the answer is`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from agentloop.expressions.tokens import Token, tokens
from agentloop.expressions.tree import MAX_DEPTH, MAX_DIGITS, Node, Unreadable, number
from agentloop.expressions.words import (
    ACCENTS,
    ALIASES,
    DOUBT,
    ENVIRONMENTS,
    FUNCTIONS,
    GREEK,
    JOINING,
    LISTS,
    NEUTRAL,
    NO_FACTOR,
    NUMBER_WORDS,
    OPERATORS,
    PERCENT,
    RELATIONS,
    SCALES,
    SPACES,
    STYLES,
    UNITS,
)

_POWER = re.compile(r"\s*\^\s*\{?([23])\}?")
_REPEATED = re.compile(r"([0-9]*\.[0-9]*?)(?=[0-9]{3})([0-9]{1,9}?)\2+")
_OPEN = {"(": ")", "[": "]"}
_CONSTANTS = {"pi": "pi", "e": "e", "i": "i", "infty": "inf", "infinity": "inf", "inf": "inf", "oo": "inf", "iota": "i"}


def parse(text: str, grouping: str = "all") -> Node:
    """The tree of `text`. Raises `Unreadable`."""
    try:
        return _Reader(tokens(text, grouping)).read()
    except RecursionError as error:
        raise Unreadable("it is nested too deep") from error


class _Reader:
    def __init__(self, found: list[Token]) -> None:
        self._tokens = found
        self._at = 0
        self._depth = 0
        self._bars = 0  # open |…|
        self._building = False  # in what `\\{… : …\\}` has before its colon

    # -- tokens --

    @property
    def _next(self) -> Token:
        return self._tokens[min(self._at, len(self._tokens) - 1)]

    def _is(self, *texts: str) -> bool:
        token = self._next
        return token.kind in ("char", "cmd") and (token.text if token.kind == "char" else "\\" + token.text) in texts

    def _take(self, *texts: str) -> str | None:
        if self._is(*texts):
            token = self._next
            self._at += 1
            return token.text if token.kind == "char" else "\\" + token.text
        return None

    def _expect(self, *texts: str) -> str:
        found = self._take(*texts)
        if found is None:
            raise Unreadable(f"'{texts[0]}' was expected, not {self._named()}")
        return found

    def _named(self) -> str:
        return f"'{self._next.text[:40]}'" if self._next.kind != "end" else "the end"

    def _deeper(self, read: Callable[[], Node]) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable(f"it is nested more than {MAX_DEPTH} deep")
        node = read()
        self._depth -= 1
        return node

    # -- the whole, lists --

    def read(self) -> Node:
        while self._tokens[-2:-1] and self._tokens[-2].kind == "char" and self._tokens[-2].text in ",;:":
            del self._tokens[-2]
        node = self._list()
        if self._next.kind != "end":
            raise Unreadable(f"unexpected {self._named()}")
        return node

    def _words(self, token: Token) -> list[str]:
        return [word.strip(".,:;()").casefold() for word in token.text.split()]

    def _joins(self) -> bool:
        """The next token is a word between items."""
        token = self._next
        if token.kind == "id":
            return token.text in JOINING
        return token.kind == "text" and bool(words := self._words(token)) and all(w in JOINING or not w for w in words)

    def _separator(self) -> str | None:
        """One separator, with everything that may be part of it (`, and`)."""
        kind: str | None = None
        while True:
            if taken := self._take(",", ";", "\\\\"):
                kind = ";" if taken != "," or kind == ";" else ","
            elif self._joins() or self._is("\\land", "\\lor", "\\wedge", "\\vee"):
                either = self._is("\\lor", "\\vee") or "or" in self._words(self._next)
                self._at += 1
                kind = "or" if either and kind != ";" else kind or "and"
            elif self._next.kind == "text" and not self._next.text.strip(" ,"):
                self._at += 1
            else:
                return kind

    def _list(self) -> Node:
        """Items; with `;` and `,` both, lists of lists."""
        while self._next.kind == "text" and not self._next.text.strip(" ,"):
            self._at += 1
        rows: list[list[Node]] = [[]]
        either = False
        kinds: list[str] = []
        while True:
            rows[-1].append(self._item())
            kind = self._separator()
            if kind is None or self._ends():
                break
            kinds.append(kind)
            either = either or kind == "or"
            if kind == ";":
                rows.append([])
        if ";" in kinds and any(kind != ";" for kind in kinds):
            return Node("list", tuple(row[0] if len(row) == 1 else Node("list", tuple(row)) for row in rows), ";")
        items = [item for row in rows for item in row]
        if either and all(item.op == "rel" and item.text != "=" for item in items):
            return Node("list", tuple(items), "or")
        return items[0] if len(items) == 1 else Node("list", tuple(items))

    def _ends(self) -> bool:
        return self._next.kind == "end" or self._is(")", "]", "}", "\\}", "\\rangle", "\\end", "&")

    # -- items: a relation with words around it --

    def _item(self) -> Node:
        while self._wordy() and (self._is_label() or all(word in NEUTRAL or not word for word in self._words(self._next))):
            if self._tokens[self._at + 1].kind == "end":
                break
            self._at += 1
            self._take(":")
        if self._next.kind == "text" and self._next.text.strip(" .").casefold() in ("$", "€", "£", "¥", "¢", "₹", "rs", "us$"):
            unit = self._next.text.strip(" .").casefold().removeprefix("us")  # money
            self._at += 1
            node = Node("unit", (self._relation(),), unit)
        else:
            node = self._relation()
        node = self._annotated(node) if node.op == "unit" else node
        while node.op == "unit" and self._next.kind == "number" and self._next.text.isdigit():
            node = self._and_smaller(node)
        return node

    def _and_smaller(self, node: Node) -> Node:
        """`1 hour 30 minutes`, `5 ft 6 in`, as so many of the smaller unit."""
        part = self._annotated(self._sum())
        large, small = UNITS.get(node.text, ("", "0", "")), UNITS.get(part.text if part.op == "unit" else "", ("?", "0", ""))
        if large[0] != small[0] or Fraction(large[1]) <= Fraction(small[1]):
            raise Unreadable("a sign is missing between two quantities")
        factor = number(Fraction(large[1]) / Fraction(small[1]))
        return Node("unit", (Node("add", (Node("mul", (node.args[0], factor)), part.args[0])),), part.text)

    def _is_label(self) -> bool:
        """`\\text{Area: }`"""
        token = self._next
        label = token.text.strip()
        return (
            token.kind == "text"
            and label[-1:] == ":"
            and not any(c.isdigit() for c in label)
            and not DOUBT & {*self._words(token)}
        )

    def _wordy(self) -> bool:
        token = self._next
        if token.kind == "text":
            return len(token.text) > 1
        return token.kind == "id" and len(token.text) > 1 and token.text.casefold() in NEUTRAL

    def _annotated(self, node: Node) -> Node:
        """`node` with the words that follow it. Raises `Unreadable` for those that change its meaning."""
        words: list[str] = []
        while True:
            token = self._next
            if token.kind == "text" and not self._joins():
                words += _powers(token.text).split()
            elif token.kind == "id" and token.text in ("C", "F") and node.op == "degree" and not words:
                words.append(token.text)  # °C
            elif token.kind == "id" and len(token.text) > 1 and not self._joins():
                if token.text in FUNCTIONS and not self._minutes():
                    break
                words.append(token.text)
            elif token.kind == "cmd" and token.text in ("mathrm", "rm", "operatorname"):
                self._at += 1
                words += _powers(self._raw()).split()
                continue
            elif words and (token.text == "^" or token.text == "/") and token.kind == "char":
                self._at += 1
                words.append(token.text + (self._raw() if token.text == "^" else ""))
                continue
            elif words and token.kind == "id" and words[-1] == "/":
                words.append(token.text)
            elif words and self._is("\\cdot", "*") and self._tokens[self._at + 1].text in UNITS:
                pass  # km·h^{-1}
            elif self._is("%") and node.op != "percent":
                words.append("%")
            else:
                break
            self._at += 1
        words = [word for word in words if word]
        if not words:
            return node
        text = " ".join(word.rstrip(".") or word for word in words).strip(" .,:;()").casefold()  # sq. ft.
        if text in PERCENT:
            return Node("percent", (node,))
        scale, _, rest = text.partition(" ")
        if scale in SCALES and node.op in ("num", "neg", "div", "add"):
            node, text = Node("mul", (node, number(SCALES[scale]))), rest
            words = rest.split()
            if not words:
                return node
        bare = {word.strip(".,:;()").casefold() for word in words}
        if bare & DOUBT or bare & JOINING or any(any(c.isdigit() for c in word) for word in words if word[0] != "^"):
            raise Unreadable(f"'{text[:40]}' changes what stands before it")
        if text in ("degrees", "degree", "deg"):
            return Node("degree", (node,))
        if text in ("degrees celsius", "degree celsius", "degrees fahrenheit", "degree fahrenheit", "degrees c", "degrees f"):
            return Node("unit", (Node("degree", (node,)),), text.split()[1][0])
        if not text:
            return node
        if node.op == "unit":  # money with words: $5 million is not read, $5 USD is
            return node if UNITS.get(text, ("",))[0] == UNITS.get(node.text, ("?",))[0] else Node("unit", node.args, text)
        return Node("unit", (node,), text.replace(" ^", "^"))

    def _relation(self) -> Node:
        if self._is("=", "\\approx"):  # «= 5»
            self._at += 1
        sides = [self._annotated(self._sets())]
        operators: list[str] = []
        while True:
            token = self._next
            key = token.text if token.kind == "char" else "\\" + token.text if token.kind == "cmd" else ""
            if key == "\\not":
                self._at += 1
                negated = {"=": "!=", "\\in": "notin"}.get(self._next_key())
                if negated is None:
                    raise Unreadable(f"'\\not' before {self._named()}")
                self._at += 1
                operators.append(negated)
            elif key in RELATIONS:
                self._at += 1
                operators.append(RELATIONS[key])
                if self._take("="):  # =, with a line break
                    continue
            elif token.kind == "id" and token.text == "in" and sides[-1].op == "sym":
                self._at += 1
                operators.append("in")
            else:
                break
            sides.append(self._annotated(self._sets()))
        if not operators:
            return sides[0]
        return Node("rel", tuple(sides), " ".join(operators))

    def _next_key(self) -> str:
        return self._next.text if self._next.kind == "char" else "\\" + self._next.text

    def _sets(self) -> Node:
        node = self._ratio()
        while taken := self._take("\\cup", "\\cap", "\\setminus", "\\backslash", "\\bigcup"):
            op = {"\\cap": "inter", "\\cup": "union", "\\bigcup": "union"}.get(taken, "diff")
            right = self._ratio()
            args = (*node.args, right) if node.op == op != "diff" else (node, right)
            node = Node(op, args)
        if self._next.kind == "id" and self._next.text == "U" and node.op == "tuple":
            self._at += 1
            right = self._sets()
            node = Node("union", (node, *(right.args if right.op == "union" else (right,))))
        return node

    def _ratio(self) -> Node:
        parts = [self._sum()]
        if taken := self._take("\\over", "\\choose"):
            pair = parts[0], self._sum()
            return Node("div", pair) if taken == "\\over" else Node("call", pair, "binomial")
        while (self._is(":") and not self._building and self._tokens[self._at + 1].kind != "end") or self._to():
            self._at += 1
            parts.append(self._sum())
        return parts[0] if len(parts) == 1 else Node("ratio", tuple(parts))

    def _to(self) -> bool:
        """`3 to 4`"""
        before, token, after = self._tokens[self._at - 1], self._next, self._tokens[min(self._at + 1, len(self._tokens) - 1)]
        return token.kind in ("id", "text") and token.text == "to" and before.kind == after.kind == "number"

    # -- arithmetic --

    def _sum(self) -> Node:
        terms: list[Node] = []
        sign = self._take("+", "-", "\\pm", "\\mp", "+-")
        term = self._product()
        terms.append(_signed(sign, term))
        while sign := self._take("+", "-", "\\pm", "\\mp", "+-"):
            if self._is("+", "-"):
                raise Unreadable("two signs in a row")
            term = self._product()
            if sign in ("\\pm", "\\mp", "+-"):
                left = terms[0] if len(terms) == 1 else Node("add", tuple(terms))
                terms = [Node("plusminus", (left, term))]
            else:
                terms.append(_signed(sign, term))
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def _product(self) -> Node:
        node = self._power()
        while True:
            if self._take("*", "\\times", "\\cdot", "\\ast") or self._crossed():
                node = _times(node, self._factor())
            elif self._take("/", "\\div"):
                node = Node("div", (node, self._factor()))
            elif self._starts_factor(node):
                right = self._power()
                if (arc := _arc(right)) is not None and node.op == "degree":  # 15°30'
                    node = Node("degree", (Node("add", (node.args[0], arc)),))
                    continue
                mark = right.op if right.op in ("percent", "degree") else ""
                part = right.args[0] if mark else right
                if _whole(node) and part.op == "div" and part.text == "mixed":
                    node = Node("add", (node, Node("div", part.args)))  # 1\frac{1}{2}
                    node = Node(mark, (node,)) if mark else node
                else:
                    node = _times(node, right)
            else:
                return node

    def _crossed(self) -> bool:
        """`1.2 x 10^5`"""
        if self._next.kind != "id" or self._next.text not in ("x", "X") or self._tokens[self._at - 1].kind != "number":
            return False
        ten, power = self._tokens[self._at + 1], self._tokens[min(self._at + 2, len(self._tokens) - 1)]
        if ten.kind != "number" or ten.text != "10" or power.text not in ("^", "**"):
            return False
        self._at += 1
        return True

    def _factor(self) -> Node:
        if sign := self._take("-", "+", "\\pm"):
            return _signed(sign, self._deeper(self._factor))
        return self._power()

    def _starts_factor(self, left: Node) -> bool:
        token = self._next
        if token.kind == "number":
            if left.op == "num" and self._tokens[self._at - 1].kind == "number":
                if _whole(left) and _whole_text(token.text) and self._slash_follows():
                    self._mix()
                    return True
                raise Unreadable(f"a sign is missing before {self._named()}")
            return True
        if token.kind == "id":
            if (token.text == "U" and left.op == "tuple") or (token.text in ("C", "F") and left.op == "degree"):
                return False
            return not (self._joins() or _is_word(token, left) or self._minutes() or self._to())
        if token.kind == "char":
            if token.text == "[":
                return left.op == "num"
            return token.text in "({" or (token.text == "|" and not self._bars)
        if token.kind != "cmd":
            return False
        if token.text in ("mathrm", "operatorname", "rm") and not self._style_is_name():
            return False
        return "\\" + token.text not in RELATIONS and token.text not in NO_FACTOR

    def _minutes(self) -> bool:
        """`90 min`, which is no function here."""
        if self._next.kind != "id" or self._next.text != "min" or self._tokens[self._at - 1].kind != "number":
            return False
        return self._tokens[self._at + 1].text not in ("(", "{", "_", "\\{")

    def _style_is_name(self) -> bool:
        """`\\mathrm{…}` holds one letter or a function, no unit."""
        following = self._tokens[self._at + 1 : self._at + 4]
        name = following[1].text if len(following) == 3 and following[0].text == "{" else ""
        return len(name) == 1 or name in FUNCTIONS

    def _slash_follows(self) -> bool:
        one, two = self._tokens[self._at + 1 : self._at + 3] if self._at + 3 <= len(self._tokens) else (self._next, self._next)
        return one.text == "/" and two.kind == "number" and _whole_text(two.text)

    def _mix(self) -> None:
        """`1 1/2`: the fraction becomes one token, as if written with `\\frac`."""
        top, bottom = self._tokens[self._at].text, self._tokens[self._at + 2].text
        space = self._tokens[self._at].spaced
        pieces = [Token("cmd", "frac", space)]
        for part in (top, bottom):
            pieces += [Token("char", "{", False), Token("number", part, False), Token("char", "}", False)]
        self._tokens[self._at : self._at + 3] = pieces

    def _power(self) -> Node:
        node = self._postfix(self._atom())
        if self._take("^", "**"):
            if self._take("\\circ", "\\degree") or self._braced("circ"):
                return self._postfix(Node("degree", (node,)))
            if self._take("'") or self._braced("prime"):
                return Node("sym", (), node.text + "'") if node.op == "sym" else Node("opaque", (node,), "prime")
            node = self._postfix(Node("pow", (node, self._deeper(self._exponent))))
        return node

    def _braced(self, name: str) -> bool:
        following = self._tokens[self._at : self._at + 3]
        if [t.text for t in following] == ["{", name, "}"] and following[1].kind == "cmd":
            self._at += 3
            return True
        return False

    def _exponent(self) -> Node:
        if sign := self._take("-", "+"):
            return _signed(sign, self._deeper(self._exponent))
        return self._power()

    def _postfix(self, node: Node) -> Node:
        while True:
            if self._is("!") and not (self._tokens[self._at + 1].text == "=" and self._tokens[self._at + 1].kind == "char"):
                self._at += 1
                node = Node("fact", (node,))
            elif self._take("%"):
                node = Node("percent", (node,))
            elif self._take("'"):
                node = Node("sym", (), node.text + "'") if node.op == "sym" else Node("opaque", (node,), "prime")
            elif self._take("\\degree"):
                node = Node("degree", (node,))
            else:
                return node

    # -- atoms --

    def _atom(self) -> Node:
        token = self._next
        if token.kind == "end":
            raise Unreadable("it ends where something was expected")
        self._at += 1
        if token.kind == "number":
            return self._number(token)
        if token.kind == "id":
            return self._identifier(token)
        if token.kind == "text":
            return self._text_atom(token)
        if token.kind == "cmd":
            return self._command(token)
        if token.text in _OPEN:
            return self._bracket(token.text)
        if token.text == "{":
            node = self._deeper(self._list) if not self._take("}") else None
            if node is None:
                return Node("set")
            self._expect("}")
            return node
        if token.text == "|":
            return self._bar()
        raise Unreadable(f"unexpected '{token.text}'")

    def _number(self, token: Token) -> Node:
        if "." in token.text:
            if token.text[-1] == "." and [t.kind for t in self._tokens[self._at : self._at + 3]] == ["char", "number", "char"]:
                opening, repeated, closing = self._tokens[self._at : self._at + 3]
                if (opening.text, closing.text) == ("(", ")") and not opening.spaced:  # 0.(3)
                    self._at += 3
                    return _repeating(token.text, repeated.text)
            if self._take("\\overline", "\\bar"):  # 0.1\overline{6}
                return _repeating(token.text, self._raw())
            if self._take("\\dot"):  # 0.1\dot{6}, 0.\dot{1}4285\dot{7}
                period = self._raw()
                between = self._tokens[self._at + 1 : self._at + 2] if self._next.kind == "number" else [self._next]
                if between and between[0].text == "dot":
                    if self._next.kind == "number":
                        period += self._next.text
                        self._at += 1
                    self._at += 1
                    period += self._raw()
                return _repeating(token.text, period)
            if self._is("\\ldots", "\\dots", "\\cdots") and (found := _REPEATED.fullmatch(token.text)):  # 0.1666…
                self._at += 1
                return _repeating(found[1], found[2])
        node = _literal(token.text)
        if self._is("_") and _whole(node):
            self._at += 1
            base = self._raw()
            base = str(NUMBER_WORDS.get(base.casefold(), base))
            if not base.isdigit() or len(base) > 3:
                raise Unreadable(f"'{base[:20]}' is no base")
            return Node("base", (), token.text, Fraction(int(base)))
        return node

    def _identifier(self, token: Token) -> Node:
        name = token.text
        if name in FUNCTIONS and not (len(name) <= 2 and name in ("re", "im")):
            return self._function(ALIASES.get(name, name), name)
        if name in _CONSTANTS and not self._is("_"):
            return Node("const", (), _CONSTANTS[name])
        if name == "I" and "*" in (self._tokens[self._at - 2].text, self._next.text):  # sympy's
            return Node("const", (), "i")
        if name in GREEK:
            return self._symbol("\\" + name)
        if len(name) == 1:
            return self._symbol(name)
        if name in ("frac", "dfrac", "tfrac", "cfrac") and self._is("{"):
            return self._command(Token("cmd", "frac", token.spaced))
        if len(name) > 3 and self._is("="):  # Area = 6
            return Node("sym", (), name)
        if len(name) > 4:
            for function in ("sqrt", "sin", "cos", "tan", "log"):  # «xsin(y)» is read, «basins» is not
                if name.endswith(function) and len(name) == len(function) + 1:
                    self._tokens.insert(self._at, Token("id", function, False))
                    return self._symbol(name[0])
            raise Unreadable(f"'{name[:40]}' is a word")
        letters = [Token("id", letter, False) for letter in name[1:]]
        self._tokens[self._at : self._at] = letters
        return self._identifier(Token("id", name[0], token.spaced))

    def _text_atom(self, token: Token) -> Node:
        text = token.text.strip()
        if len(text) == 1 and text.isalpha():
            return self._symbol(text)
        if self._is("=") and text and not any(c.isdigit() for c in text):  # \text{Area} = 6
            return Node("sym", (), text)
        if text.casefold() in ("inf", "infinity"):
            return Node("const", (), "inf")
        raise Unreadable(f"'{text[:40]}' is a word")

    def _symbol(self, name: str) -> Node:
        """A symbol with its subscript, written one way."""
        name = "\\" + name[4:] if name.startswith("\\var") and name[4:] in GREEK else name
        if self._take("_"):
            name += "_" + self._raw()
        while self._take("'") or (self._is("^") and self._primed()):
            name += "'"
        return Node("sym", (), name)

    def _primed(self) -> bool:
        self._at += 1
        if self._take("'", "\\prime") or self._braced("prime"):
            return True
        self._at -= 1
        return False

    def _raw(self) -> str:
        """The next token or braced group, as it is written, without spaces and braces."""
        if not self._take("{"):
            token = self._next
            self._at += 1
            if token.kind == "end":
                raise Unreadable("it ends where something was expected")
            if token.kind == "cmd" and token.text in STYLES:
                return self._raw()
            return token.text
        depth, parts = 1, list[str]()
        while True:
            token = self._next
            self._at += 1
            if token.kind == "end":
                raise Unreadable("a '{' is not closed")
            if token.kind == "char" and token.text in "{}":
                depth += 1 if token.text == "{" else -1
                if depth == 0:
                    return "".join(parts)
            elif not (token.kind == "cmd" and token.text in STYLES):
                parts.append(token.text)

    def _argument(self) -> Node:
        """An argument of a command: a group, or a single digit, letter or command."""
        token = self._next
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            self._tokens[self._at : self._at + 1] = [Token("number", d, False) for d in (token.text[0], token.text[1:])]
        elif token.kind == "id" and len(token.text) > 1:
            self._tokens[self._at : self._at + 1] = [Token("id", d, False) for d in (token.text[0], token.text[1:])]
        elif self._take("{"):
            node = self._deeper(self._list)
            self._expect("}")
            return node
        return self._deeper(self._atom)

    def _command(self, token: Token) -> Node:
        name = token.text
        if name == "frac":
            top = self._argument()
            bottom = self._argument()
            proper = _whole(top) and _whole(bottom) and (top.value or 0) < (bottom.value or 0)
            return Node("div", (top, bottom), "mixed" if proper else "")  # it may follow a whole number
        if name == "sqrt":
            return self._root()
        if name in ("binom", "dbinom", "tbinom"):
            return Node("call", (self._argument(), self._argument()), "binomial")
        if name in _CONSTANTS:
            return Node("const", (), _CONSTANTS[name])
        if name in FUNCTIONS:
            return self._function(ALIASES.get(name, name), name)
        if name in GREEK:
            return self._symbol("\\" + name)
        if name in ("emptyset", "varnothing"):
            return Node("set")
        if name == "mathbb" or (name in ("mathbf", "mathrm") and self._is_space()):
            space = self._raw()
            if space not in SPACES:
                raise Unreadable(f"'{space[:20]}' is no set of numbers")
            while self._is("^", "_"):
                self._at += 1
                space += self._raw()
            return Node("space", (), space)
        if name in STYLES:
            return self._styled()
        if name in ACCENTS:
            node = Node("opaque", (self._written_argument(),), "overline" if name in ("overline", "bar") else "accent")
            return node.args[0] if name in ("vec", "hat", "tilde") and node.args[0].op == "sym" else node
        if name == "{":
            if self._take("\\}"):
                return Node("set")
            bars, self._bars = self._bars, 1
            building, self._building = self._building, True
            items = self._deeper(self._list)
            self._bars, self._building = bars, building
            if self._take("|", "\\mid", ":"):
                condition = self._deeper(self._list)
                self._expect("\\}")
                return Node("opaque", (items, condition), "builder")
            self._expect("\\}")
            return Node("set", items.args if items.op == "list" else (items,))
        if name in ("lvert", "vert", "lfloor", "lceil", "langle", "lVert"):
            return self._delimited(name)
        if name == "begin":
            return self._environment()
        if name in ("sum", "prod", "int", "lim", "oint", "iint"):
            return self._big(name)
        if name in ("angle", "triangle", "measuredangle", "ldots", "cdots", "dots", "dotsc", "dotsb", "star", "therefore"):
            if name in ("angle", "triangle", "measuredangle") and self._next.kind == "id":
                self._at += 1
                return Node("sym", (), f"\\{name} {self._tokens[self._at - 1].text}")
            if name == "therefore":
                return self._atom()
            return Node("sym", (), "\\ldots" if "dots" in name else "\\" + name)
        if name == "pounds":
            return Node("unit", (self._deeper(self._power),), "£")
        if name in ("pmod", "bmod", "mod"):
            return Node("opaque", (self._argument(),), "mod")
        if name == "tag":
            raise Unreadable("a tag stands in it")
        if name in OPERATORS:
            raise Unreadable(f"'\\{name}' is an operator that is not known")
        if not name.isalpha():
            raise Unreadable(f"'\\{name[:20]}' is not known")
        return self._symbol("\\" + name)

    def _is_space(self) -> bool:
        following = self._tokens[self._at : self._at + 3]
        return [t.text for t in following[::2]] == ["{", "}"] and following[1].text == "R"

    def _styled(self) -> Node:
        """`\\mathrm{E}`, `\\mathbf{v}`: what it holds. A word is none of the grammar."""
        if not self._is("{"):
            return self._deeper(self._power)
        following = self._tokens[self._at + 1]
        if following.kind == "id" and len(following.text) > 1 and self._tokens[self._at + 2].text == "}":
            self._at += 3
            if following.text not in FUNCTIONS and len(following.text) > 2:
                raise Unreadable(f"'{following.text[:40]}' is a word")
            return self._identifier(following)
        node = self._argument()
        if node.op == "sym" and self._take("_"):
            return Node("sym", (), f"{node.text}_{self._raw()}")
        return node

    def _written_argument(self) -> Node:
        start = self._at
        try:
            return self._argument()
        except Unreadable:
            self._at = start
            return Node("sym", (), self._raw())

    def _root(self) -> Node:
        index: Node | None = None
        if self._take("["):
            index = self._deeper(self._list)
            self._expect("]")
        argument = self._argument() if self._is("{") else self._deeper(self._atom)
        if index is None:
            return Node("call", (argument,), "sqrt")
        return Node("call", (argument, index), "root")

    def _function(self, name: str, original: str) -> Node:
        if name == "sqrt":
            return self._root()
        base: Node | None = None
        exponent: Node | None = None
        while True:
            if exponent is None and self._take("^", "**"):
                exponent = self._deeper(self._exponent)
            elif base is None and self._take("_"):
                base = self._argument() if name == "log" else Node("sym", (), self._raw())
            else:
                break
        if name == "cis":
            angle = self._function_arguments()
            turned = Node("mul", (Node("const", (), "i"), Node("call", angle, "sin")))
            node = Node("add", (Node("call", angle, "cos"), turned))
            return node if exponent is None else Node("pow", (node, exponent))
        node = Node("call", self._function_arguments(), name)
        if name == "log" and base is not None:
            node = Node("call", (*node.args, base), "log")
        elif original in ("lg",):
            node = Node("call", (*node.args, number(10)), "log")
        if exponent is not None:
            inverse = exponent.op == "neg" and exponent.args[0] == number(1, exponent.args[0].text)
            if inverse and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
                return Node("call", node.args, "arc" + name)
            return Node("pow", (node, exponent))
        return node

    def _function_arguments(self) -> tuple[Node, ...]:
        if self._take("("):
            inside = self._deeper(self._list)
            self._expect(")")
            return inside.args if inside.op == "list" else (inside,)
        if opened := self._take("{", "\\{"):
            inside = self._deeper(self._list)
            self._expect(opened.replace("{", "}"))
            return inside.args if inside.op == "list" else (inside,)
        sign = self._take("-")
        node = self._deeper(self._power)
        while self._next.kind in ("number", "id") and not self._joins() and not _is_word(self._next, node):
            if self._next.text in FUNCTIONS:
                break
            node = _times(node, self._deeper(self._power))
        while self._next.kind == "cmd" and self._next.text in (*GREEK, "pi"):
            node = _times(node, self._deeper(self._power))
        return (_signed(sign, node),)

    def _bracket(self, opening: str) -> Node:
        if self._take(_OPEN[opening]):
            return Node("tuple", (), opening + _OPEN[opening])
        bars, self._bars = self._bars, 0
        node = self._deeper(self._list)
        self._bars = bars
        closing = self._expect(")", "]")
        items = node.args if node.op == "list" else (node,)
        if len(items) == 1 and opening == "(" and closing == ")":
            if node.op == "num" and _whole(node) and self._is("_"):  # (101)_2
                return self._number(Token("number", node.text, False))
            return node
        return Node("tuple", items, opening + closing)

    def _bar(self) -> Node:
        self._bars += 1
        node = self._deeper(self._sum)
        self._bars -= 1
        self._expect("|")
        return Node("call", (node,), "abs")

    def _delimited(self, name: str) -> Node:
        node = self._deeper(self._list)
        if name == "langle":
            self._expect("\\rangle")
            return Node("tuple", node.args if node.op == "list" else (node,), "()")
        self._expect({"lvert": "\\rvert", "vert": "\\vert", "lVert": "\\rVert", "lfloor": "\\rfloor", "lceil": "\\rceil"}[name])
        return Node("call", (node,), {"lfloor": "floor", "lceil": "ceil"}.get(name, "abs"))

    def _environment(self) -> Node:
        name = self._raw()
        if name not in ENVIRONMENTS and name not in LISTS:
            raise Unreadable(f"environment '{name[:20]}' is not known")
        if name == "array" and self._is("{"):
            self._raw()
        rows: list[tuple[Node, ...]] = []
        row: list[Node] = []
        while True:
            if self._take("\\end"):
                self._raw()
                break
            if self._take("\\hline"):
                continue
            if self._take("\\\\", "\\cr"):
                if row:
                    rows.append(tuple(row))
                row = []
            elif not self._take("&"):
                self._take(",")
                if not self._is("\\\\", "\\end", "&"):
                    row.append(self._deeper(self._item))
                    self._take(",", ";")
        if row:
            rows.append(tuple(row))
        if name in LISTS:
            return Node("list", tuple(item for row_ in rows for item in row_))
        if not rows or len({len(row_) for row_ in rows}) != 1:
            raise Unreadable("the rows of a matrix differ in length")
        matrix = Node("matrix", tuple(Node("row", row_) for row_ in rows))
        return Node("call", (matrix,), "det") if name == "vmatrix" else matrix

    def _big(self, name: str) -> Node:
        below = above = None
        while True:
            if below is None and self._take("_"):
                below = self._deeper_argument_relation()
            elif above is None and self._take("^"):
                above = self._argument()
            else:
                break
        body = self._deeper(self._product if name != "int" else self._sum)
        return Node("opaque", tuple(part for part in (below, above, body) if part is not None), name)

    def _deeper_argument_relation(self) -> Node:
        if self._take("{"):
            node = self._deeper(self._list)
            self._expect("}")
            return node
        return self._argument()


# -- helpers --------------------------------------------------------------------------------------------------------------


def _is_word(token: Token, left: Node) -> bool:
    """Letters that are a word or a unit rather than a product of symbols."""
    text = token.text
    if text in ("sq", "cu") and left.op == "num":  # sq. cm
        return True
    if len(text) == 1 or text in FUNCTIONS or text in GREEK or text in _CONSTANTS:
        return False
    if token.spaced and left.op == "num" and len(text) == 3 and set(text) & set("aeiou"):  # 5 men
        return True
    return (text in UNITS or text in PERCENT) if len(text) <= 3 and (text.islower() or text.isupper()) else True


def _arc(node: Node) -> Node | None:
    """`30'` or `30''`, behind degrees, as a part of a degree."""
    marks = 0
    while node.op == "opaque" and node.text == "prime":
        node, marks = node.args[0], marks + 1
    return Node("div", (node, number(60**marks))) if marks in (1, 2) and node.op == "num" else None


def _powers(text: str) -> str:
    """`cm^2` within a text, as it would be read outside of it."""
    return _POWER.sub(r" ^\1", text)


def _whole(node: Node) -> bool:
    return node.op == "num" and _whole_text(node.text)


def _whole_text(text: str) -> bool:
    return text.isdigit() and text.isascii()


def _signed(sign: str | None, node: Node) -> Node:
    if sign in (None, "+"):
        return node
    return Node("neg" if sign == "-" else "pm", (node,))


def _times(left: Node, right: Node) -> Node:
    first = left.args if left.op == "mul" else (left,)
    return Node("mul", (*first, right))


def _literal(text: str) -> Node:
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or abs(int(exponent or 0)) > MAX_DIGITS:
        raise Unreadable(f"a number with more than {MAX_DIGITS} digits")
    return Node("num", (), text, Fraction(text + ("0" if text[-1] == "." else "")))


def _repeating(start: str, period: str) -> Node:
    if not period.isdigit() or len(period) > 50:
        raise Unreadable("a period must be digits")
    whole = Fraction(start + ("0" if start[-1] == "." else ""))
    places = len(start.partition(".")[2])
    return number(whole + Fraction(int(period), (10 ** len(period) - 1) * 10**places), f"{start}({period})")
