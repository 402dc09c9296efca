"""What the quickstart's GPU benchmark reads from a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.journal import JournalWriter
from agentloop.journal.train_side import write_update
from benchmarks.gpu.quickstart import logprobs_by_turn
from tests.journal.conversations import conversation
from tests.journal.test_train_side import trainer_row


def test_log_probabilities_by_step_and_turn(tmp_path: Path) -> None:
    with JournalWriter(tmp_path) as writer:
        told = [conversation(writer, seed, step=3, turns=2) for seed in range(3)]
    assert logprobs_by_turn(tmp_path) == {}
    write_update(tmp_path, [trainer_row(t) for t in told[:2]], step=3, update=0, generation=1)
    found = logprobs_by_turn(tmp_path)
    assert {step: list(turns) for step, turns in found["logprobs_by_turn"].items()} == {"3": ["0", "1", "all"]}
    assert found["logprobs_by_turn"]["3"]["1"]["max_abs"] == pytest.approx(0.5)
    assert found["train_side_arrived"] == [2, 3]
