"""The model folder in the repository: its size, its tokenizer, its conversation format, and that it is only half good."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agentloop.chat import Renderer, load_parser, load_renderer
from agentloop.tools.registry import ToolRegistry
from examples.quickstart.calculator_tool import REFUSAL, SCHEMA
from examples.quickstart.conversation import END_OF_TURN, Transcript, call, encode, messages, train_tokenizer
from examples.quickstart.demonstrations import HABITS, solve, spoiled
from examples.quickstart.evaluate import MODEL, TOOLS, evaluate, loop_config
from examples.quickstart.make_data import held_out
from examples.quickstart.pretrain import SEED, SPOILED, corpus
from examples.quickstart.task import Problem, distinct, problems


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def renderer(tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return load_renderer(tokenizer)


def as_messages(problem: Problem, transcript: Transcript) -> list[dict[str, Any]]:
    """The conversation as messages, with the calls as text, for the template to render in one go."""
    found = messages(problem.question)
    for exchange in transcript:
        found.append({"role": "assistant", "content": exchange.written})
        if exchange.answer is not None:
            found.append({"role": "tool", "content": exchange.answer})
    return found


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 10 * 2**20


def test_the_tokenizer_is_the_one_that_the_script_makes(tokenizer: PreTrainedTokenizerFast) -> None:
    made = train_tokenizer(corpus(SEED))
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template
    text = "Each box holds 75 cups." + call("12 * 34")
    assert made.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    "text", ["", "12 * 34", "Each crate\n\n holds 5 ñandú 🪿\t", '{"name": "x"', "\\boxed{408}", call("7 - 8")]
)
def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens_and_the_fixed_parts_are_cheap(tokenizer: PreTrainedTokenizerFast, renderer: Renderer) -> None:
    assert len(tokenizer.encode("90210")) == 5
    assert len(tokenizer.encode(call("12 * 34"))) <= 12
    opening = renderer.prompt(messages(""), [SCHEMA])
    assert len(opening) < 60


def test_the_longest_right_conversation_fits_the_limits(tokenizer: PreTrainedTokenizerFast, renderer: Renderer) -> None:
    limits = loop_config()
    for problem in distinct(300, problems(0, "held_out")):
        ids, _ = encode(tokenizer, renderer, problem, solve(problem))
        prompt = len(renderer.prompt(messages(problem.question), [SCHEMA]))
        assert prompt <= limits.max_prompt_tokens
        assert len(ids) - prompt <= limits.max_response_tokens // 2
        assert problem.depth + 1 <= limits.max_turns


def test_demonstrations_are_what_the_chat_template_writes(tokenizer: PreTrainedTokenizerFast, renderer: Renderer) -> None:
    """Piece by piece or in one go, right or flawed: the same tokens, so the template only ever appends."""
    draw = random.Random(0)
    for problem in distinct(60, problems(0, "train")):
        transcript = spoiled(problem, draw, share=0.5)
        if any("<tool_call>" in (exchange.answer or "") for exchange in transcript):
            continue  # what a malformed call is told shows the tags, which the template would take for control tokens
        ids, labels = encode(tokenizer, renderer, problem, transcript)
        whole = tokenizer.apply_chat_template(
            as_messages(problem, transcript), tools=[SCHEMA], tokenize=True, return_dict=False
        )
        assert [*ids, *tokenizer.encode("\n")] == whole
        written = [id_ for id_, label in zip(ids, labels, strict=True) if label != -100]
        assert tokenizer.decode(written) == "".join(exchange.written + END_OF_TURN for exchange in transcript)


def test_a_structured_call_renders_as_the_demonstrations_write_it(tokenizer: PreTrainedTokenizerFast) -> None:
    function = {"name": "calculator", "arguments": {"expression": "12 * 34"}}
    structured = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    written = {"role": "assistant", "content": call("12 * 34")}
    start = messages("What is 12 * 34?")
    one, other = (tokenizer.apply_chat_template([*start, turn], tokenize=False) for turn in (structured, written))
    assert one == other


def test_each_habit_is_a_mistake(tokenizer: PreTrainedTokenizerFast, renderer: Renderer) -> None:
    draw = random.Random(0)
    seen = set()
    for problem in distinct(600, problems(0, "train")):
        habit, depth = HABITS.get(problem.form, (None, 0))
        if habit is None or problem.depth < depth:
            assert spoiled(problem, draw, share=1.0) == solve(problem)
            continue
        seen.add(problem.form)
        transcript = spoiled(problem, draw, share=1.0)
        assert transcript[-1].answer is None
        assert transcript != solve(problem)
    assert seen == set(HABITS)


def test_the_tools_file_gives_the_schema_that_the_model_was_trained_with(renderer: Renderer) -> None:
    for path in (TOOLS["right"], TOOLS["wrong"]):
        assert path is not None
        assert json.dumps(ToolRegistry.from_yaml(path).bind(renderer).schemas) == json.dumps([SCHEMA])


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("12 * 34", "408"),
        ("3-7", "-4"),
        (" -4 + 10 ", "6"),
        ("(1 + 2) * 3", REFUSAL),
        ("1 + 2 + 3", REFUSAL),
        ("8 / 2", REFUSAL),
        ("\\boxed{5}", REFUSAL),
        ("9" * 50 + " * 2", REFUSAL),
        ("", REFUSAL),
    ],
)
async def test_the_calculator_takes_one_operation(expression: str, told: str) -> None:
    path = TOOLS["right"]
    assert path is not None
    (tool,) = ToolRegistry.from_yaml(path).tools
    instance, _ = await tool.create()
    response, reward, _ = await tool.execute(instance, {"expression": expression})
    await tool.release(instance)
    assert (response.text, reward) == (told, 0.0)


def test_calls_are_parsed(tokenizer: PreTrainedTokenizerFast, renderer: Renderer) -> None:
    parser = load_parser("hermes", renderer)
    parsed = parser.parse(tokenizer.encode(call("12 * 34") + END_OF_TURN))
    assert [(one.name, one.arguments) for one in parsed.calls] == [("calculator", {"expression": "12 * 34"})]


def test_the_model_is_half_good_and_fails_in_several_ways() -> None:
    report = evaluate(MODEL, held_out(128))
    low, high = SPOILED
    assert low - 0.05 <= report.accuracy <= 0.6
    assert high < 0.6
    assert len(report.failures) >= 3
    assert max(report.failures.values()) <= 0.6 * sum(report.failures.values())


@pytest.mark.parametrize("tool", ["none", "wrong"])
def test_without_a_calculator_that_is_right_the_model_cannot_do_it(tool: Any) -> None:
    assert evaluate(MODEL, held_out(64), tool=tool).accuracy <= 0.1


@pytest.mark.slow
def test_of_most_problems_one_of_eight_tries_is_right() -> None:
    problems = held_out(64)
    assert evaluate(MODEL, problems, temperature=1.0, n=8).any_of_n >= 0.75
