"""The real `agentloop` command: wrong input is one sentence and exit status 2, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from agentloop.cli import main

COMMAND = Path(sys.executable).with_name("agentloop")
QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
ROW: dict[str, Any] = {
    "data_source": "tests",
    "prompt": [{"role": "user", "content": "What is 1 + 2?"}],
    "reward_model": {"ground_truth": "3"},
}
FILES = {
    "tools.yaml": "tools: [{class_name: calculator}]",
    "misspelt.yaml": "tools: [{class_name: calculator, timeuot: 3}]",
    "torn.yaml": "tools: [",
    "clash.yaml": "tools: [{function: 'clashing:add', tool_schema: {type: function, function: {name: add, description: adds, "
    "parameters: {type: object, properties: {c: {type: integer}}, required: [c]}}}}]",
    "clashing.py": "def add(a: int, b: int) -> int:\n    '''Adds.'''\n    return a + b\n",
    "empty.jsonl": "",
    "good.jsonl": json.dumps(ROW) + "\n",
    "image.jsonl": json.dumps(ROW | {"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}) + "\n",
    "long.jsonl": json.dumps(ROW | {"prompt": [{"role": "user", "content": "1 + 2 " * 200}]}) + "\n",
    "platform.yaml": "plattform: cpu",
    "run.yaml": "platform: cpu\nagentloop: {loop: {max_turn: 3}}\nverl: {data: {train_files: good.jsonl, "
    f"val_files: good.jsonl}}, actor_rollout_ref: {{model: {{path: {QUICKSTART / 'model'}}}}}}}",
    "model.yaml": "platform: cpu\nverl: {actor_rollout_ref: {model: {path: nowhere}}}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def agentloop(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([COMMAND, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("ls nowhere", "no run 'nowhere' here or under ./runs"),
        ("show good.jsonl", "good.jsonl: no run here"),
        ("tools lint missing.yaml", "missing.yaml: no such file"),
        ("tools lint torn.yaml", "torn.yaml: not valid YAML: line 1"),
        ("tools try tools.yaml calculater {}", "there is no tool 'calculater'; did you mean 'calculator'?"),
        ("data lint good.jsonl --model nowhere", "nowhere: no such model folder"),
        ("train missing.yaml", "missing.yaml: no such file"),
        ("train platform.yaml", "platform.yaml: unknown key 'plattform'; did you mean 'platform'?"),
        ("train run.yaml", "unknown key 'max_turn'; did you mean 'max_turns'?"),
        ("train model.yaml", "'nowhere' is no model folder"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_status_2(folder: Path, arguments: str, sentence: str) -> None:
    done = agentloop(folder, *arguments.split())
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("agentloop: ") and sentence in line
    assert done.stdout == ""
    assert {path.name for path in folder.iterdir()} == set(FILES)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("tools explian", "tools: unknown command 'explian'; did you mean 'explain'?"),
        ("tools list", "tools list: missing argument 'file'"),
        ("tools explain tools.yaml", "tools explain: missing option '--model'"),
        ("tools list tools.yaml more", "tools list: got unexpected extra argument"),
        ("show somewhere --bset", "show: unknown option '--bset'; did you mean '--best'?"),
        ("show somewhere --step one", "show: invalid value for '--step'"),
        ("show somewhere --step", "option '--step' requires an argument"),
        ("train run.yaml --dryrun", "train: unknown option '--dryrun'; did you mean '--dry-run'?"),
        ("train --config run.yaml", "train: unknown option '--config'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_too(
    arguments: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["agentloop", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    (line,) = told.err.splitlines()
    assert line.startswith("agentloop: ") and sentence in line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("tools lint misspelt.yaml", "unknown key 'timeuot'; did you mean 'timeout'?"),
        ("tools lint clash.yaml", "clash.yaml: tool 'add': "),
        ("data lint missing.parquet", "missing.parquet: no such file"),
        ("data lint empty.jsonl", "empty.jsonl: holds no rows"),
        ("data lint image.jsonl", "images, video and audio are not supported"),
        (f"data lint long.jsonl --model {QUICKSTART / 'model'} --max-prompt-tokens 128", "long.jsonl, row 0"),
    ],
)
def test_a_linter_prints_a_sentence_for_each_problem_and_ends_with_2(folder: Path, arguments: str, sentence: str) -> None:
    done = agentloop(folder, *arguments.split())
    assert (done.returncode, done.stderr) == (2, "")
    assert any(sentence in line for line in done.stdout.splitlines()), done.stdout
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_without_a_command_the_help_is_shown(folder: Path) -> None:
    done = agentloop(folder)
    assert (done.returncode, done.stderr) == (2, "")
    assert "Usage: agentloop" in done.stdout and "train" in done.stdout


def test_version(folder: Path) -> None:
    done = agentloop(folder, "--version")
    assert (done.returncode, done.stdout.strip()) == (0, version("agentloop"))
