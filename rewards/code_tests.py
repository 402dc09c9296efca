"""Tests of a code task: how a dataset row writes them, and when a result is the expected one."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_DECIMAL = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?")


@dataclass(frozen=True, slots=True)
class CodeTest:
    """One test: of a function (`fn` is its name) or of a program (`fn` is `None`)."""

    expected: Any
    """Of a function the value, plain JSON types; of a program its standard output. Never leaves this process."""
    fn: str | None = None
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    stdin: str = ""


def read_tests(ground_truth: Any) -> list[CodeTest]:
    """The tests of a row, from a mapping or its JSON text.

    - `{"fn": "add", "tests": [{"args": [1, 2], "kwargs": {}, "expected": 3}]}`; a test may name an `fn` of its own.
    - `{"tests": [{"stdin": "1 2\\n", "stdout": "3\\n"}]}`.
    - `{"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}`, and without `fn_name` standard input and output: the shape of
      APPS, TACO and verl's `prime_code`. Inputs of a function that are text are LiveCodeBench's: an argument a line, as JSON.

    Raises `ValueError` if there is no test in it, or one without an expectation: nothing could be right then.
    """
    truth = _load(ground_truth, "the ground truth") if isinstance(ground_truth, str | bytes) else _plain(ground_truth)
    if not isinstance(truth, Mapping):
        raise ValueError(f"the ground truth is a {type(truth).__name__}, expected a mapping with 'tests'")
    if "inputs" in truth:
        tests = _columns(truth)
    else:
        listed = truth.get("tests")
        if not isinstance(listed, list):
            raise ValueError("the ground truth has neither 'tests' nor 'inputs' and 'outputs'")
        tests = [_one(item, truth.get("fn") or truth.get("fn_name"), place) for place, item in enumerate(listed)]
    if not tests:
        raise ValueError("the ground truth has no tests, so nothing could be right")
    return tests


def _one(item: Any, fn: str | None, place: int) -> CodeTest:
    if not isinstance(item, Mapping):
        raise ValueError(f"test {place} is a {type(item).__name__}, expected a mapping")
    if "stdout" in item:
        return CodeTest(expected=str(item["stdout"]), stdin=str(item.get("stdin", "")))
    fn = item.get("fn") or fn
    if "expected" not in item or not fn:
        raise ValueError(f"test {place} has neither 'stdout' nor 'fn' and 'expected'")
    known = ("fn", "args", "kwargs", "expected")
    for key in item:
        if key not in known and (meant := difflib.get_close_matches(str(key), known, n=1, cutoff=0.7)):
            raise ValueError(f"test {place} has a key '{key}'; did you mean '{meant[0]}'?")
    args, kwargs = item.get("args") or [], item.get("kwargs") or {}
    if not isinstance(args, list) or not isinstance(kwargs, Mapping):
        raise ValueError(f"test {place}: expected a list of 'args' and a mapping of 'kwargs'")
    return CodeTest(expected=item["expected"], fn=str(fn), args=args, kwargs=dict(kwargs))


def _columns(truth: Mapping[str, Any]) -> list[CodeTest]:
    inputs, outputs, fn = truth["inputs"], truth.get("outputs"), truth.get("fn_name") or truth.get("fn")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("the ground truth's 'inputs' and 'outputs' are not two lists of one length")
    tests = []
    for place, (given, expected) in enumerate(zip(inputs, outputs, strict=True)):
        if not fn:
            tests.append(CodeTest(expected=_lines(expected), stdin=_lines(given)))
            continue
        if isinstance(given, str):
            given = [_load(line, f"input {place}") for line in given.split("\n") if line.strip()]
            expected = _load(expected, f"output {place}") if isinstance(expected, str) else expected
        if not isinstance(given, list):
            raise ValueError(f"input {place} is a {type(given).__name__}, expected a list of arguments")
        tests.append(CodeTest(expected=expected, fn=str(fn), args=given))
    return tests


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _load(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error


def _plain(value: Any) -> Any:
    """As JSON would have it: a dataset hands over numpy arrays and tuples."""
    return json.loads(json.dumps(value, default=lambda item: item.tolist()))


def same_value(got: Any, expected: Any, *, tolerance: float, exact_types: bool) -> bool:
    """Whether two JSON values are the same. As deep as `expected`, so that no depth of `got` matters.

    - `True` is not 1, and `None` is nothing but `None`.
    - Where an integer is expected, an integer; a float only if it is that number to the last digit (`2.0` for 2). With
      `exact_types` never.
    - Where a float is expected, `|got - expected| <= tolerance * max(1, |expected|)`, an integer too unless `exact_types`.
      NaN is NaN, infinities have their sign.
    - Lists in order, mappings by key.
    """
    if isinstance(expected, bool) or expected is None or isinstance(expected, str):
        return type(got) is type(expected) and bool(got == expected)
    if isinstance(expected, int | float):
        if type(got) is not type(expected) and (exact_types or type(got) not in (int, float)):
            return False
        return _same_number(got, expected, tolerance)
    settings: dict[str, Any] = {"tolerance": tolerance, "exact_types": exact_types}
    if isinstance(expected, list):
        return (
            isinstance(got, list)
            and len(got) == len(expected)
            and all(same_value(a, b, **settings) for a, b in zip(got, expected, strict=True))
        )
    return (
        isinstance(got, dict)
        and got.keys() == expected.keys()
        and all(same_value(got[key], expected[key], **settings) for key in expected)
    )


def _same_number(got: int | float, expected: int | float, tolerance: float) -> bool:
    if isinstance(expected, int):
        return got == expected  # Python compares an integer and a float without rounding
    if math.isnan(expected):
        return isinstance(got, float) and math.isnan(got)
    if got == expected:
        return True
    try:
        return math.isfinite(expected) and abs(float(got) - expected) <= tolerance * max(1.0, abs(expected))
    except OverflowError:  # an integer beyond all floats
        return False


def same_output(got: str, expected: str, *, compare: Literal["tokens", "exact"], tolerance: float) -> bool:
    """Whether a program wrote what it should.

    `tokens`: the same tokens between white space; with a `tolerance` above 0 those that are expected to be decimal fractions
    (`0.5`, `1e-3`, never `2`) may differ as the values of `same_value` do. `exact`: the same characters, but for newlines at
    the end.
    """
    if compare == "exact":
        return got.replace("\r\n", "\n").rstrip("\n") == expected.replace("\r\n", "\n").rstrip("\n")
    ours, theirs = got.split(), expected.split()
    return len(ours) == len(theirs) and all(a == b or _close(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))


def _close(got: str, expected: str, tolerance: float) -> bool:
    if not tolerance or not (_DECIMAL.fullmatch(got) and _DECIMAL.fullmatch(expected)):
        return False
    return not expected.lstrip("+-").isdigit() and _same_number(float(got), float(expected), tolerance)
