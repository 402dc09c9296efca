"""The data files: verl's columns, read back."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agentloop.data.rows import sample_from_row
from examples.quickstart import make_data


def test_rows_become_samples(tmp_path: Path) -> None:
    train, val = make_data.write(tmp_path, seed=1, train_rows=64, held_out_rows=32)
    assert len(pd.read_parquet(train)) == 64
    frame = pd.read_parquet(val)
    assert len(frame) == 32
    for row, problem in zip(frame.to_dict("records"), make_data.held_out(32), strict=True):
        sample = sample_from_row(row, uid="0")
        assert sample.messages[-1] == {"role": "user", "content": problem.question}
        assert sample.ground_truth == str(problem.answer)
        assert sample.extra_info["depth"] == problem.depth
        assert sample.extra_info["split"] == "held_out"


def test_train_rows_follow_the_seed_and_held_out_rows_do_not(tmp_path: Path) -> None:
    one, other = make_data.write(tmp_path / "1", seed=1, train_rows=8), make_data.write(tmp_path / "2", seed=2, train_rows=8)
    assert one[0].read_bytes() != other[0].read_bytes()
    assert one[1].read_bytes() == other[1].read_bytes()
