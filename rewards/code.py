"""Reward for code: the candidate's program or function against tests, in a sandbox.

Who writes the code is trained to please the grader, so the grader is built on what the candidate cannot have:

- **What is expected never leaves this process.** The sandbox gets the candidate's source and the input of one test. There is
  nothing to peek at, to patch or to search for, in frames, in memory, in files, arguments or environment.
- **The verdict is given here**, on plain JSON types that were parsed here: no `__eq__`, `__hash__` or subclass of the
  candidate's ever runs.
- **A result is one frame with a nonce of that run** on standard output (see `agentloop.rewards.code_driver`). No frame, a
  second one, anything after it, a truncated output, a status other than ok: the test failed. So neither `exit(0)` nor a test
  that was never run passes. Standard output and not a file that is fetched afterwards: a pipe only grows, so a frame that was
  written twice is seen, and a file can be replaced without a trace. Candidates can find the nonce, which is in their process;
  all they can do with it is to claim a value, which `return` lets them do anyway, and that value has to be the expected one.
- **Each test is a run of its own**, in a place that is gone afterwards, with the input of that test alone.
- **Failures of the machinery raise** (`SandboxError`); they are never a 0.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from agentloop.config import Strict, validate
from agentloop.errors import ConfigError
from agentloop.rewards.answer import cut_off, submitted
from agentloop.rewards.code_tests import CodeTest, read_tests, same_output, same_value
from agentloop.rewards.spec import plain
from agentloop.sandboxes import Limits, Result, Sandbox, SandboxError, Status, load_sandbox
from agentloop.trajectory import Reward, Sample, Trajectory

_FENCE = re.compile(r"^[ ]{0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_FRAME = re.compile(r" ([a-z_]+) ([^\n]*)\n")
_FAILED = ("raised", "exited", "threads", "not_plain", "too_long", "missing")
"""Kinds of frame that say what went wrong."""


class CodeSettings(Strict):
    """Settings of `CodeReward`."""

    score: Literal["all", "fraction"] = "all"
    """`all`: 1 if every test passes, else 0. `fraction`: the part of the tests that pass; it pays for special cases, and a
    model finds those first."""
    timeout_s: float = Field(6.0, gt=0)
    """Of one test, wall clock in the sandbox, waiting for a place not included."""
    total_timeout_s: float = Field(60.0, gt=0)
    """Of all tests together, the sum of their own times; tests that are left then fail."""
    memory_mb: int = Field(512, ge=16)
    processes: int = Field(16, ge=1)
    """Processes and threads of one test."""
    output_bytes: int = Field(64 * 1024, ge=1024)
    """Of what a test may write or return; twice the longest expected output if that is more."""
    parallel: int = Field(4, ge=1)
    """Tests of one candidate that run at the same time."""
    stdout: Literal["tokens", "exact"] = "tokens"
    """How a program's output is compared, see `same_output`."""
    stdout_tolerance: float = Field(0.0, ge=0)
    """For decimal fractions in a program's output, with `tokens`."""
    float_tolerance: float = Field(1e-9, ge=0)
    """For floats in a function's value where a float is expected, see `same_value`."""
    exact_types: bool = False
    """A function's `2.0` is not the 2 that is expected."""
    languages: tuple[str, ...] = ("python", "py", "python3", "")
    """Fenced blocks that count as code; the empty name is a fence without one."""
    submit_tool: str = "submit"
    """The tool whose last successful call holds the answer, if it was called."""
    preamble: str = ""
    """Python that runs before the candidate's code, in its names (`from typing import *`)."""
    max_code_chars: int = Field(100_000, ge=1)


class CodeReward:
    """Value 1 if the code in the last turn (or in a `submit` call) passes the row's tests, see `read_tests`.

    A trajectory that was cut off has no answer (`truncated`) unless it submitted one. Components `passed` (the fraction) and
    `all_passed`; info `verdict` (`passed`, `no_code`, `wrong_answer`, `timeout`, …) and `detail` of the first test that
    failed. With `score: all` nothing runs after the first failure.
    """

    def __init__(self, *, sandbox: str | Mapping[str, Any] | Sandbox = "process", **settings: Any) -> None:
        """`sandbox` is a kind, a mapping with `kind` and its settings, or a sandbox that is shared; `settings` are those of
        `CodeSettings`. Raises `ConfigError`."""
        self.settings = validate(CodeSettings, plain(settings), "reward code")
        self._own = not isinstance(sandbox, Sandbox)
        self.sandbox = sandbox if isinstance(sandbox, Sandbox) else load_sandbox(plain(sandbox), where="reward code: sandbox")
        if "python" not in self.sandbox.languages:
            raise ConfigError(f"reward code: sandbox '{self.sandbox.kind}' does not run python")

    async def __call__(self, trajectory: Trajectory, sample: Sample, text: str) -> Reward:
        """Raises `ValueError` for a row without usable tests, `SandboxError` if the sandbox failed."""
        tests = read_tests(sample.ground_truth)
        source, problem = self._source(trajectory, text)
        if source is None:
            return self._reward([], len(tests), problem, "")
        outcomes: list[_Outcome] = []
        spent = 0.0
        limits = self._limits(tests)
        while len(outcomes) < len(tests):
            left = self.settings.total_timeout_s - spent
            if left <= 0:
                outcomes.append(_Outcome("total_timeout", f"all tests took longer than {self.settings.total_timeout_s:g} s"))
                break
            batch = tests[len(outcomes) : len(outcomes) + self.settings.parallel]
            done = await self._batch(source, batch, limits, min(left, limits.timeout_s))
            outcomes += [outcome for outcome, _ in done]
            spent += sum(seconds for _, seconds in done)
            if self.settings.score == "all" and not all(outcome.passed for outcome, _ in done):
                break
        failed = next(((place, outcome) for place, outcome in enumerate(outcomes) if not outcome.passed), None)
        verdict = "passed" if failed is None else failed[1].verdict
        return self._reward(outcomes, len(tests), verdict, "" if failed is None else f"test {failed[0]}: {failed[1].detail}")

    async def close(self) -> None:
        """Close the sandbox, unless it was handed over."""
        if self._own:
            await self.sandbox.close()

    def _source(self, trajectory: Trajectory, text: str) -> tuple[str | None, str]:
        answer = submitted(trajectory, self.settings.submit_tool)
        if answer is None and cut_off(trajectory):
            return None, "truncated"
        source = last_block(text if answer is None else answer, self.settings.languages)
        if source is None and answer is not None and not _FENCE.search(answer):
            source = answer
        if source is None or not source.strip():
            return None, "no_code"
        if len(source) > self.settings.max_code_chars:
            return None, "too_long"
        return source, ""

    def _limits(self, tests: list[CodeTest]) -> Limits:
        longest = max(len(json.dumps(test.expected)) for test in tests)
        return Limits(
            timeout_s=min(self.settings.timeout_s, self.settings.total_timeout_s),
            memory_mb=self.settings.memory_mb,
            processes=self.settings.processes,
            output_bytes=max(self.settings.output_bytes, 2 * longest + 1024),
        )

    async def _batch(self, source: str, tests: list[CodeTest], limits: Limits, timeout: float) -> list[tuple[_Outcome, float]]:
        """All of `tests` at the same time. If the sandbox fails for one, the others are ended."""
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run(source, test, limits, timeout)) for test in tests]
        except* SandboxError as failed:
            failure = failed.exceptions[0]
        if failure is not None:
            raise failure
        return [task.result() for task in tasks]

    async def _run(self, source: str, test: CodeTest, limits: Limits, timeout: float) -> tuple[_Outcome, float]:
        """How one test ended, and the seconds that it ran."""
        nonce = f"result-{secrets.token_hex(16)}"
        task: dict[str, Any] = {"nonce": nonce, "source": source, "limit": limits.output_bytes - 256}
        task |= {"fn": test.fn, "args": test.args, "kwargs": test.kwargs, "preamble": self.settings.preamble}
        code = f"{_driver()}\n_grade({json.dumps(task)!r})\n"
        result = await self.sandbox.run(code, stdin=test.stdin, timeout=timeout, limits=limits)
        if result.status is Status.INFRA:
            raise SandboxError(f"reward code: the sandbox failed: {result.error or 'no reason given'}")
        return self._outcome(result, test, nonce), result.run_s

    def _outcome(self, result: Result, test: CodeTest, nonce: str) -> _Outcome:
        if result.status is not Status.OK:
            return _Outcome(str(result.status), result.error or _tail(result.stderr))
        if result.stdout_cut:
            return _Outcome("output_limit", "its output was cut")
        printed, found, rest = result.stdout.partition(f"\n{nonce}")
        if not found:
            return _Outcome("no_result", "it ended without a result")
        frame = _FRAME.fullmatch(rest)
        if frame is None or nonce in printed or nonce in rest:
            return _Outcome("tampered", "something else than one result was written")
        if frame[1] in _FAILED:
            return _Outcome(frame[1], frame[2][:300])
        if frame[1] != ("end" if test.fn is None else "value"):
            return _Outcome("tampered", "a result of another kind was written")
        settings = self.settings
        if test.fn is None:
            same = same_output(printed, test.expected, compare=settings.stdout, tolerance=settings.stdout_tolerance)
            return _Outcome("passed" if same else "wrong_answer", printed[:300], passed=same)
        try:
            value = json.loads(frame[2])
        except (ValueError, RecursionError) as error:
            return _Outcome("unreadable", str(error)[:300])
        same = same_value(value, test.expected, tolerance=settings.float_tolerance, exact_types=settings.exact_types)
        return _Outcome("passed" if same else "wrong_answer", frame[2][:300], passed=same)

    def _reward(self, outcomes: list[_Outcome], tests: int, verdict: str, detail: str) -> Reward:
        passed = sum(outcome.passed for outcome in outcomes)
        every = float(passed == tests)
        value = every if self.settings.score == "all" else passed / tests
        return Reward(value, {"passed": passed / tests, "all_passed": every}, {"verdict": verdict, "detail": detail})


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of one test."""

    verdict: str
    detail: str
    passed: bool = False
    """Set by the comparison alone; `verdict` is for people and may come from the candidate."""


def last_block(text: str, languages: tuple[str, ...]) -> str | None:
    """What stands in the last fenced block of one of `languages`; `None` if there is none, or if the last is never closed.

    Fences as in CommonMark: three or more backticks or tildes, closed by at least as many of the same alone on a line.
    """
    found: str | None = None
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1][0] == opening[1][0] and len(fence[1]) >= len(opening[1]) and not fence[2]:
            if opening[2].lower() in languages:
                found = text[opening.end() + 1 : fence.start()]
            opening = None
    return None if opening is not None and opening[2].lower() in languages else found


@functools.cache
def _driver() -> str:
    return Path(__file__).with_name("code_driver.py").read_text(encoding="utf-8")


def _tail(text: str) -> str:
    return text.strip()[-300:]
