"""The problems: right answers, honest splits, enough depth."""

from __future__ import annotations

import ast
import itertools
import operator

import pytest

from examples.quickstart import make_data
from examples.quickstart.task import LARGEST, SMALLEST_ANSWER, distinct, problems

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def evaluate(expression: str) -> int:
    """Python's own reading of the expression: its precedence and brackets, not ours."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return int(OPERATORS[type(node.op)](walk(node.left), walk(node.right)))
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    return walk(ast.parse(expression, mode="eval").body)


def test_answers_are_right_by_an_independent_evaluation() -> None:
    for problem in distinct(2000, problems(0, "train")):
        assert evaluate(problem.expression) == problem.answer, problem
        for step in problem.steps:
            assert evaluate(step.expression) == step.result
            assert 0 <= step.result <= LARGEST


def test_a_bare_expression_is_asked_as_it_stands_and_a_story_with_the_same_numbers() -> None:
    for problem in distinct(500, problems(0, "train")):
        numbers = ["".join(run) for digit, run in itertools.groupby(problem.question, str.isdigit) if digit]
        in_expression = ["".join(run) for digit, run in itertools.groupby(problem.expression, str.isdigit) if digit]
        assert numbers == in_expression


def test_the_answer_cannot_be_read_off_on_the_way() -> None:
    for problem in distinct(2000, problems(0, "held_out")):
        assert problem.answer >= SMALLEST_ANSWER
        assert problem.answer not in {step.result for step in problem.steps[:-1]}
        assert str(problem.answer) not in problem.question.replace(".", " ").replace("?", " ").split()


def test_most_problems_need_two_calls_or_more_and_a_third_are_stories() -> None:
    sample = list(itertools.islice(problems(3, "train"), 3000))
    assert sum(problem.depth >= 2 for problem in sample) / len(sample) > 0.7
    assert {problem.depth for problem in sample} == {1, 2, 3, 4}
    stories = sum(problem.question.endswith("?") and not problem.question.startswith("What is") for problem in sample)
    assert 0.2 < stories / len(sample) < 0.4


def test_the_same_seed_gives_the_same_problems() -> None:
    assert distinct(50, problems(7, "train")) == distinct(50, problems(7, "train"))
    assert distinct(50, problems(7, "train")) != distinct(50, problems(8, "train"))


def test_no_seed_gives_a_train_problem_that_is_held_out() -> None:
    held = make_data.held_out()
    questions, expressions = {problem.question for problem in held}, {problem.expression for problem in held}
    for seed in range(5):
        for problem in make_data.train_problems(4096, seed):
            assert problem.question not in questions
            assert problem.expression not in expressions


def test_overlapping_sets_are_refused() -> None:
    held = make_data.held_out(16)
    with pytest.raises(ValueError, match="share 1 questions"):
        make_data.check_disjoint([*distinct(16, problems(0, "train")), held[3]], held)
