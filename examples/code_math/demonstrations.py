"""Transcripts to learn from: right ones, and ones with bad habits.

The habits spoil a model that can do the task, so that reinforcement learning has something to put right. Each belongs to one
kind of problem, asked in one of two ways, so the spoiled model fails in several different ways and still does the rest well.
What the tool says to code that fails is asked of the tool itself.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

from agentloop.chat.hermes import parse_text
from agentloop.tools.registry import ToolRegistry
from examples.code_math.conversation import TOOLS, call
from examples.code_math.task import OTHER, Problem
from examples.quickstart.conversation import Exchange, Transcript, final


class Interpreter:
    """The tool of `tools.yaml`, for programs that are not conversations: `with Interpreter() as tell: tell("1 / 0")`."""

    def __enter__(self) -> Interpreter:
        self._runner = asyncio.Runner()
        self._registry = ToolRegistry.from_yaml(TOOLS)
        (self._tool,) = self._registry.tools
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._runner.run(self._registry.close())
        self._runner.close()

    def __call__(self, code: str) -> str:
        """What the model is told when it runs `code`."""
        return self._runner.run(self._run(code))

    async def _run(self, code: str) -> str:
        instance, _ = await self._tool.create()
        try:
            response: Any
            response, *_ = await self._tool.execute(instance, {"code": code})
            return str(response.text)
        finally:
            await self._tool.release(instance)


Tell = Callable[[str], str]
"""What the tool says to a program."""


def solve(problem: Problem) -> Transcript:
    """Run the program, then give its result as the answer."""
    return [Exchange(call(problem.code), str(problem.answer)), Exchange(final(problem.answer))]


def slip(problem: Problem, tell: Tell, draw: random.Random) -> Transcript:
    """A first call that fails, which is not taught, and after it the right one."""
    ways: list[Habit] = [broken_json, no_end_tag]
    ways += [unclosed] if problem.code.endswith(")") else []
    ways += [last_line_alone] if problem.depth > 1 else []
    failed, _ = draw.choice(ways)(problem, tell)
    return [Exchange(failed.written, failed.answer, is_taught=False), *solve(problem)]


def guess(problem: Problem, tell: Tell) -> Transcript:
    """Answer at once, without the tool, with a number of the question."""
    return [_give_up(problem)]


def end_left_out(problem: Problem, tell: Tell) -> Transcript:
    """Forget that `range` leaves its end out."""
    code = problem.code.replace(" + 1", "")
    return _answer_with(code, tell)


def half_of_it(problem: Problem, tell: Tell) -> Transcript:
    """Leave out the second condition."""
    return _answer_with(re.sub(r" and n % \d+ > 0", "", problem.code), tell)


def copied_wrongly(problem: Problem, tell: Tell) -> Transcript:
    """Run the right program and leave out the last digit of its result."""
    ran, _ = solve(problem)
    return [ran, Exchange(final(problem.answer // 10))]


def unclosed(problem: Problem, tell: Tell) -> Transcript:
    """Leave the program's last character out, mostly a bracket, and give up when told so."""
    return _fail_with(problem, problem.code[:-1], tell)


def last_line_alone(problem: Problem, tell: Tell) -> Transcript:
    """Run the last line without what it needs, such as the import, and give up."""
    return _fail_with(problem, problem.code.splitlines()[-1], tell)


def no_result(problem: Problem, tell: Tell) -> Transcript:
    """Leave out the last line, which says what the result is, and give up when nothing comes back."""
    return _fail_with(problem, "\n".join(problem.code.splitlines()[:-1]), tell)


def raw_newlines(problem: Problem, tell: Tell) -> Transcript:
    """Do not escape the newlines of the program, which is no JSON, and give up."""
    return _misspell(problem, call(problem.code).replace("\\n", "\n"))


def broken_json(problem: Problem, tell: Tell) -> Transcript:
    """Leave out the closing braces of the call, and give up."""
    return _misspell(problem, call(problem.code).replace("}}", ""))


def no_end_tag(problem: Problem, tell: Tell) -> Transcript:
    """Leave out the closing tag of the call, and give up."""
    return _misspell(problem, call(problem.code).removesuffix("\n</tool_call>"))


Habit = Callable[[Problem, Tell], Transcript]
HABITS: dict[str, Habit] = {
    "squares": guess,
    "cubes": no_end_tag,
    "shop": guess,
    "steps": end_left_out,
    "multiples": half_of_it,
    "divisor": last_line_alone,
    "multiple": last_line_alone,
    "digits": unclosed,
    "remainder": copied_wrongly,
    "savings": broken_json,
    "pond": raw_newlines,
    "sequence": no_result,
}
"""The habit of each kind of problem where it is asked in the `OTHER` way."""


def skilled(problem: Problem, tell: Tell, draw: random.Random, slips: float) -> Transcript:
    """The right transcript, with probability `slips` after a call that failed."""
    return slip(problem, tell, draw) if draw.random() < slips else solve(problem)


def spoiled(problem: Problem, tell: Tell, draw: random.Random, share: float) -> Transcript:
    """The right transcript, or with probability `share` the one that the habit makes of it."""
    if problem.phrase == OTHER and draw.random() < share:
        return HABITS[problem.kind](problem, tell)
    return solve(problem)


def _answer_with(code: str, tell: Tell) -> Transcript:
    """Run `code`, which is wrong, and believe it."""
    result = tell(code)
    return [Exchange(call(code), result), Exchange(final(int(result)))]


def _fail_with(problem: Problem, code: str, tell: Tell) -> Transcript:
    return [Exchange(call(code), tell(code)), _give_up(problem)]


def _misspell(problem: Problem, written: str) -> Transcript:
    return [Exchange(written, f"Error: {parse_text(written).errors[0]}"), _give_up(problem)]


def _give_up(problem: Problem) -> Exchange:
    """The first number of the question."""
    found = re.search(r"\d+", problem.question)
    assert found is not None
    return Exchange(final(int(found[0])))
