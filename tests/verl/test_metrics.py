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


def test_verl_combines_the_updates_between_two_syncs_as_the_names_say(build: Build) -> None:
    from verl.trainer.ppo.v1.utils import MetricsAggregator

    short, long = (metrics([summarize([build(turns=turns, reward=Reward(1.0))])]) for turns in (((5, 0),), ((5, 3), (4, 0))))
    short["agentloop/trajectory_s/mean"], long["agentloop/trajectory_s/mean"] = 1.0, 3.0
    aggregator = MetricsAggregator()
    for found in (short, long):
        aggregator.add_step_metrics(found, sample_count=1)
    combined = aggregator.get_aggregated_metrics()
    assert combined["agentloop/turns/max"] == 2
    averaged = {name: (short[name] + long[name]) / 2 for name in short if not name.endswith("/max")}
    assert {name: combined[name] for name in averaged} == averaged


def test_a_step_without_summaries_has_the_same_counts(build: Build) -> None:
    """As when every group failed with an error of the program."""
    names = {name for name in metrics([summarize([build(reward=Reward(1.0))])]) if not name.endswith(("/mean", "/max", "/p95"))}
    assert set(metrics([], failed_groups=4)) == names
