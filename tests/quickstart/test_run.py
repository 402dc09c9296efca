"""What the quickstart reports of a run, from the journal of a small scripted one."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agentloop.chat import HermesParser, load_renderer
from agentloop.engines.scripted import ScriptedEngine
from agentloop.errors import ConfigError
from agentloop.journal import JournalWriter
from agentloop.journal.reader import Run
from agentloop.loop import AgentLoop
from agentloop.rewards.function import FunctionReward
from agentloop.rollout import Rollout
from agentloop.tools.registry import ToolRegistry
from agentloop.trajectory import Sample
from examples.quickstart import run as quickstart
from examples.quickstart.conversation import END_OF_TURN, call, final, messages
from examples.quickstart.evaluate import TOOLS
from examples.quickstart.make_data import held_out
from examples.quickstart.reward import compute_score
from examples.quickstart.task import Problem

PROBLEMS = held_out(4)
Policy = Callable[[int, Problem], list[str]]
"""What the model writes for a problem, turn by turn."""


def solve(index: int, problem: Problem) -> list[str]:
    return [*(call(step.expression) for step in problem.steps), final(problem.answer)]


def begin(index: int, problem: Problem) -> list[str]:
    """Right once, and wrong in three ways."""
    if index == 0:
        return solve(index, problem)
    return [[], [final(problem.answer + 1)], [call("1 +"), final(0)], ['<tool_call>\n{"name"}\n</tool_call>', final(0)]][index]


def sample(index: int, problem: Problem, uid: str) -> Sample:
    return Sample(
        messages(problem.question),
        uid=uid,
        data_source="quickstart",
        ground_truth=str(problem.answer),
        extra_info={"index": index},
    )


def validate_and_train(run_dir: Path, tokenizer: Any) -> None:
    """Validation at step 0, two train steps of two siblings, validation at step 2."""
    policies: dict[tuple[bool, int], Policy] = {(True, 0): begin, (False, 1): begin, (False, 2): solve, (True, 2): solve}

    async def roll_out(writer: JournalWriter) -> None:
        renderer = load_renderer(tokenizer)
        tools = ToolRegistry.from_yaml(TOOLS["right"]).bind(renderer)
        for (validation, step), policy in policies.items():
            script = {}
            for index, problem in enumerate(PROBLEMS):
                turns = [text + END_OF_TURN for text in policy(index, problem)]
                part = "val" if validation else "train"
                script |= {f"{part}-{step}-u{index}_{sibling}": turns for sibling in range(2)}
            engine = ScriptedEngine(script, encode=lambda text: tokenizer.encode(text, add_special_tokens=False))
            loop = AgentLoop(
                engine,
                renderer,
                HermesParser(renderer),
                tools=tools,
                reward=FunctionReward(compute_score),
                recorder=writer,
            )
            samples = [sample(index, problem, f"u{index}") for index, problem in enumerate(PROBLEMS)]
            await Rollout(loop).run(samples, 1 if validation else 2, step=step, validate=validation)

    with JournalWriter(run_dir, meta={"seed": 0}) as writer:
        asyncio.run(roll_out(writer))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("quickstart")
    validate_and_train(path, AutoTokenizer.from_pretrained(quickstart.QUICKSTART.model))
    return path


def watch(run_dir: Path) -> quickstart.Watch:
    first = min(row.t for row in Run(run_dir).trajectories())
    return quickstart.Watch(log=run_dir / "train.log", started=first - 50, ended=first + 200, peak_rss_bytes=3 << 30)


def test_a_validation_is_judged_problem_by_problem(run_dir: Path) -> None:
    run = Run(run_dir)
    problems, before = quickstart.held_out_report(run, 0)
    assert problems == PROBLEMS
    assert (before.trajectories, before.accuracy) == (4, 0.25)
    assert before.failures == {"guessed": 1, "refused_call": 1, "malformed_call": 1}
    _, after = quickstart.held_out_report(run, 2)
    assert (after.accuracy, after.failures) == (1.0, {})
    depths = [problem.depth for problem in PROBLEMS]
    assert after.by_depth == dict.fromkeys(sorted(set(depths)), 1.0)
    assert after.mean_calls == sum(depths) / 4 and after.mean_turns == sum(depths) / 4 + 1


def test_the_summary_has_validation_before_and_after_and_counts_training_alone(run_dir: Path) -> None:
    summary = quickstart.result(run_dir, 7, watch(run_dir))
    assert (summary["seed"], summary["held_out"], summary["steps"], summary["trajectories"]) == (7, 4, 2, 16)
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.25, 1.0)
    assert (summary["reward_first_step"], summary["reward_last_step"]) == (0.25, 1.0)
    depths = [problem.depth for problem in PROBLEMS]
    turns = [depths[0] + 1, 1, 2, 2, *(depth + 1 for depth in depths)]
    assert summary["mean_turns"] == pytest.approx(sum(turns) / 8)
    assert summary["tool_calls"] == 2 * (depths[0] + 1 + sum(depths))
    assert sum(summary["tool_failures"].values()) == 2  # the call that no calculator takes, of both siblings
    assert summary["end_reasons"] == {"final_answer": 16}
    assert (summary["startup_seconds"], summary["train_seconds"], summary["peak_rss_gib"]) == (50.0, 200.0, 3.0)


def test_the_table_and_the_picture_show_it(run_dir: Path, tmp_path: Path) -> None:
    summary = quickstart.result(run_dir, 0, watch(run_dir))
    stream = io.StringIO()
    quickstart.show(summary, Console(file=stream, width=120))
    text = stream.getvalue()
    assert "held-out accuracy (4 problems, greedy)" in text and "0.250" in text and "1.000" in text
    assert "failed: malformed_call" in text and "2 steps, 16 trajectories" in text
    assert "start-up 50 s, training 200 s" in text
    picture = quickstart.draw(Run(run_dir), summary, tmp_path / "reward.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_steps_are_reported_once_and_the_last_one_when_the_run_has_ended(run_dir: Path) -> None:
    stream = io.StringIO()
    steps = quickstart.Steps(run_dir, Console(file=stream, width=40))
    steps.report(finished=False)
    assert [line[:12] for line in stream.getvalue().splitlines()] == ["val   step  ", "train step  ", "train step  "]
    steps.report(finished=True)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4 and lines[3].startswith("val   step   2: 4 trajectories, reward 1.000")


def test_steps_of_a_run_that_has_not_begun(tmp_path: Path) -> None:
    stream = io.StringIO()
    quickstart.Steps(tmp_path, Console(file=stream)).report(finished=False)
    assert stream.getvalue() == ""


def test_a_run_without_two_validations_has_no_result(tmp_path: Path) -> None:
    with JournalWriter(tmp_path, meta={}):
        pass
    with pytest.raises(ConfigError, match="0 validations and 0 train steps were recorded"):
        quickstart.result(tmp_path, 0, quickstart.Watch(log=tmp_path / "train.log", started=0.0))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "missing.yaml"], "missing.yaml: no such file"),
        (["agentloop.loop.max_turn=3"], "unknown key 'max_turn'; did you mean 'max_turns'?"),
        (["trainer"], "override 'trainer': expected key=value"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_what_was_there(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "run"
    older.mkdir()
    monkeypatch.setattr(sys, "argv", ["run", "--run-dir", str(older), *arguments])
    assert quickstart.main() == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("quickstart: ") and sentence in line
    assert list(tmp_path.iterdir()) == [older] and not list(older.iterdir())


INTERRUPTED = """
import signal, sys, time
count = 0
def note(number, frame):
    global count
    count += 1
signal.signal(signal.SIGTERM, note)
print("ready", flush=True)
while not count:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(100 + count)
"""


def test_ctrl_c_reaches_the_training_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "POLL_S", 0.05)
    log = tmp_path / "train.log"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

    def press() -> None:
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    try:
        watch = quickstart.train([sys.executable, "-c", INTERRUPTED], tmp_path, Console(file=io.StringIO()))
    finally:
        signal.signal(signal.SIGINT, before)
    assert watch.exit_code == 101
