"""The tutorial, command by command, as its page has them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agentloop.journal import Run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "own_tool"


def commands() -> list[list[str]]:
    blocks = re.findall(r"```\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def run(command: list[str], folder: Path) -> str:
    """The command as the page has it, but for where runs go and for the interpreter."""
    moved = [part.replace("runs/own_tool", str(folder)) for part in command]
    moved[0] = sys.executable if moved[0] == "python" else str(Path(sys.executable).with_name(moved[0]))
    done = subprocess.run(moved, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_users_code_is_short_and_its_parts_can_be_tried(tmp_path: Path) -> None:
    code = [line for line in (FOLDER / "odometer.py").read_text().splitlines() if line.strip()]
    assert len(code) + 3 < 60
    make, lint, try_, rows = commands()[:4]
    run(make, tmp_path)
    assert "nothing wrong" in run(lint, tmp_path)
    assert "801" in run(try_, tmp_path), "99 * 99 is 9801"
    run(rows, tmp_path)


def accuracy(run: Run, step: int) -> float:
    rewards = [row.reward for row in run.trajectories("val", step)]
    assert len(rewards) == 128
    return sum(reward or 0.0 for reward in rewards) / len(rewards)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_model_learns_to_believe_its_odometer(tmp_path: Path) -> None:
    make, *_, train, ls, show = commands()
    for command in (make, train, ls, show):
        run(command, tmp_path)
    trained = Run(tmp_path)
    assert accuracy(trained, 0) < 0.7
    assert accuracy(trained, 12) > 0.9
