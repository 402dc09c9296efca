"""The audit: proves, from the recorded trajectory to the padded batch, that what is trained is what was sampled.

`audit_run` reads a run's record, `audit_trajectories` ledgers in memory, `audit_batch` a batch, alone or against either. Each
returns a `Report` that names every invariant which does not hold, with the trajectory, the turn and the first token.
"""

from __future__ import annotations

from agentloop.audit.api import Score, audit_batch, audit_run, audit_trajectories
from agentloop.audit.batches import read_batch
from agentloop.audit.report import INVARIANTS, Finding, Report

__all__ = ["INVARIANTS", "Finding", "Report", "Score", "audit_batch", "audit_run", "audit_trajectories", "read_batch"]
