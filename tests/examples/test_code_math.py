"""The second example: its problems, its tool, its reward, the model in the repository, and a short training run."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from agentloop.chat import Renderer, load_parser, load_renderer
from agentloop.commands.tools import app as tools
from agentloop.data.rows import sample_from_row
from agentloop.sandboxes import load_sandbox
from agentloop.sandboxes.base import SandboxError
from agentloop.tools.registry import ToolRegistry
from agentloop.trajectory import EndReason, Sample, Trajectory
from examples.code_math import make_data
from examples.code_math.conversation import PIECES, SCHEMA, call, encode, messages
from examples.code_math.demonstrations import HABITS, Interpreter, skilled, slip, solve, spoiled
from examples.code_math.evaluate import CODE_MATH, load_reward
from examples.code_math.pretrain import SEED, SPOILED, choice, corpus
from examples.code_math.task import OTHER, PHRASES, PLAIN, problems
from examples.quickstart.conversation import END_OF_TURN, train_tokenizer
from examples.quickstart.evaluate import loop_config, measure
from examples.quickstart.task import SMALLEST_ANSWER, distinct

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tell() -> Iterator[Interpreter]:
    """The tool; skips where its sandbox cannot be had."""

    async def start() -> None:
        async with load_sandbox({"kind": "process", "preload": []}) as sandbox:
            await sandbox.start()

    try:
        asyncio.run(start())
    except SandboxError as error:
        pytest.skip(f"no process sandbox here: {error}")
    with Interpreter() as interpreter:
        yield interpreter


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(CODE_MATH.model)


@pytest.fixture(scope="module")
def renderer(tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return load_renderer(tokenizer)


# -- problems -----------------------------------------------------------------------------------------------------------


def test_the_programs_answers_are_the_right_ones(tell: Interpreter) -> None:
    kinds = set()
    for problem in distinct(150, problems(5, "train")):
        assert tell(problem.code) == str(problem.answer), problem
        kinds.add((problem.kind, problem.phrase))
    assert kinds == set(itertools.product(PHRASES, (PLAIN, OTHER)))


def test_the_answer_cannot_be_read_off_the_question() -> None:
    for problem in distinct(1000, problems(0, "held_out")):
        assert problem.answer >= SMALLEST_ANSWER
        assert str(problem.answer) not in "".join(c if c.isdigit() else " " for c in problem.question).split()


def test_no_seed_gives_a_train_problem_that_is_held_out_or_was_used_to_choose_the_model() -> None:
    held, chosen_by = make_data.held_out(), choice()
    assert len(held) == len(chosen_by) == 256
    programs, questions = ({getattr(problem, what) for problem in held} for what in ("code", "question"))
    assert not {problem.code for problem in chosen_by} & programs
    programs |= {problem.code for problem in chosen_by}
    for problem in itertools.chain.from_iterable(distinct(2000, problems(seed, "train")) for seed in range(3)):
        assert problem.code not in programs and problem.question not in questions


def test_rows_become_samples_and_follow_the_seed(tmp_path: Path) -> None:
    train, val = make_data.write(tmp_path / "1", 1, train_rows=32, held_out_rows=16)
    for row, problem in zip(pd.read_parquet(val).to_dict("records"), make_data.held_out(16), strict=True):
        sample = sample_from_row(row, uid="0")
        assert sample.messages == messages(problem.question)
        assert (sample.ground_truth, sample.extra_info["split"]) == (str(problem.answer), "held_out")
    others = make_data.write(tmp_path / "2", 2, train_rows=32, held_out_rows=16)
    assert others[0].read_bytes() != train.read_bytes() and others[1].read_bytes() == val.read_bytes()


# -- the tool and the reward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["right", "wrong"])
def test_the_tools_files_are_right_and_give_the_schema_that_the_model_knows(mode: Any, renderer: Renderer) -> None:
    path = CODE_MATH.tools[mode]
    linted = CliRunner().invoke(tools, ["lint", str(path)])
    assert (linted.exit_code, "nothing wrong" in linted.output) == (0, True), linted.output
    assert path is not None
    assert json.dumps(ToolRegistry.from_yaml(path).bind(renderer).schemas) == json.dumps([SCHEMA])


async def test_the_wrong_tool_is_wrong_about_numbers_alone(tell: Interpreter, renderer: Renderer) -> None:
    path = CODE_MATH.tools["wrong"]
    assert path is not None
    registry = ToolRegistry.from_yaml(path).bind(renderer)
    (tool,) = registry.tools
    said = []
    for code in ("6 * 7", "1 / 0", "x = 3"):
        instance, _ = await tool.create()
        response, *_ = await tool.execute(instance, {"code": code})
        said.append(response.text.splitlines()[-1])
        await tool.release(instance)
    await registry.close()
    assert said == ["49", "ZeroDivisionError: division by zero", "[no output]"]


async def worth(text: str, ground_truth: str = "408") -> float:
    trajectory = Trajectory(Sample([], uid="0", ground_truth=ground_truth))
    trajectory.end_reason = EndReason.FINAL_ANSWER
    return (await load_reward()(trajectory, trajectory.sample, text)).value


@pytest.mark.parametrize("text", ["\\boxed{408}", " \\boxed{408}\n", "So it is \\boxed{408}", "\\boxed{0408}"])
async def test_right_answers(text: str) -> None:
    assert await worth(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "408",
        "\\boxed{407}",
        "\\boxed{4080}",
        "\\boxed{}",
        "\\boxed{408",
        "\\boxed{-408}",
        # The right number, not calculated.
        "\\boxed{12*34}",
        "\\boxed{34*12}",
        "\\boxed{407+1}",
        "\\boxed{408.0}",
        "\\boxed{\\frac{816}{2}}",
        # More than one try.
        "\\boxed{407}\\boxed{408}",
        "\\boxed{408}\\boxed{407}",
        "\\boxed{407 or 408}",
        "\\boxed{407,408}",
        "\\boxed{408} or so",
        "\\boxed{\\boxed{408}}",
        # In other digits, and far too many of them.
        "\\boxed{٤٠٨}",
        f"\\boxed{{{'9' * 5000}}}",
        call("408"),
    ],
)
async def test_anything_else_is_worth_nothing(text: str) -> None:
    assert await worth(text) == 0.0


# -- the model ----------------------------------------------------------------------------------------------------------


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in CODE_MATH.model.iterdir()) <= 5 * 2**20


def test_the_tokenizer_is_the_one_that_the_script_makes(tell: Interpreter, tokenizer: PreTrainedTokenizerFast) -> None:
    made = train_tokenizer(corpus(SEED, tell), PIECES)
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("text", ["", "naïve 🪿\t", '{"name": "x"', "\\boxed{408}", call("n = 1\nfor _ in [2]:\n    n = 3\nn")])
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_demonstrations_fit_the_limits_and_their_calls_are_read(
    tell: Interpreter, tokenizer: PreTrainedTokenizerFast, renderer: Renderer
) -> None:
    limits, parser, draw = loop_config(CODE_MATH.config), load_parser("hermes", renderer), random.Random(0)
    assert limits.max_turn_tokens is not None
    for problem in distinct(200, problems(0, "held_out")):
        opening = renderer.prompt(messages(problem.question), [SCHEMA])
        assert len(opening) <= limits.max_prompt_tokens
        for transcript in (solve(problem), slip(problem, tell, draw)):
            ids, _ = encode(tokenizer, renderer, problem, transcript)
            assert len(ids) - len(opening) <= limits.max_response_tokens
            assert len(transcript) <= limits.max_turns
            for exchange in transcript:
                assert len(tokenizer.encode(exchange.written)) < limits.max_turn_tokens
        parsed = parser.parse(tokenizer.encode(call(problem.code) + END_OF_TURN))
        assert [(one.name, one.arguments) for one in parsed.calls] == [("python", {"code": problem.code})]


def test_a_slip_is_shown_and_not_taught(tell: Interpreter, tokenizer: PreTrainedTokenizerFast, renderer: Renderer) -> None:
    draw = random.Random(0)
    for problem in distinct(60, problems(0, "train")):
        transcript = skilled(problem, tell, draw, slips=1.0)
        assert [exchange.is_taught for exchange in transcript] == [False, True, True]
        failed, ran, _ = transcript
        assert failed.answer not in (None, ran.answer)
        ids, labels = encode(tokenizer, renderer, problem, transcript)
        taught = tokenizer.decode([id_ for id_, label in zip(ids, labels, strict=True) if label != -100])
        assert taught == "".join(exchange.written + END_OF_TURN for exchange in transcript[1:])


def test_each_habit_is_a_mistake_in_one_of_two_ways_to_ask(tell: Interpreter) -> None:
    draw, seen = random.Random(0), set()
    for problem in distinct(200, problems(0, "train")):
        transcript = spoiled(problem, tell, draw, share=1.0)
        if problem.phrase == PLAIN:
            assert transcript == solve(problem)
            continue
        seen.add(problem.kind)
        assert transcript[-1].written != solve(problem)[-1].written and transcript[-1].answer is None
    assert seen == set(HABITS)


def test_the_model_is_half_good_and_fails_in_several_ways(tell: Interpreter) -> None:
    report = measure(CODE_MATH, CODE_MATH.model, CODE_MATH.held_out(128))
    low, high = SPOILED
    assert low - 0.05 <= report.accuracy <= high + 0.05
    assert len(report.failures) >= 4
    assert max(report.failures.values()) <= 0.5 * sum(report.failures.values())


@pytest.mark.parametrize("mode", ["none", "wrong"])
def test_without_a_tool_that_is_right_the_model_cannot_do_it(mode: Any, tell: Interpreter) -> None:
    assert measure(CODE_MATH, CODE_MATH.model, CODE_MATH.held_out(64), tool=mode).accuracy <= 0.1


# -- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_few_steps_through_verl_help(tmp_path: Path, tell: Interpreter) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "examples.code_math.run", "--seed", "0", "--run-dir", str(run_dir), "--no-controls"]
    few = ["trainer.total_training_steps=8", "trainer.test_freq=8", "trainer.save_freq=-1"]
    done = subprocess.run([*command, *few], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    summary = json.loads((run_dir / "summary.json").read_text())
    print(json.dumps(summary))
    assert (summary["held_out"], summary["steps"], summary["trajectories"]) == (256, 8, 1024)
    assert summary["accuracy_before"] <= SPOILED[1] + 0.05
    assert summary["accuracy_after"] >= summary["accuracy_before"] + 0.1
    assert summary["tool_calls"] > 600
    assert set(summary["end_reasons"]) <= {"final_answer", "turn_limit", "token_limit"}
    assert (run_dir / "reward.png").stat().st_size > 10_000
    assert "held-out accuracy" in done.stdout
