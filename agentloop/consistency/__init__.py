"""Trainer against rollout: how far apart their log-probabilities of the same tokens are, and whether that may go on."""

from __future__ import annotations

from agentloop.consistency.figures import Drift, Figures
from agentloop.consistency.judge import Beyond, ConsistencyError, Thresholds, judge
from agentloop.consistency.record import read_events
from agentloop.consistency.report import Consistency, Group, Step, consistency

__all__ = [
    "Beyond",
    "Consistency",
    "ConsistencyError",
    "Drift",
    "Figures",
    "Group",
    "Step",
    "Thresholds",
    "consistency",
    "judge",
    "read_events",
]
