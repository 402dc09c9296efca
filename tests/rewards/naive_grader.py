"""The grader that cheats are written for: the candidate, the tests and the verdict in one process. A script of its own.

It reads `{"source", "fn", "tests"}` from the file that is its argument, and passes what exits with 0 and does not report a
failure; that is how in-process graders and test runners are commonly read.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any


def check(actual: Any, expected: Any) -> bool:
    return bool(actual == expected)


def run_function(namespace: dict[str, Any], fn: str, tests: list[dict[str, Any]]) -> int:
    passed = 0
    for test in tests:
        expected = test["expected"]
        actual = namespace[fn](*test["args"])
        passed += check(actual, expected)
    return passed


def run_program(source: str, tests: list[dict[str, Any]]) -> int:
    passed = 0
    for test in tests:
        expected = test["stdout"]
        sys.stdin, printed = io.StringIO(test["stdin"]), io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "<candidate>", "exec"), {"__name__": "__main__"})
        passed += check(printed.getvalue().split(), expected.split())
    return passed


def main() -> int:
    with open(sys.argv[1]) as file:
        task = json.load(file)
    tests = task["tests"]
    if task["fn"]:
        namespace: dict[str, Any] = {"__name__": "candidate"}
        exec(compile(task["source"], "<candidate>", "exec"), namespace)
        passed = run_function(namespace, task["fn"], tests)
    else:
        passed = run_program(task["source"], tests)
    print(json.dumps({"passed": passed, "failed": len(tests) - passed}))
    return int(passed < len(tests))


if __name__ == "__main__":
    sys.exit(main())
