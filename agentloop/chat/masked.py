"""Following the text of messages through a Jinja template.

To know which characters of a rendered conversation came out of its messages, every character of a message is replaced by a
private one (planes 15 and 16 of Unicode) before the template sees it, and put back afterwards. What is private in the render
came from a message; what is not, the template wrote. So that a template which looks at what it is given (`'</think>' in
content`, `content|trim`, `content.split(…)`) does the same as ever, the text is a `Masked`: a `str` of private characters
whose searching, comparing and splitting works on the plain text behind it.

An operation that is not followed here (`title`, `%`) works on the private characters: the result is harmless, and
`agentloop.chat.template` sees that it differs from the plain render.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, TypeVar

from agentloop.errors import ConfigError

T = TypeVar("T")

_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class Mask:
    """A one-to-one replacement of the characters of some texts by private ones."""

    def __init__(self, texts: Iterable[str], *, avoid: str = "", keep: str = "") -> None:
        """`avoid`: text whose private characters must stay what they are. `keep`: characters that are not replaced."""
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        taken = alphabet.union(avoid)
        self._free = (chr(code) for block in _PRIVATE for code in block if chr(code) not in taken)
        self._there: dict[int, str] = {ord(char): char for char in keep}
        self._back: dict[int, str] = {}
        for char in sorted(alphabet):
            self._private(char)

    def _private(self, char: str) -> str:
        """The character that stands for `char`, given out on first use."""
        if ord(char) not in self._there:
            private = next(self._free, "")
            if not private:
                raise ConfigError("the messages have more than 100,000 different characters")
            self._there[ord(char)] = private
            self._back[ord(private)] = char
        return self._there[ord(char)]

    def mask(self, text: str) -> Masked:
        return Masked(text.translate(self._there), text, self)

    def recase(self, text: Masked, change: Callable[[str], str]) -> str | None:
        """`text` in another case, or `None` where that is more than a change of single characters."""
        parts = [(change(char), self.is_masked(shown)) for char, shown in zip(text.plain, str.__str__(text), strict=True)]
        changed = "".join(part for part, _ in parts)
        if changed != change(text.plain):
            return None
        shown = "".join("".join(map(self._private, part)) if masked else part for part, masked in parts)
        return Masked(shown, changed, self)

    def escaped(self, char: str, shown: str, quote: str) -> str:
        """`char`, which stands as `shown`, as `repr` writes it between `quote`s."""
        text = {"'": "'", '"': '"', quote: f"\\{quote}"}.get(char) or repr(char)[1:-1]
        return shown if text == char else "".join(map(self._private, text))

    def unmask(self, text: str) -> str:
        return str.translate(text, self._back)

    def is_masked(self, char: str) -> bool:
        return ord(char) in self._back

    def mask_all(self, value: T) -> T:
        """`value` with every string in it masked, keys of mappings included."""
        if isinstance(value, str):
            return self.mask(value)  # type: ignore[return-value]
        if isinstance(value, Mapping):
            return {self.mask_all(key): self.mask_all(item) for key, item in value.items()}  # type: ignore[return-value]
        if isinstance(value, (list, tuple)):
            return [self.mask_all(item) for item in value]  # type: ignore[return-value]
        return value


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON-like value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def plain(value: Any) -> Any:
    """The text behind a `Masked`; anything else as it is."""
    if isinstance(value, Masked):
        return value.plain
    return tuple(plain(item) for item in value) if isinstance(value, tuple) else value


def join(parts: Iterable[Any], separator: str = "") -> str:
    """`separator.join(parts)` that stays `Masked` if any part is."""
    items = [part if isinstance(part, str) else str(part) for part in parts]
    shown = str.join(separator, items)
    for item in (separator, *items):
        if isinstance(item, Masked):
            return Masked(shown, str.join(plain(separator), [plain(part) for part in items]), item.mask)
    return shown


class Masked(str):
    """A string of private characters, of the same length as the plain text that it stands for."""

    __slots__ = ("mask", "plain")
    plain: str
    mask: Mask

    def __new__(cls, shown: str, text: str, mask: Mask) -> Masked:
        self = super().__new__(cls, shown)
        self.plain = text
        self.mask = mask
        return self

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        """As Python writes the plain text: a template that prints a mapping as it is writes its strings so."""
        quote = repr(self.plain)[0]
        pairs = zip(self.plain, str.__str__(self), strict=True)
        return quote + "".join(self.mask.escaped(char, shown, quote) for char, shown in pairs) + quote

    def _cut(self, start: int, stop: int) -> Masked:
        return Masked(str.__getitem__(self, slice(start, stop)), self.plain[start:stop], self.mask)

    # -- comparing and searching: on the plain text -------------------------------------------------------------------

    def __hash__(self) -> int:
        return hash(self.plain)

    def __eq__(self, other: object) -> bool:
        return bool(self.plain == plain(other))

    def __ne__(self, other: object) -> bool:
        return bool(self.plain != plain(other))

    def __lt__(self, other: str) -> bool:
        return bool(self.plain < plain(other))

    def __le__(self, other: str) -> bool:
        return bool(self.plain <= plain(other))

    def __gt__(self, other: str) -> bool:
        return bool(self.plain > plain(other))

    def __ge__(self, other: str) -> bool:
        return bool(self.plain >= plain(other))

    def __contains__(self, part: object) -> bool:
        return plain(part) in self.plain

    def startswith(self, prefix: str | tuple[str, ...], *span: Any) -> bool:
        return self.plain.startswith(plain(prefix), *span)

    def endswith(self, suffix: str | tuple[str, ...], *span: Any) -> bool:
        return self.plain.endswith(plain(suffix), *span)

    def find(self, part: str, *span: Any) -> int:
        return self.plain.find(plain(part), *span)

    def rfind(self, part: str, *span: Any) -> int:
        return self.plain.rfind(plain(part), *span)

    def index(self, part: str, *span: Any) -> int:
        return self.plain.index(plain(part), *span)

    def rindex(self, part: str, *span: Any) -> int:
        return self.plain.rindex(plain(part), *span)

    def count(self, part: str, *span: Any) -> int:
        return self.plain.count(plain(part), *span)

    def isspace(self) -> bool:
        return self.plain.isspace()

    def isdigit(self) -> bool:
        return self.plain.isdigit()

    def isalpha(self) -> bool:
        return self.plain.isalpha()

    def isalnum(self) -> bool:
        return self.plain.isalnum()

    # -- cutting and joining: on both ---------------------------------------------------------------------------------

    def __getitem__(self, key: SupportsIndex | slice) -> Masked:
        return Masked(str.__getitem__(self, key), self.plain[key], self.mask)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: str) -> Masked:
        return Masked(str.__add__(self, other), self.plain + plain(other), self.mask)

    def __radd__(self, other: str) -> Masked:
        return Masked(str.__add__(other, self), plain(other) + self.plain, self.mask)

    def __mul__(self, times: SupportsIndex) -> Masked:
        return Masked(str.__mul__(self, times), self.plain * times, self.mask)

    __rmul__ = __mul__

    def lstrip(self, chars: str | None = None) -> Masked:
        return self._cut(len(self) - len(self.plain.lstrip(plain(chars))), len(self))

    def rstrip(self, chars: str | None = None) -> Masked:
        return self._cut(0, len(self.plain.rstrip(plain(chars))))

    def strip(self, chars: str | None = None) -> Masked:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> Masked:
        return self._cut(len(prefix), len(self)) if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Masked:
        return self._cut(0, len(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def _parts(self, parts: Sequence[str]) -> list[str]:
        """The `Masked` at the place of each of `parts`, which are cut from the plain text in order."""
        found: list[str] = []
        at = 0
        for part in parts:
            start = self.plain.index(part, at)
            at = start + len(part)
            found.append(self._cut(start, at))
        return found

    def _split(self, parts: Sequence[str], separator: str | None) -> list[str]:
        if separator is None:
            return self._parts(parts)
        found: list[str] = []
        at = 0
        for part in parts:
            found.append(self._cut(at, at + len(part)))
            at += len(part) + len(separator)
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._split(self.plain.split(plain(sep), maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._split(self.plain.rsplit(plain(sep), maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        found: list[str] = []
        at = 0
        for line, whole in zip(self.plain.splitlines(), self.plain.splitlines(keepends=True), strict=True):
            found.append(self._cut(at, at + len(whole if keepends else line)))
            at += len(whole)
        return found

    def _around(self, at: int, sep: str) -> tuple[str, str, str]:
        end = at + len(sep)
        return self._cut(0, at), self._cut(at, end), self._cut(end, len(self))

    def partition(self, sep: str) -> tuple[str, str, str]:
        at = self.find(sep)
        return (self, "", "") if at < 0 else self._around(at, sep)

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        at = self.rfind(sep)
        return ("", "", self) if at < 0 else self._around(at, sep)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return str.replace(self, old, new, count)
        return join(self.split(old, count), new)

    def join(self, parts: Iterable[str], /) -> str:
        return join(parts, self)

    def upper(self) -> str:
        changed = self.mask.recase(self, str.upper)
        return str.upper(self) if changed is None else changed

    def lower(self) -> str:
        changed = self.mask.recase(self, str.lower)
        return str.lower(self) if changed is None else changed
