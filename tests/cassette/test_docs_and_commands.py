"""`agentloop replay`, `agentloop fork` and the examples of docs/cassettes.md, on a run of the quickstart's model."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentloop.cassette import forks, loop_of, replay
from agentloop.cassette.setup import load_engine
from agentloop.chat import HermesParser, load_renderer
from agentloop.cli import build
from agentloop.config import LoopConfig
from agentloop.engines.base import Sampling
from agentloop.errors import ConfigError
from agentloop.journal import JournalWriter, Run, token_bytes
from agentloop.loop import AgentLoop
from agentloop.rewards.function import load_reward
from agentloop.rollout import Rollout
from agentloop.tools import ToolRegistry
from agentloop.trajectory import Sample

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cassettes.md").read_text(encoding="utf-8")
REWARD = (
    "def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs):\n    return float('1' in solution_str)\n"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/quickstart, as a run of verl describes itself."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("place")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "reward.py").write_text(REWARD)
    model = "examples/quickstart/model"
    tokenizer = AutoTokenizer.from_pretrained(folder / model)
    renderer = load_renderer(tokenizer)
    tools = ToolRegistry.load(folder / "examples/quickstart/tools.yaml").bind(renderer)
    config = LoopConfig(max_turns=6, max_turn_tokens=64, max_response_tokens=384)
    meta = {
        "model": model,
        "seed": 3,
        "loop": config.model_dump(mode="json"),
        "tools": tools.schemas,
        "setup": {
            "tools": "examples/quickstart/tools.yaml",
            "parser": "hermes",
            "reward": {"reward": "reward.py:compute_score"},
        },
    }
    asked = [
        Sample([{"role": "user", "content": f"Compute ({a} + 28) * 3."}], uid=f"q-{a}", ground_truth=str((a + 28) * 3))
        for a in range(2)
    ]

    async def roll(writer: JournalWriter) -> None:
        engine = load_engine("local", run=folder / "runs" / "quickstart", model=folder / model)
        reward = load_reward(f"{folder / 'reward.py'}:compute_score", {})
        parts = AgentLoop(
            engine, renderer, HermesParser(renderer), tools=tools, reward=reward, config=config, recorder=writer, seed=3
        )
        await Rollout(parts).run(asked, 4, step=1, sampling=Sampling(max_tokens=64))
        await engine.close()

    with JournalWriter(folder / "runs" / "quickstart", decode=token_bytes(tokenizer), meta=meta) as writer:
        asyncio.run(roll(writer))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in."""
    shutil.copytree(made, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def agentloop(line: str) -> Any:
    words = shlex.split(line)
    return CliRunner().invoke(build(words[1]), words[1:])


def parent(place: Path) -> str:
    """One that called a tool in its first turn."""
    run = Run(place / "runs" / "quickstart")
    return next(row.id for row in run.trajectories() if run.load(row, tokens=False).turns[0].calls)


def test_the_pages_examples_run(place: Path) -> None:
    used = parent(place)
    page = PAGE.replace("q-0_1", used)
    names: dict[str, Any] = {"__name__": "page"}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "docs/cassettes.md", "exec"), names)
    assert len(names["made"].trajectories) == 2 and names["forks"]("runs/quickstart", used)
    shutil.rmtree(place / "runs" / "quickstart" / "forks")
    lines = [line for line in page.splitlines() if line.startswith("agentloop ")]
    assert len(lines) == 3
    for line in lines:
        result = agentloop(line)
        assert result.exit_code == 0, f"{line}: {result.output} {result.exception!r}"


def test_replay_says_that_all_is_what_it_was_and_where_it_is_not(place: Path) -> None:
    run = Run("runs/quickstart")
    rows = list(run.trajectories())
    result = agentloop("agentloop replay quickstart --engine cassette")
    assert result.exit_code == 0 and f"{len(rows)} trajectories are what was recorded, 0 are not" in result.output
    told = json.loads(agentloop("agentloop replay quickstart --json --live tools --live reward").output)
    assert (told["played"], told["mismatches"], told["cut"], told["damaged"]) == (len(rows), [], [], [])

    template = (ROOT / "examples/quickstart/model/chat_template.jinja").read_text()
    meta = json.loads((place / "runs/quickstart/run.json").read_text())
    meta["setup"]["chat_template"] = template.replace("<|im_start|>", "<|im_start|> ", 1)
    (place / "runs/quickstart/run.json").write_text(json.dumps(meta))
    result = agentloop("agentloop replay quickstart --json")
    assert result.exit_code == 1
    found = json.loads(result.output)["mismatches"]
    assert len(found) == len(rows) and {item["what"] for item in found} == {"tokens"}
    assert all("⟦" in item["message"] and item["trajectory"] in item["message"] for item in found)
    assert agentloop("agentloop replay quickstart").exit_code == 1


def test_replay_under_other_limits_is_not_the_same(place: Path) -> None:
    result = agentloop("agentloop replay quickstart --loop max_turn_tokens=60")
    assert result.exit_code == 1 and "max_tokens is 60, and was 64 when it was recorded" in result.output
    result = agentloop("agentloop replay quickstart --tools-file recorded")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("replay quickstart --engine local", "the engine is the cassette, not 'local'"),
        ("replay quickstart --live tool", "--live cannot be 'tool'; did you mean 'tools'"),
        ("replay quickstart --loop max_turn=3", "unknown key 'max_turn'; did you mean 'max_turns'"),
        ("replay quickstart --loop max_turns", "expected KEY=VALUE"),
        ("replay quickstart --model nowhere", "the model 'nowhere' is no folder here"),
        ("replay quickstart --parser herms", "tool-call parser 'herms' is unknown"),
        ("replay quikstart", "did you mean 'quickstart'"),
        ("replay quickstart --step 7", "no trajectories there; it has train 1"),
        ("replay quickstart --partition trian", "no partition 'trian'; did you mean 'train'"),
        ("fork quickstart --trajectory q-0_9 --turn 0", "no trajectory 'q-0_9'"),
        ("fork quickstart --trajectory q-0_1 --turn 0 --engine locl", "no engine 'locl'; did you mean 'local'"),
        ("fork quickstart --trajectory q-0_1 --turn 0 --engine cassette", "another engine than 'cassette' must go on"),
        ("fork quickstart --trajectory q-0_1 --turn 0 --engine sglang_server", "it needs the URL of a server"),
        ("fork quickstart --trajectory q-0_1 --turn 0 --engine scripted", "it needs a script"),
        ("fork quickstart --trajectory q-0_1 --turn 0 --tools-file recorded", "a fork calls its tools"),
    ],
)
def test_wrong_input_is_one_sentence(place: Path, line: str, sentence: str) -> None:
    result = agentloop(f"agentloop {line}")
    assert isinstance(result.exception, ConfigError) and sentence in str(result.exception), result.output


def test_a_fork_of_a_run_that_does_not_tell_its_tools_is_one_sentence(place: Path) -> None:
    told = place / "runs" / "quickstart" / "run.json"
    before = told.read_text()
    told.write_text(json.dumps(json.loads(before) | {"tools": [], "setup": {}}))
    (place / "script.json").write_text(json.dumps(["The answer is 1.<|im_end|>"]))
    line = f"agentloop fork quickstart --trajectory {parent(place)} --turn 0 --tool-result 1"
    result = agentloop(f"{line} --engine scripted --script script.json")
    told.write_text(before)
    assert isinstance(result.exception, ConfigError) and "does not come out as it was recorded" in str(result.exception)
    assert "--tools-file" in str(result.exception)
    shutil.rmtree(place / "runs" / "quickstart" / "forks", ignore_errors=True)


def test_fork_from_the_command_line(place: Path) -> None:
    used = parent(place)
    (place / "script.json").write_text(json.dumps(["The answer is 1.<|im_end|>"]))
    line = f"agentloop fork quickstart --trajectory {used} --turn 0 --tool-result 1000 --engine scripted --script script.json"
    result = agentloop(f"{line} -n 2 --tools replay")
    assert result.exit_code == 0, result.output
    (fork,) = forks("runs/quickstart")
    assert (fork.trajectory, fork.turn, fork.edit["tool_result"], fork.tools) == (used, 1, "1000", "replay")
    before = Run("runs/quickstart").load(used)
    for key in fork.ids:
        after = fork.run.load(key)
        assert after.input_ids[: fork.shared_tokens] == before.input_ids[: fork.shared_tokens]
        assert after.turns[0].calls[0].text == "1000" and after.reward is not None and after.reward.value == 1.0
    assert "2 turns" in result.output and "reward 1" in result.output and f"those of {used}" in result.output
    result = agentloop(f"agentloop fork runs/quickstart/forks/0001 --trajectory {fork.ids[0]} --prompt Again? --engine local")
    assert result.exit_code == 0, result.output
    again = agentloop("agentloop replay runs/quickstart/forks/0001")
    assert again.exit_code == 0 and "2 trajectories are what was recorded" in again.output, again.output


def test_a_run_that_does_not_say_what_it_was_made_of(place: Path) -> None:
    path = place / "runs" / "quickstart" / "run.json"
    meta = json.loads(path.read_text())
    for key in ("model", "setup"):
        path.write_text(json.dumps({name: value for name, value in meta.items() if name != key}))
        with pytest.raises(ConfigError, match="'model' is missing" if key == "model" else "does not name their file"):
            loop_of("runs/quickstart")
    path.write_text(json.dumps({name: value for name, value in meta.items() if name != "setup"}))
    loop = loop_of("runs/quickstart", tools="examples/quickstart/tools.yaml")
    assert asyncio.run(replay("runs/quickstart", loop)).check().played == 8
