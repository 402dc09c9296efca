"""A run of `verl.trainer.main_ppo` that loses a rollout worker, then is killed itself, and is started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from agentloop.cli import build
from agentloop.journal import Run
from agentloop.verl.launch import make_plan
from agentloop.verl.process import RUN_ID, _processes, parse_metrics
from tests.conftest import CHATML
from tests.verl.assets import run_file_with_tool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOOL = '''
import asyncio, os, signal
from pathlib import Path
from agentloop.tools import BaseTool, ToolResult

HERE = Path(__file__).parent
SCHEMA = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {
    "type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}}}


class Planted(BaseTool):
    """Lives in the rollout worker's process: kills it, or never comes back, when a file says so."""

    def get_openai_tool_schema(self):
        return SCHEMA

    async def create(self, instance_id=None, **kwargs):
        try:
            (HERE / "kill_a_worker").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        except FileNotFoundError:
            pass
        if (HERE / "hang").exists():
            (HERE / "hanging").touch()
            await asyncio.sleep(3600)
        return await super().create(instance_id, **kwargs)

    async def execute(self, instance_id, parameters, **kwargs):
        return ToolResult("nothing")
'''


class Started:
    """A run that goes on beside the test."""

    def __init__(self, folder: Path, name: str, *overrides: str) -> None:
        plan = make_plan(folder / "run.yaml", overrides)
        self.log = folder / f"{name}.log"
        self.marker = f"{folder}/{name}"
        with self.log.open("w") as log:
            self.child = subprocess.Popen(
                plan.command,
                env={**os.environ, **plan.env, RUN_ID: self.marker},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def steps(self) -> list[dict[str, float]]:
        """verl's metrics of each step so far."""
        lines = [line for line in self.log.read_text().splitlines() if "step:" in line and "timing_s/step:" in line]
        return [parse_metrics(line) for line in lines]

    def wait_for(self, condition: Callable[[], object], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.child.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to every process of the run, Ray's included."""
        while left := _processes(self.marker):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.child.poll()
            time.sleep(0.05)
        self.child.wait()


@contextmanager
def started(folder: Path, name: str, *overrides: str) -> Iterator[Started]:
    run = Started(folder, name, *overrides)
    try:
        yield run
    finally:
        run.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    content = run_file_with_tool(tmp_path, TOOL, CHATML)
    content["verl"]["trainer"] |= {"save_freq": 1, "resume_mode": "auto", "total_training_steps": 16}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def rows(run: Run, step: int) -> dict[str, Any]:
    return {row.id: row for row in run.trajectories("train", step)}


def test_a_lost_worker_costs_its_groups_and_a_killed_run_goes_on_where_it_was(folder: Path) -> None:
    with started(folder, "first", "actor_rollout_ref.rollout.agent.num_workers=2") as run:
        run.wait_for(lambda: len(run.steps) >= 1)
        (folder / "kill_a_worker").touch()
        run.wait_for(lambda: any(step["agentloop/failed_groups"] for step in run.steps))
        (folder / "hang").touch()
        run.wait_for((folder / "hanging").exists)
        time.sleep(1.0)
        run.kill()
    before = Run(folder / "run")
    assert "1 of 2 rollout workers are left" in run.log.read_text()
    [(killed_in, lost)] = [(i, step) for i, step in enumerate(run.steps, 1) if step["agentloop/failed_groups"]]
    assert (lost["agentloop/failed_groups"], lost["agentloop/trajectories"]) == (2, 8)
    assert lost["actor/grad_norm"] > 0
    hung = len(run.steps) + 1
    unfinished = rows(before, hung)
    assert unfinished and not all(row.complete for row in unfinished.values())
    assert {problem.kind for problem in before.verify()} <= {"torn_tail"}
    whole = {step: rows(before, step) for step in range(1, hung)}
    assert [len(found) for step, found in whole.items() if step != killed_in] == [16] * (hung - 2)

    (folder / "hang").unlink()
    with started(folder, "second", f"trainer.total_training_steps={hung + 16}") as again:
        again.wait_for(lambda: len(again.steps) >= 1)
        (folder / "kill_a_worker").touch()
        assert again.child.wait(120) != 0
    text = again.log.read_text()
    assert "0 of 1 rollout workers are left" in text
    assert "no rollout worker is left" in text or "no materializable trajectories" in text, text[-4000:]
    assert "Exception in thread" not in text
    after = Run(folder / "run")
    for step, found in whole.items():
        assert rows(after, step) == found, "steps that were not done again are as they were"
    redone = rows(after, hung)
    assert len(redone) == 16 and all(row.complete and row.generation == 2 for row in redone.values())
    assert not set(redone) & set(unfinished)
    told = CliRunner().invoke(build("stats"), ["stats", str(folder / "run"), "--json"])
    assert told.exit_code == 0, told.output
    counted = {(s["partition"], s["step"]): s["trajectories"] for s in json.loads(told.output)["steps"]}
    assert counted["train", hung] == 16
