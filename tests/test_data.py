"""Dataset rows and the linter: real Parquet and JSON files, as pandas writes them and verl reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from agentloop.chat.base import Message, Piece, Renderer
from agentloop.cli import build
from agentloop.data import content_key, lint, lint_file, lint_pair, plain, sample_from_row
from agentloop.errors import ConfigError
from agentloop.tools import BaseTool, ToolRegistry

USER = {"role": "user", "content": "q"}


def row(i: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
        "data_source": "arith",
        "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        "extra_info": {"index": i, "split": "train"},
        **changes,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


class Names:
    """The part of a tool registry that the linter uses."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.schemas = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in names]

    def select(self, selection: Any, tools_kwargs: Any) -> None:
        """These tools take whatever a row gives them."""


class Words(Renderer):
    """One token a word and one a tool."""

    stop_token_ids = (0,)

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        if any("forbidden" in m["content"] for m in messages):
            raise ConfigError("the template takes no such message")
        return [1] * (sum(len(m["content"].split()) for m in messages) + len(tools or ()))

    def after_turn(self, sampled: Any, messages: list[Message]) -> list[Piece]:  # type: ignore[override]
        return []

    def encode_text(self, text: str) -> list[int]:
        return [1] * len(text.split())

    def decode(self, ids: Any) -> str:
        return " ".join("w" for _ in ids)


# -- sample_from_row ------------------------------------------------------------------------------------------------


def test_a_row_from_pandas_becomes_plain_python(tmp_path: Path) -> None:
    selection = {"tools_kwargs": {"calculator": {"create_kwargs": {"digits": 3}}}, "tool_selection": ["calculator"]}
    rows = [row(0, extra_info={"index": 0, **selection}), row(1, extra_info={"index": 1, **selection})]
    frame = pd.read_parquet(write(tmp_path / "a.parquet", rows))
    first = frame.iloc[1].to_dict()
    assert isinstance(first["prompt"], np.ndarray)
    sample = sample_from_row(first, uid="u1", seed_key="s")
    assert sample.messages == [{"role": "user", "content": "What is 1 + 1?"}]
    assert (sample.uid, sample.seed_key, sample.data_source, sample.ground_truth) == ("u1", "s", "arith", "2")
    assert sample.tools == ("calculator",)
    assert sample.tools_kwargs == {"calculator": {"create_kwargs": {"digits": 3}}}
    assert sample.fields["prompt"] is first["prompt"]
    json.dumps(sample.extra_info)  # plain all the way down


def test_what_verls_dataset_and_tensordict_hand_on() -> None:
    torch = pytest.importorskip("torch")
    tensordict = pytest.importorskip("tensordict")
    info = {"index": torch.tensor(3), "chat_template_kwargs": {"enable_thinking": np.bool_(False)}}
    given = {
        "raw_prompt": tensordict.NonTensorData([{"role": "user", "content": "hi"}]),
        "data_source": tensordict.NonTensorData("arith"),
        "reward_model": tensordict.NonTensorData({"ground_truth": np.float64(0.5)}),
        "extra_info": np.array(info, dtype=object),
        "tools_kwargs": tensordict.NonTensorData({"calculator": {"create_kwargs": {"digits": np.int64(2)}}}),
        "index": 3,
    }
    sample = sample_from_row(given, uid="u")
    assert sample.messages == [{"role": "user", "content": "hi"}]
    assert sample.ground_truth == 0.5
    assert type(sample.ground_truth) is float
    assert sample.template_kwargs == {"enable_thinking": False}
    assert sample.extra_info["index"] == 3
    assert sample.tools_kwargs == {"calculator": {"create_kwargs": {"digits": 2}}}
    stack = tensordict.NonTensorStack.from_list([tensordict.NonTensorData({"a": 1}), tensordict.NonTensorData({"a": 2})])
    assert plain(stack) == [{"a": 1}, {"a": 2}]


def test_rows_as_verls_own_dataset_gives_them(tmp_path: Path) -> None:
    rl_dataset = pytest.importorskip("verl.utils.dataset.rl_dataset")
    from omegaconf import OmegaConf

    kwargs = {"calculator": {"create_kwargs": {"digits": 3}}}
    rows = [row(i, extra_info={"index": i, "tools_kwargs": kwargs}, agent_name="agentloop") for i in range(3)]
    file = write(tmp_path / "a.parquet", rows)
    config = OmegaConf.create({"filter_overlong_prompts": False, "cache_dir": str(tmp_path)})
    dataset = rl_dataset.RLHFDataset([str(file)], tokenizer=None, config=config)
    batch = rl_dataset.collate_fn([dataset[i] for i in range(3)])
    sample = sample_from_row({key: values[2] for key, values in batch.items()}, uid="u")
    assert sample.messages == rows[2]["prompt"]
    assert sample.tools_kwargs == kwargs
    assert sample.ground_truth == "3"


def test_nulls_that_parquet_fills_in_mean_nothing(tmp_path: Path) -> None:
    thinking = {"enable_thinking": True}
    rows = [
        row(0, extra_info={"tools_kwargs": {"a": {"create_kwargs": {"x": 1}}}, "system_prompt": "be brief"}),
        row(1, extra_info={"tools_kwargs": {"b": {"create_kwargs": {"y": 2}}}, "chat_template_kwargs": thinking}),
        row(2, prompt=[USER, {"role": "assistant", "content": "y", "name": "n"}, USER]),
    ]
    frame = pd.read_parquet(write(tmp_path / "a.parquet", rows))
    samples = [sample_from_row(frame.iloc[i].to_dict(), uid="u") for i in range(3)]
    assert [s.tools_kwargs for s in samples] == [{"a": {"create_kwargs": {"x": 1}}}, {"b": {"create_kwargs": {"y": 2}}}, {}]
    assert [s.template_kwargs for s in samples] == [{}, {"enable_thinking": True}, {}]
    assert samples[2].messages == rows[2]["prompt"]


def test_rows_of_pandas_with_missing_values() -> None:
    frame = pd.DataFrame([row(0), {k: v for k, v in row(1).items() if k != "extra_info"}])
    assert sample_from_row(frame.iloc[1].to_dict(), uid="u").extra_info == {}


def test_system_prompts_row_before_conversation_before_run() -> None:
    said = [{"role": "system", "content": "old"}, {"role": "user", "content": "q"}]

    def system(prompt: list[dict[str, str]], own: str | None, run: str | None) -> list[str]:
        sample = sample_from_row(row(prompt=prompt, extra_info={"system_prompt": own}), uid="u", system_prompt=run)
        return [m["content"] for m in sample.messages if m["role"] == "system"]

    assert system(said, None, None) == ["old"]
    assert system(said, "row", "run") == ["row"]
    assert system(said, None, "run") == ["old"]
    assert system(said[1:], None, "run") == ["run"]
    assert system(said[1:], "row", "run") == ["row"]
    assert system(said, "", "run") == []


def test_tool_selection_none_is_all_and_empty_is_none() -> None:
    assert sample_from_row(row(extra_info={"tool_selection": None}), uid="u").tools is None
    assert sample_from_row(row(), uid="u").tools is None
    assert sample_from_row(row(extra_info={"tool_selection": []}), uid="u").tools == ()


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert sample_from_row(row(prompt=[{"role": "user", "content": parts}]), uid="u").messages[0]["content"] == "ab"


@pytest.mark.parametrize("uid", ["", "a_b"])
def test_a_uid_that_verl_could_not_split_is_refused(uid: str) -> None:
    with pytest.raises(ConfigError, match="no underscore"):
        sample_from_row(row(), uid=uid)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "What?"}, "column 'prompt': is a string"),
        ({"prompt": None}, "column 'prompt': is missing"),
        ({"prompt": []}, "holds no message"),
        ({"prompt": ["hi"]}, "message 0 is a str"),
        ({"prompt": [{"role": "usr", "content": "q"}]}, "unknown role 'usr'; did you mean 'user'?"),
        ({"prompt": [{"rol": "user", "content": "q"}]}, "message 0 has no 'role'; it has rol"),
        ({"prompt": [{"role": "user", "text": "q"}]}, "message 0 has no 'content'; it has text"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "message 0 from 'user' is empty"),
        ({"prompt": [{"role": "user", "content": 5}]}, "content of message 0 is a int"),
        ({"prompt": [USER, {"role": "assistant", "content": "a"}]}, "last message is from 'assistant'"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "images, video and audio are not supported"),
        ({"images": [b"png"]}, "column 'images': is not empty"),
        ({"reward_model": '{"ground_truth": 1}'}, "column 'reward_model': expected a struct, found a str; write the struct"),
        ({"extra_info": {"tool_selection": "calculator"}}, "extra_info.tool_selection.*expected a list"),
        ({"extra_info": {"tools_kwargs": {"calculator": 3}}}, "extra_info.tools_kwargs.*'calculator' needs a struct"),
        ({"extra_info": {"chat_template_kwargs": ["x"]}}, "extra_info.chat_template_kwargs.*expected a struct"),
        ({"extra_info": {"system_prompt": 3}}, "extra_info.system_prompt.*expected text"),
        ({"data_source": 3}, "column 'data_source': expected text"),
    ],
)
def test_a_bad_row_is_one_sentence_here_and_in_the_linter(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        sample_from_row(row(**changes), uid="u", where="train.jsonl, row 7")
    assert str(error.value).startswith("train.jsonl, row 7, column '")
    assert "\n" not in str(error.value)
    if not any(isinstance(v, list) and v and isinstance(v[0], bytes) for v in changes.values()):
        file = write(tmp_path / "bad.jsonl", [row(1), row(2, **changes)])
        errors = [p for p in lint_file(file) if p.severity == "error"]
        assert errors
        assert all(p.row == 1 for p in errors)
        assert re.search(says, str(errors[0]))


def test_content_key_is_the_same_for_the_same_row() -> None:
    keys = [content_key(sample_from_row(row(i), uid=uid)) for i, uid in [(1, "a"), (1, "b"), (2, "a")]]
    assert keys[0] == keys[1] != keys[2]


# -- the linter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["good.parquet", "good.jsonl", "good.json"])
def test_a_good_file_has_no_problem(name: str, tmp_path: Path) -> None:
    report = lint(write(tmp_path / name, [row(i) for i in range(3000)]))
    assert report.problems == []
    assert report.ok
    assert (report.rows, report.sources["arith"], report.roles["user"]) == (3000, 3000, 3000)


def test_a_json_array_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n " + json.dumps([row(0), row(1)]))
    assert lint(tmp_path / "a.json").rows == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", b"", "holds no rows"),
        ("blank.jsonl", b"\n \n", "holds no rows"),
        ("list.json", b"[]", "holds no rows"),
        ("bad.jsonl", json.dumps(row()).encode() + b"\n{bad", "line 2 is not valid JSON"),
        ("bad.json", b"[{]", "not valid JSON"),
        ("scalar.jsonl", b"3\n", "line 1 is a int, expected an object"),
        ("latin.jsonl", b'{"prompt": "\xe9"}', "line 1 is not valid JSON"),
        ("bad.parquet", b"PAR1 but no more", "not a readable Parquet file"),
        ("empty.parquet", b"", "not a readable Parquet file"),
        ("a.csv", b"prompt\n", "ends in '.csv', expected .parquet, .json or .jsonl"),
    ],
)
def test_unreadable_files(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    [problem] = lint_file(tmp_path / name)
    assert says in problem.message
    assert "\n" not in str(problem)
    assert str(problem).startswith(str(tmp_path / name))


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    pd.DataFrame({"prompt": []}).to_parquet(tmp_path / "a.parquet")
    assert [p.message for p in lint_file(tmp_path / "a.parquet")] == ["holds no rows"]


def test_missing_files(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row()])
    [problem] = lint_file(tmp_path / "trian.parquet")
    assert str(problem) == f"{tmp_path / 'trian.parquet'}: no such file; did you mean 'train.parquet'?"
    [problem] = lint_file(tmp_path)
    assert "is a folder" in problem.message
    [problem] = lint_file(tmp_path / "nowhere" / "a.parquet")
    assert "no such file" in problem.message


def test_missing_columns_name_the_nearest(tmp_path: Path) -> None:
    wrong = {"promt": [USER], "data_source": "a", "extra_infos": {"index": 1}}
    problems = [str(p).split(": ", 1)[1] for p in lint_file(write(tmp_path / "a.jsonl", [wrong]))]
    assert problems[0] == "the column is missing; did you mean it by 'promt'?"
    assert problems[1].startswith("the column is missing; it has 'promt', 'data_source'")
    assert "did you mean 'extra_info'?" in problems[2]


def test_columns_that_verl_would_not_read(tmp_path: Path) -> None:
    [problem] = lint_file(write(tmp_path / "a.jsonl", [row(tool_selection=["a"])]))
    assert "belongs inside 'extra_info'" in problem.message


def test_ground_truth_missing(tmp_path: Path) -> None:
    rows = [row(0), row(1, reward_model={"groundtruth": "1"}), row(2, reward_model=None)]
    problems = lint_file(write(tmp_path / "a.jsonl", rows))
    assert [(p.row, p.column) for p in problems] == [(1, "reward_model.ground_truth"), (2, "reward_model.ground_truth")]
    assert "groundtruth" in problems[0].message


def test_tools_that_do_not_exist_name_the_nearest(tmp_path: Path) -> None:
    info = {"tool_selection": ["calculater"], "tools_kwargs": {"serch": {"create_kwarg": {"a": 1}}}}
    file = write(tmp_path / "a.parquet", [row(0, extra_info=info)])
    said = [f"{p.column}: {p.message}" for p in lint_file(file, tools=Names("calculator", "search"))]
    assert "extra_info.tool_selection: there is no tool 'calculater'; did you mean 'calculator'?" in said
    assert "extra_info.tools_kwargs: there is no tool 'serch'; did you mean 'search'?" in said
    assert any("did you mean 'create_kwargs'?" in message for message in said)


def test_what_a_row_gives_its_tools_is_checked_against_them(tmp_path: Path) -> None:
    class Vault(BaseTool):
        name = "vault"

        class Arguments(BaseModel):
            guess: int

        async def create(self, instance_id: str, secret: int) -> None:  # type: ignore[override]
            self.instances[instance_id] = secret

        async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> str:
            return ""

    asked = [{"secret": 1}, {"secret": 2}, {"secert": 3}, None]
    rows = [row(i, extra_info={"tools_kwargs": {"vault": {"create_kwargs": given}}}) for i, given in enumerate(asked)]
    rows.append(row(4, extra_info={"tools_kwargs": {"vault": {"create_kwarg": {"secret": 4}}}}))
    rows.append(row(5, extra_info={"tool_selection": []}))
    file = write(tmp_path / "a.jsonl", rows)
    errors = [p for p in lint_file(file, tools=ToolRegistry.from_tools([Vault()])) if p.severity == "error"]
    assert [p.row for p in errors] == [2, 3, 4]
    assert "tool 'vault': key 'create_kwargs': unknown key 'secert'; did you mean 'secret'?" in errors[0].message
    assert "missing a required argument: 'secret'" in errors[1].message
    assert errors[2].message == "unknown key 'create_kwarg'; did you mean 'create_kwargs'?"


def test_one_mistake_is_one_sentence(tmp_path: Path) -> None:
    (problem,) = lint_file(write(tmp_path / "a.jsonl", [row(0, extra_info="index: 3")]))
    assert (problem.column, problem.message[:34]) == ("extra_info", "expected a struct, found a str; wr")


def test_many_of_a_kind_are_counted(tmp_path: Path) -> None:
    problems = lint_file(write(tmp_path / "a.jsonl", [row(i, prompt=[]) for i in range(40)]), limit=3)
    assert [p.row for p in problems] == [0, 1, 2, None]
    assert problems[-1].message.startswith("37 more rows")


def test_duplicates_are_a_warning(tmp_path: Path) -> None:
    report = lint(write(tmp_path / "a.jsonl", [row(0), row(1), row(0)]))
    [problem] = report.problems
    assert (problem.row, problem.severity, problem.message) == (2, "warning", "the same prompt as row 0")
    assert report.ok


def test_prompts_longer_than_the_limit(tmp_path: Path) -> None:
    rows = [
        row(0),
        row(1, prompt=[{"role": "user", "content": "word " * 50}]),
        row(2, prompt=[{**USER, "content": "forbidden"}]),
    ]
    report = lint(write(tmp_path / "a.jsonl", rows), tools=Names("calculator"), max_prompt_tokens=20, renderer=Words())
    assert [(p.row, p.column) for p in report.problems] == [(1, "prompt"), (2, "prompt")]
    assert "is 51 tokens long, the limit is 20" in report.problems[0].message
    assert "the chat template refuses it" in report.problems[1].message
    assert report.prompt_lengths == [6, 51]


def test_files_that_share_prompts(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", [row(i) for i in range(10)])
    system = {"role": "system", "content": "another system message does not make it another problem"}
    val = write(tmp_path / "val.jsonl", [row(20), row(4, prompt=[system, *row(4)["prompt"]])])
    [problem] = lint_pair(train, val)
    assert f"1 of its 2 prompts are also in {train} (row 1 is its row 4)" in str(problem)
    assert lint_pair(train, write(tmp_path / "other.jsonl", [row(30)])) == []


# -- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(build("data"), ["data", "lint", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit | ConfigError), result.exception
    return result.exit_code, result.output


def test_the_command_prints_a_summary_or_the_problems(tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", [row(i) for i in range(1200)])
    status, output = run(str(good))
    assert status == 0
    assert output == f"{good}: 1,200 rows; data_source arith (1,200); messages user (1,200)\n"
    bad = write(tmp_path / "bad.jsonl", [row(1, prompt="What?")])
    status, output = run(str(good), str(bad))
    assert status == 2
    assert f"{bad}, row 0, column 'prompt': is a string" in output
    status, output = run(str(good), str(write(tmp_path / "val.jsonl", [row(1)])))
    assert status == 2
    assert "are also in" in output


TOOLS = """
tools:
  - class_name: calculator
"""


def test_the_command_with_a_models_template_and_real_tools(tmp_path: Path, tokenizer: Any) -> None:
    model, tools = tmp_path / "model", tmp_path / "tools.yaml"
    tokenizer.save_pretrained(model)
    tools.write_text(TOOLS)
    rows = [
        row(0, extra_info={"tool_selection": []}),
        row(1),
        row(2, extra_info={"chat_template_kwargs": {"enable_thinking": False}}),
        row(3, prompt=[{"role": "user", "content": "x" * 5000}]),
    ]
    file = write(tmp_path / "a.jsonl", rows[:3])
    options = ["--tools", str(tools), "--model", str(model), "--max-prompt-tokens", "2000"]
    status, output = run(str(file), *options)
    assert status == 0, output
    shortest, longest = map(int, re.findall(r"prompts of ([\d,]+) to ([\d,]+) tokens", output)[0])
    assert shortest + 30 < longest  # the row without tools lacks the schema
    status, output = run(str(write(tmp_path / "long.jsonl", rows)), *options)
    assert status == 2
    assert "row 3, column 'prompt': is " in output
    status, output = run(str(write(tmp_path / "b.jsonl", [row(extra_info={"tool_selection": ["calculater"]})])), *options)
    assert status == 2
    assert "there is no tool 'calculater'; did you mean 'calculator'?" in output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-prompt-tokens", "10"], "--max-prompt-tokens needs --model"),
        (["--model", "gone"], "gone: no such model folder"),
        (["--model", "."], "holds no tokenizer that transformers can load"),
        (["--tools", "gone.yaml"], "gone.yaml"),
    ],
)
def test_wrong_options_are_one_sentence(options: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(build("data"), ["data", "lint", str(write(tmp_path / "a.jsonl", [row()])), *options])
    assert isinstance(result.exception, ConfigError)
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)


# -- the docs --------------------------------------------------------------------------------------------------------


def test_the_docs_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "docs/data.md", "exec"), {})
    shown = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert capsys.readouterr().out == shown[0]
