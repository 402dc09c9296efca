"""Regular expressions that take linear time, whatever the pattern and the text.

Python's `re` backtracks: `(a+)+b` needs 2^n steps for n times `a`, and a model that is paid for matching a pattern will find
such a text. Here a pattern becomes a nondeterministic automaton whose states are followed all at once, character by character
(K. Thompson, «Regular expression search algorithm», CACM 11(6), 1968): at most (length of the text) x (size of the pattern)
steps. The sets of states are remembered, so that a text costs about one look-up a character.

The syntax is Python's, without what no automaton can do: back references, look-ahead and look-behind, atomic groups and
possessive repeats, conditionals. They are refused with a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from agentloop.errors import ConfigError

MAX_STATES = 5_000
"""Of one pattern; counted repeats are written out."""
MAX_SETS = 2_000
"""Remembered sets of states; beyond them the memory is emptied."""

_EPSILON, _CHARACTER, _ASSERTION, _ACCEPT = range(4)
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
}
_NEGATED = {
    sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
    sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
    sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
}


class LinearRegex:
    """A pattern that is matched against a whole text. Flags are written into it: `(?s)`, `(?i)`, `(?m)`, `(?x)`."""

    def __init__(self, pattern: str, where: str = "pattern") -> None:
        """Raises `ConfigError`, beginning with `where`, for what is no pattern, cannot be linear, or is too large."""
        self.pattern = pattern
        self._where = f"{where} {pattern!r:.80}"
        try:
            tree = parser.parse(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{self._where}: not a regular expression: {error}") from error
        self._nodes: list[tuple[int, Any, list[int]]] = []
        accept = self._node(_ACCEPT, None)
        self._start = self._sequence(list(tree), tree.state.flags, accept)
        self._multiline = any(kind == _ASSERTION for kind, _, _ in self._nodes)
        self._sets: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}

    def fullmatch(self, text: str) -> bool:
        """Whether the whole of `text` matches."""
        if self._multiline:
            return self._follow_with_assertions(text)
        states = self._closure([self._start], None)
        for character in text:
            known = self._sets.get(states)
            if known is None:
                if len(self._sets) >= MAX_SETS:
                    self._sets.clear()
                known = self._sets[states] = {}
            following = known.get(character)
            if following is None:
                if len(known) >= MAX_SETS:
                    known.clear()
                following = known[character] = self._closure(self._step(states, character), None)
            states = following
            if not states:
                return False
        return self._accepts(states)

    # -- following ----------------------------------------------------------------------------------------------------

    def _follow_with_assertions(self, text: str) -> bool:
        """As `fullmatch`, for patterns with `^`, `$` or a word boundary, whose closures depend on the place."""
        states = self._closure([self._start], (text, 0))
        for place, character in enumerate(text):
            states = self._closure(self._step(states, character), (text, place + 1))
            if not states:
                return False
        return self._accepts(states)

    def _step(self, states: tuple[int, ...], character: str) -> list[int]:
        nodes = self._nodes
        return [nodes[s][2][0] for s in states if nodes[s][0] == _CHARACTER and nodes[s][1](character)]

    def _closure(self, states: list[int], place: tuple[str, int] | None) -> tuple[int, ...]:
        seen: set[int] = set()
        waiting = list(states)
        while waiting:
            state = waiting.pop()
            if state in seen:
                continue
            seen.add(state)
            kind, test, following = self._nodes[state]
            if kind == _EPSILON or (kind == _ASSERTION and place is not None and test(*place)):
                waiting += following
        return tuple(sorted(s for s in seen if self._nodes[s][0] in (_CHARACTER, _ACCEPT)))

    def _accepts(self, states: tuple[int, ...]) -> bool:
        return any(self._nodes[state][0] == _ACCEPT for state in states)

    # -- building -----------------------------------------------------------------------------------------------------

    def _node(self, kind: int, test: Any, *following: int) -> int:
        if len(self._nodes) >= MAX_STATES:
            raise ConfigError(f"{self._where}: larger than {MAX_STATES} states; use smaller counts in {{m,n}}")
        self._nodes.append((kind, test, list(following)))
        return len(self._nodes) - 1

    def _sequence(self, items: list[tuple[Any, Any]], flags: int, following: int) -> int:
        for operator, argument in reversed(items):
            following = self._item(operator, argument, flags, following)
        return following

    def _item(self, operator: Any, argument: Any, flags: int, following: int) -> int:
        if operator is sre.BRANCH:
            return self._node(_EPSILON, None, *(self._sequence(list(b), flags, following) for b in argument[1]))
        if operator is sre.SUBPATTERN:
            _, added, removed, inside = argument
            return self._sequence(list(inside), (flags | added) & ~removed, following)
        if operator in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, inside = argument
            return self._repeat(low, high, list(inside), flags, following)
        if operator is sre.AT:
            return self._node(_ASSERTION, _assertion(argument, flags), following)
        test = _character(operator, argument, flags)
        if test is None:
            raise ConfigError(
                f"{self._where}: {str(operator).lower().replace('_', ' ')} cannot be matched in linear time; "
                "back references, look-around, atomic groups and conditions are not supported"
            )
        return self._node(_CHARACTER, test, following)

    def _repeat(self, low: int, high: Any, items: list[tuple[Any, Any]], flags: int, following: int) -> int:
        if high is sre.MAXREPEAT:
            loop = self._node(_EPSILON, None, following)
            self._nodes[loop][2].append(self._sequence(items, flags, loop))
            following = loop
        else:
            end = following
            for _ in range(high - low):
                following = self._node(_EPSILON, None, self._sequence(items, flags, following), end)
        for _ in range(low):
            following = self._sequence(items, flags, following)
        return following


def _character(operator: Any, argument: Any, flags: int) -> Callable[[str], bool] | None:
    """A test of one character, or `None` if `operator` is none."""
    if operator is sre.ANY:
        return (lambda c: True) if flags & re.DOTALL else (lambda c: c != "\n")
    if operator is sre.LITERAL:
        return _fold(lambda c: bool(ord(c) == argument), flags)
    if operator is sre.NOT_LITERAL:
        same = _fold(lambda c: bool(ord(c) == argument), flags)
        return lambda c: not same(c)
    if operator is sre.IN:
        negate = argument[0][0] is sre.NEGATE
        tests = [_member(*item) for item in argument[negate:]]
        inside = _fold(lambda c: any(test(c) for test in tests), flags)
        return (lambda c: not inside(c)) if negate else inside
    return None


def _fold(test: Callable[[str], bool], flags: int) -> Callable[[str], bool]:
    if not flags & re.IGNORECASE:
        return test
    return lambda c: any(test(other) for other in {c, c.lower(), c.upper()} if len(other) == 1)


def _member(operator: Any, argument: Any) -> Callable[[str], bool]:
    if operator is sre.LITERAL:
        return lambda c: bool(ord(c) == argument)
    if operator is sre.RANGE:
        return lambda c: bool(argument[0] <= ord(c) <= argument[1])
    if argument in _NEGATED:
        category = _CATEGORIES[_NEGATED[argument]]
        return lambda c: not category(c)
    return _CATEGORIES[argument]


def _assertion(at: Any, flags: int) -> Callable[[str, int], bool]:
    """A test of a place in a text: `(text, place)`."""
    word = _CATEGORIES[sre.CATEGORY_WORD]

    def boundary(text: str, place: int) -> bool:
        return (place > 0 and word(text[place - 1])) != (place < len(text) and word(text[place]))

    lines = flags & re.MULTILINE
    if at is sre.AT_BEGINNING_STRING or (at is sre.AT_BEGINNING and not lines):
        return lambda text, place: place == 0
    if at is sre.AT_BEGINNING:
        return lambda text, place: place == 0 or text[place - 1] == "\n"
    if at is sre.AT_END_STRING:
        return lambda text, place: place == len(text)
    if at is sre.AT_END:
        if lines:
            return lambda text, place: place == len(text) or text[place] == "\n"
        return lambda text, place: place == len(text) or (place == len(text) - 1 and text[place] == "\n")
    return boundary if at is sre.AT_BOUNDARY else lambda text, place: not boundary(text, place)
