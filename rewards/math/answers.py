"""The readings of one answer: as mathematics, as words, as a choice, as a time of day."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from agentloop.expressions.read import parse
from agentloop.expressions.tokens import plain
from agentloop.expressions.tree import MAX_LENGTH, Node, Unreadable, number
from agentloop.expressions.words import NUMBER_WORDS, PARTS, SCALES, TENS, UNITS

_CHOICE = re.compile(r"\(?([A-J])\)?(?:[.):](?:\s.*)?|)", re.DOTALL)
_OTHER_CHOICE = re.compile(r"(?:\b(?:or|and|not)\b|(?<![A-Za-z])\(?[A-J][.)](?:\s|$))")
_TIME = re.compile(r"([0-9]{1,2})(?:\s*:\s*([0-9]{2})(?:\s*:\s*([0-9]{2}))?)?\s*(a\.?m\.?|p\.?m\.?)?", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm|normal|tt|sf)?|math(?:rm|bf)|mbox|operatorname|boxed)\s*\{([^{}]*)\}")
_DECIMAL_COMMA = re.compile(r"[-+−$€£\s]*[0-9]+,[0-9]+(?:\s|[^0-9,]|$)")
_THOUSANDS = re.compile(r"[-+−$€£\s]*[1-9][0-9]{0,2},[0-9]{3}(?![0-9])")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{1,2}/[0-9]{1,2}/[0-9]{4}|[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{4}")
_DOLLARS = re.compile(r"\$\$?([^$]+)\$\$?")
_WRITTEN = re.compile(r"\\[A-Za-z]+|[A-Za-z]+|[0-9.]+|\S")
_OPTION = re.compile(r"(?:the\s+)?(?:option|choice)\s*:?\s*(?=\(?[A-J]\)?(?![A-Za-z]))", re.IGNORECASE)
_ORDINAL = re.compile(r"([0-9]+)\s*\^?\s*\{?\s*(?:st|nd|rd|th)\s*\}?", re.IGNORECASE)
_PART = re.compile(r"([0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)\s*([A-Za-z]+)\b\.?")
_PARTS = re.compile(rf"(?:{_PART.pattern}(?:\s*,)?(?:\s*and\b)?\s*){{2,4}}")
_LOG = re.compile(r"\\log(?![A-Za-z]|\s*_)|(?<![A-Za-z\\])log(?![A-Za-z]|\s*_)\s*(?=[0-9({a-z])")
_CHOOSE = re.compile(r"C_([0-9]{1,4}|[a-z])")
_DAY = re.compile(r"(?:the\s+)?([0-9]{1,2})(?:st|nd|rd|th)?\s+(?:of\s+)?([A-Za-z]+)\.?(?:,?\s+([0-9]{4}))?", re.IGNORECASE)
_MONTH_FIRST = re.compile(r"([A-Za-z]+)\.?\s+(?:the\s+)?([0-9]{1,2})(?:st|nd|rd|th)?(?:,?\s+([0-9]{4}))?", re.IGNORECASE)
_ROMAN = re.compile(r"X{0,3}(?:IX|IV|V?I{0,3})")
_LABEL = re.compile(r"[A-Za-z]{4,}(?: [A-Za-z]+)* [0-9]{1,3}")  # Team 1
_MONTHS = re.findall(r"\w+", "january february march april may june july august september october november december")
_PYTHON = re.compile(
    r"(?:(?:sympy|sp)\.)?(?:Immutable|Mutable)?(?:Dense)?(?:Matrix|FiniteSet)\((.*)\)|(?:np\.|numpy\.)?array\((.*)\)"
)
_SPACED = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:\s+-?[0-9]+(?:\.[0-9]+)?)+")
_QUAD = re.compile(r"\\q?quad\b")
_OUTWARD = re.compile(r"([\[\]])([^\[\]()]*[,;][^\[\]()]*)([\[\]])")
_PREFIX = re.compile(r"(?:the\s+)?(?:final\s+)?(?:answer|result|solution)\s*(?:is|:|=)\s*:?", re.IGNORECASE)

_PHRASES = {
    **dict.fromkeys(("all real number", "all real", "real number", "all of r"), Node("space", (), "R")),
    **dict.fromkeys(
        ("no solution", "no real solution", "no root", "no real root", "empty set", "none", "there are no solution"),
        Node("set"),
    ),
}
_SYNONYMS = dict.fromkeys(("dne", "doesn't exist", "it does not exist", "limit does not exist"), "does not exist")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer in all its readings."""

    trees: tuple[Node, ...]
    """Several where a comma may be a separator, the thousands' or the decimals'."""
    words: str
    """In lower case, without punctuation and articles; empty if there are no words in it."""
    choice: str = ""
    """`A` to `J`, if it begins as a choice."""
    choices: frozenset[str] = frozenset()
    """The letters of several choices and nothing else (`A, C`, `AC`)."""
    lone: bool = False
    """It is that letter and nothing else."""
    time: tuple[int, int, int, bool] | None = None
    """Hour (of 24), minute, second, and whether am or pm was said."""

    @property
    def readable(self) -> bool:
        return bool(self.trees or self.words or self.time or self.choice)


def read_answer(text: str) -> Answer:
    """Every reading of `text`. Never raises for what is in it."""
    if len(text) > MAX_LENGTH * 2:
        return Answer((), "")
    text = plain(text).strip()
    if (dollars := _DOLLARS.fullmatch(text)) is not None:
        text = dollars[1].strip()
    if text.startswith("**") and text.endswith("**") and len(text) > 4:  # Markdown
        text = text[2:-2].strip()
    text = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
    bare = _OPTION.sub("", _unwrapped(text), count=1)
    if ordinal := _ORDINAL.fullmatch(bare):
        text = bare = ordinal[1]
    if all("=" in part for part in _QUAD.split(text)):  # x = 1 \\quad x = 2
        text = _QUAD.sub(" , ", text)
    if _DATE.fullmatch(bare) or (len(bare) > 1 and _ROMAN.fullmatch(bare)):
        return Answer((), bare)
    if day := _day(bare):
        return Answer((), day)
    trees: list[Node] = []
    for grouping in _groupings(bare):
        try:
            tree = parse(text, grouping)
        except Unreadable:
            continue
        if tree not in trees:
            trees.append(tree)
    if not trees:
        for mended in _mended(text, bare):
            with contextlib.suppress(Unreadable):
                trees.append(parse(mended))
                break
    if (counted := _counted(bare.casefold())) is not None:
        trees = [number(counted)]
    elif bare.casefold().removeprefix("the ").rstrip("s") in _PHRASES:
        trees = [_PHRASES[bare.casefold().removeprefix("the ").rstrip("s")]]
    if trees and (ten := _LOG.sub(r"\\lg ", text)) != text:  # the common logarithm, or the natural one
        with contextlib.suppress(Unreadable):
            trees.append(parse(ten))
    trees += [tree for tree in (_total(bare), *map(_chosen, trees)) if tree is not None]
    choice = _CHOICE.fullmatch(bare)
    rest = bare[choice.end(1) :] if choice else ""
    chosen = choice[1] if choice and not _OTHER_CHOICE.search(rest) else ""
    words = _words(bare, bool(trees))
    return Answer(
        tuple(trees),
        _SYNONYMS.get(words, words),
        choice=chosen,
        lone=bool(chosen) and not rest.strip(".) "),
        choices=_choices(bare),
        time=_time(bare),
    )


def _day(bare: str) -> str:
    """`May 5`, `5 May 2024`, `July 4th` in one spelling; empty for anything else."""
    if found := _DAY.fullmatch(bare):
        day, month, year = found.groups()
    elif found := _MONTH_FIRST.fullmatch(bare):
        month, day, year = found.groups()
    else:
        return ""
    named = [name for name in _MONTHS if name == month.casefold() or name[:3] == month.casefold()]
    return f"{named[0]} {int(day)} {year or ''}".strip() if named and 1 <= int(day) <= 31 else ""


def _total(bare: str) -> Node | None:
    """`1 m 50 cm`, `2 hours and 30 minutes`, as one quantity in the smallest of the units."""
    if not _PARTS.fullmatch(bare):
        return None
    parts = [(Fraction(part[1].replace(",", "")), UNITS.get(part[2].casefold())) for part in _PART.finditer(bare)]
    sizes = [Fraction(unit[1]) for _, unit in parts if unit is not None]
    if len(sizes) != len(parts) or len({unit[0] for _, unit in parts if unit is not None}) != 1:
        return None
    if any(count * small >= large for (count, _), small, large in zip(parts[1:], sizes[1:], sizes, strict=False)):
        return None
    total = sum((count * size for (count, _), size in zip(parts, sizes, strict=True)), Fraction(0)) / sizes[-1]
    last = parts[-1][1]
    return Node("unit", (number(total),), last[2].casefold()) if last is not None else None


def _chosen(node: Node) -> Node | None:
    """`C_n^2`, `C_{10}^3` as numbers of choices; `None` where nothing is written so."""
    if node.op == "pow" and node.args[0].op == "sym" and (written := _CHOOSE.fullmatch(node.args[0].text)):
        above, below = written[1], node.args[1]
        if not above.isdigit() or (below.op == "num" and below.value is not None and 0 <= below.value <= int(above)):
            return Node("call", (number(int(above)) if above.isdigit() else Node("sym", (), above), below), "binomial")
        return None
    found = [_chosen(arg) for arg in node.args]
    if all(arg is None for arg in found):
        return None
    args = tuple(new or old for new, old in zip(found, node.args, strict=True))
    return Node(node.op, args, node.text, node.value)


def _mended(text: str, bare: str) -> Iterator[str]:
    """What `text`, which cannot be read, may have been meant to be."""
    yield bare  # \\text{A, B}
    if wrapped := _PYTHON.fullmatch(bare):
        yield wrapped[1] or wrapped[2]
    if _SPACED.fullmatch(bare):  # 1 2 3
        yield ", ".join(bare.split())
    if _OUTWARD.search(text):  # ]1, 2[
        yield _OUTWARD.sub(lambda m: ("(" if m[1] == "]" else "[") + m[2] + (")" if m[3] == "[" else "]"), text)
    if (closed := _closed(text)) != text:
        yield closed


def _closed(text: str) -> str:
    """With the braces and brackets that were left open at the end, and without those at an end that nothing opened."""
    open_, left = [], []
    escaped = False
    for at, char in enumerate(text):
        if char in "({":
            open_.append((at, char))
        elif char in ")}" and not (escaped and char == "}"):
            if open_ and "({".index(open_[-1][1]) == ")}".index(char):
                open_.pop()
            else:
                left.append(at)
        escaped = char == "\\" and not escaped
    if len(open_) + len(left) > 3:
        return text
    if [at for at, _ in open_] == [0] and text[0] == "(" and not left:
        return text[1:]
    if left:
        return text[: left[0]] if not open_ and not text[left[0] :].strip("}) .") else text
    text = text.removesuffix("\\right").rstrip()
    return text + "".join({"(": ")", "{": "}"}[char] for _, char in reversed(open_))


def _counted(words: str) -> Fraction | None:
    """`seven`, `half`, `one half`, `three-quarters`."""
    if words in ("half", "a half"):
        return Fraction(1, 2)
    if words in NUMBER_WORDS:
        return Fraction(NUMBER_WORDS[words])
    if (whole := _whole_number(words)) is not None:
        return Fraction(whole)
    above, _, below = words.replace("-", " ").partition(" ")
    size = PARTS.get(below) or PARTS.get(below.removesuffix("s"))
    return Fraction(NUMBER_WORDS[above], size) if size and NUMBER_WORDS.get(above) else None


def _whole_number(words: str) -> int | None:
    """`twenty-one`, `one hundred and five`, `two thousand`."""
    total = group = 0
    last = "start"
    for word in re.split(r"[\s-]+", words):
        if (word == "and" and last == "scale") or (word == "a" and last == "start"):
            continue
        if word in TENS and last in ("start", "scale"):
            group, last = group + TENS[word], "tens"
        elif word in NUMBER_WORDS and (last in ("start", "scale") or (last == "tens" and 0 < NUMBER_WORDS[word] < 10)):
            group, last = group + NUMBER_WORDS[word], "ones"
        elif word == "hundred" and 0 < (group or 1) < 100:
            group, last = (group or 1) * 100, "scale"
        elif word in ("thousand", "million") and (total == 0 or word == "thousand"):
            total, group, last = total + (group or 1) * SCALES[word], 0, "scale"
        else:
            return None
    return total + group if last != "start" else None


def _groupings(bare: str) -> list[str]:
    if not re.search(r"[0-9],[0-9]", bare):
        return ["all"]
    found = ["all", "sure"]
    if bare.count(",") == 1 and _DECIMAL_COMMA.match(bare) and not _THOUSANDS.match(bare):
        found.append("comma")
    return found


def _unwrapped(text: str) -> str:
    """Without `$`, styles and white space around."""
    for _ in range(4):
        shorter = _WRAPPED.sub(lambda m: " " + m[1] + " ", text)
        if shorter == text:
            break
        text = shorter
    text = re.sub(r"\\[,;:! ]|~|\$(?![0-9])", " ", text)
    text = " ".join(text.split()).strip(' ."*')
    return text.strip(" .\"'*") if text[:1] == "'" else text  # `x'` keeps its prime


def _words(bare: str, mathematics: bool) -> str:
    """The text as words, if it is such: without a digit or sign, or no mathematics and with a word in it."""
    letters = re.sub(r"[^\w\s'-]", " ", bare.replace("\\", " ").replace(", and ", ", "))
    words = [word.strip("'-_") for word in letters.casefold().split()]
    kept = [word for word in words if word and word not in ("the", "a", "an")] or [word for word in words if word]
    if not kept or not any(len(word) > 1 and word.isalpha() for word in kept):
        return bare if len(bare) == 1 and bare.isalpha() else ""
    if mathematics and re.search(r"[^A-Za-z\s.,'-]", bare):
        return " ".join(kept) if _LABEL.fullmatch(bare) else ""
    if not mathematics and re.search(r"[\\^_{}=+*/<>|]", bare):
        return " ".join(_WRITTEN.findall(bare))  # unknown LaTeX is compared as it is written
    if re.search(r"\w\s*[,;&]\s*\w", bare):  # a list of words
        items = [_words(item, mathematics) for item in re.split(r"[,;&]|\band\b", bare)]
        return " and ".join(item for item in items if item) if all(item.count(" ") <= 3 for item in items) else " ".join(kept)
    return " ".join(kept)


def _choices(bare: str) -> frozenset[str]:
    letters = re.sub(r"\b(?:and|&)\b|[\s,;&().]", "", bare)
    if 2 <= len(letters) <= 10 and all(letter in "ABCDEFGHIJ" for letter in letters) and len(set(letters)) == len(letters):
        return frozenset(letters)
    return frozenset()


def _time(bare: str) -> tuple[int, int, int, bool] | None:
    match = _TIME.fullmatch(bare.strip())
    if match is None or (match[2] is None and match[4] is None):
        return None
    hour, minute, second = int(match[1]), int(match[2] or 0), int(match[3] or 0)
    half = (match[4] or "").casefold()[:1]
    if hour > 23 or minute > 59 or second > 59 or (half and not 1 <= hour <= 12):
        return None
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    return hour, minute, second, bool(half)
