"""Summaries of groups, and the step's metrics made of them."""

from __future__ import annotations

import json
from collections.abc import Callable

from agentloop.trajectory import CallStatus, EndReason, Reward, Trajectory
from agentloop.verl.metrics import metrics, summarize

Build = Callable[..., Trajectory]


def test_a_step_counts_ends_tools_and_masked_over_its_groups(build: Build) -> None:
    groups = [
        [build(sibling=0, reward=Reward(1.0)), build(sibling=1, masked=True)],
        [build(uid="g1", sibling=0, turns=((3, 2), (3, 2), (3, 0)), reward=Reward(0.0))],
    ]
    found = metrics([json.loads(json.dumps(summarize(group))) for group in groups], failed_groups=1)
    assert found["agentloop/trajectories"] == 3
    assert found["agentloop/masked"] == found["agentloop/end/engine_failure"] == 1
    assert found["agentloop/end/final_answer"] == 2
    assert found["agentloop/tools/ok"] == 4
    assert found["agentloop/failed_groups"] == 1
    assert (found["agentloop/turns/mean"], found["agentloop/turns/max"]) == (7 / 3, 3)
    assert found["agentloop/generate_s/mean"] == (1.0 + 1.0 + 1.5) / 3
    assert 1.0 < found["agentloop/generate_s/p95"] <= 1.5


def test_every_kind_is_there_even_if_nothing_happened(build: Build) -> None:
    found = metrics([summarize([build(reward=Reward(1.0))])])
    assert {f"agentloop/end/{reason.value}" for reason in EndReason} <= set(found)
    assert {f"agentloop/tools/{status.value}" for status in CallStatus} <= set(found)
