"""Whole runs of `verl.trainer.main_ppo` through our manager, with a tool that fails for one sibling of every group."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from agentloop.journal import Run
from agentloop.verl.launch import make_plan
from agentloop.verl.process import parse_metrics, run
from tests.conftest import CHATML
from tests.verl.assets import run_file_with_tool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOOL = '''
from agentloop.errors import ToolInfraError
from agentloop.tools import BaseTool, ToolResult

SCHEMA = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {
    "type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}}}


class Planted(BaseTool):
    """Cannot be created for the second of every four trajectories."""

    made = 0

    def get_openai_tool_schema(self):
        return SCHEMA

    async def create(self, instance_id=None, **kwargs):
        Planted.made += 1
        if Planted.made % 4 == 2:
            raise ToolInfraError("the planted failure")
        return await super().create(instance_id, **kwargs)

    async def execute(self, instance_id, parameters, **kwargs):
        return ToolResult("nothing")
'''


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    content = run_file_with_tool(tmp_path, TOOL, CHATML)
    content["agentloop"]["train_side"] = True
    return content


def train(folder: Path, settings: dict[str, Any], *overrides: str) -> list[dict[str, float]]:
    """verl's metrics of each step."""
    path, log = folder / "run.yaml", folder / "verl.log"
    path.write_text(yaml.safe_dump(settings))
    plan = make_plan(path, overrides)
    assert run(plan.command, plan.env, log) == 0, log.read_text()[-4000:]
    lines = [line for line in log.read_text().splitlines() if "step:" in line and "timing_s/step:" in line]
    return [parse_metrics(line) for line in lines]


def ends(run_dir: Path, step: int) -> Counter[str]:
    """End reasons in the journal of one training step."""
    found: Counter[str] = Counter()
    for path in (run_dir / "train" / f"step_{step:06d}").glob("*.traj.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        found.update(event["end_reason"] for event in events if event["type"] == "traj_end")
    return found


def check_train_side(run: Run, step: int) -> None:
    """The twelve that verl was given of the sixteen, each with its own tokens (reading them checks that)."""
    side = run.train_side(step)
    assert (side.arrived, side.expected, side.trained_steps) == (12, 12, {step})
    for trained in side:
        apart = np.abs(trained.old_log_probs - trained.rollout_log_probs)[trained.sampled]
        assert apart.size and apart.max() < 1e-3


def test_v1_trains_on_the_healthy_siblings_and_resumes_its_journal(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings["verl"]["trainer"] |= {"save_freq": 1, "resume_mode": "auto", "val_before_train": True}
    first = train(tmp_path, settings, "trainer.total_training_steps=1")
    again = train(tmp_path, settings, "trainer.total_training_steps=2", "trainer.val_before_train=false")
    assert [len(first), len(again)] == [1, 1]
    for step, metrics in enumerate([*first, *again], start=1):
        assert metrics["agentloop/trajectories"] == 16
        assert metrics["agentloop/masked"] == metrics["agentloop/end/tool_failure"] == 4
        assert metrics["agentloop/failed_groups"] == 0
        assert metrics["training/rollout_probs_diff_max"] < 1e-4
        assert metrics["actor/grad_norm"] > 0
        journal = ends(tmp_path / "run", step)
        assert (sum(journal.values()), journal["tool_failure"]) == (16, 4)
        check_train_side(Run(tmp_path / "run"), step)
    assert sorted(path.name for path in (tmp_path / "run" / "starts").iterdir()) == ["g1.json", "g2.json"]
    assert list((tmp_path / "run" / "train" / "step_000002").glob("w0.g2.traj.jsonl"))
    assert list((tmp_path / "run" / "val" / "step_000000").glob("w0.g1.traj.jsonl"))


def test_the_legacy_trainer_gets_a_row_for_every_trajectory(tmp_path: Path, settings: dict[str, Any]) -> None:
    steps = train(tmp_path, settings, "trainer.use_v1=false", "actor_rollout_ref.rollout.agent.num_workers=2")
    assert len(steps) == 2
    for step, metrics in enumerate(steps, start=1):
        check_train_side(Run(tmp_path / "run"), step)
        assert metrics["timing_s/agentloop/trajectories"] == 16
        assert metrics["timing_s/agentloop/masked"] == 4
        assert metrics["actor/grad_norm"] > 0
        assert all(value == value for value in metrics.values())
    assert "agentloop_grpo, which keeps masked trajectories out of groups" in (tmp_path / "verl.log").read_text()
